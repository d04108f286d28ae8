"""The same step in bf16, int8 and fp8, side by side."""

from collections.abc import Callable
from typing import Any

from maxlm import bench, units
from maxlm.config import Config
from maxlm.config_quant import QuantConfig
from maxlm.hardware import find
from maxlm.mesh import mesh_text
from maxlm.quant_rules import advice

KINDS = ("bf16", "int8", "fp8")


def bench_kinds(config: Config, figures: Callable[[Config], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of the step with products in each type; rules of the config stay, but for bf16.

    Types that the chip is known not to multiply natively are left out.

    Args:
        config: the run.
        figures: measures or compiles a run, as bench.bench_measured or bench.bench_compiled.

    Returns:
        That JSON of each type.
    """
    results: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        chip = find(results["bf16"]["device_kind"]) if results else None
        if chip and (chip.int8_ops if kind == "int8" else chip.fp8_flops) is None:
            continue
        quant = QuantConfig() if kind == "bf16" else config.quant.model_copy(update={"mode": kind})
        results[kind] = figures(config.model_copy(update={"quant": quant}))
    return results


def check_fit(results: dict[str, dict[str, Any]]) -> None:
    """Raises RuntimeError where a type's step does not fit into memory."""
    if misfits := [kind for kind, result in results.items() if not bench.fits(result)]:
        raise RuntimeError(f"the step does not fit into the memory of the device in {' and '.join(misfits)}")


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
