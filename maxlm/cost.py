"""What a compiled step costs, as the compiler says: memory, FLOPs, cycles, collectives, and its costliest operations.

Cycles are estimates of the TPU compiler, summed through loops. Pallas kernels carry none. Those of attention are taken
from their schedules (kernels/splash_blocks.py) where the chip was measured; other kernels' FLOPs are counted from the
model and charged at the matmul peak.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

from maxlm import flops, hlo
from maxlm.config import Config
from maxlm.hardware import detect
from maxlm.kernels import splash_blocks
from maxlm.kernels.splash_blocks import Mask
from maxlm.step import Program

# words of JAX's transformations in an operation's name; what is left are the model's
_MACHINERY = re.compile(
    r"jit|_step|pjit|jvp|transpose|vmap|while|body|cond|scan|closed_call|checkpoint|rematted_computation|shard_map|"
    r"custom_vjp_call|custom_jvp_call|branch_\d+_fun|remat\d*|core_call"
)


def cost_of(program: Program, compiled: Any) -> dict[str, Any]:
    """Figures of a compiled train step, per device and step, as JSON.

    Args:
        program: what was compiled.
        compiled: program.lower_step().compile().

    Returns:
        Bytes: arguments_bytes (state and batch), heap_bytes (peak without them), host_bytes (on the host), hbm_bytes
        (of the chip, None where unknown). Work: matmul_flops (of the program, without kernels; None on a GPU, where
        they are library calls), model_flops (Program.flops_per_token), kernel_flops (attention and experts in
        Pallas kernels, counted from the model). TPU only, else None: cycles (estimated), kernel_cycles (the part of
        kernels), step_time_s (those cycles), roofline_cycles (model_flops at the peak), share_of_roofline.
        collectives: dicts of kind, axes, dtype, times and bytes.
    """
    memory, text, config = compiled.memory_analysis(), compiled.as_text(), program.config
    chip, num_devices = detect(program.mesh.devices.flat[0]), program.mesh.size
    tokens = config.train.tokens_per_step / num_devices
    model_flops = program.flops_per_token * tokens
    found = hlo.operations(text)
    kernels = [op for op in found if op.cycles is None]
    shape = program.mesh.shape
    attention_flops = _attention_flops(config, shape) if any("splash" in op.source for op in kernels) else 0.0
    expert_flops = _expert_flops(config, shape) if any("splash" not in op.source for op in kernels) else 0.0
    arguments, heap = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    if found:  # of a TPU: temporaries that overlap count once in the peak, which is of the host's memory too
        heap = memory.peak_memory_in_bytes - arguments - memory.host_argument_size_in_bytes
    result: dict[str, Any] = {
        "arguments_bytes": arguments,
        "heap_bytes": heap,
        "host_bytes": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "hbm_bytes": chip.hbm_bytes if chip else None,
        "matmul_flops": None if program.mesh.devices.flat[0].platform == "gpu" else hlo.matmul_flops(text),
        "model_flops": model_flops,
        "kernel_flops": attention_flops + expert_flops,
        "kernel_cycles": None,
        "cycles": None,
        "step_time_s": None,
        "roofline_cycles": None,
        "share_of_roofline": None,
        "collectives": _collectives(program, text),
    }
    if chip and chip.flops_per_cycle and found:
        per_cycle = chip.flops_per_cycle
        attention = attention_cycles(config, shape, chip.name) if attention_flops else 0.0
        attention = attention_flops / per_cycle if attention is None else attention
        result["kernel_cycles"] = attention + expert_flops / per_cycle
        cycles = sum(op.cycles * op.times for op in found if op.cycles) + result["kernel_cycles"]
        result["cycles"], result["step_time_s"] = cycles, cycles * per_cycle / chip.bf16_flops
        result["roofline_cycles"] = model_flops / per_cycle
        result["share_of_roofline"] = model_flops / per_cycle / cycles
    return result


def words(source: str) -> str:
    """An operation's place in the words of the model, and its pass, of an op_name: "mlp BTD,DF->BTF (backward)"."""
    parts = re.findall(r"[^/()]+", source.partition(":")[0])  # of several that were fused, the first
    kept = [part for part in parts if not _MACHINERY.fullmatch(part)]
    if len(kept) > 1 and "->" in kept[-2]:
        kept.pop()  # the primitive of an einsum
    kept = [word for i, word in enumerate(kept) if i == 0 or word != kept[i - 1]]
    which = (
        "recomputed"
        if "rematted_computation" in parts
        else "backward"
        if "transpose" in parts
        else "forward"
        if "jvp" in parts
        else None
    )
    return " ".join(kept[:3]) + (f" ({which})" if which else "")


def top_operations(costs: list[tuple[str, float]], count: int) -> list[dict[str, Any]]:
    """The costliest places of a model.

    Args:
        costs: op_name and cost (cycles, seconds) of every operation.
        count: how many places.

    Returns:
        place (words), cost and share of the whole, the costliest first.
    """
    totals: dict[str, float] = collections.defaultdict(float)
    for source, cost in costs:
        totals[words(source) or "other"] += cost
    whole = sum(totals.values()) or 1.0
    top = sorted(totals.items(), key=lambda item: -item[1])[:count]
    return [{"place": place, "cost": cost, "share": cost / whole} for place, cost in top]


def attention_forwards(config: Config, shape: Mapping[str, int]) -> int:
    """How often the forward pass of attention runs. Args as attention_cycles."""
    return 1 + (config.train.remat in ("full", "dots", "offload")) + _more_forwards(config, shape)


def attention_cycles(config: Config, shape: Mapping[str, int], chip: str) -> float | None:
    """Cycles of attention kernels per device, by their schedules; None where those are not known.

    Args:
        config: the run.
        shape: devices per mesh axis.
        chip: name of a TPU.
    """
    model, train, shards = config.model, config.train, shape.get("context", 1)
    if model.attention_softcap is not None or model.dtype == "float32":
        return None
    T, total = train.seq_len // shards, 0.0
    if train.attention not in ("auto", "splash") or not splash_blocks.fits(T if shards == 1 else T // 2):
        return None
    runs = {"fwd": attention_forwards(config, shape), "dq": 1, "dkv": 1}
    for kind in set(model.layer_pattern):
        if kind == "local" and shards > 1:
            continue  # plain XLA, which the compiler has priced
        own = Mask(T, T, model.causal, model.sliding_window if kind == "local" else None)
        # of each other shard's keys, half the products if causal: all queries and half the keys, or the other way
        other = Mask(T, T // 2 if model.causal else T, causal=False)
        rounds = [(own, 1), *([(other, shards - 1)] if shards > 1 else [])]
        for kernel, times in runs.items():
            for mask, count in rounds:
                cycles = splash_blocks.cycles(chip, model.head_size, kernel, mask)
                if cycles is None:
                    return None
                total += cycles * count * times * model.num_layers_of(kind)
    return total * train.batch_size * model.num_heads * shards / math.prod(shape.values())


def _attention_flops(config: Config, shape: Mapping[str, int]) -> float:
    """FLOPs of attention kernels: splash's backward pass has 7 products, the model's 4; its forward may run twice."""
    of_model = flops.attention_flops_per_token(config.model, config.train.seq_len)
    tokens = config.train.tokens_per_step / math.prod(shape.values())
    return of_model * tokens * (7 + 2 * attention_forwards(config, shape)) / 6


def _expert_flops(config: Config, shape: Mapping[str, int]) -> float:
    """FLOPs of the kernels of routed experts, forward, forward again and backward, where tokens are spread evenly."""
    model = config.model
    weights = model.num_expert_layers * (model.experts_per_token or 0) * model.d_model * model.expert_width
    again = (config.train.remat != "none") + _more_forwards(config, shape)
    again = 1 if shape.get("stage", 1) > 1 else again
    per_token = (3 if model.mlp == "gated" else 2) * weights * (6 + 2 * again)
    return per_token * config.train.tokens_per_step / math.prod(shape.values())


def _more_forwards(config: Config, shape: Mapping[str, int]) -> int:
    """Forward passes beside those of the remat policy: of a pipeline with another one, of repeats_per_scan."""
    train = config.train
    if shape.get("stage", 1) > 1:
        return int(train.remat not in ("full", "dots", "offload"))
    return int(train.repeats_per_scan > 1 and train.remat != "none")


def _collectives(program: Program, text: str) -> list[dict[str, Any]]:
    totals: dict[tuple[str, str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for c in hlo.collectives(text):
        axes = sorted({name.rstrip("0123456789") for name in c.axes(program.mesh.shape)})
        total = totals[c.kind, " and ".join(axes) or "nothing", c.dtype]
        total[0] += c.times
        total[1] += c.times * c.bytes
    rows = [
        {"kind": kind, "axes": axes, "dtype": dtype, "times": times, "bytes": size}
        for (kind, axes, dtype), (times, size) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])
