"""Prefill and decode: two compiled functions around the model's own layers, whose keys and values are kept.

Layers are not stacked here and not scanned over: a loop would copy each layer's weights out of the stack, and reading
weights is what a decode step costs. Prompts of a batch end at the same place (they are padded on the left), so that a
step writes its keys into one column of the cache, in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maxlm.config import ModelConfig
from maxlm.infer.sampling import Sampling, draw
from maxlm.kernels.attention import attend
from maxlm.model.attention import AttentionKernel
from maxlm.model.param import dims_of
from maxlm.model.stack import Ops, run_repeat, use_weights
from maxlm.model.transformer import STACKS, Transformer
from maxlm.passes import choose_dispatch, choose_kernel
from maxlm.sharding import compute_spec, constrain

Params = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]
"""Of one layer: [B, S, K, H] each, in the compute dtype; of a layer with a window S is that at most."""


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "starts_B", "index"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """What the layers have seen.

    Attributes:
        layers: keys and values of each, in order.
        starts_B: int32, place of the first token of each row.
        index: int32, place of the next token.
    """

    layers: list[KeysValues]
    starts_B: jax.Array
    index: jax.Array


@dataclass(frozen=True)
class Decoder:
    """A model's compiled functions on a mesh.

    Attributes:
        model: its config.
        mesh: its devices; without stages and context shards.
    """

    model: ModelConfig
    mesh: Mesh

    def unstack(self, params: Params) -> Params:
        """Parameters with a list of layers in place of each stack; the stacks are given up one by one.

        Args:
            params: as a Transformer's, whole layers [L, ...], in the compute dtype; it is emptied.
        """
        with jax.set_mesh(self.mesh):
            apart = {}
            for name in list(params):
                tree = params.pop(name)
                apart[name] = _unstack(tree) if name in STACKS else tree
            return apart

    @cached_property
    def prefill(self) -> Callable[..., tuple[jax.Array, Cache]]:
        """Reads prompts: (params, tokens_BT, starts_B, numbers_B, seed; size, sampling) -> next tokens [B], cache.

        tokens_BT (int32) end at the last place; what stands before starts_B is not looked at. numbers_B (int32) are
        those of the prompts: what is drawn hangs on seed and number. `size` is that of the cache, in tokens.
        """
        return jax.jit(self._prefill, static_argnames=("size", "sampling"))

    @cached_property
    def step(self) -> Callable[..., tuple[jax.Array, Cache]]:
        """One more token: (params, cache, tokens_B, numbers_B, seed; sampling) -> next tokens [B], cache.

        The cache is donated.
        """
        return jax.jit(self._step, static_argnames=("sampling",), donate_argnums=1)

    @cached_property
    def _graph(self) -> Any:
        return nnx.split(jax.eval_shape(lambda: Transformer(jax.random.key(0), self.model)))[0]

    def _prefill(
        self,
        params: Params,
        tokens_BT: jax.Array,
        starts_B: jax.Array,
        numbers_B: jax.Array,
        seed: jax.Array,
        *,
        size: int,
        sampling: Sampling,
    ) -> tuple[jax.Array, Cache]:
        T = tokens_BT.shape[1]
        places_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=compute_spec("BT"))
        positions_BT = places_BT - starts_B[:, None]
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        kept: list[KeysValues] = []
        kernel = partial(_keep, choose_kernel(self.mesh.devices.flat[0]), kept, size)
        logits_BV = self._run(params, tokens_BT, jnp.maximum(positions_BT, 0), segments_BT, kernel)
        index = jnp.asarray(T, jnp.int32)
        tokens_B = draw(logits_BV, sampling, seed, numbers_B, index - _whole(starts_B))
        return tokens_B, Cache(kept, starts_B, index)

    def _step(
        self,
        params: Params,
        cache: Cache,
        tokens_B: jax.Array,
        numbers_B: jax.Array,
        seed: jax.Array,
        *,
        sampling: Sampling,
    ) -> tuple[jax.Array, Cache]:
        tokens_B1 = constrain(tokens_B, "B")[:, None]
        positions_B1 = cache.index - cache.starts_B[:, None]
        kept: list[KeysValues] = []
        logits_BV = self._run(params, tokens_B1, positions_B1, jnp.ones_like(tokens_B1), partial(_look, cache, kept))
        index = cache.index + 1
        tokens_B = draw(logits_BV, sampling, seed, numbers_B, index - _whole(cache.starts_B))
        return tokens_B, Cache(kept, cache.starts_B, index)

    def _run(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        kernel: AttentionKernel,
    ) -> jax.Array:
        """float32 logits [B, V] after the last token."""
        ops = Ops(kernel, choose_dispatch(self.mesh.devices.flat[0]))
        first = {name: tree[0] if name in STACKS else tree for name, tree in params.items()}
        with jax.default_matmul_precision("highest" if self.model.dtype == "float32" else "default"):
            model: Transformer = nnx.merge(self._graph, first)
            x, number = model.embedded(tokens_BT, positions_BT), 0
            for name in (name for name in STACKS if name in params):
                for repeat in params[name]:
                    layers = getattr(nnx.merge(self._graph, {**first, name: repeat}), name)
                    graphdef, state = nnx.split(layers)
                    weights = use_weights(state, dims_of(state), x.dtype, number, ops.weight)
                    x, _ = run_repeat(graphdef, weights, x, positions_BT, segments_BT, number, ops)
                    number += len(layers)
            return model.logits(x[:, -1:])[:, 0]


def _keep(
    kernel: AttentionKernel,
    kept: list[KeysValues],
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_BT: jax.Array,
    **options: Any,
) -> jax.Array:
    """An attention kernel that keeps keys and values: place i at i modulo the size, which is the window at most."""
    size, T = min(size, options.get("window") or size), k.shape[1]

    def keep(x: jax.Array) -> jax.Array:
        if size < T:
            return constrain(jnp.roll(x[:, -size:], T % size, 1), "BSKH")
        return constrain(jnp.pad(x, ((0, 0), (0, size - T), (0, 0), (0, 0))), "BSKH")

    kept.append((keep(k), keep(v)))
    return kernel(q, k, v, segments_BT, **options)


def _look(
    cache: Cache,
    kept: list[KeysValues],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> jax.Array:
    """An attention kernel of one token per row (T is 1): keeps its keys and values and looks at all that are kept."""
    size = cache.layers[len(kept)][0].shape[1]
    at = cache.index % size
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, constrain(new, "BSKH"), at, 1)  # noqa: E731
    k_BSKH, v_BSKH = map(put, cache.layers[len(kept)], (k_BTKH, v_BTKH))
    kept.append((k_BSKH, v_BSKH))
    places_S = cache.index - (cache.index - jnp.arange(size, dtype=jnp.int32)) % size  # below 0: nothing there yet
    first_B = cache.starts_B if window is None else jnp.maximum(cache.starts_B, cache.index + 1 - window)
    seen_BS = places_S[None] >= first_B[:, None]
    return attend(q_BTNH, k_BSKH, v_BSKH, constrain(seen_BS[:, None], "BTS"), scale, softcap)


def _unstack(tree: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(tree)
    del tree
    apart = []
    while leaves:  # one stacked array at a time is there twice
        stacked = leaves.pop(0)
        apart.append([stacked[i] for i in range(stacked.shape[0])])
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*apart, strict=True)]


def _whole(x_B: jax.Array) -> jax.Array:
    return jax.reshard(x_B, jax.P(None))
