"""A model's parameters, and adapters beside them, without making any: paths, dimension letters, shapes."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from maxlm.config import MeshConfig, ModelConfig
from maxlm.config_lora import LoraConfig
from maxlm.leaves import map_paths, shapes_of
from maxlm.lora import RANK, adapter_dims
from maxlm.mesh import make_mesh
from maxlm.model.param import dims_of
from maxlm.model.transformer import Transformer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours.

    Attributes:
        dims: dimension letters, without the L of stacked ones.
        shape: all of it, padding and stacked layers included.
    """

    dims: str
    shape: Shape

    @property
    def own(self) -> Shape:
        """Shape of one layer's share."""
        return self.shape[len(self.stacked) :]

    @property
    def stacked(self) -> Shape:
        """Its dims before those, of stacked layers."""
        return self.shape[: len(self.shape) - len(self.dims)]


@functools.cache
def parameters(model: ModelConfig) -> dict[str, Parameter]:
    """All parameters of a model on one device, by path."""
    dims, shapes = _model(model)
    letters: dict[str, str] = {}
    map_paths(letters.__setitem__, dims)
    return {path: Parameter(own.replace("J", "K"), shapes[path][0]) for path, own in letters.items()}


@functools.cache
def adapters(model: ModelConfig, lora: LoraConfig | None) -> dict[str, Parameter]:
    """All that are trained beside a model on one device, by path, which is that of the weight and a or b.

    Args:
        model: whose weights are frozen.
        lora: says which of them have adapters; None: none has.

    Raises:
        ConfigError: a target matches no weight of a layer.
    """
    if lora is None:
        return {}
    letters: dict[str, str] = {}
    map_paths(letters.__setitem__, adapter_dims(lora, _model(model)[0]))
    weights, found = parameters(model), {}
    for path, dims in letters.items():
        weight = weights[path.rpartition("/")[0]]
        sizes = {**dict(zip(weight.dims, weight.own, strict=True)), RANK: lora.rank}
        dims = dims.replace("J", "K")
        found[path] = Parameter(dims, (*weight.stacked, *(sizes[letter] for letter in dims)))
    return found


def num_adapters(model: ModelConfig, lora: LoraConfig | None) -> int | None:
    """Number of weights of adapters; None where the parameters are trained. Args and raises as adapters."""
    return None if lora is None else sum(math.prod(p.shape) for p in adapters(model, lora).values())


@functools.cache
def _model(model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Dimension letters as a tree, without the L of stacked parameters, and shapes by path."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), _devices()[:1])):
        state = nnx.split(jax.eval_shape(lambda: Transformer(jax.random.key(0), model)))[1]
    return nnx.to_pure_dict(dims_of(state)), shapes_of(nnx.to_pure_dict(state))


def _devices() -> list[Any]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names others alone; nothing runs on them here either
        return jax.local_devices()
