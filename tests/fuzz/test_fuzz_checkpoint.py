"""Checkpoints may be anything: a result or one of maxlm's own errors, never a traceback."""

import json
import os
from pathlib import Path

import pytest
from blake3 import blake3
from fuzz_values import cut_or_changed, deep, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm import manifest
from maxlm.manifest import CheckpointError, Manifest
from maxlm.storage import StorageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "7"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a").write_bytes(b"abc")
    (folder / "b").write_bytes(b"")
    (folder.parent / "outside").write_bytes(b"abc")
    files = manifest.hash_files(str(folder), manifest.saved_files(str(folder)))
    arrays = {"params/w": manifest.ArrayRecord("float32", (2, 3), "00")}
    Manifest(step=7, files=files, arrays=arrays, run={"model": {"d_model": 3}}, versions={"jax": "1"}).write(
        str(folder)
    )
    return folder


def signed(body: str) -> bytes:
    """A manifest's file around any text, with the hash of it."""
    return f'{{"manifest": {body},\n"blake3": "{blake3(body.encode()).hexdigest()}"}}\n'.encode()


GOOD_FILE = ["d/a", [3, blake3(b"abc").hexdigest()]]
RECORD = {
    "format": 1,
    "step": 7,
    "temporary": False,
    "files": {GOOD_FILE[0]: GOOD_FILE[1]},
    "arrays": {"params/w": ["float32", [2, 3], "00"]},
    "run": {"model": {"d_model": 3}},
    "versions": {"jax": "1"},
}


def check_manifest(folder: Path, opened):
    """A manifest that is refused, or names files in its folder alone."""
    with opened() as paths:
        try:
            known = Manifest.read(str(folder))
            manifest.check_files(str(folder), known)
            manifest.check_arrays(known, {"params/w": "00"})
        except (CheckpointError, StorageError) as error:
            told(error)
    assert [path for path in paths if not path.startswith(f"{os.path.realpath(folder)}{os.sep}")] == []


@fuzz(60)
@given(
    st.binary(max_size=60) | st.text('{}"manifest: ,\n').map(str.encode) | cut_or_changed(signed(json.dumps(RECORD)))
)
@example(signed(deep('{"a":', "}")))
@example(signed(deep("{", "}")))
@example(signed('{"format": ' + "9" * 5000 + "}"))
@example(signed("{}"))
@example(signed('{"a": "\\ud800"}'))
def test_a_checkpoint_manifest_may_hold_any_bytes(checkpoint, opened, data):
    (checkpoint / manifest.NAME).write_bytes(data)
    check_manifest(checkpoint, opened)


@fuzz(250)
@given(mutated(RECORD))
@example({**RECORD, "files": {"../outside": GOOD_FILE[1]}})
@example({**RECORD, "files": {"d/../../outside": GOOD_FILE[1]}})
@example({**RECORD, "files": {"/etc/passwd": GOOD_FILE[1]}})
@example({**RECORD, "files": {"a\0b": GOOD_FILE[1]}})
@example({**RECORD, "files": {"": GOOD_FILE[1]}})
@example({**RECORD, "files": {"x" * 300: GOOD_FILE[1]}})
@example({**RECORD, "files": {"b": [-1, GOOD_FILE[1][1]]}})
@example({**RECORD, "files": {"b": [2**200, GOOD_FILE[1][1]]}})
def test_a_checkpoint_manifest_with_a_right_hash_may_hold_anything(checkpoint, opened, record):
    (checkpoint / manifest.NAME).write_bytes(signed(json.dumps(record)))
    check_manifest(checkpoint, opened)


@pytest.mark.parametrize("name", ["../outside", "d/../../outside", "{0}/outside", "", ".", "d/./a", "d//a", "a\0b"])
def test_a_checkpoint_manifest_names_files_in_its_folder(checkpoint, name):
    name = name.format(checkpoint.parent)
    (checkpoint / manifest.NAME).write_bytes(signed(json.dumps({**RECORD, "files": {name: GOOD_FILE[1]}})))
    with pytest.raises(manifest.DamagedError, match=r"MANIFEST\.json"):
        Manifest.read(str(checkpoint))
