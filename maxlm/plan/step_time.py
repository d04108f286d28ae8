"""How long a train step takes on a device, by part, before anything is compiled.

Products run at the chip's peak, attention by its kernels' schedules (kernels/splash_blocks.py), what else there is at
the speed of memory, and collectives at that of the links they cross. What overlaps: gathers and scatters of a layer's
weights (fsdp) run beside the layer's products, and cost what they take longer than these; all other collectives wait.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.cost import attention_cycles
from maxlm.flops import attention_flops_per_token
from maxlm.hardware import Chip
from maxlm.mesh import axis_parts
from maxlm.parameters import parameters
from maxlm.plan.memory import MOMENTS, SIZES, Share

PRODUCTS = 1.03
"""Time of a product of large matrices on a TPU over that at its peak, by the compiler's cycles: those of an MLP of D
2048 and F 8192, with 4096 tokens, on v5e."""
KERNELS = 0.5
"""Share of the peak that attention reaches where no schedule is known."""
BYTES_PER_D, BYTES_PER_Q = 52.0, 62.0
"""Bytes that a layer moves per token, forward, forward again and backward, for each feature of the residual stream and
of the heads: norms, sums, rotations, copies between layouts; counted from that program."""
LANES = 128
WRAPS = {"TPU v4": 4, "TPU v5p": 4, "TPU v5e": 16, "TPU v6e": 16}
"""A dimension of a torus is a ring where it is a multiple of this, else a line, half as fast (Cloud's docs)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device.

    Attributes:
        products: with weights, what is computed again included.
        attention: the kernels of attention.
        memory: what runs at the speed of memory: norms, rotations, the loss, the update.
        wires: exposed time of collectives by logical axis; None for what crosses a network of unknown speed.
        bubble: idle time of a pipeline.
    """

    products: float
    attention: float
    memory: float
    wires: Mapping[str, float | None]
    bubble: float

    @property
    def total(self) -> float:
        """All of it; a lower bound where a network is not known."""
        return self.products + self.attention + self.memory + self.bubble + sum(t or 0 for t in self.wires.values())

    @property
    def known(self) -> bool:
        """Whether every network that is crossed is known."""
        return None not in self.wires.values()


def predict_step_time(config: Config, sizes: Mapping[str, int], chip: Chip, torus: Sequence[int]) -> StepTime:
    """Predicts a step on one chip of a slice.

    Args:
        config: the run, which fits the mesh (mesh.check_fit).
        sizes: devices per logical axis, from mesh.axis_sizes.
        chip: what one device can do.
        torus: dimensions of a slice; one for GPUs.
    """
    share, train = Share(config, sizes), config.train
    micro = train.grad_accum
    layers = micro * _layer_products(share) * share.layers / (chip.bf16_flops * _speedup(config, chip))
    head = micro * _head_products(share) / chip.bf16_flops
    attention, memory = _attention(config, sizes, chip), _memory(share, chip)
    wires = _wires(share, chip, torus, PRODUCTS * layers + attention)
    stages = sizes["stage"]
    idle = (stages - 1) / (config.mesh.rounds * micro) if stages > 1 else 0.0
    bubble = idle * (PRODUCTS * layers + attention + micro * share.layers * _layer_memory(share, chip))
    return StepTime(PRODUCTS * (layers + head), attention, memory, wires, bubble)


def again(config: Config, sizes: Mapping[str, int]) -> float:
    """Share of a layer's forward products that run once more in the backward pass."""
    remat = "full" if sizes["stage"] > 1 else config.train.remat
    extra = float(config.train.repeats_per_scan > 1 and remat != "none")
    return (1.0 if remat in ("full", "attention", "offload") else 0.0) + extra


def _layer_products(share: Share) -> float:
    """FLOPs of one layer's products with weights on one device, for a microbatch, forward, again and backward."""
    model, tensor = share.config.model, share.sizes["tensor"]
    heads = 2 * (model.num_heads + max(model.kv_heads, tensor)) * model.head_size
    gated = 3 if model.mlp == "gated" else 2
    dense, width = model.num_layers - model.num_expert_layers, model.expert_width
    visited = ((model.experts_per_token or 0) + model.num_shared_experts) * width
    mlp = gated * (dense * model.d_ff + model.num_expert_layers * visited) / model.num_layers
    # the last product of an MLP need not run again: its input is what its gradients ask for
    repeated = again(share.config, share.sizes) * (heads + mlp * (gated - 1) / gated)
    return 2 * share.tokens * model.d_model * (3 * (heads + mlp) + repeated) / tensor


def _head_products(share: Share) -> float:
    model, split = share.config.model, share.sizes["tensor"] * share.sizes["stage"]
    return 6 * share.tokens * model.d_model * model.padded_vocab / split


def _speedup(config: Config, chip: Chip) -> float:
    """Of the products of layers, by their type."""
    return (chip.speedup(config.quant.mode) or 1.0) if config.quant.mode == "int8" else 1.0


def _attention(config: Config, sizes: Mapping[str, int], chip: Chip) -> float:
    cycles = attention_cycles(config, sizes, chip.name)
    if cycles is not None and chip.flops_per_cycle:
        return cycles * chip.flops_per_cycle / chip.bf16_flops
    per_device = config.train.tokens_per_step / math.prod(sizes.values())
    flops = attention_flops_per_token(config.model, config.train.seq_len) * (3 + again(config, sizes)) / 3
    return flops * per_device / (KERNELS * chip.bf16_flops)


def _layer_memory(share: Share, chip: Chip) -> float:
    model = share.config.model
    heads = model.num_heads * model.head_size * max(1.0, LANES / model.head_size) / share.sizes["tensor"]
    return share.tokens * (BYTES_PER_D * model.d_model + BYTES_PER_Q * heads) / chip.hbm_bytes_per_s


def _memory(share: Share, chip: Chip) -> float:
    config, found = share.config, parameters(share.config.model)
    resting, micro = sum(share.resting(path, p) for path, p in found.items()), config.train.grad_accum
    moments = 2 * MOMENTS[config.optim.name] * SIZES[config.optim.state_dtype]
    update = resting * (2 * 4 + moments + 3 * SIZES[config.train.grad_dtype])
    casts = resting * 6 * 2 * (1 if config.train.gather == "step" else micro)
    logits = 4 * 4 * share.tokens * config.model.padded_vocab / share.sizes["tensor"] * micro
    return micro * share.layers * _layer_memory(share, chip) + (update + casts + logits) / chip.hbm_bytes_per_s


def _wires(share: Share, chip: Chip, torus: Sequence[int], beside: float) -> dict[str, float | None]:
    """Exposed seconds of collectives by logical axis; formulas of docs/mesh.md.

    Args:
        share: of the work.
        chip: with the links.
        torus: dimensions of a slice.
        beside: seconds of the products beside which weights travel.
    """
    config, sizes, model = share.config, share.sizes, share.config.model
    size, micro, found = SIZES[model.dtype], share.config.train.grad_accum, parameters(model)
    keys = share.tokens * model.kv_heads * model.head_size
    stream = size * share.tokens * model.d_model
    in_use = {path: share.in_use(p) for path, p in found.items()}
    layer = sum(n for path, n in in_use.items() if path.startswith("layers/")) / len(model.main_pattern) * share.layers
    rest = sum(n for path, n in in_use.items() if "layers/" not in path)
    gathers = 1 if config.train.gather == "step" or sizes["stage"] > 1 else micro
    resting = sum(share.resting(path, p) for path, p in found.items())
    bytes_sent = {
        "fsdp": gathers * size * (3 * layer + 2 * rest),
        "data": 2 * 4 * resting,
        "slice": 2 * 4 * resting,
        "tensor": 2 * 5 * share.layers * micro * stream,
        "stage": 2 * (micro + sizes["stage"] - 1) * stream * config.mesh.rounds,
        "context": share.layers * micro * 4 * (5 * sizes["context"] - 1) * keys + 2 * 4 * resting,
        "expert": 5 * share.layers * micro * stream * (model.experts_per_token or 0) + 2 * 4 * resting,
    }
    found_s: dict[str, float | None] = {}
    for axis, sent in bytes_sent.items():
        if sizes[axis] == 1:
            continue
        rate = axis_bytes_per_s(chip, torus, sizes, axis)
        found_s[axis] = None if rate is None else sent * (sizes[axis] - 1) / sizes[axis] / rate
    if found_s.get("fsdp") is not None:
        found_s["fsdp"] = max(0.0, found_s["fsdp"] - beside)  # pyrefly: ignore
    return found_s


def axis_bytes_per_s(chip: Chip, torus: Sequence[int], sizes: Mapping[str, int], axis: str) -> float | None:
    """Rate at which a device sends to others of a logical axis; None where it is not known.

    Args:
        chip: with the links.
        torus: dimensions of a slice.
        sizes: devices per logical axis, outermost first.
        axis: a logical axis.
    """
    if axis == "slice":
        return None  # of the data-centre network
    if chip.link_bytes_per_s is None:  # a GPU: all to all within a node
        inner = math.prod(size for name, size in _inside(sizes, axis).items()) * sizes[axis]
        return chip.interconnect_bytes_per_s / 2 if inner <= GPUS_PER_NODE else None
    inner = math.prod(_inside(sizes, axis).values())
    # one dimension after another carries nearly all of it over the slowest, the outermost
    last = axis_parts(sizes[axis], inner, torus)[-1]
    whole = last in torus and last % WRAPS.get(chip.name, 4) == 0
    return chip.link_bytes_per_s * (2 if whole else 1)


GPUS_PER_NODE = 8
"""Joined by NVLink or its like; what is between nodes is not known."""


def _inside(sizes: Mapping[str, int], axis: str) -> dict[str, int]:
    names = list(sizes)
    return {name: sizes[name] for name in names[names.index(axis) + 1 :]}
