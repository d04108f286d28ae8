"""`maxlm plan` and `maxlm compile`: what a run will take, before it is paid for."""

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from typing import Any

from maxlm import storage, units
from maxlm.commands import add_command
from maxlm.config_file import ConfigError, load_config, to_yaml

COMPILED = 2
"""Plans for each machine, unless the user says otherwise."""
PLAN_EXAMPLES = """examples:
  maxlm plan configs/llama3_8b.yaml --on v6e-256 --on v5p-128 --tokens 1T
  maxlm plan configs/1b.yaml --on v5e-16 --compile 0            by formulas alone, in seconds
  maxlm plan configs/llama3_70b.yaml --on 4xv5p-512 --deadline 30d --budget 5e6 --prices mine.csv
  maxlm plan configs/1b.yaml --on v5e-16 --write planned.yaml   then: maxlm train planned.yaml
  maxlm plan configs/1b.yaml --on v5e-16 --budget 5000 --scaling runs/small-*    what loss that buys

The mesh, the microbatches and the remat policy are searched; model and batch stay as the config says and, without
--numerics, the types of optimizer state and products. The best are compiled by the real TPU compiler (pip install
'maxlm[plan]'), which runs on this machine's CPU: a minute or more each. GPUs are planned by formulas alone. Ranges:
what the figures say, and how much longer it may take by what they rest on. Names: v5p-128 (64 chips: cores are
counted), v6e-256, v5p:4x4x4, h100:8, 4xv5p-512 (four slices).

  maxlm plan --calibrate runs/a runs/b                          what runs have measured, for all later plans

fits the formulas to finished runs, for each kind of hardware and type of products: factors go into
~/.config/maxlm/calibration.json, or the file that MAXLM_CALIBRATION names."""
COMPILE_EXAMPLES = """examples:
  maxlm compile configs/1b.yaml --on v5e-16
  maxlm compile configs/llama3_8b.yaml --on v6e:4x4 --hlo step.txt train.remat=dots
  maxlm compile configs/llama3_8b.yaml --on v5p:4x4x4 --quant

Memory by part, cycles (the compiler's estimate), collectives with their bytes and how often they run, the costliest
places of the model. Exit code 1 if the step does not fit into the chip's memory. What runs here: maxlm bench."""


def add_parser(subparsers: Any) -> None:
    """Adds `plan` and `compile`; each sets `run`."""
    plan = add_command(
        subparsers, "plan", _plan, "which mesh, how long, and what it costs, before it is paid", PLAN_EXAMPLES
    )
    compiled = add_command(
        subparsers, "compile", _compile, "compile the step for a TPU slice that is not there", COMPILE_EXAMPLES
    )
    for command in (plan, compiled):
        count = "?" if command is plan else None
        command.add_argument("config", metavar="CONFIG", nargs=count, help="YAML file, such as configs/1b.yaml")
        command.add_argument("overrides", metavar="section.field=value", nargs="*", help="settings that replace its")
        command.add_argument("--json", action="store_true", help="print JSON, in base units")
    add = plan.add_argument
    add("--on", action="append", metavar="MACHINE", help="a machine; give it again to compare several")
    add("--calibrate", nargs="+", metavar="RUN", help="instead: fit the formulas to runs, for all later plans")
    add("--tokens", metavar="N", help="length of the run, such as 1T (that of the config)")
    add("--deadline", metavar="TIME", help="leave out what takes longer, such as 10d")
    add("--budget", metavar="USD", help="leave out what costs more; with --scaling: forecast the loss that it buys")
    add("--top", type=int, default=3, metavar="N", help="plans to show for each machine (3)")
    add(
        "--compile", type=int, default=COMPILED, metavar="N", help=f"plans to compile for each TPU machine ({COMPILED})"
    )
    add(
        "--numerics",
        nargs="?",
        const="state_dtype,quant",
        metavar="NAMES",
        help="also choose the type of the optimizer's state and of products: state_dtype, quant or both (both)",
    )
    add("--what-if", action="store_true", help="also price int8 products, smaller models and the like, by formulas")
    add("--law", default="chinchilla", metavar="NAME", help="that tells their losses (chinchilla); see `maxlm scaling`")
    add("--scaling", nargs="+", metavar="RUN", help="fit the law to these runs, and forecast the loss of this one")
    add("--kept-tokens", type=float, metavar="SHARE", help="what deduplication leaves of the data")
    add("--teacher", metavar="CONFIG", help="config of a trained, larger model to prune and distil")
    add("--distilled-tokens", type=float, metavar="SHARE", help="of the tokens that distillation takes; goes with it")
    add("--write", metavar="FILE", help="write the config of the first plan")
    add("--prices", metavar="FILE", help="CSV file of your prices (columns: chip, provider, region, kind, ...)")
    add("--price-kind", default="on-demand", metavar="KIND", help="on-demand, spot, reserved or flex-start (on-demand)")
    add("--provider", metavar="NAME", help="who sells the chips (the cheapest)")
    add("--goodput", type=float, default=1.0, metavar="SHARE", help="of the time, see `maxlm goodput` (1)")
    add("--pue", type=float, default=1.0, metavar="X", help="power of the building per power of the chips (1)")
    add("--grid-gco2-per-kwh", type=float, metavar="G", help="emissions of the grid (unknown)")
    compiled.add_argument("--on", required=True, metavar="MACHINE", help="v5e-16, or as jax names it: v5e:4x4")
    compiled.add_argument("--hlo", metavar="FILE", help="write the compiled program's text")
    compiled.add_argument("--top", type=int, default=10, metavar="N", help="costliest places and buffers to name (10)")
    compiled.add_argument("--quant", action="store_true", help="compare products in bf16, int8 and fp8 (quant.mode)")


def _plan(args: argparse.Namespace) -> int:
    if args.calibrate:
        if args.config or args.on:
            raise ConfigError("--calibrate takes runs alone, neither CONFIG nor --on; plan with them afterwards")
        return _calibrate(args)
    started = time.monotonic()
    _check(args)
    deadline_s = None if args.deadline is None else _read(units.seconds, "--deadline", args.deadline)
    budget = None if args.budget is None else _read(units.number, "--budget", args.budget)
    overrides = list(args.overrides)
    if args.tokens is not None:
        tokens = int(_read(units.number, "--tokens", args.tokens))
        overrides += ["train.steps=null", f"train.tokens={tokens}"]
    config = load_config(args.config, overrides)
    for option in ("scaling", "teacher") if config.lora is not None else ():
        if getattr(args, option):
            raise ConfigError(f"--{option} is for models that are trained whole, and this run trains adapters (lora)")
    _on_cpu()
    from maxlm.plan import advice, alternatives, planner, scaling_cli, table
    from maxlm.report.data import plain

    asked, notes = _asked(args, config)
    numerics, ways = _numerics(args), _ways(args, config)
    found = planner.plan_machines(config, asked, args.top, args.compile, _say, numerics)
    rows = planner.ordered(planner.nearest(found.rows, deadline_s, None if args.scaling else budget))
    gains = {where.name: advice.gains(config, where.place, best, numerics) for where, best in found.fastest}
    notes += [table.show_gains(machine, own) for machine, own in gains.items() if own] + found.unfit
    seconds = time.monotonic() - started
    others = alternatives.priced(config, ways, *asked[0])
    bought = _bought(args.scaling, budget, config, rows[0]) if args.scaling else {}
    if args.json:
        result = {"seconds": seconds, "notes": notes, "gains": gains, "plans": [row.as_json() for row in rows]}
        what_if = [alternatives.as_json(row) for row in others]
        print(json.dumps({**result, "what_if": what_if, "scaling": plain(bought) or None}))
    else:
        shown = [table.show(rows), *notes]
        shown += [alternatives.show(others, asked[0][0].name)] if others else []
        shown += [bought["buys"], scaling_cli.show(bought)] if bought else []
        command = f"maxlm train {shlex.join([args.config, *overrides, *rows[0].plan.overrides])}"
        print("\n".join([*shown, f"planned in {units.duration(seconds)}; to run the first:\n  {command}"]))
    if args.write:
        _check_new(args.write)  # it may have come while plans were compiled
        storage.write_bytes(args.write, to_yaml(rows[0].plan.config).encode())  # whole or not at all
    return 0


def _bought(runs: list[str], budget_usd: float | None, config: Any, row: Any) -> dict[str, Any]:
    """A scaling_report of what money buys on a row's machine, or else of the run itself; and `buys`, in words."""
    from maxlm.plan.money import flops_for_usd, run_flops
    from maxlm.plan.scaling import scaling_report

    if budget_usd is None:
        bought, text = run_flops(config), f"the run of this config has {run_flops(config):.3g} FLOPs"
    else:
        most, least = (flops_for_usd(budget_usd, config, figures) for figures in (row.low, row.high))
        if most is None or least is None:
            raise ConfigError(f"--budget: nobody knows what {row.machine} costs; give your price with --prices")
        bought = least
        text = f"{budget_usd:,.0f} USD buy {least:.3g} to {most:.3g} FLOPs on {row.machine}; of the fewer:"
    return {"buys": text, **scaling_report(runs, bought)}


def _asked(args: argparse.Namespace, config: Any) -> tuple[list[Any], list[str]]:
    """Each machine with what it costs (Target, Terms), and what is to be said of its price and its calibration."""
    from maxlm.plan import advice, factors, prices
    from maxlm.plan.money import Terms
    from maxlm.plan.targets import target, taught

    if args.price_kind not in prices.KINDS:
        raise ConfigError(f"--price-kind={args.price_kind} is none of {', '.join(prices.KINDS)}")
    extra = prices.read_prices(args.prices) if args.prices else prices.users_prices()
    asked, notes, known = [], dict[str, None](), factors.read()
    machines = {where.name: where for where in map(target, args.on)}  # v5e-16 and v5litepod-16 are one
    for where in (taught(one, known) for one in machines.values()):
        price = prices.find_price(where.machine.chip or "", args.price_kind, args.provider, extra)
        notes[f"{where.machine.chip}: {price or _no_price(args)}"] = None
        notes |= dict.fromkeys(advice.caveats(config, where))
        if price is not None and (old := prices.stale(price, datetime.date.today())):
            notes[old] = None
        asked.append((where, Terms(price, args.goodput, args.pue, args.grid_gco2_per_kwh)))
    return asked, list(notes)


def _no_price(args: argparse.Namespace) -> str:
    sold = f"{args.price_kind} price{f' of {args.provider}' if args.provider else ''}"
    kept = "; --budget leaves out none of its rows" if args.budget and not args.scaling else ""
    return f"no {sold} is known: give yours with --prices{kept}"


def _numerics(args: argparse.Namespace) -> tuple[str, ...]:
    from maxlm.plan.search import NUMERICS

    names = tuple(filter(None, (args.numerics or "").split(",")))
    if wrong := [name for name in names if name not in NUMERICS]:
        raise ConfigError(f"--numerics {wrong[0]} is none of {', '.join(NUMERICS)}; name one, both, or none for both")
    return names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _calibrate(args: argparse.Namespace) -> int:
    _on_cpu()
    from maxlm.plan import calibrate, factors

    before = factors.read()
    found = calibrate.calibrate(args.calibrate, datetime.date.today())
    for one in found:
        old = before.get(one.hardware, {}).get(one.dtype)
        if old is not None and old.num_runs > one.factors.num_runs:
            _say(
                f"{one.hardware}, {one.dtype}: what {old.num_runs} runs taught on {old.date} is replaced by what "
                f"{one.factors.num_runs} taught; name all of them to keep it"
            )
    if args.json:
        print(json.dumps({"file": factors.file_path(), "fits": [calibrate.as_json(one) for one in found]}))
        return 0
    print("\n\n".join(calibrate.show(one) for one in found))
    print(f"kept in {path}: maxlm plan and maxlm train use it" if (path := factors.file_path()) else "kept nowhere")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What would else be found out after minutes of compiling."""
    if args.config is None or not args.on:
        raise ConfigError("maxlm plan needs CONFIG and --on MACHINE, or --calibrate RUN")
    if args.top < 1 or args.compile < 0:
        raise ConfigError("--top is a count from 1, and --compile one from 0")
    if not (0 < args.goodput <= 1 and 1 <= args.pue < 100 and 0 <= (args.grid_gco2_per_kwh or 0) < 1e5):
        raise ConfigError("--goodput is a share from 0 to 1, --pue a number from 1, and emissions are not negative")
    if args.write:
        _check_new(args.write)
        _check_folder("--write", args.write)


def _check_new(path: str) -> None:
    if os.path.exists(path):
        raise ConfigError(f"--write {path}: it is there already, and is left as it is")


def _check_folder(option: str, path: str) -> None:
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"{option} {path}: it is to be a file, in a folder that is there")


def _ways(args: argparse.Namespace, config: Any) -> list[Any]:
    """The alternatives that --what-if prices; runs and files that are named are read before anything is searched."""
    from maxlm.plan import alternatives, scaling
    from maxlm.plan.laws import PUBLISHED

    shares = {"--kept-tokens": args.kept_tokens, "--distilled-tokens": args.distilled_tokens}
    for option, value in {**shares, "--teacher": args.teacher}.items():
        if value is not None and not args.what_if:
            raise ConfigError(f"{option} is of --what-if; give both")
        if option in shares and value is not None and not 0 < value <= 1:
            raise ConfigError(f"{option}={value} is to be a share above 0 and at most 1")
    if (args.teacher is None) != (args.distilled_tokens is None):
        raise ConfigError("--teacher and --distilled-tokens go together")
    if args.scaling:
        scaling.read_points(args.scaling)
    if not args.what_if:
        return []
    if not args.scaling and args.law not in PUBLISHED:
        raise ConfigError(f"--law={args.law} is none of {', '.join(PUBLISHED)}")
    law = scaling.fitted_law(args.scaling) if args.scaling else PUBLISHED[args.law]
    teacher = None if args.teacher is None else load_config(args.teacher, []).model
    return alternatives.ways(config, law, teacher, args.distilled_tokens, args.kept_tokens)


def _compile(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ConfigError("--top is a count from 1")
    if args.quant and args.hlo:
        raise ConfigError("--quant compares several programs; for the text of one set quant.mode and leave out --quant")
    if args.hlo:
        _check_folder("--hlo", args.hlo)
    config = load_config(args.config, args.overrides)
    _on_cpu()
    from maxlm import bench, bench_quant
    from maxlm.mesh import axis_sizes
    from maxlm.plan import advice
    from maxlm.plan.memory import predict_memory
    from maxlm.plan.targets import target

    where = target(args.on)
    topology = where.topology
    if topology is None:
        raise ConfigError(f"--on {args.on}: there is a compiler for TPUs alone")
    if where.place.num_slices != config.mesh.slices:
        raise ConfigError(f"--on {args.on}: the config has mesh.slices={config.mesh.slices}; make them the same")
    if args.quant:
        results = bench_quant.bench_kinds(config, lambda own: bench.bench_compiled(own, topology, args.top))
        print(json.dumps(results) if args.json else bench_quant.show(results))
        bench_quant.check_fit(results)
        return 0
    try:
        result = bench.bench_compiled(config, topology, args.top, args.hlo)
        print(json.dumps(result) if args.json else bench.show(result))
        bench.check_room(result)
    except bench.NoRoomError as error:
        memory = predict_memory(config, axis_sizes(config.mesh, where.place.num_devices))
        raise RuntimeError(f"{error}; by formulas it needs, in GiB: {advice.uses(memory)}") from error
    return 0


def _read(parse: Any, option: str, text: str) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _on_cpu() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs, and accelerators may be busy
