"""Whether int8 and fp8 learn as bfloat16 does: trains a small model with each, some seeds, and compares held-out loss.

    python tools/quant_loss.py                      # configs/quant_cpu.yaml; hours on two cores
    python tools/quant_loss.py --kinds none int8 --seeds 0 --curve docs/quant_loss.png
    python tools/quant_loss.py --steps 4 --root /tmp/quant_loss     # a short form, to see that it runs

Runs are ordinary ones, in ROOT/quant_KIND_SEED: finished ones are read, those cut off continue. Prints held-out losses
and their mean differences to bfloat16, and draws the curves.
"""

import argparse
import statistics
import sys
from pathlib import Path

from maxlm import train
from maxlm.config_file import load_config
from maxlm.metrics import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "quant_cpu.yaml"
NAMES = {"none": "bfloat16", "int8": "int8", "fp8": "fp8"}


def run(kind: str, seed: int, args: argparse.Namespace) -> dict[int, float]:
    """Trains, unless that is done, and returns held-out loss (nats per token) by step."""
    overrides = [f"quant.mode={kind}", f"train.seed={seed}", f"run.name=quant_{kind}_{seed}", f"run.root={args.root}"]
    if args.steps:
        short = {"train.steps": args.steps, "optim.schedule.warmup_steps": 1, "optim.schedule.cooldown_steps": 1}
        short |= {"eval.every": max(1, args.steps // 2), "eval.batches": 2}
        overrides += [f"{field}={value}" for field, value in short.items()]
    config = load_config(CONFIG, [*overrides, *args.overrides])
    folder = Path(args.root) / config.run.name
    found = losses(folder) if folder.exists() else {}
    if config.train.num_steps not in found:
        train(config)
        found = losses(folder)
    if not found:
        sys.exit(f"error: {folder} has no held-out losses; the data's stores need held-out text (heldout)")
    return found


def losses(folder: Path) -> dict[int, float]:
    """Held-out loss by step."""
    return {int(row["step"]): row["heldout_loss"] for row in read_metrics(str(folder)).heldout}


def draw(curves: dict[str, dict[int, dict[int, float]]], path: str) -> None:
    """Held-out loss of each kind, mean over seeds, and its difference to bfloat16, each seed a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for i, (kind, by_seed) in enumerate(curves.items()):
        steps = sorted(set.intersection(*(set(losses) for losses in by_seed.values())))
        mean = [statistics.mean(losses[step] for losses in by_seed.values()) for step in steps]
        left.plot(steps, mean, label=NAMES[kind], color=f"C{i}")
        if kind == "none":
            continue
        plain = curves["none"]
        shared = [seed for seed in by_seed if seed in plain]
        for seed in shared:
            right.plot(steps, [by_seed[seed][s] - plain[seed][s] for s in steps], color=f"C{i}", alpha=0.3)
        gaps = [statistics.mean(by_seed[seed][s] - plain[seed][s] for seed in shared) for s in steps]
        right.plot(steps, gaps, color=f"C{i}", label=NAMES[kind])
    left.set(xlabel="step", ylabel="held-out loss, nats per byte")
    right.set(xlabel="step", ylabel="minus bfloat16's, same seed")
    right.axhline(0, color="black", linewidth=0.5)
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Trains, compares, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="section.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--kinds", nargs="+", choices=list(NAMES), default=list(NAMES), help="quant.mode of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="train.seed of the runs")
    parser.add_argument("--root", default="runs", help="folder of the runs")
    parser.add_argument("--steps", type=int, help="fewer steps than the config's")
    parser.add_argument("--curve", metavar="FILE", help="draw the losses into this PNG")
    args = parser.parse_args()
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for seed in args.seeds:
        for kind in dict.fromkeys(["none", *args.kinds]):
            curves.setdefault(kind, {})[seed] = run(kind, seed, args)
    for kind, by_seed in curves.items():
        last = {seed: found[max(found)] for seed, found in by_seed.items()}
        text = f"{NAMES[kind]:9} held-out loss {statistics.mean(last.values()):.4f}"
        if kind != "none":
            gaps = [last[seed] - curves["none"][seed][max(curves["none"][seed])] for seed in last]
            text += f", minus bfloat16's {statistics.mean(gaps):+.4f} ({', '.join(f'{gap:+.4f}' for gap in gaps)})"
        print(text)
    if args.curve:
        draw(curves, args.curve)
    return 0


if __name__ == "__main__":
    sys.exit(main())
