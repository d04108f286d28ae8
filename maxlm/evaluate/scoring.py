"""Log-likelihoods of tokens, many rows at a time: what all evaluation is made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from maxlm.config import MeshConfig
from maxlm.infer.encode import LOGITS, bucket, passes_of, put_rows, whole
from maxlm.infer.models import OpenModel
from maxlm.mesh import axis_sizes
from maxlm.passes import PlainPasses
from maxlm.sharding import compute_spec


class EvaluationError(ValueError):
    """An evaluation that was asked for wrongly; one sentence that says what would be right."""


class Scorer:
    """A model, ready to score rows of tokens.

    Args:
        opened: the model.
        batch_tokens: tokens on all devices at a time.
        mesh: that with which it was opened.

    Raises:
        EvaluationError: its tokens see those that follow.
    """

    def __init__(self, opened: OpenModel, mesh: MeshConfig, batch_tokens: int):
        if not opened.model.causal:
            raise EvaluationError(
                f"model.causal=false: each token of {opened.place} sees those that follow, so that next-token "
                "likelihoods mean nothing; it gives hidden states and logits of whole texts (docs/convert.md)"
            )
        self.opened, self._mesh, self._batch_tokens = opened, mesh, batch_tokens
        sizes = axis_sizes(mesh, opened.mesh.size)
        self._shards = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
        self._runs = dict[tuple[int, bool], tuple[int, Callable]]()

    def check_context(self, context: int) -> None:
        """Refuses a number of tokens for which the model has no positions.

        Raises:
            EvaluationError: it has fewer.
        """
        model = self.opened.model
        if model.position == "learned" and context > (model.max_positions or 0):
            raise EvaluationError(
                f"context={context} is more than the {model.max_positions} positions that {self.opened.place} has "
                f"learned; use --context {model.max_positions} or less"
            )

    def rows_at_once(self, T: int, greedy: bool = False) -> int:
        """Rows of T tokens in a batch."""
        num_tokens = self._batch_tokens
        if greedy:
            num_tokens = min(num_tokens, LOGITS * self._shards // self.opened.model.padded_vocab)
        return max(1, num_tokens // T // self._shards) * self._shards

    def score(self, tokens_BT: np.ndarray, targets_BT: np.ndarray, greedy: bool = False) -> tuple[np.ndarray, ...]:
        """Scores targets, each after the tokens up to its place.

        Args:
            tokens_BT: int ids, at most rows_at_once(T, greedy) rows.
            targets_BT: likewise.
            greedy: says also whether each target is the likeliest token.

        Returns:
            Log-likelihoods in nats, float32 [B, T], and, if asked for, bool [B, T].
        """
        B, T = tokens_BT.shape
        num_rows, run = self._run(T, greedy)
        rows = [np.zeros((num_rows, T), np.int32) for _ in range(2)]
        for row, given in zip(rows, (tokens_BT, targets_BT), strict=True):
            row[:B] = given
        with jax.set_mesh(self.opened.mesh):
            found = run(self.opened.params, *(put_rows(row) for row in rows))
        losses, *hits = (whole(x)[:B] for x in found if x is not None)
        return -losses, *hits

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], advance: Callable[[int], None] = lambda _: None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations.

        Args:
            pairs: token ids of context and continuation, neither empty; the context's first are left out where the
                model's context is shorter.
            advance: hears of the number of pairs that are done.

        Returns:
            For each, the log-likelihood in nats, and whether it is what greedy decoding gives.
        """
        longest, size = self.opened.context, self.opened.model.vocab_size
        for pair in pairs:
            if (most := max(map(max, pair))) >= size:
                raise EvaluationError(f"a text has the token id {most}, and the model has vocab_size={size}")
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for T, numbers in self._buckets([min(longest, len(a) + len(b) - 1) for a, b in pairs]):
            tokens_BT, targets_BT = (np.zeros((len(numbers), T), np.int32) for _ in range(2))
            spans = []
            for row, number in enumerate(numbers):
                ids = [*pairs[number][0], *pairs[number][1]][-(longest + 1) :]
                end = len(ids) - 1
                tokens_BT[row, :end], targets_BT[row, :end] = ids[:-1], ids[1:]
                spans.append(slice(max(0, end - len(pairs[number][1])), end))
            scores, hits = self.score(tokens_BT, targets_BT, greedy=True)
            for row, (number, span) in enumerate(zip(numbers, spans, strict=True)):
                found[number] = (float(scores[row, span].sum(dtype=np.float64)), bool(hits[row, span].all()))
            advance(len(numbers))
        return found

    def bucket(self, length: int) -> int:
        """Tokens of the row in which so many are scored; what the mesh's context shards divide."""
        learned = self.opened.model.max_positions if self.opened.model.position == "learned" else None
        return bucket(length, learned)

    def _buckets(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Batches of numbers of rows, the longest first: what does not fit into memory shows at once."""
        by_bucket = dict[int, list[int]]()
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            by_bucket.setdefault(self.bucket(lengths[number]), []).append(number)
        for T, numbers in by_bucket.items():
            count = self.rows_at_once(T, greedy=True)
            for i in range(0, len(numbers), count):
                yield T, numbers[i : i + count]

    def _run(self, T: int, greedy: bool) -> tuple[int, Callable]:
        """Rows, and the compiled function of that many."""
        if (T, greedy) not in self._runs:
            num_rows = self.rows_at_once(T, greedy)
            passes = passes_of(self.opened, self._mesh, num_rows, T)
            self._runs[T, greedy] = num_rows, jax.jit(partial(_losses, passes, greedy))
        return self._runs[T, greedy]


def _losses(
    passes: PlainPasses, greedy: bool, params: dict, tokens_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    places_BT = jax.lax.broadcasted_iota(jax.numpy.int32, tokens_BT.shape, 1, out_sharding=compute_spec("BS"))
    # what fills a row up comes after all that is scored, which does not see it
    rows = {"tokens": tokens_BT, "targets": targets_BT, "positions": places_BT, "segments": 0 * places_BT + 1}
    return passes.token_losses(params, rows, greedy)
