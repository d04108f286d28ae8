"""The parameters in a checkpoint, written and read one layer's share at a time.

What is written is a folder that Orbax reads: a Zarr array for each parameter (zarr.py), and maxlm's manifest, written
last. What is read may also be what Orbax wrote, on any mesh.
"""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from blake3 import blake3

from maxlm import manifest
from maxlm.convert.parallel import bands
from maxlm.convert.safetensors_writer import WRITE, allocate
from maxlm.convert.zarr import FILE, Layout, Shape
from maxlm.fingerprint import Running
from maxlm.json_object import parse_object
from maxlm.manifest import ArrayRecord, CheckpointError, DamagedError, FileRecord, Manifest

PREFIX = "params/"
CACHE_BYTES = 512 << 20
MAX_LAYOUT = 1 << 16
"""Bytes of a zarr.json that are read."""
DTYPES = ("float32", "float16", "bfloat16")
"""Types that parameters may have."""


def dtype_of(name: str) -> np.dtype:
    """The numpy type of a name in DTYPES."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class Spec(NamedTuple):
    """An array that is to be written.

    Attributes:
        dtype: of the elements.
        shape: layers included.
        num_layer_dims: number of its leading dims that are layers.
        order: the other dims, counted from 0, as they follow one another in memory.
    """

    dtype: np.dtype
    shape: Shape
    num_layer_dims: int
    order: Shape


class ArrayWriter:
    """Writes a checkpoint of step 0 that holds parameters and nothing else; threads may write at the same time."""

    def __init__(self, folder: str, arrays: Mapping[str, Spec]):
        """Makes the folder.

        Args:
            folder: of the step; is not there yet.
            arrays: by path of the parameter.
        """
        self._folder, self._arrays = folder, dict(arrays)
        self._layouts = {path: Layout.of_shares(*spec) for path, spec in arrays.items()}
        self._left = {path: set(np.ndindex(spec.shape[: spec.num_layer_dims])) for path, spec in arrays.items()}
        self._prints = {path: Running() for path in arrays}
        self._files = dict[str, FileRecord]()
        self._lock = threading.Lock()
        os.makedirs(folder)
        for path, layout in self._layouts.items():
            os.mkdir(os.path.join(folder, self._place(path)))
            _write(os.path.join(folder, self._place(path, FILE)), json.dumps(layout.tree()).encode())

    def write(self, path: str, slot: Shape, values: np.ndarray) -> None:
        """Writes a parameter, or the share of the layer at `slot`; fastest if its memory has the order of its Spec."""
        dtype, shape, num_layer_dims, order = self._arrays[path]
        own = shape[num_layer_dims:]
        assert (values.dtype, values.shape) == (dtype, own), (path, values.dtype, values.shape)
        at = int(np.ravel_multi_index(slot, shape[:num_layer_dims])) * math.prod(own) if slot else 0
        found, strides, stored = Running(), _strides(own, order), values.transpose(order)
        names = self._layouts[path].files(slot)
        assert names
        for name, part in zip(names, np.split(stored, len(names)), strict=True):
            place, digest, size = self._place(path, name), blake3(), 0
            with _new_file(os.path.join(self._folder, place), part.nbytes) as put:
                for band in bands(part):
                    found.add(band, at, strides)
                    data = band.reshape(-1).view(np.uint8).data
                    digest.update(data)
                    put(data)
                    at, size = at + len(band) * strides[0], size + band.nbytes
            self._files[place] = FileRecord(size, digest.hexdigest())
        with self._lock:
            self._prints[path].join(found)
            self._left[path].discard(slot)

    def finish(self, run: Mapping[str, Any]) -> None:
        """Writes what Orbax wants to know, and the manifest.

        Args:
            run: identity of the run, for the manifest.
        """
        assert not any(self._left.values())
        trees = {str(tuple(f"{PREFIX}{path}".split("/"))): _about(path, a.shape) for path, a in self._arrays.items()}
        tree = {"tree_metadata": trees, "use_ocdbt": False, "use_zarr3": True, "custom_metadata": None}
        tree["store_array_data_equal_to_fill_value"] = True
        now = time.time_ns()
        handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
        about = {"item_handlers": handler, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
        about |= {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
        _write(os.path.join(self._folder, "_METADATA"), json.dumps(tree).encode())
        _write(os.path.join(self._folder, "_CHECKPOINT_METADATA"), json.dumps(about).encode())
        names = manifest.saved_files(self._folder)
        small = manifest.hash_files(self._folder, [name for name in names if name not in self._files])
        arrays = {
            f"{PREFIX}{path}": ArrayRecord(spec.dtype.name, spec.shape, self._prints[path].text())
            for path, spec in self._arrays.items()
        }
        versions = {"maxlm": importlib.metadata.version("maxlm")}
        files = dict(sorted((self._files | small).items()))
        Manifest(step=0, files=files, arrays=arrays, run=dict(run), versions=versions).write(self._folder)

    def _place(self, path: str, *names: str) -> str:
        """Within the folder."""
        return "/".join([f"{PREFIX}{path}".replace("/", "."), *names])


class ArrayReader:
    """Reads the parameters of a checkpoint; each is compared with its fingerprint in the manifest by `check`.

    Threads may read at the same time.

    Attributes:
        manifest: of the checkpoint.
        shapes: of the parameters, stacked layers included, by path.
        dtypes: likewise.
    """

    def __init__(self, folder: str, prefix: str = PREFIX):
        """Reads the manifest.

        Args:
            folder: of a step, local.
            prefix: of the arrays' paths, if they are other ones than the parameters.

        Raises:
            CheckpointError: the manifest cannot be read.
        """
        self._folder, self._prefix, self.manifest = folder, prefix, Manifest.read(folder)
        records = {p.removeprefix(prefix): a for p, a in self.manifest.arrays.items() if p.startswith(prefix)}
        self.shapes = {path: tuple(record.shape) for path, record in records.items()}
        self.dtypes = {path: record.dtype for path, record in records.items()}
        self._wanted = {path: record.fingerprint for path, record in records.items()}
        self._prints = {path: Running() for path in records}
        self._seen = {path: set[Shape]() for path in records}
        self._stores, self._layouts = dict[str, Any](), dict[str, Layout | None]()
        self._lock = threading.Lock()
        self._context: Any = None

    def read(self, path: str, slot: Shape) -> np.ndarray:
        """A parameter, or the share of the layer at `slot` of its leading dims.

        Raises:
            CheckpointError: it cannot be read.
        """
        shape = self.shapes[path]
        own = shape[len(slot) :]
        try:
            order, values = self._in_place(path, slot) or (tuple(range(len(own))), self._through_store(path, slot))
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot read {path} of {self._folder}: {_brief(error)}") from None
        if slot not in self._seen[path]:
            at, found = int(np.ravel_multi_index(slot, shape[: len(slot)])) if slot else 0, Running()
            found.add(values, at * values.size, _strides(own, order))
            with self._lock:
                if slot not in self._seen[path]:
                    self._seen[path].add(slot)
                    self._prints[path].join(found)
        return values.transpose(np.argsort(order))

    def check(self, num_layer_dims: Mapping[str, int]) -> None:
        """Compares fingerprints, after reading what has not been read (the end of a pipeline's stack).

        Args:
            num_layer_dims: leading dims that are layers, by path.

        Raises:
            DamagedError: names the first parameter that is not what was saved.
        """
        for path, lead in num_layer_dims.items():
            for slot in itertools.product(*map(range, self.shapes[path][:lead])):
                if slot not in self._seen[path]:
                    self.read(path, slot)
            if self._prints[path].text() != self._wanted[path]:
                raise DamagedError(
                    f"{self._folder} is damaged: array {self._prefix}{path} is not the one that was saved"
                )

    def _in_place(self, path: str, slot: Shape) -> tuple[Shape, np.ndarray] | None:
        """A share as it lies in files that ArrayWriter wrote: the order of its dims, and the values in that order."""
        lead, dtype, name = len(slot), dtype_of(self.dtypes[path]), self._name(path)
        with self._lock:
            if path not in self._layouts:
                self._layouts[path] = self._layout(path)
        layout = self._layouts[path]
        if layout is None or (files := layout.files(slot)) is None:
            return None
        order = tuple(dim - lead for dim in layout.order[lead:])
        shape = [layout.chunks[lead:][dim] for dim in order]
        for file in files:
            if os.path.getsize(os.path.join(self._folder, name, file)) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}/{file} has not the size that it had")
        parts = [np.memmap(os.path.join(self._folder, name, file), dtype, "r", shape=tuple(shape)) for file in files]
        return order, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _layout(self, path: str) -> Layout | None:
        place = os.path.join(self._folder, self._name(path), FILE)
        if not os.path.exists(place):
            return None
        with open(place, "rb") as file:
            return Layout.read(self.dtypes[path], self.shapes[path], parse_object(file.read(MAX_LAYOUT), place))

    def _name(self, path: str) -> str:
        return f"{self._prefix}{path}".replace("/", ".")

    def _through_store(self, path: str, slot: Shape) -> np.ndarray:
        with self._lock:
            if path not in self._stores:
                self._stores[path] = self._opened(path)
        return np.asarray(self._stores[path][slot].read().result())

    def _opened(self, path: str) -> Any:
        import tensorstore as ts  # takes a while, and what maxlm wrote itself is read without it

        if self._context is None:
            pool = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}}  # layers of one chunk are asked for one by one
            self._context = ts.Context(pool)
        name, folder = self._name(path), os.path.abspath(self._folder)
        if os.path.exists(os.path.join(folder, "manifest.ocdbt")):
            place: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        else:
            place = {"driver": "file", "path": f"{folder}/{name}/"}
        driver = "zarr3" if os.path.exists(os.path.join(folder, name, FILE)) else "zarr"
        store = ts.open({"driver": driver, "kvstore": place}, open=True, read=True, context=self._context).result()
        if tuple(store.shape) != self.shapes[path] or store.dtype.numpy_dtype.name != self.dtypes[path]:
            raise ValueError(f"it is {store.dtype.name}{list(store.shape)}, and the manifest says otherwise")
        return store


def _strides(shape: Shape, order: Shape) -> list[int]:
    """Elements between neighbours along each dim of an array, dims taken in that order."""
    return [math.prod(shape[dim + 1 :]) for dim in order]


def _about(path: str, shape: Shape) -> dict[str, Any]:
    keys = f"{PREFIX}{path}".split("/")
    value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}
    return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}


@contextlib.contextmanager
def _new_file(path: str, num_bytes: int) -> Iterator[Callable[[Any], None]]:
    """Yields what writes to a new file, which is flushed to the disk in the end."""
    try:
        with open(path, "wb", buffering=0) as file:
            allocate(file.fileno(), num_bytes)

            def put(data: Any) -> None:
                done = 0
                while done < len(data):
                    done += file.write(data[done : done + WRITE])

            yield put
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def _write(path: str, data: bytes) -> None:
    with _new_file(path, len(data)) as put:
        put(data)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
