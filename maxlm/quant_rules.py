"""Which weights multiply in which type: the config's rules, written onto the model's parameters as metadata."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from maxlm.config_file import ConfigError
from maxlm.config_quant import QuantConfig
from maxlm.hardware import Chip, detect
from maxlm.quant import Kind, Recipe

RECIPE = "recipe"
"""Metadata of a parameter whose products are quantized."""
QUANT_ERROR = "quant_error"
"""Name of what is reported of int8: the error of rounding activations."""
OUTLIERS = 0.04
"""Error from which on activations are said to have outliers; normal ones have 0.007 to 0.01."""
LM_HEAD = "lm_head"
"""Path of the projection onto the vocabulary, which a tied embedding shares."""

REPORTING = "layers"
"""The stack of layers that reports; leading dense ones do not."""
SUMMED_INSIDE = {"TPU v5e", "TPU v5p"}
"""hardware.Chip.name of those that are faster with Recipe.summed_inside (tools/bench_quant.py)."""


def set_recipes(model: Any, quant: QuantConfig, device: Any) -> list[str]:
    """Gives every parameter whose products are quantized its recipe.

    The projection onto the vocabulary has none here: see head_recipe.

    Args:
        model: an nnx.Module; arrays or their shapes.
        quant: the rules.
        device: where it will run.

    Returns:
        Names of the weights that report errors of rounding activations, such as mlp.down, in order of their columns.

    Raises:
        ConfigError: a rule matches no weight that takes part in products, or an output projection with a bias.
    """
    columns: list[str] = []
    if not quant.used:
        return columns
    weights = {path: v for path, v in _parameters(model) if _multiplies(v.get_metadata()["dims"])}
    if model.unembed_bias is not None and head_recipe(quant, device) is not None:
        raise ConfigError(f"model.unembed_bias=true does not go with a quantized {LM_HEAD}; set its rule to bf16")
    paths = [*weights, LM_HEAD]
    for pattern in quant.rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ConfigError(
                f"quant.rules: {pattern!r} matches no weight of a product; it must match a whole path, one of "
                f"{', '.join(paths)}"
            )
    for salt, (path, variable) in enumerate(weights.items()):
        recipe = _recipe(quant, path, salt, device)
        if recipe is None:
            continue
        stack, block, *name = path.split(".")
        reports = recipe.forward == "int8" and stack == REPORTING and "E" not in variable.get_metadata()["dims"]
        if reports and ".".join(name) not in columns:
            columns.append(".".join(name))
        column = columns.index(".".join(name)) if reports else None
        variable.set_metadata(RECIPE, dataclasses.replace(recipe, block=int(block), column=column))
    return columns


def head_recipe(quant: QuantConfig, device: Any) -> Recipe | None:
    """The recipe of the projection onto the vocabulary; None if it is not quantized."""
    return _recipe(quant, LM_HEAD, 2**16, device) if quant.used else None


def advice(quant: QuantConfig, chip: Chip | None) -> str | None:
    """A sentence where a chip has nothing to gain from the types that are asked for."""
    if chip is None:
        return None
    rates = {"int8": chip.int8_ops, "fp8": chip.fp8_flops}
    for kind in sorted({quant.mode, *quant.rules.values()} & set(rates)):
        if (rates[kind] or 0) <= chip.bf16_flops:
            better = [other for other, rate in rates.items() if (rate or 0) > chip.bf16_flops]
            how = "no faster than bfloat16" if rates[kind] else "not natively"
            return f"{chip.name} multiplies {kind} {how}" + (f"; it does {better[0]}, twice as fast" if better else "")
    return None


def outliers(metrics: Mapping[str, float]) -> str | None:
    """A sentence where activations of a weight have outliers, that rounding to int8 leaves little of the others."""
    if metrics.get(QUANT_ERROR, 0.0) <= OUTLIERS:
        return None
    of = {name.removeprefix(f"{QUANT_ERROR}/"): x for name, x in metrics.items() if name.startswith(f"{QUANT_ERROR}/")}
    layer = max((name for name in of if name.startswith("layer_")), key=lambda name: of[name])
    weight = max((name for name in of if not name.startswith("layer_")), key=lambda name: of[name])
    where = layer.replace("_", " ")
    return (
        f"outliers: rounding what {weight} multiplies to int8 is off by {metrics[QUANT_ERROR]:.0%} in {where}; "
        f"if it stays so, quant.rules={{'.*{re.escape(weight)}': bf16}} leaves these products alone"
    )


def error_metrics(metrics: dict[str, jax.Array], columns: Sequence[str]) -> dict[str, jax.Array]:
    """Metrics with the table of errors [layers, columns] as scalars: the largest of all, of each layer and weight."""
    if QUANT_ERROR not in metrics:
        return metrics
    table = metrics[QUANT_ERROR]
    found = {**metrics, QUANT_ERROR: table.max()}
    found |= {f"{QUANT_ERROR}/layer_{i}": table[i].max() for i in range(table.shape[0])}
    return found | {f"{QUANT_ERROR}/{name}": table[:, i].max() for i, name in enumerate(columns)}


def _recipe(quant: QuantConfig, path: str, salt: int, device: Any) -> Recipe | None:
    default: Any = "bf16" if path == LM_HEAD or quant.mode == "none" else quant.mode
    kind: Kind = next((kind for pattern, kind in quant.rules.items() if re.fullmatch(pattern, path)), default)
    if kind == "bf16":
        return None
    kinds = quant.forward or kind, quant.d_activation or kind, quant.d_weight or kind
    chip = detect(device)
    inside = chip is not None and chip.name in SUMMED_INSIDE
    return Recipe(*kinds, anew=quant.backward_weight == "anew", summed_inside=inside, salt=salt)


def _parameters(model: Any) -> list[tuple[str, nnx.Variable]]:
    found = [(".".join(map(str, path)), v) for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    return sorted(found)


def _multiplies(dims: str) -> bool:
    """Whether a parameter of a layer with these letters is multiplied with activations: no norm, bias or router."""
    return "D" in dims and len(dims) > 1 and not set(dims) & set("XVTOY")
