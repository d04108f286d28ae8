"""Sample text from a model in training: a look at what it has learned, not a server."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.sharding import axis_size, compute_spec
from maxlm.step import Program


def sample(
    program: Program, params: Any, prompt: list[int], num_tokens: int, eos_id: int, temperature: float, seed: int = 0
) -> list[int]:
    """Continues a prompt token by token; every token is a forward pass over the whole row.

    Args:
        program: the run's program.
        params: its parameters, at rest.
        prompt: token ids; at least one. Only the last of them fit when it is long.
        num_tokens: ids to generate at most; prompt and continuation fit in train.seq_len.
        eos_id: generation ends at this id.
        temperature: logits are divided by this; 0 takes the likeliest token.
        seed: of the draw.

    Returns:
        The generated ids, without eos_id.
    """
    T = program.config.train.seq_len
    prompt = prompt[-max(1, T - num_tokens) :]
    end = min(T, len(prompt) + num_tokens)
    # every row holds the same text: one for each device that splits rows is what the mesh can hold at least
    with jax.set_mesh(program.mesh):
        rows = axis_size("slice", "data", "fsdp", "expert")
    tokens_BT = np.full((rows, T), eos_id, np.int32)
    tokens_BT[:, : len(prompt)] = prompt

    def draw(i: jax.Array, tokens_BT: jax.Array, params: Any) -> jax.Array:
        everywhere = jnp.ones_like(tokens_BT)
        positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=compute_spec("BS"))
        batch = {"tokens": tokens_BT, "positions": positions_BT, "segments": everywhere}
        logits_V = program.next_logits(params, batch, i - 1)
        key = jax.random.fold_in(jax.random.key(seed), i)
        drawn = jax.random.categorical(key, logits_V / temperature) if temperature > 0 else jnp.argmax(logits_V)
        return jnp.where(positions_BT == i, drawn.astype(jnp.int32), tokens_BT)

    @jax.jit
    def generate(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(len(prompt), end, lambda i, t: draw(i, t, params), tokens_BT)

    with jax.set_mesh(program.mesh):
        out = generate(params, jax.device_put(tokens_BT, compute_spec("BS")))
    ids = np.asarray(out.addressable_shards[0].data)[0, len(prompt) : end].tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
