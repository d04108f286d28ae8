"""maxlm plan: what it finds fits, what it says is what the formulas and the compiler say, bad input is one sentence."""

import dataclasses
import json
import math

import pytest

from maxlm import hardware
from maxlm.cli import main
from maxlm.config_file import ConfigError, load_config, parse_config
from maxlm.config_lora import LoraConfig
from maxlm.mesh import axis_sizes, check_fit, make_mesh
from maxlm.parameters import num_adapters, parameters
from maxlm.plan.compile import Compiled
from maxlm.plan.memory import Share, predict_memory
from maxlm.plan.money import flops_per_token
from maxlm.plan.ranges import step_range
from maxlm.plan.search import Place, search
from maxlm.plan.step_time import STAND_IN, StepTime, axis_seconds, predict_step_time, sent_bytes
from maxlm.plan.targets import target
from maxlm.step import build_program

MODEL = {"vocab_size": 256, "num_layers": 4, "d_model": 64, "d_ff": 128, "num_heads": 4, "num_kv_heads": 2}


def small(*overrides, **model):
    tree = {
        "model": {**MODEL, **model},
        "data": {"stores": [{"path": "none"}]},
        "train": {"steps": 10, "batch_size": 32, "seq_len": 128},
    }
    return parse_config(tree, list(overrides))


# ---- memory


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (["mesh.fsdp=8"], {}),
        (["mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"], {"tie_embeddings": True}),
        (["mesh.fsdp=2", "mesh.stage=4", "train.grad_accum=8"], {}),
        (["mesh.fsdp=4", "mesh.stage=2", "mesh.rounds=2", "train.grad_accum=4"], {"num_layers": 6}),
        (["mesh.fsdp=2", "mesh.expert=4"], {"num_experts": 8, "experts_per_token": 2, "num_dense_layers": 1}),
        (["mesh.fsdp=4", "mesh.context=2", "optim.state_dtype=bfloat16"], {}),
        (["mesh.fsdp=2", "mesh.data=4", "optim.state_over_data=true", "optim.ema=0.99"], {}),
        (["mesh.fsdp=8", "optim.name=lion"], {"qk_norm": True, "attention_bias": "all"}),
        (["mesh.fsdp=2", "mesh.tensor=4"], {"num_kv_heads": 2}),
        (["mesh.fsdp=8", "optim.name=muon"], {"vocab_size": 4096}),
    ],
    ids=str,
)
def test_weights_and_optimizer_are_what_a_device_holds_of_the_state(overrides, model):
    config = small(*overrides, d_model=1024, **model)  # split over 8 it fills lanes of memory, so nothing is padded
    import jax

    devices = jax.devices()[:8]
    program = build_program(config, make_mesh(config.mesh, devices))
    leaves = jax.tree_util.tree_leaves_with_path(program.state_shapes)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for _, x in leaves if x.ndim)
    memory = predict_memory(config, axis_sizes(config.mesh, 8))
    assert memory.weights + memory.optimizer == pytest.approx(held, rel=0.002)


LORA = ["train.init_from=r", "lora.base_dtype=bfloat16"]


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (["mesh.fsdp=8"], {}),
        (["mesh.fsdp=2", "mesh.tensor=4", "optim.name=lion", "lora.base_dtype=float32"], {"tie_embeddings": True}),
        (["mesh.fsdp=2", "mesh.data=4", "optim.state_over_data=true", "optim.ema=0.99"], {}),
        (
            ["mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2", "lora.targets=['attention.[qv]', 'moe.shared.*']"],
            {"num_experts": 8, "experts_per_token": 2, "num_dense_layers": 1, "num_shared_experts": 1},
        ),
    ],
    ids=str,
)
def test_what_a_run_of_adapters_is_given_is_what_a_device_holds_of_it(overrides, model):
    import jax

    config = small(*LORA, "lora.rank=128", *overrides, **{"d_model": 1024, "d_ff": 1024, **model})
    program = build_program(config, make_mesh(config.mesh, jax.devices()[:8]))
    leaves = [x for x in jax.tree.leaves((program.state_shapes, program.batch_shapes)) if x.ndim]
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    memory = predict_memory(config, axis_sizes(config.mesh, 8))
    assert memory.arguments == pytest.approx(held, rel=0.002)
    assert num_adapters(config.model, config.lora) == program.num_adapters
    assert flops_per_token(config) == program.flops_per_token


def test_adapters_cost_less_than_all_weights_and_why():
    def at(*overrides):
        config = load_config("configs/1b.yaml", ["mesh.fsdp=4", "mesh.tensor=4", "train.grad_accum=8", *overrides])
        where = target("v5e-16").place
        sizes = axis_sizes(config.mesh, 16)
        time = predict_step_time(config, sizes, where.chip, where.torus)
        return predict_memory(config, sizes), time, sent_bytes(Share(config, sizes))

    (all_memory, all_time, all_sent), (memory, time, sent) = at(), at(*LORA)
    count = num_adapters(load_config("configs/1b.yaml").model, LoraConfig())
    assert all_memory.weights > 1.5 * memory.weights, "the frozen ones are bfloat16"
    assert memory.gradients < 4 * 2 * count and memory.gradients < 0.1 * all_memory.gradients, "of adapters alone"
    assert memory.optimizer < 0.1 * all_memory.optimizer
    assert memory.embedding == 0 and memory.head < all_memory.head, "tables have no gradients"
    assert memory.activations == all_memory.activations, "with full remat the inputs of layers, as before"
    kept = [at(*more, "train.remat=dots")[0].activations for more in ([], LORA)]
    assert kept[1] > kept[0], "what adapters give is kept beside what their weights give"
    assert 0.6 < time.products / all_time.products < 0.95, "no product for a gradient of frozen weights"
    few, more = (at(*LORA, f"lora.rank={rank}")[1].products for rank in (16, 1024))
    assert few == time.products < more
    assert 0.6 < sent["fsdp"]["gather"] / all_sent["fsdp"]["gather"] < 0.7, "no scatter of their gradients"
    assert sent["tensor"]["reduce"] > all_sent["tensor"]["reduce"], "gradients of x are not added before they are sent"
    update = at(*LORA, "optim.ema=0.9")[0].weights - memory.weights
    assert update < 0.1 * all_memory.weights, "an average is of adapters"


def test_what_layers_keep_grows_with_what_is_not_computed_again():
    peaks = [
        predict_memory(
            small("mesh.fsdp=1", f"train.remat={remat}"), axis_sizes(small("mesh.fsdp=1").mesh, 1)
        ).activations
        for remat in ("offload", "full", "attention", "dots", "minimal", "none")
    ]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)


def test_a_share_of_layers_and_tokens():
    config = small("mesh.fsdp=2", "mesh.stage=2", "mesh.rounds=2", "train.grad_accum=4", num_layers=6)
    share = Share(config, axis_sizes(config.mesh, 4))
    assert share.tokens == 32 // 4 * 128 // 2
    assert share.layers == 4, "6 layers in 4 shares of 2, two of which this stage has"


# ---- time


ONE = {"slice": 1, "data": 1, "stage": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("chip", "torus", "sizes", "axis", "kind", "links", "share"),
    [
        ("TPU v5e", (4, 4), {"fsdp": 4, "tensor": 4}, "fsdp", "gather", 1, 3 / 4),
        ("TPU v5e", (16, 16), {"fsdp": 16, "data": 16}, "fsdp", "gather", 2, 15 / 16),
        ("TPU v5e", (16, 16), {"fsdp": 256}, "fsdp", "gather", 2, 15 / 16 + 15 / 16 / 16),
        ("TPU v5e", (8, 16), {"fsdp": 8, "data": 16}, "data", "reduce", 1, 2 * 15 / 16),
        ("TPU v5p", (4, 8, 8), {"tensor": 4, "fsdp": 64}, "tensor", "reduce", 1, 2 * 3 / 4),
        ("TPU v5p", (4, 8, 8), {"tensor": 8, "fsdp": 32}, "tensor", "reduce", 2, 2 * 7 / 8),
        ("TPU v5p", (2, 4, 4), {"tensor": 4, "fsdp": 8}, "tensor", "reduce", 1, 2 * 3 / 4),
        ("TPU v5p", (4, 4, 4), {"context": 4, "fsdp": 16}, "context", "permute", 1, 1),
        ("TPU v5p", (4, 4, 4), {"expert": 4, "fsdp": 16}, "expert", "exchange", 2, 1),
    ],
    ids=str,
)
def test_bytes_take_the_time_of_the_links_that_they_cross(chip, torus, sizes, axis, kind, links, share):
    # (8, 16): data is outermost, so its 16 devices lie over the dimension of 8 and a half of the other
    found, sizes = hardware.named(chip), {**ONE, **sizes}
    if sizes["data"] == 16 and torus == (8, 16):
        share = 2 * (7 / 8 / 2 + 1 / 2)
    seconds = axis_seconds({kind: 1e9}, found, torus, sizes, axis)
    assert seconds == pytest.approx(1e9 * share / (links * found.link_bytes_per_s))


def test_networks_that_nobody_has_told_of_are_unknown():
    v5p, h100 = hardware.named("TPU v5p"), hardware.named("H100")
    assert axis_seconds({"reduce": 1e9}, v5p, (4, 4, 4), {**ONE, "slice": 2, "fsdp": 64}, "slice") is None
    assert axis_seconds({"gather": 1e9}, h100, (16,), {**ONE, "fsdp": 16}, "fsdp") is None, "between nodes"
    inside = axis_seconds({"gather": 1e9}, h100, (16,), {**ONE, "data": 2, "fsdp": 8}, "fsdp")
    assert inside == pytest.approx(1e9 * 7 / 8 / 450e9)
    config = load_config("configs/1b.yaml", ["mesh.fsdp=16"])
    crossing = predict_step_time(config, axis_sizes(config.mesh, 16), h100, (16,))
    assert not crossing.known and crossing.rank > crossing.total, "what is unknown is not free in comparisons"


def test_time_of_a_step_goes_with_the_work():
    chip, one = hardware.named("TPU v5e"), {}
    config = load_config("configs/1b.yaml", ["train.batch_size=32", "train.grad_accum=1", "mesh.fsdp=16"])
    for name, overrides in {
        "plain": [],
        "half": ["train.batch_size=16"],
        "none": ["train.remat=none"],
        "stages": ["mesh.fsdp=4", "mesh.stage=4", "train.grad_accum=8"],
    }.items():
        changed = parse_config(config.model_dump(mode="json"), overrides)
        one[name] = predict_step_time(changed, axis_sizes(changed.mesh, 16), chip, (4, 4))
    assert one["plain"].products == pytest.approx(2 * one["half"].products)
    assert one["none"].products == pytest.approx(one["plain"].products * 6 / (8 - 1 / 3), rel=0.12)
    assert one["plain"].bubble == 0 and one["stages"].bubble == pytest.approx(3 / 8 * one["stages"].products, rel=0.5)


def test_ranges_are_as_wide_as_what_they_rest_on_is_uncertain():
    known = StepTime(products=1.0, attention=0.0, memory=0.0, wires={}, bubble=0.0)
    compiled, formulas, gpu = (
        step_range(1.0, known, kind, by_compiler)
        for kind, by_compiler in (("tpu", True), ("tpu", False), ("gpu", False))
    )
    widths = [high / low for low, high in (compiled, formulas, gpu)]
    assert widths == sorted(set(widths))
    assert formulas[0] < 0.86 and formulas[1] > 1.12, "published runs on TPUs, and the compiler's cycles"
    assert gpu[1] > 1.83, "a published run on GPUs"
    assert step_range(1.0, known, "gpu", False, spread=0.25) == (0.8, 1.25), "of runs that were measured"
    assert step_range(1.0, known, "tpu", False, least_s=0.9) == (0.9, formulas[1]), "no chip is faster than its peak"
    crossing = dataclasses.replace(known, wires={"slice": None}, unknown_bytes=STAND_IN)
    assert step_range(1.0, crossing, "tpu", True) == (compiled[0], pytest.approx(compiled[1] + 1))


# ---- the search


@pytest.mark.parametrize(
    ("machine", "name", "overrides"),
    [
        ("v5e-16", "1b", []),
        ("v5p-16", "1b", ["mesh.tensor=2", "mesh.context=2"]),
        ("h100:8", "1b", []),
        ("v5p-256", "llama3_70b", []),
        ("v5e-16", "1b", ["mesh.stage=2", "mesh.rounds=2", "mesh.allowed=[16, 8]"]),
        ("v5e-16", "1b", ["train.repeats_per_scan=2"]),
    ],
    ids=str,
)
def test_what_is_found_fits_and_divides(machine, name, overrides):
    where, path = target(machine), f"configs/{name}.yaml"
    config = load_config(path, overrides)
    plans = search(config, where.place)
    assert plans == sorted(plans, key=lambda plan: plan.rank) and len(plans) > 20
    for plan in plans[::7]:
        assert math.prod(plan.sizes.values()) == where.place.num_devices
        assert plan.memory.peak <= where.place.chip.hbm_bytes
        again = load_config(path, [*overrides, *plan.overrides])
        check_fit(again, axis_sizes(again.mesh, where.place.num_devices))
        assert again == plan.config, "the line that is printed is the plan"
    assert {plan.config.train.batch_size for plan in plans} == {config.train.batch_size}


def test_a_step_of_the_fastest_plan_is_no_slower_than_of_any_mesh_by_hand():
    place = Place(hardware.named("TPU v5e"), (4, 4))
    best = search(load_config("configs/1b.yaml", []), place)[0]
    for mesh in (["mesh.fsdp=16"], ["mesh.fsdp=4", "mesh.tensor=4"], ["mesh.fsdp=4", "mesh.data=4"]):
        config = load_config("configs/1b.yaml", mesh)
        assert best.time.total <= predict_step_time(config, axis_sizes(config.mesh, 16), place.chip, (4, 4)).total


def test_a_model_that_no_mesh_divides_is_refused():
    config = small("train.batch_size=3", "train.seq_len=125", d_model=66, num_heads=3, num_kv_heads=3)
    with pytest.raises(ConfigError, match="no mesh of 16 devices divides this model and batch: "):
        search(config, target("v5e-16").place)


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (["train.seq_len=100"], {}),
        (["train.seq_len=20000"], {}),
        (["train.attention=plain"], {"layer_pattern": ["local", "global"], "sliding_window": 16}),
        (["quant.mode=int8"], {"num_experts": 8, "experts_per_token": 2, "num_shared_experts": 1}),
        (["optim.name=adafactor"], {"position": "learned", "max_positions": 128}),
        (["train.gather=step"], {"num_layers": 5, "layer_pattern": ["local", "local", "global"], "sliding_window": 7}),
        (
            [*LORA, "lora.targets=['attention.q', 'moe.shared.*']", "quant.mode=int8"],
            {"num_experts": 8, "experts_per_token": 2, "num_shared_experts": 1, "num_dense_layers": 1},
        ),
    ],
    ids=str,
)
def test_odd_configs_are_planned_everywhere(overrides, model):
    config = small("train.batch_size=64", *overrides, **model)
    for machine in ("v5e-4", "v5p-16", "v6e-8", "tpu7x-8", "h100:8", "2xv5p-8"):
        plans = search(config, target(machine).place)
        assert plans[0].time.total > 0 and plans[0].memory.peak > 0


# ---- the command


def plan(capsys, *arguments):
    code = main(["plan", "configs/1b.yaml", "--compile", "0", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_table_prices_each_machine_and_says_how_to_run_the_first(capsys, tmp_path):
    written = tmp_path / "planned.yaml"
    code, out, _ = plan(capsys, "--on", "v5e-16", "--on", "h100:8", "--tokens", "10B", "--write", str(written))
    assert code == 0 and "v5litepod-16" in out and "h100:8" in out and "formulas" in out
    assert "$1.20 per chip-hour" in out and "to run the first:\n  maxlm train configs/1b.yaml train." in out
    config = load_config(written)
    assert config.train.tokens == 10_000_000_000
    assert plan(capsys, "--on", "v5e-16", "--write", str(written))[0] == 2, "nothing is overwritten"


def test_json_is_what_the_table_says(capsys):
    code, out, _ = plan(capsys, "--on", "v5e-16", "--json", "--goodput", "0.5", "--top", "2")
    found = json.loads(out)["plans"]
    assert code == 0 and len(found) == 2
    first = found[0]
    hours = first["low"]["days"] * 24
    assert first["low"]["usd"] == pytest.approx(16 * hours * 1.20)
    steps = load_config("configs/1b.yaml", []).train.num_steps
    assert hours * 3600 == pytest.approx(steps * first["step_time_s"]["low"] / 0.5)
    assert first["low"]["kwh"] is None, "nobody has published what a v5e draws"
    assert sum(first["memory_bytes"].values()) == pytest.approx(first["peak_bytes"])


def test_figures_of_a_row_agree_with_each_other(capsys):
    assert main(["plan", "configs/llama3_8b.yaml", "--on", "v5e-64", "--compile", "0", "--top", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["plans"][0]
    assert first["high"]["mfu"] < first["low"]["mfu"] <= 1
    assert first["step_time_s"]["low"] < sum(first["step_parts_s"].values()) < first["step_time_s"]["high"]
    whole = load_config("configs/llama3_8b.yaml", []).train
    tokens = whole.num_steps * whole.tokens_per_step
    assert first["low"]["days"] * 86_400 * first["low"]["tokens_per_s"] == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--on", "v5q-16"], "there is no such machine; the nearest names are"),
        (["--on", "cpu:2"], "there are no figures of its chips"),
        (["--on", "v5e-1"], "the model does not fit: the leanest plan"),
        (["--on", "v5e-16", "--deadline", "1h"], "no plan keeps the deadline; the fastest takes"),
        (["--on", "v5e-16", "--budget", "10"], "no plan keeps the budget; the cheapest costs"),
        (["--on", "v5e-16", "--deadline", "soon"], "--deadline: 'soon' is no time with a unit"),
        (["--on", "v5e-16", "--tokens", "0"], "--tokens: '0' is no number above 0"),
        (["--on", "v5e-16", "--goodput", "0"], "--goodput is a share"),
        (["--on", "v5e-16", "--price-kind", "cheap"], "--price-kind=cheap is none of"),
        (["--on", "v5e-16", "--prices", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--on", "v5e-16", "--pue", "nan"], "--pue a number from 1"),
        (["--on", "v5e-16", "--write", "no/where.yaml"], "it is to be a file, in a folder that is there"),
        (["--on", "0xv5e-16"], "that is no slice at all"),
        (["--on", "v5e-16", "--kept-tokens", "0.5"], "--kept-tokens is of --what-if; give both"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    code, out, err = plan(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and sentence in last


def test_what_the_compiler_refuses_is_left_out_and_what_it_says_counts(capsys, monkeypatch):
    told = iter([Compiled(None, "it does not fit", 1.0), None, None])

    def compile_on(config, topology):
        assert topology == "v5e:4x4"
        answer = next(told)
        figures = {"arguments_bytes": 2**30, "heap_bytes": 2**30, "step_time_s": 123.0}
        return answer or Compiled(figures, None, 2.0)

    monkeypatch.setattr("maxlm.plan.planner.compile_on", compile_on)
    monkeypatch.setattr("maxlm.plan.planner.has_compiler", lambda: True)
    assert main(["plan", "configs/1b.yaml", "--on", "v5e-16", "--compile", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out)["plans"]
    assert "it does not fit" in err and "compiling the 2. of" in err
    by_compiler = [p for p in plans if p["basis"] == "compiler"]
    assert plans[0]["basis"] == "compiler", "which can run for sure"
    assert len(by_compiler) == 1 and by_compiler[0]["step_time_s"]["high"] >= 123.0
    widths = {p["basis"]: p["step_time_s"]["high"] / p["step_time_s"]["low"] for p in plans}
    assert 1 < widths["compiler"] < widths["formulas"]
    assert by_compiler[0]["step_time_s"]["low"] > 0.8 * 123.0
    assert by_compiler[0]["peak_bytes"] == 2**31
    monkeypatch.setattr("maxlm.plan.planner.compile_on", lambda config, topology: Compiled(None, "too large", 1.0))
    assert main(["plan", "configs/1b.yaml", "--on", "v5e-16", "--compile", "1"]) == 2
    assert "the compiler refuses the 5 best plans, the last one because: too large" in capsys.readouterr().err


@pytest.mark.slow
def test_what_if_prices_the_alternatives_side_by_side(capsys):
    options = ["--what-if", "--kept-tokens", "0.5", "--teacher", "configs/llama3_8b.yaml", "--distilled-tokens", "0.1"]
    code, out, _ = plan(capsys, "--on", "v5e-16", "--json", "--top", "1", *options)
    found = {row["name"]: row for row in json.loads(out)["what_if"]}
    first = json.loads(out)["plans"][0]
    assert code == 0
    assert found["as configured"]["low"]["usd"] == pytest.approx(first["low"]["usd"], rel=1e-3)
    assert 0.4 < found["int8"]["low"]["usd"] / found["as configured"]["low"]["usd"] < 0.9, (
        "v5e is twice as fast in int8"
    )
    assert found["deduplicated data"]["low"]["days"] == pytest.approx(first["low"]["days"] / 2, rel=1e-3)
    smaller = found["smaller model (0.5 N)"]
    assert smaller["params"] < 0.6 * found["as configured"]["params"]
    assert smaller["expected_loss"] == pytest.approx(found["as configured"]["expected_loss"], rel=1e-3)
    assert found["compute-optimal"]["expected_loss"] <= found["as configured"]["expected_loss"]
    student = found["prune and distill"]
    assert student["flops"] > 0.1 * found["as configured"]["flops"], "the teacher's forward pass is not free"
    assert student["low"]["days"] > 0.1 * first["low"]["days"]
    code, out, _ = plan(capsys, "--on", "v5e-16", *options)
    assert code == 0 and "what if" in out and "arXiv:2407.14679" in out
    for bad in (["--law", "none"], ["--kept-tokens", "2"], ["--teacher", "configs/1b.yaml"], ["--scaling", "nowhere"]):
        code, out, err = plan(capsys, "--on", "v5e-16", "--what-if", *bad)
        assert code != 0 and err.strip().splitlines()[-1].startswith("error: "), bad


def test_runs_of_adapters_are_planned_and_what_is_not_for_them_is_left_out(capsys):
    code, out, _ = plan(capsys, "--on", "v5e-16", "--what-if", "--kept-tokens", "0.5", "--json", *LORA)
    found, all_weights = json.loads(out), json.loads(plan(capsys, "--on", "v5e-16", "--json")[1])
    first, other = found["plans"][0], all_weights["plans"][0]
    assert code == 0 and "stage" not in first["mesh"], "pipelines do not go with lora"
    assert first["memory_bytes"]["optimizer"] < 0.2 * other["memory_bytes"]["optimizer"]
    ways = {row["name"]: row for row in found["what_if"]}
    assert list(ways) == ["as configured", "int8", "deduplicated data"]
    assert "smaller and compute-optimal ones are left out" in ways["as configured"]["assumption"]
    assert ways["as configured"]["expected_loss"] is None
    assert ways["as configured"]["low"]["days"] == pytest.approx(first["low"]["days"], rel=1e-3)
    per_token = flops_per_token(load_config("configs/1b.yaml", LORA))
    assert ways["as configured"]["flops"] == pytest.approx(25e9 * per_token, rel=1e-3)
    for option, value in (("--scaling", "runs/a"), ("--teacher", "configs/llama3_8b.yaml")):
        code, _, err = plan(capsys, *LORA, "--on", "v5e-16", option, value)
        assert code == 2 and err.strip() == (
            f"error: {option} is for models that are trained whole, and this run trains adapters (lora)"
        )


def test_machines_of_several_slices():
    assert target("2xv5p-128").num_chips == 128 and target("2xv5p-128").place.num_devices == 128
    assert target("v5p:4x4x4").topology == "v5p:4x4x4" and target("h100:8").topology is None
    with pytest.raises(ConfigError, match="no such machine"):
        target("2xv5")
    assert parameters(small().model)["embed"].dims == "VD"


@pytest.mark.tpu
@pytest.mark.long
def test_a_plan_is_compiled_by_the_real_compiler(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    from maxlm.config_file import to_yaml

    path.write_text(to_yaml(small("train.batch_size=64", d_model=256, d_ff=512, vocab_size=1024)))
    assert main(["plan", str(path), "--on", "v5e-8", "--compile", "1", "--top", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["plans"]
    assert row["basis"] == "compiler" and row["compiled"]["cycles"] > 0
    assert row["peak_bytes"] == row["compiled"]["arguments_bytes"] + row["compiled"]["heap_bytes"]
