"""Products in int8 and fp8: their rounding, on every mesh, where the rules say."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import loss_and_grads, perturbed_params, program_on, random_batch, small_config
from jax.sharding import AxisType

from maxlm.config_file import ConfigError
from maxlm.config_quant import QuantConfig
from maxlm.hardware import find
from maxlm.parallel.quantized import quantized_einsum
from maxlm.quant import Recipe
from maxlm.quant_rules import advice, outliers
from maxlm.sharding import compute_spec, enter_step, leave_step, param_spec

SHAPES = {
    "BTD,DF->BTF": ((4, 64, 512), (512, 384)),
    "BTD,DNH->BTNH": ((4, 64, 256), (256, 4, 64)),
    "BTNH,NHD->BTD": ((4, 64, 4, 64), (4, 64, 256)),
    "ECD,EDF->ECF": ((4, 64, 128), (4, 128, 96)),
}
KEPT, ANEW = Recipe(), Recipe(anew=True)


def operands(subscripts, dtype=jnp.bfloat16):
    x_shape, w_shape = SHAPES[subscripts]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    g = jax.random.normal(keys[2], jnp.einsum(subscripts, x, w).shape)
    return x.astype(dtype), w.astype(dtype), g.astype(dtype)


def gradients(function, x, w, g):
    y, pull = jax.vjp(function, x, w)
    return y, *pull(g.astype(y.dtype))


def error(got, want):
    got, want = np.float64(np.float32(got)), np.float64(np.float32(want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(("recipe", "bound"), [(ANEW, 0.011), (KEPT, 0.0115)], ids=["anew", "kept"])
@pytest.mark.parametrize("subscripts", SHAPES)
def test_int8_is_close_to_float32(subscripts, recipe, bound):
    x, w, g = operands(subscripts, jnp.float32)
    want = gradients(lambda x, w: jnp.einsum(subscripts, x, w, precision="highest"), x, w, g)
    low = [a.astype(jnp.bfloat16) for a in (x, w, g)]
    got = gradients(lambda x, w: quantized_einsum(subscripts, recipe, x, w)[0], *low)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= bound, errors
    assert min(errors) >= 0.005, "these are products of int8"


@pytest.mark.parametrize(
    ("recipe", "bounds"),
    [
        (Recipe("fp8", "fp8", "fp8"), (0.04, 0.06, 0.06)),
        (Recipe("int8", "int8", "bf16"), (0.011, 0.0115, 0.004)),
        (Recipe("bf16", "int8", "fp8"), (0.004, 0.011, 0.06)),
        (Recipe("int8", "bf16", "int8"), (0.011, 0.004, 0.011)),
        (Recipe("fp8", "int8", "bf16"), (0.04, 0.011, 0.004)),
    ],
    ids=str,
)
def test_each_product_has_its_own_type(recipe, bounds):
    subscripts = "BTD,DF->BTF"
    x, w, g = operands(subscripts, jnp.float32)
    want = gradients(lambda x, w: jnp.einsum(subscripts, x, w, precision="highest"), x, w, g)
    low = [a.astype(jnp.bfloat16) for a in (x, w, g)]
    got = gradients(lambda x, w: quantized_einsum(subscripts, recipe, x, w)[0], *low)
    for a, b, bound in zip(got, want, bounds, strict=True):
        assert bound / 3 < error(a, b) <= bound


def words(seed, shape):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint32)


@pytest.mark.slow
def test_stochastic_rounding_is_right_on_average():
    subscripts, count = "BTD,DF->BTF", 400
    x, w, g = (a.astype(jnp.float32) for a in operands(subscripts))
    g *= jnp.exp(2 * jax.random.normal(jax.random.key(9), g.shape))  # of very different sizes

    def draw(recipe, seed):
        random = None if seed is None else words(seed, x.shape[:2])
        return jnp.stack(
            [
                a.reshape(-1)[:20000]
                for a in gradients(lambda x, w: quantized_einsum(subscripts, recipe, x, w, random)[0], x, w, g)[1:]
            ]
        )

    # operands that are not random: what rounding them to the nearest makes of the exact gradient
    exact = jax.jit(lambda: draw(Recipe("int8", "bf16", "bf16"), None))()
    mean = jax.jit(lambda: jax.lax.map(lambda s: draw(KEPT, s), jnp.arange(count)).mean(0))()
    nearest, once = jax.jit(lambda: (draw(KEPT, None), draw(KEPT, 0)))()
    largest = np.abs(exact).max(1)
    for i in range(2):
        of_draws = np.abs((mean - exact)[i]).mean() / largest[i]
        assert abs(float((mean - exact)[i].mean()) / largest[i]) <= 5e-4
        assert of_draws < 0.5 * np.abs((once - exact)[i]).mean() / largest[i], "draws differ and cancel"
    assert not np.array_equal(once, nearest)


def test_rounding_itself_is_unbiased():
    from maxlm.parallel.quantized import hashes
    from maxlm.quant import noise, round_to

    g = jax.random.normal(jax.random.key(0), (64, 96)) * jnp.exp(2 * jax.random.normal(jax.random.key(1), (64, 96)))
    columns = hashes(jnp.arange(96, dtype=jnp.uint32))

    def draw(seed):
        r = round_to(g, "BF", "F", jnp.int8, noise=noise(words(seed, (64,)), "B", columns, "BF"))
        return r.values.astype(jnp.float32) * r.scale[:, None]

    mean = jax.jit(lambda: jax.lax.map(draw, jnp.arange(400)).mean(0))()
    largest = np.abs(g).max(1, keepdims=True)
    off = np.asarray((mean - g) / largest)
    assert abs(off.mean()) <= 5e-4
    # each element's own mean: a draw is off by at most a step, of which 400 independent ones leave a twentieth
    assert np.sqrt((off**2).mean()) <= 1.1 * 0.5 / 127 / np.sqrt(400)


def test_random_bits_of_rows_columns_and_draws_are_independent():
    from maxlm.parallel.quantized import hashes
    from maxlm.quant import noise

    columns = hashes(jnp.arange(512, dtype=jnp.uint32))
    a, b = (np.asarray(noise(words(s, (400,)), "B", columns, "BF")) for s in (0, 1))
    assert a.min() >= -0.5
    assert a.max() < 0.5
    bound = 5 / 12 / np.sqrt(a.size)
    for name, product in {
        "rows": a[1:] * a[:-1],
        "columns": a[:, 1:] * a[:, :-1],
        "rows and columns": a[1:, 1:] * a[:-1, :-1],
        "draws": a * b,
    }.items():
        assert abs(product.mean()) < bound, name
    assert abs(a.mean()) < 5 / np.sqrt(12 * a.size)


MESHES = [("fsdp0", "fsdp1"), ("data", "fsdp", "tensor"), ("context", "tensor"), ("expert", "fsdp", "tensor")]


@pytest.mark.parametrize("gather_now", [False, True])
@pytest.mark.parametrize("subscripts", [s for s in SHAPES if s[0] != "E"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_mesh_gives_the_same_numbers(axes, subscripts, gather_now, kind):
    recipe = Recipe(kind, kind, kind)
    x, w, g = (a.astype(jnp.float32) for a in operands(subscripts))
    left, right = subscripts.split("->")[0].split(",")
    out, random = subscripts.split("->")[1], words(3, x.shape[:2])

    def run(x, w, g, random):
        held = enter_step(w, right, jnp.float32, gather_now)
        y, pull = jax.vjp(lambda x, w: quantized_einsum(subscripts, recipe, x, w, random)[0], x, held)
        dx, dw = pull(g)
        return y, dx, leave_step(dw, right)

    def on(mesh_axes):
        count = 2 ** len(mesh_axes)
        devices = np.array(jax.devices()[:count]).reshape([2] * len(mesh_axes) or [1])
        kinds = (AxisType.Explicit,) * max(1, len(mesh_axes))
        with jax.set_mesh(jax.sharding.Mesh(devices, mesh_axes or ("data",), axis_types=kinds)):
            placed = [jax.device_put(a, compute_spec(d)) for a, d in ((x, left), (g, out), (random, "BT"))]
            return jax.device_get(jax.jit(run)(placed[0], jax.device_put(w, param_spec(right)), placed[1], placed[2]))

    for name, a, b in zip(("y", "dx", "dw"), on(axes), on(()), strict=True):
        assert error(a, b) < 1e-6, name


def test_auto_meshes_too():
    subscripts = "BTD,DF->BTF"
    x, w, g = (a.astype(jnp.float32) for a in operands(subscripts))
    run = jax.jit(lambda x, w, g: gradients(lambda x, w: quantized_einsum(subscripts, KEPT, x, w)[0], x, w, g))
    want = run(x, w, g)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        put = lambda x, *s: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*s)))  # noqa: E731
        got = run(put(x, "a"), put(w, "a", "b"), put(g, "a", None, "b"))
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-6


def distance(a, b):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    return error(flat(a), flat(b))


def results(quant, accum=1, moe=False, train=None, **mesh):
    """Loss and gradients; the program of one setting is made once."""
    return _results(*(json.dumps(x) for x in (quant, accum, moe, train, mesh)))


@functools.cache
def _results(*settings):
    quant, accum, moe, train, mesh = map(json.loads, settings)
    experts = {"num_experts": 4, "experts_per_token": 2} if moe else {}
    config = small_config(
        model={**small_config().model.model_dump(), **experts},
        train={"grad_accum": accum, "batch_size": 64, **(train or {})},
        quant=quant,
    )
    program = program_on(config, **mesh)
    params, batch = perturbed_params(program_on(config)), random_batch(config)
    return loss_and_grads(program, params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_remat_keeps_of_weights_changes_no_number(kind):
    kept, none = (results({"mode": kind}, train={"remat": remat}) for remat in ("full", "none"))
    assert kept[0] == pytest.approx(none[0], rel=1e-6)
    assert distance(kept[1], none[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "train"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"grad_accum": 2}),
        pytest.param({"fsdp": 4}, {"grad_accum": 2, "remat": "none", "gather": "step"}, marks=pytest.mark.long),
        pytest.param({"fsdp": 2, "context": 2}, {"grad_accum": 2, "remat": "dots"}, marks=pytest.mark.long),
        pytest.param({"fsdp": 2, "stage": 2, "tensor": 2}, {"grad_accum": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_model_on_a_mesh_is_that_of_one_device(mesh, train):
    quant, accum = {"mode": "int8", "rules": {"lm_head": "int8"}}, train.get("grad_accum", 1)
    plain = results({})
    one, many = results(quant, accum), results(quant, train=train, **mesh)
    # sums that differ in the last bit are rounded to another int8 here and there: far less than rounding changes
    assert abs(many[0] - one[0]) < 0.15 * abs(one[0] - plain[0])
    assert distance(many[1], one[1]) < 0.15 * distance(one[1], plain[1])


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "stage": 2, "expert": 2}], ids=str)
def test_experts_on_a_mesh_are_those_of_one_device(mesh):
    quant, accum = {"rules": {r".*moe\.(up|gate|down)": "int8"}}, 2
    plain, one, many = results({}, accum, True), results(quant, accum, True), results(quant, accum, True, **mesh)
    assert abs(many[0] - one[0]) < 0.15 * abs(one[0] - plain[0])
    assert distance(many[1], one[1]) < 0.15 * distance(one[1], plain[1])


@pytest.mark.slow
def test_rules_choose_by_path():
    # with the head in another type the layers' numbers stay; with attention left alone they are nearer to plain ones
    plain, whole = results({}), results({"mode": "int8"})
    some = results({"mode": "int8", "rules": {r".*attention.*": "bf16"}})
    none = results({"mode": "int8", "rules": {".*": "bf16"}})
    assert none[0] == plain[0]
    assert len({plain[0], whole[0], some[0]}) == 3
    only_mlp = results({"rules": {r".*mlp.*": "int8"}})
    assert only_mlp[0] == some[0]


@pytest.mark.parametrize(
    ("quant", "words_of_error"),
    [
        ({"rules": {"layers.0.mlp.upp": "int8"}}, "matches no weight"),
        ({"mode": "int8", "rules": {"mlp": "bf16"}}, "mlp.up"),
    ],
    ids=str,
)
def test_a_rule_for_nothing_is_refused(quant, words_of_error):
    with pytest.raises(ConfigError, match=words_of_error):
        program_on(small_config(quant=quant))


def test_the_error_of_outliers_is_told_and_bf16_avoids_it():
    x, w = jax.random.normal(jax.random.key(0), (64, 4096)), jax.random.normal(jax.random.key(1), (4096, 64))
    subscripts = "BD,DF->BF"
    for factor, low, high in ((1, 0.006, 0.012), (60, 0.08, 0.12)):
        odd = x.at[:, 7].mul(factor)
        want = jnp.einsum(subscripts, odd, w, precision="highest")
        y, told = quantized_einsum(subscripts, KEPT, odd, w)
        assert low < told < high
        assert error(y, want) == pytest.approx(float(told), rel=0.5)
        plain, _ = quantized_einsum(subscripts, Recipe("bf16", "int8", "int8"), odd.astype(jnp.bfloat16), w)
        assert error(plain, want) < 0.005


def test_outliers_are_told_with_a_remedy():
    usual = {"quant_error": 0.01, "quant_error/layer_0": 0.01, "quant_error/mlp.up": 0.01}
    assert outliers(usual) is None
    text = outliers({**usual, "quant_error": 0.1, "quant_error/layer_3": 0.1, "quant_error/mlp.down": 0.1})
    assert text is not None
    assert "layer 3" in text
    assert r"quant.rules={'.*mlp\.down': bf16}" in text


@pytest.mark.parametrize(
    ("chip", "kind", "text"),
    [
        ("TPU v4", "int8", "no faster"),
        ("TPU7x", "int8", "it does fp8"),
        ("TPU v5 lite", "fp8", "it does int8"),
        ("TPU v5 lite", "int8", None),
        ("TPU v6 lite", "int8", None),
        ("NVIDIA H100 80GB HBM3", "fp8", None),
    ],
)
def test_chips_that_gain_nothing_are_told(chip, kind, text):
    found = advice(QuantConfig(mode=kind), find(chip))
    assert (found is None) == (text is None)
    assert text is None or text in str(found)


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"stage": 2}], ids=str)
def test_metrics_tell_of_outliers_and_where(mesh):
    config = small_config(quant={"mode": "int8"}, train={"grad_accum": 2})
    program = program_on(config, **mesh)
    params = perturbed_params(program_on(config))

    def metrics(params):
        from helpers import place

        with jax.set_mesh(program.mesh):
            return jax.device_get(program.grads(*place(program, params, random_batch(config)))[1])

    usual = metrics(params)
    assert 0.001 < usual["quant_error"] < 0.02
    layers = [usual[f"quant_error/layer_{i}"] for i in range(config.model.num_layers)]
    assert max(layers) == usual["quant_error"]
    params["layers"]["0"]["mlp_norm"]["weight"][1, 3] *= 60  # one channel of what layer 1's MLP multiplies
    odd = metrics(params)
    assert odd["quant_error/mlp.up"] == odd["quant_error/mlp.gate"] > 1.5 * usual["quant_error/mlp.up"]
    assert odd["quant_error/attention.q"] < 1.5 * usual["quant_error/attention.q"]
    assert odd["quant_error/layer_0"] == pytest.approx(usual["quant_error/layer_0"], rel=1e-3)


def test_a_checkpoint_is_the_same_with_and_without():
    shapes = [program_on(small_config(quant=q)).state_shapes for q in ({}, {"mode": "int8"}, {"mode": "fp8"})]
    assert shapes[0] == shapes[1] == shapes[2]
