"""Numbers as people read them: 8.03B, 1.5 GiB, 2 h 05 min."""

import math
import re

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365.25 * 86400.0}


def seconds(text: str) -> float:
    """Seconds of a time with its unit, such as 30s, 5min, 4h, 10d or 5.8y.

    Raises:
        ValueError: it is no such time.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d|y)", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"{text[:40]!r} is no time with a unit, such as 30s, 5min, 4h, 10d or 5.8y")
    return float(match[1]) * SECONDS[match[2]]


def number(text: str) -> float:
    """A count as people write it: 1T, 25B, 1.5e12, 10_000.

    Raises:
        ValueError: it is none above 0.
    """
    match = re.fullmatch(r"(\d[\d_]{0,17}(?:\.\d{1,9})?(?:[eE]\d{1,2})?)([kMBT]?)", text.strip(), re.ASCII)
    found = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else 0.0
    if not 0 < found < math.inf:
        raise ValueError(f"{text[:40]!r} is no number above 0, such as 1T, 25B or 1.5e12")
    return found


def count(n: float) -> str:
    """A count or a rate in three digits: 512, 12.3k, 124M, 8.03B, 1.2T."""
    if not math.isfinite(n):
        return str(n)
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 rounds to 1.00M, not to 1000k
        if abs(n) >= factor * 0.9995:
            return f"{_three_digits(n / factor)}{letter}"
    return f"{n:.0f}" if float(n).is_integer() else _three_digits(n)


def size(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 1.50 MiB, 13.4 GiB."""
    if not math.isfinite(num_bytes):
        return str(num_bytes)
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(num_bytes) >= 0.9995 * 1024**power:
            return f"{_three_digits(num_bytes / 1024**power)} {unit}"
    return f"{num_bytes:.0f} B"


def dollars(usd: float) -> str:
    """An amount of USD: $0.0021, $0.35, $12.30, $4,210."""
    if abs(usd) < 0.095:
        return f"${usd:.2g}"
    return f"${usd:,.2f}" if abs(usd) < 1000 else f"${usd:,.0f}"


def duration(seconds: float) -> str:
    """A time span in at most two units: 0 s, 35.0 ms, 4.20 s, 2 min 05 s, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _three_digits(x: float) -> str:
    digits = 2 if abs(x) < 9.995 else 1 if abs(x) < 99.95 else 0
    return f"{x:.{digits}f}"
