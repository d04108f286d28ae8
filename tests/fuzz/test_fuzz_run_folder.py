"""Run folders may be anything: a result or one of maxlm's own errors, never a traceback."""

import contextlib
import io
import json
from pathlib import Path

import yaml
from fuzz_values import DEEP_JSON, FULL, JSON, MINIMAL, NUMBERS, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.config import LogConfig
from maxlm.config_file import ConfigError, parse_config, to_yaml
from maxlm.metrics import MetricsWriter, read_metrics
from maxlm.report import report_data, text_summary, write_report
from maxlm.run_folder import RunFolder, identity

SUMMARY = {
    "status": "complete",
    "step": 2,
    "params": 1000,
    "flops_per_token": 6000.0,
    "peak_flops": None,
    "mesh": {"data": 2, "fsdp": 4},
    "num_devices": 8,
    "device_kind": "cpu",
    "bytes_per_device": 3 * 2**20,
    "advice": None,
    "first_step_s": 9.0,
    "wall_s": 75.0,
    "checkpoint": "runs/a/checkpoints/2",
    "final": {"train_loss": 2.0, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.5},
    "baselines": {"unigram": 2.75, "trigram": 1.5},
    "prompt": "Once",
    "sample": "upon a time",
}
ROWS = [
    {"step": 1, "loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_s": 9.0, "step_time_s": 9, "time": 1},
    {"step": 1, "restart": True, "time": 2.0},
    {"step": 2, "loss": None, "grad_norm": 0.5, "tokens_per_s": 9.0, "step_time_s": 1, "mfu": 0.1, "time": 3.0},
    {"step": 2, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.25, "time": 4.0},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {"config.yaml": to_yaml(parse_config(yaml.safe_load(MINIMAL))).encode(), "metrics.jsonl": lines(ROWS)}
GOOD |= {"summary.json": json.dumps(SUMMARY).encode(), "identity.json": b"{}"}
RUN_FILES = (
    st.tuples(
        st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json"]),
        st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()) | st.sampled_from(DEEP_JSON),
    )
    | mutated(SUMMARY).map(lambda tree: ("summary.json", json.dumps(tree).encode()))
    | mutated(ROWS).map(lambda rows: ("metrics.jsonl", lines(rows)))
    | mutated(FULL).map(lambda tree: ("config.yaml", yaml.safe_dump(tree).encode("utf-8", "surrogatepass")))
)


def run_with(folder: Path, name: str, data: bytes) -> str:
    for other, good in GOOD.items():
        (folder / other).write_bytes(data if other == name else good)
    return str(folder)


@fuzz(100)
@given(RUN_FILES)
@example(("summary.json", b"[]"))
@example(("summary.json", b'{"step": "1", "status": 3}'))
@example(("summary.json", json.dumps({**SUMMARY, "params": 10**400}).encode()))
@example(("summary.json", json.dumps({**SUMMARY, "mesh": [2]}).encode()))
@example(("metrics.jsonl", b'{"step": Infinity}\n{"step": 1}\n'))
@example(("metrics.jsonl", lines([{"step": "1", "loss": 1.0}])))
@example(("metrics.jsonl", lines([{"step": 1, "loss": "x"}])))
@example(("metrics.jsonl", lines([{"step": 1, "loss": 10**400}] * 2)))
@example(("metrics.jsonl", lines([{"step": 1, "heldout_loss": []}])))
@example(("config.yaml", b"run: [a]"))
@example(("config.yaml", b"run: {name: [a]}"))
@example(("config.yaml", b"train: [a]"))
@example(("config.yaml", b"train: {batch_size: aaaaaaaaaa, seq_len: 1000000000}"))
@example(("config.yaml", b"train: {steps: x, tokens: y}"))
@example(("config.yaml", b"model: 3\ntrain: 3"))
@example(("config.yaml", b"a: 2001-99-99"))
@example(("config.yaml", b"? [a]\n: 1"))
def test_a_report_of_any_run_folder(tmp_path, file):
    run = run_with(tmp_path, *file)
    try:
        assert text_summary(run).encode()
        assert json.dumps(report_data([run]))
    except ValueError as error:
        told(error, file[0])


@fuzz(3)
@given(
    mutated(SUMMARY).map(lambda tree: ("summary.json", json.dumps(tree).encode()))
    | mutated(ROWS, NUMBERS).map(lambda rows: ("metrics.jsonl", lines(rows)))
    | mutated(FULL).map(lambda tree: ("config.yaml", yaml.safe_dump(tree).encode("utf-8", "surrogatepass")))
)
@example(("metrics.jsonl", lines([{"step": s, "loss": 1e308} for s in range(3)])))
@example(("metrics.jsonl", lines([{"step": 2**62, "loss": -1e308}, {"step": 0, "loss": 1e308}])))
@example(("summary.json", json.dumps({**SUMMARY, "baselines": {"a": -1e308, "b": float("inf")}}).encode()))
def test_a_drawn_report_of_any_run_folder(tmp_path, file):
    run = run_with(tmp_path, *file)
    try:
        write_report([run])
    except ValueError as error:
        told(error, file[0])


@fuzz(100)
@given(
    st.binary(max_size=60) | mutated(SUMMARY).map(lambda tree: json.dumps(tree).encode()) | st.sampled_from(DEEP_JSON)
)
@example(b"[]")
@example(b'{"status": "complete", "step": 10}')
def test_a_resume_reads_any_summary(tmp_path, data):
    config = parse_config(yaml.safe_load(MINIMAL), [f"run.root={tmp_path}"])
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "summary.json").write_bytes(data)
    found = RunFolder(config).read_summary()
    assert isinstance(found.get("wall_s", 0.0) + 1.0, float)
    assert all(f"{value:.4f}" for value in found.get("final", {}).values())
    RunFolder(config).write_summary({**found, "step": 3})


@fuzz(100)
@given(
    st.binary(max_size=60)
    | mutated({"model": {"a": 1}, "data": {}, "train": {"seed": 0}}).map(lambda tree: json.dumps(tree).encode())
    | st.sampled_from(DEEP_JSON)
)
@example(b"[]")
@example(b"9" * 5000)
@example(b'{"model": "\\ud800"}')
def test_a_resume_with_any_identity(tmp_path, data):
    config = parse_config(yaml.safe_load(MINIMAL), [f"run.root={tmp_path}"])
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "identity.json").write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()):
        for allowed in ((), ("model", "data", "train", "optim")):
            with contextlib.suppress(ConfigError):
                RunFolder(config).check(identity(config, {"stores": []}), allowed)


@fuzz(60)
@given(st.lists(st.binary(max_size=30) | mutated(ROWS).map(lines), max_size=4).map(b"\n".join))
@example(b"garbage\n" + lines(ROWS))
@example(b"\0" * 4096 + b"\n" + lines(ROWS))
@example(lines([{"step": "2", "loss": 1.0}, *ROWS]))
@example(lines([{"step": 1, "loss": 10**400}, *ROWS]))
def test_a_resume_with_any_metrics(tmp_path, data):
    """Metrics are a record: what is no row is left out, and kept beside, and the run goes on."""
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with MetricsWriter(str(tmp_path), LogConfig(), {}, resume_step=2) as writer:
        writer.train(3, {"loss": 1.0})
    read = read_metrics(str(tmp_path))
    assert read.train[-1]["step"] == 3
    assert read.restarts[-1] == 2
