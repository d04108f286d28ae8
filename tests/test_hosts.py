"""Two processes train one run, as two hosts of a pod do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import MODEL

from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.config_file import parse_config, to_yaml

ROOT = Path(__file__).parent.parent


def write_config(folder, name, **train):
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text() * 4)
    tree = {
        "run": {"name": name, "root": str(folder)},
        "model": {**MODEL, "vocab_size": 257},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
        "data": {"stores": [{"path": str(folder / "store"), "text": [str(text)], "heldout": 0.0}]},
        "train": {"steps": 12, "batch_size": 8, "seq_len": 32, "compilation_cache": None, **train},
        "optim": {"learning_rate": 1e-2},
        "eval": {"sample_tokens": 0},
        "checkpoint": {"every": 1000},
    }
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(parse_config(tree)))
    return path


def start_hosts(config, count):
    """Starts `maxlm train` in `count` processes of 4 / count CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count)}
    if count > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "maxlm", "train", str(config)],
            cwd=ROOT,
            env={**env, "JAX_PROCESS_ID": str(i)} if count > 1 else env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_two_hosts_train_as_one_does(tmp_path):
    finish(start_hosts(write_config(tmp_path, "one"), 1))
    first, second = finish(start_hosts(write_config(tmp_path, "two"), 2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert "held" in first
    assert "step" not in second, "one host prints"


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_of_them_at_one_step(tmp_path):
    hosts = start_hosts(write_config(tmp_path, "r", steps=100_000), 2)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert all(host.poll() is None for host in hosts), "\n".join(finish(hosts))
        time.sleep(0.2)
    hosts[1].send_signal(signal.SIGTERM)
    said = finish(hosts)
    assert "stopped by another host" in said[0]
    step = json.loads((tmp_path / "r" / "summary.json").read_text())["step"]
    assert Checkpoints(str(tmp_path / "r"), CheckpointConfig()).latest() == step
