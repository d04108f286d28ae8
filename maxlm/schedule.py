"""Learning rate as a function of the step, put together from optax schedules."""

import jax
import jax.numpy as jnp
import optax

from maxlm.config import OptimConfig


def make_schedule(optim: OptimConfig, num_steps: int) -> optax.Schedule:
    """The learning rate at every step >= 0.

    With peak p = learning_rate, final value f = p * final_fraction, warmup w, cooldown c and length n = num_steps,
    the rate of step s is p * s / w while s < w (zero at step 0), and from then on, with t = (s - w) / (n - w):

    - constant: p.
    - linear: p + (f - p) * t.
    - cosine: f + (p - f) * (1 + cos(pi * t)) / 2.
    - wsd: p until step n - c, then p + (f - p) * (s - (n - c)) / c; constant where c = 0.
    - inverse_sqrt: p * sqrt(max(w, 1) / (s - w + max(w, 1))), but at least f.

    linear, cosine and wsd reach f at step n, which is just after the last update (its step is n - 1), and stay there.

    Args:
        optim: peak and shape.
        num_steps: optimizer steps of the whole run, a count.

    Returns:
        A function of the step (int, or an int32 scalar under jit) that gives a float32 scalar.

    References:
        Loshchilov and Hutter, SGDR, 2017 (cosine); Hu et al., MiniCPM, 2024 (wsd); Vaswani et al., Attention Is All
        You Need, 2017, equation 3 (inverse_sqrt).
    """
    shape = optim.schedule
    peak, warmup = optim.learning_rate, shape.warmup_steps
    after = _after_warmup(optim, max(1, num_steps - warmup))
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # optax mixes integer steps with Python floats, which strict promotion (our tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(rate(step), jnp.float32)

    return schedule


def _after_warmup(optim: OptimConfig, num_steps: int) -> optax.Schedule:
    shape = optim.schedule
    peak, final = optim.learning_rate, optim.learning_rate * shape.final_fraction
    if shape.name == "linear":
        return optax.linear_schedule(peak, final, num_steps)
    if shape.name == "cosine":
        return optax.cosine_decay_schedule(peak, num_steps, alpha=shape.final_fraction)
    if shape.name == "wsd" and shape.cooldown_steps:
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, shape.cooldown_steps)]
        return optax.join_schedules(parts, [num_steps - shape.cooldown_steps])
    if shape.name == "inverse_sqrt":
        unit = max(shape.warmup_steps, 1)
        # join_schedules evaluates this during the warmup too, where step is negative.
        return lambda step: jnp.maximum(final, peak * jnp.sqrt(unit / (unit + jnp.maximum(step, 0))))
    return optax.constant_schedule(peak)
