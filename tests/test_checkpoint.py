"""Checkpoints: what was saved comes back, or a person hears why not."""

import contextlib
import json
import os
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gcs import gcs_bucket
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm import manifest, storage
from maxlm.checkpoint import DAMAGED, Checkpoints
from maxlm.cli import main
from maxlm.config import CheckpointConfig
from maxlm.fingerprint import fingerprints
from maxlm.manifest import CheckpointError, DamagedError, Manifest

FIXTURES = Path(__file__).parent / "fixtures"


def state(step, size=12):
    key = jax.random.key(step)
    params = {"a": jax.random.normal(key, (3, size)), "b": jax.random.normal(key, (5,)).astype(jnp.bfloat16)}
    return {"step": jnp.int32(step), "params": params, "code": jnp.arange(7, dtype=jnp.int8)}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


@contextlib.contextmanager
def opened(folder, told=None, **options):
    """Checkpoints in a folder; what they tell is put into a list."""
    tell = (told if told is not None else []).append
    with contextlib.closing(Checkpoints(str(folder), CheckpointConfig(**options), tell=tell)) as checkpoints:
        yield checkpoints


def saved(folder, *steps, **options):
    with opened(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
        checkpoints.wait()
        return checkpoints.steps()


def restored(folder):
    told = []
    with opened(folder, told) as checkpoints:
        found = checkpoints.restore_newest(shapes(state(0)))
    assert found is not None
    return *found, told


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    assert saved(tmp_path, 1, 2, 3) == [2, 3]
    found, step, told = restored(tmp_path)
    assert step == 3 and equal(found, state(3)) and told == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flip": flip, "cut": cut, "delete": Path.unlink}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    saved(folder, 1, 2)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found_and_named_and_the_step_before_is_taken(two, tmp_path, damage):
    files = [path.relative_to(two) for path in (two / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8 and any(path.name == manifest.NAME for path in files)
    for i, file in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        DAMAGES[damage](folder / file)
        found, step, told = restored(folder)
        assert step == 1 and equal(found, state(1)), file
        name = str(file.relative_to("checkpoints/2"))
        assert len(told) == 1 and name in told[0] and "/2" in told[0], (file, told)
        _, again, told = restored(folder)
        assert again == 1, "it stays aside"


def test_an_array_that_differs_from_what_was_on_the_device_is_found(two, tmp_path):
    """As a flipped bit between memory and disk: the files are what was written, and that was wrong."""
    shutil.copytree(two, tmp_path / "r")
    folder = str(tmp_path / "r" / "checkpoints" / "2")
    known = Manifest.read(folder)
    wrong = known.arrays["params/b"]._replace(fingerprint="0" * 16)
    known.model_copy(update={"arrays": {**known.arrays, "params/b": wrong}}).write(folder)
    _, step, told = restored(tmp_path / "r")
    assert step == 1 and "array params/b" in told[0]


def test_when_all_are_damaged_nothing_begins_anew_in_silence(two, tmp_path):
    for step in (1, 2):
        shutil.copytree(two / "checkpoints" / str(step), tmp_path / "checkpoints" / str(step))
        cut(tmp_path / "checkpoints" / str(step) / "_METADATA")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"):
            restored(tmp_path)
    assert (tmp_path / "checkpoints" / "2" / "_METADATA").exists(), "nothing is deleted"


def test_a_damaged_step_is_saved_again_and_counts_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "r")
    cut(tmp_path / "r" / "checkpoints" / "2" / "_METADATA")
    assert restored(tmp_path / "r")[1] == 1
    assert (tmp_path / "r" / "checkpoints" / "2" / DAMAGED).exists()
    assert saved(tmp_path / "r", 2) == [1, 2]
    assert restored(tmp_path / "r")[1] == 2


def test_a_step_without_manifest_is_not_used_and_said_so(two, tmp_path):
    shutil.copytree(two, tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "2" / manifest.NAME).unlink()
    _, step, told = restored(tmp_path / "r")
    assert step == 1 and "2 has no MANIFEST.json" in told[0]


def test_what_cannot_be_read_now_is_not_called_damaged(two, tmp_path, monkeypatch):
    """A disk or bucket that is away for a while must not cost checkpoints."""
    shutil.copytree(two, tmp_path / "r")

    def fails(path):
        raise storage.StorageError(f"cannot read {path}: Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_hash", fails)
        with pytest.raises(CheckpointError, match="cannot verify .*Stale file handle") as caught:
            restored(tmp_path / "r")
        assert not isinstance(caught.value, DamagedError)
    assert restored(tmp_path / "r")[1] == 2


def test_what_is_unfinished_or_damaged_is_removed_in_time(tmp_path):
    with opened(tmp_path, keep_last=2, keep_every=1) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state(step))
            checkpoints.wait()
        (tmp_path / "checkpoints" / "2" / manifest.NAME).unlink()
        checkpoints.put_aside(3, "a test")
        checkpoints.save(4, state(4))
        checkpoints.wait()
        assert checkpoints.folders() == [1, 3, 4], "what was cut off goes, what is put aside stays a while"
        for step in (5, 6):
            checkpoints.save(step, state(step))
            checkpoints.wait()
        assert checkpoints.folders() == [1, 4, 5, 6]


def test_a_newer_format_is_refused_and_left_alone(two, tmp_path):
    shutil.copytree(two, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints" / "2"
    Manifest.read(str(folder)).model_copy(update={"format": manifest.FORMAT + 1}).write(str(folder))
    with pytest.raises(CheckpointError, match="of a newer maxlm") as caught:
        restored(tmp_path / "r")
    assert not isinstance(caught.value, DamagedError) and not (folder / DAMAGED).exists()


@pytest.mark.parametrize("number", range(manifest.FORMAT + 1))
def test_every_format_there_has_been_is_read(tmp_path, number):
    with zipfile.ZipFile(FIXTURES / f"checkpoint_format_{number}.zip") as archive:
        archive.extractall(tmp_path)
    found, step, told = restored(tmp_path)
    assert step == 4 and found["params"]["a"].shape == (3, 12) and int(found["step"]) == 4
    np.testing.assert_array_equal(found["code"], np.arange(7))
    assert np.isclose(float(found["params"]["a"].astype(jnp.float32).sum()), 66.0)
    assert told == [] if number else "cannot be verified" in told[0]


# ---- retention


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, [7, 8]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6, 8]),
        ({"keep_last": None}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=str,
)
def test_what_is_kept(tmp_path, options, kept):
    assert saved(tmp_path, *range(1, 9), **options) == kept


def test_a_temporary_save_lasts_until_the_next(tmp_path):
    with opened(tmp_path, keep_last=2) as checkpoints:
        found = []
        for step, temporary in [(1, False), (2, True), (3, True), (4, False), (5, False), (6, True)]:
            checkpoints.save(step, state(step), temporary=temporary)
            checkpoints.wait()
            found.append(checkpoints.steps())
    assert found == [[1], [1, 2], [1, 3], [1, 4], [4, 5], [4, 5, 6]]


# ---- failures


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond this: as a full disk, the write fails in the middle."""
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def save_and_wait(checkpoints, step):
    checkpoints.save(step, state(step))
    checkpoints.wait()


def wait_for_failure(checkpoints):
    for _ in range(200):
        checkpoints.check()
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves a coroutine behind
def test_a_save_that_fails_in_the_background_is_heard_of_and_the_next_one_works(tmp_path):
    saved(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        with file_size_limit(100_000):
            checkpoints.save(2, state(2, size=100_000))
            with pytest.raises(CheckpointError, match=r"saving step 2 .*File too large.*step 1 is intact"):
                wait_for_failure(checkpoints)
        assert checkpoints.steps() == [1]
        assert [name for name in os.listdir(tmp_path / "checkpoints") if "tmp" in name] == []
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_heard_of(tmp_path):
    saved(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        os.chmod(tmp_path / "checkpoints", 0o500)
        try:
            with pytest.raises(CheckpointError, match=r"Permission denied"):
                save_and_wait(checkpoints, 2)
        finally:
            os.chmod(tmp_path / "checkpoints", 0o700)
        assert checkpoints.steps() == [1]


def test_a_folder_in_the_way_is_heard_of(tmp_path):
    with opened(tmp_path) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("a file where the folder was")
        with pytest.raises(CheckpointError, match="saving step 1"):
            save_and_wait(checkpoints, 1)


def test_checkpoints_that_vanish_are_heard_of_at_the_next_save(tmp_path):
    with opened(tmp_path) as checkpoints:
        save_and_wait(checkpoints, 1)
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match="saving step 2 .* the checkpoint of step 1 has vanished"):
            checkpoints.save(2, state(2))
        (tmp_path / "away").rename(tmp_path / "checkpoints")
        save_and_wait(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]


def test_what_a_killed_save_left_is_removed(tmp_path):
    saved(tmp_path, 1)
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "d").write_bytes(b"x")
    assert saved(tmp_path, 3) == [1, 3] and not left.exists()


# ---- fingerprints


def test_fingerprints_are_the_same_on_every_mesh_and_see_every_bit():
    rng = np.random.default_rng(0)
    arrays = {"f": rng.normal(size=(16, 32)).astype(np.float32), "h": rng.integers(0, 99, (8, 8)).astype(np.int8)}
    plain = fingerprints(jax.tree.map(jnp.asarray, arrays))()
    for sizes, spec in [((8,), P("x")), ((2, 4), P("y", "x")), ((4, 2), P(("x", "y"))), ((8,), P(None, "x"))]:
        mesh = jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(AxisType.Explicit,) * len(sizes))
        with jax.set_mesh(mesh):
            placed = jax.device_put(arrays, NamedSharding(mesh, spec))
            assert fingerprints(placed)() == plain
    for i in range(0, 16 * 32 * 32, 97):
        bits = arrays["f"].copy()
        bits.reshape(-1).view(np.uint32)[i // 32] ^= np.uint32(1 << i % 32)
        assert fingerprints({"f": jnp.asarray(bits)})()["f"] != plain["f"]
    swapped = arrays["f"][::-1].copy()
    assert fingerprints({"f": jnp.asarray(swapped)})()["f"] != plain["f"], "places count"


# ---- for people


def test_ls_verify_and_rm(two, tmp_path, capsys):
    shutil.copytree(two, tmp_path / "r")
    run = str(tmp_path / "r")
    assert main(["checkpoint", "verify", run]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    flip(tmp_path / "r" / "checkpoints" / "2" / "_METADATA")
    assert main(["checkpoint", "verify", run, "2", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["step"] == 2 and not row["verified"] and "_METADATA" in row["reason"]
    assert main(["checkpoint", "ls", run]) == 0
    assert capsys.readouterr().out.count("complete") == 2, "ls does not read them"
    restored(run)
    assert main(["checkpoint", "ls", run]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["checkpoint", "rm", run, "1"]) == 2
    assert "newest complete" in capsys.readouterr().err
    assert main(["checkpoint", "rm", run, "2"]) == 0
    assert main(["checkpoint", "rm", run, "7"]) == 2
    assert "no checkpoint of step 7" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "r" / "checkpoints")) == ["1"]


def test_a_folder_without_checkpoints_is_one_sentence(tmp_path, capsys):
    assert main(["checkpoint", "ls", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": "1", "step": 2, "files": {}, "arrays": {}}',
        b'{"format": 1, "step": 2, "files": {"a": 1}, "arrays": {}}',
        b'{"format": 1, "step": 2, "files": {"a": [-1, "x", 3]}, "arrays": {}}',
        b"\xff\xfe",
    ],
    ids=str,
)
def test_a_manifest_that_is_none_is_damaged_whatever_it_holds(tmp_path, body):
    from blake3 import blake3

    text = b'{"manifest": ' + body + b',\n"blake3": "' + blake3(body).hexdigest().encode() + b'"}\n'
    for data in (body, text):
        (tmp_path / manifest.NAME).write_bytes(data)
        with pytest.raises(DamagedError):
            Manifest.read(str(tmp_path))


@pytest.mark.long
def test_a_copy_to_a_bucket_and_back_stays_valid(tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs not installed; install with: pip install 'maxlm[buckets]'")
    saved(tmp_path / "here", 1, 2)
    with gcs_bucket() as root:
        copy(str(tmp_path / "here"), f"{root}/there")
        assert equal(restored(f"{root}/there")[0], state(2))
        copy(f"{root}/there", str(tmp_path / "back"))
    assert equal(restored(tmp_path / "back")[0], state(2))
    with opened(tmp_path / "back") as checkpoints:
        assert [bool(checkpoints.verify(step)) for step in (1, 2)] == [True, True]


def copy(source, target):
    for name in storage.list_tree(source):
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))
