"""The token store: all tokens of a corpus as two flat streams on disk, readable from any position.

A store is a folder or bucket prefix with raw little-endian token files of SHARD_BYTES each, a copy of the tokenizer,
and manifest.json, which is written last: a folder without it is no store. Raw files were chosen by measurement
(random rows of 2,049 uint16 tokens from a warm local disk, per second on one core): pread of raw files 390,000,
memory map 160,000, array_record 57,000, zarr3 shards through tensorstore 24,000. In buckets the same files are read
by byte ranges.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from maxlm import storage
from maxlm.config import DataConfig
from maxlm.data.sources import DataError
from maxlm.data.tokenizer import FIRST, Kind, Tokenizer, tokenizer_from_bytes

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
FORMAT, CHAT_FORMAT = 1, 2
"""Of a store of documents; of one of conversations, whose tokens carry flags (worker.flagged)."""
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 27
MAX_OPEN_FILES = 256


Count = Annotated[int, Field(ge=0, lt=2**63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OwnFile = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
"""Name of a file directly in the store."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Tokenizer(_Entry):
    kind: Kind
    sha256: Hash
    vocab_size: int = Field(ge=1, le=2**32)
    eos_id: Count
    bos_id: Count | None
    file: OwnFile | None

    @model_validator(mode="after")
    def _fits(self) -> "_Tokenizer":
        if max(self.eos_id, self.bos_id or 0) >= self.vocab_size:
            raise ValueError(f"eos_id={self.eos_id} and bos_id={self.bos_id} must be below {self.vocab_size=}")
        if (self.file is None) != (self.kind == "byte"):
            raise ValueError(f"file={self.file} does not go with kind={self.kind}")
        return self


class _Shard(_Entry):
    name: OwnFile
    num_bytes: Count


class _Split(_Entry):
    num_tokens: Count
    num_bytes: Count
    num_documents: Count
    replaced_bytes: Count
    num_learned: Count | None = None
    sha256: Hash
    shards: list[_Shard]


class _Splits(_Entry):
    train: _Split
    heldout: _Split


class _Options(_Entry):
    heldout: float


class _Source(_Entry):
    name: str
    num_bytes: Count
    sha256: Hash


class _Manifest(_Entry):
    """What manifest.json has to hold; there may be more."""

    format: int = Field(ge=FORMAT, le=CHAT_FORMAT)
    tokenizer: _Tokenizer
    dtype: Literal["uint16", "uint32"]
    options: _Options
    splits: _Splits
    sources: list[_Source]

    @model_validator(mode="after")
    def _agrees(self) -> "_Manifest":
        if self.format == CHAT_FORMAT and (self.dtype != "uint32" or self.tokenizer.vocab_size > FIRST):
            raise ValueError(f"dtype={self.dtype} has no room for the flags of conversations")
        itemsize = np.dtype(self.dtype).itemsize
        for name in SPLITS:
            split: _Split = getattr(self.splits, name)
            sizes = [shard.num_bytes for shard in split.shards]
            whole = all(size == SHARD_BYTES for size in sizes[:-1]) and all(0 < size <= SHARD_BYTES for size in sizes)
            if not whole or sum(sizes) != split.num_tokens * itemsize:
                raise ValueError(
                    f"splits.{name}: {split.num_tokens} tokens of {self.dtype} are not what its shards hold"
                )
        return self


class TokenStore:
    """Random access to a complete token store. Safe to use from many threads.

    Args:
        path: folder or bucket url.

    Attributes:
        path: as given.
        manifest: what build.py wrote: format, tokenizer, dtype, options, sources, splits.
        dtype: of the tokens, uint16 or uint32.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: the build did not finish, files are missing or cut, or another version of maxlm wrote it.
    """

    def __init__(self, path: str):
        self.path = path
        self.manifest = _read_manifest(path)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._shards: dict[str, list[str]] = {}
        for split in SPLITS:
            self._shards[split] = [storage.join(path, shard["name"]) for shard in self._split(split)["shards"]]
        if not storage.is_bucket(path):
            self._check_sizes()
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations, of which the assistant's tokens alone are learned."""
        return self.manifest["format"] == CHAT_FORMAT

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def eos_id(self) -> int:
        """Token id that ends each document."""
        return self.manifest["tokenizer"]["eos_id"]

    @property
    def tokenizer_identity(self) -> dict[str, Any]:
        """dict(kind, sha256, vocab_size, eos_id, bos_id) of the tokenizer that made this store."""
        return {name: self.manifest["tokenizer"][name] for name in ("kind", "sha256", "vocab_size", "eos_id", "bos_id")}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made this store, from the copy in it.

        Raises:
            DataError: the copy is not the file that the manifest names.
        """
        entry = self.manifest["tokenizer"]
        wrong = DataError(f"store {self.path}: {entry['file']} is not the tokenizer that made it; build it again")
        try:
            data = storage.read_bytes(storage.join(self.path, entry["file"])) if entry["file"] else b""
        except FileNotFoundError:
            raise wrong from None
        if entry["file"] and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise wrong
        bos = "none" if entry["bos_id"] is None else entry["bos_id"]
        try:
            tokenizer = tokenizer_from_bytes(entry["kind"], data, entry["eos_id"], bos)
        except ValueError:
            raise wrong from None
        if tokenizer.identity() != self.tokenizer_identity:
            raise wrong
        return tokenizer

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split, control tokens included."""
        return self._split(split)["num_tokens"]

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of the text of a split."""
        return self._split(split)["num_bytes"]

    def content_hash(self, split: Split) -> str:
        """Hex SHA-256 of a split's tokens, as recorded by the build."""
        return self._split(split)["sha256"]

    def read(self, split: Split, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) of a split.

        Returns:
            uint16 or uint32 [stop - start].

        Raises:
            IndexError: the range leaves the split.
            StorageError: a file cannot be read.
        """
        tokens = self.read_rows(split, [start], stop - start)[0]
        return tokens & (FIRST - 1) if self.is_chat else tokens

    def read_rows(self, split: Split, starts: Sequence[int], length: int) -> np.ndarray:
        """Reads many ranges of equal length, with the flags of conversations; in buckets all at the same time.

        Args:
            split: "train" or "heldout".
            starts: first token of each row; int [N].
            length: tokens per row.

        Returns:
            uint16 or uint32 [N, length].

        Raises:
            IndexError, StorageError: as read.
        """
        num_tokens = self.num_tokens(split)
        if length < 0 or any(start < 0 or start + length > num_tokens for start in starts):
            raise IndexError(f"store {self.path}: {length} tokens at {list(starts)} leave the {num_tokens} of {split}")
        rows = np.empty((len(starts), length), self.dtype)
        pieces = [piece for row, start in zip(rows, starts, strict=True) for piece in self._pieces(split, start, row)]
        if storage.is_bucket(self.path):
            ranges = [(name, offset, offset + out.nbytes) for name, offset, out in pieces]
            for (_, _, out), data in zip(pieces, storage.read_ranges(ranges), strict=True):
                out[:] = np.frombuffer(data, self.dtype)
        else:
            for name, offset, out in pieces:
                self._read_local(name, offset, out)
        return rows

    def verify(self, split: Split) -> None:
        """Reads a whole split and compares it with the hash that its build recorded.

        Raises:
            DataError: the tokens are not those that were written.
        """
        digest, num_tokens, step = hashlib.sha256(), self.num_tokens(split), 1 << 22
        for start in range(0, num_tokens, step):
            digest.update(self.read_rows(split, [start], min(step, num_tokens - start)).data)
        if digest.hexdigest() != self.content_hash(split):
            raise DataError(f"store {self.path}: the {split} tokens are damaged; build it again with --overwrite")

    def close(self) -> None:
        """Closes the files; the store must not be read afterwards."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _split(self, split: str) -> dict[str, Any]:
        return self.manifest["splits"][split]

    def _check_sizes(self) -> None:
        for split in SPLITS:
            for shard, name in zip(self._split(split)["shards"], self._shards[split], strict=True):
                size = os.path.getsize(name) if os.path.exists(name) else None
                if size != shard["num_bytes"]:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise DataError(
                        f"store {self.path} is damaged: {shard['name']} {found}, not {shard['num_bytes']}; "
                        "build it again with --overwrite"
                    )

    def _pieces(self, split: Split, start: int, row: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
        """(file, byte offset, part of row) for each file that a range touches."""
        per_shard = SHARD_BYTES // self.dtype.itemsize
        pieces, done = [], 0
        while done < len(row):
            shard, offset = divmod(start + done, per_shard)
            size = min(len(row) - done, per_shard - offset)
            pieces.append((self._shards[split][shard], offset * self.dtype.itemsize, row[done : done + size]))
            done += size
        return pieces

    def _read_local(self, name: str, offset: int, out: np.ndarray) -> None:
        descriptor, cached = self._open(name)
        try:
            if os.preadv(descriptor, [out.data], offset) != out.nbytes:
                raise storage.StorageError(f"cannot read {name}: it ends before byte {offset + out.nbytes}")
        except OSError as error:
            if isinstance(error, storage.StorageError):
                raise
            raise storage.StorageError(f"cannot read {name}: {error.strerror}") from None
        finally:
            if not cached:
                os.close(descriptor)

    def _open(self, name: str) -> tuple[int, bool]:
        """A file descriptor, and whether it stays open; big stores have more files than a process may hold."""
        if (descriptor := self._files.get(name)) is not None:
            return descriptor, True
        with self._lock:
            if (descriptor := self._files.get(name)) is not None:
                return descriptor, True
            try:
                descriptor = os.open(name, os.O_RDONLY)
            except OSError as error:
                raise storage.StorageError(f"cannot read {name}: {error.strerror}") from None
            # Rows come in random order: reading ahead would fetch thirty times what is used.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            if len(self._files) >= MAX_OPEN_FILES:
                return descriptor, False
            self._files[name] = descriptor
            return descriptor, True


def is_complete(path: str) -> bool:
    """Whether a finished token store is at path."""
    return storage.exists(storage.join(path, MANIFEST))


def open_stores(data: DataConfig, vocab_size: int) -> list[TokenStore]:
    """Opens the stores of a mixture and checks that they fit the model and each other.

    Args:
        data: the mixture.
        vocab_size: ids that the model knows, as a count.

    Raises:
        FileNotFoundError, DataError: as TokenStore.
        ValueError: a store has more ids than the model, or another tokenizer than the first store.
    """
    stores = [TokenStore(store.path) for store in data.stores]
    for index, store in enumerate(stores):
        if store.vocab_size > vocab_size:
            raise ValueError(
                f"data.stores[{index}] {store.path} has token ids up to {store.vocab_size - 1}, but "
                f"model.vocab_size={vocab_size}; set model.vocab_size={store.vocab_size} or more"
            )
        if store.tokenizer_identity != stores[0].tokenizer_identity:
            raise ValueError(
                f"data.stores[{index}] {store.path} was built with another tokenizer than {stores[0].path}; "
                "build both with the same one"
            )
    return stores


def _read_manifest(path: str) -> dict[str, Any]:
    build = f"maxlm data build TEXT --out {path}"
    try:
        data = storage.read_bytes(storage.join(path, MANIFEST))
    except FileNotFoundError:
        if storage.list_dir(path):
            raise DataError(f"store {path} is incomplete (no {MANIFEST}); run the same build again: {build}") from None
        raise FileNotFoundError(f"store {path} does not exist; run: {build}") from None
    try:
        manifest = TypeAdapter(dict[str, Any]).validate_json(data)
        version = manifest["format"]
    except (ValidationError, KeyError):
        raise DataError(f"store {path}: {MANIFEST} is not a maxlm manifest") from None
    if type(version) is int and version not in (FORMAT, CHAT_FORMAT):
        shown = min(max(version, -1), 10**9)
        raise DataError(
            f"store {path} has format {shown}, this maxlm reads {FORMAT} and {CHAT_FORMAT}; build it with --overwrite"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"]))[:80], first["msg"].removeprefix("Value error, ")
        raise DataError(
            f"store {path}: {MANIFEST} is damaged ({where + ': ' if where else ''}{message[:200]}); "
            "build it again with --overwrite"
        ) from None
    return manifest
