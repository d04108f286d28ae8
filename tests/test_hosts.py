"""Several processes train one run, as the hosts of a pod do; the failure of one ends them all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from helpers import MODEL

import maxlm
from maxlm import hosts
from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.config_file import load_config, parse_config, to_yaml
from maxlm.data.build import ensure_stores

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.long


def write_config(folder, name, **train):
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text() * 4)
    tree = {
        "run": {"name": name, "root": str(folder)},
        "model": {**MODEL, "vocab_size": 257},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
        "data": {"stores": [{"path": str(folder / "store"), "text": [str(text)], "heldout": 0.0}]},
        "train": {"steps": 8, "batch_size": 8, "seq_len": 32, "compilation_cache": None, **train},
        "optim": {"learning_rate": 1e-2},
        "eval": {"sample_tokens": 0},
        "checkpoint": {"every": 1000},
    }
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(parse_config(tree)))
    return path


def start_hosts(config, count, command="train", arguments=None, launcher="by hand"):
    """Starts `maxlm COMMAND` in `count` processes of 4 / count CPU devices each; arguments[i] go to process i alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count), "JAX_COORDINATOR_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "maxlm", command, str(config), *(arguments or {}).get(i, [])],
            cwd=ROOT,
            env=env | launched(launcher, i, count, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def launched(launcher, index, count, port):
    """The variables that a launcher sets, of those that jax reads."""
    if launcher == "slurm":
        same = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"}
        counts = dict.fromkeys(["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"], str(count))
        return {**same, **counts, **dict.fromkeys(["SLURM_PROCID", "SLURM_LOCALID"], str(index))}
    if launcher == "open mpi":
        ranks = dict.fromkeys(["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"], str(index))
        uri = "4096.0;tcp://127.0.0.1:34911"
        return {**ranks, "OMPI_COMM_WORLD_SIZE": str(count), "OMPI_MCA_orte_hnp_uri": uri}
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    return {**where, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}


def finish(processes, codes=None):
    """Waits for all and returns what they printed."""
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == (codes or [0] * len(processes)), "\n".join(said)
    return said


def wait_for_steps(folder, processes):
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert all(host.poll() is None for host in processes), "\n".join(finish(processes))
        time.sleep(0.2)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, not srun
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_host_that_is_alone_joins_nobody(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hosts.join()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "set to numbers"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "one of many .TPU_WORKER_HOSTNAMES., but could not join"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "one of many .MEGASCALE_COORDINATOR_ADDRESS., but could not join"),
    ],
)
def test_hosts_that_cannot_meet_say_what_is_missing(variables, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    jax.devices()  # too late to join now
    with pytest.raises(maxlm.ConfigError, match=words):
        hosts.join()


def test_two_and_four_hosts_train_as_one_does(tmp_path):
    maxlm.train(load_config(write_config(tmp_path, "one"), ["mesh.fake_devices=4"]))
    assert len(losses(tmp_path / "one")) == 8
    for count in (2, 4):
        first, *others = finish(start_hosts(write_config(tmp_path, str(count)), count))
        assert losses(tmp_path / str(count)) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert "held" in first
        assert not any("step" in other for other in others), "one host prints"


def test_a_signal_to_one_host_stops_all_of_them_at_one_step(tmp_path):
    processes = start_hosts(write_config(tmp_path, "r", steps=100_000), 2)
    wait_for_steps(tmp_path / "r", processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert "stopped by another host (SIGTERM) after step" in said[0]
    step = json.loads((tmp_path / "r" / "summary.json").read_text())["step"]
    assert Checkpoints(str(tmp_path / "r"), CheckpointConfig()).latest() == step


def test_a_signal_while_hosts_compile_ends_all_at_once(tmp_path):
    processes = start_hosts(write_config(tmp_path, "r", steps=100_000), 2)
    log, deadline = tmp_path / "r" / "train.log", time.monotonic() + 120
    while not (log.exists() and "compiling" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # for the other host to be there, too
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert "stopped by another host (SIGTERM) before a step was finished: nothing is lost" in said[0]
    assert "step 1/" not in said[0]


def test_an_error_on_one_host_ends_all_and_is_shown_by_all(tmp_path):
    """Its own copy of the token store loses its end in the middle of the run."""
    config = write_config(tmp_path, "r", steps=100_000)
    ensure_stores(load_config(config).data)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    processes = start_hosts(config, 2, arguments={1: [f"data.stores=[{{path: {tmp_path}/copy, heldout: 0.0}}]"]})
    wait_for_steps(tmp_path / "r", processes)
    (shard,) = (tmp_path / "copy").glob("train-*.bin")
    os.truncate(shard, 1000)
    started = time.monotonic()
    said = finish(processes, [1, 1])
    assert time.monotonic() - started < 60
    assert f"cannot read {shard}: it ends before byte" in said[1]
    assert "error: host 1 (" in said[0]
    assert f"failed: StorageError: cannot read {shard}: it ends before byte" in said[0]


def test_a_killed_host_ends_the_others_and_is_named(tmp_path):
    processes = start_hosts(write_config(tmp_path, "r", steps=100_000), 2)
    wait_for_steps(tmp_path / "r", processes)
    processes[1].kill()
    said = [process.communicate(timeout=120)[0] for process in processes]
    # Where the collective fails the process ends itself; where it hangs, jax's coordination service aborts it.
    assert processes[0].returncode in (1, -signal.SIGABRT), said[0]
    assert "host 1 gave no sign of life" in said[0]


def test_hosts_that_were_asked_for_different_things_end_together(tmp_path):
    processes = start_hosts(write_config(tmp_path, "r"), 2, arguments={1: ["mesh.tensor=3"]})
    said = finish(processes, [1, 1])
    assert "failed: ConfigError: mesh fsdp 2 x tensor 3 needs 6 devices" in said[0]


@pytest.mark.parametrize("launcher", ["by hand", "slurm", "open mpi"])
def test_the_doctor_examines_all_hosts_however_they_find_each_other(launcher, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = {0: ["--json"], 1: [f"run.root={tmp_path}/file/x"]}
    processes = start_hosts(write_config(tmp_path, "r"), 2, "doctor", arguments, launcher)
    first, other = finish(processes, [1, 1])
    said = json.loads(first[first.index("{") :])
    rows = {row["name"]: row for rows in said["sections"].values() for row in rows}
    assert rows["devices"]["num_hosts"] == 2 and rows["devices"]["num_devices"] == 4
    assert rows["fsdp all-reduce"]["ok"] and rows["tensor ppermute"]["ok"]
    assert [name for name, row in rows.items() if row["ok"] is False] == ["host 1: run.root"]
    assert "software" not in other


def test_a_run_that_goes_on_saves_after_the_checkpoint_it_began_with_is_gone(tmp_path):
    config = write_config(tmp_path, "r")
    for steps in (8, 16):
        overrides = ["checkpoint.every=2", f"train.steps={steps}"]
        finish(start_hosts(config, 2, arguments={0: overrides, 1: overrides}))
    assert sorted(int(path.name) for path in (tmp_path / "r" / "checkpoints").iterdir() if path.is_dir()) == [14, 16]
