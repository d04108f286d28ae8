"""Numbers as people read them: 8.03B, 1.5 GiB, 2 h 05 min."""

import math


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
