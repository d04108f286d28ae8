"""How far a run may be from its prediction, by what that rests on; docs/plan.md has the reason of each number."""

import math

from maxlm.plan.step_time import STAND_IN, StepTime

RUN = (0.85, 1.2)
"""Time of a step that runs over that of the compiler's cycles and of wires: its estimates may be too careful, and they
know no stalls, jitter or input, nor wires that hide less than is taken for granted."""
FORMULAS = (0.92, 1.25)
"""The compiler's cycles over what the formulas say of the same program."""
GPU = (1.0, 2.0)
"""Time of a step on a GPU over what the formulas say, which know neither its attention nor small products."""


def step_range(
    step_s: float, time: StepTime, kind: str, by_compiler: bool, spread: float | None = None, least_s: float = 0.0
) -> tuple[float, float]:
    """Seconds of a step, at best and at worst.

    Args:
        step_s: predicted, in s.
        time: its parts; what crosses a network of unknown speed counts as nothing at best, as STAND_IN at worst.
        kind: of the machine, "tpu" or "gpu".
        by_compiler: step_s has the compiler's cycles.
        spread: of a prediction that was fitted to measured runs of this kind of machine: how far, as a share of the
            time, they are from it, on both sides.
        least_s: what no step can be faster than (money.least_step_s).
    """
    if spread is not None:
        low, high = 1 / (1 + spread), 1 + spread
    elif kind == "gpu":
        low, high = GPU
    else:
        low, high = RUN if by_compiler else _both(RUN, FORMULAS)
    return min(step_s, max(step_s * low, least_s)), step_s * high + time.unknown_bytes / STAND_IN


def _both(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The range of a product of two factors that know nothing of each other."""
    low, high = (math.hypot(a - 1, b - 1) for a, b in zip(one, other, strict=True))
    return 1 - low, 1 + high
