"""Grouped-query attention block: projections, optional QK-norm and RoPE around a kernel that is passed in."""

from collections.abc import Callable

import jax
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.linear import linear
from maxlm.model.norm import Norm
from maxlm.model.param import constant, normal
from maxlm.model.rope import rope
from maxlm.sharding import heads_letter, repeat_heads

AttentionKernel = Callable[..., jax.Array]
"""Signature of kernels.attention.attention."""


class Attention(nnx.Module):
    """Self-attention of one kind: global, or local with a sliding window."""

    def __init__(self, key: jax.Array, config: ModelConfig, kind: str):
        self.config, self.kind = config, kind
        keys = jax.random.split(key, 4)
        D, N, H = config.d_model, config.num_heads, config.head_size
        self.q = normal(keys[0], "DNH", config, D**-0.5)
        kv = self.kv = heads_letter(config.kv_heads)
        self.k = normal(keys[1], f"D{kv}H", config, D**-0.5)
        self.v = normal(keys[2], f"D{kv}H", config, D**-0.5)
        # The two matrices that write into the residual stream start smaller, so that its variance does not grow
        # with depth (GPT-2, section 2.3).
        self.o = normal(keys[3], "NHD", config, (2 * config.num_layers * N * H) ** -0.5)
        biased = config.attention_bias != "none"
        self.q_bias = constant("NH", config, 0.0) if biased else None
        self.k_bias = constant(f"{kv}H", config, 0.0) if biased else None
        self.v_bias = constant(f"{kv}H", config, 0.0) if biased else None
        self.o_bias = constant("D", config, 0.0) if config.attention_bias == "all" else None
        q_dims, k_dims = ("H", "H") if config.qk_norm_span == "head" else ("NH", f"{kv}H")
        self.q_norm = Norm(config, q_dims) if config.qk_norm else None
        self.k_norm = Norm(config, k_dims) if config.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, kernel: AttentionKernel
    ) -> jax.Array:
        """Returns [B, T, D], to be added to the residual stream."""
        config, kv = self.config, self.kv
        q_BTNH = linear("BTD,DNH->BTNH", x_BTD, self.q, self.q_bias)
        k_BTKH = linear(f"BTD,D{kv}H->BT{kv}H", x_BTD, self.k, self.k_bias)
        v_BTKH = linear(f"BTD,D{kv}H->BT{kv}H", x_BTD, self.v, self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH, "BTNH"), self.k_norm(k_BTKH, f"BT{kv}H")
        if kv == "J":
            k_BTKH, v_BTKH = repeat_heads(k_BTKH), repeat_heads(v_BTKH)
        local = self.kind == "local"
        if config.position == "rope":
            theta = (config.rope_theta_local if local else None) or config.rope_theta
            scaling = None if local else config.rope_scaling
            q_BTNH = rope(q_BTNH, positions_BT, theta, config.rope_fraction, scaling)
            k_BTKH = rope(k_BTKH, positions_BT, theta, config.rope_fraction, scaling)
        o_BTNH = kernel(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            segments_BT,
            scale=config.attention_scale or config.head_size**-0.5,
            window=config.sliding_window if local else None,
            softcap=config.attention_softcap,
            causal=config.causal,
        )
        return linear("BTNH,NHD->BTD", o_BTNH, self.o, self.o_bias)
