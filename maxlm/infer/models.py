"""Models for inference: parameters onto a mesh in their compute dtype, from a run, a converted model or Hugging Face.

Tensors are read one layer's share at a time and written into stacks that are on the devices already: the host never
holds more than one of them.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from maxlm import storage
from maxlm.config import MeshConfig, ModelConfig
from maxlm.config_file import load_config
from maxlm.convert import folders
from maxlm.convert.from_hf import accounted, model_of
from maxlm.convert.merged import open_arrays
from maxlm.convert.parallel import contiguous
from maxlm.convert.safetensors import Folder
from maxlm.convert.to_hf import check_arrays, saved_model
from maxlm.data.store import TokenStore
from maxlm.data.tokenizer import Tokenizer, tokenizer_from_bytes
from maxlm.leaves import map_paths, named_leaves
from maxlm.manifest import DamagedError
from maxlm.mesh import axis_sizes, check_model, make_mesh, start_devices
from maxlm.model.param import dims_of
from maxlm.model.transformer import Transformer
from maxlm.sharding import param_spec, put_layer, weight_dtype
from maxlm.steps import StepError, Steps, chosen

Dtype = Literal["float32", "bfloat16"]
Found = TypeVar("Found")
Piece = tuple[str, tuple[int, ...], np.ndarray]
"""Path of a parameter, place in its stack of layers and maybe the expert's in its layer (mapping.Part.slot), values."""
FEW_TOKENS = 2048
"""Context of a model of which nothing says it."""


class ModelError(ValueError):
    """A model that cannot be opened; one sentence that says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        place: where it was read, such as runs/a@400.
        model: its config.
        context: tokens that it was trained on at a time.
        eos_ids: tokens that end a text, as far as its files say.
        folder: of its Hugging Face files (tokenizer, chat template, generation config), if it has them.
        load_tokenizer: reads its tokenizer.
    """

    place: str
    model: ModelConfig
    context: int
    eos_ids: tuple[int, ...]
    folder: str | None
    load_tokenizer: Callable[[], Tokenizer]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer.

        Raises:
            ModelError: it has none, or one with ids beyond the vocabulary.
        """
        found = self.load_tokenizer()
        if self.folder is not None:
            folders.check_tokenizer(self.folder, self.model.vocab_size)
        elif found.vocab_size > self.model.vocab_size:
            raise ModelError(
                f"the tokenizer of {self.place} makes ids up to {found.vocab_size - 1}, and the model has embeddings "
                f"for vocab_size={self.model.vocab_size}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class OpenModel(Model):
    """A model on its mesh; its model.dtype is that of params.

    Attributes:
        params: as a Transformer's, layers stacked [L, ...], in the compute dtype, where parameters rest.
        mesh: its devices.
    """

    params: dict[str, Any]
    mesh: Mesh


@dataclass(frozen=True, kw_only=True)
class FoundModel(Model):
    """A model whose weights have not been read.

    Attributes:
        weights: reads them: the place, and model, params and mesh as an OpenModel has them.
    """

    weights: Callable[[MeshConfig, Dtype], tuple[str, ModelConfig, dict[str, Any], Mesh]]

    def open(self, mesh: MeshConfig | None = None, dtype: Dtype = "bfloat16") -> OpenModel:
        """Reads it onto the devices; as open_model."""
        place, model, params, used = self.weights(mesh or MeshConfig(), dtype)
        known: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Model)}
        known |= {"place": place, "model": model}
        return OpenModel(**known, params=params, mesh=used)


def open_model(place: str, mesh: MeshConfig | None = None, dtype: Dtype = "bfloat16") -> OpenModel:
    """Reads a model onto the devices.

    Args:
        place: as find_model.
        mesh: axis sizes; default: all devices share the parameters (fsdp).
        dtype: of parameters and computation.

    Returns:
        The model.

    Raises:
        ModelError, ConvertError, FamilyError, SafetensorsError, CheckpointError: there is none, or it is damaged.
        ConfigError: the mesh does not fit the devices or the model.
        OSError: something cannot be read.
    """
    return find_model(place).open(mesh, dtype)


def find_model(place: str) -> FoundModel:
    """Looks for a model, and reads what says what it is.

    Args:
        place: folder of a run or of what `maxlm convert from-hf` wrote, FOLDER or FOLDER@STEP (default: the newest
            checkpoint that is whole), or a Hugging Face folder (config.json and safetensors).

    Raises:
        ModelError, FamilyError, CheckpointError: there is none, or it is damaged.
        OSError: something cannot be read.
    """
    if storage.is_bucket(place):
        raise ModelError(f"{place} is in a bucket; copy the model to a local folder and open it there")
    if os.path.isfile(os.path.join(place, folders.CONFIG)):
        tree = folders.read_config(place)
        model = model_of(tree, os.path.join(place, folders.CONFIG))[1]
        return FoundModel(model=model, weights=partial(_read_hf, place, tree), **_about_hf(place, place, tree))
    try:
        there, steps = chosen(place)
    except StepError as error:
        raise ModelError(f"{place} is no model: {error}, and {folders.CONFIG} of Hugging Face is not there") from None
    return _find_run(there, steps)


# ---- sources


def _about_hf(place: str, folder: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Model that a folder's files say."""
    eos = tree.get("eos_token_id")
    eos_ids = tuple(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    context = tree.get("max_position_embeddings")
    context = context if isinstance(context, int) and context > 0 else FEW_TOKENS
    bos = tree.get("bos_token_id")

    def tokenizer() -> Tokenizer:
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(path):
            raise ModelError(f"{folder} has no tokenizer.json; copy that of the model there")
        try:
            return tokenizer_from_bytes(
                "tokenizers", storage.read_bytes(path), next(iter(eos_ids), None), bos if isinstance(bos, int) else None
            )
        except ValueError as error:
            raise ModelError(f"tokenizer {path}: {error}") from None

    return {"place": place, "context": context, "eos_ids": eos_ids, "folder": folder, "load_tokenizer": tokenizer}


def _read_hf(
    folder: str, tree: Mapping[str, Any], config: MeshConfig, dtype: Dtype
) -> tuple[str, ModelConfig, dict[str, Any], Mesh]:
    with contextlib.closing(Folder(folder)) as theirs:
        _, model, wanted = accounted(tree, theirs)
        by_name = {entry.name: entry for entry in wanted}

        def pieces() -> Iterator[Piece]:
            for name in theirs.in_order():
                if name in by_name:
                    for part, values in by_name[name].to_ours(theirs.read(name)):
                        yield part.path, part.slot, values

        model, mesh = _placed(model, config, dtype)
        return folder, model, _on_devices(model, mesh, pieces()), mesh


def _find_run(there: Steps, steps: list[int]) -> FoundModel:
    folder = there.run_dir

    def look(step: int) -> tuple[ModelConfig, Any]:
        reader = open_arrays(there.known_path(step))
        return saved_model(reader, folder), reader.manifest.run.get("train")

    def weights(config: MeshConfig, dtype: Dtype) -> tuple[str, ModelConfig, dict[str, Any], Mesh]:
        newest, read = _newest_whole(folder, left, lambda step: _read_checkpoint(there, step, config, dtype))
        return f"{folder}@{newest}", *read

    step, (model, train) = _newest_whole(folder, steps, look)
    left, place, beside = steps[steps.index(step) :], f"{folder}@{step}", os.path.join(folder, folders.HF)
    if os.path.isdir(beside):
        about = _about_hf(place, beside, folders.read_config(beside))
        return FoundModel(model=model, weights=weights, **about)
    return FoundModel(
        place=place,
        model=model,
        context=train.get("seq_len", FEW_TOKENS) if isinstance(train, dict) else FEW_TOKENS,
        eos_ids=(),
        folder=None,
        load_tokenizer=partial(_store_tokenizer, folder),
        weights=weights,
    )


def _newest_whole(folder: str, steps: Sequence[int], read: Callable[[int], Found]) -> tuple[int, Found]:
    """The first step that is not damaged, and what is read of it."""
    for step in steps:
        try:
            return step, read(step)
        except DamagedError as error:
            if step == steps[-1]:
                raise
            print(f"checkpoint {step} of {folder} is left out: {error}", file=sys.stderr)
    raise AssertionError


def _read_checkpoint(
    there: Steps, step: int, config: MeshConfig, dtype: Dtype
) -> tuple[ModelConfig, dict[str, Any], Mesh]:
    reader = open_arrays(there.known_path(step))
    model = saved_model(reader, there.run_dir)
    check_arrays(reader, model, there.run_dir)
    leading = dict[str, int]()

    def pieces(own: Mapping[str, int]) -> Iterator[Piece]:
        for path, shape in reader.shapes.items():
            lead = leading[path] = len(shape) - own[path]
            if not lead:
                yield path, (), reader.read(path, ())
            # what fills up the end of a pipeline's stack is left out
            for slot in range(model.num_repeats if path.startswith("layers/") else shape[0]) if lead else ():
                at = tuple(int(i) for i in np.unravel_index(slot, shape[:lead]))
                yield path, (slot,), reader.read(path, at)

    model, mesh = _placed(model, config, dtype)
    own = {path: len(dims) for path, (dims, _) in _layout(model, mesh).items()}
    params = _on_devices(model, mesh, pieces(own))
    reader.check(leading)
    return model, params, mesh


def _store_tokenizer(folder: str) -> Tokenizer:
    """That of a run: its first store's."""
    path = os.path.join(folder, "config.yaml")
    if not os.path.exists(path):
        raise ModelError(f"{folder} has no config.yaml, which says the token store whose tokenizer it has")
    with contextlib.closing(TokenStore(load_config(path).data.stores[0].path)) as store:
        return store.tokenizer()


# ---- devices


def _placed(model: ModelConfig, config: MeshConfig, dtype: Dtype) -> tuple[ModelConfig, Mesh]:
    devices = start_devices(config)
    sizes = axis_sizes(config, len(devices))
    if sizes["stage"] > 1:
        raise ModelError(f"mesh.stage={sizes['stage']}: inference has no pipeline; use mesh.fsdp or mesh.tensor")
    check_model(model, sizes)
    return model.model_copy(update={"dtype": dtype}), make_mesh(config, devices)


def _layout(model: ModelConfig, mesh: Mesh) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dimension letters of a layer's share, and shape of the whole, of every parameter."""
    state = _shapes(model, mesh)
    shapes, letters = named_leaves(nnx.to_pure_dict(state)), dict[str, str]()
    map_paths(letters.__setitem__, nnx.to_pure_dict(dims_of(state)))
    return {path: (dims, tuple(shapes[path].shape)) for path, dims in letters.items()}


def _shapes(model: ModelConfig, mesh: Mesh) -> Any:
    with jax.set_mesh(mesh):
        return nnx.split(jax.eval_shape(lambda: Transformer(jax.random.key(0), model)))[1]


def _on_devices(model: ModelConfig, mesh: Mesh, pieces: Iterator[Piece]) -> dict[str, Any]:
    """The tree of parameters, of all their pieces."""
    layout, arrays = _layout(model, mesh), dict[str, jax.Array]()
    put = jax.jit(partial(put_layer, add=False), donate_argnums=0)
    with jax.set_mesh(mesh):
        for path, slot, values in _whole_layers(layout, pieces):
            dims, shape = layout[path]
            values = contiguous(np.asarray(values)).astype(weight_dtype(dims, jnp.dtype(model.dtype)), copy=False)
            place = NamedSharding(mesh, param_spec(dims))
            piece = jax.make_array_from_callback(values.shape, place, lambda at, values=values: values[at])
            if not slot:
                arrays[path] = piece
                continue
            if path not in arrays:
                whole = NamedSharding(mesh, param_spec("L" + dims))
                arrays[path] = jax.jit(partial(jnp.zeros, shape, piece.dtype), out_shardings=whole)()
            arrays[path] = put(arrays[path], jnp.asarray(slot[0], jnp.int32), piece)
        return map_paths(lambda path, _: arrays[path], nnx.to_pure_dict(_shapes(model, mesh)))


def _whole_layers(layout: Mapping[str, tuple[str, tuple[int, ...]]], pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces, those of experts joined to layers: their axis may be split over devices."""
    open_layers = dict[tuple[str, int], list[Any]]()
    for path, slot, values in pieces:
        if len(slot) < 2:
            yield path, slot, values
            continue
        layer, expert = slot
        experts = open_layers.setdefault((path, layer), [None] * layout[path][1][1])
        experts[expert] = values
        if not any(x is None for x in experts):
            yield path, (layer,), np.stack(open_layers.pop((path, layer)))
