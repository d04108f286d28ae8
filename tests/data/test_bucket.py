"""Stores in buckets, against servers that speak the clouds' protocols on this machine."""

import urllib.parse
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from gcs import gcs_bucket

from maxlm import storage
from maxlm.config import DataConfig, TrainConfig
from maxlm.data.build import build_store
from maxlm.data.loader import Loader
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore


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
    """An empty bucket of tests/gcs.py."""
    with gcs_bucket() as url:
        yield url


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
