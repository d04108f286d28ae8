"""What maxlm plan looks for: meshes of all kinds, and numbers of a run only where that is asked for."""

import json

import pytest

from maxlm.cli import main
from maxlm.config_file import load_config, parse_config
from maxlm.plan import advice
from maxlm.plan.search import LONG, search
from maxlm.plan.step_time import STAND_IN
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
    _, out, _ = plan(capsys, "--on", machine, "--top", "1", "--what-if", "--json")
    found = json.loads(out)
    (saved,) = found["gains"].values()
    assert ("quant.mode=int8" in saved) == gains == ("int8" in {row["name"] for row in found["what_if"]})
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


# ---- meshes


def pipelined(num_layers):
    return load_config("configs/1b.yaml", [f"model.num_layers={num_layers}", *SMALL_BATCH])


def test_pipelines_of_several_rounds_where_there_are_layers_for_them():
    place = target("v5e-16").place
    found = [plan for plan in search(pipelined(16), place) if plan.sizes["stage"] > 1]
    rounds = {(plan.sizes["stage"], plan.config.mesh.rounds) for plan in found}
    assert {(2, 1), (2, 2), (2, 4), (4, 4)} <= rounds and (8, 4) not in rounds, "32 shares of 16 layers"
    twins = {(*plan.sizes.values(), plan.config.train.grad_accum, plan.config.mesh.rounds): plan for plan in found}
    once, twice = (twins[1, 1, 4, 4, 1, 1, 1, 16, rounds] for rounds in (1, 2))
    assert twice.time.bubble == pytest.approx(once.time.bubble / 2)
    assert twice.time.wires["stage"] > once.time.wires["stage"]
    assert "mesh.rounds=2" in twice.overrides
    assert {plan.config.mesh.rounds for plan in search(pipelined(3), place)} == {1}


def test_short_sequences_are_split_only_where_nothing_fits_otherwise():
    place = target("v5e-16").place
    assert load_config("configs/1b.yaml").train.seq_len < LONG
    whole = load_config("configs/1b.yaml", ["train.batch_size=16", "train.grad_accum=1"])
    assert {plan.sizes["context"] for plan in search(whole, place)} == {1}
    wide = {"vocab_size": 1024, "num_layers": 1, "d_model": 4096, "d_ff": 60000, "num_heads": 1, "head_dim": 128}
    train = {"steps": 1, "batch_size": 1, "seq_len": LONG - 128, "remat": "full"}
    alone = search(parse_config({"model": wide, "data": {"stores": [{"path": "none"}]}, "train": train}), place)
    assert place.fits(alone[0].memory) and all(plan.sizes["context"] > 1 for plan in alone), "one row, one head"


def test_a_405b_on_several_pods(capsys):
    model = "num_layers=126 d_model=16384 d_ff=53248 num_heads=128".split()
    overrides = [*(f"model.{field}" for field in model), "train.batch_size=2048", "train.seq_len=8192"]
    arguments = ["configs/llama3_70b.yaml", *overrides, "--on", "4xv5p-1024", "--compile", "0", "--top", "2"]
    assert main(["plan", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["plans"]
    assert all(row["num_chips"] == 4 * 512 and row["mesh"]["slice"] == 4 for row in rows)
    first = rows[0]
    assert first["peak_bytes"] < first["hbm_bytes"] and not first["networks_known"]
    assert first["step_parts_s"]["wires over slice"] is None
    sent = first["unknown_network_bytes"]
    assert sent > 4 * 405e9 / 512, "gradients, of which each device of a slice has its share"
    span = first["step_time_s"]
    assert span["high"] > 1.5 * span["low"] + sent / STAND_IN, "at worst the network is slow as well"
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "mesh.slices=4" in out and "of which no speed is known" in out and f"{sent / 2**30:.2f} GiB (1)" in out
