"""Pipeline schedules as tables: what each stage does at each tick. pipeline.py runs any of them.

A tick is one forward and one backward of a microbatch through a stage's share of layers. With several rounds a stage
holds as many shares, every num_stages-th one, and a microbatch passes the stages once per round (Narayanan et al.,
arXiv:2104.04473): the bubble shrinks to (P - 1) / (R M) of the work, for R times the messages.

1f1b (ibid.) starts the backward of a microbatch as soon as its loss is known, so that what is kept does not grow with
the number of microbatches; gpipe (Huang et al., arXiv:1811.06965) runs all forwards first.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

Kind = Literal["1f1b", "gpipe"]


@dataclass(frozen=True)
class Work:
    """One kind of work, int32 [ticks, stages]: what each stage does at a tick.

    Attributes:
        microbatch: its number.
        round: which of its shares of layers the stage runs.
        slot: where the stage keeps what the backward pass needs; idle stages have one of their own, the last.
        active: 0 where the stage is idle.
    """

    microbatch: np.ndarray
    round: np.ndarray
    slot: np.ndarray
    active: np.ndarray


@dataclass(frozen=True)
class Phase:
    """Ticks [start, stop) in which some stage has this work."""

    start: int
    stop: int
    forward: bool
    head: bool
    backward: bool


@dataclass(frozen=True)
class Schedule:
    """A pipeline's timetable.

    Attributes:
        num_stages: P.
        num_rounds: R, shares of layers per stage.
        num_microbatches: M.
        forward: by tick and stage.
        backward: by tick and stage, from the last share of layers to the first.
        num_slots: places for what a stage keeps, the idle one included.
        head: bool [ticks]: the last stage's forward ends a microbatch, so its loss and gradient are computed.
        head_write: int32 [ticks]: slot in which that gradient waits for the last stage's backward.
        head_read: int32 [ticks]: slot from which the last stage's backward takes it.
        num_head_slots: such places, one for idle ticks included.
    """

    num_stages: int
    num_rounds: int
    num_microbatches: int
    forward: Work
    backward: Work
    num_slots: int
    head: np.ndarray
    head_write: np.ndarray
    head_read: np.ndarray
    num_head_slots: int

    @property
    def phases(self) -> list[Phase]:
        """The timetable, cut where forwards end and where losses and backwards begin: loops instead of branches."""
        starts = [int(np.argmax(x)) for x in (self.head, self.backward.active.any(1))]
        forward_stop = int(np.flatnonzero(self.forward.active.any(1))[-1]) + 1
        cuts = sorted({0, *starts, forward_stop, len(self.head)})
        return [
            Phase(a, b, *(bool(x[a:b].any()) for x in (self.forward.active, self.head, self.backward.active)))
            for a, b in itertools.pairwise(cuts)
        ]

    def bubble(self) -> float:
        """Idle share of the time: (P - 1) / (R M + P - 1) when the stages divide the microbatches."""
        busy = self.num_rounds * self.num_microbatches
        ticks = sum((phase.stop - phase.start) * (phase.forward + phase.backward) for phase in self.phases) / 2
        return 1 - busy / ticks


def pipeline_schedule(kind: Kind, num_stages: int, num_rounds: int, num_microbatches: int) -> Schedule:
    """Builds a timetable.

    Args:
        kind: "1f1b" or "gpipe".
        num_stages: P.
        num_rounds: R, shares of layers per stage.
        num_microbatches: M, any number.
    """
    P, R, M = num_stages, num_rounds, num_microbatches
    items = list(_items(P, R, M))
    last = items[-1][0]
    # item n is forward on stage s at tick n + s, and backward at turn + n - s
    turn = R * P + P - 2 if kind == "1f1b" else last + 2 * P - 1
    shape = (turn + last + 1, P)
    forward, backward = (Work(*(np.zeros(shape, np.int32) for _ in fields(Work))) for _ in range(2))
    for n, microbatch, round_ in items:
        for s in range(P):
            _put(forward, n + s, s, microbatch, round_)
            _put(backward, turn + n - s, s, microbatch, R - 1 - round_)
    num_slots = max(_allot(forward, backward, s) for s in range(P))
    for work in (forward, backward):
        work.slot[work.active == 0] = num_slots
    head = (forward.active[:, -1] == 1) & (forward.round[:, -1] == R - 1)
    head_write, head_read, num_head_slots = _allot_head(head, forward, backward, R)
    return Schedule(P, R, M, forward, backward, num_slots + 1, head, head_write, head_read, num_head_slots + 1)


def _items(P: int, R: int, M: int) -> Iterator[tuple[int, int, int]]:
    """(order, microbatch, round): in groups of P microbatches, each group through all rounds before the next."""
    if R == 1:
        yield from ((n, n, 0) for n in range(M))
        return
    for n in range(-(-M // P) * P * R):
        group, place = divmod(n, P * R)
        round_, within = divmod(place, P)
        if group * P + within < M:
            yield n, group * P + within, round_


def _put(work: Work, tick: int, stage: int, microbatch: int, round_: int) -> None:
    work.microbatch[tick, stage], work.round[tick, stage], work.active[tick, stage] = microbatch, round_, 1


def _allot(forward: Work, backward: Work, stage: int) -> int:
    """Gives each forward of a stage the first free slot, until its backward; returns how many are used."""
    free: list[int] = []
    held: dict[tuple[int, int], int] = {}
    used = 0
    key = lambda work, tick: (int(work.microbatch[tick, stage]), int(work.round[tick, stage]))  # noqa: E731
    for tick in range(len(forward.active)):
        if forward.active[tick, stage]:
            if not free:
                free, used = [used], used + 1
            held[key(forward, tick)] = forward.slot[tick, stage] = free.pop(0)
        if backward.active[tick, stage]:  # in the same tick after the forward
            slot = backward.slot[tick, stage] = held.pop(key(backward, tick))
            free.append(int(slot))
    return used


def _allot_head(head: np.ndarray, forward: Work, backward: Work, R: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Slots of the losses' gradients: where each tick's loss writes and its last stage's backward reads."""
    ends, begins = (Work(*(getattr(w, f.name)[:, -1:].copy() for f in fields(Work))) for w in (forward, backward))
    ends.active[~head] = 0
    begins.active[begins.round != R - 1] = 0
    used = _allot(ends, begins, 0)
    write, read = (np.where(w.active == 1, w.slot, used)[:, 0] for w in (ends, begins))
    return write, read, used
