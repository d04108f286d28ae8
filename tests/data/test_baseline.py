import json
import random

import numpy as np
import pytest

from maxlm.data.baseline import _Trigram, ngram_bits_per_byte
from maxlm.data.build import build_store
from maxlm.data.sources import DataError
from maxlm.data.store import TokenStore


def test_probabilities_add_up_to_one_in_any_context(store):
    """For contexts that were seen, and for those that were not."""
    tokens = TokenStore(store)
    train = tokens.read("train", 0, 5000).astype(np.int64)
    model = _Trigram(train, tokens)
    for a, b in ((train[10], train[11]), (256, train[0]), (1, 2), (train[50], 3), (256, 256)):
        total = sum(model.probabilities(np.array([a, b, c], np.int64))[1] for c in range(257))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_more_context_predicts_text_better(store):
    bits = ngram_bits_per_byte(TokenStore(store))
    assert 0.5 < bits["trigram"] < 0.75 * bits["unigram"] < 8.0


def test_random_bytes_cannot_be_predicted(tmp_path):
    rng = random.Random(0)
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh", k=500))}) for _ in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    build_store([str(tmp_path / "a.jsonl")], str(tmp_path / "s"), heldout=0.1)
    bits = ngram_bits_per_byte(TokenStore(str(tmp_path / "s")))
    assert bits["unigram"] == pytest.approx(3.0, abs=0.06) and bits["trigram"] == pytest.approx(3.0, abs=0.06)


def test_a_repeating_text_is_predicted_well(tmp_path):
    lines = [json.dumps({"text": f"{i:04d}" + "abc" * 300}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    build_store([str(tmp_path / "a.jsonl")], str(tmp_path / "s"), heldout=0.1)
    assert ngram_bits_per_byte(TokenStore(str(tmp_path / "s")))["trigram"] < 0.03


def test_a_large_vocabulary_and_a_cap(corpus, bpe, tmp_path):
    build_store([str(corpus)], str(tmp_path / "s"), bpe, heldout=0.1)
    store = TokenStore(str(tmp_path / "s"))
    few, many = (ngram_bits_per_byte(store, max_train_tokens=cap)["trigram"] for cap in (1000, 10**9))
    assert many < few


def test_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    build_store([str(tmp_path / "a.txt")], str(tmp_path / "s"))
    with pytest.raises(DataError, match="too few training or held-out tokens"):
        ngram_bits_per_byte(TokenStore(str(tmp_path / "s")))
