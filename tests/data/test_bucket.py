"""Stores in buckets, against servers that speak the clouds' protocols on this machine."""

import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from maxlm import storage
from maxlm.config import DataConfig, TrainConfig
from maxlm.data.build import build_store
from maxlm.data.loader import Loader
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore


class GcsHandler(BaseHTTPRequestHandler):
    """Google Cloud Storage's JSON API for one bucket, as far as objects are put, read, listed and deleted."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, int]] = {}
    page_size = 2

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        name, query = self._object()
        if name is None:
            self._list(query)
        elif name not in self.objects:
            self._answer(404, b"Not Found")
        elif query.get("alt") != "media":
            self._answer(200, json.dumps(self._metadata(name)).encode())
        else:
            data, generation = self.objects[name]
            headers = {"x-goog-generation": str(generation), "content-type": "application/octet-stream"}
            if (wanted := self.headers.get("range")) is None:
                return self._answer(200, data, headers)
            first, last = wanted.removeprefix("bytes=").split("-")
            start = int(first) if first else len(data) - int(last)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return self._answer(416, b"", {"content-range": f"bytes */{len(data)}"})
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], headers)

    def do_POST(self):
        _, query = self._object("/upload")
        data = self.rfile.read(int(self.headers["content-length"]))
        name = query["name"]
        self.objects[name] = data, self.objects.get(name, (b"", 0))[1] + 1
        self._answer(200, json.dumps(self._metadata(name)).encode())

    def do_DELETE(self):
        name, _ = self._object()
        self._answer(204 if self.objects.pop(name or "", None) else 404, b"")

    def _list(self, query):
        low, high, token = (query.get(key, "") for key in ("startOffset", "endOffset", "pageToken"))
        names = sorted(n for n in self.objects if max(low, token) <= n and (not high or n < high))
        page = {"kind": "storage#objects", "items": [self._metadata(name) for name in names[: self.page_size]]}
        if names[self.page_size :]:
            page["nextPageToken"] = names[self.page_size]
        self._answer(200, json.dumps(page).encode())

    def _metadata(self, name):
        data, generation = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2024-01-01T00:00:00.000Z")
        return {"name": name, "size": str(len(data)), "generation": str(generation), "metageneration": "1", **times}

    def _object(self, prefix=""):
        """Object name (None for the bucket itself) and query of a request; refuses what the real server would."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        bucket, _, name = url.path.removeprefix(f"{prefix}/storage/v1/b/").partition("/o")
        if self.headers["authorization"] != "Bearer secret":
            self._answer(401, b"Unauthorized")
            raise ConnectionAbortedError("no credentials")
        if bucket != "some-bucket":
            self.rfile.read(int(self.headers["content-length"] or 0))
            self._answer(404, b"The specified bucket does not exist")
            raise ConnectionAbortedError("no such bucket")
        return urllib.parse.unquote(name[1:]) or None, query

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionAbortedError:
            self.close_connection = True

    def _answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "content-length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An empty bucket of a moto server."""
    moto = pytest.importorskip("moto.server", reason="moto not installed; install with: pip install 'maxlm[test]'")
    patch = pytest.MonkeyPatch()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        patch.setenv(name, value)
    with urllib.request.urlopen(urllib.request.Request(f"{url}/some-bucket", method="PUT")):
        pass
    yield "s3://some-bucket"
    patch.undo()
    server.stop()


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """An empty bucket of the server above."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), GcsHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch = pytest.MonkeyPatch()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "secret")
    yield "gs://some-bucket"
    patch.undo()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["s3", "gs"])
def bucket(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("maxlm.data.build.SHARD_BYTES", 10_000)
    monkeypatch.setattr("maxlm.data.store.SHARD_BYTES", 10_000)


def test_objects(bucket):
    """Names with spaces, empty objects, ranges, folders that are prefixes of others' names."""
    root = storage.join(bucket, "objects")
    assert not storage.exists(root) and storage.list_dir(root) == []
    storage.write_bytes(f"{root}/a/b c.txt", b"hello world")
    storage.write_bytes(f"{root}/empty", b"")
    storage.write_bytes(f"{root}-other", b"x")
    assert storage.list_dir(root) == ["a", "empty"] and storage.exists(root) and storage.exists(f"{root}/empty")
    assert storage.read_bytes(f"{root}/a/b c.txt") == b"hello world" and storage.read_bytes(f"{root}/empty") == b""
    assert storage.read_bytes(f"{root}/a/b c.txt", 2, 5) == b"llo"
    with pytest.raises(FileNotFoundError, match="objects/no does not exist"):
        storage.read_bytes(f"{root}/no")
    with pytest.raises(storage.StorageError, match="cannot read"):
        storage.read_bytes(f"{root}/a/b c.txt", 2, 50)
    with pytest.raises(storage.StorageError, match=r"cannot write .*://missing-bucket/x: NOT_FOUND"):
        storage.write_bytes(f"{bucket.split('://')[0]}://missing-bucket/x", b"")
    storage.remove_tree(root)
    assert storage.list_dir(root) == [] and storage.exists(f"{root}-other")


def test_a_store_in_a_bucket_equals_a_local_one(bucket, corpus, bpe, tmp_path, monkeypatch, small_shards):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local, remote = str(tmp_path / "local"), storage.join(bucket, "stores", "corpus")
    manifest = build_store([str(corpus)], local, bpe, heldout=0.1)
    assert build_store([str(corpus)], remote, bpe, heldout=0.1) == manifest
    assert len(manifest["splits"]["train"]["shards"]) > 3
    names = storage.list_dir(local)
    assert storage.list_dir(remote) == names
    for name in names:
        assert storage.read_bytes(storage.join(remote, name)) == storage.read_bytes(storage.join(local, name))
    store = TokenStore(remote)
    assert store.tokenizer().identity() == TokenStore(local).tokenizer().identity()
    for split in SPLITS:
        store.verify(split)
    with pytest.raises(DataError, match="already complete"):
        build_store([str(corpus)], remote, bpe)

    train = TrainConfig(steps=3, batch_size=8, seq_len=64)
    batches = [
        list(Loader(DataConfig.model_validate({"stores": [{"path": path}]}), train, 320).batches(0, 0, 8))
        for path in (local, remote)
    ]
    for a, b in zip(*batches, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_an_unfinished_store_in_a_bucket_is_refused_and_replaced(bucket, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = storage.join(bucket, "unfinished")
    with pytest.raises(FileNotFoundError, match="does not exist; run: maxlm data build"):
        TokenStore(remote)
    build_store([str(corpus)], remote)
    storage.remove_tree(storage.join(remote, "manifest.json"))
    with pytest.raises(DataError, match="is incomplete"):
        TokenStore(remote)
    build_store([str(corpus / "a.jsonl")], remote)
    shards = {s["name"] for split in TokenStore(remote).manifest["splits"].values() for s in split["shards"]}
    assert set(storage.list_dir(remote)) == shards | {"manifest.json"}
