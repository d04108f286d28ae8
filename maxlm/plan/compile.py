"""The real step of a plan, made by the real TPU compiler, in a process of its own: `maxlm compile`.

A process each, since the compiler keeps its memory, may be told to stop, and locks itself against another.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import Config
from maxlm.config_file import to_yaml


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


def compile_on(config: Config, topology: str, timeout_s: float = 3600) -> Compiled:
    """Compiles a run's train step for a TPU slice.

    Args:
        config: the run; its mesh fits the slice, or as many as its mesh.slices says.
        topology: as jax names a slice: v5e:4x4.
        timeout_s: after so many seconds it is given up.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maxlm-plan-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config))
        machine = f"{config.mesh.slices}x{topology}"
        command = [sys.executable, "-m", "maxlm", "compile", str(path), "--on", machine, "--json"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return Compiled(None, f"the compiler took more than {timeout_s:.0f} s", timeout_s)
    seconds = time.monotonic() - start
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    problem = said[-1].removeprefix("error: ") if said else f"the compiler ended with {done.returncode}"
    try:
        figures = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return Compiled(None, problem, seconds)
    return Compiled(figures, problem if done.returncode else None, seconds)
