"""Low-rank adapters: a frozen weight W becomes W + (alpha / rank) A B, of which only A and B are trained.

The model does not know. A weight with an adapter is an `Adapted` in the tree of parameters; where a layer brings it
into use it becomes an `AdaptedWeight`, which multiplies x by W and, beside it, by A and then B. So no gradient of W is
ever made, and what A B adds is not rounded away in a bfloat16 sum. A maps the weight's input dims to Z, the rank, and B
maps Z to its output dims; both keep their letters, and with them the places where the weight's dims are.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import OptimConfig
from maxlm.config_file import ConfigError
from maxlm.config_lora import LoraConfig
from maxlm.model.stack import UseWeight
from maxlm.model.transformer import STACKS
from maxlm.sharding import einsum, gather, param_spec

RANK = "Z"
"""Letter of the dim between A and B."""
SALT = 0x10A
"""Folded into a run's seed, for other random numbers than those of its weights."""

Tree = Any
"""A nested dict. That of adapters has {"a", "b"} where that of parameters has a weight with one, and nothing else."""


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=[])
@dataclass(frozen=True)
class Adapted:
    """A weight and its adapter, in a tree of parameters; or the dimension letters of the three."""

    weight: Any
    a: Any
    b: Any


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class AdaptedWeight:
    """What a layer multiplies by in place of a weight that has an adapter.

    Attributes:
        weight: what it would multiply by without.
        a: [inputs, Z] in the compute dtype, gathered.
        b: [Z, outputs], likewise.
        scale: alpha / rank.
    """

    weight: Any
    a: jax.Array
    b: jax.Array
    scale: float

    def __getitem__(self, key: Any) -> "AdaptedWeight":
        """Itself, as the model asks for a parameter's value: weight[...]."""
        return self

    def einsum(self, subscripts: str, x: jax.Array) -> jax.Array:
        """As sharding.einsum of x and the weight, with activations x first."""
        left, right, out = re.split(",|->", subscripts)
        inputs, outputs = split_dims(right)
        middle = "".join(d for d in left if d not in inputs) + RANK
        h = einsum(f"{left},{inputs}{RANK}->{middle}", x, self.a)
        return einsum(subscripts, x, self.weight) + einsum(f"{middle},{RANK}{outputs}->{out}", h * self.scale, self.b)


def use_adapted(
    scale: float, use: UseWeight, variable: nnx.Variable, dims: str, dtype: Any, number: jax.Array | int
) -> Any:
    """A model.stack.UseWeight for weights that may have adapters.

    Args:
        scale: alpha / rank.
        use: brings the others, and the frozen ones, into use.
        variable: a weight.
        dims: its dimension letters.
        dtype: compute dtype.
        number: of its repeat's first layer.
    """
    value = variable.get_value()
    if not isinstance(value, Adapted):
        return use(variable, dims, dtype, number)
    inputs, outputs = split_dims(dims)
    a, b = gather(value.a, inputs + RANK, dtype), gather(value.b, RANK + outputs, dtype)
    return AdaptedWeight(use(variable.replace(value.weight), dims, dtype, number), a, b, scale)


def split_dims(dims: str) -> tuple[str, str]:
    """Input and output letters of a weight of a layer: one of them is D, the residual stream."""
    return ("D", dims[1:]) if dims[0] == "D" else (dims[:-1], "D")


def adapter_dims(lora: LoraConfig, dims: Tree) -> Tree:
    """Dimension letters of all adapters.

    Args:
        lora: says which weights get one.
        dims: dimension letters of all parameters; stacked layers lead with theirs.

    Returns:
        The tree of adapters.

    Raises:
        ConfigError: a target matches no weight of a layer.
    """
    weights = {path: d for path, d in _leaves(dims) if path[0] in STACKS and _can_adapt(d)}
    names = sorted({_name(path) for path in weights})
    for pattern in lora.targets:
        if not any(re.fullmatch(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern[:60], names, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"lora.targets: {pattern!r} matches no weight of a layer; {hint}")
    found: Tree = {}
    for path, d in weights.items():
        if any(re.fullmatch(pattern, _name(path)) for pattern in lora.targets):
            inputs, outputs = split_dims(_own(d))
            lead = d[: len(d) - len(_own(d))]
            place = found
            for key in path:
                place = place.setdefault(key, {})
            place.update(a=f"{lead}{inputs}{RANK}", b=f"{lead}{RANK}{outputs}")
    return found


def draw(lora: LoraConfig, key: jax.Array, params: Tree, dims: Tree) -> Tree:
    """New adapters, float32, in their resting places: A of N(0, 1 / inputs) and B of zeros, so that they add nothing.

    Args:
        lora: gives the rank.
        key: PRNG key.
        params: the frozen parameters.
        dims: dimension letters of parameters and adapters, see adapt.

    Returns:
        The tree of adapters.
    """
    if isinstance(dims, Adapted):
        sizes = {**dict(zip(dims.weight, params.shape, strict=True)), RANK: lora.rank}
        a, b = (tuple(sizes[letter] for letter in letters) for letters in (dims.a, dims.b))
        std = math.prod(sizes[letter] for letter in split_dims(_own(dims.weight))[0]) ** -0.5
        noise = jax.random.normal(key, a, jnp.float32, out_sharding=param_spec(dims.a))
        return {"a": noise * std, "b": jnp.zeros(b, jnp.float32, out_sharding=param_spec(dims.b))}
    inner = sorted(dims.items()) if isinstance(dims, dict) else ()
    found = {name: draw(lora, jax.random.fold_in(key, i), params[name], d) for i, (name, d) in enumerate(inner)}
    return {name: x for name, x in found.items() if x}


def optimizer_rules(optim: OptimConfig) -> OptimConfig:
    """Its rules for adapters: the default of decay_mask names norms, biases and tables, of which none is trained."""
    usual = optim.decay_mask == OptimConfig.model_fields["decay_mask"].default
    return optim.model_copy(update={"decay_mask": ""}) if usual else optim


def adapt(params: Tree, adapters: Tree) -> Tree:
    """The tree of parameters, or of what belongs to them, with an `Adapted` where there is an adapter."""
    if not isinstance(params, dict):
        return Adapted(params, **adapters)
    return {key: adapt(x, adapters[key]) if key in adapters else x for key, x in params.items()}


def adapters_of(tree: Tree) -> Tree:
    """The adapters in such a tree."""
    if isinstance(tree, Adapted):
        return {"a": tree.a, "b": tree.b}
    inner = {key: adapters_of(x) for key, x in tree.items()} if isinstance(tree, dict) else {}
    return {key: x for key, x in inner.items() if x}


def frozen_of(tree: Tree) -> Tree:
    """The parameters in such a tree, without adapters."""
    return jax.tree.map(lambda x: x.weight if _is_adapted(x) else x, tree, is_leaf=_is_adapted)


def _can_adapt(dims: str) -> bool:
    """No norm, bias or router, and no weight per expert, which only the experts' own products know how to use."""
    own = _own(dims)
    return "D" in own and len(own) > 1 and not set(own) & set("XE")


def _own(dims: str) -> str:
    """Letters of a layer's weight without those of the stack."""
    return dims.lstrip("RPL")


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[2:])


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, x in tree.items():
        if isinstance(x, Mapping):
            yield from _leaves(x, (*path, key))
        else:
            yield (*path, key), x


def _is_adapted(x: Any) -> bool:
    return isinstance(x, Adapted)
