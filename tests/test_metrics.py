import importlib
import json
import math
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from maxlm import metrics, storage
from maxlm.config import LogConfig
from maxlm.metrics import MetricsWriter, read_metrics

LOG = LogConfig()


def write(run_dir, steps, resume_step=None, log=LOG):
    with MetricsWriter(str(run_dir), log, {"a": 1}, resume_step) as writer:
        for step in steps:
            writer.train(step, {"loss": 10.0 / step, "grad_norm": 1.0})
            if step % 2 == 0:
                writer.heldout(step, {"heldout_loss": 11.0 / step, "heldout_bits_per_byte": 1.5})


def steps_of(rows):
    return [row["step"] for row in rows]


def test_rows_come_back(tmp_path):
    write(tmp_path / "runs" / "a", range(1, 5))
    read = read_metrics(str(tmp_path / "runs" / "a"))
    assert steps_of(read.train) == [1, 2, 3, 4]
    assert [(row["step"], row["heldout_loss"]) for row in read.heldout] == [(2, 5.5), (4, 2.75)]
    assert read.train[2]["loss"] == 10.0 / 3
    assert read.train[0]["time"] > 1.7e9
    assert read.restarts == []


def test_every_row_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(str(tmp_path), LOG, {})
    writer.train(1, {"loss": 1.0})
    assert steps_of(read_metrics(str(tmp_path)).train) == [1]
    writer.close()


def test_resuming_drops_later_rows_and_marks_the_restart(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), resume_step=4)
    read = read_metrics(str(tmp_path))
    assert steps_of(read.train) == [1, 2, 3, 4, 5, 6]
    assert steps_of(read.heldout) == [2, 4, 6]
    assert read.restarts == [4]
    write(tmp_path, [1])
    assert steps_of(read_metrics(str(tmp_path)).train) == [1], "a new run starts over"


def test_a_torn_last_line_is_left_out(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 2.')
    assert steps_of(read_metrics(str(tmp_path)).train) == [1, 2, 3]
    write(tmp_path, [4], resume_step=3)
    assert steps_of(read_metrics(str(tmp_path)).train) == [1, 2, 3, 4]


def test_a_broken_line_inside_is_an_error(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is not a row of metrics: 'garbage'"):
        read_metrics(str(tmp_path))


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    with MetricsWriter(str(tmp_path), LOG, {}) as writer:
        writer.train(1, {"loss": math.nan, "grad_norm": math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is row["grad_norm"] is None
    assert math.isnan(read_metrics(str(tmp_path)).train[0]["loss"])


def test_nothing_there(tmp_path):
    assert read_metrics(str(tmp_path / "no")) == metrics.Metrics([], [], [])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, [1, 2])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.tensorboard=true needs .*pip install 'maxlm\[tensorboard\]'"):
        MetricsWriter(str(tmp_path), LogConfig(tensorboard=True), {})
    with pytest.raises(ValueError, match=r"log.wandb_project=p needs .*pip install 'maxlm\[wandb\]'"):
        MetricsWriter(str(tmp_path), LogConfig(wandb_project="p"), {})
    assert steps_of(read_metrics(str(tmp_path)).train) == [1, 2]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars in TensorBoard event files, read record by record: length, crc, data, crc."""
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX not installed; pip install 'maxlm[tensorboard]'")
    write(tmp_path, range(1, 5), log=LogConfig(tensorboard=True))
    found = events(tmp_path / "tensorboard")
    assert found["train/loss"] == [(step, pytest.approx(10.0 / step)) for step in range(1, 5)]
    assert found["heldout/loss"] == [(2, 5.5), (4, 2.75)]
    write(tmp_path, range(1, 3), log=LogConfig(tensorboard=True))
    assert [step for step, _ in events(tmp_path / "tensorboard")["train/loss"]] == [1, 2], "a new run starts over"


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb not installed; pip install 'maxlm[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = LogConfig(wandb_project="tests")
    write(tmp_path, range(1, 4), log=log)
    first_id = (tmp_path / "wandb_id.txt").read_text()
    write(tmp_path, range(3, 5), resume_step=2, log=log)
    assert (tmp_path / "wandb_id.txt").read_text() == first_id, "a resumed run is the same run"
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(path.name.endswith(first_id) for path in runs)


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a server on this machine that speaks S3."""
    moto = pytest.importorskip("moto.server", reason="moto not installed; install with: pip install 'maxlm[test]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics-bucket", method="PUT")):
        pass
    yield "s3://metrics-bucket"
    server.stop()


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_a_run_in_a_bucket(bucket, monkeypatch):
    run_dir = storage.join(bucket, "runs", "a")
    write(run_dir, range(1, 6), log=LogConfig(tensorboard=True))
    assert steps_of(read_metrics(run_dir).train) == [1, 2, 3, 4, 5]
    assert storage.list_dir(f"{run_dir}/tensorboard")
    write(run_dir, range(4, 6), resume_step=3)
    assert steps_of(read_metrics(run_dir).train) == [1, 2, 3, 4, 5]
    assert read_metrics(run_dir).restarts == [3]

    writer = MetricsWriter(run_dir, LOG, {})
    writer.train(1, {"loss": 1.0})
    assert read_metrics(run_dir).train == [], "not due yet"
    monkeypatch.setattr(metrics, "UPLOAD_EVERY_S", 0.0)
    writer.train(2, {"loss": 1.0})
    until = time.monotonic() + 60
    while steps_of(read_metrics(run_dir).train) != [1, 2] and time.monotonic() < until:
        time.sleep(0.02)
    assert steps_of(read_metrics(run_dir).train) == [1, 2], "uploaded while the run goes on"
    writer.close()
