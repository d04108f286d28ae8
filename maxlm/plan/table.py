"""Plans as rows: for people a table, for programs JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxlm import units
from maxlm.plan.compile import Compiled
from maxlm.plan.search import Plan
from maxlm.plan.step_time import STAND_IN

ENERGY = {"kwh": "kWh", "co2e_kg": "kg CO2e"}
"""Columns that are shown where they are known, by their figures in money.totals."""


@dataclass(frozen=True)
class Row:
    """A plan on a machine, with what it comes to.

    Attributes:
        machine: its name, with the number of slices where there are several.
        num_chips: that are paid for.
        plan: the way to run the config.
        compiled: what the compiler says of it; None where it was not asked.
        hbm_bytes: of a device.
        step_s: seconds of a step, at best and at worst (ranges.step_range).
        low: figures of the whole run (money.totals) at best.
        high: the same at worst.
        num_runs: that the formulas were fitted to.
    """

    machine: str
    num_chips: int
    plan: Plan
    compiled: Compiled | None
    hbm_bytes: int
    step_s: tuple[float, float]
    low: Mapping[str, float | None]
    high: Mapping[str, float | None]
    num_runs: int = 0

    @property
    def basis(self) -> str:
        """What the row rests on."""
        if self.compiled is not None and self.compiled.figures is not None:
            return "compiler"
        return f"formulas, {self.num_runs} run{'s' * (self.num_runs > 1)}" if self.num_runs else "formulas"

    @property
    def peak_bytes(self) -> float:
        """On a device."""
        known = self.compiled.peak_bytes if self.compiled is not None else None
        return self.plan.memory.peak if known is None else known

    def as_json(self) -> dict[str, Any]:
        """Everything, in base units."""
        memory, time = self.plan.memory, self.plan.time
        return {
            "machine": self.machine,
            "num_chips": self.num_chips,
            "basis": self.basis,
            "mesh": {axis: size for axis, size in self.plan.sizes.items() if size != 1},
            "overrides": list(self.plan.overrides),
            "hbm_bytes": self.hbm_bytes,
            "peak_bytes": self.peak_bytes,
            "memory_bytes": memory.parts(),
            "step_time_s": {"low": self.step_s[0], "high": self.step_s[1]},
            "step_parts_s": time.parts(),
            "networks_known": time.known,
            "unknown_network_bytes": time.unknown_bytes,
            "compile_s": None if self.compiled is None else self.compiled.seconds,
            "compiled": None if self.compiled is None else self.compiled.figures,
            "low": dict(self.low),
            "high": dict(self.high),
        }


def show(rows: Sequence[Row]) -> str:
    """Rows as a table, and below it what each of them sets."""
    extra = [name for name in ENERGY if any(row.low[name] is not None for row in rows)]
    cells = [["", "machine", "HBM, GiB", "step, s", "MFU, %", "days", "USD", *(ENERGY[name] for name in extra), "by"]]
    for i, row in enumerate(rows, 1):
        cells.append(
            [
                str(i),
                row.machine,
                f"{row.peak_bytes / 2**30:.1f}/{row.hbm_bytes / 2**30:.0f}",
                ("" if row.plan.time.known else ">") + between(*row.step_s),
                between(row.high["mfu"], row.low["mfu"], 100),
                *(between(row.low[name], row.high[name]) for name in ("days", "usd", *extra)),
                row.basis,
            ]
        )
    lines = [*aligned(cells), *(f"{i} {' '.join(row.plan.overrides)}" for i, row in enumerate(rows, 1))]
    sent = [f"{units.size(r.plan.time.unknown_bytes)} ({i})" for i, r in enumerate(rows, 1) if not r.plan.time.known]
    if sent:
        lines.append(
            "> a network of which no speed is known (between slices or nodes, in TPU7x all) counts as nothing at best "
            f"and as {STAND_IN / 1e9:.0f} GB/s a device at worst; what each sends over it in a step: {', '.join(sent)}"
        )
    return "\n".join(lines)


def show_gains(machine: str, gains: Mapping[str, float]) -> str:
    """A line on what other numbers would save (advice.gains)."""
    told = "; ".join(f"{setting}: {share * 100:.0f} % cheaper" for setting, share in gains.items())
    return f"{machine}: {told}; let plan choose with --numerics"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def between(low: float | None, high: float | None, factor: float = 1) -> str:
    """A range in three digits; ? where it is not known."""
    return "?" if low is None or high is None else f"{_short(low * factor)}-{_short(high * factor)}"


def _short(x: float) -> str:
    return units.count(x) if x >= 1000 else f"{x:.0f}" if x >= 100 else f"{x:.3g}"
