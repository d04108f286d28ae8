"""Safetensors files and their index may be anything: a result or one sentence, never a traceback."""

import contextlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzz_values import cut_or_changed, deep, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.convert.safetensors import INDEX, SINGLE, File, Folder, SafetensorsError

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
TENSORS = bytes(range(33))


def file_of(header, tensors=TENSORS, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tensors


def check_file(path: Path):
    """A file that is refused, or can be read from end to end."""
    try:
        with contextlib.closing(File(str(path))) as file:
            assert sum(tensor.num_bytes for tensor in file.tensors.values()) <= path.stat().st_size
            for name, tensor in file.tensors.items():
                values = file.read(name)
                assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape)
    except SafetensorsError as error:
        told(error, str(path))


@fuzz(250)
@given(st.binary(max_size=60) | cut_or_changed(file_of(HEADER)))
@example(file_of(HEADER))
@example(file_of(b"{}", b""))
@example(b"")
def test_a_safetensors_file_may_hold_any_bytes(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    check_file(tmp_path / "f")


@fuzz(250)
@given(mutated(HEADER))
def test_a_safetensors_header_may_hold_anything(tmp_path, header):
    (tmp_path / "f").write_bytes(file_of(header))
    check_file(tmp_path / "f")


def entry(**changed):
    return file_of({**HEADER, "a": {**HEADER["a"], **changed}})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (file_of(HEADER)[:-1], "cut off within tensor 'c'"),
        (file_of(HEADER)[:100], "is cut off"),
        (file_of(HEADER) + b"x", "1 bytes after tensor 'c'"),
        (b"1234567", "7 bytes"),
        (file_of(HEADER, length=2**60), "cut off"),
        (file_of(HEADER, length=2**64 - 1), "cut off"),
        (file_of(b" " + json.dumps(HEADER).encode()), "no header"),
        (file_of(b"[]"), "no header"),
        (file_of(b"{\xff}"), "valid JSON"),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "valid JSON"),
        (file_of(b'{"a": NaN}'), "NaN"),
        (file_of(b'{"\\ud800": 1}'), "valid JSON"),
        (file_of(deep('{"a":', "}").encode()), "JSON|deeply"),
        (file_of(b'{"a":' * 200 + b"1" + b"}" * 200), "nothing else"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' twice"),
        (file_of(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "'dtype' twice"),
        (file_of({**HEADER, "__metadata__": {"x": 1}}), "__metadata__"),
        (file_of({**HEADER, "a": [1]}), "'a' is to have dtype"),
        (entry(dtype="F4"), "'a' has the unknown dtype 'F4'"),
        (entry(dtype=3), "unknown dtype 3"),
        (entry(dtype=["F32"]), "unknown dtype"),
        (entry(more=1), "nothing else"),
        (entry(shape=6), "shape 6"),
        (entry(shape=[6.0]), r"shape \[6.0\]"),
        (entry(shape=[True, 6]), "shape"),
        (entry(shape=[-2, -3]), "shape"),
        (entry(shape=[1] * 33 + [6]), "shape"),
        (entry(shape=[2**63]), "shape"),
        (entry(shape=[2**62, 2**62]), "2\\*\\*63"),
        (entry(shape=[2**62, 0, 2**62]), "2\\*\\*63"),
        (entry(shape=[2, 4]), "'a' has 24 bytes, and .* are 32"),
        (entry(data_offsets=[0, 2**63]), "data_offsets"),
        (entry(data_offsets=[24, 0]), "data_offsets"),
        (entry(data_offsets=[0, 24, 32]), "data_offsets"),
        (entry(data_offsets=[-24, 0]), "data_offsets"),
        (entry(data_offsets=[8, 32]), "overlaps|hole"),
        (entry(data_offsets=[2**40, 2**40 + 24]), "hole"),
        (file_of({"a": HEADER["a"], "b": {**HEADER["b"], "data_offsets": [25, 33]}}), "'b' leaves a hole after .*'a'"),
        (file_of({"a": HEADER["a"], "b": {**HEADER["b"], "data_offsets": [20, 28]}}), "'b' overlaps tensor 'a'"),
    ],
)
def test_a_safetensors_file_that_is_refused(tmp_path, data, says):
    (tmp_path / "f.safetensors").write_bytes(data)
    with pytest.raises(SafetensorsError, match=rf"f\.safetensors.*({says})"):
        File(str(tmp_path / "f.safetensors"))


def test_a_header_of_more_than_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "f", "wb") as file:  # a file with a hole: it takes no room
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(SafetensorsError, match="more than 100,000,000"):
        File(str(tmp_path / "f"))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(SafetensorsError, match="no safetensors file"):
            File(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="none"):
        File(str(tmp_path / "none"))


# ---- folders

WEIGHTS = {"a": "x-1.safetensors", "b": "x-2.safetensors"}
GOOD_INDEX = {"metadata": {"total_size": 8}, "weight_map": WEIGHTS}
INDEX_BYTES = json.dumps(GOOD_INDEX).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    path.mkdir()
    for name, file in WEIGHTS.items():
        header = {name: {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
        (path / file).write_bytes(file_of(header, b"1234"))
        (path.parent / file).write_bytes(file_of(header, b"1234"))
    return path


def check_folder(folder: Path, opened):
    """A folder that is refused, or read without a look at what is beside it."""
    with opened() as paths:
        try:
            with contextlib.closing(Folder(str(folder))) as model:
                assert {model.read(name).shape for name in model.in_order()} == {(2,)}
        except (SafetensorsError, FileNotFoundError) as error:
            told(error, str(folder))
    assert [path for path in paths if str(folder.parent) in path and str(folder) not in path] == []


@fuzz(200)
@given(mutated(GOOD_INDEX).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(INDEX_BYTES))
@example(INDEX_BYTES)
def test_an_index_may_hold_anything(folder, opened, data):
    (folder / INDEX).write_bytes(data)
    check_folder(folder, opened)


@pytest.mark.parametrize(
    "name",
    [
        *[
            "../x-1.safetensors",
            "{0}/x-1.safetensors",
            "a/../../x-1.safetensors",
            "./x-1.safetensors",
            "..",
            "",
            ".",
            3,
        ],
        *[None, ["x-1.safetensors"], "x-1.safetensors\0", "x-1.safetensors\n", "x-1.bin", "..safetensors"],
        "é.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder(folder, opened, name):
    name = name.format(folder.parent) if isinstance(name, str) else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {**WEIGHTS, "a": name}}))
    with pytest.raises(SafetensorsError, match="'a' into .*no safetensors file of its folder"):
        Folder(str(folder))
    check_folder(folder, opened)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({**WEIGHTS, "c": "x-1.safetensors"}, "has no tensor 'c'"),
        ({"a": "x-1.safetensors", "c": "x-2.safetensors"}, "has no tensor 'c'"),
        ({**WEIGHTS, "a": "x-2.safetensors"}, "has no tensor 'a'"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_does_not_agree_with_its_files(folder, places, says):
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(SafetensorsError, match=says):
        Folder(str(folder))


def test_a_tensor_that_the_index_does_not_know(folder):
    both = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(["a", "more"])}
    (folder / "x-3.safetensors").write_bytes(file_of(both, b"12"))
    (folder / INDEX).write_text(json.dumps({"weight_map": {**WEIGHTS, "a": "x-3.safetensors"}}))
    with pytest.raises(SafetensorsError, match="tensor 'more' that .* does not put there"):
        Folder(str(folder))


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*save_pretrained"):
        Folder(str(tmp_path))


def test_bytes_are_read_as_they_are(tmp_path):
    (tmp_path / SINGLE).write_bytes(file_of(HEADER))
    with contextlib.closing(Folder(str(tmp_path))) as model:
        got = {name: model.read(name) for name in model.in_order()}
    np.testing.assert_array_equal(got["a"], np.frombuffer(TENSORS[:24], np.float32).reshape(2, 3))
    np.testing.assert_array_equal(got["b"].view(np.uint16), np.frombuffer(TENSORS[24:32], np.uint16))
    assert (got["b"].dtype, got["none"].shape, got["c"].item()) == (ml_dtypes.bfloat16, (0, 5), 32)
