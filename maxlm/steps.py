"""The checkpoints that a run has, as far as the names in its folder and their manifests say."""

import os
import re

from maxlm import manifest, storage
from maxlm.manifest import CheckpointError, Manifest

DAMAGED = "DAMAGED.json"
"""In the folder of a step that is put aside: why, and when."""


class StepError(ValueError):
    """A checkpoint that is not there; one sentence that says what is."""


class Steps:
    """The checkpoints of one run, in RUN/checkpoints/STEP.

    Attributes:
        run_dir: folder or gs:// bucket of the run.
        path: of the checkpoints.
    """

    def __init__(self, run_dir: str):
        self.run_dir, self.path = run_dir, storage.join(run_dir, "checkpoints")
        self._aside = set[int]()

    def steps(self) -> list[int]:
        """Complete steps that are not put aside, oldest first."""
        return [step for step in self.folders() if step not in self._aside and self._complete(step)]

    def latest(self) -> int | None:
        """The newest of steps(), or None."""
        return max(self.steps(), default=None)

    def folders(self) -> list[int]:
        """Steps of all there is, usable or not, oldest first."""
        return sorted(int(name) for name in storage.list_dir(self.path) if re.fullmatch(r"0|[1-9][0-9]*", name))

    def manifest(self, step: int) -> Manifest | None:
        """That of a step; None of steps from before there were manifests.

        Raises:
            DamagedError: it is missing or damaged.
        """
        names = storage.list_dir(self.step_path(step))
        return None if _old(self.path, names) else Manifest.read(self.step_path(step))

    def step_path(self, step: int) -> str:
        """Folder of a step."""
        return storage.join(self.path, str(step))

    def known_path(self, step: int) -> str:
        """Folder of a step that has a manifest.

        Raises:
            CheckpointError: it is from before there were any.
        """
        path = self.step_path(step)
        if _old(self.path, storage.list_dir(path)):
            raise CheckpointError(f"{path} is of an older maxlm: continue the run to save anew")
        return path

    def latest_path(self) -> str | None:
        """Folder of the newest step; None of none."""
        step = self.latest()
        return None if step is None else self.step_path(step)

    def _complete(self, step: int) -> bool:
        names = storage.list_dir(self.step_path(step))
        return DAMAGED not in names and (manifest.NAME in names or _old(self.path, names))


def split(place: str) -> tuple[str, int | None]:
    """The run and the step of RUN or RUN@STEP. A run's own name may end like that."""
    run, at, text = place.rpartition("@")
    named = at and text.isdecimal() and len(text) <= 18 and not storage.exists(storage.join(place, "checkpoints"))
    return (run, int(text)) if named else (place, None)


def chosen(place: str, step: int | None = None) -> tuple[Steps, list[int]]:
    """The checkpoints that a local run means.

    Args:
        place: RUN or RUN@STEP; what `maxlm convert from-hf` wrote is a run too.
        step: the same as @STEP.

    Returns:
        All checkpoints of the run, and those that are meant: the one of that step, or all, newest first.

    Raises:
        StepError: there is none.
    """
    if storage.is_bucket(place):
        raise StepError(f"{place} is in a bucket; copy the run to a local folder, and take it from there")
    run, named = split(place)
    if None not in (named, step) and named != step:
        raise StepError(f"{place} names another checkpoint than step={step}; give one of them")
    wanted = step if named is None else named
    if not os.path.isdir(os.path.join(run, "checkpoints")):
        raise StepError(f"{run} has no folder checkpoints/, as a run has, and what maxlm convert from-hf wrote")
    there = Steps(run)
    steps = there.steps()
    if not steps or (wanted is not None and wanted not in steps):
        raise StepError(f"{run} has no checkpoint" + (f" of step {wanted}; it has {steps}" if steps else ""))
    return there, steps[::-1] if wanted is None else [wanted]


def _old(path: str, names: list[str]) -> bool:
    """Whether these are the files of a complete checkpoint of format 0."""
    return "default" in names and (not storage.is_bucket(path) or "commit_success.txt" in names)
