"""Manifests: what the files and arrays of a checkpoint have to be, and whether they are.

A checkpoint is a folder; MANIFEST.json is written into it last. It holds the size and BLAKE3 hash of every file as read
back after the save, and of every array its shape, dtype and fingerprint as it was on the devices before the save. Its
own hash is in it too.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

from blake3 import blake3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from maxlm import storage

NAME = "MANIFEST.json"
FORMAT = 1
"""Of what this maxlm writes. 0 were checkpoints without a manifest, in STEP/default/."""
THREADS = 8
CHUNK = 1 << 22  # bytes


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved; the message names the file or array, and what is wrong with it."""


def _inside(name: str) -> str:
    """A path that cannot leave the folder it is joined to."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name[:80]!r} is not a file of the checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(NamedTuple):
    """What a file has to be: its size in bytes, and its BLAKE3 hash in hexadecimal digits."""

    size: Size
    blake3: Hash


class ArrayRecord(NamedTuple):
    """What an array has to be; the fingerprint is that of maxlm.fingerprint."""

    dtype: str
    shape: tuple[Size, ...]
    fingerprint: str


class Manifest(BaseModel):
    """What a checkpoint has to be.

    Attributes:
        format: of the checkpoint.
        step: finished steps.
        temporary: a save by the clock, that the next one replaces.
        files: by path within the checkpoint.
        arrays: by path in the state.
        run: identity of the run (run_folder.identity).
        versions: of the packages that wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = Field(FORMAT, ge=1, le=FORMAT)
    step: Size
    temporary: bool = False
    files: dict[FileName, FileRecord]
    arrays: dict[str, ArrayRecord]
    run: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def write(self, folder: str) -> None:
        """Writes it into the checkpoint, atomically.

        Raises:
            StorageError: the storage does not take it.
        """
        body = self.model_dump_json()
        text = f'{{"manifest": {body},\n"blake3": "{blake3(body.encode()).hexdigest()}"}}\n'
        storage.write_bytes(storage.join(folder, NAME), text.encode())

    @classmethod
    def read(cls, folder: str) -> "Manifest":
        """Reads and checks that of a checkpoint, but not the checkpoint.

        Raises:
            DamagedError: it is missing or damaged.
            CheckpointError: it is of a newer maxlm.
            StorageError: it cannot be read.
        """
        try:
            data = storage.read_bytes(storage.join(folder, NAME))
        except FileNotFoundError:
            raise DamagedError(f"{NAME} is missing") from None
        match = re.fullmatch(rb'\{"manifest": (\{.*\}),\n"blake3": "([0-9a-f]{64})"\}\n', data)
        if match is None or blake3(match[1]).hexdigest().encode() != match[2]:
            raise DamagedError(f"{NAME} is damaged")
        try:
            number = json.loads(match[1]).get("format")
            if type(number) is int and number > FORMAT:
                number = min(number, 10**9)  # it is shown
                raise CheckpointError(f"{folder} has format {number}, of a newer maxlm; this one reads up to {FORMAT}")
            return cls.model_validate_json(match[1])
        except ValidationError as error:
            first = error.errors()[0]
            where, message = ".".join(map(str, first["loc"]))[:80], first["msg"].removeprefix("Value error, ")
            raise DamagedError(f"{NAME} is not a manifest: {where}: {message[:200]}") from None
        except (ValueError, RecursionError):
            raise DamagedError(f"{NAME} is not a manifest") from None


def hash_files(folder: str, names: Iterable[str]) -> dict[str, FileRecord]:
    """Reads files of a checkpoint, several at a time.

    Args:
        folder: the checkpoint.
        names: paths within it.

    Returns:
        What each of them is.

    Raises:
        StorageError, FileNotFoundError: one cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(storage.join(folder, name)), names), strict=True))


def saved_files(folder: str) -> list[str]:
    """Paths of the files that a manifest has to name."""
    return [name for name in storage.list_tree(folder) if name != NAME and not os.path.basename(name).startswith(".")]


def check_files(folder: str, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Reads files of a checkpoint and compares them with its manifest.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        names: files to look at; default: all.

    Raises:
        DamagedError: names the first file that is missing, cut off or changed.
        StorageError: one cannot be read, which may be no fault of the checkpoint's.
    """

    def problem(name: str) -> str | None:
        wanted = manifest.files[name]
        try:
            found = _hash(storage.join(folder, name))
        except FileNotFoundError:
            return f"{name} is missing"
        if found.size != wanted.size:
            return f"{name} has {found.size:,} bytes, not {wanted.size:,}"
        return None if found == wanted else f"{name} has other bytes than were written (BLAKE3)"

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(problem, sorted(manifest.files if names is None else names)):
            if found is not None:
                raise DamagedError(found)


def check_arrays(manifest: Manifest, found: Mapping[str, str]) -> None:
    """Compares fingerprints of restored arrays with those before the save.

    Raises:
        DamagedError: names the first array that differs.
    """
    for name, fingerprint in found.items():
        if name not in manifest.arrays or manifest.arrays[name].fingerprint != fingerprint:
            raise DamagedError(f"array {name} is not the one that was saved")


def _hash(path: str) -> FileRecord:
    digest, size = blake3(), 0
    if storage.is_bucket(path):
        data = storage.read_bytes(path)
        return FileRecord(len(data), digest.update(data).hexdigest())
    try:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(CHUNK)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage.StorageError(f"cannot read {path}: {error.strerror}") from None
    return FileRecord(size, digest.hexdigest())
