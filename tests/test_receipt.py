"""Receipts: what a run is predicted to take, what it costs while it goes on, and both side by side at its end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from helpers import MODEL

import maxlm
from maxlm import goodput, receipt
from maxlm.cli import main
from maxlm.config_file import load_config
from maxlm.ending import hbm_peak_bytes
from maxlm.goodput import Start
from maxlm.mesh import axis_sizes
from maxlm.metrics import Metrics, read_metrics
from maxlm.plan import factors
from maxlm.plan import receipt as at_start
from maxlm.plan.factors import Factors
from maxlm.plan.search import search
from maxlm.plan.targets import target
from maxlm.report import report_data, text_summary

PRICES = "chip,provider,region,kind,usd_per_chip_hour,date,source\ncpu,me,desk,on-demand,3.6,2026-11,mine\n"


def slice_of(kind, *shape, platform="tpu", **more):
    """Devices as JAX shows those of a slice, four to a host."""
    places = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])]
    return [
        SimpleNamespace(device_kind=kind, platform=platform, coords=p, process_index=i // 4, **more)
        for i, p in enumerate(places)
    ]


def gpus(kind, count, platform="gpu"):
    return [SimpleNamespace(device_kind=kind, platform=platform, process_index=i // 8) for i in range(count)]


def predicted(devices, *overrides, first=0, tell=pytest.fail):
    config = load_config("configs/1b.yaml", list(overrides))
    return at_start.predict(config, devices, axis_sizes(config.mesh, len(devices)), first, tell)


# ---- at the start


def test_a_run_is_predicted_as_it_was_planned():
    plan = search(load_config("configs/1b.yaml", []), target("v5e-16").place)[0]
    found = predicted(slice_of("TPU v5 lite", 4, 4, 1), *plan.overrides)
    assert (found.machine, found.num_chips, found.hardware) == ("v5litepod-16", 16, "TPU v5e")
    assert found.step_time_s.predicted == pytest.approx(plan.time.total)
    assert found.step_time_s.low <= found.step_time_s.predicted < found.step_time_s.high
    assert sum(found.step_parts_s.values()) == pytest.approx(plan.time.total)
    assert found.hbm_peak_bytes == pytest.approx(plan.memory.peak) == pytest.approx(sum(found.memory_bytes.values()))
    assert (found.usd_per_hour, found.price["provider"], found.basis) == (pytest.approx(16 * 1.20), "GCP", "formulas")
    hours = plan.config.train.num_steps * plan.time.total / 3600
    assert found.days.predicted == pytest.approx(hours / 24) and found.usd.predicted == pytest.approx(hours * 16 * 1.20)
    assert 0 < found.mfu.low < found.mfu.predicted <= found.mfu.high < 1


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        (slice_of("TPU v5", 4, 4, 4, num_cores=2), "v5p-128"),
        (slice_of("TPU v6 lite", 2, 4, 1), "v6e-8"),
        (gpus("NVIDIA H100 80GB HBM3", 16), "h100:16"),
        (gpus("NVIDIA GeForce RTX 9090", 2), "2 x NVIDIA GeForce RTX 9090"),
        (gpus("cpu", 8, "cpu"), f"1 x cpu with {at_start._num_cores()} cores"),
        (gpus("cpu", 16, "cpu"), f"2 x cpu with {at_start._num_cores()} cores"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_machines_have_the_names_that_people_call_them(devices, name):
    assert predicted(devices, "mesh.fsdp=-1", "train.batch_size=64", "train.grad_accum=1").machine == name


def test_of_hardware_without_figures_only_memory_is_known(monkeypatch, tmp_path):
    found = predicted(gpus("cpu", 8, "cpu"), "mesh.fsdp=8")
    assert found.hbm_peak_bytes > 0 and str(found.basis).startswith("nothing yet: maxlm plan --calibrate RUN teaches")
    assert (found.step_time_s, found.mfu, found.usd, found.days, found.usd_per_hour) == (None,) * 5, "and not 0"
    monkeypatch.setenv("MAXLM_CALIBRATION", str(tmp_path / "c.json"))
    known = Factors(
        **dict.fromkeys(("products", "attention", "memory", "wires"), 2.0),
        overhead_s=0.5,
        num_runs=4,
        error=0.1,
        left_out=0.1,
        spread=0.25,
        date="2026-11-26",
    )
    factors.write({(found.hardware, "bfloat16"): known})
    taught = predicted(gpus("cpu", 8, "cpu"), "mesh.fsdp=8")
    assert taught.step_time_s.high == pytest.approx(1.25 * taught.step_time_s.predicted)
    assert taught.step_time_s.low == pytest.approx(taught.step_time_s.predicted / 1.25)
    config = load_config("configs/1b.yaml", [])
    visits = config.model.num_layers * config.train.grad_accum
    assert taught.step_parts_s["overhead"] == 0.5 * 8 * visits, "eight devices take turns on the same cores"
    assert taught.mfu is None, "there still is no peak"
    assert taught.basis == "formulas, fitted to 4 runs on 2026-11-26"


def test_what_crosses_an_unknown_network_is_a_lower_bound():
    found = predicted(gpus("NVIDIA H100 80GB HBM3", 16), "mesh.fsdp=16")
    assert found.networks_known is False and found.step_parts_s["wires over fsdp"] is None
    assert ", at least" in str(receipt.foretold(found))


def test_adapters_are_predicted_as_they_were_planned():
    lora = ["lora={rank: 4, base_dtype: bfloat16}", "train.init_from=r"]
    plan = search(load_config("configs/1b.yaml", lora), target("v5e-4").place)[0]
    found, all_weights = (predicted(slice_of("TPU v5 lite", 2, 2, 1), *plan.overrides, *more) for more in (lora, []))
    assert found.step_time_s.predicted == pytest.approx(plan.time.total)
    assert found.hbm_peak_bytes == pytest.approx(plan.memory.peak) and found.hbm_peak_bytes < all_weights.hbm_peak_bytes
    assert found.memory_bytes["optimizer"] < 0.02 * all_weights.memory_bytes["optimizer"]
    flops = [r.mfu.predicted * r.step_time_s.predicted for r in (found, all_weights)]
    assert 0.6 < flops[0] / flops[1] < 0.8, "no gradients of frozen weights among the FLOPs of an MFU"


def test_a_broken_file_of_the_user_does_not_stop_a_run(tmp_path, monkeypatch):
    for variable, name in (("MAXLM_PRICES", "p.csv"), ("MAXLM_CALIBRATION", "c.json")):
        (tmp_path / name).write_text("{")
        monkeypatch.setenv(variable, str(tmp_path / name))
    told = list[str]()
    found = predicted(slice_of("TPU v5 lite", 2, 2, 1), "mesh.fsdp=4", tell=told.append)
    assert found.price is None and found.usd is None and found.step_time_s is not None
    assert len(told) == 2 and "p.csv" in told[0] and "c.json is damaged" in told[1]


def test_devices_that_nobody_has_seen_do_not_stop_a_run(tmp_path):
    told, config = list[str](), load_config("configs/1b.yaml", ["mesh.fsdp=1"])
    odd = [SimpleNamespace(device_kind="odd")]
    assert at_start.start(config, odd, axis_sizes(config.mesh, 1), str(tmp_path), 0, 0, told.append) is None
    assert len(told) == 1 and told[0].startswith("nothing is predicted for this run")


def test_a_prediction_holds_from_where_it_was_first_made(tmp_path):
    def start(first, *overrides):
        config = load_config("configs/1b.yaml", ["mesh.fsdp=16", *overrides])
        devices = slice_of("TPU v5 lite", 4, 4, 1)
        begun = None if first else 0
        at_start.start(config, devices, axis_sizes(config.mesh, 16), str(tmp_path), first, begun, pytest.fail)
        return receipt.read(str(tmp_path)).since_step

    assert start(0) == 0
    assert start(40) == 0, "the same again"
    assert start(60, "mesh.fsdp=4", "mesh.data=4") == 60, "another mesh: what was measured before says nothing of it"
    assert start(80, "mesh.fsdp=4", "mesh.data=4") == 60
    assert start(20, "mesh.fsdp=4", "mesh.data=4") == 20, "an older checkpoint: its steps are done again, on this mesh"


def test_a_branch_is_predicted_for_its_own_steps(tmp_path):
    config = load_config("configs/1b.yaml", ["mesh.fsdp=16", "train.steps=1000", "train.tokens=null"])
    devices, sizes = slice_of("TPU v5 lite", 4, 4, 1), axis_sizes(config.mesh, 16)
    whole = at_start.start(config, devices, sizes, str(tmp_path / "run"), 0, 0, pytest.fail)
    branch = at_start.start(config, devices, sizes, str(tmp_path / "branch"), 900, 900, pytest.fail)
    resumed = at_start.start(config, devices, sizes, str(tmp_path / "branch"), 950, None, pytest.fail)
    assert branch.usd.predicted == pytest.approx(whole.usd.predicted / 10) and branch.days.low < whole.days.low / 9
    assert branch.step_time_s == whole.step_time_s
    assert resumed == branch, "what was predicted for it holds when it goes on"


@pytest.mark.parametrize(("devices", "chips"), [(1, 1), (2, 1), (5, 3)])
def test_half_a_chip_is_paid_for_as_one(devices, chips):
    half = slice_of("TPU7x", devices, 1, 1, num_cores=1)
    assert (
        predicted(half, f"mesh.fsdp={devices}", f"train.batch_size={devices}", "train.grad_accum=1").num_chips == chips
    )


# ---- at the end


def test_step_times_leave_out_what_compiles_and_what_was_predicted_otherwise():
    rows = [{"step": s, "loss": 1.0, "step_time_s": float(s)} for s in range(1, 13)]
    rows[10]["step_time_s"], rows[9]["skipped"] = math.nan, True
    assert receipt.step_times(Metrics(rows, [], [5, 7]), 5) == [7.0, 9.0, 12.0]


def test_measured_and_predicted_side_by_side():
    found = predicted(slice_of("TPU v5 lite", 4, 4, 1), "mesh.fsdp=16")
    seconds = found.step_time_s.predicted * 1.2
    record = receipt.compare(found, {"step_time_s": seconds, "hbm_peak_bytes": None, "mfu": found.mfu.predicted / 1.2})
    assert record["step_time_s_ratio"] == pytest.approx(1.2) and record["mfu_ratio"] == pytest.approx(1 / 1.2)
    assert record["predicted_hbm_peak_bytes"] == found.hbm_peak_bytes and "hbm_peak_bytes" not in record
    assert "usd" not in record and record["predicted_usd"] == found.usd.predicted
    rows = receipt.rows(record, found.basis)
    assert rows["step time"].endswith(", 1.20 times that") and "HBM peak" not in rows, "it was not measured"
    assert rows["predicted by"] == "formulas"
    assert receipt.compare(None, {"step_time_s": 2.0}) == {"step_time_s": 2.0}
    assert receipt.rows({"step_time_s": 2.0}, None) == {"step time": "2.00 s"}
    assert receipt.rows({}, None) == {}


def test_the_fullest_device_that_tells_counts():
    def device(held):
        return SimpleNamespace(memory_stats=lambda: held and {"peak_bytes_in_use": held, "bytes_limit": 100})

    assert hbm_peak_bytes([device(3), device(7), device(None)]) == 7.0
    assert hbm_peak_bytes([device(None)]) is None and hbm_peak_bytes(jax.devices()) is None, "CPUs do not tell"


def test_dollars_are_those_of_all_starts():
    def start(began, devices, seconds, usd_per_hour):
        return Start(began, 0, 1, began + seconds, devices, {"step": seconds}, usd_per_hour)

    assert goodput.summarize([start(0.0, 8, 3600.0, None)]).usd is None
    moved = [start(0.0, 8, 3600.0, 40.0), start(9000.0, 4, 1800.0, 5.0)]
    assert goodput.summarize(moved).usd == 40 + 5 / 2, "each at its own price, and nothing between them"
    began_without = [start(0.0, 8, 3600.0, None), start(9000.0, 4, 1800.0, 5.0)]
    assert goodput.summarize(began_without).usd == 10 + 5 / 2, "at the price of a device that is known by now"
    assert goodput.rows(goodput.summarize(moved))["cost"].startswith("$42.50")


def config(tmp_path, **train):
    return maxlm.parse_config(
        {
            "run": {"name": "r", "root": str(tmp_path)},
            "model": {**MODEL, "vocab_size": 257, "num_layers": 1},
            "mesh": {"data": 2, "fsdp": 1, "fake_devices": 2},
            "data": {"stores": [{"path": f"{tmp_path}/store", "text": [__file__], "heldout": 0.0}]},
            "train": {"steps": 8, "batch_size": 8, "seq_len": 32, "compilation_cache": None, **train},
            "optim": {"learning_rate": 1e-2, "schedule": {"name": "constant"}},
            "eval": {"sample_tokens": 0},
            "checkpoint": {"every": 2},
        }
    )


@pytest.mark.slow
def test_a_run_is_priced_stopped_resumed_calibrated_with_and_predicted(tmp_path, monkeypatch, capsys):
    (tmp_path / "prices.csv").write_text(PRICES)
    monkeypatch.setenv("MAXLM_PRICES", str(tmp_path / "prices.csv"))
    monkeypatch.setenv("MAXLM_CALIBRATION", str(tmp_path / "calibration.json"))
    run = str(tmp_path / "r")
    maxlm.train(config(tmp_path), callbacks=[lambda step, _: step == 3])
    first = goodput.summarize(goodput.read(run))
    said = capsys.readouterr().out
    assert " so far   " in said and "predicted" not in said and "cost " in said, (
        "a step line and the end of a start say what was spent"
    )
    assert first.usd == pytest.approx(first.device_hours / 2 * 3.6), "a host is paid for, not its two devices"

    maxlm.train(config(tmp_path))
    said, known = capsys.readouterr().out, receipt.read(run)
    assert known.since_step == 0 and known.step_time_s is None and known.usd_per_hour == 3.6
    assert known.price["region"] == "desk"
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row.get("receipt"))
    times = receipt.step_times(read_metrics(run), 0)
    assert len(times) == 6 and last["step_time_s"] == pytest.approx(receipt.median(times))
    assert first.usd < last["usd"] <= goodput.summarize(goodput.read(run)).usd, "earlier starts count"
    assert "predicted_step_time_s" not in last and "hbm_peak_bytes" not in last, "a CPU does not tell, and is not known"

    assert main(["plan", "--calibrate", run]) == 0
    assert "maxlm plan and maxlm train use it" in capsys.readouterr().out
    maxlm.train(config(tmp_path, steps=12))
    said, known = capsys.readouterr().out, receipt.read(run)
    assert known.since_step == 8 and known.step_time_s.predicted == pytest.approx(receipt.median(times))
    assert known.usd.predicted == pytest.approx(12 * receipt.median(times) / 3600 * 3.6)
    assert "by formulas, fitted to 1 run on " in said and " times that" in said
    told = report_data([run])["runs"][0]
    assert told["receipt"]["step_time_s_ratio"] > 0 and "Predicted and measured" in Path(run, "report.html").read_text()
    assert "; predicted " in text_summary(run)


@pytest.mark.slow
def test_a_run_of_adapters_is_predicted_measured_and_calibrated_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAXLM_CALIBRATION", str(tmp_path / "calibration.json"))
    maxlm.train(config(tmp_path))
    base, run = str(tmp_path / "r"), str(tmp_path / "adapters")
    assert main(["plan", "--calibrate", base]) == 0
    tree = config(tmp_path, init_from=base).model_dump(mode="json")
    capsys.readouterr()
    maxlm.train(maxlm.parse_config({**tree, "run": {**tree["run"], "name": "adapters"}, "lora": {"rank": 4}}))
    known, all_weights = receipt.read(run), receipt.read(base)
    assert "; predicted " in capsys.readouterr().out and known.basis.startswith("formulas, fitted to 1 run on ")
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row.get("receipt"))
    assert last["predicted_step_time_s"] == known.step_time_s.predicted
    assert last["step_time_s_ratio"] == pytest.approx(last["step_time_s"] / known.step_time_s.predicted)
    assert known.memory_bytes["optimizer"] < 0.6 * all_weights.memory_bytes["optimizer"], "at rank 4 of a small model"
    assert main(["plan", "--calibrate", base, run]) == 0
    assert "fitted to 2 runs" in factors.read()[known.hardware]["float32"].basis
