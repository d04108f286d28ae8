"""The optimizer against plain optax, sharded against one device, and every leaf of its state in its place."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import program_on, small_config
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import OptimConfig, ScheduleConfig
from maxlm.optim import ema_update, make_optimizer, update
from maxlm.schedule import make_schedule
from maxlm.sharding import param_spec

# Every dim has another size, and two dims of the large matrices are long enough (128) for adafactor to factor them.
SIZES = {"V": 140, "D": 132, "N": 6, "H": 134, "F": 136, "L": 4, "T": 138}
DIMS = {
    "embed": "VD",
    "positions": "TD",
    "layers": {
        "attn": {"wq": "LDNH", "wo": "LNHD", "q_norm": "LH"},
        "mlp": {"w_up": "LDF", "bias": "LF"},
        "norm": "LD",
    },
    "final_norm": "D",
    "unembed": "DV",
}
FEW_DIMS = {  # for what does not depend on shapes: compiles faster
    "embed": "VD",
    "layers": {"attn": {"wq": "LDNH", "q_norm": "LH"}, "mlp": {"w_up": "LDF", "bias": "LF"}},
    "unembed": "DV",
}
OPTIMIZERS = ("adamw", "sgd", "adafactor", "lion", "muon")
NUM_STEPS = 10
FAST = {"xla_backend_optimization_level": 0}  # most of the time here is compilation


def config(name="adamw", **fields):
    constant = ScheduleConfig(name="constant")
    return OptimConfig(**{"name": name, "learning_rate": 0.01, "schedule": constant, "weight_decay": 0.0, **fields})


def random_tree(seed, dims=DIMS, **sizes):
    rng = np.random.default_rng(seed)
    sizes = SIZES | sizes
    return jax.tree.map(lambda d: rng.standard_normal([sizes[x] for x in d]).astype(np.float32), dims)


def run(tx, params, num_steps=3, place=lambda tree: tree, dims=DIMS, **sizes):
    """Parameters and state after num_steps updates with random gradients."""
    shape = {"L": len(params["layers"]["attn"]["wq"]), **sizes}
    params = place(params)
    state = jax.jit(tx.init)(params)
    step = jax.jit(partial(update, tx), compiler_options=FAST)
    for i in range(num_steps):
        params, state = step(params, state, place(random_tree(100 + i, dims, **shape)))
    return params, state


def minus(tree, other):
    """Leaf by leaf, on the host: eager jax would compile one program per shape."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), tree, other)


def difference(tree, other):
    """Largest absolute difference over all leaves."""
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(minus(tree, other)))


def cube():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def typed_state(tx, dims, **sizes):
    """The state as ShapeDtypeStructs, and the spec of each leaf, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()

    def typed(x, d):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, param_spec(d)))

    state = jax.eval_shape(tx.init, jax.tree.map(typed, random_tree(0, dims, **sizes), dims))
    return state, jax.tree.map(lambda x: x.sharding.spec if x.sharding else P(), state)


def place_on(mesh):
    """A function that lays out a tree of parameters as they rest on the current mesh."""

    def place(tree, dims=DIMS):
        return jax.tree.map(lambda x, d: jax.device_put(x, NamedSharding(mesh, param_spec(d))), tree, dims)

    return place


# ---- schedule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {4: 1.0, 12: 1.0, 20: 1.0, 99: 1.0}),
        ("linear", {4: 1.0, 12: 0.6, 20: 0.2, 99: 0.2}),
        ("cosine", {4: 1.0, 8: 0.6 + 0.4 * math.sqrt(0.5), 12: 0.6, 20: 0.2, 99: 0.2}),
        ("wsd", {4: 1.0, 15: 1.0, 18: 0.6, 20: 0.2, 99: 0.2}),
        ("inverse_sqrt", {4: 1.0, 16: 0.5, 64: 0.25, 400: 0.2}),
    ],
)
def test_schedule_values(name, expected):
    shape = ScheduleConfig(name=name, warmup_steps=4, cooldown_steps=4 if name == "wsd" else 0, final_fraction=0.2)
    schedule = make_schedule(OptimConfig(learning_rate=0.5, schedule=shape), 20)
    traced = jax.jit(schedule)
    for step, fraction in ({0: 0.0, 1: 0.25, 3: 0.75} | expected).items():
        for value in (schedule(step), traced(jnp.int32(step))):
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, 0.5 * fraction, rtol=1e-6, err_msg=f"{name} at step {step}")


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_schedule_starts_at_its_peak_without_warmup(name):
    schedule = make_schedule(OptimConfig(learning_rate=0.5, schedule=ScheduleConfig(name=name)), 20)
    assert float(schedule(0)) == 0.5
    assert all(0.05 <= float(schedule(step)) <= 0.5 for step in range(1, 40))


def test_restored_state_continues_the_schedule():
    shape = ScheduleConfig(name="linear", warmup_steps=2)
    params = random_tree(0, FEW_DIMS)
    tx, again = (make_optimizer(config(schedule=shape), NUM_STEPS, FEW_DIMS) for _ in range(2))
    whole, _ = run(tx, params, 3, dims=FEW_DIMS)
    middle, state = run(tx, params, 2, dims=FEW_DIMS)
    resumed, _ = jax.jit(partial(update, again), compiler_options=FAST)(middle, state, random_tree(102, FEW_DIMS))
    assert difference(whole, resumed) == 0


# ---- each optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descends_a_quadratic(name):
    dims = {"layers": {"w": "LDF"}, "norm": "D"}
    tx = make_optimizer(config(name, learning_rate=0.05), NUM_STEPS, dims)
    target, params = random_tree(1, dims, D=8, F=6, L=2), random_tree(2, dims, D=8, F=6, L=2)

    def loss(p):
        return sum(jnp.square(a - b).sum() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

    state, first = tx.init(params), loss(params)
    step = jax.jit(lambda p, s: update(tx, p, s, jax.grad(loss)(p)))
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < 0.8 * first


def plain_optax(name):
    lr, wd = 0.01, 0.1
    axes = optax.contrib.MuonDimensionNumbers
    into, out = axes((1,), (2, 3)), axes((1, 2), (3,))
    numbers = {"attn": {"wq": into, "wo": out, "q_norm": None}, "norm": None}
    numbers["mlp"] = {"w_up": axes((1,), (2,)), "bias": None}
    numbers = {"embed": None, "positions": None, "layers": numbers, "final_norm": None, "unembed": None}
    return {
        "adamw": lambda: optax.adamw(lr, 0.9, 0.95, weight_decay=wd),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(0.0), optax.sgd(lr, 0.95)),
        "adafactor": lambda: optax.adafactor(lr, multiply_by_parameter_scale=False, weight_decay_rate=lr * wd),
        "lion": lambda: optax.lion(lr, 0.9, 0.95, weight_decay=wd),
        "muon": lambda: optax.contrib.muon(
            lr, weight_decay=wd, muon_weight_dimension_numbers=numbers, consistent_rms=0.2
        ),
    }[name]()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_plain_optax_on_one_device(name):
    params = random_tree(0)
    decay = 0.0 if name == "sgd" else 0.1
    got, _ = run(
        make_optimizer(config(name, weight_decay=decay, decay_mask="", clip_norm=None), NUM_STEPS, DIMS), params
    )
    want, _ = run(plain_optax(name), params)
    if name == "muon":  # optax' own Adam part is Nadam and takes no mask: ours is that of adamw
        tables, _ = run(plain_optax("adamw"), params)
        is_matrix = jax.tree.map(lambda d: d[1:] in ("DNH", "NHD", "DF"), DIMS)
        want = jax.tree.map(lambda m, a, b: a if m else b, is_matrix, want, tables)
    assert difference(got, want) < 1e-6
    assert difference(got, params) > 1e-3


def test_muon_update_has_the_same_size_for_every_shape():
    params = random_tree(0)
    got, _ = run(make_optimizer(config("muon", learning_rate=0.1, adam_lr=0.05), NUM_STEPS, DIMS), params, 1)
    moved = jax.tree.map(lambda x: np.sqrt(np.mean(np.square(x))), minus(got, params))
    for matrix in (moved["layers"]["attn"]["wq"], moved["layers"]["attn"]["wo"], moved["layers"]["mlp"]["w_up"]):
        assert 0.7 * 0.02 < matrix < 1.2 * 0.02  # 0.2 * learning rate; Newton-Schulz is loose by design
    for table in (moved["embed"], moved["unembed"], moved["final_norm"], moved["layers"]["mlp"]["bias"]):
        np.testing.assert_allclose(table, 0.05, rtol=1e-3)  # Adam's first step is the sign, times adam_lr


def test_muon_treats_layers_one_by_one():
    params = random_tree(0)
    tx = make_optimizer(config("muon", clip_norm=None), NUM_STEPS, DIMS)
    step = jax.jit(lambda g: update(tx, params, tx.init(params), g)[0]["layers"]["mlp"]["w_up"])
    grads = random_tree(1)
    before = step(grads)
    grads["layers"]["mlp"]["w_up"][0] *= 100
    np.testing.assert_allclose(step(grads), before, atol=1e-6)


# ---- rules by path


def test_clips_the_global_norm_of_what_is_trained():
    params, grads = random_tree(0, FEW_DIMS), random_tree(1, FEW_DIMS)
    tx = make_optimizer(config("sgd", learning_rate=1.0, clip_norm=0.5, freeze=("embed",)), NUM_STEPS, FEW_DIMS)
    step = jax.jit(lambda p, g: update(tx, p, tx.init(p), g)[0])
    moved = minus(step(params, grads), params)
    np.testing.assert_allclose(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(moved))), 0.5, rtol=1e-3)
    small = jax.tree.map(lambda g: g * 1e-6, grads)
    new = step(jax.tree.map(np.zeros_like, params), small)
    np.testing.assert_allclose(new["unembed"], -small["unembed"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_spares_norms_biases_and_embeddings(name):
    params = random_tree(0, FEW_DIMS)
    tx = make_optimizer(
        config(name, weight_decay=0.5, learning_rate=0.1, lr_rules={"unembed": 2.0}), NUM_STEPS, FEW_DIMS
    )
    free = make_optimizer(
        config(name, weight_decay=0.0, learning_rate=0.1, lr_rules={"unembed": 2.0}), NUM_STEPS, FEW_DIMS
    )
    pulled = minus(run(tx, params, 1, dims=FEW_DIMS)[0], run(free, params, 1, dims=FEW_DIMS)[0])
    for path, pull in jax.tree_util.tree_leaves_with_path(pulled):
        where = ".".join(k.key for k in path)
        weight = params[path[0].key] if len(path) == 1 else None
        if re.search("norm|bias|^embed", where):
            assert not pull.any(), where
        elif where == "unembed":
            np.testing.assert_allclose(pull, -0.1 * weight, atol=1e-6)  # 0.5 * 0.1 * its factor 2
        else:
            assert pull.any(), where


def test_first_lr_rule_that_matches_counts():
    rules = {r"layers\.mlp\..*": 0.5, r"layers\..*": 0.25, "unembed": 0.0}
    params = jax.tree.map(np.zeros_like, random_tree(0, FEW_DIMS))
    plain, _ = run(make_optimizer(config(), NUM_STEPS, FEW_DIMS), params, 2, dims=FEW_DIMS)
    ruled, _ = run(make_optimizer(config(lr_rules=rules), NUM_STEPS, FEW_DIMS), params, 2, dims=FEW_DIMS)
    factors = {"layers.mlp.w_up": 0.5, "layers.mlp.bias": 0.5, "layers.attn.wq": 0.25, "unembed": 0.0, "embed": 1.0}
    for path, factor in factors.items():
        a, b = plain, ruled
        for key in path.split("."):
            a, b = a[key], b[key]
        np.testing.assert_allclose(b, factor * a, rtol=1e-5, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_and_have_no_state(name):
    params = random_tree(0, FEW_DIMS)
    frozen = (r"embed", r".*attn.*")
    tx = make_optimizer(config(name, weight_decay=0.1, freeze=frozen, lr_rules={"embed": 3.0}), NUM_STEPS, FEW_DIMS)
    new, state = run(tx, params, 2, dims=FEW_DIMS)
    np.testing.assert_array_equal(new["embed"], params["embed"])
    assert difference(new["layers"]["attn"], params["layers"]["attn"]) == 0
    assert all(x.any() for x in jax.tree.leaves(minus(new["layers"]["mlp"], params["layers"]["mlp"])))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not [p for p in paths if "'embed'" in p or "'attn'" in p]
    assert [p for p in paths if "'unembed'" in p]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("layers.attn",)}, ["optim.freeze", "'layers.attn'", "matches no parameter", "layers.attn."]),
        ({"lr_rules": {"embedding": 0.1}}, ["optim.lr_rules", "'embedding'", "matches no parameter", "embed"]),
        ({"decay_mask": "nothing", "weight_decay": 0.1}, ["optim.decay_mask", "'nothing'", "matches no parameter"]),
        ({"freeze": ("*.norm",)}, ["optim.freeze", "'*.norm'", "not a regular expression"]),
        ({"lr_rules": {"(": 0.1}}, ["optim.lr_rules", "'('", "not a regular expression"]),
    ],
)
def test_wrong_expressions_are_named(fields, words):
    with pytest.raises(ValueError, match="optim") as error:
        make_optimizer(config(**fields), NUM_STEPS, FEW_DIMS)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- sharding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_leaf_rests_on_the_dims_it_keeps(name):
    sizes = SIZES | {"L": 5}  # muon's three coefficients must not look like layers
    letter_of = {size: letter for letter, size in sizes.items()}
    tx = make_optimizer(config(name), NUM_STEPS, DIMS)
    with jax.set_mesh(cube()):
        state, specs = typed_state(tx, DIMS, L=5)
        kept = set()
        for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
            if leaf.size <= 3:
                assert all(axis is None for axis in spec), (leaf, spec)
            else:
                letters = "".join(letter_of[size] for size in leaf.shape)
                assert spec == param_spec(letters), (letters, spec)
                kept.add(letters)
    whole = {"VD", "TD", "LDNH", "LNHD", "LH", "LDF", "LF", "LD", "D", "DV"}
    factored = {"V", "T", "D", "LDN", "LNH", "LND", "LD", "LF", "LH"}
    assert kept == (factored if name == "adafactor" else whole)


def test_factors_of_a_square_matrix_rest_apart():
    tx = make_optimizer(config("adafactor"), NUM_STEPS, {"w": "DF"})
    with jax.set_mesh(cube()):
        specs = jax.tree.leaves(typed_state(tx, {"w": "DF"}, D=128, F=128)[1])
    assert sorted(map(str, specs)) == sorted(map(str, [P(), P("fsdp"), P("tensor"), P(None), P()]))


# fsdp x tensor = 4 devices share the layers of muon's matrices: one each, or one of them none.
@pytest.mark.parametrize(("name", "num_layers"), [*((name, 4) for name in OPTIMIZERS), ("muon", 3)])
def test_sharded_equals_one_device(name, num_layers):
    params = random_tree(0, L=num_layers)
    tx = make_optimizer(config(name, weight_decay=0.1, freeze=("final_norm",)), NUM_STEPS, DIMS)
    want_params, want_state = run(tx, params)
    mesh = cube()
    with jax.set_mesh(mesh):
        got_params, got_state = run(tx, params, place=place_on(mesh))
        _, specs = typed_state(tx, DIMS, L=num_layers)
    for leaf, spec in zip(jax.tree.leaves(got_state), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    with jax.set_mesh(mesh):
        assert jax.tree.map(lambda x: x.sharding.spec, got_params) == jax.tree.map(param_spec, DIMS)
    assert difference(got_params, want_params) < 1e-5
    for got, want in zip(jax.tree.leaves(got_state), jax.tree.leaves(want_state), strict=True):
        assert np.abs(np.asarray(got) - np.asarray(want)).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("axes", [("fsdp",), ("fsdp", "expert"), ("expert", "tensor")], ids=str)
def test_muon_with_experts_on_other_meshes_equals_one_device(axes):
    dims = {"layers": {"attn": {"wq": "LDNH"}, "moe": {"up": "LEDF", "down": "LEFD", "router": "LDX"}}}
    sizes = {"D": 12, "F": 20, "E": 4, "X": 4, "N": 2, "H": 6}
    params = random_tree(0, dims, L=3, **sizes)
    tx = make_optimizer(config("muon"), NUM_STEPS, dims)
    want, _ = run(tx, params, dims=dims, **sizes)
    devices = np.array(jax.devices()[: 2 ** len(axes)]).reshape([2] * len(axes))
    mesh = Mesh(devices, axes, axis_types=(AxisType.Explicit,) * len(axes))
    with jax.set_mesh(mesh):
        got, _ = run(tx, params, place=partial(place_on(mesh), dims=dims), dims=dims, **sizes)
        assert jax.tree.map(lambda x: x.sharding.spec, got) == jax.tree.map(param_spec, dims)
    assert difference(got, want) < 1e-5


@pytest.mark.parametrize(("num_rounds", "num_layers"), [(1, 2), (3, 1), (2, 2)], ids=str)
def test_muon_in_a_pipeline_equals_one_device(num_rounds, num_layers):
    dims = {"layers": {"attn": {"wq": "RPLDNH"}, "mlp": {"up": "RPLDF", "down": "RPLFD", "norm": "RPLD"}}}
    plain = jax.tree.map(lambda d: d[2:], dims)
    sizes = {"D": 12, "F": 20, "N": 2, "H": 6}
    shape = (num_rounds, 2, num_layers)
    params = random_tree(0, plain, L=math.prod(shape), **sizes)
    want, _ = run(make_optimizer(config("muon"), NUM_STEPS, plain), params, dims=plain, **sizes)
    mesh = Mesh(
        np.array(jax.devices()).reshape(2, 2, 2), ("stage", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3
    )

    def place(tree, layout=None):
        stacked = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)
        return place_on(mesh)(stacked, dims)

    tx = make_optimizer(config("muon"), NUM_STEPS, dims)
    with jax.set_mesh(mesh):
        got, _ = run(tx, params, place=place, dims=plain, **sizes)
        assert jax.tree.map(lambda x: x.sharding.spec, got) == jax.tree.map(param_spec, dims)
    assert difference(jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[3:]), got), want) < 1e-5


def test_what_fills_up_a_stack_does_not_change_when_adafactor_clips():
    rng = np.random.default_rng(0)
    gradients = [scale * rng.standard_normal((3, 12)).astype(np.float32) for scale in (1.0, 10.0)]
    updates = []
    for dims, shape in (("LD", (3,)), ("RPLD", (1, 2, 2))):
        fill = lambda g, s=shape: np.pad(g, [(0, math.prod(s) - 3), (0, 0)]).reshape(*s, 12)  # noqa: E731
        tx = make_optimizer(config("adafactor", clip_norm=None), NUM_STEPS, {"norm": dims}, num_repeats=3)
        params = {"norm": jnp.asarray(fill(np.ones((3, 12), np.float32)))}
        state = tx.init(params)
        for g in gradients:
            params, state = update(tx, params, state, {"norm": jnp.asarray(fill(g))})
        updates.append(np.asarray(params["norm"]).reshape(-1, 12)[:3])
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_update_gathers_nothing(name):
    """The only communication is sums, of scalars and of adafactor's factors."""
    tx = make_optimizer(config(name), NUM_STEPS, FEW_DIMS)
    mesh = cube()
    with jax.set_mesh(mesh):
        params = place_on(mesh)(random_tree(0, FEW_DIMS, L=3), FEW_DIMS)
        state = jax.jit(tx.init)(params)
        text = (
            jax.jit(partial(update, tx), compiler_options=FAST).lower(params, state, params).compile().as_text() or ""
        )
    ops = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    assert not ops


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"stage": 2, "rounds": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_muon_adds_only_all_to_alls_to_the_step(mesh):
    """In the whole step XLA once replicated every momentum, which the update alone did not show."""
    gathers = {}
    for name in ("adamw", "muon"):
        program = program_on(small_config(optim={"name": name}, model={"num_layers": 4}), **mesh)
        text = program.lower_step().compile(FAST).as_text() or ""
        gathers[name] = sum(
            len(re.findall(f" {op}(?:-start)?\\(", text)) for op in ("all-gather", "collective-permute")
        )
    assert gathers["muon"] == gathers["adamw"]


# ---- averaged weights


def test_ema_warms_up_then_decays():
    params = {"w": jnp.full((4, 2), 3.0)}
    ema = ema_update({"w": jnp.ones((4, 2))}, params, 0.99, jnp.int32(1))
    np.testing.assert_allclose(ema["w"], 1 + (1 - 2 / 11) * 2, rtol=1e-6)
    ema = ema_update({"w": jnp.ones((4, 2))}, params, 0.99, 10_000)
    np.testing.assert_allclose(ema["w"], 1 + 0.01 * 2, rtol=1e-6)


def test_ema_stays_sharded():
    mesh = cube()
    with jax.set_mesh(mesh):
        params = place_on(mesh)(random_tree(0))
        ema = jax.jit(lambda e, p: ema_update(e, p, 0.9, 1))(params, params)
        assert jax.tree.map(lambda x: x.sharding.spec, ema) == jax.tree.map(param_spec, DIMS)
