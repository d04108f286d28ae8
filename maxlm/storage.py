"""One small layer for files on local disks and in gs:// and s3:// buckets.

Paths are plain strings. Buckets go through tensorstore, which the checkpoints need anyway, so that no other
cloud client has to be installed; credentials come from where each cloud's own tools look for them.
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL points s3:// at another server (MinIO, an emulator), and
TENSORSTORE_GCS_HTTP_URL does so for gs://.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maxlm import places


class StorageError(OSError):
    """A file or bucket that cannot be read or written; the message is one sentence that names it."""


def is_bucket(path: str) -> bool:
    """Whether path is the url of a bucket (gs:// or s3://) and not a local path."""
    return path.startswith(places.SCHEMES)


def join(path: str, *names: str) -> str:
    """Appends names to a local path or bucket url."""
    if is_bucket(path):
        return "/".join([path.rstrip("/"), *names])
    return os.path.join(path, *names)


def exists(path: str) -> bool:
    """Whether a file, an object, or a folder (for buckets: any object under path/) is there.

    Raises:
        StorageError: the bucket does not answer.
    """
    if not is_bucket(path):
        return os.path.exists(path)
    import tensorstore as ts

    root, key = _split(path)
    with _bucket_errors("read", path):
        bucket = _bucket(root)
        if key and bucket.read(key, byte_range=slice(0, 0)).result().state == "value":
            return True
        return bool(bucket.list(ts.KvStore.KeyRange(*_prefix_range(key))).result())


def read_bytes(path: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Reads a file or object, or bytes [start, stop) of it.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it cannot be read, or ends before stop.
    """
    if is_bucket(path):
        return read_ranges([(path, start or 0, stop)])[0]
    try:
        with open(path, "rb") as file:
            file.seek(start or 0)
            data = file.read() if stop is None else file.read(stop - (start or 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    if stop is not None and len(data) != stop - (start or 0):
        raise StorageError(f"cannot read {path}: it ends before byte {stop}")
    return data


def read_ranges(ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes]:
    """Reads byte ranges (url, start, stop) of bucket objects, all at the same time; stop None is an object's end.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the bucket does not answer, or an object is shorter.
    """
    futures = []
    for path, start, stop in ranges:
        root, key = _split(path)
        with _bucket_errors("read", path):
            part = slice(start, stop) if start or stop is not None else None  # An empty object has no byte 0.
            futures.append(_bucket(root).read(key, byte_range=part))
    values = []
    for future, (path, start, stop) in zip(futures, ranges, strict=True):
        with _bucket_errors("read", path):
            result = future.result()
        if result.state != "value":
            raise FileNotFoundError(f"{path} does not exist")
        if stop is not None and len(result.value) != stop - start:
            raise StorageError(f"cannot read {path}: it ends before byte {stop}")
        values.append(result.value)
    return values


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file atomically: after a crash there is the old content or the new, never a mixture.

    A local file is written beside its place, flushed to disk and renamed, and its folder is made if missing; an
    object is one put.

    Raises:
        StorageError: no space, no permission, no such bucket. What was at path is left as it was.
    """
    if is_bucket(path):
        root, key = _split(path)
        with _bucket_errors("write", path):
            _bucket(root).write(key, data).result()
        return
    try:
        _write_local(path, data)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def list_dir(path: str) -> list[str]:
    """Sorted names of what is directly in a folder or under a bucket url; empty if there is nothing.

    Raises:
        StorageError: it cannot be read.
    """
    if is_bucket(path):
        return sorted({name.split("/")[0] for name in list_tree(path)})
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {path}: {error.strerror}") from None


def list_tree(path: str) -> list[str]:
    """Sorted names of all files in a folder and its folders, or under a bucket url, relative to it.

    Raises:
        StorageError: it cannot be read.
    """
    if is_bucket(path):
        import tensorstore as ts

        root, key = _split(path)
        low, high = _prefix_range(key)
        with _bucket_errors("list", path):
            keys = _bucket(root).list(ts.KvStore.KeyRange(low, high), len(low)).result()
        return sorted(name for name in (key.decode() for key in keys) if name and not name.endswith("/"))  # markers

    def failed(error: OSError) -> None:
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from None

    found = [os.path.join(folder, name) for folder, _, names in os.walk(path, onerror=failed) for name in names]
    return sorted(os.path.relpath(name, path) for name in found)


def remove_tree(path: str) -> None:
    """Removes a file or a folder with all it holds; nothing happens if there is none.

    Raises:
        StorageError: it cannot be removed.
    """
    if is_bucket(path):
        import tensorstore as ts

        root, key = _split(path)
        if not key:
            raise StorageError(f"cannot remove {path}: that is a whole bucket; name a folder in it")
        with _bucket_errors("remove", path):
            _bucket(root).delete_range(ts.KvStore.KeyRange(*_prefix_range(key))).result()
            _bucket(root).write(key, None).result()
        return
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None


def _write_local(path: str, data: bytes) -> None:
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            # mkstemp makes files that only their owner can read; a store is shared like any other file.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # The rename itself must outlive a power cut, too.
    finally:
        os.close(handle)


@functools.cache
def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _split(path: str) -> tuple[str, str]:
    try:
        places.checked(path)
    except ValueError as error:
        raise StorageError(f"cannot use {places.redacted(path)}: {error}") from None
    scheme, rest = path.split("://", 1)
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key.rstrip("/")


def _prefix_range(key: str) -> tuple[str, str]:
    # "0" follows "/" in ASCII, so this range is exactly the keys that begin with "key/".
    return (f"{key}/", f"{key}0") if key else ("", "")


def _bucket(root: str) -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _open_bucket(root, endpoint if root.startswith("s3://") else None)


@functools.lru_cache(maxsize=16)
def _open_bucket(root: str, endpoint: str | None) -> Any:
    import tensorstore as ts

    scheme, name = root.split("://", 1)
    # The default of 32 tries takes a quarter of an hour to report a host name with a typing error.
    retries = {"max_retries": 8, "initial_delay": "250ms", "max_delay": "8s"}
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": name}
    spec["context"] = {f"{spec['driver']}_request_retries": retries}
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region}
    if scheme == "s3" and os.environ.get("AWS_ACCESS_KEY_ID"):
        # They would be found anyway, but after complaints on standard error about files that need not exist.
        spec["aws_credentials"] = {"type": "environment"}
    return ts.KvStore.open(spec).result()


@contextlib.contextmanager
def _bucket_errors(verb: str, path: str) -> Iterator[None]:
    """Turns tensorstore's exceptions, which quote whole source locations, into one sentence."""
    try:
        yield
    except StorageError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(re.split(r" \[\w+=", str(error))[0].split())
        raise StorageError(f"cannot {verb} {path}: {places.redacted(reason)}") from None
