"""The end of the model, projection onto the vocabulary and cross entropy, without ever holding all logits.

The vocabulary is cut into parts. Forward, each part's weights are gathered, its logits computed, and what is kept of
them is a running maximum and sum per token; backward, they are computed again, and the part's weight gradient is
scattered at once. So neither logits [B, T, V], nor the whole projection, nor its gradient, is ever in memory.

References:
    Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867; Wijmans et al., Cut Your Losses
    in Large-Vocabulary Language Models, arXiv:2411.09009.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from maxlm.parallel.island import island, vary
from maxlm.parallel.local_products import LocalProducts
from maxlm.parallel.quantized import hashes
from maxlm.quant import Product, Recipe
from maxlm.sharding import compute_spec

LANES = 128
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Options:
    """What is fixed at compile time.

    Attributes:
        dims: "DV", or "VD" of a tied embedding.
        vocab_size: ids from here on are padding, which is no class.
        softcap: bound of the logits.
        num_parts: parts of the vocabulary, at most.
        dtype: of the products.
        recipe: of the products where they are quantized; None of others.
    """

    dims: str
    vocab_size: int
    softcap: float | None
    num_parts: int
    dtype: Any
    recipe: Recipe | None = None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_cross_entropy(
    options: Options, x_BTD: jax.Array, weight: jax.Array, targets_BT: jax.Array, words_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every token, as loss.cross_entropy gives it of logits.

    Args:
        options: what is fixed at compile time.
        x_BTD: the residual stream, normed.
        weight: as sharding.enter_step left it, split over fsdp or gathered.
        targets_BT: int32 ids.
        words_BT: uint32, a random word per token, with which quantized gradients are rounded; None rounds to nearest.

    Returns:
        loss in nats and log of the partition function Z, float32 [B, T].
    """
    return _fwd(options, x_BTD, weight, targets_BT, words_BT)[0]


def _fwd(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array, words: Any) -> tuple[Any, Any]:
    out = (compute_spec("BT"), compute_spec("BT"))
    loss, log_z = island(partial(_forward, _Cut.of(options, w)), (x, w, targets), out)
    return (loss, log_z), (x, w, targets, words, log_z)


def _bwd(options: Options, saved: Any, cotangents: Any) -> Any:
    w = saved[1]
    spec = jax.typeof(w).sharding.spec
    out = (compute_spec("BTD"), P(*spec.partitions, unreduced=spec.reduced))
    return *island(partial(_backward, _Cut.of(options, w)), (*saved, *cotangents), out), None, None


head_cross_entropy.defvjp(_fwd, _bwd)


# ---- on one device: n tokens, and of its classes c at a time


def _forward(cut: "_Cut", x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_nD, y_n = x.reshape(-1, x.shape[-1]), targets.reshape(-1)

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        top, total, hit = carry
        logits, ids, _ = cut.logits(x_nD, w, i)
        new = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new) + jnp.exp(logits - new[:, None]).sum(-1)
        return (new, total, hit + jnp.where(ids[None] == y_n[:, None], logits, 0.0).sum(-1)), None

    zero = jnp.zeros(y_n.shape)
    (top, total, hit), _ = lax.scan(step, _vary((zero + LOWEST, zero, zero), x, w), jnp.arange(cut.num_parts))
    if cut.tensor:
        best = lax.pmax(top, cut.tensor)
        total, hit = lax.psum((total * jnp.exp(top - best), hit), cut.tensor)
        top = best
    log_z = top + jnp.log(total)
    return (log_z - hit).reshape(targets.shape), log_z.reshape(targets.shape)


def _backward(
    cut: "_Cut",
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    words: jax.Array | None,
    log_z: jax.Array,
    d_loss: jax.Array,
    d_log_z: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_nD = x.reshape(-1, x.shape[-1])
    y_n, log_z_n, d_loss_n, d_log_z_n = (a.reshape(-1) for a in (targets, log_z, d_loss, d_log_z))
    words_n = None if words is None else words.reshape(-1)

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        dx, dw = carry
        logits, ids, part = cut.logits(x_nD, w, i)
        hit = ids[None] == y_n[:, None]
        d = jnp.exp(logits - log_z_n[:, None]) * (d_loss_n + d_log_z_n)[:, None] - jnp.where(
            hit, d_loss_n[:, None], 0.0
        )
        if (cap := cut.options.softcap) is not None:
            d *= 1 - jnp.square(jnp.where(ids >= 0, logits, 0.0) / cap)
        more, d_part = cut.grads(x_nD, d.astype(x.dtype), part, words_n, ids)
        return (dx + more, cut.add(dw, i, d_part)), None

    dx, dw = _vary((jnp.zeros(x_nD.shape), jnp.zeros(w.shape)), x, w)
    if cut.products is not None:  # whose gradients by x are summed over tensor already
        others = (jax.typeof(x).mat.varying | jax.typeof(w).mat.varying) - set(cut.tensor)
        dx = vary(jnp.zeros(x_nD.shape), tuple(others))
    (dx, dw), _ = lax.scan(step, (dx, dw), jnp.arange(cut.num_parts))
    dx = dx.astype(x.dtype).reshape(x.shape)
    if cut.tensor and cut.products is None:
        dx = lax.psum(dx, cut.tensor)
    return dx, dw.astype(w.dtype)


def _vary(tree: Any, x: jax.Array, w: jax.Array) -> Any:
    return vary(tree, tuple(jax.typeof(x).mat.varying | jax.typeof(w).mat.varying))


@dataclass(frozen=True)
class _Cut:
    """How a device's classes are cut into parts.

    Attributes:
        options: of head_cross_entropy.
        fsdp: mesh axes that split D of the weight, outermost first.
        tensor: mesh axes that split V.
        num_parts: parts.
        width: classes in a part; the last one overlaps the one before if they do not divide.
    """

    options: Options
    fsdp: tuple[str, ...]
    tensor: tuple[str, ...]
    num_parts: int
    width: int

    @classmethod
    def of(cls, options: Options, w: jax.Array) -> "_Cut":
        sizes, spec = jax.sharding.get_abstract_mesh().shape, jax.typeof(w).sharding.spec.partitions
        split = {d: (s,) if isinstance(s, str) else tuple(s or ()) for d, s in zip(options.dims, spec, strict=True)}
        own = w.shape[options.dims.index("V")] // math.prod(sizes[axis] for axis in split["V"])
        width = min(own, -(-own // options.num_parts // LANES) * LANES)
        return cls(options, split["D"], split["V"], -(-own // width), width)

    def logits(self, x_nD: jax.Array, w: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 logits [n, c] of a part, its ids [c], -1 for those that do not count, and its weights.

        The weights are gathered, quantized ones as they are stored.
        """
        start = self._start(w, i)
        part = lax.dynamic_slice_in_dim(w, start, self.width, self._dim("V"))
        if self.products is not None:
            logits, _ = self.products.forward(x_nD, part, dtype=jnp.float32)
        else:
            part = part.astype(self.options.dtype)
            for axis in reversed(self.fsdp):
                part = lax.all_gather(part, axis, axis=self._dim("D"), tiled=True)
            logits = jnp.einsum(f"nD,{self.dims}->nc", x_nD, part, preferred_element_type=jnp.float32)
        if (cap := self.options.softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        place = start + jnp.arange(self.width)
        first = lax.axis_index(self.tensor) * w.shape[self._dim("V")] if self.tensor else 0
        ids = jnp.where((place >= i * self.width) & (first + place < self.options.vocab_size), first + place, -1)
        return jnp.where(ids[None] >= 0, logits, LOWEST), ids, part

    @property
    def products(self) -> LocalProducts | None:
        """Those of a part with quantized weights; gradients by x come summed over tensor."""
        if self.options.recipe is None:
            return None
        return LocalProducts(Product("CD", self.dims, "Cc"), self.options.recipe, self.fsdp, (("c", self.tensor),))

    def grads(
        self, x_nD: jax.Array, d_nc: jax.Array, part: jax.Array, words_n: jax.Array | None, ids: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """float32 gradient by x, and gradient by the part's weights, as they are split."""
        if self.products is not None:
            columns = None if words_n is None else hashes(ids.astype(jnp.uint32))
            return self.products.backward(x_nD, part, None, words_n, columns, d_nc, jnp.float32)
        dx = jnp.einsum(f"nc,{self.dims}->nD", d_nc, part, preferred_element_type=jnp.float32)
        d_part = jnp.einsum(f"nD,nc->{self.dims}", x_nD, d_nc)
        for axis in self.fsdp:
            d_part = lax.psum_scatter(d_part, axis, scatter_dimension=self._dim("D"), tiled=True)
        return dx, d_part

    def add(self, dw: jax.Array, i: jax.Array, d_part: jax.Array) -> jax.Array:
        """Adds the gradient of a part in place."""
        at, start = self._dim("V"), self._start(dw, i)
        old = lax.dynamic_slice_in_dim(dw, start, self.width, at)
        return lax.dynamic_update_slice_in_dim(dw, old + d_part.astype(dw.dtype), start, at)

    @property
    def dims(self) -> str:
        """Letters of a part's weights."""
        return self.options.dims.replace("V", "c")

    def _dim(self, letter: str) -> int:
        return self.options.dims.index(letter)

    def _start(self, w: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.minimum(i * self.width, w.shape[self._dim("V")] - self.width)
