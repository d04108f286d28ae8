"""Tensors are written as they are, one at a time, and what is interrupted never looks whole."""

import contextlib
import json
import os

import numpy as np
import pytest

from maxlm.convert.safetensors import DTYPES, INDEX, SINGLE, Folder, SafetensorsError
from maxlm.convert.safetensors_writer import Writer


def random_tensors(names=DTYPES, seed=0):
    """A tensor of every type, of random bits; their order is not that of their widths."""
    rng = np.random.default_rng(seed)
    out = {}
    for i, name in enumerate(names):
        shape = (i + 1, 3) if i % 3 else (5,)
        high = 2 if name == "BOOL" else 256
        size = int(np.prod(shape)) * DTYPES[name].itemsize
        out[f"t.{name}"] = rng.integers(0, high, size, np.uint8).view(DTYPES[name]).reshape(shape)
    return {**out, "empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.int32)}


def plan(tensors):
    return {name: (x.dtype, x.shape) for name, x in tensors.items()}


def write(folder, tensors, **options):
    with Writer(str(folder), plan(tensors), **options) as writer:
        for name, values in tensors.items():
            writer.write(name, values)


def assert_same(folder, tensors):
    with contextlib.closing(Folder(str(folder))) as model:
        assert model.tensors.keys() == tensors.keys()
        for name, values in tensors.items():
            got = model.read(name)
            assert (got.dtype, got.shape, got.tobytes()) == (values.dtype, values.shape, values.tobytes()), name


def test_a_tensor_of_every_type_comes_back(tmp_path):
    tensors = random_tensors()
    write(tmp_path, tensors)
    assert os.listdir(tmp_path) == [SINGLE]
    assert_same(tmp_path, tensors)
    with contextlib.closing(Folder(str(tmp_path))) as model:
        assert all(t.start % t.dtype.itemsize == 0 for t in model.tensors.values())


def test_large_models_are_cut_into_files_with_an_index(tmp_path):
    tensors = {f"t{i}": np.full((100,), i, np.float32) for i in range(5)}
    write(tmp_path, tensors, shard_bytes=900)
    assert sorted(os.listdir(tmp_path)) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 2000}
    assert_same(tmp_path, tensors)


@pytest.mark.parametrize("shard_bytes", [10**9, 8])
def test_what_is_interrupted_leaves_nothing(tmp_path, shard_bytes):
    tensors = random_tensors(["F32", "BF16"])
    writer = Writer(str(tmp_path), plan(tensors), shard_bytes)
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.write("t.F32", tensors["t.F32"])
        # killed here, there would be no file of a name that anything reads
        assert all(name.startswith(".") and name.endswith(".partial") for name in os.listdir(tmp_path))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_every_tensor_is_written_once_as_it_was_said(tmp_path):
    tensors = random_tensors(["F32", "BF16"])
    with Writer(str(tmp_path), plan(tensors)) as writer:
        writer.write("t.F32", tensors["t.F32"])
        for name, values, says in [
            ("t.F32", tensors["t.F32"], "or has been"),
            ("other", tensors["t.F32"], "not to be written"),
            ("t.BF16", tensors["t.F32"], r"is float32\[5\], not bfloat16\[2, 3\]"),
        ]:
            with pytest.raises(SafetensorsError, match=says):
                writer.write(name, values)
        for name in ("t.BF16", "empty", "scalar"):
            writer.write(name, tensors[name])
    (tmp_path / SINGLE).unlink()
    with pytest.raises(SafetensorsError, match="'t.F32' has not been written"), Writer(str(tmp_path), plan(tensors)):
        pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(SafetensorsError, match="'c' .*complex64|'c': .*complex64"):
        Writer(str(tmp_path), {"c": (np.dtype(np.complex64), (2,))})


def test_a_folder_that_takes_nothing_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write to .*/none: No such file"), Writer(f"{tmp_path}/none", {}):
        pass


@pytest.mark.oracle
def test_files_are_those_of_the_safetensors_package(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    bits = {torch.bool: torch.uint8}
    tensors = random_tensors()
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", tensors)
    theirs = load_file(tmp_path / "ours" / SINGLE)
    assert theirs.keys() == tensors.keys()
    for name, values in tensors.items():
        x = theirs[name]
        raw = x.to(torch.uint8) if x.dtype in bits else x.contiguous().reshape(-1).view(torch.uint8)
        assert (tuple(x.shape), raw.numpy().tobytes()) == (values.shape, values.tobytes()), name
    with safe_open(tmp_path / "ours" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / SINGLE, {"format": "pt", "é": "\u2028"})
    assert_same(tmp_path / "theirs", tensors)
