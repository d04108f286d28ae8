"""The report as one HTML file: no scripts, nothing loaded from elsewhere, light or dark as the reader has it."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from maxlm import goodput, receipt, units
from maxlm.report import charts
from maxlm.report.data import Run, differences, facts, printable
from maxlm.report.style import CSS
from maxlm.report.text import hardware_text, progress_text

_WIDE, _NARROW, _SMALL = (13.6, 4.6), (4.7, 4.0), (4.1, 2.4)

_NUMBERS = (
    # name, title of the column or tile, text, whether less is better (None: neither)
    ("train_loss", "training loss", "{:.3f}".format, True),
    ("heldout_loss", "held-out loss", "{:.3f}".format, True),
    ("heldout_bits_per_byte", "bits per byte", "{:.3f}".format, True),
    ("tokens_per_s", "tokens/s", units.count, False),
    ("mfu", "MFU", "{:.1%}".format, False),
    ("step_time_s", "step time", units.duration, True),
    ("first_step_s", "to first step", units.duration, True),
    ("wall_s", "wall time", units.duration, None),
    ("goodput", "goodput", "{:.1%}".format, False),
    ("tokens", "tokens seen", units.count, None),
    ("params", "parameters", units.count, None),
)
_PHASE_COLORS = {
    "step": "s0",
    "data": "s1",
    "compile": "s3",
    "save": "s2",
    "evaluation": "s5",
    "start": "s4",
    "ending": "s7",
    "lost": "s6",
    "idle": "line",
}
# Left out of comparisons, whose table must fit a screen; tokens/s says the same.
_ONE_RUN_ONLY = ("step_time_s", "first_step_s")


def render(runs: Sequence[Run]) -> str:
    """The page for one run, or comparing several."""
    body = _one_run(runs[0]) if len(runs) == 1 else _comparison(runs)
    title = f"{runs[0].name}: maxlm report" if len(runs) == 1 else "maxlm: comparison"
    # The policy makes sure that a generated sample can neither run nor load anything.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_esc(title)}</title>\n<style>{_colors()}{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _one_run(run: Run) -> str:
    known = facts(run)
    about = [_model_text(known), hardware_text(known)]
    parts = [
        f'<header><h1>{_esc(run.name)}</h1><span class="status {_status_class(known)}">'
        f"{_esc(progress_text(known))}</span></header>",
        f'<p class="about">{_esc(" · ".join(filter(None, about)))}</p>' if any(about) else "",
        _tiles(known),
        _loss_card([run], _legend_one(run, known)),
        _baselines(known),
        _small_charts([run]),
        _time(run.time),
        _sample(run),
        f'<div class="grid">{_receipt(known)}{_memory(known)}{_parameters(known)}</div>',
        _notes(known),
        _details("Configuration", run.config_text),
    ]
    return "\n".join(part for part in parts if part)


def _comparison(runs: Sequence[Run]) -> str:
    parts = [
        f"<header><h1>{len(runs)} runs</h1></header>",
        _compare_table(runs),
        _loss_card(runs, _legend_many(runs)),
        _small_charts(runs),
        _difference_table(runs),
        *[_details(f"Configuration of {run.name}", run.config_text) for run in runs],
    ]
    return "\n".join(part for part in parts if part)


def _tiles(known: Mapping[str, Any]) -> str:
    tiles = [
        f'<div class="tile"><b>{_esc(show(known[name]))}</b><span>{_esc(title)}</span></div>'
        for name, title, show, _ in _NUMBERS
        if name in known
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _loss_card(runs: Sequence[Run], legend: str) -> str:
    # The text of an SVG shrinks with it, so phones get a drawing of their own.
    wide, narrow = (charts.svg(charts.LOSS, runs, *size) for size in (_WIDE, _NARROW))
    if wide is None or narrow is None:
        return _card("Loss", '<p class="quiet">No finite loss has been recorded yet.</p>')
    title = "Loss <small>nats per token</small>"
    return (
        f'<section class="card"><h2>{title}</h2>{legend}'
        f'<figure class="wide">{wide}</figure><figure class="narrow">{narrow}</figure></section>'
    )


def _small_charts(runs: Sequence[Run]) -> str:
    drawn = [(title, charts.svg(chart, runs, *_SMALL)) for title, chart in charts.SMALL.items()]
    cards = [_card(title, f"<figure>{image}</figure>") for title, image in drawn if image]
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _legend_one(run: Run, known: Mapping[str, Any]) -> str:
    items = ['<span><i style="background:var(--s0)"></i>training, smoothed</span>']
    if run.metrics.heldout:
        items.append('<span><i class="dot" style="background:var(--point)"></i>held-out</span>')
    if known.get("restarts"):
        items.append('<span><i class="dotted"></i>restart</span>')
    return f'<p class="legend">{"".join(items)}</p>'


def _legend_many(runs: Sequence[Run]) -> str:
    items = [f"<span>{_swatch(i)}{_esc(run.name)}</span>" for i, run in enumerate(runs)]
    dots = "<span>dots: held-out</span>" if any(run.metrics.heldout for run in runs) else ""
    return f'<p class="legend">{"".join(items)}{dots}</p>'


def _swatch(index: int) -> str:
    color = f"var(--s{index % charts.SERIES})"
    dashed = f"border-top:2px dashed {color}" if index >= charts.SERIES else f"background:{color}"
    return f'<i style="{dashed}"></i>'


def _baselines(known: Mapping[str, Any]) -> str:
    """Held-out bits per byte as bars beside what counting tokens reaches."""
    if "baselines" not in known or "heldout_bits_per_byte" not in known:
        return ""
    bits = {**known["baselines"], known["name"]: known["heldout_bits_per_byte"]}
    top = max((x for x in bits.values() if math.isfinite(x)), default=0) or 1
    bars = []
    for name, value in bits.items():
        own = ' class="own"' if name == known["name"] else ""
        width = 100 * value / top if math.isfinite(value) else 0
        bars.append(f'<dt{own}>{_esc(name)}</dt><dd{own}><i style="width:{width:.1f}%"></i><b>{value:.3f}</b></dd>')
    title = "Against counting <small>bits per byte of held-out text, less is better</small>"
    return _card(title, f"<dl>{''.join(bars)}</dl>")


def _time(spent: goodput.Goodput | None) -> str:
    """Where the time went: one bar of all phases, and a table of them."""
    if spent is None or not spent.total_s:
        return ""
    bar, lines = [], []
    for phase, seconds in spent.seconds.items():
        name, share = goodput.PHASES.get(phase, phase), 100 * seconds / spent.total_s
        color = f"background:var(--{_PHASE_COLORS.get(phase, 'muted')})"
        bar.append(f'<i style="width:{share:.3f}%;{color}" title="{_esc(name)}"></i>')
        lines.append(
            f'<tr><th><i style="{color}"></i>{_esc(name)}</th><td>{_esc(units.duration(seconds))}</td>'
            f"<td>{share:.1f}%</td></tr>"
        )
    facts = [f"goodput {spent.fraction:.1%} of {units.duration(spent.total_s)}"]
    if goodput.IDLE in spent.seconds:
        facts.append(f"{spent.running:.1%} without the time between starts")
    facts.append(f"{spent.starts:,} start{'s' * (spent.starts > 1)}")
    if spent.lost_steps:
        facts.append(f"{spent.lost_steps:,} step{'s' * (spent.lost_steps > 1)} done again")
    facts.append(f"{spent.device_hours:.3g} device-hours")
    if spent.usd is not None:
        facts.append(units.dollars(spent.usd))
    title = f"Where the time went <small>{_esc(', '.join(facts))}</small>"
    return _card(title, f'<div class="stack">{"".join(bar)}</div><table class="time">{"".join(lines)}</table>')


def _sample(run: Run) -> str:
    sample = run.summary.get("sample")
    if not sample:
        return ""
    prompt = run.summary.get("prompt") or ""
    text = f"<mark>{_esc(printable(prompt))}</mark>{_esc(printable(sample))}" if prompt else _esc(printable(sample))
    return _card("Sample <small>generated by the model</small>", f"<blockquote>{text}</blockquote>")


def _memory(known: Mapping[str, Any]) -> str:
    rows = [(f"mesh axis {name}", f"{size:,}") for name, size in known.get("mesh", {}).items()]
    memory = known.get("bytes_per_device", {})
    if not isinstance(memory, dict):
        memory = {"weights and optimizer state": memory}
    rows += [(f"{name.replace('_', ' ')}, per device", units.size(value)) for name, value in memory.items()]
    return _table_card("Mesh and memory", rows)


def _receipt(known: Mapping[str, Any]) -> str:
    rows = receipt.rows(known.get("receipt", {}), known.get("predicted_by"))
    return _table_card("Predicted and measured", list(rows.items()))


def _parameters(known: Mapping[str, Any]) -> str:
    parts = known.get("params_by_part", {})
    shown = [name for name, value in parts.items() if value and name not in ("total_unpadded", "active")]
    rows = [(name.replace("_", " "), f"{parts[name]:,}") for name in shown]
    if (unpadded := parts.get("total_unpadded")) and unpadded != parts.get("total"):
        rows.append(("without vocabulary padding", f"{unpadded:,}"))
    if (active := parts.get("active")) and active != unpadded:
        rows.append(("active for a token", f"{active:,}"))
    if not parts and "params" in known:
        rows.append(("parameters", f"{known['params']:,}"))
    if "flops_per_token" in known:
        rows.append(("model FLOPs per token", units.count(known["flops_per_token"])))
        if "tokens" in known:
            rows.append(("model FLOPs so far", f"{known['flops_per_token'] * known['tokens']:.3g}"))
    return _table_card("Parameters and FLOPs", rows)


def _notes(known: Mapping[str, Any]) -> str:
    rows = []
    if "skipped_steps" in known:
        rows.append(("skipped steps", f"{known['skipped_steps']:,}"))
    if "restarts" in known:
        rows.append(("restarted from step", ", ".join(f"{step:,}" for step in known["restarts"])))
    if "checkpoint" in known:
        rows.append(("checkpoint", str(known["checkpoint"])))
    return _table_card("Run", [*rows, ("folder", known["path"])])


def _table_card(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{_esc(name)}</th><td>{_esc(value)}</td></tr>" for name, value in rows)
    return _card(title, f'<table class="pairs">{cells}</table>')


def _compare_table(runs: Sequence[Run]) -> str:
    known = [facts(run) for run in runs]
    columns = [c for c in _NUMBERS if c[0] not in _ONE_RUN_ONLY and any(c[0] in k for k in known)]
    head = "".join(f"<th>{_esc(title)}</th>" for _, title, _, _ in columns)
    lines = []
    for i, k in enumerate(known):
        cells = "".join(_compare_cell(known, k, *column) for column in columns)
        lines.append(f"<tr><th>{_swatch(i)}{_esc(k['name'])}<small>{_esc(progress_text(k))}</small></th>{cells}</tr>")
    return (
        f'<section class="card scroll"><table class="compare"><thead><tr><th>run</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _compare_cell(
    known: Sequence[Mapping[str, Any]], one: Mapping[str, Any], name: str, _title: str, show: Any, less: bool | None
) -> str:
    if name not in one:
        return "<td>–</td>"
    values = [k[name] for k in known if name in k and k[name] == k[name]]
    # what looks the same is the same: noise does not make a winner
    differ = less is not None and len(set(map(show, values))) > 1
    best = differ and show(one[name]) == show(min(values) if less else max(values))
    return f"<td{' class=best' if best else ''}>{_esc(show(one[name]))}</td>"


def _difference_table(runs: Sequence[Run]) -> str:
    rows = differences(runs)
    if not rows:
        return _card("Configuration", '<p class="quiet">The runs have the same configuration.</p>')
    head = "".join(f"<th>{_swatch(i)}{_esc(run.name)}</th>" for i, run in enumerate(runs))
    lines = [
        f"<tr><th>{_esc(key)}</th>{''.join(f'<td>{_esc(_value(v))}</td>' for v in values)}</tr>"
        for key, values in rows.items()
    ]
    table = f'<table class="compare"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<section class="card scroll"><h2>Configuration <small>where the runs differ</small></h2>{table}</section>'


def _details(title: str, text: str) -> str:
    if not text:
        return ""
    return f'<details class="card"><summary>{_esc(title)}</summary><pre>{_esc(text)}</pre></details>'


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{title}</h2>{content}</section>'


def _model_text(known: Mapping[str, Any]) -> str:
    return f"{units.count(known['params'])} parameters" if "params" in known else ""


def _status_class(known: Mapping[str, Any]) -> str:
    if "not_finite_since" in known or known["status"] in ("failed", "diverged"):
        return "bad"
    return "good" if known["status"] == "complete" else "open"


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _colors() -> str:
    def block(colors: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{color};" for name, color in colors.items())

    return f":root{{{block(charts.LIGHT)}}}\n@media (prefers-color-scheme:dark){{:root{{{block(charts.DARK)}}}}}\n"


def _esc(text: str) -> str:
    return html.escape(text)
