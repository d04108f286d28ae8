"""Writing safetensors: headers first, then tensor by tensor, and names that say "whole" only at the end."""

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from maxlm.convert.safetensors import INDEX, NAMES, SINGLE, SafetensorsError, Tensor
from maxlm.json_object import shown

SHARD_BYTES = 5_000_000_000
"""Of one file, at most, unless a tensor is larger."""

WRITE = 128 << 10
"""Bytes that are written at a time. Of more Linux makes pages of up to 2 MiB, which a virtual machine may not have yet:
the first use of 2 GB of them takes up to 4 s, of smaller ones 1 s."""


class Writer:
    """Writes a model's tensors into a folder, in any order. Use as a context manager.

    Shapes are known beforehand, so that headers are written first. Files have temporary names (.NAME.partial) until
    all tensors are there and on the disk; the index, or the only file, gets its name last. What an exception leaves is
    removed.

    Attributes:
        files: names of the files.
    """

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        shard_bytes: int = SHARD_BYTES,
        metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    ):
        """Plans the files.

        Args:
            folder: is there already.
            tensors: dtype and shape of each, by name; files are filled in this order.
            shard_bytes: a file gets a new one after it before its tensors are more than this.
            metadata: text for the headers.
        """
        self._folder, self._metadata = folder, dict(metadata)
        self._tensors = {name: Tensor(np.dtype(dtype), tuple(shape), 0) for name, (dtype, shape) in tensors.items()}
        for name, tensor in self._tensors.items():
            if tensor.dtype not in NAMES:
                raise SafetensorsError(f"tensor {shown(name)}: safetensors has no dtype {tensor.dtype}")
        shards = list(_shards(self._tensors, shard_bytes))
        many = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self.files = [SINGLE] if len(shards) == 1 else many
        self._shards = dict(zip(self.files, shards, strict=True))
        self._places = dict[str, tuple[int, int]]()  # descriptor and start, of tensors that are still to come
        self._open = dict[str, int]()
        self._lock = threading.Lock()

    def __enter__(self) -> "Writer":
        try:
            for file, names in self._shards.items():
                self._begin(file, names)
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise OSError(f"cannot write to {self._folder}: {error.strerror}") from None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise OSError(f"cannot write to {self._folder}: {error.strerror}") from None
        finally:
            self._leave()

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one of the tensors, once; errors as write_pieces."""
        self.write_pieces(name, [values])

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Writes one of the tensors, once, in pieces that follow one another along dimension 0.

        Raises:
            SafetensorsError: it is none of them, or has another dtype or shape.
            OSError: no space, for example.
        """
        if name not in self._places:
            raise SafetensorsError(f"tensor {shown(name)} is not to be written, or has been")
        wanted, rows = self._tensors[name], 0
        descriptor, start = self._places[name]
        end = start + wanted.num_bytes
        for values in pieces:
            rows += len(values) if values.ndim else 0
            found = (rows, *values.shape[1:]) if values.ndim else ()
            fits = values.dtype == wanted.dtype and found[1:] == wanted.shape[1:] and len(found) == len(wanted.shape)
            if not fits or start + values.nbytes > end:
                raise SafetensorsError(
                    f"tensor {shown(name)} is {values.dtype}{list(found)}, not {wanted.dtype}{list(wanted.shape)}"
                )
            self._put(descriptor, values, start)
            start += values.nbytes
        if start != end:
            raise SafetensorsError(f"tensor {shown(name)} has {rows} rows, not {list(wanted.shape)}")
        del self._places[name]

    def _put(self, descriptor: int, values: np.ndarray, start: int) -> None:
        view, done = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, 0
        try:
            with self._lock:  # which the file system has for each file too, and threads spin on
                while done < len(view):
                    done += os.pwrite(descriptor, view[done : done + WRITE], start + done)
        except OSError as error:
            raise OSError(f"cannot write to {self._folder}: {error.strerror}") from None

    def _begin(self, file: str, names: list[str]) -> None:
        entries, at = dict[str, Any](), 0
        for name in names:
            tensor = self._tensors[name]
            offsets = [at, at := at + tensor.num_bytes]
            entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        header = {"__metadata__": self._metadata, **entries} if self._metadata else entries
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._open[file] = descriptor = os.open(self._partial(file), flags, 0o666)
        allocate(descriptor, 8 + len(text) + at)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name in names:
            self._places[name] = descriptor, 8 + len(text) + entries[name]["data_offsets"][0]

    def _finish(self) -> None:
        if self._places:
            raise SafetensorsError(f"tensor {shown(next(iter(self._places)))} has not been written")
        for descriptor in self._open.values():
            os.fsync(descriptor)
        if len(self.files) > 1:
            total = sum(tensor.num_bytes for tensor in self._tensors.values())
            places = {name: file for file, names in self._shards.items() for name in names}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2)
            self._open[INDEX] = descriptor = os.open(self._partial(INDEX), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(text.encode() + b"\n")
            os.fsync(descriptor)
        for file in self._open:  # the index is the last
            os.replace(self._partial(file), os.path.join(self._folder, file))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _leave(self) -> None:
        for file, descriptor in self._open.items():
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(self._partial(file))
        self._open = {}

    def _partial(self, file: str) -> str:
        return os.path.join(self._folder, f".{file}.partial")


def allocate(descriptor: int, num_bytes: int) -> None:
    """Gives a new file its size and its place on the disk: a full disk is known at once, and writes are much faster."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file; those of wide types first, so that all are aligned."""
    shard, size = list[str](), 0
    wide_first = lambda names: sorted(names, key=lambda name: -tensors[name].dtype.itemsize)  # noqa: E731
    for name, tensor in tensors.items():
        if shard and size + tensor.num_bytes > limit:
            yield wide_first(shard)
            shard, size = [], 0
        shard.append(name)
        size += tensor.num_bytes
    yield wide_first(shard)
