"""Hugging Face folders to checkpoints, tensor by tensor.

What is in memory is one tensor of theirs and what it is of ours. Both sides are accounted for before anything is
written, and what is written gets its name when it is whole.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from maxlm.config import ModelConfig
from maxlm.convert import folders
from maxlm.convert.arrays import DTYPES, ArrayReader, ArrayWriter, Spec, dtype_of
from maxlm.convert.both import Converted, dims_of_slots, parts_read, verify_all
from maxlm.convert.families import Family, FamilyError, family_of
from maxlm.convert.folders import ConvertError
from maxlm.convert.mapping import Entry, check_tensors, entries
from maxlm.convert.parallel import run_all, scratch
from maxlm.convert.safetensors import Folder
from maxlm.parameters import parameters
from maxlm.progress import track


def from_hf(
    folder: str, out: str, *, dtype: str | None = None, verify: bool = False, console: Console | None = None
) -> Converted:
    """Converts a folder of safetensors into a checkpoint that train.init_from reads.

    Args:
        folder: with config.json and model.safetensors, or an index and its files.
        out: the new folder: checkpoints/0, model.yaml (the `model:` section of a config) and hf/ (what came along).
        dtype: of the parameters (DTYPES); default: that of the tensors.
        verify: read both again, and compare every bit.
        console: where progress is shown; default: standard output.

    Returns:
        What was converted.

    Raises:
        FamilyError: the family is not known, or config, tokenizer and tensors do not agree.
        SafetensorsError: a file is damaged.
        ConvertError: out is there already, or tensors have no type that fits.
        OSError: something cannot be read or written.
    """
    tree = folders.read_config(folder)
    with contextlib.closing(Folder(folder)) as theirs, folders.new_folder(out) as temporary:
        family, model, wanted = accounted(tree, theirs)
        dtypes = _types_of_parameters(wanted, theirs, dtype)
        step = os.path.join(temporary, "checkpoints", "0")
        ours = parameters(model)
        shares = dims_of_slots(wanted, lambda path: len(ours[path].shape) - len(ours[path].own))
        orders = {part.path: part.stored for entry in wanted for part in entry.parts}
        specs = {path: Spec(dtypes[path], ours[path].shape, n, orders[path]) for path, n in shares.items()}
        writer = ArrayWriter(step, specs)
        total = _write_ours(writer, wanted, theirs, dtypes, console)
        companions = _write_beside(temporary, folder, tree, model)
        writer.finish({"model": model.model_dump(mode="json")})
        if verify:
            reader = ArrayReader(step)
            verify_all(wanted, theirs, parts_read(reader, model), lambda e: dtypes[e.parts[0].path], total, console)
        left_out = [name for name in theirs.tensors if re.fullmatch(family.left_out, name)]
    return Converted(family.model_type, model, len(wanted), total, companions, left_out)


def accounted(tree: Mapping[str, Any], theirs: Folder) -> tuple[Family, ModelConfig, list[Entry]]:
    """A folder's family and model, and all of its tensors. Args: tree: its config.json.

    Raises:
        FamilyError: the family is not known, or config, tokenizer and tensors do not agree.
    """
    folder = theirs.path
    family, model = model_of(tree, os.path.join(folder, folders.CONFIG))
    _check_sizes(model, theirs, folder)
    wanted = entries(family, model)
    theirs.rename(family.full_name(theirs.tensors))
    aliases = {**dict(family.aliases), **({family.head: family.embedding} if model.tie_embeddings else {})}
    _check_aliases(aliases, theirs, folder)
    unasked = re.compile("|".join([family.buffers, family.left_out, *map(re.escape, aliases)]))
    found = {name: tensor.shape for name, tensor in theirs.tensors.items() if not unasked.fullmatch(name)}
    check_tensors(wanted, found, folder)
    folders.check_tokenizer(folder, model.vocab_size)
    return family, model, wanted


def _write_ours(
    writer: ArrayWriter,
    wanted: Sequence[Entry],
    theirs: Folder,
    dtypes: Mapping[str, np.dtype],
    console: Console | None,
) -> int:
    """Writes all parameters. Returns the size of their tensors in bytes."""
    by_name = {entry.name: entry for entry in wanted}
    sizes = {name: theirs.tensors[name].num_bytes for name in theirs.in_order() if name in by_name}

    def convert(name: str) -> None:
        for part, values in by_name[name].to_ours(theirs.read(name, scratch(sizes[name]))):
            writer.write(part.path, part.slot, values.astype(dtypes[part.path], copy=False))

    total = sum(sizes.values())
    with track("convert", total, console=console) as advance:
        run_all(((size, partial(convert, name)) for name, size in sizes.items()), advance)
    return total


def model_of(tree: Mapping[str, Any], path: str) -> tuple[Family, ModelConfig]:
    """The family and the model of a config.json. Args: path: of it, for the message. Raises: FamilyError."""
    try:
        family = family_of(tree)
        return family, family.read_config(tree)
    except FamilyError as error:
        raise FamilyError(f"{path}: {error}") from None


def _check_sizes(model: ModelConfig, theirs: Folder, folder: str) -> None:
    """Sizes that no tensor can have would take long to find out otherwise."""
    most = sum(tensor.num_bytes for tensor in theirs.tensors.values())
    for name, size, limit in [
        ("num_hidden_layers", model.num_layers, len(theirs.tensors)),
        ("vocab_size", model.vocab_size, most),
        ("hidden_size", model.d_model, most),
        ("intermediate_size", model.d_ff, most),
        ("num_attention_heads x head_dim", model.num_heads * model.head_size, most),
    ]:
        if size > limit:
            raise FamilyError(f"{folder}: config.json has {name}={size}, more than its tensors can be")


def _check_aliases(aliases: Mapping[str, str], theirs: Folder, folder: str) -> None:
    """Of tied tensors, files may hold both, if they are the same."""
    for name, other in aliases.items():
        if name in theirs.tensors and other in theirs.tensors:
            a, b = theirs.tensors[name], theirs.tensors[other]
            same = (a.dtype, a.shape) == (b.dtype, b.shape)
            bits = lambda n: theirs.read(n).reshape(-1).view(np.uint8)  # noqa: E731
            if not same or not np.array_equal(bits(name), bits(other)):
                raise FamilyError(f"{folder}: {name} differs from {other}, which are one tensor of such a model (tied)")


def _types_of_parameters(wanted: Sequence[Entry], theirs: Folder, dtype: str | None) -> dict[str, np.dtype]:
    """The type of each parameter; layers that are stacked have one."""
    found = dict[str, np.dtype]()
    for entry in wanted:
        own = theirs.tensors[entry.name].dtype
        if own.name not in DTYPES:
            raise ConvertError(f"tensor {entry.name} of {theirs.path} is {own}; maxlm converts {', '.join(DTYPES)}")
        for part in entry.parts:
            kind = dtype_of(dtype) if dtype else own
            if found.setdefault(part.path, kind) != kind:
                raise ConvertError(
                    f"tensor {entry.name} of {theirs.path} is {own}, and other layers have {found[part.path]}; "
                    "give one type for all: --dtype"
                )
    return found


def _write_beside(target: str, folder: str, tree: dict[str, Any], model: ModelConfig) -> list[str]:
    os.mkdir(os.path.join(target, folders.HF))
    folders.write_text(os.path.join(target, folders.HF, folders.CONFIG), folders.to_json(tree))
    fields = model.model_dump(mode="json", exclude_defaults=True)
    folders.write_text(os.path.join(target, "model.yaml"), yaml.safe_dump({"model": fields}, sort_keys=False))
    return folders.copy_companions(folder, os.path.join(target, folders.HF))
