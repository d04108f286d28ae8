"""`maxlm goodput`: what failures and preemptions leave of a long run, and how often to save."""

import argparse
import json
import math
import re
from dataclasses import asdict
from typing import Any

from maxlm import units
from maxlm.config_file import ConfigError
from maxlm.plan import failures
from maxlm.plan.failures import Failures, Fleet, Goodput, Recovery

NOWHERE = 0.01
"""Goodput below which a run is not worth a number of days."""
EXAMPLES = """examples:
  maxlm goodput --slices 1 --chips-per-slice 64 --work 10d --chip-mtbf 5y
  maxlm goodput --slices 40 --chips-per-slice 256 --work 60d --chip-mtbf 5.8y --preempted-every 5d --away 2h
  maxlm goodput --slices 40 --chips-per-slice 256 --work 60d --chip-mtbf 5.8y --preempted-every 5d --away 2h \\
      --allowed 40,39,38,36,32 --notice 3min                the same, elastic and warned
  maxlm goodput --slices 40 --chips-per-slice 256 --work 60d --chip-mtbf 5.8y --interval 30min --json

Times have units: 30s, 5min, 4h, 10d, 5.8y. Means of --chip-mtbf, --slice-mtbf and --preempted-every are of one chip
or slice; the table says what they are for the fleet. Defaults of what saves and restarts take are assumptions:
`maxlm report RUN` shows yours."""
ASSUMED = {
    "blocking": ("10s", "steps stand still for so long at each save"),
    "write": ("2min", "from then until the checkpoint is complete, while steps go on"),
    "detect": ("1min", "until a failure is noticed"),
    "reschedule": ("2min", "until the processes run again"),
    "restore": ("2min", "reading the checkpoint"),
    "compile": ("3min", "compiling, up to the first step"),
}


def add_parser(subparsers: Any) -> None:
    """Adds `goodput`; it sets `run`."""
    parser = subparsers.add_parser(
        "goodput",
        help="what failures and preemptions leave of a long run, and how often to save",
        description="Simulates a run on many chips, with failures, preempted slices, saves and restarts, and prints "
        "the share of its time that goes into steps that count, for several intervals between saves, the best among "
        "them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--slices", type=int, required=True, metavar="N", help="slices, which come and go as a whole")
    parser.add_argument("--chips-per-slice", type=int, required=True, metavar="N", help="chips of each")
    parser.add_argument("--work", required=True, metavar="TIME", help="length of the run if nothing happened")
    parser.add_argument("--allowed", metavar="N,N", help="numbers of slices to go on with (mesh.allowed; only all)")
    parser.add_argument("--chip-mtbf", metavar="TIME", help="mean time between failures of one chip (never)")
    parser.add_argument("--slice-mtbf", metavar="TIME", help="the same of one slice, beside its chips' (never)")
    parser.add_argument("--preempted-every", metavar="TIME", help="mean time between preemptions of a slice (never)")
    parser.add_argument("--away", default="0s", metavar="TIME", help="mean time until a preempted slice is back (0s)")
    parser.add_argument(
        "--notice", default="0s", metavar="TIME", help="warning; enough for a save, it loses nothing (0s)"
    )
    for name, (value, text) in ASSUMED.items():
        parser.add_argument(f"--{name}", default=value, metavar="TIME", help=f"{text} ({value})")
    parser.add_argument("--interval", metavar="TIME", help="time between saves (the best, found by simulation)")
    parser.add_argument("--seeds", type=int, default=16, metavar="N", help="simulated runs (16)")
    parser.add_argument("--json", action="store_true", help="print JSON, in seconds and shares from 0 to 1")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not 1 <= args.seeds <= 1000:
        raise ConfigError(f"--seeds={args.seeds} is to be a number from 1 to 1000")
    fleet = Fleet(args.slices, args.chips_per_slice, _allowed(args.allowed))
    happens = Failures(
        *(_seconds(args, name, math.inf) for name in ("chip_mtbf", "slice_mtbf", "preempted_every")),
        *(_seconds(args, name) for name in ("away", "notice")),
    )
    recovery = Recovery(*(_seconds(args, name) for name in ASSUMED))
    run = fleet, happens, recovery, _seconds(args, "work")
    best_s = failures.best_interval_s(*run, args.seeds) if args.interval is None else _seconds(args, "interval")
    rows = [failures.simulate(*run, best_s * factor, args.seeds) for factor in (0.25, 0.5, 1, 2, 4)]
    mtbi_s = failures.mtbi_s(fleet, happens)
    result: dict[str, Any] = {
        "fleet": asdict(fleet),
        "failures": _finite(asdict(happens)),
        "recovery": asdict(recovery),
        "work_s": run[3],
        "num_seeds": args.seeds,
        "mtbi_s": mtbi_s if mtbi_s < math.inf else None,
        "young_s": failures.young_s(recovery.blocking_s, mtbi_s) if mtbi_s < math.inf else None,
        "daly_s": failures.daly_s(recovery.blocking_s, mtbi_s) if mtbi_s < math.inf else None,
        "interval_s": best_s,
        "rows": [_finite(asdict(row)) for row in rows],
    }
    print(json.dumps(result) if args.json else _table(*run, args, rows))
    return 0


def _table(
    fleet: Fleet, happens: Failures, recovery: Recovery, work_s: float, args: argparse.Namespace, rows: list[Goodput]
) -> str:
    """What people read."""
    mean_s, chosen = failures.mtbi_s(fleet, happens), rows[len(rows) // 2]
    how = "the best, by simulation" if args.interval is None else "as asked for"
    lines = [
        f"{fleet.num_slices * fleet.chips_per_slice:,} chips in {fleet.num_slices:,} slices, "
        f"{units.duration(work_s)} of work; {_frequencies(fleet, happens)}",
        "taken: " + ", ".join(f"{name} {getattr(args, name)}" for name in ASSUMED),
        "",
        *_lines(rows, chosen),
        "",
        f"* {how}: {chosen.num_failures:.0f} failures and {chosen.num_preemptions:.0f} preemptions "
        f"in {units.duration(chosen.wall_s)}",
    ]
    if chosen.fraction < NOWHERE and chosen.shares[failures.WAITING] > 0.5:
        lines[-1] = "* this run gets nowhere: it waits for slices; --allowed lets it go on with fewer"
    elif chosen.fraction < NOWHERE:
        start = units.duration(recovery.detect_s + recovery.start_s)
        lines[-1] = (
            f"* this run gets nowhere: something happens every {units.duration(mean_s)}, and a restart takes {start}"
        )
    if mean_s < math.inf:
        young, daly = (units.duration(f(recovery.blocking_s, mean_s)) for f in (failures.young_s, failures.daly_s))
        lines.append(f"  formulas, where every interruption loses work: Young {young}, Daly {daly} between saves")
    return "\n".join(lines)


def _frequencies(fleet: Fleet, happens: Failures) -> str:
    """How often something happens to the fleet."""
    named = zip(("a failure", "a preemption"), happens.rates(fleet), strict=True)
    every = [f"{what} every {units.duration(1 / rate / fleet.num_slices)}" for what, rate in named if rate]
    away = f", back after {units.duration(happens.away_s)}" if happens.preempted_every_s < math.inf else ""
    return (" and ".join(every) or "nothing happens") + away


def _lines(rows: list[Goodput], chosen: Goodput) -> list[str]:
    """A row for each interval, and the names of the columns above."""
    phases = {"saves": failures.SAVES, "lost": failures.LOST, "restarts": failures.RESTARTS}
    phases |= {"waiting": failures.WAITING, "fewer slices": failures.FEWER}
    cells = [["save every  ", "goodput", "5-95 %", "of paid", "wall time", *phases]]
    cells += [
        [
            units.duration(row.interval_s) + (" *" if row is chosen else "  "),
            f"{row.fraction:.1%}",
            f"{row.fraction_low:.1%}-{row.fraction_high:.1%}",
            f"{row.paid_fraction:.1%}",
            units.duration(row.wall_s),
            *(f"{row.shares[phase]:.1%}" for phase in phases.values()),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells]


def _seconds(args: argparse.Namespace, name: str, default: float = 0.0) -> float:
    """The time that an option gives, in seconds."""
    text = getattr(args, name)
    if text is None:
        return default
    try:
        return units.seconds(text)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None


def _allowed(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise ConfigError(f"--allowed={text} is to be numbers of slices, such as 40,20,10")
    return tuple(map(int, text.split(",")))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: null for what is infinite."""
    return {name: None if value == math.inf else value for name, value in values.items()}
