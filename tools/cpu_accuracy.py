"""How far calibrated formulas are from step times on a CPU: `tools/plan_accuracy.py --cpu`.

Small models train on 8 fake devices, each in a process of its own. Some runs calibrate, as `maxlm plan --calibrate`
does; the others are predicted with what these taught, and say how far that is off. With --clock cpu the time of a step
is the CPU time of its process over the cores, which other work on the machine changes less than the wall clock.
"""

import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from maxlm.config import Config
from maxlm.config_file import load_config, parse_config, to_yaml
from maxlm.plan import calibrate
from maxlm.plan.calibrate import Fit, Measured

DEVICES, SKIPPED = 8, 2
WANTED = 0.15
HEAD = 32


@dataclass(frozen=True)
class Case:
    """A run of a small model.

    Attributes:
        layers: of the model; so are width, the features of its residual stream, and ff those of its MLP.
        batch: sequences of a step.
        length: tokens of each.
        overrides: mesh, microbatches and remat policy; {folder} is that of the runs before.
    """

    layers: int
    width: int
    ff: int
    batch: int
    length: int
    overrides: tuple[str, ...]

    def config(self, name: str, folder: str, steps: int) -> Config:
        """The run."""
        heads = self.width // HEAD
        model = {"num_layers": self.layers, "d_model": self.width, "d_ff": self.ff, "num_heads": heads}
        model |= {"num_kv_heads": heads // 2, "head_dim": HEAD, "vocab_size": 512, "dtype": "float32"}
        tree = {
            "run": {"name": name, "root": folder},
            "model": model,
            "mesh": {"fake_devices": DEVICES},
            "data": {"stores": [{"path": f"{folder}/store", "text": [__file__], "heldout": 0.0}]},
            "train": {"steps": steps, "batch_size": self.batch, "seq_len": self.length, "compilation_cache": None},
            "eval": {"sample_tokens": 0},
        }
        return parse_config(tree, [text.format(folder=folder) for text in self.overrides])


TO_CALIBRATE = {
    "fsdp": Case(4, 128, 512, 16, 256, ("mesh.fsdp=8",)),
    "none": Case(2, 256, 1024, 16, 128, ("mesh.fsdp=8", "train.remat=none")),
    "micro": Case(4, 128, 512, 32, 128, ("mesh.data=2", "mesh.fsdp=4", "train.grad_accum=4")),
    "tensor": Case(2, 256, 512, 16, 128, ("mesh.fsdp=2", "mesh.tensor=4")),
    "wide": Case(2, 384, 1536, 8, 128, ("mesh.fsdp=4", "mesh.tensor=2")),
    "data": Case(3, 192, 768, 16, 128, ("mesh.data=8",)),
}
TO_TEST = {
    "deep": Case(12, 64, 256, 16, 128, ("mesh.fsdp=8",)),
    "both": Case(6, 128, 256, 16, 128, ("mesh.data=4", "mesh.tensor=2", "train.remat=none")),
    "dots": Case(3, 256, 768, 24, 128, ("mesh.fsdp=8", "train.remat=dots")),
    "long": Case(3, 128, 512, 8, 512, ("mesh.fsdp=8",)),
    "micros": Case(2, 192, 384, 32, 128, ("mesh.fsdp=4", "mesh.tensor=2", "train.grad_accum=2")),
    "large": Case(6, 256, 1024, 16, 128, ("mesh.fsdp=2", "mesh.data=4")),
    "adapters": Case(4, 128, 512, 16, 256, ("mesh.fsdp=8", "lora.rank=8", "train.init_from={folder}/fsdp")),
    "stage": Case(4, 192, 512, 32, 128, ("mesh.fsdp=4", "mesh.stage=2", "train.grad_accum=4")),
}
CASES = TO_CALIBRATE | TO_TEST


def main(cases: Sequence[str], steps: int, clock: str, as_json: bool) -> int:
    """Trains, calibrates, predicts and prints.

    Args:
        cases: names of CASES, of both kinds; none for all.
        steps: of each run; the first ones do not count.
        clock: "wall" or "cpu".
        as_json: print JSON.

    Returns:
        1 if the error is larger than wanted, else 0.
    """
    names = [name for name in CASES if name in cases or not cases]
    if not (TO_CALIBRATE.keys() & names and TO_TEST.keys() & names):
        raise SystemExit(f"--cpu needs some of {', '.join(TO_CALIBRATE)}, and some of {', '.join(TO_TEST)}")
    found = dict[str, Measured]()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found[name] = replace(_run(CASES[name].config(name, folder, steps), clock), name=name)
            print(f"{name:10} {found[name].step_time_s * 1e3:.0f} ms a step", file=sys.stderr, flush=True)
    taught = calibrate.fit([run for name, run in found.items() if name in TO_CALIBRATE], datetime.date.today())
    ratios = {name: calibrate.ratio(taught.factors, run) for name, run in found.items() if name in TO_TEST}
    result = {"factors": taught.factors.model_dump(), "error": calibrate.mean_error(list(ratios.values()))}
    runs = {name: {"step_time_s": run.step_time_s, "work_s": dict(run.work)} for name, run in found.items()}
    print(json.dumps({**result, "predicted_over_measured": ratios, "runs": runs}) if as_json else _text(taught, ratios))
    return int(result["error"] > WANTED)


def _text(taught: Fit, ratios: dict[str, float]) -> str:
    lines = [calibrate.show(taught), "", "predicted / measured, of runs that were not calibrated with:"]
    lines += [f"{name:10} {ratio:.2f}" for name, ratio in ratios.items()]
    return "\n".join([*lines, f"mean absolute error {calibrate.mean_error(list(ratios.values())):.1%}"])


def _run(config: Config, clock: str) -> Measured:
    """Trains in a process of its own."""
    path = Path(config.run.root, f"{config.run.name}.yaml")
    path.write_text(to_yaml(config))
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    run = calibrate.measured(f"{config.run.root}/{config.run.name}")
    times = json.loads(done.stdout.splitlines()[-1])[SKIPPED:]
    return run if clock == "wall" else replace(run, step_time_s=median(times) / len(os.sched_getaffinity(0)))


def _train(path: str) -> None:
    """Of such a process: trains, and prints the CPU seconds of its steps."""
    import maxlm

    seconds = [time.process_time()]

    def told(step: int, values: dict[str, Any]) -> None:
        seconds.append(time.process_time())

    maxlm.train(load_config(path), callbacks=[told])
    print(json.dumps([after - before for before, after in itertools.pairwise(seconds)]))


if __name__ == "__main__":
    _train(sys.argv[1])
