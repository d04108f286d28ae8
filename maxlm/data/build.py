"""Builds a token store from text: parallel, resumable, and the same bytes however it was interrupted.

One reader streams documents, in the order of the sources, into parts of about 4 MB of text. Worker processes tokenize
parts into files of a staging folder beside the store (STORE.building; for buckets in the user's cache folder). Last,
the parts are streamed into the store and its manifest is written. A part's name holds the hash of its text and of the
tokenizer, so a build that starts again finds what it has done and does the rest; changed inputs have other names.

A document becomes [bos] tokens [eos]. Whether it is held out depends on the hash of its text alone, so neither order
nor copies of a document can move it into the training split. Documents keep the order of the sources: the loader
shuffles rows over the whole store, and neighbours within a row may not see each other anyway.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maxlm import places, storage
from maxlm.config import DataConfig
from maxlm.data import sources
from maxlm.data.chats import Chats, load_chats
from maxlm.data.sources import DataError, Document, Source
from maxlm.data.store import CHAT_FORMAT, FORMAT, MANIFEST, SHARD_BYTES, SPLITS, is_complete
from maxlm.data.tokenizer import FILE_NAMES, LEARNED, Tokenizer, load_tokenizer
from maxlm.data.worker import WorkerPool, encode_part, token_dtype

PART_CHARS = 4_000_000
# Below this much text, starting processes takes longer than the work.
INLINE_BYTES = 4_000_000
OWN_FILES = re.compile(r"(train|heldout)-[0-9a-f]{16}-\d{5}\.bin|tokenizer-[0-9a-f]{16}\.(json|model)|manifest\.json")

# Called with the stage ("tokenize" or "write"), and how many of how many bytes are done.
Progress = Callable[[str, int, int], None]


def build_store(
    texts: Sequence[str],
    out: str,
    tokenizer: str = "byte",
    *,
    heldout: float = 0.01,
    workers: int | None = None,
    text_field: str = "text",
    eos: str | None = None,
    bos: str | None = None,
    overwrite: bool = False,
    chat: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds a token store, or continues a build that was interrupted.

    Args:
        texts: files, folders, globs, or python:stdlib.
        out: folder or bucket url of the store.
        tokenizer: as load_tokenizer takes it, like eos and bos.
        heldout: share of documents kept for evaluation, 0 to 1. Below 1 at least one document is trained on; above 0
            at least one is held out if there are two that differ.
        workers: processes that tokenize; None means one per core.
        text_field: key or column of .jsonl and .parquet files that holds the text.
        eos: token that ends documents, if it has none of the usual names.
        bos: token that begins documents; None looks for the usual names, "none" means none.
        overwrite: replace a complete store; it stays whole until the new one is ready.
        chat: folder with tokenizer.json (used in place of tokenizer) and chat template; the texts are then .jsonl files
            of conversations, of which what the assistant says is learned. eos defaults to its eos_token.
        progress: called from this thread now and then.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: no such tokenizer file.
        DataError: no or bad text, a store is already there, or another build of it is running.
        ValueError: bad tokenizer or option.
        StorageError: no space or no permission.
    """
    if not 0 <= heldout <= 1:
        raise ValueError(f"heldout={heldout} is not a share; use 0 to 1, such as 0.01")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} cannot tokenize; use 1 or more")
    _check_target(out, overwrite)
    if chat is not None and tokenizer != "byte":
        raise ValueError(f"tokenizer={tokenizer} does not go with chat={chat}, which has its own; leave one out")
    model, chats = load_chats(chat, eos, bos) if chat is not None else (load_tokenizer(tokenizer, eos, bos), None)
    files = sources.expand(texts)
    report = progress or (lambda stage, done, total: None)
    staging = _staging_folder(out)
    with _only_builder(staging, out):
        reader = _Reader(files, text_field, model, chats)
        parts = _tokenize(reader, model, staging, workers or _num_cores(), report)
        options: dict[str, Any] = {"heldout": heldout, "text_field": text_field}
        if chats:
            options["skipped"] = dict(chats.skipped)
        manifest = _assemble(out, parts, model, options, reader.manifest, report)
    storage.remove_tree(staging)
    return manifest


def ensure_stores(data: DataConfig, progress: Progress | None = None) -> None:
    """Builds those stores of a mixture that are missing and whose config gives text.

    Raises:
        As build_store.
    """
    for store in data.stores:
        if store.text and not is_complete(store.path):
            build_store(
                store.text,
                store.path,
                store.tokenizer,
                heldout=store.heldout,
                text_field=store.text_field,
                eos=store.eos,
                bos=store.bos,
                progress=progress,
            )


@dataclass
class _Part:
    """Some documents, the name under which their tokens are kept, and how far the sources were read for them."""

    name: str
    documents: list[Document]
    source_bytes: int


@dataclass
class _Reader:
    """Cuts the documents of all sources into parts, the same way each time."""

    files: list[Source]
    text_field: str
    tokenizer: Tokenizer
    chats: Chats | None = None
    manifest: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def parts(self) -> Iterator[_Part]:
        documents: list[Document] = []
        chars = finished = index = 0
        for file in self.files:
            self.manifest.append({"name": file.name, "num_bytes": file.num_bytes, "sha256": file.sha256()})
            inside = 0
            found = self.chats.documents(file) if self.chats else sources.read_documents(file, self.text_field)
            for document in found:
                documents.append(document)
                chars += len(document.text)
                inside += len(document.text)
                if chars >= PART_CHARS:
                    # Unpacked text may be larger than its file, which is what progress counts.
                    yield self._part(index, documents, finished + min(inside, file.num_bytes))
                    documents, chars, index = [], 0, index + 1
            finished += file.num_bytes
        if documents:
            yield self._part(index, documents, finished)
        elif index == 0:
            names = ", ".join(file.name for file in self.files[:3])
            skipped = f" but what is skipped ({self.chats.describe()})" if self.chats and self.chats.skipped else ""
            raise DataError(f"there is no text in {names}{' ...' if len(self.files) > 3 else ''}{skipped}")

    def _part(self, index: int, documents: list[Document], source_bytes: int) -> _Part:
        digest = hashlib.blake2b(json.dumps([FORMAT, self.tokenizer.identity()]).encode(), digest_size=16)
        for document in documents:
            data = document.text.encode()
            digest.update(b"%d %d " % (len(data), document.replaced_bytes))
            digest.update(data)
            if document.spans is not None:
                digest.update(json.dumps(document.spans).encode())
        return _Part(f"{index:06d}-{digest.hexdigest()}.npz", documents, source_bytes)


def _tokenize(reader: _Reader, model: Tokenizer, staging: str, workers: int, report: Progress) -> list[str]:
    """Writes the part files that are not there yet; returns the paths of all, in order."""
    paths: list[str] = []
    total = reader.total_bytes
    if total <= INLINE_BYTES:
        for part in reader.parts():
            paths.append(os.path.join(staging, part.name))
            if not os.path.exists(paths[-1]):
                storage.write_bytes(paths[-1], encode_part(model, part.documents))
            report("tokenize", part.source_bytes, total)
        return paths
    pool = WorkerPool(model, workers)
    waiting: deque[tuple[Future[None] | None, int]] = deque()
    try:
        for part in reader.parts():
            paths.append(os.path.join(staging, part.name))
            known = os.path.exists(paths[-1])
            waiting.append((None if known else pool.submit(paths[-1], part.documents), part.source_bytes))
            while len(waiting) > 2 * workers:
                _wait_for_first(waiting, total, report)
        while waiting:
            _wait_for_first(waiting, total, report)
    finally:
        pool.close()
    return paths


def _wait_for_first(waiting: deque[tuple[Future[None] | None, int]], total: int, report: Progress) -> None:
    future, source_bytes = waiting.popleft()
    if future is not None:
        future.result()
    report("tokenize", source_bytes, total)


@dataclass
class _SplitWriter:
    """Streams one split's tokens into shard files and keeps its counts."""

    folder: str
    prefix: str
    dtype: np.dtype
    counts: dict[str, int] = field(
        default_factory=lambda: {"num_tokens": 0, "num_bytes": 0, "num_documents": 0, "replaced_bytes": 0}
    )
    shards: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytearray = field(default_factory=bytearray)
    _digest: Any = field(default_factory=hashlib.sha256)

    def add(self, tokens: np.ndarray, num_bytes: np.ndarray, replaced: np.ndarray) -> None:
        """Appends tokens [num_tokens] of documents whose bytes and replacements [num_documents] are given."""
        self.counts["num_tokens"] += len(tokens)
        self.counts["num_documents"] += len(num_bytes)
        self.counts["num_bytes"] += int(num_bytes.sum())
        self.counts["replaced_bytes"] += int(replaced.sum())
        if "num_learned" in self.counts:
            self.counts["num_learned"] += int((tokens >= LEARNED).sum())
        data = tokens.tobytes()
        self._digest.update(data)
        self._buffer += data
        while len(self._buffer) >= SHARD_BYTES:
            self._write(SHARD_BYTES)

    def finish(self) -> dict[str, Any]:
        """Writes what is left; returns the split's entry of the manifest."""
        if self._buffer:
            self._write(len(self._buffer))
        return {**self.counts, "sha256": self._digest.hexdigest(), "shards": self.shards}

    def _write(self, size: int) -> None:
        name = f"{self.prefix}-{len(self.shards):05d}.bin"
        storage.write_bytes(storage.join(self.folder, name), bytes(self._buffer[:size]))
        del self._buffer[:size]
        self.shards.append({"name": name, "num_bytes": size})


def _assemble(
    out: str,
    parts: list[str],
    model: Tokenizer,
    options: dict[str, Any],
    source_entries: list[dict[str, Any]],
    report: Progress,
) -> dict[str, Any]:
    """Streams the parts into a store's files and writes its manifest last."""
    # New files never have the names of an older store's files, which stays readable until the manifest is replaced.
    names = [*map(os.path.basename, parts), json.dumps(options)]
    build = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    threshold = _heldout_below(parts, options["heldout"])
    chat = "skipped" in options
    dtype = np.dtype("<u4") if chat else token_dtype(model.vocab_size)
    writers = {split: _SplitWriter(out, f"{split}-{build}", dtype) for split in SPLITS}
    if chat:
        for writer in writers.values():
            writer.counts["num_learned"] = 0
    total, done = sum(map(os.path.getsize, parts)), 0
    for path in parts:
        with np.load(path) as part:
            tokens, lengths = part["tokens"], part["lengths"]
            places, num_bytes, replaced = part["places"], part["num_bytes"], part["replaced"]
        for split, chosen in (("train", places >= threshold), ("heldout", places < threshold)):
            writers[split].add(tokens[np.repeat(chosen, lengths)], num_bytes[chosen], replaced[chosen])
        done += os.path.getsize(path)
        report("write", done, total)
    entry: dict[str, Any] = {**model.identity(), "file": None}
    if model.data:
        entry["file"] = f"tokenizer-{entry['sha256'][:16]}{os.path.splitext(FILE_NAMES[model.kind])[1]}"
        storage.write_bytes(storage.join(out, entry["file"]), model.data)
    manifest = {
        "format": CHAT_FORMAT if chat else FORMAT,
        "tokenizer": entry,
        "dtype": dtype.name,
        "options": options,
        "splits": {split: writer.finish() for split, writer in writers.items()},
        "sources": source_entries,
    }
    storage.write_bytes(storage.join(out, MANIFEST), json.dumps(manifest, indent=1).encode())
    _remove_older_files(out, manifest)
    return manifest


def _heldout_below(parts: list[str], heldout: float) -> float:
    """The place below which documents are held out: heldout itself, or close to it if that leaves a split empty."""
    low, high, held, total = 1.0, 0.0, 0, 0
    for path in parts:
        with np.load(path) as part:
            places = part["places"]
        low, high = min(low, places.min()), max(high, places.max())
        held, total = held + int((places < heldout).sum()), total + len(places)
    if held == 0 and heldout > 0 and low < high:
        return float(np.nextafter(low, 1.0))
    if held == total and heldout < 1:
        return float(high)
    return heldout


def _remove_older_files(out: str, manifest: dict[str, Any]) -> None:
    keep = {MANIFEST, manifest["tokenizer"]["file"]}
    keep.update(shard["name"] for split in SPLITS for shard in manifest["splits"][split]["shards"])
    for name in storage.list_dir(out):
        if name not in keep and OWN_FILES.fullmatch(name):
            storage.remove_tree(storage.join(out, name))


def _check_target(out: str, overwrite: bool) -> None:
    places.checked(out)
    if is_complete(out):
        if not overwrite:
            raise DataError(f"store {out} is already complete; choose another --out, or replace it with --overwrite")
        return
    if not storage.is_bucket(out) and os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"{out} is a file; choose a folder for the store")
    # Names that begin with a dot are temporary files of an interrupted write.
    foreign = [name for name in storage.list_dir(out) if not OWN_FILES.fullmatch(name) and name[0] != "."]
    if foreign:
        raise DataError(f"{out} holds other files ({foreign[0]}); choose an empty or new folder for the store")


def _staging_folder(out: str) -> str:
    if not storage.is_bucket(out):
        return out.rstrip("/") + ".building"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "maxlm", "building", hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:16])


@contextlib.contextmanager
def _only_builder(staging: str, out: str) -> Iterator[None]:
    """Holds a lock that the system drops when the process ends, however it ends."""
    try:
        os.makedirs(staging, exist_ok=True)
        lock = open(os.path.join(staging, "lock"), "wb")  # noqa: SIM115
    except OSError as error:
        raise storage.StorageError(f"cannot write {staging}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another build of {out} is running; wait for it") from None
        yield


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
