"""Model families as data: their tensors beside our parameters, their config.json beside our model config.

A family is a row for each kind of tensor and a key for each field. To add one, write both tables, in llama_like.py if
its names are as Llama's, and put it into FAMILIES; the tests in tests/test_convert.py then take it up.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.config_model import ModelConfig
from maxlm.convert.family import Family
from maxlm.convert.gpt2_bert import BERT, GPT2
from maxlm.convert.keys import FamilyError, Tree, short
from maxlm.convert.llama_like import (
    GEMMA,
    GEMMA2,
    GEMMA3,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE, OLMO2, GPT2, BERT)
}
REFUSED = {"gemma3": "is a model of images and text; take its text model, which is gemma3_text"}
"""Families that look like others and are not."""


def family_of(tree: Tree) -> Family:
    """The family of a config.json.

    Raises:
        FamilyError: it is not known; lists those that are, and the nearest.
    """
    name = tree.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in REFUSED:
        raise FamilyError(f"model_type={name} {REFUSED[name]}")
    near = difflib.get_close_matches(str(name)[:40], FAMILIES, 1, 0.5)
    raise FamilyError(
        f"model_type={short(name)} is not a family that maxlm knows; those are {', '.join(FAMILIES)}"
        + (f", and {near[0]} is the nearest" if near else "")
    )


def family_for(model: ModelConfig, names: Sequence[str] = tuple(FAMILIES)) -> tuple[Family, dict[str, Any]]:
    """The first family that has such a model, and the model's config.json.

    Raises:
        FamilyError: none has; says why of each.
    """
    reasons = []
    for name in names:
        try:
            return FAMILIES[name], FAMILIES[name].write_config(model)
        except FamilyError as error:
            reasons.append(str(error))
    raise FamilyError(f"this model is of no family that maxlm can write: {'; '.join(reasons)}")
