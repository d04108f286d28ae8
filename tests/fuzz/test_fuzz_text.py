"""Text and tokenizers may be anything: a result or one of maxlm's own errors, never a traceback."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from fuzz_values import DEEP_JSON, JSON, cut_or_changed, deep, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.data import sources
from maxlm.data.sources import DataError
from maxlm.data.tokenizer import load_tokenizer, train_bpe
from maxlm.storage import StorageError


def read_text(path: Path) -> None:
    """Text that is refused, or whose documents can be encoded."""
    try:
        (source,) = sources.expand([str(path)])
        for document in sources.read_documents(source):
            assert document.text.encode()
            assert document.replaced_bytes >= 0
    except (DataError, StorageError) as error:
        told(error)


JSONL = b"".join(json.dumps({"text": f"document {i}", "n": i}).encode() + b"\n" for i in range(200))
PACKED = {".gz": gzip.compress(JSONL, mtime=0), ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)}


@fuzz(250)
@given(
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"]).flatmap(
        lambda name: st.tuples(
            st.just(name), st.binary(max_size=40) | cut_or_changed(PACKED.get(Path(name).suffix, JSONL[:200]))
        )
    )
    | st.tuples(st.just("a.jsonl"), JSON.map(lambda value: json.dumps(value).encode()))
)
@example(("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}"))
@example(("a.jsonl", deep('{"text": [', "]}").encode()))
@example(("a.jsonl", deep("[", "]", 950).encode()))
@example(("a.jsonl", json.dumps({f"key {i}": i for i in range(50_000)}).encode()))
@example(("a.jsonl", b'{"text": "a\\ud800b"}'))
@example(("a.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1"))
def test_text_may_hold_any_bytes(tmp_path, file):
    name, data = file
    (tmp_path / name).write_bytes(data)
    read_text(tmp_path / name)


@pytest.mark.parametrize("ending", PACKED)
def test_packed_text_that_is_cut_is_damaged(tmp_path, ending):
    """Half a file must not pass for a whole one."""
    for size in (len(PACKED[ending]) // 2, len(PACKED[ending]) - 1):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(PACKED[ending][:size])
        with pytest.raises(DataError, match="damaged after line"):
            list(sources.read_documents(*sources.expand([str(path)])))


def test_zstd_frames_of_all_kinds_are_whole(tmp_path):
    """Sized or not, with a checksum or without, of one repeated byte, empty, skippable: as pzstd and cat make them."""
    same = b'{"text": "' + b"a" * 500_000 + b'"}\n'
    unsized = zstandard.ZstdCompressor(write_content_size=False, write_checksum=False)
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    frames = [
        skipped,
        unsized.compress(same),
        PACKED[".zst"],
        zstandard.compress(b""),
        zstandard.compress(same),
        skipped,
    ]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    documents = list(sources.read_documents(*sources.expand([str(tmp_path / "a.jsonl.zst")])))
    assert len(documents) == 202


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_beyond_the_limit_is_refused(tmp_path, ending):
    """A small file may unpack to a line that no memory holds."""
    path, size = tmp_path / f"a.jsonl{ending}", sources.MAX_JSON_BYTES + 1000
    opened = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[ending]
    with opened(path, "wb") as file:
        file.write(b'{"text": "fine"}\n{"text": "')
        for _ in range(size >> 16):
            file.write(b"a" * (1 << 16))
        file.write(b'a"}\n')
    documents = sources.read_documents(*sources.expand([str(path)]))
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=rf"line 2 is longer than {sources.MAX_JSON_BYTES:,} bytes"):
        next(documents)


@pytest.fixture(scope="module")
def tokenizer_json():
    return train_bpe(["some text to learn from, and some more of it"] * 3, 270)


@fuzz(150)
@given(st.data())
def test_a_tokenizer_file_may_hold_anything(tmp_path, tokenizer_json, data):
    known = json.loads(tokenizer_json)
    known["model"]["vocab"] = {**dict(list(known["model"]["vocab"].items())[:3]), "<|endoftext|>": 3}
    known["model"]["merges"] = known["model"]["merges"][:2]
    content = data.draw(
        st.binary(max_size=40)
        | cut_or_changed(tokenizer_json)
        | mutated(known).map(lambda tree: json.dumps(tree).encode())
        | st.sampled_from([b"{" + x for x in DEEP_JSON])
    )
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    try:
        loaded = load_tokenizer(str(path))
    except ValueError as error:
        told(error, str(path))
        return
    assert 0 <= loaded.eos_id < loaded.vocab_size
    for ids in loaded.encode_batch(["some text", ""]):
        loaded.decode(ids)
