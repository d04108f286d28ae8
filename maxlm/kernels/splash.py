"""Splash attention on TPU: never holds logits, skips what the mask hides. Forward and backward on one device.

The kernels are JAX's own (Pallas). They are called piece by piece, since what surrounds them (sharding, remat, the ring
of parallel/attention.py) decides what is kept: forward gives the log-sum-exp beside the output, backward takes both.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from maxlm.kernels.splash_blocks import Blocks, Mask, choose


@dataclass(frozen=True)
class Splash:
    """What is fixed at compile time.

    Attributes:
        scale: multiplies the logits.
        causal: queries see keys at their place and before; else all.
        window: keys that a query sees, itself included; None is all.
        softcap: bound of the logits.
        interpret: run on any machine, slowly.
        chip: hardware.Chip.name of the chip it is for, which decides on block sizes; None takes them by rule.
        blocks: block sizes of all kernels instead.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    interpret: bool = False
    chip: str | None = None
    blocks: Blocks | None = None

    def forward(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, N, H] in q's dtype, and float32 log-sum-exp of the logits [B, N, T].

        Args:
            q_BTNH: queries.
            k_BSKH: keys.
            v_BSKH: values.
            segments: document numbers of queries [B, T] and of keys [B, S], int32; None where all are of one document.
        """
        kernel = self._kernel(q_BTNH, k_BSKH)
        heads = self._heads(q_BTNH, k_BSKH, v_BSKH)
        ids = None if segments is None else splash.SegmentIds(*segments)
        o, (log_z,) = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(*heads, ids)
        B, T, N, H = q_BTNH.shape
        # splash writes log_z 128 times: together with o, only one of them is kept from here on
        o, log_z = jax.lax.optimization_barrier((o, log_z.reshape(B, N, T)))
        return o.reshape(B, N, T, H).swapaxes(1, 2), log_z

    def backward(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segments: tuple[jax.Array, jax.Array] | None,
        o_BTNH: jax.Array,
        log_z_BNT: jax.Array,
        do_BTNH: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients by q, k and v, in their dtypes. Args: as forward's, what it gives, and the gradient by o."""
        kernel = self._kernel(q_BTNH, k_BSKH)
        q, k, v = self._heads(q_BTNH, k_BSKH, v_BSKH)
        # else the product before this one writes features before tokens, and both arrays are copied
        in_order = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # noqa: E731
        o, do = (in_order(x.swapaxes(1, 2)).reshape(q.shape) for x in (o_BTNH, do_BTNH))

        def run(*arrays: Any) -> tuple[jax.Array, ...]:
            q, k, v, o, log_z, do, segments = arrays
            saved = (q, k, v, segments, None, o, log_z, kernel.dq_mask_info, kernel.dkv_mask_info)
            return splash._splash_attention_bwd(res=saved, do=do, **kernel.kwargs)[3:6]

        ids = None if segments is None else splash.SegmentIds(*segments)
        each = jax.vmap(jax.vmap(run, (*[0] * 6, None)))
        dq, dk, dv = each(q, k, v, o, log_z_BNT.reshape(q.shape[:-1]), do, ids)
        dq = (dq.astype(jnp.float32) * self.scale).astype(q_BTNH.dtype).reshape(q.shape)
        B, T, N, H = q_BTNH.shape
        return dq.reshape(B, N, T, H).swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)

    def _heads(self, q_BTNH: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Heads first, queries by the key/value head they use [B, K, G, T, H], and scaled."""
        B, T, _, H = q_BTNH.shape
        q = (q_BTNH.astype(jnp.float32) * self.scale).astype(q_BTNH.dtype)
        q = q.swapaxes(1, 2).reshape(B, k.shape[2], -1, T, H)
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def _kernel(self, q_BTNH: jax.Array, k_BSKH: jax.Array) -> splash.SplashAttentionKernel:
        shape = q_BTNH.shape[1], k_BSKH.shape[1]
        if self.window is not None:
            mask: Any = masks.LocalMask(shape, (self.window - 1, 0), 0)
        else:
            mask = masks.CausalMask(shape) if self.causal else masks.FullMask(shape)
        group = q_BTNH.shape[2] // k_BSKH.shape[2]
        return splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([mask] * group),
            block_sizes=self._block_sizes(q_BTNH, Mask(*shape, self.causal, self.window)),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap,
            interpret=self.interpret,
        )

    def _block_sizes(self, q_BTNH: jax.Array, mask: Mask) -> splash.BlockSizes:
        # float32 and a bound of the logits take more of the core's memory than was measured
        chip = None if q_BTNH.dtype.itemsize > 2 or self.softcap is not None else self.chip
        fwd, dq, dkv = (self.blocks or choose(chip, q_BTNH.shape[3], kernel, mask) for kernel in ("fwd", "dq", "dkv"))
        return splash.BlockSizes(*fwd, *dkv, *dq[:2])
