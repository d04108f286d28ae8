"""The real step of a plan, made by the real TPU compiler, in a process of its own: `maxlm compile`.

A process each, since the compiler keeps its memory, may be told to stop, and locks itself against another.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import Config
from maxlm.config_file import to_yaml

POLL_S = 0.5


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
        figures: of bench.bench_compiled; None where there are none.
        problem: why not, in a sentence; of a step that does not fit, what the compiler says is over.
        seconds: that it took.
    """

    figures: dict[str, Any] | None
    problem: str | None
    seconds: float

    @property
    def peak_bytes(self) -> int | None:
        """On a device."""
        return None if self.figures is None else self.figures["arguments_bytes"] + self.figures["heap_bytes"]

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.problem is None


def compile_on(
    config: Config, topology: str, timeout_s: float = 3600, waiting: Callable[[float], None] = lambda seconds: None
) -> Compiled:
    """Compiles a run's train step for a TPU slice.

    Args:
        config: the run; its mesh fits the slice.
        topology: as jax names it: v5e:4x4.
        timeout_s: after so many seconds it is given up.
        waiting: hears of the seconds so far, now and then.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maxlm-plan-") as folder:
        path, out, said = (Path(folder, name) for name in ("config.yaml", "out", "said"))
        path.write_text(to_yaml(config))
        slices = f"{config.mesh.slices}x{topology}"
        command = [sys.executable, "-m", "maxlm", "compile", str(path), "--on", slices, "--json"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        with out.open("wb") as stdout, said.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            try:
                while process.poll() is None and time.monotonic() - start < timeout_s:
                    waiting(time.monotonic() - start)
                    time.sleep(POLL_S)
            finally:
                process.kill()
                process.wait()
        seconds = time.monotonic() - start
        if seconds >= timeout_s:
            return Compiled(None, f"the compiler took more than {timeout_s:.0f} s", seconds)
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        problem = lines[-1].removeprefix("error: ") if lines else f"the compiler ended with {process.returncode}"
        try:
            figures = json.loads(out.read_text().splitlines()[-1])
        except (ValueError, IndexError):
            return Compiled(None, problem, seconds)
        return Compiled(figures, problem if process.returncode else None, seconds)
