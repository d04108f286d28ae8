"""Reports of runs for people: a page to look at, a text for the terminal, and the numbers behind both.

Input is what a run leaves in its folder: config.yaml, metrics.jsonl, goodput.json and, once it has ended, summary.json.
A run that is still going, or was cut off, gives a report of what there is.
"""

from collections.abc import Sequence
from typing import Any

from maxlm import storage
from maxlm.report.data import differences, facts, load_runs, plain
from maxlm.report.text import text_summary

__all__ = ["report_data", "text_summary", "write_report"]


def write_report(run_dirs: Sequence[str], out_dir: str | None = None) -> list[str]:
    """Writes report.html, one file that needs no network, and loss.png.

    Args:
        run_dirs: run folders or bucket urls; several are compared with each other.
        out_dir: where to; None means the run's own folder, or for several the current one.

    Returns:
        Paths of the files.

    Raises:
        ValueError: a folder is missing or holds no run.
    """
    from maxlm.report import charts, page  # here, since matplotlib takes a second that the text does without

    runs = load_runs(run_dirs)
    if out_dir is None:
        out_dir = runs[0].path if len(runs) == 1 else "."
    files = {"report.html": page.render(runs).encode(), "loss.png": charts.loss_png(runs)}
    paths = [storage.join(out_dir, name) for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        storage.write_bytes(path, data)
    return paths


def report_data(run_dirs: Sequence[str]) -> dict[str, Any]:
    """The numbers of the report, ready for json.dumps.

    Args:
        run_dirs: run folders or bucket urls.

    Returns:
        {"runs": [{"name", "path", "status", ...numbers}], "config_differences": {dotted key: [value per run]}}.
        Numbers that are not known are left out; such that are not finite are None.

    Raises:
        ValueError: a folder is missing or holds no run.
    """
    runs = load_runs(run_dirs)
    return plain({"runs": [facts(run) for run in runs], "config_differences": differences(runs)})
