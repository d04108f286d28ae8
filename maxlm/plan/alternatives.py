"""Other ways to the same model or loss (what_if.py), planned and priced on a machine."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxlm import units
from maxlm.config import Config, ModelConfig
from maxlm.config_file import ConfigError
from maxlm.flops import num_params
from maxlm.plan import what_if
from maxlm.plan.laws import Law
from maxlm.plan.money import Terms, flops_per_token, least_step_s, totals
from maxlm.plan.ranges import step_range
from maxlm.plan.search import search, variants
from maxlm.plan.table import aligned, between
from maxlm.plan.targets import Target
from maxlm.plan.what_if import Alternative

NO_LAW = (
    "no law tells the loss of adapters: laws are of models trained from nothing, so smaller and compute-optimal ones "
    "are left out"
)


@dataclass(frozen=True)
class Priced:
    """An alternative on a machine.

    Attributes:
        way: what it is.
        low: money.totals of its fastest plan at best; None where it does not fit.
        high: the same at worst (ranges.step_range).
        overrides: of that plan.
    """

    way: Alternative
    low: Mapping[str, float | None] | None
    high: Mapping[str, float | None] | None
    overrides: tuple[str, ...]


def ways(
    config: Config, law: Law, teacher: ModelConfig | None, distilled: float | None, kept: float | None
) -> list[Alternative]:
    """The alternatives to a run; of one that trains adapters those alone for which no law has to tell a loss.

    Args:
        config: the run.
        law: tells losses.
        teacher: a trained, larger model to prune; None leaves that out. Adapters have none.
        distilled: share of the tokens that distillation takes.
        kept: share of the tokens that deduplication leaves; None leaves that out.

    Raises:
        ValueError: a share is none, or the teacher is no larger.
    """
    model, train = config.model, config.train
    tokens = float(train.num_steps * train.tokens_per_step)
    of_run = (model, train.seq_len, tokens)
    known = None if config.lora is not None else law
    found = [what_if.as_configured(*of_run, known), what_if.int8(*of_run, known)]
    for make in (what_if.same_loss, what_if.compute_optimal) if known is not None else ():
        try:
            found.append(make(*of_run, law))
        except ValueError:
            continue  # there is no such model
    if teacher is not None and distilled is not None:
        found.append(what_if.pruned_and_distilled(model, teacher, train.seq_len, tokens, distilled))
    if kept is not None:
        found.append(what_if.deduplicated(*of_run, kept))
    if config.lora is not None:
        found[0] = dataclasses.replace(found[0], assumption=NO_LAW)
        found = [dataclasses.replace(way, flops_per_token=flops_per_token(config)) for way in found]
    return found


def priced(config: Config, found: Sequence[Alternative], where: Target, terms: Terms) -> list[Priced]:
    """Plans each way by formulas, int8 where it is faster. A teacher's forward pass stretches the step by its FLOPs."""
    rows, quant = [], variants(config, where.place.chip, ("quant",))[-1].quant
    for way in found:
        if way.name == "int8" and quant == config.quant:
            continue
        train = config.train.model_copy(update={"steps": None, "tokens": max(1, round(way.tokens))})
        own = quant if way.name == "int8" else config.quant
        changed = config.model_copy(update={"model": way.model, "train": train, "quant": own})
        try:
            best = search(changed, where.place)[0]
        except ConfigError:
            best = None
        if best is None or not where.place.fits(best.memory):
            rows.append(Priced(way, None, None, ()))
            continue
        stretch = way.flops_per_token / flops_per_token(changed)
        taught = where.place.taught(changed)
        spread = taught.spread if taught else None
        least_s = least_step_s(best.config, where.whole_chip, where.num_chips)
        ends = step_range(best.time.total, best.time, where.machine.kind, False, spread, least_s)
        low, high = (totals(best.config, where.whole_chip, where.num_chips, s * stretch, terms) for s in ends)
        rows.append(Priced(way, low, high, best.overrides))
    return rows


def as_json(row: Priced) -> dict[str, Any]:
    """A row, in base units."""
    way = row.way
    return {
        "name": way.name,
        "assumption": way.assumption,
        "params": num_params(way.model)["total_unpadded"],
        "tokens": way.tokens,
        "flops": way.flops,
        "expected_loss": way.expected_loss,
        "low": row.low,
        "high": row.high,
        "overrides": list(row.overrides),
    }


def show(rows: Sequence[Priced], machine: str) -> str:
    """The alternatives as a table, with what each takes for granted."""
    cells = [["what if", "parameters", "tokens", "loss", f"days on {machine}", "USD"]]
    for row in rows:
        spans = ["does not fit", ""]
        if row.low is not None and row.high is not None:
            spans = [between(row.low[name], row.high[name]) for name in ("days", "usd")]
        loss = "?" if row.way.expected_loss is None else f"{row.way.expected_loss:.3f}"
        size = units.count(num_params(row.way.model)["total_unpadded"])
        cells.append([row.way.name, size, units.count(row.way.tokens), loss, *spans])
    return "\n".join([*aligned(cells), *(f"{row.way.name}: {row.way.assumption}" for row in rows)])
