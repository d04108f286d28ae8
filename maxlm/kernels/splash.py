"""Splash attention on TPU: never holds logits, skips what the mask hides. Forward and backward on one device.

The kernels are JAX's own (Pallas). They are called piece by piece, since what surrounds them (sharding, remat, the ring
of parallel/attention.py) decides what is kept: forward gives the log-sum-exp beside the output, backward takes both.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128


@dataclass(frozen=True)
class Splash:
    """What is fixed at compile time.

    Attributes:
        scale: multiplies the logits.
        causal: queries see keys at their place and before; else all.
        window: keys that a query sees, itself included; None is all.
        softcap: bound of the logits.
        interpret: run on any machine, slowly.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    interpret: bool = False

    def forward(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array, segments_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, N, H] in q's dtype, and float32 log-sum-exp of the logits [B, N, T]."""
        kernel = self._kernel(q_BTNH, k_BSKH)
        heads = self._heads(q_BTNH, k_BSKH, v_BSKH)
        o, (log_z,) = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(*heads, splash.SegmentIds(segments_BT, segments_BS))
        B, T, N, H = q_BTNH.shape
        return o.reshape(B, N, T, H).swapaxes(1, 2), log_z.reshape(B, N, T)

    def backward(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segments_BT: jax.Array,
        segments_BS: jax.Array,
        o_BTNH: jax.Array,
        log_z_BNT: jax.Array,
        do_BTNH: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients by q, k and v, in their dtypes."""
        kernel = self._kernel(q_BTNH, k_BSKH)
        q, k, v = self._heads(q_BTNH, k_BSKH, v_BSKH)
        o, do = (x.swapaxes(1, 2).reshape(q.shape) for x in (o_BTNH, do_BTNH))

        def run(*arrays: Any) -> tuple[jax.Array, ...]:
            q, k, v, o, log_z, do, segments = arrays
            saved = (q, k, v, segments, None, o, log_z, kernel.dq_mask_info, kernel.dkv_mask_info)
            return splash._splash_attention_bwd(res=saved, do=do, **kernel.kwargs)[3:6]

        segments = splash.SegmentIds(segments_BT, segments_BS)
        each = jax.vmap(jax.vmap(run, (*[0] * 6, None)))
        dq, dk, dv = each(q, k, v, o, log_z_BNT.reshape(q.shape[:-1]), do, segments)
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
        q, kv = (block_size(n, q_BTNH.shape[3]) for n in shape)
        return splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([mask] * group),
            block_sizes=splash.BlockSizes(
                block_q=q,
                block_kv=kv,
                block_kv_compute=kv,
                block_q_dkv=q,
                block_kv_dkv=kv,
                block_kv_dkv_compute=kv,
                block_q_dq=q,
                block_kv_dq=kv,
            ),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap,
            interpret=self.interpret,
        )


def fits(num_tokens: int) -> bool:
    """Whether rows of this length can be cut into blocks of whole lanes."""
    return num_tokens % LANES == 0


def block_size(num_tokens: int, head_size: int) -> int:
    """Rows or keys of a block: the largest that divides them and leaves room in VMEM for the float32 logits."""
    largest = 512 if head_size <= LANES else 256
    return max(n for n in range(LANES, largest + 1, LANES) if num_tokens % n == 0)
