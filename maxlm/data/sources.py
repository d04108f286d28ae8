"""Where text comes from: files, folders, globs and Python's own library, read as a stream of documents.

A plain text file is one document; one above 1 MiB is taken as a collection and cut at line ends into documents of
about 64 KiB, so that one big file still spreads over workers and yields a held-out part. Lines of .jsonl files and
rows of .parquet files are documents as they are. Text is UTF-8; invalid bytes become U+FFFD and are counted.
"""

import functools
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from maxlm import storage

STDLIB = "python:stdlib"
PLAIN = (".txt", ".md", ".py")
FORMATS = (*PLAIN, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SNIFF_BYTES = 8192
COLLECTION_BYTES = 1 << 20
PIECE_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 26
"""Of a line of .jsonl, unpacked: a small packed file may hold a line that no memory does."""


class DataError(ValueError):
    """Text or a store that cannot be used; the message is one sentence that names the file and the line."""


class Document(NamedTuple):
    """One document: its text, how many invalid UTF-8 bytes were replaced in it, and what is learned of a conversation.

    Spans are [start, stop) in characters; None where all of the text is learned.
    """

    text: str
    replaced_bytes: int
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: where it is.
        name: how the manifest calls it: as the user wrote it, or python:stdlib/....
        num_bytes: its size on disk.
    """

    path: str
    name: str
    num_bytes: int

    def sha256(self) -> str:
        """Hex SHA-256 of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def expand(texts: Sequence[str]) -> list[Source]:
    """Lists the files that files, folders, globs and python:stdlib stand for, each once.

    Args:
        texts: in this order; what each expands to is sorted. Folders and globs of folders are searched for FORMATS;
            a file that is named itself may have any ending and is then read as plain text.

    Raises:
        DataError: nothing there, a folder without text, a bucket url, or an empty list.
    """
    if not texts:
        raise DataError("no text was given; name files, folders, globs or python:stdlib")
    found: dict[str, Source] = {}
    for text in texts:
        for path, name in _expand_one(text):
            if path not in found:
                found[path] = Source(path, name, os.path.getsize(path))
    return list(found.values())


def read_documents(source: Source, text_field: str = "text") -> Iterator[Document]:
    """Streams the documents of one file; empty ones are left out.

    Args:
        source: the file; its ending tells the format.
        text_field: key or column of .jsonl and .parquet files that holds the text.

    Raises:
        DataError: binary, broken or malformed content, named by file and line.
        StorageError: the file cannot be read.
    """
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl}.get(_format(source.path), _read_plain)
    try:
        for document in read(source, text_field):
            if document.text:
                yield _encodable(document)
    except OSError as error:
        raise storage.StorageError(f"cannot read {source.name}: {error.strerror or error}") from None


def read_objects(source: Source) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Streams (line, object, invalid bytes replaced) of a .jsonl file.

    Raises:
        DataError, StorageError: as read_documents; or the file is not .jsonl.
    """
    if _format(source.path) != "jsonl":
        raise DataError(f"{source.name} is not a .jsonl file (or .jsonl.gz, .jsonl.zst) of conversations")
    try:
        for line, data in _jsonl_lines(source):
            yield line, _object(data.text, source.name, line), data.replaced_bytes
    except OSError as error:
        raise storage.StorageError(f"cannot read {source.name}: {error.strerror or error}") from None


def decode(data: bytes) -> Document:
    """Decodes UTF-8, replacing and counting invalid bytes."""
    try:
        return Document(data.decode(), 0)
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    marks = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    # Each new mark takes three bytes; what is left of the text are the bytes that were valid.
    return Document(text, len(data) - (len(text.encode()) - 3 * marks))


def _expand_one(text: str) -> list[tuple[str, str]]:
    if storage.is_bucket(text):
        raise DataError(f"text {text} is in a bucket; copy it to a local disk first (the store itself may be in one)")
    if text == STDLIB:
        return _stdlib_files()
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return [(path, text)]
    if os.path.isdir(path):
        if files := _folder_files(path):
            return files
        raise DataError(f"folder {text} holds no text files ({', '.join(FORMATS)})")
    if not glob.has_magic(text):
        raise DataError(f"text {text} does not exist")
    files = []
    for match in sorted(glob.glob(path, recursive=True)):
        files += _folder_files(match) if os.path.isdir(match) else [(match, match)]
    if not files:
        raise DataError(f"no file matches {text}")
    return files


def _folder_files(folder: str) -> list[tuple[str, str]]:
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(root, name) for name in sorted(names) if name.endswith(FORMATS)]
    return [(path, path) for path in sorted(files) if os.path.isfile(path)]


def _stdlib_files() -> list[tuple[str, str]]:
    """The running Python's own modules, but for the few test fixtures that are no UTF-8 text on purpose."""
    top = sysconfig.get_path("stdlib")
    files = []
    for root, folders, names in os.walk(top):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        files += [os.path.join(root, name) for name in names if name.endswith(".py")]
    named = ((path, f"{STDLIB}/{os.path.relpath(path, top).replace(os.sep, '/')}") for path in files)
    return sorted((file for file in named if _is_clean_text(file[0])), key=lambda file: file[1])


def _is_clean_text(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            data = file.read()
        return b"\0" not in data and bool(data.decode())
    except (OSError, UnicodeDecodeError):
        return False


def _format(path: str) -> str:
    if path.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) else "plain"


def _read_plain(source: Source, _: str) -> Iterator[Document]:
    with open(source.path, "rb") as file:
        _refuse_binary(file.read(SNIFF_BYTES), source)
        file.seek(0)
        if file.read(3) != b"\xef\xbb\xbf":  # A byte order mark is no text.
            file.seek(0)
        if source.num_bytes <= COLLECTION_BYTES:
            yield decode(file.read())
            return
        while piece := file.read(PIECE_BYTES):
            piece += file.readline(MAX_LINE_BYTES)
            if not piece.endswith(b"\n"):
                piece, back = _whole_characters(piece)
                file.seek(-back, os.SEEK_CUR)
            yield decode(piece)


def _whole_characters(piece: bytes) -> tuple[bytes, int]:
    """Cuts a UTF-8 character that the end of a piece has split; also returns how many bytes that were."""
    for back in range(1, min(4, len(piece))):
        lead = piece[-back]
        if lead >= 0xC0:  # The first byte tells how many there should be.
            need = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return (piece[:-back], back) if back < need and len(piece) >= PIECE_BYTES else (piece, 0)
        if lead < 0x80:
            break
    return piece, 0


def _read_jsonl(source: Source, text_field: str) -> Iterator[Document]:
    for line, data in _jsonl_lines(source):
        yield Document(_text_of(data.text, source.name, line, text_field), data.replaced_bytes)


def _jsonl_lines(source: Source) -> Iterator[tuple[int, Document]]:
    line = 0
    try:
        with _open_compressed(source.path) as file:
            _refuse_binary(file.peek(SNIFF_BYTES)[:SNIFF_BYTES], source)
            while data := file.readline(MAX_JSON_BYTES + 1):
                if len(data) > MAX_JSON_BYTES:
                    raise DataError(f"{source.name} line {line + 1} is longer than {MAX_JSON_BYTES:,} bytes; cut it up")
                line += 1
                if data.strip():
                    yield line, decode(data)
        if source.path.endswith(".zst") and _ends_in_frame(source.path):
            raise EOFError("the file ends before the end of what was packed")
    except (gzip.BadGzipFile, EOFError, zlib.error, _zstd_error()) as error:
        raise DataError(f"{source.name} is damaged after line {line}: {error}") from None


def _object(data: str, name: str, line: int) -> dict[str, Any]:
    try:
        row = json.loads(data.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} line {line} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{name} line {line} is not a JSON object but {_short(row)}")
    return row


def _text_of(data: str, name: str, line: int, text_field: str) -> str:
    row = _object(data, name, line)
    if text_field not in row:
        raise DataError(f"{name} line {line} has no field {text_field!r}; {_fields(list(row))}")
    if not isinstance(text := row[text_field], str):
        raise DataError(f"{name} line {line}: field {text_field!r} is not text but {_short(text)}")
    return text


def _read_parquet(source: Source, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            if text_field not in file.schema_arrow.names:
                raise DataError(f"{source.name} has no column {text_field!r}; {_fields(file.schema_arrow.names)}")
            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{source.name}: column {text_field!r} is not text but {kind}")
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    if not value.is_valid:
                        raise DataError(f"{source.name} row {row}: column {text_field!r} is null")
                    yield decode(value.as_buffer().to_pybytes())
    except pyarrow.ArrowException as error:
        raise DataError(f"{source.name} is not a readable parquet file: {' '.join(str(error).split())}") from None


def _open_compressed(path: str) -> Any:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard

        stream: Any = zstandard.ZstdDecompressor().stream_reader(
            open(path, "rb"),  # noqa: SIM115
            read_across_frames=True,
            closefd=True,
        )
        return io.BufferedReader(stream, 1 << 20)
    return open(path, "rb")


def _ends_in_frame(path: str) -> bool:
    """Whether a zstd file was cut off, which its reader does not tell from the end. Looks at block headers alone.

    References:
        RFC 8878, section 3.1.
    """
    import zstandard

    size, at = os.path.getsize(path), 0
    with open(path, "rb", buffering=0) as file:

        def read(count: int) -> bytes:
            file.seek(at)
            return file.read(count)

        while at < size:
            head = read(18)
            if head[1:4] == b"\x2a\x4d\x18":  # a skippable frame
                at += 8 + int.from_bytes(head[4:8], "little")
                continue
            try:
                has_checksum = zstandard.get_frame_parameters(head).has_checksum
            except zstandard.ZstdError:
                return True
            at, last = at + zstandard.frame_header_size(head), False
            while not last:
                if len(block := read(3)) < 3:
                    return True
                bits = int.from_bytes(block, "little")
                last, repeats_one_byte = bool(bits & 1), bits >> 1 & 3 == 1
                at += 3 + (1 if repeats_one_byte else bits >> 3)
            at += 4 if has_checksum else 0
    return at > size


@functools.cache
def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _refuse_binary(head: bytes, source: Source) -> None:
    if b"\0" in head:
        raise DataError(f"{source.name} is not text: it has NUL bytes; give UTF-8 text, .jsonl or .parquet")


def _encodable(document: Document) -> Document:
    """Mends lone surrogates, which JSON escapes can write but UTF-8 cannot."""
    try:
        document.text.encode()
        return document
    except UnicodeEncodeError:
        text = document.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        lone = text.count("\ufffd") - document.text.count("\ufffd")
        return Document(text, document.replaced_bytes + lone)


def _fields(names: Sequence[str]) -> str:
    some = ", ".join([*(name[:40] for name in names[:20]), *(["..."] if len(names) > 20 else [])])
    return f"it has {some}; choose one with --text-field" if names else "it has no fields"


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."
