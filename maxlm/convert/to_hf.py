"""Checkpoints to Hugging Face folders, tensor by tensor; see from_hf.py."""

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from maxlm.config import ModelConfig
from maxlm.convert import folders
from maxlm.convert.arrays import DTYPES, ArrayReader, dtype_of
from maxlm.convert.both import Converted, dims_of_slots, parts_read, verify_all
from maxlm.convert.families import FAMILIES, Family, family_for, family_of
from maxlm.convert.folders import ConvertError
from maxlm.convert.mapping import Entry, check_tensors, entries
from maxlm.convert.merged import open_arrays
from maxlm.convert.parallel import run_all
from maxlm.convert.safetensors import Folder
from maxlm.convert.safetensors_writer import SHARD_BYTES, Writer
from maxlm.manifest import CheckpointError
from maxlm.parameters import parameters
from maxlm.progress import track
from maxlm.steps import chosen

EMBEDDINGS = ("embed", "positions", "token_types", "embed_norm/weight", "embed_norm/bias")


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
        run: folder of a run, or of what from_hf wrote; or RUN@STEP.
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
        StepError: there is no such checkpoint.
        CheckpointError: it cannot be read; DamagedError: it is not what was saved.
        FamilyError, ConvertError: no family has such a model; out is there already.
        OSError: something cannot be read or written.
    """
    there, steps = chosen(run, step)
    run = there.run_dir
    reader = open_arrays(there.known_path(steps[0]))
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
                verify_all(wanted, theirs, parts_read(reader, model), lambda e: types[e.name], total, console)
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
    read, own = parts_read(reader, model), {path: len(a.own) for path, a in parameters(model).items()}
    planned = {e.name: (types[e.name], e.shape) for e in sorted(wanted, key=_layer)}
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in planned.values())

    def convert(entry: Entry) -> None:
        pieces = entry.in_bands([read(part) for part in entry.parts])
        writer.write_pieces(entry.name, (piece.astype(types[entry.name], copy=False) for piece in pieces))

    with Writer(folder, planned, shard_bytes) as writer, track("convert", total, console=console) as advance:
        # all layers of a kind, one after another: they may be one chunk of the checkpoint
        run_all(((math.prod(e.shape) * types[e.name].itemsize, partial(convert, e)) for e in wanted), advance)
        reader.check(dims_of_slots(wanted, lambda path: len(reader.shapes[path]) - own[path]))
    return total


def _context(reader: ArrayReader, model: ModelConfig) -> dict[str, Any]:
    """What a run was trained for, where nothing else says it."""
    if model.position == "learned":
        return {}
    train = reader.manifest.run.get("train")
    return {"max_position_embeddings": train["seq_len"]} if isinstance(train, dict) and "seq_len" in train else {}


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
