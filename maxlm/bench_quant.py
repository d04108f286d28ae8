"""The same step in bf16, int8 and fp8, side by side."""

from typing import Any

from maxlm import bench, units
from maxlm.config import Config
from maxlm.config_quant import QuantConfig
from maxlm.hardware import find
from maxlm.mesh import mesh_text
from maxlm.quant_rules import advice

KINDS = ("bf16", "int8", "fp8")


def bench_kinds(config: Config, on: str | None, warmup: int, steps: int, top: int) -> dict[str, dict[str, Any]]:
    """Figures of the step with products in each type; rules of the config stay, but for bf16.

    Types that the chip is known not to multiply natively are left out.

    Args:
        config: the run.
        on: TPU slice for which it is compiled; None measures here.
        warmup: steps that are not counted.
        steps: steps that are.
        top: costliest places of the model to name.

    Returns:
        bench.bench_compiled's or bench.bench_measured's JSON of each type.
    """
    results: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        chip = find(results["bf16"]["device_kind"]) if results else None
        if chip and (chip.int8_ops if kind == "int8" else chip.fp8_flops) is None:
            continue
        quant = QuantConfig() if kind == "bf16" else config.quant.model_copy(update={"mode": kind})
        own = config.model_copy(update={"quant": quant})
        if on is not None:
            results[kind] = bench.bench_compiled(own, on, top)
        else:
            results[kind] = bench.bench_measured(own, warmup, steps, None, top)
    return results


def gathered_bytes(result: dict[str, Any]) -> int:
    """Bytes of whole arrays that a device gathers over fsdp in a step: weights."""
    gathers = [row for row in result["collectives"] if row["kind"] == "all-gather" and row["axes"] == "fsdp"]
    return sum(row["bytes"] for row in gathers)


def show(results: dict[str, dict[str, Any]]) -> str:
    """The figures as a table for people."""
    plain = results["bf16"]
    measured = "loss" in plain
    cost = (lambda r: r["step_time_s"]) if measured or plain["cycles"] is None else (lambda r: r["cycles"])
    head = f"{'products':10}{'step':>16}{'of bf16':>10}{'at work':>12}{'gathered':>12}" + (
        f"{'loss':>10}" if measured else ""
    )
    lines = [f"{plain['num_devices']} x {plain['device_kind']}, {mesh_text(plain['mesh'])}", head]
    for kind, result in results.items():
        step = units.duration(result["step_time_s"]) if measured else f"{result['cycles'] / 1e6:,.0f} M cycles"
        line = f"{kind:10}{step:>16}{cost(result) / cost(plain):>10.2f}{units.size(result['heap_bytes']):>12}"
        line += f"{units.size(gathered_bytes(result)):>12}"
        lines.append(line + (f"{result['loss']:>10.4f}" if measured else ""))
    chip = find(plain["device_kind"])
    lines += filter(None, (advice(QuantConfig(mode=kind), chip) for kind in ("int8", "fp8")))
    if measured:
        lines.append("loss: after all steps, of random tokens that are the same in each")
    else:
        lines.append("cycles: the compiler's estimates; at work: memory besides state and batch")
    return "\n".join(lines)
