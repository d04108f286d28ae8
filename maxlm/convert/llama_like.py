"""Families whose config.json and tensors are named as those of Llama: rows and keys, see families.py."""

from maxlm.convert.family import Family, Row, row
from maxlm.convert.keys import (
    DenseFirst,
    Key,
    Layers,
    Only,
    QueryScale,
    RootScale,
    Rope,
    Window,
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
