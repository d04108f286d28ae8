"""Pipeline timetables, by themselves."""

import itertools

import numpy as np
import pytest

from maxlm.parallel.schedule import pipeline_schedule

CASES = list(itertools.product(["1f1b", "gpipe"], [1, 2, 3, 4, 8], [1, 2, 4], [1, 2, 3, 5, 8, 16]))


def ticks(work, stage):
    """(microbatch, round) -> tick of a stage's work."""
    active = np.flatnonzero(work.active[:, stage])
    return {(int(work.microbatch[t, stage]), int(work.round[t, stage])): int(t) for t in active}


@pytest.mark.parametrize(("kind", "P", "R", "M"), CASES)
def test_everything_runs_once_in_a_legal_order(kind, P, R, M):
    schedule = pipeline_schedule(kind, P, R, M)
    everything = set(itertools.product(range(M), range(R)))
    forward = [ticks(schedule.forward, s) for s in range(P)]
    backward = [ticks(schedule.backward, s) for s in range(P)]
    for s, (microbatch, round_) in itertools.product(range(P), everything):
        assert schedule.forward.active[:, s].sum() == schedule.backward.active[:, s].sum() == R * M
        key, last = (microbatch, round_), (microbatch, R - 1)
        # what arrives was sent exactly one tick ago: a stage keeps no mail
        before = forward[s - 1][key] if s else forward[P - 1].get((microbatch, round_ - 1))
        if before is not None:
            assert forward[s][key] == before + 1
        after = backward[s + 1][key] if s + 1 < P else backward[0].get((microbatch, round_ + 1))
        if after is not None:
            assert backward[s][key] == after + 1
        assert backward[P - 1][last] >= forward[P - 1][last], "the loss comes first, in the same tick at the earliest"


@pytest.mark.parametrize(("kind", "P", "R", "M"), CASES)
def test_slots_hold_until_the_backward(kind, P, R, M):
    schedule = pipeline_schedule(kind, P, R, M)
    for s in range(P):
        held = {}
        for t in range(len(schedule.head)):
            slot = int(schedule.forward.slot[t, s])
            if schedule.forward.active[t, s]:
                assert slot not in held
                held[slot] = (schedule.forward.microbatch[t, s], schedule.forward.round[t, s])
            else:
                assert slot == schedule.num_slots - 1
            slot = int(schedule.backward.slot[t, s])
            if schedule.backward.active[t, s]:
                assert held.pop(slot) == (schedule.backward.microbatch[t, s], schedule.backward.round[t, s])
        assert not held
    held = {}
    for t in np.arange(len(schedule.head)):
        if schedule.head[t]:
            slot = int(schedule.head_write[t])
            assert slot not in held
            held[slot] = schedule.forward.microbatch[t, -1]
        if schedule.backward.active[t, -1] and schedule.backward.round[t, -1] == R - 1:
            assert held.pop(int(schedule.head_read[t])) == schedule.backward.microbatch[t, -1]
    assert not held


@pytest.mark.parametrize(("kind", "P", "R", "M"), CASES)
def test_the_bubble_is_that_of_the_formula(kind, P, R, M):
    schedule = pipeline_schedule(kind, P, R, M)
    rounded = -(-M // P) * P if R > 1 else M  # groups of P microbatches
    want = (P - 1) / (R * rounded + P - 1)
    if R == 1 or M % P == 0:
        assert schedule.bubble() == pytest.approx(want)
    else:
        assert schedule.bubble() >= want


@pytest.mark.parametrize("R", [1, 2, 4])
def test_1f1b_keeps_no_more_for_more_microbatches_and_gpipe_does(R):
    few, many = (pipeline_schedule("1f1b", 4, R, M) for M in (16, 64))
    assert few.num_slots == many.num_slots
    assert many.num_head_slots == 2
    assert pipeline_schedule("gpipe", 4, R, 64).num_slots == 64 * R + 1


def test_the_phases_cover_all_ticks_and_each_kind_of_work():
    schedule = pipeline_schedule("1f1b", 4, 2, 8)
    assert [(p.forward, p.head, p.backward) for p in schedule.phases] == [
        (True, False, False),
        (True, True, True),
        (False, False, True),
    ]
    assert sum(p.stop - p.start for p in schedule.phases) == len(schedule.head)
