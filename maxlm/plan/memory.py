"""What a device holds during a train step, in bytes by part, from the config alone.

Nothing is compiled: parameters say where they rest (sharding.PARAM), and what a layer keeps for the backward pass
follows from the remat policy (model/stack.py). The peak is the largest of three moments: the loss, a layer's backward
pass, and at last that of the embedding, whose activations are gone by then.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.parameters import Parameter, adapters, parameters
from maxlm.passes import PART_LOGITS
from maxlm.sharding import PARAM

SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of an element."""
MOMENTS = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}
"""Copies of the parameters that an optimizer keeps; adafactor's rows and columns are small beside them."""
LANES = 128
"""Features of an array's last dimension in memory come in so many, on TPUs."""
REPLICAS = ("slice", "data", "fsdp", "expert")
"""Logical axes over which sequences are split."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: parameters, those of adapters included, and the average of what is trained where there is one.
        optimizer: its state.
        gathered: weights that are whole over fsdp for the whole step, or for the whole backward pass.
        adapters: copies of those that take a layer's features, in which a rank fills all LANES.
        gradients: in the type they are kept in.
        activations: what layers keep for the backward pass, of all microbatches that are under way.
        layer: what one repeat of the layers works with in its backward pass, its gathered weights included.
        head: logits, their gradients, and the gathered projection.
        embedding: its gradient, whole over fsdp: in float32, and in the type it is sent in; none where it is frozen.
        batch: tokens and what comes with them.
        summed: gradients are there during the loss already, as sums over microbatches.
    """

    weights: float
    optimizer: float
    gathered: float
    adapters: float
    gradients: float
    activations: float
    layer: float
    head: float
    embedding: float
    batch: float
    summed: bool

    @property
    def arguments(self) -> float:
        """What stays between steps, and the batch."""
        return self.weights + self.optimizer + self.batch

    @property
    def peak(self) -> float:
        """The most that is held at a time."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """What makes up the peak, by name."""
        gradients, activations = {"gradients": self.gradients}, {"activations": self.activations}
        moments = (
            {**activations, "head": self.head, **(gradients if self.summed else {})},
            {**activations, "layer": self.layer, **gradients},
            {"embedding": self.embedding, **gradients},
        )
        largest = max(moments, key=lambda parts: sum(parts.values()))
        shown = {"weights": self.weights, "optimizer": self.optimizer, "gathered": self.gathered}
        shown |= {"adapters": self.adapters} if self.adapters else {}
        return {**shown, **largest, "batch": self.batch}


@dataclass(frozen=True)
class Share:
    """What one device has of the work.

    Attributes:
        config: the run.
        sizes: devices per logical axis, from mesh.axis_sizes.
    """

    config: Config
    sizes: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        train, split = self.config.train, math.prod(self.sizes[axis] for axis in REPLICAS)
        return train.batch_size // train.grad_accum * train.seq_len // (split * self.sizes["context"])

    @property
    def repeats(self) -> int:
        """Of the layer pattern that it runs for each microbatch, filled-up ones of a pipeline included."""
        model, rounds = self.config.model, self.config.mesh.rounds
        return model.num_repeats if self.sizes["stage"] == 1 else self.per_share * rounds

    @property
    def per_share(self) -> int:
        """Repeats of one round of one stage."""
        return -(-self.config.model.num_repeats // (self.sizes["stage"] * self.config.mesh.rounds))

    @property
    def layers(self) -> float:
        """That it runs for each microbatch: dense ones ahead of a pipeline are run by all stages in turn."""
        model = self.config.model
        return self.repeats * len(model.main_pattern) + model.num_lead_layers / self.sizes["stage"]

    @property
    def gathers_once(self) -> bool:
        """Whether weights are whole over fsdp for all of a step, and not while their layer is at work."""
        return self.sizes["stage"] > 1 or self.config.train.gather == "step"

    @property
    def spread(self) -> float:
        """Rows that routed experts have room for, over those of a device's own tokens: the worst case, or capacity."""
        expert = self.sizes["expert"] if self.config.model.num_experts else 1
        return min(expert, self.config.mesh.capacity_factor or expert)

    @property
    def rank(self) -> int:
        """Of adapters; 0 where there are none."""
        return 0 if self.config.lora is None else self.config.lora.rank

    @property
    def trained(self) -> dict[str, Parameter]:
        """What has gradients: all parameters, or with lora the adapters alone."""
        model, lora = self.config.model, self.config.lora
        return parameters(model) if lora is None else adapters(model, lora)

    @property
    def frozen(self) -> dict[str, Parameter]:
        """What has none."""
        return {} if self.config.lora is None else parameters(self.config.model)

    @property
    def held(self) -> dict[str, Parameter]:
        """Both."""
        return {**self.frozen, **self.trained}

    @property
    def kv_split(self) -> int:
        """Devices over which key/value heads are split: none where they are too few."""
        tensor = self.sizes["tensor"]
        return tensor if self.config.model.kv_heads % tensor == 0 else 1

    def split(self, letter: str) -> int:
        """Devices over which a dim of parameters at rest is split."""
        axis = PARAM[letter]
        return self.kv_split if letter == "K" else self.sizes[axis] if isinstance(axis, str) else 1

    def resting(self, found: Mapping[str, Parameter]) -> float:
        """Elements of parameters, by path, that rest here."""
        return sum(self._stacked(path, p) * self._own(p, "") for path, p in found.items())

    def in_use(self, found: Mapping[str, Parameter]) -> float:
        """The same while they are in use: whole over fsdp."""
        return sum(self._stacked(path, p) * self._own(p, "D") for path, p in found.items())

    def adapted(self, side: str, whole: str = "D", among: str = ".*") -> float:
        """Features that go into adapters (side a), or come out of them (b), all layers together.

        Args:
            side: a or b.
            whole: letters of dims that count as if nothing split them: D is whole in use, and split at rest.
            among: an expression of the adapters' paths.
        """
        if not self.rank:
            return 0.0
        found = [(path, p) for path, p in self.trained.items() if re.fullmatch(f"{among}/{side}", path)]
        return sum(self._stacked(path, p) * math.prod(self._shape(p, whole)) for path, p in found) / self.rank

    def _stacked(self, path: str, parameter: Parameter) -> int:
        if path.startswith("layers/") and self.sizes["stage"] > 1:
            return self.repeats
        return math.prod(parameter.stacked)

    def _own(self, parameter: Parameter, whole: str) -> float:
        shape = self._shape(parameter, whole)
        filled = min(math.ceil(n / LANES) * LANES / n for n in shape) if len(shape) > 1 else 1  # the best of layouts
        return math.prod(shape) * filled

    def _shape(self, parameter: Parameter, whole: str) -> list[float]:
        return [n / (1 if d in whole else self.split(d)) for d, n in zip(parameter.dims, parameter.own, strict=True)]


def predict_memory(config: Config, sizes: Mapping[str, int]) -> Memory:
    """Bytes on one device during a train step.

    Args:
        config: the run, which fits the mesh (mesh.check_fit).
        sizes: devices per logical axis, from mesh.axis_sizes.
    """
    share, optim, train, lora = Share(config, sizes), config.optim, config.train, config.lora
    trained, frozen, size = share.trained, share.frozen, SIZES[config.model.dtype]
    layers, others = of_layers(trained), of_layers(trained, False)
    resting, whole = share.resting(trained), share.gathers_once
    updated = resting
    if optim.state_over_data:  # where D divides
        split = share.resting({path: p for path, p in trained.items() if "D" in p.dims})
        updated += split / sizes["data"] - split
    moments = MOMENTS[optim.name] * SIZES[optim.state_dtype] * updated
    if optim.name == "muon":  # embeddings and the like have Adam's two
        moments += SIZES[optim.state_dtype] * share.resting(others)
    gathered = size * share.in_use(share.held) if whole else 0
    elements, kept = share.in_use if whole else share.resting, SIZES[train.grad_dtype]
    kept, base = (kept, 0) if lora is None else (4, SIZES[lora.base_dtype])
    kept = 4 if sizes["stage"] > 1 else kept
    gradients = kept * elements(layers) + 4 * elements(others)
    if lora is not None and train.grad_accum > 1:
        gradients *= 2  # those of a microbatch, and their sums
    embedding = {path: p for path, p in trained.items() if path.startswith("embed")}
    rows = math.prod(sizes[axis] for axis in REPLICAS)
    return Memory(
        weights=(8 if optim.ema is not None else 4) * resting + base * share.resting(frozen),
        optimizer=0 if optim.state_on_host else moments,
        gathered=gathered + (_gathered_layers(share) if _keeps_gathered(share) else 0),
        adapters=_adapter_copies(share),
        gradients=gradients,
        activations=_kept_activations(share),
        layer=_layer(share),
        head=_head(share),
        embedding=(4 + size) * share.in_use(embedding),
        batch=4 * 5 * train.tokens_per_step / rows,
        summed=train.grad_accum > 1,
    )


def of_layers(found: Mapping[str, Parameter], are: bool = True) -> dict[str, Parameter]:
    """Parameters of layers, by path; or the others."""
    return {path: p for path, p in found.items() if ("layers/" in path) == are}


def kept_per_repeat(config: Config, share: Share, mlp: bool = True) -> float:
    """Bytes per token that a repeat of the layers keeps for the backward pass: the table of model/stack.py.

    Args:
        config: the run.
        share: of a device.
        mlp: with the MLP's hidden features.
    """
    model, size, tensor = config.model, SIZES[config.model.dtype], share.sizes["tensor"]
    count = len(model.main_pattern)
    D, Q = model.d_model, model.num_heads * model.head_size / tensor
    K, F = model.kv_heads * model.head_size / share.kv_split, mlp * _mlp_width(config, kept=True) / tensor
    ups, sums = (2 if model.mlp == "gated" else 1), 4 * model.num_heads / tensor
    policies = {
        "full": size * D,
        "attention": size * (D + count * Q) + count * sums,
        "dots": size * (D + count * (D + Q + 2 * K + ups * F)),
        "minimal": size * (D + count * (D + 2 * Q + 2 * K + ups * F)) + count * sums,
        "none": count * (size * (8 * D + 2 * Q + 3 * K + 2 * (ups + 1) * F) + sums),
        "offload": 0.0,
    }
    return policies["full" if share.sizes["stage"] > 1 else config.train.remat] + size * _kept_by_adapters(share, mlp)


def _kept_by_adapters(share: Share, mlp: bool) -> float:
    """Features per token that adapters add to these: what is between A and B and, as products are kept, what B gives.

    The last product of an MLP is not asked for.
    """
    remat = share.config.train.remat
    if not share.rank or remat not in ("none", "dots", "minimal"):
        return 0.0
    between = share.rank * sum(path.startswith("layers/") and path.endswith("/a") for path in share.trained)
    names = "attention/.*|.*/(up|gate)" if mlp else "attention/.*"
    given = share.adapted("b", among=f"layers/[^/]*/({names})") / share.repeats
    return between + (given if remat != "none" else 0)


def routed_rows(share: Share) -> float:
    """Rows of a microbatch that routed experts have room for."""
    return share.tokens * (share.config.model.experts_per_token or 0) * share.spread


def stacked_bytes(share: Share, hidden: bool) -> float:
    """Bytes that the scans over the layers keep for a microbatch. Args: hidden: hidden features of MLPs among them."""
    config = share.config
    kept = share.repeats * share.tokens * kept_per_repeat(config, share, mlp=hidden)
    return kept + (_gathered_layers(share) if _keeps_gathered(share) else 0)


def _keeps_gathered(share: Share) -> bool:
    """Whether a layer's gathered weights are kept for the backward pass, as all that it computes is."""
    return share.config.train.remat == "none" and share.sizes["fsdp"] > 1 and not share.gathers_once


def _gathered_layers(share: Share) -> float:
    return SIZES[share.config.model.dtype] * share.in_use(of_layers(share.held))


def _adapter_copies(share: Share) -> float:
    """Float32 copies that the loops over layers read, in which the rank is the last dimension, and filled up."""
    filled = math.ceil(share.rank / LANES) * LANES
    return 4 * filled * share.adapted("a", whole="") if filled > share.rank else 0.0


def _mlp_width(config: Config, kept: bool = False) -> int:
    """Hidden features that a token visits. Args: kept: routed experts are kernels, whose products no policy keeps."""
    model = config.model
    if model.num_experts is None:
        return model.d_ff
    again = kept and config.train.remat in ("dots", "minimal")
    routed = 0 if again else model.experts_per_token or 0
    return (routed + model.num_shared_experts) * model.expert_width


def _kept_activations(share: Share) -> float:
    config, stages = share.config, share.sizes["stage"]
    train, rounds, M = config.train, config.mesh.rounds, config.train.grad_accum
    stream = SIZES[config.model.dtype] * config.model.d_model * share.tokens
    lead = config.model.num_lead_layers / stages * stream
    if stages == 1:
        groups = share.repeats / (train.repeats_per_scan if train.remat != "none" else 1)
        return kept_per_repeat(config, share) * share.tokens * groups + lead
    slots = (min(M, rounds * stages + stages - 1) if config.mesh.pipeline == "1f1b" else M * rounds) + 1
    return stream * (slots * share.per_share + 2 * M / stages + 2) + lead


def _layer(share: Share) -> float:
    """A repeat's backward pass: its intermediates with their gradients, and its weights, gathered ahead of use."""
    config, model = share.config, share.config.model
    tensor, size, count = share.sizes["tensor"], SIZES[model.dtype], len(model.main_pattern)
    Q, F = model.num_heads * max(LANES, model.head_size) / tensor, _mlp_width(config) / tensor
    width = 4 * model.d_model + 4 * Q + (3 if model.mlp == "gated" else 2) * F * share.spread
    if share.spread > 1:
        width += 2 * (model.experts_per_token or 0) * model.d_model * share.spread
    stack = {path: p for path, p in share.held.items() if path.startswith("layers/")}
    weights = share.in_use(stack) / share.repeats
    return size * (share.tokens * width * count + (0 if share.sizes["stage"] > 1 else 2 * weights))


def _head(share: Share) -> float:
    """The loss: float32 logits of the vocabulary's part that is in memory, and the projection, gathered."""
    model, size = share.config.model, SIZES[share.config.model.dtype]
    logits = share.tokens * model.padded_vocab / (share.sizes["tensor"] * share.sizes["stage"])
    projection = (1 if share.frozen else 2) * size * model.padded_vocab * model.d_model / share.sizes["tensor"]
    projection *= not share.gathers_once  # then it is among what is gathered
    return (4 * logits + projection) / logit_parts(share) + 2 * size * share.tokens * model.d_model


def logit_parts(share: Share) -> int:
    """In which logits are computed: more than one, and the backward pass computes them again."""
    model, split = share.config.model, share.sizes["tensor"] * share.sizes["stage"]
    if model.unembed_bias:
        return 1
    logits = share.tokens * model.padded_vocab / split
    return share.config.train.logit_parts or max(1, math.ceil(logits / PART_LOGITS))
