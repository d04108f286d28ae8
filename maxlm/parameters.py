"""A model's parameters, without making any: paths, dimension letters, shapes."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from maxlm.config import MeshConfig, ModelConfig
from maxlm.leaves import map_paths, shapes_of
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
        return self.shape[len(self.shape) - len(self.dims) :]


@functools.cache
def parameters(model: ModelConfig) -> dict[str, Parameter]:
    """All parameters of a model on one device, by path."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), _devices()[:1])):
        state = nnx.split(jax.eval_shape(lambda: Transformer(jax.random.key(0), model)))[1]
    letters: dict[str, str] = {}
    map_paths(letters.__setitem__, nnx.to_pure_dict(dims_of(state)))
    shapes = shapes_of(nnx.to_pure_dict(state))
    return {path: Parameter(dims.replace("J", "K"), shapes[path][0]) for path, dims in letters.items()}


def _devices() -> list[Any]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names others alone; nothing runs on them here either
        return jax.local_devices()
