"""Text out of tokens, as they come: whole characters only, and ended by what is to end it."""

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders give for the first bytes of a character whose others are still to come."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of one character."""


class TextStream:
    """The text of one continuation.

    Attributes:
        ids: tokens so far, without the one that ended it.
        text: what has been given out.
        ended_by: "eos", "stop", "length", or None while it goes on.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], eos_ids: Collection[int], stop: Sequence[str], max_tokens: int
    ):
        """Args: decode: of a tokenizer; eos_ids: end it; stop: texts that end it, and are left out."""
        if "" in stop:
            raise ValueError("stop has an empty text, which would end everything at once")
        self._decode, self._eos_ids, self._stop, self._max_tokens = decode, eos_ids, stop, max_tokens
        self.ids, self.text = list[int](), ""
        self.ended_by: str | None = None
        self._held = ""  # whole characters that may begin a stop text
        self._begin = self._end = 0  # of the ids that were decoded last: what they gave is out or held

    def push(self, token: int) -> str:
        """Takes the next token, and returns what can be given out now; nothing once the text has ended."""
        if self.ended_by is not None:
            return ""
        if token in self._eos_ids:
            return self._finish("eos")
        self.ids.append(token)
        self._held += self._new_text()
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self._held = self._held[: min(found)]
            return self._finish("stop")
        if len(self.ids) >= self._max_tokens:
            return self._finish("length")
        return self._give(len(self._held) - self._kept_back())

    def _new_text(self) -> str:
        """What the last ids add; decoded with those before, since decoders drop the space of a first word."""
        before = self._decode(self.ids[self._begin : self._end])
        now = self._decode(self.ids[self._begin :])
        waiting = now.endswith(UNFINISHED) and len(self.ids) - self._end < LONGEST_CHARACTER
        if waiting or len(now) <= len(before):
            return ""
        self._begin, self._end = self._end, len(self.ids)
        return now[len(before) :]

    def _kept_back(self) -> int:
        """Length of the longest end of what is held that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)

    def _finish(self, reason: str) -> str:
        if reason != "stop":  # half a character is given as it is
            self._held += self._decode(self.ids[self._begin :])[len(self._decode(self.ids[self._begin : self._end])) :]
            found = [at for at in map(self._held.find, self._stop) if at >= 0]
            self._held = self._held[: min(found)] if found else self._held
        self.ended_by = reason
        return self._give(len(self._held))

    def _give(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return piece
