"""Makes real faults on real runs, on this machine's CPU, and prints what survived.

    python tools/chaos.py                              # everything in full: hours on two cores
    python tools/chaos.py --short                      # a few of each, minutes
    python tools/chaos.py kills soak --out chaos.md    # some, and the table as a file
    python tools/chaos.py --list                       # what there is

Every run is started as a user starts it, in processes of its own, on fake devices, with text of Python's own source
and without a network: two token stores are mixed, rows are packed, batches are read ahead and the text is seen several
times. A fault has survived when the run ends as an undisturbed one does: each step once in its metrics, and weights,
optimizer state and losses the same, bit for bit (on other meshes: the same batches). Random choices follow --seed.

Exit code 1 if something did not survive; the sentence says why, and the folder of the runs is kept.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.faults.cases import CASES  # noqa: E402
from tools.faults.outcome import Broken, Outcome, table  # noqa: E402
from tools.faults.work import Work  # noqa: E402


def main() -> int:
    """Tries the faults, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", metavar="CASE", nargs="*", help=f"which (all): {', '.join(CASES)}")
    parser.add_argument("--short", action="store_true", help="a few of each, as CI does")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table here, too")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (0)")
    parser.add_argument("--list", action="store_true", help="say what each does, and do nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.list:
        print("\n".join(f"{name:12} {case.about}" for name, case in CASES.items()))
        return 0
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.folder)).resolve()
    work = Work(folder, args.short, args.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended
    form = "short form" if args.short else "full form"
    work.say(f"seed {args.seed}, {form}, in {folder}")
    outcomes: list[Outcome] = []
    text = ""
    for name in args.cases or CASES:
        outcomes += _try(name, work)
        text = f"`python tools/chaos.py`, {form}, seed {args.seed}\n\n{table(outcomes)}\n"
        if args.out:
            args.out.write_text(text)
    print(text)
    failures = [f"{o.fault}: {failure}" for o in outcomes for failure in o.failures]
    if failures:
        print("\n".join(["did not survive:", *failures, f"the runs are kept in {folder}"]), file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _try(name: str, work: Work) -> list[Outcome]:
    started = time.monotonic()
    work.say(f"---- {name}: {CASES[name].about}")
    try:
        found = CASES[name].run(work)
    except Broken as error:  # before anything could be tried
        found = [Outcome(name, tried=1, failures=[str(error)], seconds=time.monotonic() - started)]
    for outcome in found:
        work.say(f"{name}: {outcome.survived} of {outcome.tried} survived; {'; '.join(outcome.notes)}")
        for failure in outcome.failures:
            work.say(f"{name}: DID NOT SURVIVE: {failure}")
    return found


if __name__ == "__main__":
    sys.exit(main())
