"""The report for a terminal."""

import math

from maxlm import goodput, progress, receipt, units
from maxlm.report.data import Run, facts, load_runs, printable

_BARS = "▁▂▃▄▅▆▇█"


def text_summary(run_dir: str) -> str:
    """A run in a screenful of text: where it is, its losses against the baselines, its speed, its sample.

    Args:
        run_dir: run folder or bucket url.

    Raises:
        ValueError: the folder is missing or holds no run.
    """
    run = load_runs([run_dir])[0]
    known = facts(run)
    lines = [f"{known['name']}: {progress_text(known)}", ""]
    lines.append(progress.summary_table(dict(_rows(run, known))))
    if sample := run.summary.get("sample"):
        lines += ["", "sample:", printable(f"{run.summary.get('prompt') or ''}{sample}").rstrip()]
    return "\n".join(lines)


def progress_text(known: dict) -> str:
    """Status and step: `complete, step 300 of 300`."""
    text = known["status"]
    if "step" in known:
        text += f", step {known['step']:,}" + (f" of {known['total_steps']:,}" if "total_steps" in known else "")
    if "not_finite_since" in known:
        text += f", loss not finite since step {known['not_finite_since']:,}"
    return text


def hardware_text(known: dict) -> str | None:
    """Devices and mesh: `8 x NVIDIA H200, fsdp 4 x tensor 2`."""
    devices = f"{known['num_devices']} × {known.get('device_kind', 'device')}" if "num_devices" in known else None
    mesh = " × ".join(f"{name} {size}" for name, size in known.get("mesh", {}).items() if size != 1)
    return ", ".join(filter(None, [devices, mesh])) or None


def _rows(run: Run, known: dict) -> list[tuple[str, str]]:
    rows: list[tuple[str, str | None]] = []
    steps = run.column("loss")[1]
    if len(steps) > 1:
        rows.append(("loss", _sparkline(list(steps))))
    losses = [
        ("train loss", "train_loss"),
        ("held-out loss", "heldout_loss"),
        ("bits per byte", "heldout_bits_per_byte"),
    ]
    rows += [(label, f"{known[key]:.4f}") for label, key in losses if key in known]
    rows += [(f"{name} baseline", f"{bits:.4f} bits per byte") for name, bits in known.get("baselines", {}).items()]
    for label, key, show in (
        ("tokens/s", "tokens_per_s", units.count),
        ("step time", "step_time_s", units.duration),
        ("MFU", "mfu", "{:.1%}".format),
        ("first step after", "first_step_s", units.duration),
        ("wall time", "wall_s", units.duration),
        ("tokens", "tokens", units.count),
        ("parameters", "params", units.count),
        ("FLOPs per token", "flops_per_token", units.count),
    ):
        if key in known:
            rows.append((label, show(known[key])))
    rows += goodput.rows(run.time).items() if run.time else []
    rows += receipt.rows(known.get("receipt", {}), known.get("predicted_by")).items()
    rows.append(("devices", hardware_text(known)))
    rows.append(("skipped steps", known.get("skipped_steps")))
    rows.append(("restarts at step", ", ".join(map(str, known.get("restarts", []))) or None))
    rows.append(("checkpoint", known.get("checkpoint")))
    return [(label, str(value)) for label, value in rows if value is not None]


def _sparkline(values: list[float], width: int = 40) -> str:
    """Means of `width` equal parts as bars; a space where nothing is finite."""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    finite = [m for m in means if math.isfinite(m)]
    if not finite:
        return "not finite"
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low or 1.0)
    bars = "".join(_BARS[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)
    return f"{high:.3g} {bars} {means[-1]:.3g}"
