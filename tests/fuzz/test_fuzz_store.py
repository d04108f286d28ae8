"""Token stores may be anything: a result or one of maxlm's own errors, never a traceback."""

import contextlib
import copy
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from fuzz_values import cut_or_changed, deep, fuzz, mutated, told
from hypothesis import given
from hypothesis import strategies as st

from maxlm.cli import main
from maxlm.data.build import build_store
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore
from maxlm.data.tokenizer import train_bpe
from maxlm.storage import StorageError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store with a tokenizer of its own, and its manifest."""
    folder = tmp_path_factory.mktemp("store")
    texts = [f"a text about number {i}, and another about {i * i}" for i in range(60)]
    (folder / "tokenizer.json").write_bytes(train_bpe(texts, 300))
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    build_store([str(folder)], str(folder / "s"), str(folder / "tokenizer.json"), heldout=0.3)
    shutil.copy(folder / "tokenizer.json", folder / "outside.json")
    return folder / "s", json.loads((folder / "s" / "manifest.json").read_bytes())


def check_store(folder: Path, opened):
    """A store that is refused, or can be read from end to end."""
    inside = f"{os.path.realpath(folder)}{os.sep}"
    with opened() as paths:
        try:
            with contextlib.closing(TokenStore(str(folder))) as tokens:
                for split in SPLITS:
                    assert len(tokens.read(split, 0, tokens.num_tokens(split))) == tokens.num_tokens(split) >= 0
                    tokens.verify(split)
                assert 0 <= tokens.eos_id < tokens.vocab_size
                tokens.tokenizer()
        except (DataError, StorageError) as error:
            told(error)
    assert [path for path in paths if str(folder.parent) in path and not path.startswith(inside)] == []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["data", "info", str(folder)]) in (0, 1, 2)


@fuzz(120)
@given(st.data())
def test_a_token_store_manifest_may_hold_anything(store, opened, data):
    folder, known = store
    whole = json.dumps(known).encode()
    text = data.draw(mutated(known).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(whole))
    (folder / "manifest.json").write_bytes(text)
    check_store(folder, opened)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("splits.train.shards.0.name", "../0.txt"),
        ("splits.train.shards.0.name", "/etc/passwd"),
        ("splits.train.shards.0.name", ""),
        ("splits.train.shards.0.num_bytes", -1),
        ("splits.train.shards", []),
        ("splits.train.num_tokens", 2**60),
        ("splits.train.num_tokens", -5),
        ("splits.train.num_tokens", float("nan")),
        ("splits.train.num_tokens", True),
        ("splits.train", None),
        ("splits", {}),
        ("dtype", "O"),
        ("dtype", "uint32"),
        ("format", True),
        ("sources", None),
        ("options", {}),
        ("tokenizer.file", "../outside.json"),
        ("tokenizer.vocab_size", 2**40),
        ("tokenizer.eos_id", -1),
        ("tokenizer.kind", "pickle"),
    ],
)
def test_a_token_store_that_does_not_agree_with_itself_is_refused(store, path, value):
    folder, known = store
    known = holder = copy.deepcopy(known)
    *above, key = path.split(".")
    for part in above:
        holder = holder[int(part) if part.isdigit() else part]
    holder[int(key) if key.isdigit() else key] = value
    (folder / "manifest.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match=str(folder)):
        TokenStore(str(folder))


@pytest.mark.parametrize(
    "text",
    [deep("[", "]"), deep('{"a":', "}"), "9" * 5000, '{"format": 1}', "\ud800", "[]", ""],
    ids=["deep list", "deep map", "huge", "format alone", "surrogate", "list", "empty"],
)
def test_a_token_store_manifest_that_is_none(store, text):
    folder, _ = store
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenStore(str(folder))
