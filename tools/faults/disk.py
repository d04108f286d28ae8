"""A disk that is full, forbidden or gone while a checkpoint is saved in the background."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.faults import compare
from tools.faults.kills import unfinished
from tools.faults.outcome import Broken, Outcome, need
from tools.faults.resume import CHILD
from tools.faults.work import Work, ended, fault, last_line, wait, wait_until

Fault = Callable[[Path], contextlib.AbstractContextManager[None]]
"""Given a run's folder: makes the fault, and mends it at its end."""
STEPS = 60
EVERY = 5
DISK_MB = 48
MOMENTS = {
    "before": "before a save",
    "orbax": "while Orbax wrote",
    "manifest": "between Orbax and MANIFEST.json",
}
COMMIT_S = 1.0
"""The save is held up for so long before its manifest, so that there is time for the fault."""


def run(work: Work) -> list[Outcome]:
    """Each fault at each moment of a save, and then the same command again."""
    straight, rng, found = work.straight(), work.random("disk"), []
    for name, (words, make) in FAULTS.items():
        outcome = Outcome(name, lost_steps=0, lost_batches=0)
        moments = [rng.choice(list(MOMENTS))] if work.short else 3 * list(MOMENTS)
        seconds = []
        for i, moment in enumerate(moments):
            config = work.config(f"disk_{make.__name__}{i}", checkpoint={"every": EVERY}, train={"steps": STEPS})
            with outcome.attempt(f"{name}, {MOMENTS[moment]}"):
                lost, waited = _once(work, config, moment, make, words, rng)
                seconds.append(waited)
                outcome.lost_steps = (outcome.lost_steps or 0) + lost
                compare.same_end(work.run_folder(config), straight, STEPS)
            work.say(f"disk: {name}, {MOMENTS[moment]}: {outcome.survived} of {outcome.tried}")
        outcome.notes.append(", ".join(f"{moments.count(m)} {MOMENTS[m]}" for m in dict.fromkeys(moments)))
        outcome.notes.append(f"the run ended within {max(seconds, default=0):.1f} s; {_how(make)}")
        found.append(outcome)
    return found


def _once(
    work: Work,
    config: Path,
    moment: str,
    make: Fault,
    words: tuple[str, ...],
    rng: random.Random,
) -> tuple[int, float]:
    """Steps that were lost, and seconds from the fault to the end of the run."""
    folder = work.run_folder(config)
    prepared = small_disk(folder) if make is full else contextlib.nullcontext()
    keep = work.folder / "kept"
    with prepared:
        slow = {"data": 0.05} | ({"commit": COMMIT_S} if moment == "manifest" else {})
        prefix = obedient() if make is denied else ()
        process = work.start(config, program=CHILD, env={"CHAOS": fault(slow=slow)}, prefix=prefix)
        with ended(process):
            wait_until(lambda: compare.latest(folder), process, "a checkpoint")
            _wait_for(folder, moment, process, rng)
            before = compare.latest(folder)
            started = time.monotonic()
            with make(folder):
                code = wait(process)
            waited = time.monotonic() - started
        said = work.log_path(config).read_text(errors="replace")
        need(code not in (0, -9), f"it ended with exit code {code}: {last_line(said)}")
        # tensorstore prints tracebacks of its own before
        ends = said.splitlines()[-3:]
        need(any(line.startswith("error: ") for line in ends), f"no sentence ends {work.log_path(config)}")
        need(any(word in said for word in words), f"no sentence says {' or '.join(words)}: {last_line(said)}")
        left = compare.latest(folder)
        need(left is not None and left >= (before or 0), f"of step {before} only {left} is left")
        compare.restored(folder, left or 0)  # verifies
        lost = max(0, compare.last_step(folder) - (left or 0))
        work.finish(config)
        if make is full:  # what has been mounted goes
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(folder, keep)
    if make is full:
        shutil.rmtree(folder)
        keep.rename(folder)
    return lost, waited


def _wait_for(folder: Path, moment: str, process: subprocess.Popen[bytes], rng: random.Random) -> None:
    if moment == "before":
        wait_until(lambda: not unfinished(folder), process, "the end of a save")
        return
    seen = set(unfinished(folder))

    def there() -> bool:
        now = unfinished(folder)
        return any(state == moment and key not in seen for key, state in now.items())

    wait_until(there, process, MOMENTS[moment])
    time.sleep(rng.uniform(0, COMMIT_S / 2) if moment == "manifest" else rng.uniform(0, 0.02))


# ---- faults


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for a run."""
    if os.geteuid():
        raise Broken("a small disk can be mounted by root alone; start this case as root")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fills the disk; there is space again afterwards."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def denied(folder: Path) -> Iterator[None]:
    """Nobody may write into the checkpoints."""
    path = folder / "checkpoints"
    places = [path, *(p for p in path.iterdir() if p.is_dir())]
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            place.chmod(0o500)
    try:
        yield
    finally:
        for place in [path, *path.iterdir()]:
            with contextlib.suppress(FileNotFoundError):
                place.chmod(0o700)


@contextlib.contextmanager
def vanished(folder: Path) -> Iterator[None]:
    """The folder of the checkpoints is away, as a network disk that was lost; it comes back afterwards."""
    path, away = folder / "checkpoints", folder / "away"
    path.rename(away)
    try:
        yield
    finally:
        if path.exists():
            shutil.rmtree(path)
        away.rename(path)


def obedient() -> tuple[str, ...]:
    """Before a command of root's: permissions count for it, too."""
    if os.geteuid():
        return ()
    if not shutil.which("setpriv"):
        raise Broken("root may write anywhere; install setpriv (util-linux), or start this case as another user")
    return ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search,-fowner")


FAULTS: dict[str, tuple[tuple[str, ...], Fault]] = {
    "disk full during a save": (("No space left on device",), full),
    "permission denied during a save": (("Permission denied",), denied),
    "folder of the checkpoints gone during a save": (("failed", "No such file", "has vanished"), vanished),
}


def _how(make: Fault) -> str:
    if make is full:
        return f"a real file system of {DISK_MB} MB (tmpfs), filled to the last byte"
    if make is denied:
        return "folders of mode 0500" + ("" if os.geteuid() else ", root without its right to ignore that")
    return "renamed, and back before the second start"
