"""What maxlm plan looks for: numbers of a run only where that is asked for."""

import json

import pytest

from maxlm.cli import main
from maxlm.config_file import load_config
from maxlm.plan import advice
from maxlm.plan.search import search
from maxlm.plan.targets import target

SMALL_BATCH = ["train.batch_size=64", "train.grad_accum=1"]


def plan(capsys, *arguments):
    code = main(["plan", "configs/1b.yaml", "--compile", "0", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# ---- numbers


def test_numbers_stay_unless_they_may_change():
    config, place = load_config("configs/1b.yaml", SMALL_BATCH), target("v5e-16").place
    kept = search(config, place)
    assert {(p.config.optim.state_dtype, p.config.quant.mode) for p in kept} == {("float32", "none")}
    free = search(config, place, ("state_dtype", "quant"))
    assert {p.config.optim.state_dtype for p in free} == {"float32", "bfloat16", "int8"}
    assert free[0].config.quant.mode == "int8" and free[0].time.total < kept[0].time.total
    best = free[0]
    assert "quant.mode=int8" in best.overrides
    assert load_config("configs/1b.yaml", [*SMALL_BATCH, *best.overrides]) == best.config
    (only,) = {p.config.quant.mode for p in search(config, place, ("state_dtype",))}
    assert only == "none"


def test_a_narrower_state_that_saves_next_to_nothing_is_not_chosen():
    config = load_config("configs/llama3_8b.yaml", [])
    free, kept = (search(config, target("v5p-16").place, names) for names in (("state_dtype",), ()))
    fastest = min(free, key=lambda p: p.time.rank)
    assert fastest.config.optim.state_dtype == "int8" and fastest.time.rank > 0.99 * kept[0].time.rank
    assert free[0] == kept[0]


@pytest.mark.parametrize(("machine", "gains"), [("v5e-16", True), ("v4-32", False), ("tpu7x-8", False)])
def test_int8_is_told_to_be_cheaper_only_where_the_chip_is_faster_in_it(machine, gains, capsys):
    _, out, _ = plan(capsys, "--on", machine, "--top", "1", "--json")
    (saved,) = json.loads(out)["gains"].values()
    assert ("quant.mode=int8" in saved) == gains
    assert all(0 < share < 1 for share in saved.values())
    _, out, _ = plan(capsys, "--on", machine, "--top", "1", "--numerics")
    assert ("quant.mode=int8" in out) == gains and "--numerics" not in out


def test_the_line_below_the_table_says_what_the_search_with_it_finds(capsys):
    _, out, _ = plan(capsys, "--on", "v5e-16", "--top", "1")
    (line,) = [line for line in out.splitlines() if line.startswith("v5litepod-16: ")]
    config, place = load_config("configs/1b.yaml", []), target("v5e-16").place
    saved = 1 - search(config, place, ("quant",))[0].time.total / search(config, place)[0].time.total
    assert f"quant.mode=int8: {saved * 100:.0f} % cheaper; let plan choose with --numerics" in line


def test_a_model_that_fits_with_other_numbers_alone_is_told_so(capsys):
    code, _, err = plan(capsys, "--on", "v5e-1")
    assert code == 2 and "here it would fit with optim.state_dtype=bfloat16 or optim.state_dtype=int8" in err
    code, out, _ = plan(capsys, "--on", "v5e-1", "--numerics", "state_dtype", "--top", "1")
    assert code == 0 and "optim.state_dtype=" in out and "quant.mode=int8:" in out
    code, _, err = plan(capsys, "--on", "v5e-16", "--numerics", "dtype")
    assert code == 2 and "--numerics dtype is none of state_dtype, quant" in err


def test_adafactor_has_nothing_to_gain_from_a_narrower_state():
    config, place = load_config("configs/1b.yaml", ["optim.name=adafactor"]), target("v5e-16").place
    assert set(advice.gains(config, place, search(config, place)[0], ())) == {"quant.mode=int8"}
