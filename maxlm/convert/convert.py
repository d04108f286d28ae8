"""Hugging Face folders to checkpoints and back, tensor by tensor.

What is in memory is one tensor of theirs and what it is of ours. Both sides are accounted for before anything is
written, and what is written gets its name when it is whole.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from rich.console import Console

from maxlm import storage
from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig, ModelConfig
from maxlm.convert import folders
from maxlm.convert.arrays import DTYPES, ArrayReader, ArrayWriter, dtype_of
from maxlm.convert.families import FAMILIES, Family, FamilyError, family_for, family_of
from maxlm.convert.folders import ConvertError
from maxlm.convert.mapping import Entry, Part, check_tensors, entries, parameters
from maxlm.convert.merged import open_arrays
from maxlm.convert.parallel import run_all, scratch
from maxlm.convert.safetensors import Folder
from maxlm.convert.safetensors_writer import SHARD_BYTES, Writer
from maxlm.manifest import CheckpointError
from maxlm.progress import track

EMBEDDINGS = ("embed", "positions", "token_types", "embed_norm/weight", "embed_norm/bias")


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        family: of the model.
        model: its config.
        num_tensors: of theirs, as a count.
        num_bytes: of them.
        companions: names of files that came along.
        left_out: names of tensors that did not, since they are no part of the model.
    """

    family: str
    model: ModelConfig
    num_tensors: int
    num_bytes: int
    companions: list[str]
    left_out: list[str]


# ---- to maxlm


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
        shares = _dims_of_slots(wanted, lambda path: len(ours[path].shape) - len(ours[path].own))
        writer = ArrayWriter(step, {path: (dtypes[path], ours[path].shape, n) for path, n in shares.items()})
        total = _write_ours(writer, wanted, theirs, dtypes, console)
        companions = _write_beside(temporary, folder, tree, model)
        writer.finish({"model": model.model_dump(mode="json")})
        if verify:
            reader = ArrayReader(step)
            _verify(wanted, theirs, _parts_read(reader, model), lambda e: dtypes[e.parts[0].path], total, console)
        left_out = [name for name in theirs.tensors if re.fullmatch(family.left_out, name)]
    return Converted(family.model_type, model, len(wanted), total, companions, left_out)


def accounted(tree: Mapping[str, Any], theirs: Folder) -> tuple[Family, ModelConfig, list[Entry]]:
    """A folder's family and model, and all of its tensors. Args: tree: its config.json.

    Raises:
        FamilyError: the family is not known, or config, tokenizer and tensors do not agree.
    """
    folder = theirs.path
    family, model = _model_of(tree, os.path.join(folder, folders.CONFIG))
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


def _model_of(tree: Mapping[str, Any], path: str) -> tuple[Family, ModelConfig]:
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
            if not same or theirs.read(name).tobytes() != theirs.read(other).tobytes():
                raise FamilyError(
                    f"{folder}: {name} differs from {other}, and config.json says tie_word_embeddings=true"
                )


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


# ---- to Hugging Face


def to_hf(
    run: str,
    out: str,
    *,
    step: int | None = None,
    like: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    console: Console | None = None,
) -> Converted:
    """Converts a checkpoint, of any mesh or pipeline, into a folder of safetensors that transformers loads.

    Of a run with lora, what the adapters add is in the weights: the sums are float32, before the cast to dtype.

    Args:
        run: folder of a run, or of what from_hf wrote.
        out: the new folder.
        step: of the checkpoint; default: the newest.
        like: folder whose tokenizer, templates and further settings go along; default: RUN/hf, where there is one.
        dtype: of the tensors (DTYPES); default: that of the parameters.
        shard_bytes: of one file, at most.
        verify: read both again, and compare every bit.
        console: where progress is shown; default: standard output.

    Returns:
        What was converted.

    Raises:
        CheckpointError: there is none, or it cannot be read; DamagedError: it is not what was saved.
        FamilyError, ConvertError: no family has such a model; out is there already.
        OSError: something cannot be read or written.
    """
    reader = open_arrays(_step_folder(run, step))
    model = saved_model(reader, run)
    beside = _beside(run, like)
    family, tree = _their_config(model, beside)
    wanted = entries(family, model)
    check_arrays(reader, model, run)
    types = {e.name: dtype_of(dtype or reader.dtypes[e.parts[0].path]) for e in wanted}
    folders.check_tokenizer(beside, model.vocab_size)
    with folders.new_folder(out) as temporary:
        total = _write_theirs(temporary, wanted, types, reader, model, shard_bytes, console)
        config = {**_context(reader, model), **tree, "torch_dtype": types[wanted[0].name].name}
        folders.write_text(os.path.join(temporary, folders.CONFIG), folders.to_json(config))
        companions = folders.copy_companions(beside, temporary) if beside else []
        if verify:
            with contextlib.closing(Folder(temporary)) as theirs:
                check_tensors(wanted, {name: t.shape for name, t in theirs.tensors.items()}, out)
                _verify(wanted, theirs, _parts_read(reader, model), lambda e: types[e.name], total, console)
    return Converted(family.model_type, model, len(wanted), total, companions, [])


def _write_theirs(
    folder: str,
    wanted: Sequence[Entry],
    types: Mapping[str, np.dtype],
    reader: ArrayReader,
    model: ModelConfig,
    shard_bytes: int,
    console: Console | None,
) -> int:
    """Writes all tensors, and compares what was read with the manifest. Returns their size in bytes."""
    read, own = _parts_read(reader, model), {path: len(a.own) for path, a in parameters(model).items()}
    planned = {e.name: (types[e.name], e.shape) for e in sorted(wanted, key=_layer)}
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in planned.values())

    def convert(entry: Entry) -> None:
        pieces = entry.in_bands([read(part) for part in entry.parts])
        writer.write_pieces(entry.name, (piece.astype(types[entry.name], copy=False) for piece in pieces))

    with Writer(folder, planned, shard_bytes) as writer, track("convert", total, console=console) as advance:
        # all layers of a kind, one after another: they may be one chunk of the checkpoint
        run_all(((math.prod(e.shape) * types[e.name].itemsize, partial(convert, e)) for e in wanted), advance)
        reader.check(_dims_of_slots(wanted, lambda path: len(reader.shapes[path]) - own[path]))
    return total


def _context(reader: ArrayReader, model: ModelConfig) -> dict[str, Any]:
    """What a run was trained for, where nothing else says it."""
    if model.position == "learned":
        return {}
    train = reader.manifest.run.get("train")
    return {"max_position_embeddings": train["seq_len"]} if isinstance(train, dict) and "seq_len" in train else {}


def _step_folder(run: str, step: int | None) -> str:
    if storage.is_bucket(run):
        raise ConvertError(f"{run} is in a bucket; copy the run to a local folder and convert it there")
    if not os.path.isdir(os.path.join(run, "checkpoints")):
        raise ConvertError(f"{run} is not a run folder with checkpoints")
    with contextlib.closing(Checkpoints(run, CheckpointConfig(), read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise ConvertError(f"{run} has no checkpoint" + (f" of step {step}; it has {steps}" if steps else ""))
        chosen = steps[-1] if step is None else step
        if checkpoints.manifest(chosen) is None:
            raise CheckpointError(
                f"{checkpoints.step_path(chosen)} is of an older maxlm: continue the run to save anew"
            )
        return checkpoints.step_path(chosen)


def saved_model(reader: ArrayReader, run: str) -> ModelConfig:
    """The model that a checkpoint's manifest says."""
    fields = reader.manifest.run.get("model")
    try:
        return ModelConfig(**fields) if isinstance(fields, dict) else ModelConfig.model_validate(fields)
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"the manifest of {run} says no model: {str(error).splitlines()[0][:120]}") from None


def _beside(run: str, like: str | None) -> str | None:
    """The folder of the files that travel along."""
    if like is not None and not os.path.isdir(like):
        raise ConvertError(f"{like}, whose tokenizer is to go along, is not a folder")
    own = os.path.join(run, folders.HF)
    return like or (own if os.path.isdir(own) else None)


def _their_config(model: ModelConfig, beside: str | None) -> tuple[Family, dict[str, Any]]:
    """The family, and its config.json; what stood in the one beside stays, if the model does not say otherwise."""
    known = folders.read_config(beside) if beside and os.path.exists(os.path.join(beside, folders.CONFIG)) else {}
    names = [family_of(known).model_type] if known else list(FAMILIES)
    family, tree = family_for(model, names)
    kept = {k: v for k, v in known.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    return family, {**kept, **tree}


def check_arrays(reader: ArrayReader, model: ModelConfig, run: str) -> None:
    """Every parameter of the model is there, in a stack of layers or of a pipeline's shares, and nothing else."""
    ours = parameters(model)
    for path in [*ours, *reader.shapes]:
        if path not in reader.shapes:
            raise CheckpointError(f"the checkpoint of {run} has no {path}, a parameter of its model")
        if path not in ours:
            raise CheckpointError(f"the checkpoint of {run} has {path}, which is no parameter of its model")
        found, lead = reader.shapes[path], len(reader.shapes[path]) - len(ours[path].own)
        stacked = len(ours[path].shape) > len(ours[path].own)
        repeats = ours[path].shape[0] if stacked else 0
        fits = math.prod(found[:lead]) >= repeats and lead in (1, 3) if stacked else lead == 0
        if found[lead:] != ours[path].own or not fits:
            raise CheckpointError(f"the checkpoint of {run}: {path} is {list(found)}, not {list(ours[path].shape)}")
        if reader.dtypes[path] not in DTYPES:
            raise CheckpointError(f"the checkpoint of {run}: {path} is {ascii(reader.dtypes[path])[:40]}")


def _layer(entry: Entry) -> int:
    """Of the files' order: embeddings, then layer by layer, then the rest."""
    number = re.search(r"\.(\d+)\.", entry.name)
    return int(number[1]) if number else -1 if entry.parts[0].path in EMBEDDINGS else 1 << 62


# ---- both


def _dims_of_slots(wanted: Sequence[Entry], num_layer_dims: Callable[[str], int]) -> dict[str, int]:
    """How many leading dims of a parameter lead to a share of it: those of layers, and that of experts."""
    return {p.path: num_layer_dims(p.path) + len(p.slot[1:]) for entry in wanted for p in entry.parts}


def _parts_read(reader: ArrayReader, model: ModelConfig) -> Callable[[Part], np.ndarray]:
    """Reads parts of a checkpoint, however its layers are stacked."""
    own = {path: parameter.own for path, parameter in parameters(model).items()}

    def read(part: Part) -> np.ndarray:
        shape = reader.shapes[part.path]
        lead = shape[: len(shape) - len(own[part.path])]
        if not part.slot:
            return reader.read(part.path, ())
        layer = tuple(int(i) for i in np.unravel_index(part.slot[0], lead))
        return reader.read(part.path, (*layer, *part.slot[1:]))

    return read


def _verify(
    wanted: Sequence[Entry],
    theirs: Folder,
    read: Callable[[Part], np.ndarray],
    dtype: Callable[[Entry], np.dtype],
    total: int,
    console: Console | None,
) -> None:
    """Compares both sides, bit by bit, in the type of the one that was written."""

    def compare(entry: Entry) -> None:
        kind = dtype(entry)
        bits = f"u{kind.itemsize}"
        ours = entry.to_theirs([read(part) for part in entry.parts]).astype(kind, copy=False)
        if not np.array_equal(ours.view(bits), theirs.read(entry.name).astype(kind, copy=False).view(bits)):
            raise CheckpointError(f"tensor {entry.name} is not the same on both sides; try again")

    with track("verify", total, console=console) as advance:
        run_all(((math.prod(e.shape) * dtype(e).itemsize, partial(compare, e)) for e in wanted), advance)
