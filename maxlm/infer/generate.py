"""Generation: batches of prompts of different lengths through the decoder, token by token."""

import collections.abc
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.config import ModelConfig
from maxlm.infer.decoder import Decoder, Params
from maxlm.infer.sampling import Sampling
from maxlm.sharding import axis_size, compute_spec

SMALLEST_BUCKET = 16
"""Tokens; longer prompts are padded to powers of two, so that few prefills are compiled."""
CACHE_MULTIPLE = 64
"""Tokens; sizes of caches are multiples of it."""


def check_prompts(model: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Refuses what cannot be continued.

    Raises:
        ValueError: the model cannot, or a prompt is empty, has ids beyond the vocabulary, or is too long for learned
            positions.
    """
    if not model.causal:
        raise ValueError(
            "model.causal=false: each token sees those that follow, so the model cannot continue a text; "
            "it gives hidden states and logits of whole texts (docs/convert.md)"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i + 1} is empty; a model continues at least one token")
        if max(prompt) >= model.vocab_size or min(prompt) < 0:
            raise ValueError(f"prompt {i + 1} has the token {max(prompt)}, and vocab_size={model.vocab_size}")
        limit = model.max_positions if model.position == "learned" else None
        if limit is not None and len(prompt) + max_tokens > limit:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens, and with {max_tokens} more they are above the model's "
                f"{limit} positions; shorten it or lower max_tokens"
            )


class Generator:
    """A model on its mesh, ready to continue prompts.

    Args:
        model: its config.
        params: as a Transformer's, in the compute dtype, on the mesh; they are taken apart, and the dict is emptied.
        mesh: without stages and context shards.
    """

    def __init__(self, model: ModelConfig, params: Params, mesh: Mesh):
        check_prompts(model, [], 0)
        if mesh.shape.get("stage", 1) > 1 or mesh.shape.get("context", 1) > 1:
            raise ValueError("mesh.stage and mesh.context must be 1 to generate; use mesh.tensor or mesh.data")
        self.model, self.mesh = model, mesh
        self._decoder = Decoder(model, mesh)
        self._params = self._decoder.unstack(params)

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        num_rows: int = 0,
    ) -> collections.abc.Generator[np.ndarray, None, None]:
        """Continues prompts together; the device is one step ahead of what has been yielded.

        Args:
            prompts: token ids of each.
            max_tokens: tokens to generate, at most: stop iterating to end before.
            sampling: default: the likeliest tokens.
            seed: of what is drawn.
            numbers: of the prompts, which what is drawn hangs on; default: their places.
            num_rows: of the batch, at least: batches of one size take one program.

        Yields:
            int32 [number of prompts], the next token of each.

        Raises:
            ValueError: see check.
        """
        check_prompts(self.model, prompts, max_tokens)
        if not prompts or max_tokens < 1:
            return
        sampling = sampling or Sampling()
        with jax.set_mesh(self.mesh):
            at_once = axis_size("slice", "data", "fsdp", "expert")
            tokens_BT, starts_B = pack_left(prompts, -(-max(num_rows, len(prompts)) // at_once) * at_once)
            numbers_B = np.zeros(len(starts_B), np.int32)
            numbers_B[: len(prompts)] = range(len(prompts)) if numbers is None else numbers
            size = -(-(tokens_BT.shape[1] + max_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
            rows = [jax.device_put(tokens_BT, compute_spec("BT")), jax.device_put(starts_B, compute_spec("B"))]
            drawn = jnp.asarray(numbers_B), jnp.asarray(seed, jnp.int32)
            found, cache = self._decoder.prefill(self._params, *rows, *drawn, size=size, sampling=sampling)
        for i in range(max_tokens):
            ahead = found
            if i + 1 < max_tokens:
                with jax.set_mesh(self.mesh):
                    ahead, cache = self._decoder.step(self._params, cache, found, *drawn, sampling=sampling)
            yield np.asarray(found.addressable_shards[0].data)[: len(prompts)]
            found = ahead


def pack_left(prompts: Sequence[Sequence[int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that all end at the last place of their rows, and where they begin: int32 [B, T] and [B].

    Args:
        prompts: token ids.
        num_rows: B; rows without a prompt hold one token.
    """
    longest = max(SMALLEST_BUCKET, *map(len, prompts))
    T = 1 << (longest - 1).bit_length()
    tokens_BT = np.zeros((num_rows, T), np.int32)
    starts_B = np.full(num_rows, T - 1, np.int32)
    for row, prompt in enumerate(prompts):
        starts_B[row] = T - len(prompt)
        tokens_BT[row, starts_B[row] :] = prompt
    return tokens_BT, starts_B
