"""plan.json and the file of factors may be anything: what they say, or one of maxlm's own errors, never a traceback."""

import datetime
import json

import pytest
from fuzz_values import DEEP_JSON, JSON, NUMBERS, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm import receipt
from maxlm.config_file import ConfigError, load_config, to_yaml
from maxlm.hardware import named
from maxlm.mesh import axis_sizes
from maxlm.plan import calibrate, factors

CONFIG = load_config("configs/1b.yaml", ["mesh.fsdp=16"])
PLAN = {
    "machine": "v5litepod-16",
    "hardware": "TPU v5e",
    "dtype": "bfloat16",
    "share": 1.0,
    "num_devices": 16,
    "num_chips": 16,
    "num_slices": 1,
    "torus": [4, 4],
    "mesh": {"data": 1, "fsdp": 16},
    "since_step": 40,
    "basis": "formulas",
    "networks_known": True,
    "step_parts_s": {"products": 1.0, "wires over fsdp": None},
    "step_time_s": {"predicted": 1.0, "low": 1.0, "high": 1.5},
    "memory_bytes": {"weights": 1e9},
    "hbm_peak_bytes": 1e9,
    "hbm_bytes": 2**34,
    "mfu": {"predicted": 0.5, "low": 0.4, "high": 0.5},
    "tokens_per_s": None,
    "price": {"chip": "TPU v5e", "usd_per_chip_hour": 1.2},
    "usd_per_hour": 19.2,
    "days": {"predicted": 10.0, "low": 10.0, "high": 15.0},
    "usd": None,
}
FACTORS = {
    "TPU v5e": {
        "bfloat16": {
            "products": 1.1,
            "attention": 1.0,
            "memory": 1.5,
            "wires": 1.0,
            "overhead_s": 1e-5,
            "num_runs": 3,
            "error": 0.05,
            "left_out": 0.1,
            "spread": 0.2,
            "date": "2026-11-26",
        }
    }
}


def any_file(good):
    return (
        st.binary(max_size=60)
        | JSON.map(lambda value: json.dumps(value).encode())
        | (mutated(good) | mutated(good, NUMBERS)).map(lambda tree: json.dumps(tree).encode())
        | st.sampled_from(DEEP_JSON)
    )


@fuzz(150)
@given(any_file(PLAN))
@example(json.dumps({**PLAN, "usd_per_hour": 10**400}).encode())
@example(json.dumps({**PLAN, "since_step": "40"}).encode())
def test_a_prediction(tmp_path, data):
    (tmp_path / "plan.json").write_bytes(data)
    try:
        found = receipt.read(str(tmp_path))
    except ValueError as error:
        told(error, "plan.json")
        return
    assert found is not None and receipt.foretold(found) != ""
    record = receipt.compare(found, {"step_time_s": 2.0, "hbm_peak_bytes": 1e9, "mfu": None, "usd": 0.0})
    assert receipt.rows(record, found.basis)
    receipt.write(str(tmp_path), found)
    assert receipt.read(str(tmp_path)) == found


@fuzz(60)
@given(any_file(PLAN))
def test_a_run_that_calibrates(tmp_path, data):
    (tmp_path / "plan.json").write_bytes(data)
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    rows = [{"step": step, "loss": 1.0, "step_time_s": 2.0} for step in range(50)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = calibrate.fit([calibrate.measured(str(tmp_path))] * 3, datetime.date(2026, 11, 26))
    except ConfigError as error:
        told(error)
        return
    assert calibrate.show(found) and json.dumps(calibrate.as_json(found))


@fuzz(150)
@given(any_file(FACTORS))
def test_factors(tmp_path, data):
    (tmp_path / "calibration.json").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(factors.FILE_VARIABLE, str(tmp_path / "calibration.json"))
        try:
            known = factors.read()
        except ConfigError as error:
            told(error, "calibration.json")
            return
    chip, sizes = named("TPU v5e"), axis_sizes(CONFIG.mesh, 16)
    time = factors.predict(CONFIG, sizes, chip, True, (4, 4))
    for one in (one for each in known.values() for one in each.values()):
        assert one.applied(time, CONFIG, sizes, chip).total >= 0 and one.basis
