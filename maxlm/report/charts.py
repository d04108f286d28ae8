"""Curves as SVG for the page and as PNG for everything else.

The SVG takes its colors from the page's CSS variables, so that it follows the reader's light or dark setting:
matplotlib draws with stand-in colors, which are then replaced by `var(--name)`.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from maxlm import units
from maxlm.report.data import Run, facts, tokens_per_step

SERIES = 8
"""Colors for curves; further runs use them again, dashed."""
LIGHT = {
    "ink": "#1c1e21",
    "muted": "#656b73",
    "line": "#e3e5e8",
    "card": "#ffffff",
    "point": "#c2410c",
    **{f"s{i}": c for i, c in enumerate("#2563eb #c2410c #0f8a5f #9333ea #b8860b #0891b2 #db2777 #64748b".split())},
}
DARK = {
    "ink": "#e9eaec",
    "muted": "#9ba1a9",
    "line": "#30343a",
    "card": "#1b1d21",
    "point": "#fb923c",
    **{f"s{i}": c for i, c in enumerate("#74a3ff #fb923c #3ecf9a #c793ff #e3b341 #3cc4de #f77fb6 #a3afbf".split())},
}
# Not black: matplotlib leaves a color out of the SVG where black is the default.
_STAND_IN = {name: f"#0101{i + 16:02x}" for i, name in enumerate(LIGHT)}
_POINTS = 400  # per curve; a chart is under 1,000 pixels wide
_STYLE = {
    "font.family": ["sans-serif"],
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "maxlm",
    "axes.unicode_minus": False,
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw: one column of the metrics over steps.

    Attributes:
        column: name in the training rows.
        show: text of a value at the y axis.
        scale: "log", "linear" or "zero" (linear, from 0).
        smooth: draws a mean over the faint raw curve.
        steady: leaves out steps right after a start, whose time is that of the compiler.
    """

    column: str
    show: Callable[[float], str]
    scale: str
    smooth: bool = True
    steady: bool = False


LOSS = Chart("loss", "{:.3g}".format, "log")
SMALL = {
    "Learning rate": Chart("learning_rate", "{:g}".format, "zero", smooth=False),
    "Gradient norm": Chart("grad_norm", "{:.3g}".format, "log"),
    "Tokens per second": Chart("tokens_per_s", lambda v: _short(v), "zero", steady=True),
}


def svg(chart: Chart, runs: Sequence[Run], width: float, height: float) -> str | None:
    """One chart of all runs, to be put into the page as it is; None if no run has the column.

    Args:
        chart: what to draw.
        runs: one or several.
        width: width in inches of 72 CSS pixels at full size; it shrinks with the page.
        height: height, in the same.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{chart.column}{width}"}):
        figure = _draw(chart, runs, width, height, {n: _STAND_IN[n] for n in LIGHT}, in_page=True)
        if figure is None:
            return None
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for name, color in _STAND_IN.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", text)


def loss_png(runs: Sequence[Run]) -> bytes:
    """The loss curves as an image with a white background, for a README or a chat."""
    with matplotlib.rc_context(_STYLE):
        figure = _draw(LOSS, runs, 8, 4.5, LIGHT, in_page=False) or Figure(figsize=(8, 4.5))
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).figure.savefig(
            buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def x_in_tokens(runs: Sequence[Run]) -> bool:
    """Whether the x axis shows tokens: runs with batches of different sizes cannot be compared by steps."""
    sizes = [tokens_per_step(run) for run in runs]
    return None not in sizes and len(set(sizes)) > 1


def smoothed(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over up to `radius` neighbors on each side; values that are not finite are left out.

    The window shrinks at the start, where the curve is steep and a lopsided mean would hide it.
    """
    index = np.arange(len(values))
    low, high = index - np.minimum(radius, index), np.minimum(index + np.minimum(radius, index), len(values) - 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    num = counts[high + 1] - counts[low]
    return np.where(finite & (num > 0), (sums[high + 1] - sums[low]) / np.maximum(num, 1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, parts: int = _POINTS // 2) -> tuple[np.ndarray, np.ndarray]:
    """A long curve with few points that looks the same: smallest and largest value of each of `parts` pieces."""
    if len(x) <= 2 * parts:
        return x, y
    kept: list[int] = [0, len(x) - 1]
    for piece in np.array_split(np.arange(len(x)), parts):
        finite = piece[np.isfinite(y[piece])]
        kept += [piece[0]] if len(finite) == 0 else [finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]]
    index = np.unique(kept)
    return x[index], y[index]


def _draw(
    chart: Chart, runs: Sequence[Run], width: float, height: float, colors: Mapping[str, str], in_page: bool
) -> Figure | None:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    tokens = x_in_tokens(runs)
    drawn = [
        y
        for i, run in enumerate(runs)
        for y in _draw_run(axes, chart, run, i, colors, alone=len(runs) == 1, per_step=_per_step(run, tokens))
    ]
    if not any(np.isfinite(y).any() for y in drawn):
        return None
    _scale(axes, chart, np.concatenate([y[np.isfinite(y)] for y in drawn]))
    if len(runs) == 1:
        if chart is LOSS:
            _draw_baselines(axes, facts(runs[0]), colors)
        for step in runs[0].metrics.restarts:
            axes.axvline(step, color=colors["muted"], linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    _dress(axes, chart, colors, "tokens" if tokens else "step")
    if not in_page:
        axes.set_ylabel("loss, nats per token", color=colors["muted"])
        axes.legend(frameon=False, labelcolor=colors["ink"])
    return figure


def _per_step(run: Run, tokens: bool) -> int:
    return (tokens_per_step(run) or 1) if tokens else 1


def _draw_run(
    axes: Any, chart: Chart, run: Run, index: int, colors: Mapping[str, str], alone: bool, per_step: int
) -> list[np.ndarray]:
    """Draws one run's curve and, with the loss, its held-out points; returns the y values that must be in view."""
    steps, values = run.column(chart.column, chart.steady)
    color = colors[f"s{index % SERIES}"]
    line = {"color": color, "linestyle": "-" if index < SERIES else "--", "solid_capstyle": "round", "zorder": 3}
    curve = smoothed(values, max(1, len(values) // 60)) if chart.smooth else values
    if alone and chart.smooth:
        axes.plot(*thinned(steps * per_step, values), color=color, alpha=0.38, linewidth=0.7, zorder=2)
    label = "training loss" if alone else run.name
    axes.plot(*thinned(steps * per_step, curve), linewidth=1.6, label=label, **line)
    finite = values[np.isfinite(values)]
    # rare spikes of the raw curve may leave the picture
    seen = [curve, np.quantile(finite, [0.005, 0.995]) if len(finite) else finite]
    if chart is LOSS and (rows := run.metrics.heldout):
        x = np.array([row["step"] for row in rows], float) * per_step
        y = np.array([row["heldout_loss"] for row in rows], float)
        fill = colors["point"] if alone else color
        dots = {"markersize": 6, "markeredgecolor": colors["card"], "markeredgewidth": 0.8, "zorder": 4}
        axes.plot(x, y, "o", color=fill, label="held-out loss" if alone else None, **dots)
        seen.append(y)
    return seen


def _draw_baselines(axes: Any, known: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    """Lines where the baselines lie, which are in bits per byte: the held-out loss is known in both units."""
    loss, bits = known.get("heldout_loss"), known.get("heldout_bits_per_byte")
    low, high = axes.get_ylim()
    for name, baseline in known.get("baselines", {}).items():
        if loss and bits and low < (at_loss := baseline * loss / bits) < high:
            axes.axhline(at_loss, color=colors["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            at = {"xy": (1, at_loss), "xycoords": ("axes fraction", "data"), "xytext": (-2, 3)}
            text = axes.annotate(name, textcoords="offset points", ha="right", va="bottom", fontsize=10, **at)
            text.set_color(colors["muted"])


def _scale(axes: Any, chart: Chart, seen: np.ndarray) -> None:
    """Sets scale, limits and ticks of the y axis from the values that must be in view."""
    low, high = float(seen.min()), float(seen.max())
    if chart.scale == "zero":
        # a short dip or spike is not worth the room, except where it is the whole story
        high = max(float(np.quantile(seen, 0.98)) * 1.15, 1e-30)
        axes.set_ylim(0, max(high, low * 1.05))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    elif low > 0 and high / low > 1.5:
        axes.set_yscale("log")
        low, high = low * 0.96, high * 1.06
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between low and high, at most seven."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    best: list[float] = []
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 8),
    ):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(best) >= 4 or len(ticks) > 7:
            break
        best = ticks
    return best or [low, high]


def _dress(axes: Any, chart: Chart, colors: Mapping[str, str], x_label: str) -> None:
    axes.set_facecolor("none")
    axes.grid(axis="y", color=colors["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["line"])
    axes.tick_params(length=0, labelcolor=colors["muted"], pad=4)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: chart.show(v)))
    axes.set_xlabel(x_label, color=colors["muted"])


def _short(value: float) -> str:
    """A step or token count without needless zeros: 1.5k and not 1.50k."""
    text = units.count(value)
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
