"""Time from `maxlm train` to the first finished step: without compiled programs, and with those of the start before.

The process is timed by maxlm itself, from its start to the end of its first step (imports, data, compilation and the
step); the first start begins with an empty compilation cache. Runs and caches are made in a temporary folder. One
start is made before any is counted, so that stores are built and files are in memory.

    python tools/bench_start.py                                      # the quickstart
    python tools/bench_start.py configs/125m.yaml data.stores=[...]  # on a machine that can hold it
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

ONE_STEP = """
import sys
import maxlm
maxlm.train(maxlm.load_config(sys.argv[1], sys.argv[2:]), callbacks=[lambda step, metrics: True])
"""


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "quickstart.yaml"), help="config file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument("--rounds", type=int, default=3, help="first and second starts (3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    times: dict[str, list[float]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as folder:
        _first_step_s(args, folder, "uncounted", f"{folder}/cache")
        for i in range(args.rounds):
            for which in times:
                times[which].append(_first_step_s(args, folder, f"{which}-{i}", f"{folder}/cache-{i}"))
    median = {which: statistics.median(values) for which, values in times.items()}
    result = {"times_s": times, "median_s": median, "second_over_first": median["second"] / median["first"]}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"first start {median['first']:.1f} s, second {median['second']:.1f} s to the end of the first step")
        print(f"with compiled programs from the cache: {result['second_over_first']:.2f} of the time")
    return 0 if result["second_over_first"] < 1 else 1


def _first_step_s(args: argparse.Namespace, root: str, name: str, cache: str) -> float:
    settings = {"run.root": root, "run.name": name, "train.compilation_cache": cache}
    overrides = [*args.overrides, *(f"{field}={value}" for field, value in settings.items())]
    command = [sys.executable, "-c", ONE_STEP, args.config, *overrides]
    # from the root, where configs find their stores; a folder of one's own would build them anew
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(Path(root, name, "summary.json").read_text())["first_step_s"]


if __name__ == "__main__":
    raise SystemExit(main())
