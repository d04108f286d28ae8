"""Perplexity of a text by windows that slide over it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from maxlm.evaluate.scoring import EvaluationError, Scorer

Read = Callable[[int, int], np.ndarray]
"""(start, stop) -> token ids."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text; it hangs on context and stride.

    Attributes:
        context: tokens of a window.
        stride: tokens by which it moves; all but the first window's tokens are predicted from context - stride or more.
        tokens: that were scored, as a count.
        nats_per_token: mean cross entropy.
        perplexity: exp of it.
        bits_per_byte: bits for all scored tokens, divided by the bytes of the text.
    """

    context: int
    stride: int
    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float

    def facts(self) -> dict[str, Any]:
        """As a dict, for JSON."""
        return asdict(self)


class Window(NamedTuple):
    """Tokens start to stop of the text, of which those from first are scored."""

    start: int
    first: int
    stop: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a text, in which every token but the very first is scored once.

    Args:
        num_tokens: of the text.
        context: tokens of a window.
        stride: tokens by which it moves on.
    """
    done = 1  # nothing comes before the first token
    for start in range(0, num_tokens, stride):
        stop = min(start + context, num_tokens)
        if stop > done:
            yield Window(start, done, stop)
        done = stop
        if stop == num_tokens:
            return


def measure(
    scorer: Scorer,
    read: Read,
    num_tokens: int,
    num_bytes: int,
    context: int,
    stride: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """Perplexity of a text.

    Args:
        scorer: the model.
        read: gives tokens of the text.
        num_tokens: of the text.
        num_bytes: of the text, in UTF-8.
        context: tokens of a window.
        stride: tokens by which it moves, at most context.
        advance: hears of the number of tokens that are done.

    Raises:
        EvaluationError: the text is too short, or context and stride do not fit each other or the model.
    """
    check_windows(context, stride)
    scorer.check_context(context)
    if num_tokens < 2:
        raise EvaluationError(f"the text has {num_tokens} tokens; a perplexity needs 2 or more")
    T = scorer.bucket(min(context, num_tokens))
    count, total, batch = 0, 0.0, list[Window]()

    def flush() -> None:
        nonlocal count, total
        tokens_BT, targets_BT = (np.zeros((len(batch), T), np.int32) for _ in range(2))
        mask_BT = np.zeros((len(batch), T), bool)
        for row, window in enumerate(batch):
            ids, end = read(window.start, window.stop), window.stop - window.start - 1
            tokens_BT[row, :end], targets_BT[row, :end] = ids[:-1], ids[1:]
            mask_BT[row, window.first - window.start - 1 : end] = True
        if tokens_BT.max() >= (size := scorer.opened.model.vocab_size):
            raise EvaluationError(f"the text has the token id {tokens_BT.max()}, and the model has vocab_size={size}")
        total -= float(scorer.score(tokens_BT, targets_BT)[0][mask_BT].sum(dtype=np.float64))
        count += int(mask_BT.sum())
        advance(int(mask_BT.sum()))
        batch.clear()

    for window in windows(num_tokens, context, stride):
        batch.append(window)
        if len(batch) == scorer.rows_at_once(T):
            flush()
    if batch:
        flush()
    mean = total / count
    return Perplexity(context, stride, count, mean, _exp(mean), total / math.log(2) / max(1, num_bytes))


def check_windows(context: int, stride: int) -> None:
    """Refuses windows that leave tokens out.

    Raises:
        EvaluationError: names the value.
    """
    if context < 2:
        raise EvaluationError(f"--context {context} is too short: a token is predicted from those before it; use 2")
    if not 1 <= stride < context:
        raise EvaluationError(f"--stride {stride} must be from 1 to {context - 1}, below --context {context}")


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
