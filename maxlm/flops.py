"""Parameters and model FLOPs of a configuration, counted from its dimensions alone.

The convention of every FLOP and MFU figure in maxlm: *model* FLOPs, what the mathematics needs and not what the
hardware happens to do.
- A multiply-add is 2 FLOPs; the backward pass costs twice the forward pass. So a matrix costs 6 per weight and token.
- Attention is counted as causal: a query of a sequence of T sees T / 2 keys on average; in a layer with a sliding
  window of W keys it sees W - W**2 / (2 T). Where it sees both sides (model.causal=false) these are T.
- With adapters (maxlm/lora.py) a frozen matrix costs 4 per weight and token, for it has no gradient.
- Of a layer's experts a token pays for those it visits, shared ones included, and for the router.
- Not counted: what rematerialization computes again, the embedding lookup, padding of the vocabulary, biases, norms,
  activations, softmax, and that packed documents do not see each other.

Figures published with attention counted in full are higher: by 6.7 % for Llama 3.1 8B at 4,096 tokens, 12.5 % at 8,192.

References:
    Kaplan et al., arXiv:2001.08361, section 2.1; Chowdhery et al. (PaLM), arXiv:2204.02311, appendix B, which counts
    attention in full.
"""

from maxlm.config import ModelConfig


def num_params(model: ModelConfig) -> dict[str, int]:
    """Counts parameters by part.

    Args:
        model: the model.

    Returns:
        Counts for "embedding", "positions" (token types included), "unembedding" (0 if tied), "head" (what stands
        before it, and its bias), "attention", "mlp" (of dense layers), "experts"
        (shared ones included), "router", "norms", biases included; "total" is their sum, what is stored and trained;
        "total_unpadded" leaves out the rows that only pad the vocabulary, and is the figure to compare with published
        ones; "active" leaves out, too, the experts that a token does not visit.
    """
    D, F, V, L = model.d_model, model.d_ff, model.padded_vocab, model.num_layers
    E, moe_layers = model.num_experts or 0, model.num_expert_layers
    N, K, H = model.num_heads, model.kv_heads, model.head_size
    learned = model.max_positions or 0 if model.position == "learned" else 0
    qkv_bias = (N + 2 * K) * H if model.attention_bias != "none" else 0
    o_bias = D if model.attention_bias == "all" else 0
    num_up = 2 if model.mlp == "gated" else 1
    mlp_bias = num_up * F + D if model.mlp_bias else 0
    per_norm = 2 if model.norm_bias else 1
    qk_norms = 0 if not model.qk_norm else 2 * H if model.qk_norm_span == "head" else (N + K) * H
    norms_per_layer = (4 if model.norm_position == "both" else 2) * D + qk_norms
    others = (model.norm_position != "residual") + model.embed_norm + model.head_transform
    parts = {
        "embedding": V * D,
        "positions": (learned + model.num_token_types) * D,
        "unembedding": 0 if model.tie_embeddings else V * D,
        "head": model.head_transform * D * (D + model.mlp_bias) + model.unembed_bias * V,
        "attention": L * (_attention_weights(model) + qkv_bias + o_bias),
        "mlp": (L - moe_layers) * (_mlp_weights(model, F) + mlp_bias),
        "experts": moe_layers * (E + model.num_shared_experts) * _mlp_weights(model, model.expert_width),
        "router": moe_layers * E * (D + (1 if model.router_bias_rate else 0)),
        "norms": per_norm * (L * norms_per_layer + others * D),
    }
    total = sum(parts.values())
    padding = (V - model.vocab_size) * ((1 if model.tie_embeddings else 2) * D + model.unembed_bias)
    unvisited = moe_layers * (E - (model.experts_per_token or 0)) * _mlp_weights(model, model.expert_width)
    return {
        **parts,
        "total": total,
        "total_unpadded": total - padding,
        "active": total - padding - unvisited,
    }


def train_flops_per_token(model: ModelConfig, seq_len: int, adapters: int | None = None) -> float:
    """Model FLOPs of one token's forward and backward pass, by the convention above.

    Args:
        model: the model.
        seq_len: tokens per sequence; attention grows with it.
        adapters: number of weights of adapters, if these alone are trained: the others' gradients are not computed,
            which is a third of their FLOPs.

    Returns:
        FLOPs per token.
    """
    moe_layers, visited = model.num_expert_layers, (model.experts_per_token or 0) + model.num_shared_experts
    weights = model.num_layers * _attention_weights(model) + model.d_model * model.vocab_size
    weights += model.d_model**2 if model.head_transform else 0
    weights += (model.num_layers - moe_layers) * _mlp_weights(model, model.d_ff)
    weights += moe_layers * visited * _mlp_weights(model, model.expert_width)
    weights += moe_layers * model.d_model * (model.num_experts or 0)  # the router
    of_weights = 6 * weights if adapters is None else 4 * weights + 6 * adapters
    return of_weights + attention_flops_per_token(model, seq_len)


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """The part of train_flops_per_token that is no product with weights. Args and returns as there."""
    keys = sum(model.num_layers_of(kind) * _mean_keys(model, kind, seq_len) for kind in set(model.layer_pattern))
    # q @ k and probabilities @ v: each a multiply-add per head, feature and key
    return 6 * 2 * model.num_heads * model.head_size * keys


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilization: the share of the peak that model FLOPs make up.

    Args:
        tokens_per_s: training throughput over all devices, in tokens/s.
        flops_per_token: from train_flops_per_token.
        peak_flops: FLOP/s of all devices together: `hardware.detect(device).peak(dtype) * num_devices`.

    Returns:
        A fraction, 0.4 for 40 %.
    """
    return tokens_per_s * flops_per_token / peak_flops


def _attention_weights(model: ModelConfig) -> int:
    # q [D, N, H], k and v [D, K, H], o [N, H, D]
    return 2 * model.d_model * (model.num_heads + model.kv_heads) * model.head_size


def _mlp_weights(model: ModelConfig, width: int) -> int:
    return (3 if model.mlp == "gated" else 2) * model.d_model * width


def _mean_keys(model: ModelConfig, kind: str, seq_len: int) -> float:
    if not model.causal:
        return seq_len
    window = min(model.sliding_window or seq_len, seq_len) if kind == "local" else seq_len
    return window - window * window / (2 * seq_len)
