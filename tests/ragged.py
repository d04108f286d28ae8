"""What XLA's CPU backend lacks: ragged_all_to_all, out of an all_gather, for tests of code that calls it."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """As jax.lax.ragged_all_to_all, by the text of its documentation.

    Where the real one would be undefined the result is NaN: receivers that expect other sizes than are sent, slices
    that leave their array, slices that overlap.
    """
    me, count = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def to_me(x):  # [slices] -> [devices * slices / devices], as an all_to_all does it
        everyone = jax.lax.all_gather(x, axis_name)
        return jnp.take(everyone.reshape(count, count, -1), me, axis=1).reshape(-1)

    sizes, starts, places = to_me(send_sizes), to_me(input_offsets), to_me(output_offsets)
    sources = jnp.repeat(jnp.arange(count), sizes.shape[0] // count)
    num_rows = output.shape[0]
    row = jnp.arange(num_rows)
    inside = (row[None] >= places[:, None]) & (row[None] < (places + sizes)[:, None])  # [slices, rows]
    slice_ = jnp.argmax(inside, 0)
    data = jax.lax.all_gather(operand, axis_name)
    arrived = data[sources[slice_], jnp.minimum(starts[slice_] + row - places[slice_], operand.shape[0] - 1)]
    column = lambda x: x.reshape(-1, *[1] * (operand.ndim - 1))  # noqa: E731
    result = jnp.where(column(inside.any(0)), arrived, output)
    sound = (sizes == recv_sizes).all() & (inside.sum(0) <= 1).all() & (sizes >= 0).all()
    sound &= (starts + sizes <= operand.shape[0]).all() & (places + sizes <= num_rows).all() & (places >= 0).all()
    return jnp.where(sound, result, jnp.asarray(jnp.nan, result.dtype))
