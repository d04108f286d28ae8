"""What a plan comes to: days, dollars, energy."""

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm import flops
from maxlm.config import Config
from maxlm.hardware import Chip
from maxlm.parameters import num_adapters
from maxlm.plan import prices
from maxlm.plan.prices import Price

DAY_S = 86_400.0


@dataclass(frozen=True)
class Terms:
    """What the user says of the run and of what it costs.

    Attributes:
        price: of a chip; None where nobody knows it.
        goodput: share of the time that goes into steps that count.
        pue: power of the building per power of its machines.
        grid_gco2_per_kwh: emissions of the grid, in g; None where it is not known.
    """

    price: Price | None
    goodput: float = 1.0
    pue: float = 1.0
    grid_gco2_per_kwh: float | None = None


def totals(config: Config, chip: Chip, num_chips: int, step_s: float, terms: Terms) -> Mapping[str, float | None]:
    """Figures of a whole run.

    Args:
        config: the run; train.num_steps is its length.
        chip: what one whole chip can do.
        num_chips: that are paid for.
        step_s: seconds of a step.
        terms: of the user.

    Returns:
        days, usd (with what the goodput loses), usd_per_hour, kwh, co2e_kg, mfu, tokens_per_s; None where something
        that it hangs on is not known.
    """
    train = config.train
    seconds = train.num_steps * step_s / terms.goodput
    tokens_per_s = train.tokens_per_step / step_s
    kwh = prices.energy_kwh(chip.watts, num_chips, seconds / 3600, terms.pue)
    return {
        "days": seconds / DAY_S,
        "usd": prices.cost_usd(num_chips, seconds / 3600, terms.price),
        "usd_per_hour": prices.cost_usd(num_chips, 1.0, terms.price),
        "kwh": kwh,
        "co2e_kg": prices.co2e_kg(kwh, terms.grid_gco2_per_kwh),
        "mfu": flops.mfu(tokens_per_s, flops_per_token(config), chip.bf16_flops * num_chips),
        "tokens_per_s": tokens_per_s,
    }


def flops_for_usd(usd: float, config: Config, figures: Mapping[str, float | None]) -> float | None:
    """Model FLOPs of training that money buys on a machine, as many per USD as a run there has; None without a price.

    Args:
        usd: to spend.
        config: the run.
        figures: its totals there.
    """
    whole = figures["usd"]
    return None if whole is None else usd / whole * run_flops(config)


def run_flops(config: Config) -> float:
    """Model FLOPs of a whole run."""
    return config.train.num_steps * config.train.tokens_per_step * flops_per_token(config)


def least_step_s(config: Config, chip: Chip, num_chips: int) -> float:
    """Seconds of a step's model FLOPs at the chips' bf16 peak; 0 where products are quantized, which is faster.

    Args:
        config: the run.
        chip: what one whole chip can do.
        num_chips: that it runs on.
    """
    if config.quant.used:
        return 0.0
    return config.train.tokens_per_step * flops_per_token(config) / (chip.bf16_flops * num_chips)


def flops_per_token(config: Config) -> float:
    """Model FLOPs of a token's forward and backward pass, of adapters too."""
    model = config.model
    return flops.train_flops_per_token(model, config.train.seq_len, num_adapters(model, config.lora))
