"""Leaves of a state by their paths, such as params/layers/0/mlp/up."""

from collections.abc import Callable
from typing import Any

import jax


def map_paths(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps function(path, *leaves), with paths as those of named_leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, *x: function(_path(path), *x), *trees)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves that have a shape, by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {_path(path): leaf for path, leaf in flat if hasattr(leaf, "shape")}


def shapes_of(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each, by path."""
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in named_leaves(tree).items()}


def _path(keys: Any) -> str:
    return "/".join(str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))) for key in keys)


def difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first array by which a checkpoint and a run differ, as a phrase; empty when they fit."""
    for path in [*wanted, *saved]:
        if path not in saved:
            return f"it has no {path}"
        if path not in wanted:
            return f"its {path} has no place here"
        if saved[path] != wanted[path]:
            (shape, dtype), (own_shape, own_dtype) = saved[path], wanted[path]
            return f"{path} is {dtype}{list(shape)} there and {own_dtype}{list(own_shape)} here"
    return ""
