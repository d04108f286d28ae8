"""From a config and machines to rows: search, compile the best, price."""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from maxlm import hardware
from maxlm.config import Config
from maxlm.config_file import ConfigError
from maxlm.machines import Machine, machine, name_of
from maxlm.plan.compile import Compiled, compile_on
from maxlm.plan.money import Terms, totals
from maxlm.plan.search import ROOM, Place, Plan, search
from maxlm.plan.table import SLOWER, Row

MORE_TRIES = 4
"""Plans that are compiled beside those asked for, where some do not fit."""
TOPOLOGIES = {"TPU v4": "v4", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU7x": "tpu7x"}
"""How jax names slices, before their shape."""


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        machine: one slice, or all GPUs.
        place: its devices.
    """

    machine: Machine
    place: Place

    @property
    def name(self) -> str:
        """As the user may write it."""
        count = self.place.num_slices
        return f"{count}x{self.machine.name}" if count > 1 else self.machine.name

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.machine.num_chips * self.place.num_slices

    @property
    def whole_chip(self) -> hardware.Chip:
        """What is paid for, of which a device may be a part."""
        chip = hardware.named(self.machine.chip or "")
        assert chip
        return chip

    @property
    def topology(self) -> str | None:
        """As jax names it; None where there is no compiler for it."""
        known = TOPOLOGIES.get(self.machine.chip or "")
        return f"{known}:{self.machine.shape}" if known and self.machine.kind == "tpu" else None


def target(name: str) -> Target:
    """A machine by its name, of several slices where that begins with their number: 4xv5p-512.

    Raises:
        ConfigError: there is none, or nothing is known of its chips.
    """
    match = re.fullmatch(r"(\d{1,4})x(.+)", name)
    count, own = (int(match[1]), match[2]) if match else (1, name)
    found = machine(own)
    chip = hardware.named(found.chip) if found.chip else None
    if count < 1:
        raise ConfigError(f"--on {name}: that is no slice at all; {own} is one")
    if chip is None:
        raise ConfigError(f"--on {name}: there are no figures of its chips, so nothing can be planned for it")
    if found.tpu is None:
        return Target(found, Place(chip, (found.num_chips,), count))
    shape, each = tuple(map(int, (found.shape or "").split("x"))), found.tpu.devices
    torus = (*shape, each) if each > 1 else shape
    return Target(found, Place(chip.part(1 / each), torus, count))


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def plan_rows(
    config: Config, where: Target, terms: Terms, num_rows: int, num_compiled: int, say: Callable[[str], None]
) -> list[Row]:
    """The best plans for a machine.

    Args:
        config: the run; its own mesh, microbatches and remat policy do not count.
        where: the machine.
        terms: what the user says of costs.
        num_rows: rows to return, at most.
        num_compiled: plans that are compiled, at most; none for GPUs.
        say: hears what is going on.

    Raises:
        ConfigError: no mesh divides the model and the batch, or the model fits on none.
    """
    plans = search(config, where.place)
    limit = where.place.chip.hbm_bytes
    if plans[0].memory.peak > ROOM * limit:
        raise ConfigError(_misfit(config, where, plans[0]))
    say(f"{where.name}: {len(plans):,} ways fit by formulas")
    plans, topology = _different(plans), where.topology
    if topology is None or not num_compiled or not has_compiler():
        return [_row(where, plan, None, terms) for plan in plans[:num_rows]]
    rows, problem, tried = list[Row](), "", 0
    for plan in plans[: num_compiled + MORE_TRIES]:
        if len(rows) == num_compiled:
            break
        tried += 1
        say(f"{where.name}: compiling the {tried}. of {len(plans):,}: {' '.join(plan.overrides)}")
        compiled = compile_on(plan.config, topology)
        say(f"  {compiled.seconds:.0f} s: {compiled.problem or 'fits'}")
        problem = compiled.problem or problem
        if compiled.fits:
            rows.append(_row(where, plan, compiled, terms))
    if not rows:
        raise ConfigError(f"{where.name}: the compiler refuses the {tried} best plans, the last one because: {problem}")
    rows.sort(key=lambda row: row.step_s)
    rows += [_row(where, plan, None, terms) for plan in plans[tried:]]
    return rows[:num_rows]


def _different(plans: Sequence[Plan]) -> list[Plan]:
    """The best of each mesh first, so that what is compiled are different meshes."""
    seen, first, rest = set[tuple[int, ...]](), list[Plan](), list[Plan]()
    for plan in plans:
        key = tuple(plan.sizes.values())
        (rest if key in seen else first).append(plan)
        seen.add(key)
    return first + rest


def _row(where: Target, plan: Plan, compiled: Compiled | None, terms: Terms) -> Row:
    step_s, figures = plan.time.total, compiled.figures if compiled is not None else None
    if figures is not None and figures["step_time_s"]:
        # the compiler prices what a core does, a pipeline's idle ticks included but for attention's kernels; what waits
        # for wires is added as by the formulas
        stages = plan.sizes["stage"]
        idle = plan.time.attention * (stages - 1) / (plan.config.mesh.rounds * plan.config.train.grad_accum)
        step_s = figures["step_time_s"] + idle + sum(seconds or 0 for seconds in plan.time.wires.values())
    slower = SLOWER[where.machine.kind]
    low, high = (
        totals(plan.config, where.whole_chip, where.num_chips, step_s * factor, terms) for factor in (1, slower)
    )
    return Row(where.name, where.num_chips, plan, compiled, where.place.chip.hbm_bytes, step_s, low, slower, high)


def _misfit(config: Config, where: Target, least: Plan) -> str:
    """Why nothing fits, and what would."""
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in least.memory.parts().items())
    text = (
        f"{where.name}: the model does not fit: the leanest plan ({' '.join(least.overrides)}) needs "
        f"{least.memory.peak / 2**30:.1f} GiB on a chip of {where.place.chip.hbm_bytes / 2**30:.0f} ({parts})"
    )
    tpu = where.machine.tpu
    larger = [name_of(tpu, shape) for shape in tpu.shapes] if tpu else [f"{_kind(where)}:{2**n}" for n in range(12)]
    for name in larger:
        other = target(name)
        other = replace(other, place=replace(other.place, num_slices=where.place.num_slices))
        if other.place.num_devices <= where.place.num_devices:
            continue
        try:
            found = search(config, other.place)[0]
        except ConfigError:
            continue
        if found.memory.peak <= ROOM * other.place.chip.hbm_bytes:
            return f"{text}; {name} would do, {other.num_chips} chips"
    return f"{text}; no {'slice' if tpu else 'number of GPUs'} of this kind would do with this batch"


def _kind(where: Target) -> str:
    return where.machine.name.partition(":")[0]


def nearest(rows: Sequence[Row], deadline_s: float | None, budget_usd: float | None) -> list[Row]:
    """Rows that may keep to a deadline and a budget.

    Raises:
        ConfigError: none can; says which is the nearest possible.
    """
    kept = [row for row in rows if deadline_s is None or (row.low["days"] or 0) * 86_400 <= deadline_s]
    if not kept:
        best = min(rows, key=lambda row: row.low["days"] or math.inf)
        raise ConfigError(
            f"no plan keeps the deadline; the fastest takes {best.low['days']:.3g} days, on {best.machine}"
        )
    within = [row for row in kept if budget_usd is None or row.low["usd"] is None or row.low["usd"] <= budget_usd]
    if not within:
        best = min(kept, key=lambda row: row.low["usd"] or math.inf)
        raise ConfigError(f"no plan keeps the budget; the cheapest costs {best.low['usd']:,.0f} USD, on {best.machine}")
    return within
