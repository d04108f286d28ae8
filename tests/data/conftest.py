import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from maxlm.data.build import build_store
from maxlm.data.tokenizer import train_bpe


def sentences(seed: int, num_words: int) -> str:
    """Words with the frequencies of a language, so that there is something to merge and to predict."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "trä") for b in ("r", "st", "n ", "ing", ".\n", "€")]
    return " ".join(rng.choices(words, [1 / (i + 1) for i in range(len(words))], k=num_words))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with 330 documents of some hundred bytes, in every format but parquet."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"id": i, "text": sentences(i, 20 + i % 80)}) + "\n" for i in range(300)]
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:200]).encode(), mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[200:]).encode()))
    (folder / "deep").mkdir()
    for i in range(300, 330):
        (folder / "deep" / f"{i}.{('txt', 'md', 'py')[i % 3]}").write_text(sentences(i, 100))
    return folder


@pytest.fixture(scope="session")
def bpe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_bpe([sentences(i, 100) for i in range(50)], 320))
    return str(path)


@pytest.fixture(scope="session")
def store(tmp_path_factory, corpus) -> str:
    """A byte store of the corpus with a tenth held out."""
    path = str(tmp_path_factory.mktemp("store") / "store")
    build_store([str(corpus)], path, heldout=0.1)
    return path
