import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from maxlm.config import DataConfig
from maxlm.data import sources
from maxlm.data.build import build_store, ensure_stores
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore, open_stores
from maxlm.data.tokenizer import load_tokenizer
from maxlm.storage import StorageError


def documents_of(store: TokenStore, split) -> list[str]:
    """The texts of a split, cut at end-of-document tokens."""
    tokens, tokenizer = store.read(split, 0, store.num_tokens(split)), store.tokenizer()
    ends = np.flatnonzero(tokens == store.eos_id)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise([-1, *ends.tolist()])]


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


PART_CHARS = 200_000


@pytest.fixture
def big(tmp_path_factory, monkeypatch) -> str:
    """900 kB of text, cut in parts and given to worker processes as if it were much more."""
    monkeypatch.setattr("maxlm.data.build.PART_CHARS", PART_CHARS)
    monkeypatch.setattr("maxlm.data.build.INLINE_BYTES", 0)
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    with path.open("w") as file:
        for i in range(600):
            file.write(json.dumps({"text": f"{i} " + "some text that repeats " * (30 + i % 70)}) + "\n")
    return str(path)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_store_holds_each_document_once(corpus, bpe, tmp_path, tokenizer):
    build_store([str(corpus)], str(tmp_path / "s"), bpe if tokenizer == "bpe" else "byte", heldout=0.2)
    store = TokenStore(str(tmp_path / "s"))
    written = {split: documents_of(store, split) for split in SPLITS}
    texts = [d.text for source in sources.expand([str(corpus)]) for d in sources.read_documents(source)]
    assert sorted(written["train"] + written["heldout"]) == sorted(texts)
    assert not set(written["train"]) & set(written["heldout"])
    order = {text: i for i, text in enumerate(texts)}
    assert written["train"] == sorted(written["train"], key=order.__getitem__), "documents keep their order"
    for split in SPLITS:
        counts = store.manifest["splits"][split]
        assert counts["num_documents"] == len(written[split])
        assert counts["num_bytes"] == sum(len(text.encode()) for text in written[split])
        store.verify(split)
    assert 0.1 < len(written["heldout"]) / len(texts) < 0.3
    assert not (tmp_path / "s.building").exists()


def test_manifest_names_sources_and_hashes(corpus, tmp_path):
    import hashlib

    manifest = build_store([str(corpus / "a.jsonl")], str(tmp_path / "s"))
    data = (corpus / "a.jsonl").read_bytes()
    expected = {"name": str(corpus / "a.jsonl"), "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["sources"] == [expected] and manifest["dtype"] == "uint16"
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == manifest


def test_heldout_does_not_depend_on_order_or_company(corpus, tmp_path):
    names = sorted(str(path) for path in corpus.iterdir())
    build_store(names, str(tmp_path / "all"), heldout=0.2)
    build_store(names[::-1], str(tmp_path / "reversed"), heldout=0.2)
    build_store(names[:1], str(tmp_path / "one"), heldout=0.2)
    held = {name: set(documents_of(TokenStore(str(tmp_path / name)), "heldout")) for name in ("all", "reversed", "one")}
    assert held["all"] == held["reversed"] > held["one"] > set()


def test_small_text_still_has_both_splits(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    for heldout, expected in ((0.0, 0), (1e-9, 1), (1 - 1e-9, 2), (1.0, 3)):
        manifest = build_store([str(tmp_path / "*.txt")], str(tmp_path / "s"), heldout=heldout, overwrite=True)
        assert manifest["splits"]["heldout"]["num_documents"] == expected


def test_workers_and_inline_give_the_same_bytes(big, bpe, tmp_path, monkeypatch):
    seen: list[tuple[str, int, int]] = []
    build_store(
        [big],
        str(tmp_path / "a"),
        bpe,
        workers=2,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    monkeypatch.setattr("maxlm.data.build.INLINE_BYTES", 1 << 40)
    build_store([big], str(tmp_path / "b"), bpe)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    size = os.path.getsize(big)
    assert [done for stage, done, _ in seen if stage == "tokenize"][-1] == size
    assert all(0 < done <= total for _, done, total in seen) and len(seen) >= 6


def test_many_shards_read_like_one_stream(corpus, bpe, tmp_path, monkeypatch):
    """Also with fewer open files than there are."""
    build_store([str(corpus)], str(tmp_path / "whole"), bpe)
    whole = TokenStore(str(tmp_path / "whole"))
    monkeypatch.setattr("maxlm.data.build.SHARD_BYTES", 1000)
    monkeypatch.setattr("maxlm.data.store.SHARD_BYTES", 1000)
    monkeypatch.setattr("maxlm.data.store.MAX_OPEN_FILES", 3)
    build_store([str(corpus)], str(tmp_path / "cut"), bpe)
    cut = TokenStore(str(tmp_path / "cut"))
    assert len(cut.manifest["splits"]["train"]["shards"]) > 5
    assert whole.content_hash("train") == cut.content_hash("train")
    cut.verify("train")


def test_a_large_vocabulary_takes_wide_tokens(tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)} | {"[UNK]": 70_000}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w69999 w1 </s>"}\n{"text": "w65536"}\n')
    build_store([str(tmp_path / "a.jsonl")], str(tmp_path / "s"), str(tmp_path / "t.json"), heldout=0)
    store = TokenStore(str(tmp_path / "s"))
    eos, bos, unknown = 70_002, 70_001, 70_000
    expected = [bos, 69_999, 1, unknown, unknown, unknown, eos, bos, 65_536, eos]
    assert store.dtype == np.uint32 and store.read("train", 0, len(expected)).tolist() == expected
    build_store([str(tmp_path / "a.jsonl")], str(tmp_path / "t"), str(tmp_path / "t.json"), heldout=0, bos="none")
    assert TokenStore(str(tmp_path / "t")).num_tokens("train") == len(expected) - 2


def test_text_cannot_end_its_document(bpe, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}<|endoftext|>x"}) + "\n" for i in range(10)))
    build_store([str(tmp_path / "a.jsonl")], str(tmp_path / "s"), bpe, heldout=0)
    assert documents_of(TokenStore(str(tmp_path / "s")), "train") == [f"{i}<|endoftext|>x" for i in range(10)]


def test_replaced_bytes_are_counted_per_split(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff\xfe")
    manifest = build_store([str(tmp_path / "a.txt")], str(tmp_path / "s"))
    assert manifest["splits"]["train"]["replaced_bytes"] == 2 and manifest["splits"]["heldout"]["num_tokens"] == 0


KILLED = """
import os, signal, sys
from maxlm import storage
from maxlm.data import build
from maxlm.data.build import build_store

def die(*_):
    children = f"/proc/self/task/{os.getpid()}/children"
    print(open(children).read() if os.path.exists(children) else "", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

when, text, out, tokenizer, part_chars, inline_bytes = sys.argv[1:]
build.PART_CHARS, build.INLINE_BYTES = int(part_chars), int(inline_bytes)
if when == "manifest":
    write = storage.write_bytes
    storage.write_bytes = lambda path, data: die() if path.endswith("manifest.json") else write(path, data)
build_store([text], out, tokenizer, workers=2, progress=lambda stage, *_: die() if stage == when else None)
"""


@pytest.mark.parametrize("when", ["tokenize", "write", "manifest"])
def test_a_killed_build_continues_to_the_same_bytes(big, bpe, tmp_path, when):
    out = tmp_path / "s"
    killed = _run_killed(when, big, out, bpe)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _wait_until_gone([int(pid) for pid in killed.stdout.split()])
    with pytest.raises((DataError, FileNotFoundError), match="maxlm data build TEXT --out"):
        TokenStore(str(out))
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s.building").glob("*.npz")}
    assert len(parts) >= (1 if when == "tokenize" else 3)

    kept = []

    def look(stage, done, total):
        if stage == "write" and not kept:
            now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s.building").glob("*.npz")}
            kept.append(now.items() >= parts.items())

    build_store([big], str(out), bpe, workers=2, progress=look)
    assert kept == [True], "finished parts are not made again"
    build_store([big], str(tmp_path / "whole"), bpe, workers=2)
    assert files_of(out) == files_of(tmp_path / "whole")


def _run_killed(when: str, text: str, out: Path, tokenizer: str) -> subprocess.CompletedProcess[str]:
    arguments = [when, text, str(out), tokenizer, str(PART_CHARS), "0"]
    return subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=60)


def _wait_until_gone(pids: list[int]) -> None:
    """Workers of a killed builder must end by themselves."""
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}") and _state(pid) != "Z"]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their builder"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_changed_text_after_an_interruption_is_not_mixed_with_old(big, bpe, tmp_path):
    out, text = tmp_path / "s", tmp_path / "text.jsonl"
    text.write_bytes(Path(big).read_bytes())
    _run_killed("write", str(text), out, bpe)
    assert (tmp_path / "s.building").exists()
    text.write_bytes(Path(big).read_bytes().replace(b"1000 some", b"1000 SOME"))
    build_store([str(text)], str(out), bpe, workers=2)
    build_store([str(text)], str(tmp_path / "fresh"), bpe, workers=2)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_complete_store_is_replaced_only_on_request(corpus, tmp_path):
    out = str(tmp_path / "s")
    build_store([str(corpus)], out)
    with pytest.raises(DataError, match="already complete; .* --overwrite"):
        build_store([str(corpus)], out)
    build_store([str(corpus / "a.jsonl")], out, overwrite=True)
    build_store([str(corpus / "a.jsonl")], str(tmp_path / "t"))
    assert files_of(out) == files_of(tmp_path / "t"), "nothing of the old store stays"


def test_a_full_disk_leaves_the_old_store_whole(corpus, big, tmp_path):
    """A limit on file size stands in for a full disk; it holds for the worker processes, too."""
    out = str(tmp_path / "s")
    build_store([str(corpus)], out)
    before = files_of(out)
    program = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from maxlm.data import build\nbuild.INLINE_BYTES = 0\n"
        "build.build_store([sys.argv[1]], sys.argv[2], overwrite=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, big, out],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "StorageError: cannot write" in done.stderr and "File too large" in done.stderr
    assert files_of(out) == before
    TokenStore(out).verify("train")


def test_places_where_no_store_can_be(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="file is a file"):
        build_store([str(corpus)], str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot list .*Not a directory"):
        build_store([str(corpus)], str(tmp_path / "file" / "s"))
    with pytest.raises(DataError, match=r"holds other files \(thesis.tex\)"):
        build_store([str(corpus)], str(tmp_path / "mine"))


def test_bad_text_and_options(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"there is no text in .*empty.txt"):
        build_store([str(tmp_path / "empty.txt")], str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="heldout=2 is not a share"):
        build_store(["x"], str(tmp_path / "s"), heldout=2)
    with pytest.raises(ValueError, match="workers=0"):
        build_store(["x"], str(tmp_path / "s"), workers=0)


def test_two_builds_of_one_store_do_not_mix(corpus, tmp_path):
    out = str(tmp_path / "s")
    failures = []

    def again(*_):
        if not failures:
            try:
                build_store([str(corpus)], out)
            except DataError as error:
                failures.append(str(error))

    build_store([str(corpus)], out, progress=again)
    assert failures == [f"another build of {out} is running; wait for it"]


def test_damaged_stores_are_refused(corpus, tmp_path, bpe):
    build_store([str(corpus)], str(tmp_path / "s"), bpe)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    shard = tmp_path / "s" / manifest["splits"]["train"]["shards"][0]["name"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=f"is damaged: {shard.name} has {len(data) - 2} bytes"):
        TokenStore(str(tmp_path / "s"))
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match="train tokens are damaged"):
        TokenStore(str(tmp_path / "s")).verify("train")
    (tmp_path / "s" / manifest["tokenizer"]["file"]).write_bytes(Path(bpe).read_bytes() + b"\n")
    with pytest.raises(DataError, match="is not the tokenizer that made it"):
        TokenStore(str(tmp_path / "s")).tokenizer()
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        TokenStore(str(tmp_path / "s"))
    (tmp_path / "s" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99"):
        TokenStore(str(tmp_path / "s"))


def test_the_store_carries_its_tokenizer(corpus, bpe, tmp_path):
    (tmp_path / "t.json").write_bytes(Path(bpe).read_bytes())
    build_store([str(corpus)], str(tmp_path / "s"), str(tmp_path / "t.json"))
    (tmp_path / "t.json").unlink()
    assert TokenStore(str(tmp_path / "s")).tokenizer().identity() == load_tokenizer(bpe).identity()


def test_reads_outside_a_split_are_refused(store):
    tokens = TokenStore(store)
    with pytest.raises(IndexError, match="leave the"):
        tokens.read("train", 0, tokens.num_tokens("train") + 1)
    with pytest.raises(IndexError, match="leave the"):
        tokens.read("train", -1, 5)


def test_ensure_stores_builds_what_is_missing(corpus, tmp_path):
    entry = {"path": str(tmp_path / "s"), "text": [str(corpus)], "heldout": 0.1}
    data = DataConfig.model_validate({"stores": [entry, {"path": str(tmp_path / "other")}]})
    ensure_stores(data)
    before = (tmp_path / "s" / "manifest.json").stat().st_mtime_ns
    ensure_stores(data)
    assert (tmp_path / "s" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match=r"other does not exist; run: maxlm data build TEXT --out .*other"):
        open_stores(data, 257)


def test_open_stores_checks_vocabulary_and_tokenizer(store, corpus, bpe, tmp_path):
    build_store([str(corpus)], str(tmp_path / "bpe"), bpe)
    data = DataConfig.model_validate({"stores": [{"path": store}, {"path": str(tmp_path / "bpe")}]})
    with pytest.raises(ValueError, match=r"token ids up to 256, but model.vocab_size=256; set model.vocab_size=257"):
        open_stores(data, 256)
    with pytest.raises(ValueError, match=r"data.stores\[1\] .* another tokenizer"):
        open_stores(data, 1000)
