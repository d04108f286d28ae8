import itertools
import json
import math
import random
import threading
import tracemalloc

import numpy as np
import pytest

from maxlm.config import DataConfig, TrainConfig
from maxlm.data.build import build_store
from maxlm.data.loader import Loader, _interleave, _whole_shares, identity, make_batch
from maxlm.data.sources import DataError
from maxlm.data.store import Split, TokenStore

T = 32
VOCAB = 257


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, corpus) -> list[str]:
    """Three stores of different sizes."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, text in (("a", "a.jsonl"), ("b", "b.jsonl.gz"), ("deep", "deep")):
        build_store([str(corpus / text)], str(folder / name), heldout=0.1)
    return [str(folder / name) for name in ("a", "b", "deep")]


def data(*paths, weights=(), **settings) -> DataConfig:
    stores = [{"path": path, "weight": weight} for path, weight in itertools.zip_longest(paths, weights, fillvalue=1.0)]
    return DataConfig.model_validate({"stores": stores, **settings})


def loader(config: DataConfig, **settings) -> Loader:
    base = {"steps": 10, "batch_size": 8, "seq_len": T, "seed": 1}
    return Loader(config, TrainConfig.model_validate(base | settings), VOCAB)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def rows_of(path: str, split: Split = "train", length: int = T) -> list[bytes]:
    """All rows of a store, cut without the loader."""
    store = TokenStore(path)
    tokens = store.read(split, 0, store.num_tokens(split)).astype(np.int32)
    return [tokens[r * length : (r + 1) * length + 1].tobytes() for r in range((len(tokens) - 1) // length)]


def as_rows(batch: dict) -> list[bytes]:
    return [row.tobytes() for row in np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)]


def test_shapes_types_and_targets(store):
    batch = loader(data(store)).rows(0, 0, 8)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((8, T), "int32"),
        "targets": ((8, T), "int32"),
        "segments": ((8, T), "int32"),
        "positions": ((8, T), "int32"),
        "mask": ((8, T), "float32"),
    }
    assert all(value.flags.c_contiguous for value in batch.values())
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert set(as_rows(batch)) <= set(rows_of(store))


@pytest.mark.parametrize("segment_mask", [True, False])
def test_document_structure_against_a_slow_reference(segment_mask):
    rng = random.Random(0)
    eos = 9
    for _ in range(30):
        rows = np.array([[rng.choice([1, 2, 3, eos]) for _ in range(17)] for _ in range(5)], np.int32)
        batch = make_batch(rows, eos, segment_mask)
        for row, tokens in enumerate(rows):
            segment, position = 1, 0
            for t in range(16):
                at = (row, t)
                assert (batch["tokens"][at], batch["targets"][at]) == (tokens[t], tokens[t + 1])
                assert (batch["segments"][at], batch["positions"][at]) == (
                    (segment, position) if segment_mask else (1, t)
                )
                assert batch["mask"][at] == (tokens[t] != eos)
                segment, position = (segment + 1, 0) if tokens[t] == eos else (segment, position + 1)


def test_any_split_over_hosts_and_threads_gives_the_same_batches(mixture):
    reference = loader(data(*mixture, weights=(1, 2, 3)))
    whole = [reference.rows(step, 0, 8) for step in range(10)]
    for threads, prefetch, bounds in ((1, 1, (0, 8)), (8, 4, (0, 4, 8)), (3, 20, (0, 1, 3, 8))):
        config = data(*mixture, weights=(1, 2, 3), read_threads=threads, prefetch=prefetch)
        hosts = [loader(config).batches(0, a, b) for a, b in itertools.pairwise(bounds)]
        for step, parts in enumerate(zip(*hosts, strict=True)):
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert equal(joined, whole[step])
    assert len(whole) == step + 1


def test_resuming_takes_one_integer(mixture):
    whole = list(loader(data(*mixture)).batches(0, 0, 8))
    rest = list(loader(data(*mixture)).batches(6, 0, 8))
    assert len(rest) == 4 and all(map(equal, rest, whole[6:]))
    assert list(loader(data(*mixture)).batches(10, 0, 8)) == []


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_visits_each_row_once_in_its_own_order(store, shuffle):
    rows = rows_of(store)
    num_rows = len(rows)
    feed = loader(data(store, shuffle=shuffle), batch_size=num_rows, steps=3)
    assert feed.rows_per_epoch == [num_rows]
    epochs = [as_rows(feed.rows(epoch, 0, num_rows)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(rows)
    if shuffle:
        assert len({tuple(epoch) for epoch in epochs} | {tuple(rows)}) == 4
        other = loader(data(store), batch_size=num_rows, steps=3, seed=2)
        assert as_rows(other.rows(0, 0, num_rows)) != epochs[0]
    else:
        assert epochs == [rows] * 3


def test_mixture_shares_are_exact_and_no_store_runs_out(mixture):
    """Far more rows than the smallest store has; shares hold after any number of rows."""
    weights = (0.7, 0.205, 0.095)
    feed = loader(data(*mixture, weights=weights), batch_size=500, steps=4, seq_len=64)
    owners = {row: index for index, path in enumerate(mixture) for row in rows_of(path, length=64)}
    counts = [0, 0, 0]
    for step in range(4):
        for i, row in enumerate(as_rows(feed.rows(step, 0, 500)), 1 + 500 * step):
            counts[owners[row]] += 1
            assert all(abs(count - share * i) <= 2 for count, share in zip(counts, weights, strict=True))
    assert counts == [1400, 410, 190]
    assert counts[2] > feed.rows_per_epoch[2] or counts[0] > feed.rows_per_epoch[0]


def test_interleaving_counts_each_stores_rows_one_by_one():
    for weights in ([1.0], [1.0, 1.009], [0.1, 0.2, 0.7], [3.0, 1e-3, 2.0]):
        shares = _whole_shares(weights)
        assert all(math.isclose(a / sum(shares), b / sum(weights)) for a, b in zip(shares, weights, strict=True))
        counts = [0] * len(shares)
        for index in range(3000):
            store, count = _interleave(index, shares)
            assert count == counts[store]
            counts[store] += 1
        far = 10**15 * sum(shares)
        exact = [10**15 * share for share in shares]
        for index in range(far, far + 50):
            store, count = _interleave(index, shares)
            assert count == exact[store]
            exact[store] += 1


def test_stores_of_equal_length_are_not_shuffled_alike(corpus, tmp_path):
    for name in ("a", "b"):
        build_store([str(corpus)], str(tmp_path / name))
    rows = as_rows(loader(data(str(tmp_path / "a"), str(tmp_path / "b"))).rows(0, 0, 8))
    assert rows[::2] != rows[1::2]


def test_heldout_rows_once_in_order_and_padded(mixture):
    feed = loader(data(*mixture))
    expected = [row for path in mixture for row in rows_of(path, "heldout")]
    batches = list(feed.heldout(8, 10_000, 0, 8))
    assert len(batches) == math.ceil(len(expected) / 8)
    got = [row for batch in batches for row in as_rows(batch)]
    assert got[: len(expected)] == expected
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            key: (value.shape, value.dtype) for key, value in feed.rows(0, 0, 8).items()
        }
    padding = len(batches) * 8 - len(expected)
    last = batches[-1]
    assert padding and not last["mask"][-padding:].any() and not last["segments"][-padding:].any()
    assert last["segments"][: 8 - padding].all()
    some = [row for batch in feed.heldout(8, 2, 0, 8) for row in as_rows(batch)]
    assert some == [expected[i * len(expected) // 16] for i in range(16)], "a part is spread evenly"


def test_heldout_split_over_hosts(mixture):
    feed = loader(data(*mixture))
    whole = list(feed.heldout(8, 100, 0, 8))
    hosts = [list(feed.heldout(8, 100, a, b)) for a, b in ((0, 3), (3, 8))]
    for step, batch in enumerate(whole):
        assert equal(batch, {key: np.concatenate([host[step][key] for host in hosts]) for key in batch})


def test_training_never_sees_heldout_documents(store):
    tokens = TokenStore(store)
    texts = {}
    for split in ("train", "heldout"):
        everything = tokens.read(split, 0, tokens.num_tokens(split))
        texts[split] = {part.tobytes() for part in np.split(everything, np.flatnonzero(everything == 256) + 1)[:-1]}
        assert len(texts[split]) > 10
    assert not texts["train"] & texts["heldout"]


def test_closing_stops_the_threads(store):
    before = set(threading.enumerate())
    feed = loader(data(store), steps=100_000)
    batches = feed.batches(0, 0, 8)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before
    feed.close()


def test_a_failing_read_reaches_the_caller(store, monkeypatch):
    feed = loader(data(store), steps=100)

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(feed.stores[0], "read_rows", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(feed.batches(0, 0, 8))


def test_memory_does_not_grow_with_the_number_of_rows(store, monkeypatch):
    """A store that claims a billion rows costs no more than a small one."""
    monkeypatch.setattr(TokenStore, "num_tokens", lambda self, split: 10**9 * T + 1)
    monkeypatch.setattr(TokenStore, "read_rows", lambda self, split, starts, n: np.zeros((len(starts), n), np.uint16))
    tracemalloc.start()
    feed = loader(data(store), steps=10**12)
    for step in (0, 10**6, 10**11):
        feed.rows(step, 0, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_too_little_text_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("short text")
    build_store([str(tmp_path / "a.txt")], str(tmp_path / "s"))
    with pytest.raises(DataError, match=r"11 training tokens, too few for one row of train.seq_len=32"):
        loader(data(str(tmp_path / "s")))
    feed = loader(data(str(tmp_path / "s")), seq_len=4)
    assert list(feed.heldout(8, 1, 0, 8)) == []


def test_rows_outside_the_batch_are_refused(store):
    with pytest.raises(ValueError, match="rows 0 to 9 of step 0 leave batches of 8 rows"):
        loader(data(store)).rows(0, 0, 9)


def test_identity_changes_with_what_the_batches_depend_on(store, mixture, tmp_path):
    first = identity(data(store))
    assert json.loads(json.dumps(first)) == first
    others = [
        data(store, weights=(2.0,)),
        data(store, shuffle=False),
        data(store, segment_mask=False),
        data(mixture[0]),
        data(store, mixture[0]),
    ]
    assert all(identity(other) != first for other in others)
    (tmp_path / "moved").symlink_to(store)
    assert identity(data(str(tmp_path / "moved"), read_threads=1, prefetch=1)) == first, (
        "place and threads do not count"
    )
