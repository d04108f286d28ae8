"""The runs that faults are made on: their text, configs and processes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tools.faults.outcome import Broken

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / "tools"
MODULES = "abc argparse bisect calendar cmd colorsys copy csv dis enum fnmatch glob gzip heapq imaplib keyword locale"
OTHERS = "mailbox numbers operator pprint queue random sched shelve stat string textwrap this types uuid wave zipapp"
QUICK = "--xla_backend_optimization_level=0"
"""Compiles in half the time; the bits are the same for all runs that are compared."""
PATIENCE_S = 300.0
"""A process that does nothing for so long counts as hanging."""

STEPS = 106
"""Of a run, where nothing else is said: each store is seen more than once."""
SMALL = {
    "vocab_size": 257,
    "num_layers": 8,
    "d_model": 64,
    "d_ff": 64,
    "num_heads": 8,
    "dtype": "float32",
}
"""Divides over 8 devices on every axis."""
LARGE = {
    "vocab_size": 65536,
    "num_layers": 2,
    "d_model": 272,
    "d_ff": 256,
    "num_heads": 4,
    "tie_embeddings": True,
    "dtype": "float32",
}
"""18.8 million parameters, 215 MB with the moments of AdamW, most of them in a table that costs little time."""


@dataclass
class Work:
    """Where and how faults are tried.

    Attributes:
        folder: of everything that is written.
        short: the form for CI.
        seed: of all random choices.
        quiet: print no progress.
    """

    folder: Path
    short: bool = False
    seed: int = 0
    quiet: bool = False

    def random(self, name: str) -> random.Random:
        """Random choices of one fault."""
        return random.Random(f"{self.seed} {name}")

    def say(self, text: str) -> None:
        """A line of progress."""
        if not self.quiet:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def stores(self) -> list[dict[str, Any]]:
        """Two token stores of Python's own source text, so small that runs see them several times."""
        from maxlm.data.build import build_store

        found = []
        for name, modules, weight in (("a", MODULES, 2.0), ("b", OTHERS, 1.0)):
            path = self.folder / "stores" / name
            if not path.exists():
                text = self.folder / "text" / name
                text.mkdir(parents=True, exist_ok=True)
                library = Path(sysconfig.get_path("stdlib"))
                for i, module in enumerate(modules.split()):
                    source = (library / f"{module}.py").read_text(encoding="utf-8")
                    (text / f"{module}.txt").write_text(source[: 300 + 97 * i % 600], encoding="utf-8")
                build_store([str(text / "*.txt")], str(path), heldout=0.15, workers=1)
            found.append({"path": str(path), "weight": weight})
        return found

    def config(self, name: str, **sections: dict[str, Any]) -> Path:
        """Writes the config NAME.yaml of a run, sections over what all runs share."""
        from maxlm.config_file import parse_config, to_yaml

        tree: dict[str, Any] = {
            "run": {"name": name, "root": str(self.folder / "runs")},
            "model": SMALL,
            "mesh": {"data": 1, "fsdp": 1},
            "data": {"stores": self.stores(), "segment_mask": True, "prefetch": 4, "read_threads": 2},
            "train": {"steps": STEPS, "batch_size": 8, "seq_len": 32, "compilation_cache": str(self.folder / "xla")},
            "optim": {"learning_rate": 1e-3, "schedule": {"name": "constant"}},
            "eval": {"every": 0, "batches": 1, "sample_tokens": 0},
            "checkpoint": {"every": 5},
            "log": {"every": 1},
        }
        for section, fields in sections.items():
            tree[section] = {**tree.get(section, {}), **fields}
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_yaml(parse_config(tree)))
        return path

    def straight(self) -> Path:
        """Folder of the undisturbed run of STEPS steps that others are compared with; every checkpoint is kept."""
        config = self.config("straight", checkpoint={"every": 5, "keep_last": None})
        if not self.run_folder(config).exists():
            self.say("the undisturbed run")
            self.finish(config)
        return self.run_folder(config)

    def run_folder(self, config: Path) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / config.stem

    def log_path(self, config: Path) -> Path:
        """What the processes of a run printed."""
        return self.folder / "logs" / f"{config.stem}.log"

    def start(
        self,
        config: Path,
        *overrides: str,
        devices: int = 1,
        program: tuple[str, ...] = ("-m", "maxlm", "train"),
        env: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """Starts `maxlm train CONFIG`, or another program, with so many fake devices."""
        path = self.log_path(config)
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as log:
            return subprocess.Popen(
                [*prefix, sys.executable, *program, str(config), *overrides],
                cwd=self.folder,
                env=environment(devices) | dict(env or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(
        self, config: Path, *overrides: str, code: int = 0, patience_s: float = PATIENCE_S, **options: Any
    ) -> str:
        """Runs to the end, and returns what was printed; Broken if it ends in another way."""
        path = self.log_path(config)
        before = path.stat().st_size if path.exists() else 0
        found = wait(self.start(config, *overrides, **options), patience_s)
        said = path.read_bytes()[before:].decode(errors="replace")
        if found != code:
            raise Broken(f"exit code {found}, not {code}; it ended with: {last_line(said)} (all of it in {path})")
        return said

    def remove(self, config: Path) -> None:
        """Removes a run that is not needed any more."""
        shutil.rmtree(self.run_folder(config), ignore_errors=True)


def environment(devices: int) -> dict[str, str]:
    """That of a process on CPU, with so many fake devices."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "MAXLM_", "SLURM_", "OMPI_"))}
    patience = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    patience += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    return kept | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {patience} {QUICK}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


def wait(process: subprocess.Popen[bytes], patience_s: float = PATIENCE_S) -> int:
    """Exit code of a process; Broken if it takes too long."""
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise Broken(f"a process did not end within {patience_s:.0f} s") from None


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """None of these outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            end(process)


def wait_until(
    fact: Callable[[], object], process: subprocess.Popen[bytes] | None, what: str, patience_s: float = PATIENCE_S
) -> None:
    """Waits until a fact holds; Broken if it takes too long or the process ends before."""
    deadline = time.monotonic() + patience_s
    while not fact():
        if process is not None and process.poll() is not None:
            if fact():
                return
            raise Broken(f"the process ended with exit code {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise Broken(f"{what} did not come within {patience_s:.0f} s")
        time.sleep(0.005)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "nothing")


def tail(file: IO[bytes]) -> str:
    """What has been written since the last look."""
    return file.read().decode(errors="replace")


def fault(**what: Any) -> str:
    """What the environment variable CHAOS tells tools.faults.child."""
    return json.dumps(what)


def trainer_of(supervisor: int) -> int | None:
    """Process that a supervisor has started."""
    try:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None
