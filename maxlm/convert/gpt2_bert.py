"""GPT-2 and BERT, which name everything in their own ways: rows and keys, see families.py."""

from maxlm.convert.family import Family, Row, row
from maxlm.convert.keys import Key, Only, Widened
from maxlm.convert.llama_like import SHAPES

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
