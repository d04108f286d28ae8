"""Whether the mesh that `maxlm plan` picks is the best one: all meshes of small machines, compiled by the TPU compiler.

    python tools/plan_choice.py              # all cases, about a minute for each mesh on two cores
    python tools/plan_choice.py dense --json

For every mesh that fits, the best microbatches and remat policy by the formulas are compiled, and its step is timed as
`maxlm plan` times what it has compiled: the compiler's cycles and what waits for wires. Wanted: what plan would print
first, having compiled its first few by formulas, is within 5 % of the best of all. Exit code 1 says that one was not.
"""

import argparse
import json
import sys
from typing import Any

from maxlm.config import Config
from maxlm.config_file import parse_config
from maxlm.plan.cli import COMPILED
from maxlm.plan.money import Terms
from maxlm.plan.planner import plan_machines
from maxlm.plan.search import search
from maxlm.plan.targets import target

WITHIN = 0.05
DENSE = {"vocab_size": 32000, "num_layers": 8, "d_model": 1024, "d_ff": 4096, "num_heads": 8}
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "dense": ("v5e-4", DENSE, 16, 1024),
    "large vocabulary": ("v5e-4", {**DENSE, "vocab_size": 128_000, "num_layers": 4}, 4, 1024),
    "few rows": ("v5e-4", {**DENSE, "d_model": 2048, "num_heads": 16, "d_ff": 8192}, 2, 2048),
    "experts": ("v5e-4", {**DENSE, "d_ff": 2048, "num_experts": 4, "experts_per_token": 2}, 4, 1024),
}
"""Machine, model, sequences and tokens of each."""


def config_of(name: str) -> Config:
    """The run of a case."""
    _, model, batch_size, seq_len = CASES[name]
    train = {"steps": 1000, "batch_size": batch_size, "seq_len": seq_len}
    return parse_config({"model": model, "data": {"stores": [{"path": "none"}]}, "train": train}, [])


def judge(name: str) -> dict[str, Any]:
    """Compiles all meshes of a case."""
    config, where = config_of(name), target(CASES[name][0])
    order = list(dict.fromkeys(tuple(plan.sizes.values()) for plan in search(config, where.place)))
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    found = plan_machines(config, [(where, Terms(None))], len(order), len(order), say)
    compiled = {tuple(row.plan.sizes.values()): row for row in found.rows if row.compiled is not None}
    steps = {mesh: sum(row.step_s) / 2 for mesh, row in compiled.items()}
    meshes = [mesh for mesh in order if mesh in steps]
    picked = min(meshes[:COMPILED], key=steps.__getitem__)
    best = min(steps, key=steps.__getitem__)
    axes = tuple(found.rows[0].plan.sizes)
    named = lambda mesh: " ".join(f"{k}={n}" for k, n in zip(axes, mesh, strict=True) if n > 1)  # noqa: E731
    row: dict[str, Any] = {"case": name, "meshes": len(steps), "picked": named(picked), "best": named(best)}
    row |= {"by_formulas": named(meshes[0]), "formulas_over_best": steps[meshes[0]] / steps[best]}
    row["ratios"] = {named(mesh): compiled[mesh].plan.time.total / steps[mesh] for mesh in meshes}
    return {**row, "picked_over_best": steps[picked] / steps[best]}


def main() -> int:
    """Judges each case and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", metavar="CASE", nargs="*", choices=[[], *CASES], help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name in args.cases or CASES:
        rows.append(row := judge(name))
        if not args.json:
            told = f"{row['picked']}, {row['picked_over_best']:.3f} of the best ({row['best']}) of {row['meshes']}"
            print(
                f"{name}: {told}; by formulas alone {row['by_formulas']}, {row['formulas_over_best']:.3f}", flush=True
            )
    if args.json:
        print(json.dumps(rows))
    return int(any(row["picked_over_best"] > 1 + WITHIN for row in rows))


if __name__ == "__main__":
    sys.exit(main())
