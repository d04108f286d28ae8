"""What a machine costs: dated list prices that users replace by their own, energy, and what it emits.

prices.csv, beside this file, holds US list prices per chip-hour. It is out of date the day after it was written: every
row has its date and source, stale() says when one is old, and a file of the same columns takes precedence.
"""

import csv
import datetime
import difflib
import functools
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

from maxlm import hardware, places
from maxlm.config_file import ConfigError

KINDS = ("on-demand", "spot", "reserved", "flex-start")
STALE_DAYS = 90
CPU = "cpu"
"""A host without accelerators, as a chip; only users know what theirs cost."""
FILE_VARIABLE = "MAXLM_PRICES"
MAX_BYTES = 1 << 20
"""Of a file of prices."""
MAX_USD = 1e6
"""Of a chip-hour; more is a slip."""
NO_PRICE = 700.0
"""What SkyPilot's catalogue writes where it knows no price of a TPU."""


@dataclass(frozen=True)
class Price:
    """What a chip costs somewhere; one row of prices.csv.

    Attributes:
        chip: hardware.Chip.name, or CPU.
        provider: who sells it; empty where the source does not say.
        region: where; empty where the source does not say, or for all.
        kind: one of KINDS.
        usd_per_chip_hour: for a whole chip, in USD.
        date: when the price was seen, YYYY-MM-DD, or YYYY-MM where no more is known.
        source: where, and how far to trust it.
    """

    chip: str
    provider: str
    region: str
    kind: str
    usd_per_chip_hour: float
    date: str
    source: str

    def __str__(self) -> str:
        seller = " ".join(filter(None, (self.provider, self.region))) or "provider not known"
        return f"${self.usd_per_chip_hour:.2f} per chip-hour, {seller}, {self.kind}, {self.date} ({self.source})"


COLUMNS = tuple(field.name for field in fields(Price))


def find_price(
    chip: str, kind: str = "on-demand", provider: str | None = None, extra: Sequence[Price] = ()
) -> Price | None:
    """The price of a chip: the lowest that fits, of the user's if any of those does.

    Args:
        chip: hardware.Chip.name.
        kind: one of KINDS.
        provider: such as "AWS", in upper or lower case; None takes the cheapest. TPUs have one, GCP.
        extra: the user's prices (read_prices).

    Returns:
        The price, which names its provider, or None where nobody knows one.
    """
    for prices in (extra, _catalog()):
        found = [price for price in prices if price.chip.lower() == chip.lower() and price.kind == kind]
        if provider is not None:
            found = [price for price in found if price.provider.lower() == provider.lower()]
        if found:
            return min(found, key=lambda price: price.usd_per_chip_hour)
    return None


def read_prices(path: str | Path) -> list[Price]:
    """Reads a CSV file with the columns of prices.csv.

    Args:
        path: file; provider, region and source may be left empty.

    Raises:
        ConfigError: names the file, the line and what would be right.
    """
    shown = places.redacted(str(path))
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device or a pipe does not say how long it is
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{shown} has more than {MAX_BYTES:,} bytes, the most that a file of prices may have")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{shown} does not exist; it is to be a CSV file of prices") from None
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{shown} is no CSV file: it is not UTF-8") from None
    return _parsed(text, shown)


def users_prices() -> list[Price]:
    """The prices in the file that $MAXLM_PRICES names; none where it is not set. Raises as read_prices does."""
    path = os.environ.get(FILE_VARIABLE)
    return read_prices(path) if path else []


def stale(price: Price, today: datetime.date) -> str | None:
    """A sentence where a price is older than STALE_DAYS."""
    days = (today - _day(price.date)).days
    if days <= STALE_DAYS:
        return None
    return f"the price of {price.chip} is of {price.date}, {days} days old: look it up, and give yours with --prices"


def cost_usd(num_chips: int, hours: float, price: Price | None) -> float | None:
    """What chips cost for some hours, in USD; None where there is no price."""
    return None if price is None else num_chips * hours * price.usd_per_chip_hour


def energy_kwh(watts: float | None, num_chips: int, hours: float, pue: float = 1.0) -> float | None:
    """Energy at a chip's maximum power: an upper bound, measured draw was 15 to 85 % of it (arXiv:2503.05804).

    Args:
        watts: hardware.Chip.watts; of most TPUs unpublished.
        num_chips: that run.
        hours: for which they run.
        pue: power of the building per power of its machines; 1 is the energy at the chip.

    Returns:
        kWh, or None where the power is not known.
    """
    return None if watts is None else watts * num_chips * hours / 1000 * pue


def co2e_kg(kwh: float | None, grid_gco2_per_kwh: float | None) -> float | None:
    """What making that energy emits, in kg of CO2 equivalent; None where energy or the grid's intensity is unknown."""
    return None if kwh is None or grid_gco2_per_kwh is None else kwh * grid_gco2_per_kwh / 1000


@functools.cache
def _catalog() -> list[Price]:
    text = resources.files("maxlm.plan").joinpath("prices.csv").read_text(encoding="utf-8")
    return _parsed(text, "prices.csv")


def _parsed(text: str, shown: str) -> list[Price]:
    """The prices in the text of a file that is called `shown`."""
    reader, header, prices = csv.reader(io.StringIO(text)), None, []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if header is None:
                header = _header(cells, shown)
            elif len(cells) != len(header):
                raise ConfigError(f"{shown}, line {reader.line_num} has {len(cells)} cells for {len(header)} columns")
            else:
                prices.append(_price(dict(zip(header, cells, strict=True)), f"{shown}, line {reader.line_num}"))
    except csv.Error as error:
        raise ConfigError(f"{shown}, line {reader.line_num} is not CSV: {error}") from None
    if header is None:
        raise ConfigError(f"{shown} is empty; its first line is to be {','.join(COLUMNS)}")
    return prices


def _header(cells: list[str], shown: str) -> list[str]:
    if sorted(cells) != sorted(COLUMNS):
        raise ConfigError(f"{shown}: the columns are {_clip(','.join(cells))}, and are to be {','.join(COLUMNS)}")
    return cells


def _price(row: dict[str, str], where: str) -> Price:
    names = {CPU: CPU, **{chip.name.lower(): chip.name for chip in hardware.CHIPS}}
    chip = names.get(row["chip"].lower())
    if chip is None:
        near = [names[n] for n in difflib.get_close_matches(row["chip"].lower()[:80], names, 3)] or names.values()
        raise ConfigError(f"{where}: chip {_clip(row['chip'])!r} is not known; names like it are {', '.join(near)}")
    if row["kind"] not in KINDS:
        raise ConfigError(f"{where}: kind {_clip(row['kind'])!r} is to be one of {', '.join(KINDS)}")
    try:
        usd = float(row["usd_per_chip_hour"])
    except ValueError:
        usd = math.nan
    if not 0 < usd <= MAX_USD:
        wrong = _clip(row["usd_per_chip_hour"])
        limits = f"a number of USD above 0 and at most {MAX_USD:,.0f}, such as 4.20"
        raise ConfigError(f"{where}: usd_per_chip_hour {wrong!r} is to be {limits}")
    if usd == NO_PRICE:
        raise ConfigError(f"{where}: usd_per_chip_hour 700 is SkyPilot's sign for no price; leave the row out")
    try:
        _day(row["date"])
    except ValueError:
        raise ConfigError(f"{where}: date {_clip(row['date'])!r} is to be YYYY-MM-DD or YYYY-MM") from None
    return Price(chip, row["provider"], row["region"], row["kind"], usd, row["date"], row["source"])


def _day(date: str) -> datetime.date:
    """The day of a date; of a month its first, so that a price is rather too old than too young."""
    return datetime.datetime.strptime(date, "%Y-%m-%d" if date.count("-") == 2 else "%Y-%m").date()


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
