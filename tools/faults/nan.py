"""Steps whose loss is not a number."""

import numpy as np

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.resume import CHILD
from tools.faults.work import Work, fault

STEPS = 20
LIMIT = 3


def run(work: Work) -> list[Outcome]:
    """A bad step changes nothing; so many in a row end the run."""
    return [_skipped(work), _given_up(work)]


def _skipped(work: Work) -> Outcome:
    outcome = Outcome("NaN in the loss of a step", lost_steps=0, lost_batches=0)
    choices = [[7]] if work.short else [[7], [0], [STEPS - 1], [4, 5], [3, 9, 10, 16]]
    for bad in choices:
        with outcome.attempt(f"NaN at steps {bad}"):
            name = "_".join(map(str, bad))
            run, without = (work.config(f"{kind}_{name}", train={"steps": STEPS}) for kind in ("nan", "without"))
            said = work.finish(run, program=CHILD, env={"CHAOS": fault(bad_at=bad)})
            steps = STEPS - len(bad)
            env = {"CHAOS": fault(without=bad)}
            work.finish(without, f"train.steps={steps}", program=CHILD, env=env)
            here = compare.restored(work.run_folder(run), STEPS)
            there = compare.restored(work.run_folder(without), steps)
            wrong = compare.different(here, there, without=("step",))
            need(not wrong, f"{len(wrong)} arrays are not those of a run without these steps, {wrong[:1]} first")
            need(all(f"step {step + 1} has the loss" in said for step in bad), "no message names the step")
            need(sorted(compare.losses(work.run_folder(run))) == list(range(1, STEPS + 1)), "metrics lack a step")
    outcome.notes.append("weights and moments bit-equal to a run whose data lacks those batches")
    return outcome


def _given_up(work: Work) -> Outcome:
    outcome = Outcome(f"NaN in {LIMIT} steps in a row", lost_steps=0)
    with outcome.attempt(f"NaN in {LIMIT} steps in a row"):
        config = work.config("nan_row", train={"steps": STEPS, "max_bad_steps": LIMIT})
        first = 6  # steps 7, 8 and 9, between two saves
        env = {"CHAOS": fault(bad_at=list(range(first, first + LIMIT)))}
        said = work.finish(config, program=CHILD, env=env, code=1)
        need("error: the loss of step" in said, "no sentence says so")
        saved = compare.latest(work.run_folder(config))
        need(saved == 5, f"the newest checkpoint is of step {saved}, not 5")
        arrays = compare.restored(work.run_folder(config), 5)
        need(all(np.isfinite(x).all() for x in arrays.values()), "the checkpoint before them is not finite")
    outcome.notes.append("exit code 1, and the checkpoint before them is whole")
    return outcome
