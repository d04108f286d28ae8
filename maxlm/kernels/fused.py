"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn.dot_product_attention: holds no logits of all heads.

Packed documents are told apart by a mask [B, 1, T, T], which cuDNN reads as a bias and gives a gradient of that size;
rows that are one document (data.segment_mask=false) need none. Elsewhere the same call is plain XLA, which is how it is
tested.
"""

from typing import Any

import jax
import jax.numpy as jnp

HEAD_SIZES = range(8, 129, 8)
"""Head sizes that cuDNN takes on every GPU from Ampere on."""


def fused_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    on_gpu: bool,
) -> jax.Array:
    """As kernels.attention.attention, on one device.

    Args:
        q_BTNH: bfloat16 or float16 queries.
        k_BTKH: keys.
        v_BTKH: values.
        segments_BT: int32 document numbers; None where every row is one document.
        scale: multiplies the logits.
        window: keys a query sees, itself included; None is all before it.
        causal: a query sees keys at its place and before; else all.
        on_gpu: use cuDNN.
    """
    same = None if segments_BT is None else (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if on_gpu else "xla",
    )


def takes(dtype: jnp.dtype, num_tokens: int, head_size: int, softcap: float | None) -> bool:
    """Whether cuDNN computes such attention, forward and backward."""
    halves = dtype in (jnp.bfloat16, jnp.float16) and num_tokens % 2 == 0
    return halves and head_size in HEAD_SIZES and softcap is None


def runs_on(device: Any) -> bool:
    """Whether a device has it: NVIDIA GPUs from Ampere on, whose compute capability is 8.0 or more."""
    capability = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and capability.isdigit() and int(capability) >= 8
