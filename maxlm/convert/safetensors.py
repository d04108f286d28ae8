"""The safetensors format: tensors in files that anyone may have made, read one at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape and place), and the
tensors' bytes without a gap. Models are one file, model.safetensors, or several with model.safetensors.index.json.

References:
    https://github.com/huggingface/safetensors#format
"""

import contextlib
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maxlm.json_object import parse_object, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes of a header or an index, at most: the limit of the reference implementation."""
LIMIT = 2**63
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsError(ValueError):
    """A file that is no safetensors file, or not whole; one sentence that names the file and the tensor."""


class Tensor(NamedTuple):
    """What a header says of a tensor; start is counted from the beginning of the file, in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


# ---- reading


class File:
    """An opened safetensors file, whose header has been checked against its size.

    Attributes:
        path: of the file.
        tensors: what is in it, by name, in the order of the header.
        metadata: text by name, often {"format": "pt"}.
    """

    def __init__(self, path: str):
        """Raises: FileNotFoundError; SafetensorsError: the file is not whole, or its header is none."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe does not hang
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist") from None
        except OSError as error:
            raise OSError(f"cannot read {path}: {error.strerror}") from None
        try:
            header, start, size = self._header()
            self.tensors, self.metadata = _checked(path, header, start, size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes it; tensors that were read stay."""
        os.close(self._descriptor)

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        """A tensor.

        Args:
            name: of the tensor.
            memory: bytes that it may take, uint8 [N]; default: memory of its own.

        Raises:
            SafetensorsError: the file has become shorter.
        """
        tensor = self.tensors[name]
        if memory is None:
            memory = np.empty(tensor.num_bytes, np.uint8)
        data = memory[: tensor.num_bytes]
        self._fill(data.data, tensor.start, f"tensor {shown(name)}")
        return data.view(tensor.dtype).reshape(tensor.shape)

    def _header(self) -> tuple[bytes, int, int]:
        """The header's bytes, where tensors begin, and the size of the file."""
        status = os.fstat(self._descriptor)
        size = status.st_size
        if size < 8 or not stat.S_ISREG(status.st_mode):
            raise SafetensorsError(f"{self.path} is no safetensors file ({size} bytes)")
        length = bytearray(8)
        self._fill(memoryview(length), 0, "the header")
        count = int.from_bytes(length, "little")
        if count > size - 8:
            raise SafetensorsError(
                f"{self.path} is cut off, or no safetensors file: its header is to have {count:,} bytes, and the file "
                f"has {size:,}"
            )
        if count > MAX_HEADER:
            raise SafetensorsError(f"{self.path}: a header of {count:,} bytes is more than {MAX_HEADER:,}")
        header = bytearray(count)
        self._fill(memoryview(header), 8, "the header")
        return bytes(header), 8 + count, size

    def _fill(self, view: memoryview, start: int, what: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise OSError(f"cannot read {self.path}: {error.strerror}") from None
            if not count:
                raise SafetensorsError(f"{self.path} ends within {what}: it has become shorter")
            done += count


class Folder:
    """The tensors of a model's folder: of one file, or of those that an index names.

    Attributes:
        path: of the folder.
        tensors: what there is, by name.
    """

    def __init__(self, path: str):
        """Opens all files.

        Raises:
            FileNotFoundError: there is neither a safetensors file nor an index.
            SafetensorsError: a file is damaged, the index names one outside the folder, or they do not agree.
        """
        self.path, self._files, self._own = path, dict[str, File](), dict[str, str]()
        names = _listed(path)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if SINGLE in names:
                self._files[SINGLE] = File(os.path.join(path, SINGLE))
                self._places = dict.fromkeys(self._files[SINGLE].tensors, SINGLE)
            elif INDEX in names:
                self._places = read_index(os.path.join(path, INDEX))
                for name in dict.fromkeys(self._places.values()):
                    self._files[name] = File(os.path.join(path, name))
                self._check()
            else:
                raise FileNotFoundError(_no_tensors(path, names))
            stack.pop_all()
        self.tensors = {name: self._files[place].tensors[name] for name, place in self._places.items()}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        """A tensor, as File.read gives it."""
        return self._files[self._places[name]].read(self._own.get(name, name), memory)

    def rename(self, new: Callable[[str], str]) -> None:
        """Gives each tensor another name, by which it is known from now on."""
        self._own = {new(name): self._own.get(name, name) for name in self.tensors}
        self._places = {new(name): place for name, place in self._places.items()}
        self.tensors = {new(name): tensor for name, tensor in self.tensors.items()}

    def in_order(self) -> list[str]:
        """Names of the tensors in the order in which a disk reads them best."""
        files = list(self._files)
        return sorted(self.tensors, key=lambda name: (files.index(self._places[name]), self.tensors[name].start))

    def _check(self) -> None:
        for name, place in self._places.items():
            if name not in self._files[place].tensors:
                raise SafetensorsError(f"{self._files[place].path} has no tensor {shown(name)}, where {INDEX} puts it")
        for place, file in self._files.items():
            for name in file.tensors:
                if self._places.get(name) != place:
                    raise SafetensorsError(f"{file.path} has a tensor {shown(name)} that {INDEX} does not put there")


def read_index(path: str) -> dict[str, str]:
    """Reads model.safetensors.index.json.

    Returns:
        File name by tensor name.

    Raises:
        SafetensorsError: it is no index, or names a file outside its folder.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_HEADER:
            raise SafetensorsError(f"{path}: an index of {size:,} bytes is more than {MAX_HEADER:,}")
        with open(path, "rb") as file:
            tree = parse_object(file.read(MAX_HEADER), path, SafetensorsError)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    places = tree.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SafetensorsError(f"{path} has no weight_map of tensor names and files")
    for name, place in places.items():
        inside = isinstance(place, str) and re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", place, re.ASCII)
        if not inside:
            raise SafetensorsError(
                f"{path} puts tensor {shown(name)} into {shown(place)}, which is no safetensors file of its folder"
            )
    return places


def _checked(path: str, header: bytes, start: int, size: int) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a header whose tensors fill [start, size) of the file."""
    if header[:1] != b"{":
        raise SafetensorsError(f"{path} has no header of a safetensors file")
    tree = parse_object(header, path, SafetensorsError)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError(f"{path}: __metadata__ is to hold text alone")
    tensors = {name: _tensor(path, name, entry, start) for name, entry in tree.items()}
    end, last = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            kind = "overlaps" if tensor.start < end else "leaves a hole after"
            raise SafetensorsError(f"{path}: tensor {shown(name)} {kind} {last}")
        end, last = end + tensor.num_bytes, f"tensor {shown(name)}"
        if end > size:
            raise SafetensorsError(f"{path} is cut off within tensor {shown(name)}: {end:,} bytes, and it has {size:,}")
    if end != size:
        raise SafetensorsError(f"{path} has {size - end:,} bytes after {last} that belong to no tensor")
    return MappingProxyType(tensors), MappingProxyType(metadata)


def _tensor(path: str, name: str, entry: Any, start: int) -> Tensor:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{where} is to have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SafetensorsError(f"{where} has the unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > 32:
        raise SafetensorsError(f"{where} has the shape {shown(shape)}; up to 32 counts below 2**63 belong there")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(f"{where} has the data_offsets {shown(offsets)}; a begin and an end belong there")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if wanted >= LIMIT or math.prod(size for size in shape if size) >= LIMIT:
        raise SafetensorsError(f"{where} has the shape {shown(shape)}, more than 2**63 bytes")
    if offsets[1] - offsets[0] != wanted:
        raise SafetensorsError(
            f"{where} has {offsets[1] - offsets[0]:,} bytes, and {dtype}{shown(shape)} are {wanted:,}"
        )
    return Tensor(DTYPES[dtype], tuple(shape), start + offsets[0])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LIMIT for value in values)


def _listed(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None


def _no_tensors(path: str, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not pickles:
        return f"{path} has neither {SINGLE} nor {INDEX}"
    return (
        f"{path} has pickle files alone ({pickles[0]}), which run code when they are read; convert them where they are "
        "trusted: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) of transformers writes safetensors"
    )
