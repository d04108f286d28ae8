import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from maxlm.data import sources
from maxlm.data.sources import DataError


def read(*texts, text_field="text") -> list[sources.Document]:
    return [d for source in sources.expand([str(t) for t in texts]) for d in sources.read_documents(source, text_field)]


def test_all_formats_give_the_same_documents(tmp_path):
    texts = ["first", "zweites\nDokument ä", "三"]
    lines = "".join(json.dumps({"n": 1, "text": text}) + "\n\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # Two frames after one another are one file, as from `cat`.
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:-1]) + zstandard.compress(b"\n"))
    table = pyarrow.table({"n": [1, 2, 3], "text": pyarrow.array(texts)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    assert [document.text for document in read(tmp_path)] == texts * 4


def test_order_is_given_then_sorted_and_each_file_counts_once(tmp_path):
    for name in ("z.txt", "a.md", "sub/b.py", "sub/x.rst", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a.md", "sub/b.py", "z.txt"]
    assert [d.text for d in read(tmp_path / "z.txt", tmp_path)] == ["z.txt", "a.md", "sub/b.py"]
    assert [d.text for d in read(tmp_path / "*.[tm]*")] == ["a.md", "z.txt"]
    assert [d.text for d in read(tmp_path / "sub" / "x.rst")] == ["sub/x.rst"], "a named file may have any ending"


def test_invalid_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xc3\xa4 bad \xff\xfe, cut \xe4\xb8, mark \xef\xbf\xbd")
    (document,) = read(tmp_path)
    assert document.text == "good ä bad \ufffd\ufffd, cut \ufffd, mark \ufffd"
    assert document.replaced_bytes == 4


def test_lone_surrogates_in_json_become_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}')
    (document,) = read(tmp_path)
    assert document[:2] == ("a\ufffdb 🙂", 1)


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path)[0].text == "hello"


@pytest.mark.parametrize("line", ["zwölf Boxkämpfer jagen Viktor\n", "ä€🙂" * 700_000])
def test_a_big_text_file_is_cut_without_losing_a_character(tmp_path, line):
    text = line * (2_500_000 // len(line) + 1)
    (tmp_path / "big.txt").write_text(text)
    documents = read(tmp_path)
    assert "".join(d.text for d in documents) == text and not any(d.replaced_bytes for d in documents)
    assert len(documents) > 2
    if "\n" in line:
        assert all(d.text.endswith("\n") and 65_536 <= len(d.text.encode()) < 66_000 for d in documents[:-1])


def test_stdlib_is_clean_and_leaves_out_installed_packages():
    files = sources.expand(["python:stdlib"])
    names = [file.name for file in files]
    assert names == sorted(names) and "python:stdlib/ast.py" in names
    assert not any("site-packages" in file.path for file in files)
    assert not any(d.replaced_bytes for file in files[:50] for d in sources.read_documents(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\0cd", "a.txt is not text: it has NUL bytes"),
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', "a.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'\n\n{"body": "x", "id": 1}\n', "a.jsonl line 3 has no field 'text'; it has body, id"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"line 1: field 'text' is not text but \[\"x\"\]"),
        ("a.jsonl", b'"just text"\n', 'line 1 is not a JSON object but "just text"'),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99_999, mtime=0)[:-1000], "a.jsonl.gz is damaged after line"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz is damaged after line 0"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst is damaged after line 0"),
        ("a.parquet", b"no parquet at all", "a.parquet is not a readable parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_parquet_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(DataError, match="no column 'text'; it has body, n"):
        read(path)
    with pytest.raises(DataError, match="column 'n' is not text but int64"):
        read(path, text_field="n")
    with pytest.raises(DataError, match="row 2: column 'body' is null"):
        read(path, text_field="body")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.txt", "text nothing.txt does not exist"),
        ("*.nothing", "no file matches"),
        (".", "holds no text files"),
        ("gs://bucket/x", "is in a bucket; copy it"),
    ],
)
def test_nothing_to_read(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        sources.expand([text])
