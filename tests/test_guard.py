"""Steps that do not count: not finite, or a spike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import guard


def judged(losses, norms=None, sigma=3.0):
    """What is said of each of these steps in turn."""
    norms, recent, said = norms or [1.0 + 0.01 * (i % 5) for i in range(len(losses))], guard.no_steps(), []
    judge = jax.jit(guard.judge, static_argnums=4)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        counts, recent = judge(jnp.int32(step), jnp.float32(loss), jnp.float32(norm), recent, sigma)
        said.append(bool(counts))
    return said


def noisy(count, seed=0):
    return list(2.0 + 0.1 * np.random.default_rng(seed).standard_normal(count).clip(-2, 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_counts(bad):
    for loss, norm in ((bad, 1.0), (1.0, bad)):
        assert not guard.judge(jnp.int32(0), jnp.float32(loss), jnp.float32(norm), None, None)[0]
    assert guard.judge(jnp.int32(0), jnp.float32(1), jnp.float32(1), None, None)[0]
    assert not guard.judge(jnp.int32(~5), jnp.float32(1), jnp.float32(1), None, None)[0], "after a bad one"


def test_spikes_of_loss_and_of_gradients_are_found_and_others_are_not():
    losses = noisy(300)
    assert all(judged(losses))
    losses[200] = 2.8
    assert [i for i, counts in enumerate(judged(losses)) if not counts] == [200]
    norms = [1.0 + 0.1 * x for x in noisy(300, seed=1)]
    norms[250] = 5.0
    assert [i for i, counts in enumerate(judged(noisy(300), norms)) if not counts] == [250]


def test_falls_are_no_spikes_and_nothing_is_one_before_enough_is_known():
    losses = noisy(100)
    losses[60] = 0.5
    assert all(judged(losses))
    early = noisy(100)
    early[guard.LEAST - 1] = 50.0
    assert all(judged(early))
    early = noisy(100)
    early[guard.LEAST] = 50.0
    assert judged(early).count(False) == 1


def test_a_new_level_is_not_skipped_for_good():
    said = judged(noisy(200) + [x + 3 for x in noisy(100, seed=2)])
    assert not said[200] and all(said[230:])


def test_judged_again_a_step_is_judged_the_same():
    recent = guard.no_steps()
    for step, loss in enumerate(noisy(150)):
        _, recent = guard.judge(jnp.int32(step), jnp.float32(loss), jnp.float32(1 + loss / 10), recent, 3.0)
    for loss in (2.05, 2.9):
        once, after = guard.judge(jnp.int32(150), jnp.float32(loss), jnp.float32(1.2), recent, 3.0)
        again, same = guard.judge(jnp.int32(150), jnp.float32(loss), jnp.float32(1.2), after, 3.0)
        assert bool(once) == bool(again) == (loss < 2.5)
        np.testing.assert_array_equal(after, same)
    _, same = guard.judge(jnp.int32(~150), jnp.float32(2.9), jnp.float32(1.2), after, 3.0)
    np.testing.assert_array_equal(after, same, err_msg="nothing is remembered while nothing may change")
