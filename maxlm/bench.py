"""What a run's train step costs, without its data: measured on the devices at hand, or compiled for a TPU slice."""

import contextlib
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from maxlm import buffers, flops, hlo, hosts, units
from maxlm.buffer_parts import by_part
from maxlm.config import Config
from maxlm.cost import cost_of, top_operations, words
from maxlm.ending import bytes_per_device, hbm_peak_bytes
from maxlm.hardware import detect
from maxlm.loss import Batch
from maxlm.mesh import axis_sizes, check_fit, choose_devices, make_mesh, mesh_text, start_devices
from maxlm.step import Program, State, build_program
from maxlm.stop import process_age_s
from maxlm.topology import topology_devices

PROFILED_STEPS = 3
SMALL = 0.001
"""Share of the memory below which a part is not shown."""
LISTED = 5
"""Buffers that are named of a step that does not fit."""
AROUND = {"while", "conditional", "call"}
"""Operations whose time is that of others."""


def bench_compiled(config: Config, topology: str, top: int, hlo_file: str | None = None) -> dict[str, Any]:
    """Figures of the step as the TPU compiler makes it, for a slice that need not be there.

    Args:
        config: the run; its mesh must fit the slice.
        topology: TPU slice such as v5e:4x4, as jax names it.
        top: costliest places of the model to name, and largest buffers.
        hlo_file: where the text of the compiled program goes.

    Returns:
        JSON: of cost.cost_of, with compile_s, tokens_per_s_per_device, mfu (both by estimated cycles), places,
        arguments (their bytes by part), and buffer_parts.by_part of what lies beside them when that is most.

    Raises:
        ConfigError: the config does not fit the slice, or the TPU compiler is missing.
    """
    devices = topology_devices(topology, config.mesh.slices)
    program, compiled, result = _compiled(config, devices)
    tokens, text = config.train.tokens_per_step / program.mesh.size, compiled.as_text()
    if hlo_file is not None:
        Path(hlo_file).write_text(text)
    if result["step_time_s"]:
        result["tokens_per_s_per_device"] = tokens / result["step_time_s"]
        result["mfu"] = result["share_of_roofline"]
    priced = [(op.source, float(op.cycles * op.times)) for op in hlo.operations(text) if op.cycles]
    if result["kernel_cycles"]:
        priced.append(("kernels", result["kernel_cycles"]))
    names = {"params": "weights", "opt": "optimizer"}
    arguments = {names.get(key, key): bytes_per_device(tree) for key, tree in program.state_shapes.items()}
    arguments["batch"] = bytes_per_device(program.batch_shapes)
    return {
        "topology": topology,
        **result,
        "places": top_operations(priced, top),
        "arguments": arguments,
        **by_part(buffers.at_peak(text), program, top),
    }


def bench_measured(config: Config, warmup: int, steps: int, profile: str | None, top: int) -> dict[str, Any]:
    """Figures of the step on the devices at hand, on random tokens. Raises as trainer.train does.

    Args:
        config: the run.
        warmup: steps that are not counted, at least 1.
        steps: steps that are.
        profile: folder for a profiler trace of a few more steps; None makes none.
        top: costliest places of the model to name, of the profile.

    Returns:
        JSON: of cost.cost_of, with import_s (of Python and all modules), trace_s, compile_s, init_s (with its own
        compilation), first_step_s (all of it, from the start of the process), step_time_s (the median), step_times_s,
        tokens_per_s_per_device, mfu (None where the peak is unknown), peak_bytes (what the
        device says, None where it does not), and places where profiled.
    """
    import_s = process_age_s()
    config, devices = choose_devices(config, start_devices(config.mesh))
    with hosts.end_together():
        program, compiled, result = _compiled(config, devices)
        with jax.set_mesh(program.mesh), _told_of_memory(devices[0]):
            return {**result, "import_s": import_s, **_measured(program, compiled, warmup, steps, profile, top)}


def _compiled(config: Config, devices: list[Any]) -> tuple[Program, Any, dict[str, Any]]:
    sizes = axis_sizes(config.mesh, len(devices))
    check_fit(config, sizes)
    program = build_program(config, make_mesh(config.mesh, devices))
    started = time.perf_counter()
    lowered = program.lower_step()
    lowered_at = time.perf_counter()
    with _told_of_memory(devices[0]):
        compiled = lowered.compile()
    facts = {
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "mesh": sizes,
        "params": flops.num_params(config.model)["total_unpadded"],
        "tokens_per_step": config.train.tokens_per_step,
        "state_bytes": bytes_per_device(program.state_shapes),
        "trace_s": lowered_at - started,
        "compile_s": time.perf_counter() - lowered_at,
    }
    return program, compiled, {**facts, **cost_of(program, compiled)}


class NoRoomError(RuntimeError):
    """A step that does not fit into a device's memory."""


@contextlib.contextmanager
def _told_of_memory(device: Any) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text or "Vmem" in text:  # Vmem: of the core, which a kernel or option asks for
            raise RuntimeError(f"{device.device_kind}: {text[:300]}") from error
        raise NoRoomError(f"the step does not fit on {device.device_kind}: {without_room(text)}") from error


def without_room(text: str) -> str:
    """What a compiler says of a step that does not fit: how much is over, and its largest buffers where it lists them.

    Args:
        text: its message, in one line.
    """
    head = text.removeprefix("RESOURCE_EXHAUSTED: ").partition(" Total hbm usage")[0][:200].rstrip(". ")
    if sizes := re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", head):
        head += f", by {float(sizes[1]) - float(sizes[2]):.1f}G"
    entry = (
        r'\d\. Size: (\S+)(?: Operator: (?:(?! Size: ).)*?op_name="([^"]*)")?(?:(?! Size: ).)*? Shape: (\w+\[[\d,]*\])'
    )
    listed = re.findall(entry, text)
    largest = ", ".join(f"{size} {array} {words(source) or 'other'}" for size, source, array in listed[:LISTED])
    return f"{head}; its largest buffers are {largest}" if listed else head


def _measured(
    program: Program, compiled: Any, warmup: int, steps: int, profile: str | None, top: int
) -> dict[str, Any]:
    config, started = program.config, time.perf_counter()
    state = jax.block_until_ready(program.init(jax.random.key(config.train.seed)))
    init_s = time.perf_counter() - started
    batch, times, first_step_s, metrics = random_batch(program), [], None, {}
    for _ in range(max(1, warmup) + steps):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - started)
        first_step_s = first_step_s or process_age_s()
    median, chip = statistics.median(times[-steps:]), detect(program.mesh.devices.flat[0])
    tokens_per_s, peak = config.train.tokens_per_step / median, chip.peak(config.model.dtype) if chip else None
    per_token = program.flops_per_token
    result = {
        "init_s": init_s,
        "first_step_s": first_step_s,
        "step_time_s": median,
        "step_times_s": times[-steps:],
        "loss": float(metrics["loss"]),  # of random tokens: about log(vocab_size)
        "tokens_per_s_per_device": tokens_per_s / program.mesh.size,
        "mfu": flops.mfu(tokens_per_s, per_token, peak * program.mesh.size) if peak else None,
        "peak_bytes": hbm_peak_bytes(program.mesh.local_devices),
    }
    if profile is not None:
        result["places"] = top_operations(_profiled(compiled, state, batch, profile), top)
    return result


def random_batch(program: Program) -> Batch:
    """A global batch of random tokens, one document per row, made on the devices."""
    shapes, vocab = program.batch_shapes, program.config.model.vocab_size
    shape = shapes["tokens"].shape

    def make(key: jax.Array) -> Batch:
        tokens = jax.random.randint(key, (*shape[:2], shape[2] + 1), 0, vocab)
        places = jnp.broadcast_to(jnp.arange(shape[2], dtype=jnp.int32), shape)
        ones = {"segments": jnp.ones(shape, jnp.int32), "mask": jnp.ones(shape)}
        return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "positions": places, **ones}

    places = {name: NamedSharding(program.mesh, program.batch_sharding.spec) for name in shapes}
    return jax.jit(jax.sharding.auto_axes(make, out_sharding=program.batch_sharding.spec), out_shardings=places)(
        jax.random.key(program.config.train.seed)
    )


def _profiled(compiled: Any, state: State, batch: Batch, folder: str) -> list[tuple[str, float]]:
    """Sources and seconds per step of the operations in a trace."""
    with jax.profiler.trace(folder):
        for _ in range(PROFILED_STEPS):
            state, _ = jax.block_until_ready(compiled(state, batch))
    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise RuntimeError(f"the profiler has written no trace into {folder}")
    sources = hlo.sources(compiled.as_text())
    found = [(name, seconds) for name, seconds in _events(newest) if name in sources]
    return [
        (sources[name], seconds / PROFILED_STEPS) for name, seconds in found if name.partition(".")[0] not in AROUND
    ]


def _events(trace: Path) -> Iterator[tuple[str, float]]:
    """Names and seconds of what ran on the first device, on the CPU of everything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's: where it is an error, the process aborts
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
        on_devices = [plane for plane in planes if plane.name.startswith(("/device:TPU", "/device:GPU"))]
        for plane in on_devices[:1] or planes:
            for line in plane.lines:
                for event in line.events:
                    # GPU kernels have names of their own, and say whose they are
                    name = str(dict(event.stats).get("hlo_op") or event.name)
                    yield name.removeprefix("%").partition(" ")[0], event.duration_ns * 1e-9


def show(result: dict[str, Any]) -> str:
    """The figures as text for people."""
    lines = [
        f"{units.count(result['params'])} parameters on {result['num_devices']} x {result['device_kind']}, mesh "
        f"{mesh_text(result['mesh'])}, {units.count(result['tokens_per_step'])} tokens a step"
    ]
    add = lambda name, text: lines.append(f"  {name:12} {text}")  # noqa: E731
    if result["step_time_s"]:
        times = result.get("step_times_s")
        how = (
            f"median of {len(times)}, {units.duration(min(times))} to {units.duration(max(times))}"
            if times
            else (
                f"{result['cycles'] / 1e6:,.0f} M cycles, the compiler's estimate; waiting for other chips not counted"
            )
        )
        add("step", f"{units.duration(result['step_time_s'])} ({how})")
        mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] is not None else ""
        add("speed", f"{units.count(result['tokens_per_s_per_device'])} tokens/s/device{mfu}")
    run = result["matmul_flops"] and f", {units.count(result['matmul_flops'] + result['kernel_flops'])} run"
    add("FLOPs", f"{units.count(result['model_flops'])} of the model{run or ''}")
    whole = f" of {units.size(result['hbm_bytes'])}" if result["hbm_bytes"] else ""
    total = result["arguments_bytes"] + result["heap_bytes"]
    measured = f"; the device says {units.size(result['peak_bytes'])} at most" if result.get("peak_bytes") else ""
    host = f", on the host {units.size(result['host_bytes'])}" if result["host_bytes"] else ""
    add(
        "memory",
        f"{units.size(total)}{whole}: state and batch {units.size(result['arguments_bytes'])}, at work "
        f"{units.size(result['heap_bytes'])}{host}{measured}",
    )
    if "arguments" in result:
        parts = sorted(result["arguments"].items(), key=lambda item: -item[1])
        add("state", ", ".join(f"{name} {units.size(size)}" for name, size in parts))
        parts = [(name, size) for name, size in result["buffers_by_part"].items() if size >= SMALL * total]
        add("at work", ", ".join(f"{name} {units.size(size)}" for name, size in parts))
    for row in result.get("buffers", ()):
        add("at work", f"{units.size(row['bytes']):>9}  {row['count']} x {row['array']}, {row['place']}")
    parts = [("import_s", "imports"), ("init_s", "weights"), ("trace_s", "tracing"), ("compile_s", "compiling")]
    starts = ", ".join(f"{name} {units.duration(result[key])}" for key, name in parts if key in result)
    whole = f"{units.duration(result['first_step_s'])} to the first step: " if "first_step_s" in result else ""
    add("start", whole + starts)
    for row in result["collectives"]:
        add(row["kind"], f"{row['times']} x over {row['axes']}, {units.size(row['bytes'])} {row['dtype']}")
    for row in result.get("places", ()):
        lines.append(f"  {row['share']:6.1%}  {row['place']}")
    return "\n".join(lines)


def fits(result: dict[str, Any]) -> bool:
    """Whether the step's memory is there, as far as is known."""
    return result["hbm_bytes"] is None or result["arguments_bytes"] + result["heap_bytes"] <= result["hbm_bytes"]


def check_room(result: dict[str, Any]) -> None:
    """Raises NoRoomError where fits says no."""
    if not fits(result):
        over = result["arguments_bytes"] + result["heap_bytes"] - result["hbm_bytes"]
        raise NoRoomError(
            f"the step does not fit on {result['device_kind']}: {units.size(over)} more than its "
            f"{units.size(result['hbm_bytes'])}"
        )


@contextlib.contextmanager
def trace_folder(wanted: str | None, profile: bool) -> Iterator[str | None]:
    """A folder for a trace: the one wanted, else one that goes away."""
    if not profile:
        yield None
    elif wanted:
        Path(wanted).mkdir(parents=True, exist_ok=True)  # now, and not after all has been measured
        yield wanted
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
