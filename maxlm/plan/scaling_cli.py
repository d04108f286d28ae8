"""`maxlm scaling`: what small runs say of a large one."""

import argparse
import json
from typing import Any

from maxlm import units
from maxlm.config_file import ConfigError

EXAMPLES = """examples:
  maxlm scaling runs/small-*                                        fit the laws
  maxlm scaling runs/small-* --budget-flops 1e21                    and what 1e21 FLOPs buy
  maxlm scaling --law chinchilla --budget-flops 1e21                without runs: a published law
  maxlm plan CONFIG --on v5p-128 --budget 5000 --scaling runs/small-*    what money buys, on a machine
"""


def add_parser(subparsers: Any) -> None:
    """Adds `scaling`; it sets `run`."""
    parser = subparsers.add_parser(
        "scaling",
        help="fit scaling laws to runs, and forecast the loss that a budget buys",
        description="Fits the loss of small runs against compute, model size and tokens, and forecasts that of a "
        "larger one, with the size and tokens that a budget is best spent on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folder or bucket; three or more")
    parser.add_argument("--law", metavar="NAME", help="instead of runs: chinchilla or chinchilla-replicated")
    parser.add_argument("--budget-flops", type=float, metavar="X", help="training FLOPs to spend, such as 1e21")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_scaling)


def show(report: dict[str, Any]) -> str:
    """A scaling_report for a terminal."""
    lines: list[str] = []
    if "law" in report:
        law = report["law"]
        form = f"L(N, D) = {law['E']} + {law['A']} / N^{law['alpha']} + {law['B']} / D^{law['beta']}"
        lines += [f"{form}   ({law['source']})"]
    else:
        lines += _table(report)
        lines += ["", f"intervals hold {report['coverage']:.0%} of the cases"]
        lines += _law("L(C) = E + A / C^a", report["compute_law"])
        lines += _law("L(N, D) = E + A / N^alpha + B / D^beta", report["size_law"])
    if report["forecast"]:
        lines += ["", *_forecast(report["forecast"], report["unit"])]
    if report["notes"]:
        lines += ["", *(f"note: {note}" for note in report["notes"])]
    return "\n".join(lines)


def _scaling(args: argparse.Namespace) -> int:
    if not args.runs and args.law is None:
        raise ConfigError("name three run folders or more, or a published law with --law")
    from maxlm.plan.scaling import scaling_report
    from maxlm.report.data import plain

    report = scaling_report(args.runs, args.budget_flops, args.law)
    print(json.dumps(plain(report), indent=1) if args.json else show(report))
    return 0


def _table(report: dict[str, Any]) -> list[str]:
    width = max(len("run"), *(len(run["name"]) for run in report["runs"]))
    lines = [f"{'run':{width}}  {'parameters':>10}  {'tokens':>8}  {'FLOPs':>9}  {report['loss']}, {report['unit']}"]
    for run in sorted(report["runs"], key=lambda run: run["flops"]):
        sizes = f"{units.count(run['params']):>10}  {units.count(run['tokens']):>8}  {run['flops']:>9.2e}"
        lines.append(f"{run['name']:{width}}  {sizes}  {run['loss']:.4f}")
    return lines


def _law(form: str, law: dict[str, Any]) -> list[str]:
    if "refused" in law:
        return ["", law["refused"]]
    lines = ["", f"{form}, fitted to {law['num_runs']} runs, which are {law['rms']:.2%} away from it"]
    for name, constant in law["constants"].items():
        lines.append(
            f"  {name:<6} {constant['value']:<9.4g} {_between(constant['interval'], '{:.4g}'.format)}".rstrip()
        )
    return lines


def _forecast(forecast: dict[str, Any], unit: str) -> list[str]:
    times = f", {forecast['factor']:.3g} times the largest run's" if "factor" in forecast else ""
    lines = [f"forecast for {forecast['budget_flops']:.3g} FLOPs{times}, in {unit}"]
    for key, label in (("by_compute", "by compute"), ("by_size", "by size and tokens")):
        if found := forecast[key]:
            between = _between(found["interval"], "{:.4f}".format)
            lines.append(f"  {label:<20} {found['loss']:.4f} {between}".rstrip())
    if found := forecast["by_size"]:
        for key in ("params", "tokens"):
            label = {"params": "best model size", "tokens": "best tokens"}[key]
            between = _between(found.get(f"{key}_interval"), units.count)
            lines.append(f"  {label:<20} {units.count(found[key])} {between}".rstrip())
    if not (forecast["by_compute"] or forecast["by_size"]):
        lines.append("  none: no law could be fitted")
    return lines


def _between(ends: Any, text: Any) -> str:
    return f"({text(ends[0])} to {text(ends[1])})" if ends else ""
