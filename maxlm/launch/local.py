"""Several processes on this machine, as the hosts of a pod would be: for tests."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from typing import IO

from maxlm.launch.job import Job


def render(job: Job) -> str:
    """What is run, as shell commands."""
    return "\n".join(
        f"{' '.join(f'{k}={v}' for k, v in _environment(job, i, 8476).items())} {shlex.join(_command(job))} &"
        for i in range(job.num_hosts)
    )


def launch(job: Job) -> int:
    """Starts the processes, passes on what they print, and waits for all of them.

    Returns:
        The first exit code that is not 0, or 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[subprocess.Popen[str]] = []
    pumps = []
    before = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        for i in range(job.num_hosts):
            env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROC"))}
            child = subprocess.Popen(
                _command(job),
                env={**env, **_environment(job, i, port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            children.append(child)
            assert child.stdout is not None
            pumps.append(threading.Thread(target=_pump, args=(i, child.stdout), daemon=True))
            pumps[-1].start()
        codes = [_wait(child) for child in children]
    finally:
        signal.signal(signal.SIGTERM, before)
    for pump in pumps:
        pump.join()
    return next((code for code in codes if code), 0)


def _command(job: Job) -> list[str]:
    # the run's own fake devices are those of one process
    alone = ["mesh.fake_devices=null"] if job.fake_devices else []
    return [sys.executable, "-m", "maxlm", "supervise", "--", "train", job.config, *job.overrides, *alone]


def _environment(job: Job, index: int, port: int) -> dict[str, str]:
    """What makes a process one of several; each sees CPU devices."""
    each = str((job.fake_devices or job.num_hosts) // job.num_hosts)
    alone = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": each}
    if job.num_hosts == 1:
        return alone
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(job.num_hosts)}
    return {**alone, **where, "JAX_PROCESS_ID": str(index)}


def _wait(child: "subprocess.Popen[str]") -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # it reaches the children as well: they save and end
            continue


def _pump(index: int, lines: IO[str]) -> None:
    for line in lines:
        with contextlib.suppress(OSError):  # nobody reads any longer; the run must not wait for that
            sys.stdout.write(f"[{index}] {line}")
            sys.stdout.flush()
