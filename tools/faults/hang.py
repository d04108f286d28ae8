"""A run that hangs: in its data, and in a collective."""

import json
import os
import signal
import time
from pathlib import Path

from tools.faults import compare
from tools.faults.hosts import pair_config, pair_straight
from tools.faults.outcome import Outcome, need
from tools.faults.resume import CHILD, start_hosts
from tools.faults.work import TOOLS, Work, ended, fault, last_line, trainer_of, wait, wait_until

STEPS = 30
LIMITS = {"step_s": 5.0, "phase_s": 120.0, "retries": 5, "first_wait_s": 0.2, "grace_s": 5.0}
SUPERVISED = (str(TOOLS / "faults" / "supervised.py"), json.dumps(LIMITS), *CHILD)


def run(work: Work) -> list[Outcome]:
    """Both kinds."""
    return [_in_data(work), _in_a_collective(work)]


def _in_data(work: Work) -> Outcome:
    outcome = Outcome("a hang in the loader", lost_steps=0, lost_batches=0)
    straight, seconds = work.straight(), []
    for step in (13,) if work.short else (13, 1, STEPS - 1):
        config = work.config(f"hang_data{step}", train={"steps": STEPS})
        hung = work.folder / f"{config.stem}.hung"
        process = work.start(config, program=SUPERVISED, env={"CHAOS": fault(hang_at=step, hung=str(hung))})
        with outcome.attempt(f"a hang at step {step}"), ended(process):
            wait_until(hung.exists, process, "the hang")
            started = time.monotonic()
            code = wait(process)
            seconds.append(time.monotonic() - started)
            said = work.log_path(config).read_text(errors="replace")
            need(code == 0, f"exit code {code}: {last_line(said)}")
            _check_said(said, "in _hang")
            compare.same_end(work.run_folder(config), straight, STEPS)
    outcome.notes += ["stacks of all threads printed, killed, started again, bit-equal", _within(seconds)]
    return outcome


def _in_a_collective(work: Work) -> Outcome:
    outcome = Outcome("a hang in a collective: SIGSTOP to one of two hosts", lost_steps=0, lost_batches=0)
    straight, seconds = pair_straight(work), []
    for host in (1,) if work.short else (1, 0):
        config = pair_config(work, f"stop_{host}", STEPS)
        with outcome.attempt(f"SIGSTOP to host {host}"):
            seconds.append(_stop_one(work, config, host, outcome))
            compare.same_end(work.run_folder(config), straight, STEPS)
        work.say(f"hang: SIGSTOP to host {host}: {outcome.survived} of {outcome.tried}")
    outcome.notes += ["stacks of all threads printed, both killed, started again, bit-equal", _within(seconds)]
    return outcome


def _stop_one(work: Work, config: Path, host: int, outcome: Outcome) -> float:
    """Seconds from the stop to the end of the run."""
    folder = work.run_folder(config)
    slow = fault(slow={"data": 0.1})
    processes = start_hosts(work, config, 2, total=2, program=SUPERVISED, CHAOS=slow)
    with ended(*processes):
        wait_until(lambda: compare.last_step(folder) > 6 and compare.latest(folder), processes[0], "step 7")
        trainer = trainer_of(processes[host].pid)
        need(trainer, "a trainer had ended before the signal")
        os.kill(trainer or 0, signal.SIGSTOP)
        started = time.monotonic()
        outcome.lost_steps = (outcome.lost_steps or 0) + compare.last_step(folder) - (compare.latest(folder) or 0)
        codes = [wait(process) for process in processes]
    said = work.log_path(config).read_text(errors="replace")
    need(codes == [0, 0], f"exit codes {codes}: {last_line(said)}")
    _check_said(said, "maxlm/loop.py")
    return time.monotonic() - started


def _check_said(said: str, place: str) -> None:
    need("no sign of life" in said, "the supervisor did not notice the hang")
    need("most recent call first" in said and place in said, f"no stack shows {place}")
    need("it hung and was killed" in said, "nobody was killed")


def _within(seconds: list[float]) -> str:
    return f"{max(seconds, default=-1):.0f} s from the hang to the end of the run at most"
