"""What came of a fault, and the table of all of them."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


class Broken(Exception):
    """A run did not survive; the sentence says why."""


@dataclass
class Outcome:
    """Counts of one kind of fault.

    Attributes:
        fault: what was done, a phrase.
        tried: how often.
        survived: how often everything that has to hold did.
        lost_steps: steps that were done again, or None where the question does not arise.
        lost_batches: batches that were left out, repeated or changed in the final run.
        notes: measured numbers, phrases.
        failures: why something did not survive, sentences.
        seconds: wall time of all of it.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    lost_steps: int | None = None
    lost_batches: int | None = None
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def attempt(self, what: str, count: int = 1) -> Iterator[None]:
        """Counts what is done inside as tried, and as survived unless it raises Broken."""
        self.tried += count
        started = time.monotonic()
        try:
            yield
            self.survived += count
        except Broken as error:
            self.failures.append(f"{what}: {error}")
        finally:
            self.seconds += time.monotonic() - started


def need(fact: object, why: str) -> None:
    """Raises Broken unless a fact holds."""
    if not fact:
        raise Broken(why)


def table(outcomes: list[Outcome]) -> str:
    """A markdown table."""
    head = ("fault", "times tried", "survived", "lost steps", "lost or repeated batches", "notes", "seconds")
    rows = [head, ("---",) * len(head)]
    for o in outcomes:
        counts = ["–" if x is None else f"{x:,}" for x in (o.lost_steps, o.lost_batches)]
        rows.append((o.fault, f"{o.tried:,}", f"{o.survived:,}", *counts, "; ".join(o.notes), f"{o.seconds:.0f}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
