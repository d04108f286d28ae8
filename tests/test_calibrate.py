"""maxlm plan --calibrate: factors that runs teach, the file that keeps them, and the plans that use them."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from gcs import gcs_bucket

from maxlm import receipt, storage
from maxlm.cli import main
from maxlm.config_file import ConfigError, load_config, to_yaml
from maxlm.hardware import named
from maxlm.mesh import axis_sizes
from maxlm.plan import calibrate, factors
from maxlm.plan.calibrate import OVERHEAD_S, PARTS, Measured, fit
from maxlm.plan.factors import predict
from maxlm.receipt import Prediction

TODAY = datetime.date(2026, 11, 26)
TRUTH = {"products": 1.2, "attention": 2.0, "memory": 1.5, "wires": 3.0, "overhead": 2.0}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    path = tmp_path / "settings" / "calibration.json"
    monkeypatch.setenv("MAXLM_CALIBRATION", str(path))
    return path


def runs(count, truth=TRUTH, hardware="TPU v5e", noise=0.0):
    """Runs of different work on hardware of which the truth is known."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        work = dict(zip(PARTS, rng.uniform(0.05, 1.0, len(PARTS)).tolist(), strict=True))
        seconds = sum(truth[part] * work[part] for part in PARTS) * (1 + noise * rng.standard_normal())
        found.append(Measured(f"run{i}", hardware, "bfloat16", work, seconds))
    return found


# ---- the fit


def test_one_run_teaches_one_factor_for_all():
    (run,) = runs(1)
    known = fit([run], TODAY).factors
    one = run.step_time_s / sum(run.work[part] for part in PARTS[:-1])
    assert [known.products, known.attention, known.memory, known.wires] == pytest.approx([one] * 4)
    assert known.overhead_s == pytest.approx(0, abs=1e-9)


def test_many_runs_teach_each_part_its_own():
    known = fit(runs(200), TODAY).factors
    assert {part: getattr(known, part) for part in PARTS[:-1]} == pytest.approx(
        {part: TRUTH[part] for part in PARTS[:-1]}, rel=0.03
    )
    assert known.overhead_s == pytest.approx(TRUTH["overhead"] * OVERHEAD_S, rel=0.1)


def test_runs_that_were_not_seen_are_predicted_better_than_before():
    seen, unseen = runs(40, noise=0.05)[:8], runs(40)[20:]
    found = fit(seen, TODAY)
    before = calibrate.mean_error([sum(run.work[part] for part in PARTS[:-1]) / run.step_time_s for run in unseen])
    after = calibrate.mean_error([calibrate.ratio(found.factors, run) for run in unseen])
    assert after < 0.15 < 0.3 < before
    assert found.before and calibrate.mean_error(found.after) < calibrate.mean_error(found.before)
    assert calibrate.mean_error(found.after) < found.factors.left_out, "a run that is left out is not known by heart"


def test_no_part_takes_less_than_no_time():
    known = fit(runs(50, {**TRUTH, "wires": -1.0}), TODAY).factors
    assert known.wires == 0.0 and min(known.products, known.attention, known.memory) > 0


def test_too_few_runs_are_not_left_out():
    assert fit(runs(2), TODAY).left_out is None and fit(runs(2), TODAY).factors.spread == calibrate.SPREAD
    assert len(fit(runs(3), TODAY).left_out) == 3
    exact = fit(runs(200), TODAY)
    assert exact.factors.spread >= calibrate.LEAST_SPREAD


def test_where_the_unit_is_arbitrary_there_is_no_error_before():
    found = fit(runs(3, hardware="cpu with 64 cores"), TODAY)
    assert found.before is None and "predicted/measured before" in calibrate.show(found)
    assert "before 0" not in calibrate.show(found) and "which is arbitrary here" in calibrate.show(found)


# ---- the file


def test_factors_are_kept_beside_those_of_other_hardware(kept):
    mine, other = fit(runs(3), TODAY).factors, fit(runs(5), TODAY).factors
    factors.write({("TPU v5e", "bfloat16"): mine, ("H100", "bfloat16"): mine})
    factors.write({("TPU v5e", "float32"): other})
    factors.write({("H100", "bfloat16"): other})
    assert factors.read() == {"TPU v5e": {"bfloat16": mine, "float32": other}, "H100": {"bfloat16": other}}


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MAXLM_CALIBRATION")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert factors.file_path() == f"{tmp_path}/maxlm/calibration.json" and factors.read() == {}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert factors.file_path() == "/home/someone/.config/maxlm/calibration.json"
    monkeypatch.setenv("MAXLM_CALIBRATION", "")
    assert factors.file_path() is None and factors.read() == {}


@pytest.mark.parametrize("text", ["", "[]", '{"H100": 3}', '{"H100": {"bfloat16": {"products": -1}}}'])
def test_a_damaged_file_is_one_sentence(kept, text, capsys):
    kept.parent.mkdir()
    kept.write_text(text)
    with pytest.raises(ConfigError, match="calibration.json is damaged.*remove it"):
        factors.read()
    assert main(["plan", "configs/1b.yaml", "--on", "v5e-16", "--compile", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


# ---- runs


def run_folder(path, seconds, *overrides, steps=8, **changes):
    """What a run of configs/1b.yaml on 16 TPU v5e leaves, with steps of so many times the formulas' seconds."""
    config = load_config("configs/1b.yaml", ["mesh.fsdp=16", *overrides])
    sizes = axis_sizes(config.mesh, 16)
    step_s = seconds * predict(config, sizes, named("TPU v5e"), True, (4, 4)).total
    plan = {
        "machine": "v5litepod-16",
        "hardware": "TPU v5e",
        "dtype": "bfloat16",
        "share": 1.0,
        "num_devices": 16,
        "num_chips": 16,
        "num_slices": 1,
        "torus": [4, 4],
        "mesh": sizes,
        "since_step": 0,
        **changes,
    }
    path.mkdir()
    receipt.write(str(path), Prediction(**plan))
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [{"step": s, "loss": 1.0, "step_time_s": 60.0 if s == 1 else step_s} for s in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_plans_use_what_runs_have_taught_and_say_so(kept, tmp_path, capsys):
    arguments = ["plan", "configs/1b.yaml", "--on", "v5e-16", "--compile", "0", "--top", "1", "--json"]
    main(arguments)
    before = json.loads(capsys.readouterr().out)["plans"][0]
    assert main(["plan", "--calibrate", run_folder(tmp_path / "a", 1.3), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(kept) and told["fits"][0]["factors"]["products"] == pytest.approx(1.3)
    assert told["fits"][0]["before"] == pytest.approx([1 / 1.3])
    main(arguments)
    found = json.loads(capsys.readouterr().out)
    after = found["plans"][0]
    assert after["overrides"] == before["overrides"] and after["basis"] == "formulas, 1 run"
    measured = 1.3 * sum(before["step_parts_s"].values())
    assert sum(after["step_parts_s"].values()) == pytest.approx(measured)
    assert after["step_time_s"] == pytest.approx({"low": measured / 1.25, "high": measured * 1.25})
    assert any(note.startswith("TPU v5e, bfloat16: by formulas, fitted to 1 run on ") for note in found["notes"])
    main(["plan", "configs/1b.yaml", "--on", "v5p-16", "--compile", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["plans"][0]["basis"] == "formulas", "of other chips nothing is known"


def test_runs_of_different_types_teach_their_own(kept, tmp_path, capsys):
    runs = [run_folder(tmp_path / "a", 1.3), run_folder(tmp_path / "b", 2.0, "model.dtype=float32")]
    runs.append(run_folder(tmp_path / "c", 1.6, "quant.mode=int8"))
    assert main(["plan", "--calibrate", *runs]) == 0
    known = factors.read()["TPU v5e"]
    fitted = {name: known[name].products for name in ("bfloat16", "float32", "int8")}
    assert fitted == {"bfloat16": pytest.approx(1.3), "float32": pytest.approx(2.0), "int8": pytest.approx(1.6)}
    said = capsys.readouterr()
    assert "TPU v5e, float32: products 2" in said.out and "replaced" not in said.err


def test_fewer_runs_in_place_of_more_are_told_of(kept, tmp_path, capsys):
    runs = [run_folder(tmp_path / "a", 1.3), run_folder(tmp_path / "b", 1.4)]
    main(["plan", "--calibrate", *runs])
    assert main(["plan", "--calibrate", runs[0]]) == 0
    assert "what 2 runs taught on" in (err := capsys.readouterr().err) and "is replaced by what 1 taught" in err


def test_of_int8_products_that_no_run_has_taught_those_of_bfloat16_are_taken(kept, tmp_path, capsys):
    arguments = ["plan", "configs/1b.yaml", "quant.mode=int8", "--on", "v5e-16", "--compile", "0", "--top=1", "--json"]
    main(arguments)
    before = json.loads(capsys.readouterr().out)["plans"][0]
    main(["plan", "--calibrate", run_folder(tmp_path / "a", 1.3)])
    capsys.readouterr()
    main(arguments)
    found = json.loads(capsys.readouterr().out)
    ratio = sum(found["plans"][0]["step_parts_s"].values()) / sum(before["step_parts_s"].values())
    assert ratio == pytest.approx(1.3)
    (note,) = [note for note in found["notes"] if "fitted to 1 run" in note]
    assert note.startswith("TPU v5e, int8: by formulas") and note.endswith(", of bfloat16 products")


@pytest.mark.parametrize(
    ("machine", "setting", "noted"),
    [
        ("h100:8", "quant.mode=fp8", "H100: fp8 products are taken for bfloat16 ones"),
        ("h100:8", "model.dtype=float32", "H100: float32 products are taken for bfloat16 ones"),
        ("h100:8", "quant.mode=none", None),
        ("v5e-16", "model.dtype=float32", None),
    ],
)
def test_products_without_a_rate_are_told_of(kept, capsys, machine, setting, noted):
    assert main(["plan", "configs/1b.yaml", setting, "--on", machine, "--compile=0", "--top=1"]) == 0
    out = capsys.readouterr().out
    assert noted in out if noted else "are taken for" not in out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 3}, "has the times of 2 steps; 3 are needed"),
        ({"since_step": 6}, "has the times of 1 steps"),
        ({"overrides": ["mesh.slices=2", "mesh.fsdp=8"]}, "crosses a network of unknown speed"),
        ({"num_devices": 12}, "mesh fsdp 16 needs"),
    ],
    ids=str,
)
def test_runs_that_teach_nothing_are_refused(kept, tmp_path, capsys, changes, sentence):
    overrides = changes.pop("overrides", [])
    assert main(["plan", "--calibrate", run_folder(tmp_path / "a", 1.3, *overrides, **changes)]) == 2
    assert sentence in capsys.readouterr().err and not kept.exists()


def test_a_run_is_read_where_it_was_written_also_in_a_bucket(kept, tmp_path, capsys):
    run = run_folder(tmp_path / "a", 1.3)
    with gcs_bucket() as bucket:
        for file in ("plan.json", "config.yaml", "metrics.jsonl"):
            storage.write_bytes(f"{bucket}/runs/a/{file}", Path(run, file).read_bytes())
        assert main(["plan", "--calibrate", f"{bucket}/runs/a"]) == 0
    assert factors.read()["TPU v5e"]["bfloat16"].products == pytest.approx(1.3)


@pytest.mark.parametrize("text", [None, "", "model: 3", "model: {flux: 1}", "[1"])
def test_a_config_that_cannot_be_read_is_named_with_its_run(kept, tmp_path, capsys, text):
    run = run_folder(tmp_path / "a", 1.3)
    Path(run, "config.yaml").unlink() if text is None else Path(run, "config.yaml").write_text(text)
    assert main(["plan", "--calibrate", run_folder(tmp_path / "b", 1.3), run]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}/config.yaml") and err.count("\n") == 1 and not kept.exists()


def test_what_is_no_run_is_refused(kept, tmp_path, capsys):
    assert main(["plan", "--calibrate", str(tmp_path)]) == 2
    assert "has no plan.json" in capsys.readouterr().err
    assert main(["plan", "configs/1b.yaml", "--calibrate", run_folder(tmp_path / "a", 1.3)]) == 2
    assert "--calibrate takes runs alone" in capsys.readouterr().err and not kept.exists()
    assert main(["plan"]) == 2
    assert "needs CONFIG and --on MACHINE, or --calibrate RUN" in capsys.readouterr().err


def test_the_bubble_of_a_pipeline_grows_with_what_it_waits_for():
    config = load_config("configs/1b.yaml", ["mesh.fsdp=4", "mesh.stage=4", "train.grad_accum=8"])
    sizes, chip = axis_sizes(config.mesh, 16), named("TPU v5e")
    time, known = predict(config, sizes, chip, True, (4, 4)), fit(runs(1), TODAY).factors
    fitted, one = known.applied(time, config, sizes, chip), known.products
    assert fitted.bubble == pytest.approx(one * time.bubble) and fitted.total == pytest.approx(one * time.total)
    work = calibrate.work_of(time, config, sizes, chip)
    assert sum(work[part] for part in PARTS[:-1]) == pytest.approx(time.total), "its parts are the formulas' time"
