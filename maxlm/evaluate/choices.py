"""Multiple choice: the answer is the choice that the model finds likeliest."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maxlm.data.tokenizer import Tokenizer
from maxlm.evaluate.scoring import EvaluationError, Scorer


class Question(BaseModel):
    """A line of a file.

    Attributes:
        context: what comes before the choices; may be called question.
        choices: texts; a space is put before each, unless there is one.
        answer: number of the right one, from 0.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    context: str
    choices: tuple[str, ...] = Field(min_length=2, strict=False)
    answer: int = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            raise ValueError("it is no object")
        named = [name for name in ("context", "question") if name in tree]
        if len(named) != 1:
            raise ValueError("it needs context or question, one of them")
        return {**tree, "context": tree[named[0]]}

    @model_validator(mode="after")
    def _fits(self) -> "Question":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer={self.answer} is not one of {len(self.choices)} choices, counted from 0")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        return self

    @property
    def continuations(self) -> list[str]:
        """The choices as they follow the context."""
        joined = not self.context or self.context[-1].isspace()
        return [c if joined or c[0].isspace() else f" {c}" for c in self.choices]


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right.

    Attributes:
        questions: as a count.
        acc: share in which the right choice has the highest log-likelihood.
        acc_stderr: standard error of it.
        acc_norm: likewise, of log-likelihood per byte of the choice (lm-eval's acc_bytes).
        acc_norm_stderr: standard error of it.
    """

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float


def read_questions(lines: Iterable[str | bytes], name: str) -> list[Question]:
    """Parses lines of JSON.

    Args:
        lines: of the file; empty ones are left out.
        name: of the file, for messages.

    Raises:
        EvaluationError: names the first line that is no question, and why; or there is none.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(Question.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where, why = ".".join(map(str, first["loc"]))[:80], first["msg"].removeprefix("Value error, ")
            raise EvaluationError(f"{name}, line {number}: {where + ': ' if where else ''}{why[:200]}") from None
    if not found:
        raise EvaluationError(f"{name} has no questions; write lines such as {EXAMPLE}")
    return found


EXAMPLE = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows, cut as lm-eval does.

    Both are encoded together, and spaces between them belong to what follows. Before an empty context stands the token
    that begins or ends documents.
    """
    kept = context.rstrip()
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    texts = [context + continuation] + ([kept] if context else [])
    whole, *first = (ids.tolist() for ids in tokenizer.encode_batch(texts))
    if not context:
        return ([prefix], whole) if whole[:1] != [prefix] else (whole[:1], whole[1:])
    cut = len(first[0])
    # a context of spaces alone has no tokens of its own
    return (whole[:cut] or [prefix], whole[cut:])


def measure(
    scorer: Scorer, questions: Sequence[Question], advance: Callable[[int], None] = lambda _: None
) -> tuple[Accuracy, list[list[float]]]:
    """Accuracy over questions, and the log-likelihood of each choice.

    Args:
        scorer: the model.
        questions: at least one.
        advance: hears of the number of choices that are scored.

    Raises:
        EvaluationError: the model has no context in which a choice fits.
    """
    pairs = [encode_pair(scorer.opened.tokenizer, q.context, c) for q in questions for c in q.continuations]
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= scorer.opened.context:
            raise EvaluationError(
                f"a choice has {len(continuation)} tokens, and the context of {scorer.opened.place} has "
                f"{scorer.opened.context}"
            )
    scores = iter(scorer.loglikelihoods(pairs, advance))
    found = [[next(scores)[0] for _ in q.choices] for q in questions]
    plain, normed = [], []
    for question, values in zip(questions, found, strict=True):
        sizes = [len(choice.encode()) for choice in question.choices]
        plain.append(int(np.argmax(values)) == question.answer)
        normed.append(int(np.argmax(np.divide(values, sizes))) == question.answer)
    return Accuracy(len(questions), *_share(plain), *_share(normed)), found


def _share(hits: Sequence[bool]) -> tuple[float, float]:
    """Mean, and standard error of it (with n - 1, as lm-eval)."""
    mean, n = sum(hits) / len(hits), len(hits)
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
