"""Optimizer state in fewer bytes, split over data, on the host: the same training, less memory."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import program_on, random_batch, small_config

from maxlm.checkpoint import Checkpoints
from maxlm.config_file import ConfigError
from maxlm.moments import Rows, _unpack, to_bfloat16, to_rows

COUNT = jnp.int32(3)


def trained(optim, steps=4, train=None, **mesh):
    """Losses, and the state after some steps."""
    config = small_config(optim=optim, train=train or {})
    program = program_on(config, **mesh)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        losses = []
        for i in range(steps):
            batch = jax.device_put(random_batch(config, seed=i), program.batch_sharding)
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, state


def arrays(tree):
    return [x for x in jax.tree.leaves(tree) if x.ndim]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", "bfloat16"), ("adamw", "int8"), ("muon", "int8"), ("adafactor", "int8")]
)
def test_small_moments_train_like_float32_ones(name, dtype):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    optim = {"name": name, "learning_rate": 3e-3}
    want, _ = trained(optim, **mesh)
    got, state = trained({**optim, "state_dtype": dtype}, **mesh)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    assert got[0] == want[0] and got != want
    own = {str(x.dtype) for x in arrays(state["opt"])}
    assert own <= ({"bfloat16"} if dtype == "bfloat16" else {"int8", "uint8", "float32"})
    if name == "muon":
        paths = jax.tree_util.tree_flatten_with_path(state["opt"])[0]
        kinds = {x.dtype for path, x in paths if "ns_coeffs" in jax.tree_util.keystr(path)}
        assert kinds == {jnp.dtype("float32")}, "constants of the algorithm, not moments"
    scales = sum(x.nbytes for x in arrays(state["opt"]) if x.dtype == jnp.float32)
    codes = sum(x.nbytes for x in arrays(state["opt"]) if x.dtype != jnp.float32)
    assert scales < codes, "one scale for each row"


@pytest.mark.parametrize("dtype", ["int8", *(pytest.param(d, marks=pytest.mark.long) for d in ("float32", "bfloat16"))])
def test_state_is_the_same_on_every_mesh(dtype):
    losses, one = trained({"state_dtype": dtype})
    again, split = trained({"state_dtype": dtype}, data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(losses, again, rtol=1e-5)
    assert [x.shape for x in arrays(one["opt"])] == [x.shape for x in arrays(split["opt"])]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("adamw", {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("muon", {"data": 2, "fsdp": 2}, marks=pytest.mark.long),
        pytest.param("adamw", {"data": 2, "stage": 3}, marks=pytest.mark.long),
    ],
)
def test_state_over_data_is_half_of_it_and_changes_nothing(name, mesh):
    train = {"grad_accum": 2}
    want, whole = trained({"name": name}, train=train, **mesh)
    got, split = trained({"name": name, "state_over_data": True}, train=train, **mesh)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    size = lambda state: sum(x.addressable_shards[0].data.nbytes for x in arrays(state["opt"]))  # noqa: E731
    assert size(split) < 0.6 * size(whole)
    for a, b in zip(jax.tree.leaves(split["params"]), jax.tree.leaves(whole["params"]), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), "parameters rest as ever"


@pytest.mark.parametrize(
    ("optim", "mesh"),
    [
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(
            {"name": "lion", "state_dtype": "int8", "state_over_data": True},
            {"data": 2, "fsdp": 2},
            marks=pytest.mark.long,
        ),
        pytest.param({}, {"fsdp": 2, "stage": 3}, marks=pytest.mark.long),
    ],
)
def test_state_on_the_host_changes_nothing(optim, mesh):
    optim = {"learning_rate": 3e-3, **optim, "clip_norm": 0.1, "freeze": [".*norm.*"], "lr_rules": {"embed": 0.5}}
    train = {"grad_accum": 2}
    want, _ = trained(optim, train=train, **mesh)
    got, state = trained({**optim, "state_on_host": True}, train=train, **mesh)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert {x.sharding.memory_kind for x in arrays(state["opt"])} == {"pinned_host"}


@pytest.mark.slow
def test_state_on_the_host_is_read_by_a_pipeline(tmp_path):
    config = small_config(optim={"state_on_host": True})
    plain, piped = program_on(config, fsdp=2), program_on(config, stage=3)
    with contextlib.closing(Checkpoints(str(tmp_path), config.checkpoint)) as checkpoints:
        with jax.set_mesh(plain.mesh):
            state = plain.init(jax.random.key(0))
            state, _ = plain.step(state, jax.device_put(random_batch(config), plain.batch_sharding))
        checkpoints.save(1, state)
        checkpoints.wait()
        again = checkpoints.restore(1, piped.state_shapes, piped.stack)
    assert {x.sharding.memory_kind for x in arrays(again["opt"])} == {"pinned_host"}
    total = lambda state: sum(float(np.abs(x).sum()) for x in arrays(state["opt"]))  # noqa: E731
    assert total(again) == pytest.approx(total(state), rel=1e-6)


def test_optimizers_that_look_at_several_layers_refuse_the_host():
    with pytest.raises(ConfigError, match="muon looks at several layers"):
        small_config(optim={"name": "muon", "state_on_host": True})


@pytest.mark.parametrize("positive", [False, True])
def test_codes_keep_the_mean_and_the_range(positive):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(64) * 10.0 ** rng.uniform(-3, 0, 64)).astype(np.float32)
    values = np.abs(values) ** 2 if positive else values
    # many copies, each a little different so that its bits are random
    x = values * (1 + 1e-3 * rng.standard_normal((4000, 64))).astype(np.float32)
    rows = to_rows(jnp.asarray(x), COUNT, positive)
    back = np.asarray(_unpack(rows))
    power, top = (4, 255) if positive else (2, 127)
    largest = np.abs(x).max(-1, keepdims=True)
    share = np.abs(x) / largest
    step = largest * ((share ** (1 / power) + 1 / top) ** power - share)
    assert (np.abs(back - x) <= 1.01 * step).all()
    np.testing.assert_array_less(np.abs(back.mean(0) - x.mean(0)), 3 * step.max(0) / np.sqrt(4000))
    if positive:
        assert (back > 0).all(), "only zero becomes zero: updates divide by it"


def test_rows_of_zeros_stay_zero():
    rows = to_rows(jnp.zeros((3, 5)), COUNT, True)
    assert isinstance(rows, Rows)
    np.testing.assert_array_equal(_unpack(rows), np.zeros((3, 5)))


def test_bfloat16_is_rounded_without_bias():
    x = np.float32(1.001) + np.float32(1e-7) * np.arange(4000, dtype=np.float32)
    back = np.asarray(to_bfloat16(jnp.asarray(x), COUNT)).astype(np.float32)
    assert set(back) == {np.float32(1.0), np.float32(1.0078125)}
    assert abs(back.mean() - x.mean()) < 5 * 0.0078 * 0.5 / np.sqrt(4000)
    again = np.asarray(to_bfloat16(jnp.asarray(x), COUNT + 1)).astype(np.float32)
    assert (back != again).any(), "other bits at another step"


def test_an_average_moves_by_less_than_a_step_of_its_type():
    """Rounded to nearest, bfloat16 1.0 times 0.999 is 1.0 for ever."""
    rng = np.random.default_rng(0)
    value = jnp.ones(512, jnp.bfloat16)
    for i in range(200):
        news = jnp.asarray(rng.standard_normal(512), jnp.float32)
        value = to_bfloat16(0.999 * value.astype(jnp.float32) + 0.001 * news, COUNT + i)
    assert abs(float(value.astype(jnp.float32).mean()) - 0.999**200) < 0.01
