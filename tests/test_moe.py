"""Routers and experts on one device, against plain formulas; how training balances their load."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import loss_and_grads, perturbed_params, place, program_on, random_batch, small_config, worst_error

from maxlm.model.moe import Moe
from maxlm.parallel.expert import dispatch_experts
from maxlm.step import build_program

B, T, E, A = 4, 12, 8, 3
EXPERTS = {"num_experts": E, "experts_per_token": A, "expert_d_ff": 14}


def config_with(model=None, **sections):
    return small_config(model={**small_config().model.model_dump(), **EXPERTS, **(model or {})}, **sections)


def run_on(program, params, batch, function="grads"):
    with jax.set_mesh(program.mesh):
        params, batch = place(program, params, batch)
        return jax.device_get(getattr(program, function)(params, batch))


# ---- one layer against every expert for every token


def moe_of(config):
    """A layer with random parameters, and a function (params, x) -> (y, aux) of it."""
    program = program_on(config)
    with jax.set_mesh(program.mesh):
        graph, state = nnx.split(jax.eval_shape(lambda: Moe(jax.random.key(0), config.model)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.4 * rng.standard_normal(s.shape, np.float32), nnx.to_pure_dict(state))
    dispatch = partial(dispatch_experts, "gather", None)
    return program.mesh, params, lambda params, x: nnx.merge(graph, params)(x, dispatch)


def plain(config, params, x):
    """The layer and its reports, by formulas."""
    model, router = config.model, params["router"]
    logits = jnp.einsum("btd,de->bte", x, router["weight"])
    scores = jax.nn.softmax(logits) if model.router_scores == "softmax" else jax.nn.sigmoid(logits)
    order = jnp.argsort(-(scores + (router["bias"][None, None] if "bias" in router else 0.0)), axis=-1)[..., :A]
    weights = jnp.take_along_axis(scores, order, -1)
    if model.router_normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    up, down = (jnp.einsum("btd,edf->btef", x, params["up"]), params["down"])
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, params["gate"])) * up if "gate" in params else jax.nn.silu(up)
    outputs = jnp.take_along_axis(jnp.einsum("btef,efd->bted", hidden, down), order[..., None], 2)
    y = (outputs * weights[..., None] * model.router_scale).sum(2)
    if model.num_shared_experts:
        shared = params["shared"]
        y += (jax.nn.silu(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"]
    visits = jnp.stack([(order == e).sum() for e in range(E)]) / (B * T * A)
    shares = (scores / scores.sum(-1, keepdims=True)).mean((0, 1))
    reports = {
        "balance_loss": E * (visits * shares).sum(),
        "router_z_loss": (jnp.log(jnp.exp(logits).sum(-1)) ** 2).mean(),
        "load_imbalance": visits.max() * E,
    }
    return y, reports, visits


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"router_scores": "sigmoid", "router_scale": 2.5, "router_bias_rate": 0.01, "num_shared_experts": 2},
        {"router_normalize": False, "mlp": "plain"},
        {"router_scores": "sigmoid", "router_normalize": False, "router_bias_rate": 0.01},
    ],
    ids=str,
)
def test_a_layer_and_its_gradients_are_those_of_the_formulas(model):
    config = config_with(model)
    mesh, params, apply = moe_of(config)
    rng = np.random.default_rng(1)
    x, cotangent = (rng.standard_normal((B, T, 20)).astype(np.float32) for _ in range(2))

    def value(function, params, x):
        y, aux, *_ = function(params, x)
        losses = 0.3 * aux["balance_loss"] + 0.2 * aux["router_z_loss"]
        return (y * cotangent).sum() + losses + aux.get("router_bias", 0.0), (y, aux)

    reference = partial(plain, config)
    with jax.default_matmul_precision("highest"):
        grad = partial(jax.value_and_grad, has_aux=True, argnums=(0, 1))
        with jax.set_mesh(mesh):
            (_, (y, aux)), grads = jax.device_get(jax.jit(grad(partial(value, apply)))(params, x))
        (_, (want_y, want_aux)), want = jax.device_get(jax.jit(grad(partial(value, reference)))(params, x))
    assert worst_error(y, want_y) <= 1e-5
    for name, report in want_aux.items():
        assert aux[name] == pytest.approx(report, rel=1e-5)
    assert aux["dropped_tokens"] == 0
    if "bias" in params["router"]:
        assert aux["router_bias"] == 0
        error = E * reference(params, x)[2] - 1  # visits over their mean, less one
        np.testing.assert_allclose(grads[0]["router"].pop("bias"), error * A / E, atol=1e-6)
        assert np.abs(want[0]["router"].pop("bias")).max() == 0, "it chooses, and weighs nothing"
    assert worst_error(grads, want) <= 1e-5


def test_balanced_routers_have_a_loss_of_one():
    config = config_with({"d_model": E, "experts_per_token": 1, "router_normalize": False})
    mesh, params, apply = moe_of(config)
    params["router"]["weight"] = 9 * np.eye(E, dtype=np.float32)
    x = np.tile(np.eye(E, dtype=np.float32), (2, 3, 1))  # tokens like each expert equally often
    with jax.set_mesh(mesh):
        aux = jax.device_get(jax.jit(apply)(params, x)[1])
        worst = jax.device_get(jax.jit(apply)(params, x * 0 + x[:, :1])[1])
    assert aux["balance_loss"] == pytest.approx(1) and aux["load_imbalance"] == 1
    assert worst["balance_loss"] == pytest.approx(E, rel=0.01) and worst["load_imbalance"] == E


# ---- in a model


def test_experts_that_are_all_alike_are_a_dense_model():
    """Layers keep their order, and num_dense_layers come first."""
    dense = small_config()
    shares = {"expert_d_ff": dense.model.d_ff, "num_dense_layers": 1, "router_scores": "sigmoid"}
    mixed = config_with(shares)
    params, batch = perturbed_params(program_on(dense)), random_batch(dense)
    program = program_on(mixed)
    rng = np.random.default_rng(2)
    cut = lambda tree, rows: jax.tree.map(lambda w: w[rows], tree)  # noqa: E731
    layers = cut(params["layers"]["0"], slice(1, None))
    mlp = layers.pop("mlp")
    layers["moe"] = {name: np.repeat(w[:, None], E, axis=1) for name, w in mlp.items()}
    layers["moe"]["router"] = {"weight": rng.standard_normal((2, dense.model.d_model, E), np.float32)}
    other = {**params, "dense_layers": cut(params["layers"], slice(1)), "layers": {"0": layers}}
    want, _ = loss_and_grads(program_on(dense), params, batch)
    got, grads = loss_and_grads(program, other, batch)
    assert got == pytest.approx(want, rel=1e-6)
    assert np.abs(grads["dense_layers"]["0"]["mlp"]["up"]).max() > 0


def test_losses_of_routers_weigh_microbatches_by_their_targets():
    fields = {"aux_loss": 0.5, "router_z_loss": 0.25, "num_dense_layers": 1}
    config = config_with(fields, train={"grad_accum": 2})
    program = program_on(config)
    params, batch = perturbed_params(program), random_batch(config)
    _, both = run_on(program, params, batch)
    one = program_on(config_with(fields, train={"batch_size": config.train.batch_size // 2}))
    each = [run_on(one, params, {k: v[i : i + 1] for k, v in batch.items()})[1] for i in range(2)]
    targets = np.array([m["targets"] for m in each])
    assert targets[0] != targets[1]
    for name in ("loss", "objective", "balance_loss", "router_z_loss", "load_imbalance"):
        assert both[name] == pytest.approx(np.average([m[name] for m in each], weights=targets), rel=1e-5)
    # two layers with experts, whose losses add up; metrics are means over them
    added = 2 * (0.5 * both["balance_loss"] + 0.25 * both["router_z_loss"])
    assert both["objective"] == pytest.approx(both["loss"] + added, rel=1e-5)


def test_overflow_is_a_metric():
    config = config_with(train={"batch_size": 8, "grad_accum": 2})
    config = config.model_copy(update={"mesh": config.mesh.model_copy(update={"capacity_factor": 0.5, "fsdp": 1})})
    program = build_program(config, program_on(config).mesh)
    _, metrics = run_on(program, perturbed_params(program), random_batch(config))
    choices = config.train.tokens_per_step * A * config.model.num_layers
    assert choices / 2 <= metrics["dropped_tokens"] <= choices / 2 + E * config.model.num_layers * 2


def train(config, num_steps):
    """Parameters at first and last, and metrics of each step, from a router that likes some experts."""
    program = program_on(config)
    params = perturbed_params(program)
    with jax.set_mesh(program.mesh):
        held, batch = place(program, params, random_batch(config))
        opt = jax.jit(program.optimizer.init)(held)
        state, metrics = {"step": jnp.zeros((), jnp.int32), "params": held, "opt": opt}, []
        for _ in range(num_steps):
            state, values = program.step(state, batch)
            metrics.append(jax.device_get(values))
        return params, jax.device_get(state["params"]), metrics


FROZEN = {"optim": {"name": "sgd", "learning_rate": 1e-9, "weight_decay": 0.0}}  # nothing moves but biases


def test_biases_balance_the_load():
    fields, rate = {"router_scores": "sigmoid", "router_bias_rate": 0.03}, 0.03
    first, last, metrics = train(config_with(fields, train={"steps": 60}, **FROZEN), 60)
    assert metrics[0]["load_imbalance"] > 1.6
    assert np.mean([m["load_imbalance"] for m in metrics[-5:]]) < 1.25
    moved = (last["layers"]["0"]["moe"]["router"]["bias"] - first["layers"]["0"]["moe"]["router"]["bias"]) / rate
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-3, err_msg="whole steps")
    weights = [tree["layers"]["0"]["moe"]["router"]["weight"] for tree in (last, first)]
    np.testing.assert_allclose(*weights, atol=1e-6)


def test_biases_step_against_the_sign_of_their_load_error_and_stay_out_of_the_norm():
    config = config_with({"router_bias_rate": 0.01}, **FROZEN)
    program = program_on(config)
    before, after, (metrics,) = train(config, 1)
    grads, _ = run_on(program, before, random_batch(config))
    error = grads["layers"]["0"]["moe"]["router"].pop("bias")
    assert {-1, 1} <= set(np.sign(error).ravel())
    step = [tree["layers"]["0"]["moe"]["router"]["bias"] for tree in (after, before)]
    np.testing.assert_allclose(step[0] - step[1], -0.01 * np.sign(error), atol=1e-6)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
