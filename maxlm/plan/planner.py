"""From a config and machines to rows: search, compile the best, price."""

import importlib.util
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.config_file import ConfigError
from maxlm.plan.advice import misfit, would_do
from maxlm.plan.compile import Compiled, compile_on
from maxlm.plan.money import DAY_S, Terms, least_step_s, totals
from maxlm.plan.ranges import step_range
from maxlm.plan.search import Plan, search
from maxlm.plan.table import Row
from maxlm.plan.targets import Target

MORE_TRIES = 4
"""Plans that are compiled beside those asked for, where some do not fit."""


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


@dataclass(frozen=True)
class Planned:
    """What was found on several machines.

    Attributes:
        rows: the best plans of each.
        fastest: by formulas, of each machine that has rows.
        unfit: of each machine without rows, why.
    """

    rows: list[Row]
    fastest: list[tuple[Target, Plan]]
    unfit: list[str]


def plan_machines(
    config: Config,
    asked: Sequence[tuple[Target, Terms]],
    num_rows: int,
    num_compiled: int,
    say: Callable[[str], None],
    numerics: Collection[str] = (),
) -> Planned:
    """The best plans for machines.

    Args:
        config: the run; its own mesh, microbatches and remat policy do not count.
        asked: machines, with what the user says of their costs.
        num_rows: rows of each, at most.
        num_compiled: plans of each that are compiled, at most; none for GPUs.
        say: hears what is going on.
        numerics: names of search.NUMERICS that may change.

    Raises:
        ConfigError: on no machine does a mesh divide the model and the batch, and the model fit; says why of each.
    """
    if num_compiled and not has_compiler():
        say("the TPU compiler is not here (pip install 'maxlm[plan]'): all rows are by formulas alone")
    found = Planned([], [], [])
    for where, terms in asked:
        try:
            plans = _fitting(config, where, numerics)
            say(f"{where.name}: {len(plans):,} ways fit by formulas")
            if where.topology is None or not num_compiled or not has_compiler():
                rows = [_row(where, plan, None, terms) for plan in _different(plans)]
            else:
                rows = _compiled_rows(where, where.topology, _different(plans), terms, num_compiled, say)
        except ConfigError as error:
            found.unfit.append(str(error))
            continue
        found.rows.extend(rows[:num_rows])
        found.fastest.append((where, plans[0]))
    if not found.rows:
        raise ConfigError("\n".join(found.unfit))
    return found


def _fitting(config: Config, where: Target, numerics: Collection[str]) -> list[Plan]:
    try:
        plans = search(config, where.place, numerics)
    except ConfigError as error:
        raise ConfigError(f"{where.name}: {error}{would_do(config, where, numerics)}") from None
    if not where.place.fits(plans[0].memory):
        raise ConfigError(misfit(config, where, plans[0], numerics))
    return plans


def _compiled_rows(
    where: Target, topology: str, plans: Sequence[Plan], terms: Terms, num_compiled: int, say: Callable[[str], None]
) -> list[Row]:
    """Of the best plans that the compiler takes, then of those that it has not seen."""
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
    rows.sort(key=lambda row: sum(row.step_s))
    return rows + [_row(where, plan, None, terms) for plan in plans[tried:]]


def _different(plans: Sequence[Plan]) -> list[Plan]:
    """The best of each mesh first, so that what is compiled are different meshes."""
    seen, first, rest = set[tuple[int, ...]](), list[Plan](), list[Plan]()
    for plan in plans:
        key = tuple(plan.sizes.values())
        (rest if key in seen else first).append(plan)
        seen.add(key)
    return first + rest


def _row(where: Target, plan: Plan, compiled: Compiled | None, terms: Terms) -> Row:
    step_s, figures = plan.time.total, (compiled.figures if compiled is not None else None) or {}
    if priced := figures.get("step_time_s"):
        # the compiler prices what a core does, a pipeline's idle ticks included but for attention's kernels; what waits
        # for wires is added as by the formulas
        stages = plan.sizes["stage"]
        idle = plan.time.attention * (stages - 1) / (plan.config.mesh.rounds * plan.config.train.grad_accum)
        step_s = priced + idle + sum(seconds or 0 for seconds in plan.time.wires.values())
    taught = None if priced else where.place.taught(plan.config)
    spread, least_s = taught.spread if taught else None, least_step_s(plan.config, where.whole_chip, where.num_chips)
    ends = step_range(step_s, plan.time, where.machine.kind, bool(priced), spread, least_s)
    low, high = (totals(plan.config, where.whole_chip, where.num_chips, seconds, terms) for seconds in ends)
    num_runs, hbm_bytes = taught.num_runs if taught is not None else 0, where.place.chip.hbm_bytes
    return Row(where.name, where.num_chips, plan, compiled, hbm_bytes, ends, low, high, num_runs)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows with those of the cheapest machine first, by the middle of the first one's range; unpriced ones by days.

    Those of a machine stay as they are: what the compiler has taken comes before what it has not seen.
    """

    def cost(row: Row) -> tuple[bool, float]:
        name = "days" if row.low["usd"] is None else "usd"
        return name == "days", (row.low[name] or 0) + (row.high[name] or 0)

    first = {row.machine: cost(row) for row in reversed(rows)}
    return sorted(rows, key=lambda row: first[row.machine])


def nearest(rows: Sequence[Row], deadline_s: float | None, budget_usd: float | None) -> list[Row]:
    """Rows that may keep to a deadline and a budget.

    Raises:
        ConfigError: none can; says which is the nearest possible.
    """
    in_time = [row for row in rows if deadline_s is None or (row.low["days"] or 0) * DAY_S <= deadline_s]
    if not in_time:
        best = min(rows, key=lambda row: row.low["days"] or math.inf)
        raise ConfigError(
            f"no plan keeps the deadline; the fastest takes {best.low['days']:.3g} days, on {best.machine}"
        )
    within = [row for row in in_time if budget_usd is None or row.low["usd"] is None or row.low["usd"] <= budget_usd]
    if not within:
        best = min(in_time, key=lambda row: row.low["usd"] or math.inf)
        which = "no plan" if deadline_s is None else "no plan that keeps the deadline"
        raise ConfigError(
            f"{which} keeps the budget; the cheapest costs {best.low['usd']:,.0f} USD, on {best.machine}, and takes "
            f"{best.low['days']:.3g} days"
        )
    return within
