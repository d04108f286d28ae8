"""How long a train step takes on a device, by part, before anything is compiled.

Products run at the chip's peak, attention by its kernels' schedules (kernels/splash_blocks.py), what else there is at
the speed of memory, and collectives at that of the links they cross. What overlaps: gathers and scatters of a layer's
weights (fsdp) run beside the layer's products, and cost what they take longer than these; all other collectives wait.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.cost import attention_cycles
from maxlm.flops import attention_flops_per_token
from maxlm.hardware import Chip
from maxlm.mesh import axis_dims
from maxlm.plan.memory import LANES, MOMENTS, SIZES, Share, logit_parts, of_layers, routed_rows, stacked_bytes

PRODUCTS = {
    "TPU v4": 1.1,
    "TPU v5p": 1.065,
    "TPU v6e": 1.3,
    "A100 40GB": 1.15,
    "A100 80GB": 1.15,
    "H100": 1.25,
    "H200": 1.25,
    "B200": 1.29,
    "MI300X": 1.95,
}
"""Time of a product of large matrices over that at the chip's peak; 1.03 where none is given. On TPUs by the compiler's
cycles: an MLP's of D 2048 and F 8192, on v5p of 4096 and 11008. On GPUs, which lower their clock under load, of the
best shape of a sweep: github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS" (271.2, 794.5, 1745 and
668.4 TFLOP/s)."""
INT8 = {"TPU v5e": 0.62, "TPU v5p": 0.59, "TPU v6e": 0.91}
"""Time of a layer's products in int8 over that in bf16 (docs/quantization.md); elsewhere int8 is no faster."""
KERNELS = {True: 0.22, False: 0.5}
"""Share of the peak that attention reaches where no schedule is known, on TPUs (as where it is) and on GPUs."""
BYTES_PER_D, BYTES_PER_Q = (8.0, 27.0), (20.0, 45.0)
"""Bytes that a layer moves per token, in a forward pass and in the backward one, for each feature of the residual
stream and of the heads: norms, sums, rotations, copies between layouts; from the cycles of that program."""
CYCLES_PER_Q, CYCLES_PER_HOP = (0.04, 0.08), (0.135, 0.18)
"""The second in a TPU core's cycles: what heads ask for are mostly copies between layouts, which memory does not slow.
And what each further shard of a context ring adds to them: its parts of the sums are put together in float32."""
BYTES_PER_ROUTED, CYCLES_PER_EXCHANGED = 33.0, 0.18
"""Of every row that routed experts have room for, all passes together: bytes per hidden feature, and cycles per feature
of the stream where rows are exchanged over an axis, which wants them in another layout."""
COPIED = 6.9
"""Times that experts go through memory that are gathered by layers: copied into the layout of their kernels."""
OF_EXPERTS, OF_ROUNDS = 55.0, 20.0
"""Bytes per weight and tick of a pipeline: experts', which kernels take, are sliced out of all that were gathered, and
their gradients put in; of others only where a stage has several rounds."""
UNFUSED = 2.5
"""The first of them where sums over the tensor axis part norms and additions from the products beside them."""
STACKED = 7.0
"""Times that an array which a scan keeps for the backward pass goes through memory: copied in, and out again. Hidden
features are written, and read, by their products."""
SLICED = {"TPU v6e": 15.0}
"""The same where all that is kept, hidden features too, is sliced out and turned into another layout."""
CYCLES_PER_ADAPTED = {"a": (0.003, 0.016), "b": (0.0125, 0.0055)}
"""Cycles per token and feature that goes into an adapter (a), or comes out of one (b), forward and backward, beside its
products: x is read again, what the adapter gives is added to what the weight gives; so are their gradients."""
BYTES_PER_ADAPTED = {"a": (2, 6), "b": (4, 4)}
"""Bytes of the same where a chip's cycles are not known, counted."""
GPUS_PER_NODE = 8
"""Joined by NVLink or its like; what is between nodes is not known."""
STAND_IN = 10e9
"""Bytes/s that a network of unknown speed is taken for when plans are ranked, and only then."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device.

    Attributes:
        products: with weights, what is computed again included.
        attention: the kernels of attention.
        memory: what runs at the speed of memory: norms, rotations, the loss, the update.
        wires: exposed time of collectives by logical axis; None for what crosses a network of unknown speed.
        bubble: idle time of a pipeline.
        unknown_bytes: that a device sends over networks of unknown speed.
        overhead: of launching and waiting; runs alone tell it (calibrate.py).
    """

    products: float
    attention: float
    memory: float
    wires: Mapping[str, float | None]
    bubble: float
    unknown_bytes: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All of it; a lower bound where a network is not known."""
        core = self.products + self.attention + self.memory + self.overhead
        return core + self.bubble + sum(t or 0 for t in self.wires.values())

    def parts(self) -> dict[str, float | None]:
        """Seconds by name, which make up the total."""
        named = ("products", "attention", "memory", "bubble", "overhead")
        wires = {f"wires over {axis}": seconds for axis, seconds in self.wires.items()}
        return {**{name: getattr(self, name) for name in named}, **wires}

    @property
    def rank(self) -> float:
        """What plans are compared by: total, and a guess at unknown networks."""
        return self.total + self.unknown_bytes / STAND_IN

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
    share, micro, stages = Share(config, sizes), config.train.grad_accum, sizes["stage"]
    quantized = INT8.get(chip.name, 1.0) if config.quant.mode == "int8" else 1.0
    slower = PRODUCTS.get(chip.name, 1.03)
    of_weights = share.layers * _layer_products(share) * quantized
    layers = slower * micro * (of_weights + _adapter_products(share, chip)) / chip.bf16_flops
    head = slower * micro * _head_products(share) / chip.bf16_flops
    attention, memory = _attention(config, sizes, chip), _memory(share, chip)
    idle = (stages - 1) / (config.mesh.rounds * micro) if stages > 1 else 0.0
    bubble = idle * (layers + attention + micro * share.layers * _layer_memory(share, chip))
    sent = sent_bytes(share)
    wires = {axis: axis_seconds(kinds, chip, torus, sizes, axis) for axis, kinds in sent.items()}
    hidden = wires.get("fsdp")
    if hidden is not None:
        wires["fsdp"] = max(0.0, hidden - layers - attention)
    unknown = sum(sum(sent[axis].values()) for axis, seconds in wires.items() if seconds is None)
    return StepTime(layers + head, attention, memory, wires, bubble, unknown)


def again(config: Config, sizes: Mapping[str, int]) -> float:
    """Share of a layer's forward products that run once more in the backward pass."""
    remat = "full" if sizes["stage"] > 1 else config.train.remat
    extra = float(config.train.repeats_per_scan > 1 and remat != "none")
    return (1.0 if remat in ("full", "attention", "offload") else 0.0) + extra


# ---- what a core does


def _layer_products(share: Share) -> float:
    """FLOPs of one layer's products with weights on one device, for a microbatch, forward, again and backward."""
    model, tensor, more = share.config.model, share.sizes["tensor"], again(share.config, share.sizes)
    heads = 2 * (model.num_heads + model.kv_heads * tensor / share.kv_split) * model.head_size
    gated = 3 if model.mlp == "gated" else 2
    dense, width = model.num_layers - model.num_expert_layers, model.expert_width
    shared = gated * (dense * model.d_ff + model.num_expert_layers * model.num_shared_experts * width)
    routed = gated * model.num_expert_layers * (model.experts_per_token or 0) * width
    mlp, experts = shared / model.num_layers, routed / model.num_layers
    # the last product of an MLP need not run again: its input is what its gradients ask for; kernels are not kept
    repeated = more * (heads + mlp * (gated - 1) / gated) + experts * (share.config.train.remat != "none")
    passes = 2 if share.frozen else 3  # forward, by the input, and by the weights
    return 2 * share.tokens * model.d_model * (passes * (heads + mlp + experts) + repeated) / tensor


def _adapter_products(share: Share, chip: Chip) -> float:
    """FLOPs of the adapters' products of all layers, for a microbatch; on TPUs a rank takes as long as all LANES."""
    filled = LANES if chip.flops_per_cycle else 1
    rank = math.ceil(share.rank / filled) * filled
    passes = 3 + again(share.config, share.sizes)
    return 2 * share.tokens * rank * passes * (share.adapted("a") + share.adapted("b"))


def _head_products(share: Share) -> float:
    model, split = share.config.model, share.sizes["tensor"] * share.sizes["stage"]
    passes = (2 if share.frozen else 3) + (logit_parts(share) > 1)
    return 2 * passes * share.tokens * model.d_model * model.padded_vocab / split


def _attention(config: Config, sizes: Mapping[str, int], chip: Chip) -> float:
    on_tpu = bool(chip.flops_per_cycle)
    cycles = attention_cycles(config, sizes, chip.name) if on_tpu else None
    local = sizes["context"] > 1 and "local" in config.model.layer_pattern  # plain there, and not in these cycles
    if cycles is not None and chip.flops_per_cycle and not local:
        return cycles * chip.flops_per_cycle / chip.bf16_flops
    per_device = config.train.tokens_per_step / math.prod(sizes.values())
    runs = 3 + (0 if config.train.remat in ("none", "attention", "minimal") and sizes["stage"] == 1 else 1)
    flops = attention_flops_per_token(config.model, config.train.seq_len) * runs / 3
    return flops * per_device / (KERNELS[on_tpu] * chip.bf16_flops)


def _layer_memory(share: Share, chip: Chip) -> float:
    model = share.config.model
    heads = model.num_heads * max(LANES, model.head_size) / share.sizes["tensor"]
    forwards = 1 if share.config.train.remat == "none" and share.sizes["stage"] == 1 else 2
    costs = (BYTES_PER_D, BYTES_PER_Q, CYCLES_PER_Q, CYCLES_PER_HOP)
    d, q, cycles, hop = (forwards * forward + backward for forward, backward in costs)
    d *= UNFUSED if share.sizes["tensor"] > 1 else 1
    of_heads = q / chip.hbm_bytes_per_s
    if chip.flops_per_cycle:
        of_heads = (cycles + hop * (share.sizes["context"] - 1)) * chip.flops_per_cycle / chip.bf16_flops / chip.cores
    return share.tokens * (d * model.d_model / chip.hbm_bytes_per_s + of_heads * heads) + _routing(share, chip)


def _routing(share: Share, chip: Chip) -> float:
    """What routed experts take of a layer beside their products."""
    model, rows = share.config.model, routed_rows(share) * share.config.model.num_expert_layers
    hidden = BYTES_PER_ROUTED * model.expert_width / share.sizes["tensor"] / chip.hbm_bytes_per_s
    exchanged = 0.0
    if share.sizes["expert"] > 1 and chip.flops_per_cycle:
        exchanged = CYCLES_PER_EXCHANGED * model.d_model * chip.flops_per_cycle / chip.bf16_flops / chip.cores
    return rows / model.num_layers * (hidden + exchanged)


def _adapters_memory(share: Share, chip: Chip) -> float:
    """What adapters take beside their products, of all layers, for a microbatch."""
    costs, rate = BYTES_PER_ADAPTED, chip.hbm_bytes_per_s
    if chip.flops_per_cycle:
        costs, rate = CYCLES_PER_ADAPTED, chip.bf16_flops * chip.cores / chip.flops_per_cycle
    forwards = 1 + again(share.config, share.sizes)
    passes = {side: forwards * forward + backward for side, (forward, backward) in costs.items()}
    return share.tokens * sum(share.adapted(side) * cost for side, cost in passes.items()) / rate


def _memory(share: Share, chip: Chip) -> float:
    config, lora, micro = share.config, share.config.lora, share.config.train.grad_accum
    moments, kept = 2 * MOMENTS[config.optim.name] * SIZES[config.optim.state_dtype], SIZES[config.train.grad_dtype]
    kept = kept if lora is None else 4
    resting, rests_cast = share.resting(share.trained), lora is not None and lora.base_dtype == config.model.dtype
    update = resting * (2 * 4 + moments + 3 * kept)
    casts = share.resting(share.trained if rests_cast else share.held) * 6 * 2 * (1 if share.gathers_once else micro)
    sums = resting * 3 * kept * (micro - 1)
    split = share.sizes["tensor"] * share.sizes["stage"]
    logits = 4 * 4 * share.tokens * config.model.padded_vocab / split * micro
    sliced = SLICED.get(chip.name)
    stacked = (sliced or STACKED) * micro * stacked_bytes(share, hidden=sliced is not None)
    others = update + casts + sums + logits + stacked + _taken_out(share)
    layers = share.layers * _layer_memory(share, chip) + _adapters_memory(share, chip)
    return micro * layers + others / chip.hbm_bytes_per_s


def _taken_out(share: Share) -> float:
    """Bytes moved in a step since a layer's weights are no operands as they were gathered."""
    layers, sizes, micro = of_layers(share.held), share.sizes, share.config.train.grad_accum
    experts = share.in_use({path: p for path, p in layers.items() if "E" in p.dims})
    if not share.gathers_once:
        return COPIED * SIZES[share.config.model.dtype] * micro * experts if sizes["fsdp"] > 1 else 0.0
    rounds = share.config.mesh.rounds
    ticks = micro + (sizes["stage"] - 1) / rounds  # that each weight is at work in
    return ticks * (OF_EXPERTS * experts + OF_ROUNDS * (share.in_use(layers) - experts) * (rounds > 1))


# ---- what crosses wires


def sent_bytes(share: Share) -> dict[str, dict[str, float]]:
    """Bytes of whole arrays that a device's collectives move in a step, by logical axis and kind; see docs/mesh.md."""
    config, sizes, model, train = share.config, share.sizes, share.config.model, share.config.train
    size, micro, trained = SIZES[model.dtype], train.grad_accum, share.trained
    stream, keys = size * share.tokens * model.d_model, share.tokens * model.kv_heads * model.head_size / share.kv_split
    n, stages = sizes["context"], sizes["stage"]
    resting = share.resting(trained)
    experts = share.resting({path: p for path, p in trained.items() if "E" in p.dims})
    once = share.gathers_once
    runs, of_pass = (1 if once else micro), (1 if once or train.remat == "none" else 2)
    split = {path: p for path, p in share.held.items() if "D" in p.dims}
    gathered = of_pass * share.in_use(of_layers(split)) + share.in_use(of_layers(split, False))
    scattered = share.in_use({path: p for path, p in trained.items() if "D" in p.dims})
    sums = 4 + (again(config, sizes) > 0)
    visits = stream * (model.experts_per_token or 0) * model.num_expert_layers / model.num_layers
    sent: dict[str, dict[str, float]] = {
        "data": {"reduce": 4 * resting},
        "slice": {"reduce": 4 * resting},
        "fsdp": {
            "gather": runs * size * (gathered + scattered),
            "reduce": runs * size * (share.in_use(trained) - scattered),  # what fsdp does not split
        },
        "tensor": {
            "reduce": micro * (sums * share.layers * stream + _adapters_reduced(share)),
            "gather": micro * size * model.padded_vocab * model.d_model,
        },
        "stage": {
            "permute": 2 * (micro + stages - 1) * stream * config.mesh.rounds,
            "gather": 3 * micro * stream,  # of the head, which all stages share
            "reduce": size * model.padded_vocab * model.d_model,
        },
        "context": {"permute": share.layers * micro * 4 * (5 * n - 1) * keys, "reduce": 4 * resting},
        "expert": {"exchange": 5 * share.layers * micro * visits, "reduce": 4 * (resting - experts)},
    }
    return {axis: kinds for axis, kinds in sent.items() if sizes[axis] > 1}


def _adapters_reduced(share: Share) -> float:
    """Bytes that adapters add to the sums over tensor, of all layers, for a microbatch.

    Gradients of x by weights beside one another are added before they are summed over devices; what comes by an adapter
    is whole already, and parts them. What is between A and B is summed in the one pass or in the other.
    """
    config, adapted, hidden, sums = share.config, Counter[str](), 0.0, 0
    beside = Counter(path.rpartition("/")[0] for path, p in share.frozen.items() if p.dims[0] == "D" and p.dims[1:])
    for path, p in share.trained.items() if share.rank else ():
        where, _, side = path.rsplit("/", 2)
        if any(share.split(letter) > 1 for letter in p.dims if letter != "D"):
            hidden += p.shape[0] * share.rank * (1 + again(config, share.sizes) if side == "a" else 1)
        if side == "a" and p.dims[0] == "D":
            adapted[where] += 1
            sums += p.shape[0] * (adapted[where] < beside[where])
    return SIZES[config.model.dtype] * share.tokens * (hidden + sums * config.model.d_model)


def axis_seconds(
    kinds: Mapping[str, float], chip: Chip, torus: Sequence[int], sizes: Mapping[str, int], axis: str
) -> float | None:
    """Seconds of collectives over a logical axis; None where a network is not known.

    Args:
        kinds: bytes of whole arrays by kind: gather (also a scatter), reduce (two of them), permute (to a neighbour,
            one way), exchange (all to all).
        chip: with the links.
        torus: dimensions of a slice.
        sizes: devices per logical axis, outermost first.
        axis: the logical axis.
    """
    names = list(sizes)
    inner = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
    moved = kinds.get("gather", 0.0) + 2 * kinds.get("reduce", 0.0)
    n = sizes[axis]
    if axis == "slice":
        return None  # the data-centre network
    if chip.link_bytes_per_s is None:  # a GPU: all to all within a node
        rate = chip.interconnect_bytes_per_s / 2
        total = (moved + kinds.get("exchange", 0.0)) * (n - 1) / n + kinds.get("permute", 0.0)
        return total / rate if inner * n <= GPUS_PER_NODE else None
    seconds, outer = 0.0, 1
    for part, extent in axis_dims(n, inner, torus):  # innermost first, each on what those within have gathered
        links = 2 if part == extent and _wraps(chip, torus, extent) else 1
        across = moved * (1 - 1 / part) + kinds.get("exchange", 0.0) * part / 4 * (2 if links == 1 else 1)
        seconds += across / outer / (links * chip.link_bytes_per_s)
        outer *= part
    return seconds + kinds.get("permute", 0.0) / chip.link_bytes_per_s


def _wraps(chip: Chip, torus: Sequence[int], extent: int) -> bool:
    """Whether a dimension of a torus is a ring: all are in slices of whole cubes, on v5e and v6e one of 16 (docs)."""
    return all(n % 4 == 0 for n in torus) if len(torus) == 3 else extent % 16 == 0
