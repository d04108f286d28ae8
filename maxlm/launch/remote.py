"""What runs on a TPU VM: installing the code, starting the run, watching it, ending it."""

from maxlm.launch import code
from maxlm.launch.job import EXTRAS, Job, until_done

EXIT = "maxlm-exit="
"""Begins the line that follows a run's output: its exit code, or nothing where it left none."""


def scripts(job: Job) -> dict[str, str]:
    """The scripts that go along: setup.sh installs, run.sh trains and leaves its exit code in the file exit."""
    here = ["#!/bin/bash", 'cd "$(dirname "$0")"']
    install = ["set -euo pipefail", *code.setup(EXTRAS[job.machine.kind], code.checkout())]
    run = ["if [ -f env ]; then set -a; . ./env; set +a; fi", "cd code"]
    run += until_done(job.train("../venv/bin/maxlm", "../config.yaml"))
    run += ['echo "$code" > ../exit']
    return {"setup.sh": "\n".join([*here, *install, ""]), "run.sh": "\n".join([*here, *run, ""])}


def folder(job: Job) -> str:
    """Of all that belongs to the run, in the home of each worker."""
    return f"maxlm-{job.name}"


def archive(job: Job) -> str:
    """Where the code's archive is copied to."""
    return f"{folder(job)}.tar.gz"


def variables(job: Job) -> str:
    """Where the file of variables is copied to."""
    return f"{folder(job)}.env"


def install(job: Job) -> str:
    """Unpacks and installs what was copied."""
    here, env = folder(job), variables(job)
    moved = f"chmod 600 {env} && mv {env} {here}/env && " if job.options.env_file else ""
    return f"mkdir -p -m 700 {here} && {moved}tar xzf {archive(job)} -C {here} && bash {here}/setup.sh"


def start(job: Job) -> str:
    """Starts the run, unless it goes on there already: two would fight for the chips."""
    return (
        f"cd {folder(job)} && (kill -0 $(cat pid 2>/dev/null) 2>/dev/null || "
        "{ rm -f exit; setsid nohup bash run.sh >> log 2>&1 < /dev/null & echo $! > pid; })"
    )


def watch(job: Job, seen: int) -> str:
    """Prints what the run prints until it ends, without the first `seen` lines, and then its exit code."""
    return f'cd {folder(job)} && tail -n +{seen + 1} --pid=$(cat pid) -f log; echo "{EXIT}$(cat exit 2>/dev/null)"'


def log(job: Job) -> str:
    """Prints the end of what the run has printed."""
    return f"tail -n 100 {folder(job)}/log"


def end(job: Job) -> str:
    """Asks the run to save and end, and waits for it."""
    pid = f"$(cat {folder(job)}/pid)"
    return f"kill -TERM {pid} && timeout 600 tail --pid={pid} -f /dev/null"
