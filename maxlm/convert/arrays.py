"""The parameters in a checkpoint, written and read one layer's share at a time.

What is written is a folder that Orbax reads: a zarr array for each parameter, uncompressed, a file for each layer or
less, and maxlm's manifest, written last. What is read may also be what Orbax wrote, on any mesh.
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
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from maxlm import manifest
from maxlm.convert.parallel import bands
from maxlm.convert.safetensors_writer import allocate
from maxlm.fingerprint import Running
from maxlm.manifest import ArrayRecord, CheckpointError, DamagedError, FileRecord, Manifest

PREFIX = "params/"
CHUNK_BYTES = 64 << 20
CACHE_BYTES = 512 << 20
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}
"""Types that parameters may have, and what zarr calls them."""
Shape = tuple[int, ...]


def dtype_of(name: str) -> np.dtype:
    """The numpy type of a name in DTYPES."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class ArrayWriter:
    """Writes a checkpoint of step 0 that holds parameters and nothing else; threads may write at the same time."""

    def __init__(self, folder: str, arrays: Mapping[str, tuple[np.dtype, Shape, int]]):
        """Makes the folder.

        Args:
            folder: of the step; is not there yet.
            arrays: dtype, shape, and number of leading dims that are layers, by path of the parameter.
        """
        self._folder, self._arrays = folder, dict(arrays)
        self._chunks = {path: _chunks(*spec) for path, spec in arrays.items()}
        self._left = {path: set(np.ndindex(spec[1][: spec[2]])) for path, spec in arrays.items()}
        self._prints = {path: Running() for path in arrays}
        self._files = dict[str, FileRecord]()
        self._lock = threading.Lock()
        os.makedirs(folder)
        for path, (dtype, shape, _) in arrays.items():
            os.mkdir(os.path.join(folder, self._place(path)))
            about = {"zarr_format": 2, "shape": shape, "chunks": self._chunks[path], "dtype": DTYPES[dtype.name]}
            about |= {"compressor": None, "fill_value": None, "filters": None, "order": "C", "dimension_separator": "."}
            _write(os.path.join(folder, self._place(path, ".zarray")), json.dumps(about).encode())

    def write(self, path: str, slot: Shape, values: np.ndarray) -> None:
        """Writes a parameter, or the share of the layer at `slot`."""
        dtype, shape, num_layer_dims = self._arrays[path]
        own = shape[num_layer_dims:]
        assert (values.dtype, values.shape) == (dtype, own), (path, values.dtype, values.shape)
        at = int(np.ravel_multi_index(slot, shape[:num_layer_dims])) if slot else 0
        found, done, rows = Running(), at * math.prod(own), self._chunks[path][num_layer_dims]
        for i in range(0, own[0], rows):
            place = self._place(path, ".".join(map(str, [*slot, i // rows, *[0] * (len(own) - 1)])))
            digest, size = blake3(), 0
            with _new_file(os.path.join(self._folder, place), values[i : i + rows].nbytes) as put:
                for band in bands(values[i : i + rows]):
                    found.add(band, done)
                    data = band.reshape(-1).view(np.uint8).data
                    digest.update(data)
                    put(data)
                    done, size = done + band.size, size + band.nbytes
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
        trees = {str(tuple(f"{PREFIX}{path}".split("/"))): _about(path, a[1]) for path, a in self._arrays.items()}
        tree = {"tree_metadata": trees, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
        tree["store_array_data_equal_to_fill_value"] = True
        now = time.time_ns()
        handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
        about = {"item_handlers": handler, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
        about |= {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
        _write(os.path.join(self._folder, "_METADATA"), json.dumps(tree).encode())
        _write(os.path.join(self._folder, "_CHECKPOINT_METADATA"), json.dumps(about).encode())
        # .zarray says what the others are, and is not among saved_files
        names = [*manifest.saved_files(self._folder), *(self._place(path, ".zarray") for path in self._arrays)]
        small = manifest.hash_files(self._folder, [name for name in names if name not in self._files])
        arrays = {
            f"{PREFIX}{path}": ArrayRecord(dtype.name, tuple(shape), self._prints[path].text())
            for path, (dtype, shape, _) in self._arrays.items()
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
        self._stores, self._lock = dict[str, Any](), threading.Lock()
        self._context: Any = None

    def read(self, path: str, slot: Shape) -> np.ndarray:
        """A parameter, or the share of the layer at `slot` of its leading dims.

        Raises:
            CheckpointError: it cannot be read.
        """
        shape = self.shapes[path]
        try:
            values = self._mapped(path, slot)
            if values is None:
                with self._lock:
                    if path not in self._stores:
                        self._stores[path] = self._opened(path)
                values = np.asarray(self._stores[path][slot].read().result())
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot read {path} of {self._folder}: {_brief(error)}") from None
        if slot not in self._seen[path]:
            at, found = int(np.ravel_multi_index(slot, shape[: len(slot)])) if slot else 0, Running()
            found.add(values, at * values.size)
            with self._lock:
                if slot not in self._seen[path]:
                    self._seen[path].add(slot)
                    self._prints[path].join(found)
        return values

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

    def _mapped(self, path: str, slot: Shape) -> np.ndarray | None:
        """A share that is one plain file, as ArrayWriter writes it: in place, without a copy."""
        dtype, own = dtype_of(self.dtypes[path]), self.shapes[path][len(slot) :]
        name = f"{PREFIX}{path}".replace("/", ".") + "/" + ".".join(map(str, [*slot, *[0] * len(own)]))
        record = self.manifest.files.get(name)
        if not own or record is None or record.size != math.prod(own) * dtype.itemsize or not record.size:
            return None
        return np.memmap(os.path.join(self._folder, name), dtype, "r", shape=own)

    def _opened(self, path: str) -> Any:
        import tensorstore as ts  # takes a while, and what maxlm wrote itself is read without it

        if self._context is None:
            pool = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}}  # layers of one chunk are asked for one by one
            self._context = ts.Context(pool)
        name, folder = f"{self._prefix}{path}".replace("/", "."), os.path.abspath(self._folder)
        if os.path.exists(os.path.join(folder, "manifest.ocdbt")):
            place: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        else:
            place = {"driver": "file", "path": f"{folder}/{name}/"}
        store = ts.open({"driver": "zarr", "kvstore": place}, open=True, read=True, context=self._context).result()
        if tuple(store.shape) != self.shapes[path] or store.dtype.numpy_dtype.name != self.dtypes[path]:
            raise ValueError(f"it is {store.dtype.name}{list(store.shape)}, and the manifest says otherwise")
        return store


def _chunks(dtype: np.dtype, shape: Shape, num_layer_dims: int) -> list[int]:
    """A layer's share in equal parts of at most CHUNK_BYTES, if its first dim has such a divisor."""
    own = list(shape[num_layer_dims:])
    size = math.prod(own) * dtype.itemsize
    if own and size > CHUNK_BYTES:
        parts = next((n for n in range(2, min(own[0], 4096) + 1) if own[0] % n == 0 and size / n <= CHUNK_BYTES), 1)
        own[0] //= parts
    return [1] * num_layer_dims + own


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
                    done += file.write(data[done:])

            yield put
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def _write(path: str, data: bytes) -> None:
    with _new_file(path, len(data)) as put:
        put(data)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
