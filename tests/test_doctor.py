"""What `maxlm doctor` says of eight fake devices, of disks, and of collectives that go wrong."""

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from gcs import gcs_bucket
from helpers import small_config
from jax import lax
from jax.sharding import AxisType

from maxlm import storage
from maxlm.cli import main
from maxlm.config_file import to_yaml
from maxlm.doctor import disk_row, doctor
from maxlm.mesh_check import COLLECTIVES, check_mesh

ALL_REDUCE = COLLECTIVES[0]


def config(root, **mesh):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "fake_devices": 8, **mesh}
    return small_config(run={"root": str(root)}, mesh=sizes)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config(tmp_path / "runs")))
    return str(file)


def report(capsys):
    said = json.loads(capsys.readouterr().out)
    return said, {row["name"]: row for rows in said["sections"].values() for row in rows}


def test_json_tells_all(path, capsys):
    assert main(["doctor", path, "--json"]) == 0
    said, rows = report(capsys)
    assert said["ok"]
    assert rows["jax"]["version"] == jax.__version__
    assert rows["devices"]["num_devices"] == 8 and rows["devices"]["num_hosts"] == 1
    assert [device["kind"] for device in rows["devices"]["devices"]] == ["cpu"] * 8
    assert rows["axes"]["axes"] == {"data": 2, "fsdp": 2, "tensor": 2}
    tried = {(row["axis"], row["collective"]) for row in said["sections"]["collectives"] if row["ok"]}
    assert tried == {(axis, c.name) for axis in ("data", "fsdp", "tensor") for c in COLLECTIVES}
    assert rows["tensor all-to-all"]["time_s"] > 0
    assert rows["run.root"]["free_bytes"] > 0
    assert rows["train.compilation_cache"]["text"] == "turned off"
    assert {row["name"] for row in said["sections"]["extras"]} >= {"tpu", "cuda", "buckets"}


def test_the_screen_has_80_columns_and_nothing_stays_on_disk(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # shown; these tests have long ones
    assert main(["doctor", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert lines[-1].startswith("all ") and lines[-1].endswith(" checks passed")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_without_a_config_all_devices_are_on_one_axis(capsys):
    assert main(["doctor", "--json"]) == 0
    _, rows = report(capsys)
    assert rows["axes"]["axes"]["fsdp"] == jax.device_count()


@pytest.mark.parametrize("arguments", [["missing.yaml"], ["CONFIG", "mesh.tensr=2"], ["CONFIG", "mesh.data=0"]])
def test_a_wrong_config_ends_in_2(arguments, path, capsys):
    assert main(["doctor", *(path if a == "CONFIG" else a for a in arguments)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_failed_check_is_a_row_and_the_others_go_on(path, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", path, "mesh.tensor=3", f"run.root={tmp_path}/file/runs", "--json"]) == 1
    said, rows = report(capsys)
    assert not said["ok"]
    failed = {name: row["text"] for name, row in rows.items() if row["ok"] is False}
    assert set(failed) == {"mesh", "run.root"}
    assert "needs 12 devices, but there are 8" in failed["mesh"]
    assert f"cannot write {tmp_path}/file/" in failed["run.root"]
    assert rows["jax"] and rows["devices"]["ok"]


def test_a_run_that_does_not_divide_over_the_mesh_is_told(path, capsys):
    assert main(["doctor", path, "train.batch_size=3", "--json"]) == 1
    _, rows = report(capsys)
    assert "train.batch_size=4" in rows["model and batch"]["text"]
    assert rows["axes"]["ok"] and rows["data all-reduce"]["ok"]


def test_wrong_values_name_the_devices(tmp_path, capsys):
    def flips_a_bit(x, axis, n):
        return ALL_REDUCE.run(x, axis, n).at[1, 0].add((lax.axis_index(axis) == 1).astype(x.dtype))

    broken = replace(ALL_REDUCE, run=flips_a_bit)
    assert doctor(config(tmp_path), as_json=True, collectives=[broken, *COLLECTIVES[1:]]) == 1
    _, rows = report(capsys)
    assert rows["tensor all-reduce"]["wrong_devices"] == [1, 3, 5, 7]
    assert rows["fsdp all-reduce"]["wrong_devices"] == [2, 3, 6, 7]
    assert "wrong on device 1, 3, 5, 7: device 1 has " in rows["tensor all-reduce"]["text"]
    assert rows["tensor all-gather"]["ok"]


@pytest.mark.parametrize("good", COLLECTIVES, ids=lambda c: c.name)
def test_every_collective_is_compared_with_its_own_result(good):
    """Each one, expected to give what another one gives, is found wrong."""
    other = COLLECTIVES[(COLLECTIVES.index(good) + 1) % len(COLLECTIVES)]
    (outcome,) = check_mesh(mesh(x=4), [replace(good, expected=other.expected)])
    assert outcome.wrong_devices == [0, 1, 2, 3]


def mesh(**sizes):
    types = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def test_axes_may_have_any_names():
    outcomes = check_mesh(mesh(slice=2, stage=1, expert=4))
    assert [o.problem for o in outcomes] == [""] * 10
    assert {o.axis for o in outcomes} == {"slice", "expert"}


def test_an_error_or_a_hang_is_an_outcome():
    release = threading.Event()

    def raises(x, axis, n):
        raise RuntimeError("the link is down")

    def hangs(x, axis, n):
        release.wait(60)
        return x

    collectives = [replace(ALL_REDUCE, run=raises), replace(ALL_REDUCE, name="stuck", run=hangs), ALL_REDUCE]
    try:
        failed, stuck, after = check_mesh(mesh(x=2), collectives, timeout_s=1)
    finally:
        release.set()
    assert failed.problem == "all-reduce over x failed: RuntimeError: the link is down"
    assert stuck.hangs and "no answer within 1 s" in stuck.problem
    assert after.problem == "all-reduce over x was not tried, since stuck over x hangs"


def test_buckets_are_written_to_and_left_as_they_were():
    with gcs_bucket() as root:
        row = disk_row("run.root", f"{root}/runs")
        assert row.ok, row.text
        assert storage.list_dir(root) == []


def test_a_folder_that_is_not_there_yet_is_not_made():
    with tempfile.TemporaryDirectory() as folder:
        row = disk_row("run.root", f"{folder}/a/b")
        assert row.ok and row.data["free_bytes"] > 0
        assert list(Path(folder).iterdir()) == []
