"""The command line: thin, one function per command. Errors a user can mend end in one sentence and exit code 2."""

import argparse
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from maxlm import heartbeat, places

PARTS = {
    "data": "data.cli",
    "checkpoint": "checkpoint_cli",
    "convert": "convert.cli",
    "generate": "infer.cli",
    "eval": "evaluate.cli",
    "supervise": "supervise",
    "plan": "plan.cli",
    "scaling": "plan.scaling_cli",
    "goodput": "plan.failures_cli",
    "launch": "launch.cli",
}
"""Commands that other files add, and where those are."""
EPILOG = """examples:
  maxlm train configs/quickstart.yaml                     train, or continue where it stopped
  maxlm train configs/quickstart.yaml train.steps=400     the same run, longer
  maxlm config configs/quickstart.yaml mesh.tensor=2      what would run
  maxlm data build docs/ --out stores/docs                text to a token store
  maxlm compile configs/1b.yaml --on v5e-8                what a step costs on eight TPUs
  maxlm doctor configs/quickstart.yaml                    is this machine fit for it
  maxlm report runs/a runs/b                              compare two runs
  maxlm supervise -- train configs/1b.yaml                start again after crashes and hangs
  maxlm checkpoint verify runs/a                          are its checkpoints what was saved
  maxlm convert from-hf Llama-3.1-8B models/llama         a Hugging Face folder to a checkpoint; to-hf goes back
  maxlm generate models/llama "Once upon a time"          continue a text
  maxlm eval perplexity runs/a --text book.txt            how well a model predicts a text
  maxlm goodput --slices 40 --chips-per-slice 256 --work 60d --chip-mtbf 5.8y   what failures leave of a long run
  maxlm scaling runs/small-* --budget-flops 1e21          what small runs say of a large one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 failed on the way, 2 asked for wrongly, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv[0] if argv else "")
    args, others = parser.parse_known_args(argv)
    if hasattr(args, "prompts"):  # texts that stand behind an option
        args.prompts += [other for other in others if not other.startswith("-")]
        others = [other for other in others if other.startswith("-")]
    if others and (not hasattr(args, "overrides") or any(o.startswith("-") or "=" not in o for o in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:  # settings that stand behind an option
        args.overrides += others
    try:
        return args.run(args)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        # Ours, and what the system says of files, are sentences for the user; anything else is a bug and shows where.
        if not isinstance(error, OSError) and not _is_ours(error):
            raise
        asked_wrongly = isinstance(error, ValueError | FileNotFoundError) and not isinstance(error, FloatingPointError)
        return _fail(error, 2 if asked_wrongly else 1)


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by maxlm itself and not inside a library."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return os.path.dirname(os.path.abspath(__file__)) in os.path.abspath(last.filename)


def _parser(command: str = "") -> argparse.ArgumentParser:
    """Of all commands, or of less, as long as it is enough for `command`: others take long to import."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="maxlm", description="Trains large language models in JAX.", epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train",
        help="train a run, or continue it",
        description="Trains the run that CONFIG describes; given again, continues it from its newest checkpoint. "
        "Ctrl-C saves and stops; a second Ctrl-C stops at once.",
        epilog="`maxlm config --fields` lists all fields.",
    )
    _add_config(train)
    train.set_defaults(run=_train)

    config = commands.add_parser(
        "config", help="show what a config resolves to", description="Prints the resolved configuration as YAML."
    )
    config.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    config.add_argument("overrides", metavar="section.field=value", nargs="*", help="settings that replace the file's")
    config.add_argument("--fields", action="store_true", help="list every field with type, default and meaning")
    config.add_argument("--json", action="store_true", help="print JSON")
    config.set_defaults(run=_config)

    report = commands.add_parser(
        "report",
        help="draw a run, or compare several",
        description="Writes report.html and loss.png, into the run's folder or into --out, and prints the figures.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folder or bucket")
    report.add_argument("--out", metavar="FOLDER", help="where the report goes (default: RUN; for several, here)")
    report.add_argument("--json", action="store_true", help="print the figures as JSON and draw nothing")
    report.set_defaults(run=_report)

    doctor = commands.add_parser(
        "doctor",
        help="check versions, devices, the mesh's collectives and disks",
        description="Prints what this machine is and whether a run's devices, mesh and folders work, for a bug report. "
        "Of many hosts all run it, and the first prints. Without CONFIG: all devices on one axis. "
        "Exit code 1 if a check failed.",
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the run to check for")
    doctor.add_argument("overrides", metavar="section.field=value", nargs="*", help="settings that replace the file's")
    doctor.add_argument("--json", action="store_true", help="print JSON, with everything that is known")
    doctor.set_defaults(run=_doctor)

    _add_bench(commands)
    for part in [command] if command in PARTS else PARTS:
        importlib.import_module(f"maxlm.{PARTS[part]}").add_parser(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="what a train step costs here",
        description="Runs the train step that CONFIG describes on random tokens and prints time, speed, memory and "
        "what it sends. Exit code 1 if it does not fit into the device's memory. For TPUs that are not there: "
        "maxlm compile.",
        epilog="examples:\n  maxlm bench configs/quickstart.yaml\n  maxlm bench configs/1b.yaml --profile --top 20\n"
        "  maxlm bench configs/1b.yaml --quant",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(bench)
    bench.add_argument("--steps", type=int, default=10, metavar="N", help="steps that are timed (10)")
    bench.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them (3)")
    bench.add_argument("--profile", action="store_true", help="also trace a few steps, to name the costliest places")
    bench.add_argument("--trace", metavar="FOLDER", help="keep that trace here (TensorBoard and xprof read it)")
    bench.add_argument("--top", type=int, default=10, metavar="N", help="how many of those places (10)")
    bench.add_argument("--quant", action="store_true", help="compare products in bf16, int8 and fp8 (quant.mode)")
    bench.add_argument("--json", action="store_true", help="print one line of JSON")
    bench.set_defaults(run=_bench)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", metavar="section.field=value", nargs="*", help="settings that replace the file's")


def _train(args: argparse.Namespace) -> int:
    heartbeat.dump_on_request()
    from maxlm.config_file import load_config

    config = load_config(args.config, args.overrides)
    from maxlm.data.loader import READER
    from maxlm.trainer import train  # JAX starts here, after the config is known to be right

    for name in ("absl", "asyncio"):  # Orbax logs whole tracebacks of the errors that it raises as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # Orbax, when a save fails
    result = train(config)
    if result.status == "stopped":
        heartbeat.beat(heartbeat.STOPPED, result.step)
    if any(thread.name.startswith(READER) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(0)  # stopped while a read hung: Python would wait for its thread
    if not result.primary:
        return 0
    longer = _again(args, [f"train.steps={2 * result.step}"], ("train.steps", "train.tokens"))
    if result.status == "already complete":
        figures = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in result.final.items())
        print(
            f"{result.run_dir} is complete: {result.step} steps" + (f" ({figures})" if figures else "") + ".\n"
            f"  go on:       {longer}\n"
            f"  look at it:  {_me()} report {shlex.quote(result.run_dir)}\n"
            f"  start anew:  {_again(args, ['run.name=NAME'], ('run.name',))}"
        )
    elif result.status == "complete":
        print(f"continue with more steps: {longer}")
    return 0


def _again(args: argparse.Namespace, settings: list[str], replaced: tuple[str, ...]) -> str:
    """The command of this run with other settings."""
    kept = [o for o in args.overrides if o.partition("=")[0] not in replaced]
    return f"{_me()} train {shlex.join([args.config, *kept, *settings])}"


def _me() -> str:
    """How this program was called."""
    if sys.argv[0].endswith(".py"):
        return "python -m maxlm"
    return "maxlm" if shutil.which("maxlm") else os.path.relpath(sys.argv[0])


def _config(args: argparse.Namespace) -> int:
    from maxlm.config_file import ConfigError, describe_fields, load_config, to_yaml

    if args.fields:
        rows = [dict(zip(("field", "type", "default", "meaning"), row, strict=True)) for row in describe_fields()]
        if args.json:
            print(json.dumps(rows, indent=1))
        else:
            for row in rows:
                print(f"{row['field']}: {row['type']} = {row['default']}\n    {row['meaning']}")
        return 0
    if args.config is None:
        raise ConfigError("name a config file, such as configs/quickstart.yaml, or give --fields")
    config = load_config(args.config, args.overrides)
    print(json.dumps(config.model_dump(mode="json"), indent=1) if args.json else to_yaml(config), end="")
    return 0


def _report(args: argparse.Namespace) -> int:
    from maxlm import report

    if args.json:
        print(json.dumps(report.report_data(args.runs), indent=1))
        return 0
    for run in args.runs:
        print(report.text_summary(run), end="\n\n")
    for path in report.write_report(args.runs, args.out):
        print(path)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from maxlm.config_file import ConfigError, load_config

    if args.steps < 1 or args.warmup < 1 or args.top < 1:
        raise ConfigError("--steps, --warmup and --top are counts from 1")
    if args.quant and (args.profile or args.trace):
        raise ConfigError("--quant compares; to trace one of them, set quant.mode and leave out --quant")
    config = load_config(args.config, args.overrides)
    from maxlm import bench, hosts

    if args.quant:
        from maxlm import bench_quant

        measure = lambda own: bench.bench_measured(own, args.warmup, args.steps, None, args.top)  # noqa: E731
        results = bench_quant.bench_kinds(config, measure)
        if hosts.is_first():
            print(json.dumps(results) if args.json else bench_quant.show(results))
        bench_quant.check_fit(results)
        return 0
    with bench.trace_folder(args.trace, args.profile or args.trace is not None) as folder:
        result = bench.bench_measured(config, args.warmup, args.steps, folder, args.top)
    if hosts.is_first():
        print(json.dumps(result) if args.json else bench.show(result))
    bench.check_room(result)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from maxlm.config_file import load_config

    config = load_config(args.config, args.overrides) if args.config else None
    from maxlm.doctor import doctor

    return doctor(config, as_json=args.json)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {places.redacted(str(error))}", file=sys.stderr)
    return code
