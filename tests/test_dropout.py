"""Dropout: how much, where, when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import perturbed_params, place, program_on, random_batch, small_config

from maxlm.model.dropout import dropout

NUM_TOKENS, WIDTH = 400, 512


def kept(rate=0.25, place=3, seed=0):
    noise = jax.random.bits(jax.random.key(seed), (NUM_TOKENS,), jnp.uint32)
    out = np.asarray(dropout(rate, noise, jnp.ones((NUM_TOKENS, WIDTH)), place))
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)
    return out > 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_share_is_dropped_of_every_token_and_every_feature(rate):
    mask = kept(rate)
    spread = np.sqrt(rate * (1 - rate))
    assert abs(mask.mean() - (1 - rate)) < 4 * spread / np.sqrt(mask.size)
    for axis, count in ((0, NUM_TOKENS), (1, WIDTH)):
        shares = mask.mean(axis)
        # as far apart as independent draws are
        assert shares.std() == pytest.approx(spread / np.sqrt(count), rel=0.15)


def test_tokens_features_places_and_steps_are_independent():
    mask = kept() - 0.75
    variance = 0.75 * 0.25
    bound = 5 / np.sqrt(mask.size)
    neighbours = {
        "tokens": mask[1:] * mask[:-1],
        "features": mask[:, 1:] * mask[:, :-1],
        "places": mask * (kept(place=4) - 0.75),
        "steps": mask * (kept(seed=1) - 0.75),
    }
    for name, products in neighbours.items():
        assert abs(products.mean() / variance) < bound, name


def test_the_gradient_passes_where_the_value_does():
    noise = jax.random.bits(jax.random.key(0), (4,), jnp.uint32)
    x = jnp.full((4, 32), 2.0, jnp.bfloat16)
    y, pull = jax.vjp(lambda x: dropout(0.5, noise, x, 0), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(pull(jnp.ones_like(y))[0]), np.float32(y) / 2)


def run(accum=1, **train):
    config = small_config(train={"grad_accum": accum, **train})
    program, batch = program_on(config), random_batch(config)
    params = perturbed_params(program)
    with jax.set_mesh(program.mesh):
        params, batch = place(program, params, batch)
        losses = [float(program.grads(params, batch, step)[1]["loss"]) for step in (0, 0, 1)]
        return losses, float(program.evaluate(params, batch)[0])


@pytest.mark.slow
def test_a_run_drops_by_step_and_seed_in_training_alone():
    plain, evaluated = run()
    losses, evaluated_too = run(dropout=0.2)
    assert plain[0] == plain[1] == plain[2]
    assert evaluated == evaluated_too
    assert losses[0] == losses[1]
    assert len({plain[0], losses[0], losses[2], run(dropout=0.2, seed=1)[0][0]}) == 4


def test_microbatches_drop_alike():
    assert run(2, dropout=0.2)[0] == pytest.approx(run(1, dropout=0.2)[0], rel=1e-5)
