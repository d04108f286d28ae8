"""Slurm: one sbatch script, one process per node."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

from maxlm.launch import record, tools
from maxlm.launch.job import STOPPED, Job, LaunchError, until_done

WARNING_S = 300
"""From Slurm's warning to the end of the allotted time: for the save."""


def render(job: Job) -> str:
    """The batch script. It needs this Python and folder on the nodes, as on a shared file system."""
    machine, options = job.machine, job.options
    log = record.folder(job.name) / "log"
    directives = [
        f"--job-name={job.name}",
        f"--nodes={machine.num_hosts}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={machine.chips_per_host}"] if machine.kind == "gpu" else []),
        "--exclusive",
        f"--output={log}",
        "--open-mode=append",
        "--requeue",  # where it is preempted, Slurm puts it into the queue again
        f"--signal=B:USR1@{WARNING_S}",
        *(f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(options, name))),
    ]
    maxlm = f"{shlex.quote(sys.executable)} -m maxlm"
    task = [
        'export JAX_PROCESS_ID="$SLURM_PROCID"',
        *until_done(job.train(maxlm, job.config)),
        'exit "$code"',
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        *([f"set -a; . {shlex.quote(os.path.abspath(options.env_file))}; set +a"] if options.env_file else []),
        *_coordinates(job),
        "",
        "task=$(cat <<'END'",
        *task,
        "END",
        ")",
        'srun --kill-on-bad-exit=0 bash -c "$task" &',
        "step=$!",
        "# the time is up soon: save, end, and go on in another job",
        """trap 'kill -TERM "$step"' USR1 TERM""",
        'wait "$step"; code=$?',
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        f'if [ "$code" = {STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
        "",
    ]
    return "\n".join(lines)


def commands(job: Job) -> list[list[str]]:
    """What a launch runs."""
    return [["sbatch", "--parsable", str(record.folder(job.name) / "job.sh")]]


def launch(job: Job) -> str:
    """Submits the script; returns the job's number."""
    path = Path(commands(job)[0][-1])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(render(job))
    return tools.call(commands(job)[0]).strip().partition(";")[0]


def status(job: Job, number: str) -> str:
    """How it is, as text."""
    state = tools.call(["squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T %M %R"]).strip()
    return f"{job.name}: job {number} {state or 'is no longer in the queue'}; stop it with maxlm launch stop {job.name}"


def log_command(job: Job, follow: bool) -> list[str]:
    """Prints the job's log."""
    return ["tail", "-n", "100", *(["-F"] if follow else []), str(record.folder(job.name) / "log")]


def stop(number: str) -> None:
    """Cancels the job: its run gets SIGTERM, saves and ends, and is not queued again. It may have ended already.

    Raises:
        LaunchError: it could not be cancelled.
    """
    try:
        tools.call(["scontrol", "update", f"JobId={number}", "Requeue=0"])
        tools.call(["scancel", number])
    except LaunchError:
        there = ""
        with contextlib.suppress(LaunchError):  # Slurm has forgotten it
            there = tools.call(["squeue", "--noheader", f"--jobs={number}", "--format=%T"]).strip()
        if there:
            raise


def _coordinates(job: Job) -> list[str]:
    """How the nodes find each other."""
    if job.num_hosts == 1:
        return []
    return [
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        # another port for each job: nodes may still be letting go of the last one's
        'export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))"',
        'export JAX_NUM_PROCESSES="$SLURM_JOB_NUM_NODES"',
    ]
