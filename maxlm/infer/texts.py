"""Texts that continue prompts: batches of them, those of about one length together."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from maxlm.infer.generate import Generator, check_prompts
from maxlm.infer.sampling import Sampling
from maxlm.infer.text import TextStream


@dataclass(frozen=True)
class Options:
    """How prompts are continued.

    Attributes:
        max_tokens: of a continuation, at most.
        sampling: how tokens are drawn.
        stop: texts that end it, and are left out.
        seed: of what is drawn.
        batch_size: prompts at a time.
    """

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Continuation:
    """What a prompt was continued with.

    Attributes:
        number: of the prompt, from 0.
        text: without what ended it.
        ids: its tokens, those of a stop text included.
        ended_by: "eos", "stop" or "length".
    """

    number: int
    text: str
    ids: list[int]
    ended_by: str


def continue_texts(
    generator: Generator,
    decode: Callable[[Sequence[int]], str],
    eos_ids: Collection[int],
    prompts: Sequence[Sequence[int]],
    options: Options,
    tell: Callable[[int, str], None] | None = None,
) -> Iterator[Continuation]:
    """Continues prompts, long ones first; what comes out does not hang on the batches.

    Args:
        generator: the model.
        decode: ids to text, of its tokenizer.
        eos_ids: tokens that end a text.
        prompts: token ids of each.
        options: how.
        tell: hears (number, piece) while texts grow.

    Yields:
        Each as it is done.

    Raises:
        ValueError: a prompt that cannot be continued, before any is.
    """
    check_prompts(generator.model, prompts, options.max_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), options.batch_size):
        numbers = order[first : first + options.batch_size]
        streams = [TextStream(decode, eos_ids, options.stop, options.max_tokens) for _ in numbers]
        steps = generator.tokens(
            [prompts[i] for i in numbers],
            options.max_tokens,
            options.sampling,
            options.seed,
            numbers,
            num_rows=min(options.batch_size, len(prompts)),
        )
        for tokens in steps:
            for number, stream, token in zip(numbers, streams, tokens.tolist(), strict=True):
                going = stream.ended_by is None
                piece = stream.push(token)
                if piece and tell:
                    tell(number, piece)
                if going and stream.ended_by is not None:
                    yield Continuation(number, stream.text, stream.ids, stream.ended_by)
            if all(stream.ended_by is not None for stream in streams):
                break
        steps.close()
