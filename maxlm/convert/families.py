"""Model families as data: their tensors beside our parameters, their config.json beside our model config.

A family is a row for each kind of tensor and a key for each field. To add one, write both tables and put it into
FAMILIES; the tests in tests/test_convert.py then take it up.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.config_model import ModelConfig
from maxlm.convert.family import Family, Row, row
from maxlm.convert.keys import (
    DenseFirst,
    FamilyError,
    Key,
    Layers,
    Only,
    QueryScale,
    RootScale,
    Rope,
    Tree,
    Widened,
    Window,
    short,
)

# ---- tensors

EMBEDDINGS = (
    row("model.embed_tokens.weight", "embed", "VD"),
    row("model.norm.weight", "final_norm/weight", "D"),
    row("lm_head.weight", "unembed", "VD"),
)
PRE_NORMS = (
    row("model.layers.{}.input_layernorm.weight", "layers/*/attention_norm/weight", "D"),
    row("model.layers.{}.post_attention_layernorm.weight", "layers/*/mlp_norm/weight", "D"),
)
FOUR_NORMS = tuple(
    row(f"model.layers.{{}}.{theirs}.weight", f"layers/*/{ours}/weight", "D")
    for theirs, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
)
OUTPUTS = (
    row("model.layers.{}.self_attn.o_proj.weight", "layers/*/attention/o", "D(NH)"),
    row("model.layers.{}.self_attn.o_proj.bias", "layers/*/attention/o_bias", "D"),
    row("model.layers.{}.mlp.down_proj.weight", "layers/*/mlp/down", "DF"),
    row("model.layers.{}.mlp.down_proj.bias", "layers/*/mlp/down_bias", "D"),
)
INPUTS = (
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.weight", f"layers/*/attention/{m}", "(NH)D") for m in "q"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.weight", f"layers/*/attention/{m}", "(KH)D") for m in "kv"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.bias", f"layers/*/attention/{m}_bias", "(NH)") for m in "q"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.bias", f"layers/*/attention/{m}_bias", "(KH)") for m in "kv"),
    *(row(f"model.layers.{{}}.self_attn.{m}_norm.weight", f"layers/*/attention/{m}_norm/weight", "H") for m in "qk"),
    *(row(f"model.layers.{{}}.mlp.{m}_proj.weight", f"layers/*/mlp/{m}", "FD") for m in ("gate", "up")),
    *(row(f"model.layers.{{}}.mlp.{m}_proj.bias", f"layers/*/mlp/{m}_bias", "F") for m in ("gate", "up")),
)
FUSED_INPUTS = (
    Row(
        "model.layers.{}.self_attn.qkv_proj.weight",
        tuple((f"layers/*/attention/{m}", "(NH)D" if m == "q" else "(KH)D") for m in "qkv"),
    ),
    Row("model.layers.{}.mlp.gate_up_proj.weight", (("layers/*/mlp/gate", "FD"), ("layers/*/mlp/up", "FD"))),
)


# ---- config.json

GELU_TANH = "gelu_pytorch_tanh"
BIASES = ((False, "none"), (True, "all"))
SHAPES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("intermediate_size", "d_ff"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Only("quantization_config", None),
)
ACTIVATION = Key(
    "hidden_act", "activation", "silu", (("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"))
)
NORM_EPS, UNTIED = Key("rms_norm_eps", "norm_eps", 1e-6), Key("tie_word_embeddings", "tie_embeddings", False)
SIZES = (*SHAPES, ACTIVATION, UNTIED, NORM_EPS)


# ---- the families

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*EMBEDDINGS, *PRE_NORMS, *INPUTS, *OUTPUTS),
    (
        *SIZES,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("head_dim", "head_dim", None),
        Key("attention_bias", "attention_bias", False, BIASES),
        Key("mlp_bias", "mlp_bias", False),
    ),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    LLAMA.rows,
    (*SIZES, Rope(), Key("num_key_value_heads", "num_kv_heads", 8), Key("head_dim", "head_dim", None), Window(4096)),
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA.rows,
    (*SIZES, Rope(), Key("num_key_value_heads", "num_kv_heads", 32), Only("use_sliding_window", False)),
    (("attention_bias", "qkv"),),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA.rows,
    (
        *SIZES,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", 32),
        Key("head_dim", "head_dim", 128),
        Key("attention_bias", "attention_bias", False, BIASES),
        Only("use_sliding_window", False),
    ),
    (("qk_norm", True),),
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (*EMBEDDINGS, *PRE_NORMS, *FUSED_INPUTS, *OUTPUTS),
    (
        *(*SHAPES, ACTIVATION, UNTIED, Key("rms_norm_eps", "norm_eps", 1e-5)),
        Key("num_key_value_heads", "num_kv_heads", None),
        Rope(partial=True),
        Window(),
    ),
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *LLAMA.rows,
        row("model.layers.{}.block_sparse_moe.gate.weight", "layers/*/moe/router/weight", "XD"),
        row("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", "layers/*/moe/gate", "FD"),
        row("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", "layers/*/moe/up", "FD"),
        row("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", "layers/*/moe/down", "DF"),
    ),
    (
        *(*SHAPES, ACTIVATION, UNTIED, Key("rms_norm_eps", "norm_eps", 1e-5)),
        Rope(theta=1_000_000.0),
        Key("num_key_value_heads", "num_kv_heads", 8),
        Key("head_dim", "head_dim", None),
        Key("num_local_experts", "num_experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
        Window(),
    ),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *LLAMA.rows,
        row("model.layers.{}.mlp.gate.weight", "layers/*/moe/router/weight", "XD"),
        row("model.layers.{}.mlp.experts.{}.gate_proj.weight", "layers/*/moe/gate", "FD"),
        row("model.layers.{}.mlp.experts.{}.up_proj.weight", "layers/*/moe/up", "FD"),
        row("model.layers.{}.mlp.experts.{}.down_proj.weight", "layers/*/moe/down", "DF"),
    ),
    (
        *SIZES,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", 4),
        Key("head_dim", "head_dim", None),
        Key("attention_bias", "attention_bias", False, BIASES),
        Key("num_experts", "num_experts", 128, also="num_local_experts"),  # of transformers 4 and 5
        Key("num_experts_per_tok", "experts_per_token", 8),
        Key("moe_intermediate_size", "expert_d_ff", 768),
        Key("norm_topk_prob", "router_normalize", False),
        Only("decoder_sparse_step", 1),
        DenseFirst(),
        Only("use_sliding_window", False),
    ),
    (("qk_norm", True),),
)
GEMMA_PARTS = (
    *SHAPES,
    NORM_EPS,
    Key("tie_word_embeddings", "tie_embeddings", True),
    Key("head_dim", "head_dim", 256),
    Key("attention_bias", "attention_bias", False, BIASES),
    Only("use_bidirectional_attention", None, (False,)),
    RootScale(),
)
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    LLAMA.rows,
    (
        *GEMMA_PARTS,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", 16),
        # "gelu" was written by mistake, and is read as what was meant
        Key("hidden_act", "activation", GELU_TANH, ((GELU_TANH, "gelu_tanh"), ("gelu", "gelu_tanh"))),
    ),
    (("norm_offset", True),),
)
GEMMA2_PARTS = (
    *GEMMA_PARTS,
    Key("num_key_value_heads", "num_kv_heads", 4),
    Key("hidden_activation", "activation", GELU_TANH, ((GELU_TANH, "gelu_tanh"),)),
    QueryScale("query_pre_attn_scalar", 256),
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (*EMBEDDINGS, *FOUR_NORMS, *INPUTS, *OUTPUTS),
    (
        *GEMMA2_PARTS,
        Rope(),
        Layers(2, 4096),
        Key("attn_logit_softcapping", "attention_softcap", 50.0),
        Key("final_logit_softcapping", "logit_softcap", 30.0),
    ),
    (("norm_offset", True), ("norm_position", "both")),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    GEMMA2.rows,
    (
        *GEMMA2_PARTS,
        Rope(theta=1_000_000.0, local=10_000.0),
        Layers(6, 4096),
        Key("attn_logit_softcapping", "attention_softcap", None),
        Key("final_logit_softcapping", "logit_softcap", None),
    ),
    (*GEMMA2.fields, ("qk_norm", True)),
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        *EMBEDDINGS,
        row("model.layers.{}.post_attention_layernorm.weight", "layers/*/attention_post_norm/weight", "D"),
        row("model.layers.{}.post_feedforward_layernorm.weight", "layers/*/mlp_post_norm/weight", "D"),
        *(r for r in INPUTS if "_norm" not in r.theirs),
        row("model.layers.{}.self_attn.q_norm.weight", "layers/*/attention/q_norm/weight", "(NH)"),
        row("model.layers.{}.self_attn.k_norm.weight", "layers/*/attention/k_norm/weight", "(KH)"),
        *OUTPUTS,
    ),
    (
        *(*SHAPES, ACTIVATION, UNTIED, Key("rms_norm_eps", "norm_eps", 1e-5)),
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("attention_bias", "attention_bias", False, BIASES),
    ),
    (("norm_position", "post"), ("qk_norm", True), ("qk_norm_span", "all")),
)
GPT2_INPUTS = (("q", "D(NH)"), ("k", "D(KH)"), ("v", "D(KH)"))
GPT2_ACTIVATIONS = (("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu"))
GPT2_LAYER = {  # matrices are [in, out]
    "ln_1": ("attention_norm", "weight", "D", "bias"),
    "attn.c_proj": ("attention", "o", "(NH)D", "o_bias"),
    "ln_2": ("mlp_norm", "weight", "D", "bias"),
    "mlp.c_fc": ("mlp", "up", "DF", "up_bias"),
    "mlp.c_proj": ("mlp", "down", "FD", "down_bias"),
}
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
        row("transformer.wte.weight", "embed", "VD"),
        row("transformer.wpe.weight", "positions", "TD"),
        row("transformer.ln_f.weight", "final_norm/weight", "D"),
        row("transformer.ln_f.bias", "final_norm/bias", "D"),
        row("lm_head.weight", "unembed", "VD"),
        Row("transformer.h.{}.attn.c_attn.weight", tuple((f"layers/*/attention/{m}", d) for m, d in GPT2_INPUTS), 1),
        Row(
            "transformer.h.{}.attn.c_attn.bias",
            tuple((f"layers/*/attention/{m}_bias", d[1:]) for m, d in GPT2_INPUTS),
        ),
        *(row(f"transformer.h.{{}}.{n}.weight", f"layers/*/{p}/{w}", d) for n, (p, w, d, _) in GPT2_LAYER.items()),
        *(row(f"transformer.h.{{}}.{n}.bias", f"layers/*/{p}/{b}", d[-1]) for n, (p, _, d, b) in GPT2_LAYER.items()),
    ),
    (
        Key("vocab_size", "vocab_size"),
        Key("n_embd", "d_model"),
        Widened("n_inner", "d_ff", "n_embd", 4),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_positions", "max_positions", 1024),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("activation_function", "activation", "gelu_new", GPT2_ACTIVATIONS),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("reorder_and_upcast_attn", False),
        Only("add_cross_attention", False),
        Only("quantization_config", None),
    ),
    (
        *(("norm", "layer"), ("norm_bias", True), ("position", "learned")),
        *(("mlp", "plain"), ("mlp_bias", True), ("attention_bias", "all")),
    ),
    prefix="transformer.",
    buffers=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)
BERT_LAYER = {
    "attention.self.query": ("attention/q", "(NH)", "D"),
    "attention.self.key": ("attention/k", "(KH)", "D"),
    "attention.self.value": ("attention/v", "(KH)", "D"),
    "attention.output.dense": ("attention/o", "D", "(NH)"),
    "intermediate.dense": ("mlp/up", "F", "D"),
    "output.dense": ("mlp/down", "D", "F"),
}
BERT_NORMS = {
    "bert.embeddings.LayerNorm": "embed_norm",
    "bert.encoder.layer.{}.attention.output.LayerNorm": "layers/*/attention_post_norm",
    "bert.encoder.layer.{}.output.LayerNorm": "layers/*/mlp_post_norm",
    "cls.predictions.transform.LayerNorm": "head/norm",
}
BERT = Family(
    "bert",
    "BertForMaskedLM",
    (
        row("bert.embeddings.word_embeddings.weight", "embed", "VD"),
        row("bert.embeddings.position_embeddings.weight", "positions", "TD"),
        row("bert.embeddings.token_type_embeddings.weight", "token_types", "YD"),
        *(row(f"bert.encoder.layer.{{}}.{n}.weight", f"layers/*/{p}", o + i) for n, (p, o, i) in BERT_LAYER.items()),
        *(row(f"bert.encoder.layer.{{}}.{n}.bias", f"layers/*/{p}_bias", o) for n, (p, o, _) in BERT_LAYER.items()),
        *(row(f"{n}.{kind}", f"{p}/{kind}", "D") for n, p in BERT_NORMS.items() for kind in ("weight", "bias")),
        row("cls.predictions.transform.dense.weight", "head/dense", "OD"),
        row("cls.predictions.transform.dense.bias", "head/dense_bias", "O"),
        row("cls.predictions.decoder.weight", "unembed", "VD"),
        row("cls.predictions.bias", "unembed_bias", "V"),
    ),
    (
        *SHAPES,
        Key("max_position_embeddings", "max_positions", 512),
        Key("type_vocab_size", "num_token_types", 2),
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("hidden_act", "activation", "gelu", GPT2_ACTIVATIONS),
        # of the output projection's two biases, transformers 5 uses another one where it is not tied
        Only("tie_word_embeddings", True),
        Only("position_embedding_type", "absolute", (None,)),
        Only("is_decoder", False),
        Only("add_cross_attention", False),
    ),
    (
        *(("causal", False), ("norm", "layer"), ("norm_bias", True), ("norm_position", "residual")),
        *(("position", "learned"), ("embed_norm", True), ("mlp", "plain"), ("mlp_bias", True)),
        *(("attention_bias", "all"), ("tie_embeddings", True), ("head_transform", True), ("unembed_bias", True)),
    ),
    prefix="bert.",
    buffers=r"bert\.embeddings\.(position_ids|token_type_ids)",
    left_out=r"bert\.pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)",
    aliases=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
)
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE, OLMO2, GPT2, BERT)
}
REFUSED = {"gemma3": "is a model of images and text; take its text model, which is gemma3_text"}
"""Families that look like others and are not."""


def family_of(tree: Tree) -> Family:
    """The family of a config.json.

    Raises:
        FamilyError: it is not known; lists those that are, and the nearest.
    """
    name = tree.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in REFUSED:
        raise FamilyError(f"model_type={name} {REFUSED[name]}")
    near = difflib.get_close_matches(str(name)[:40], FAMILIES, 1, 0.5)
    raise FamilyError(
        f"model_type={short(name)} is not a family that maxlm knows; those are {', '.join(FAMILIES)}"
        + (f", and {near[0]} is the nearest" if near else "")
    )


def family_for(model: ModelConfig, names: Sequence[str] = tuple(FAMILIES)) -> tuple[Family, dict[str, Any]]:
    """The first family that has such a model, and the model's config.json.

    Raises:
        FamilyError: none has; says why of each.
    """
    reasons = []
    for name in names:
        try:
            return FAMILIES[name], FAMILIES[name].write_config(model)
        except FamilyError as error:
            reasons.append(str(error))
    raise FamilyError(f"this model is of no family that maxlm can write: {'; '.join(reasons)}")
