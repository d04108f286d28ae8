"""Updates with an optimizer state that rests in the host's memory: it visits the devices layer by layer.

Left to itself, the compiler brings the state of all layers to the devices at once. Here a loop over layers carries
parameters and state: it takes one layer's, updates it, and puts it back in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from maxlm import optim
from maxlm.model.transformer import STACKS

ON_DEVICE, ON_HOST = "device", "pinned_host"


def update(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    dims: Any,
    params: Any,
    opt: Any,
    grads: Any,
    prepare: Callable[[jax.Array], jax.Array],
    good: jax.Array,
) -> tuple[Any, Any]:
    """One optimizer step, of a transformation that treats every element by itself (adamw, sgd, lion).

    Args:
        tx: the optimizer; it sees the layers of a stack one by one, so it must not clip by a global norm.
        mesh: the devices.
        dims: dimension letters of every parameter.
        params: parameters, laid out like the state.
        opt: its state, on the host but for scalars.
        grads: gradients in any dtype.
        prepare: makes them what the optimizer takes; called layer by layer, so no second copy of all is made.
        good: bool scalar, as that of optim.update.

    Returns:
        New parameters, and the new state, on the host.
    """

    def run(part: _Part, params: Any, opt: Any) -> tuple[Any, Any]:
        here, ready = _move(mesh, part.take(opt), ON_DEVICE), jax.tree.map(prepare, part.take(grads))
        new_params, new_opt = optim.update(tx, part.take(params), here, ready, good)
        return part.put(params, new_params), part.put(opt, _move(mesh, new_opt, ON_HOST))

    for stack in (name for name in STACKS if name in params):
        dim = jax.tree.leaves(dims[stack])[0].index("L")  # all parameters of a stack lead with the same dims
        num_layers = jax.tree.leaves(params[stack])[0].shape[dim]
        layer = lambda i, trees, stack=stack, dim=dim: run(_Part(stack, dim, i), *trees)  # noqa: E731
        params, opt = jax.lax.fori_loop(0, num_layers, layer, (params, opt))
    return run(_Part(), params, opt)


@dataclass(frozen=True)
class _Part:
    """One layer of a stack; or, by default, what is in no stack.

    Attributes:
        stack: its name in parameters and state.
        dim: dim over layers.
        layer: the place.
    """

    stack: str | None = None
    dim: int = 0
    layer: jax.Array | int = 0

    def take(self, tree: Any) -> Any:
        """Its arrays; a stand-in of one element for others, which are updated at another time; and scalars."""

        def take(path: Any, x: jax.Array) -> jax.Array:
            if x.ndim == 0:
                return x
            if _stack(path) != self.stack:
                return jnp.zeros((1,), x.dtype)
            return x if self.stack is None else jax.lax.dynamic_index_in_dim(x, self.layer, self.dim, keepdims=False)

        return jax.tree_util.tree_map_with_path(take, tree)

    def put(self, tree: Any, new: Any) -> Any:
        """The tree with its arrays replaced, in place. Scalars count updates: they move on with what is in no stack."""

        def put(path: Any, x: jax.Array, new: jax.Array) -> jax.Array:
            if (_stack(path) if x.ndim else None) != self.stack:
                return x
            return new if self.stack is None else jax.lax.dynamic_update_index_in_dim(x, new, self.layer, self.dim)

        return jax.tree_util.tree_map_with_path(put, tree, new)


def _stack(path: Any) -> str | None:
    return next((key.key for key in path if getattr(key, "key", None) in STACKS), None)


def _move(mesh: Mesh, tree: Any, memory: str) -> Any:
    def move(x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, jax.typeof(x).sharding.spec, memory_kind=memory)) if x.ndim else x

    return jax.tree.map(move, tree)
