"""What a device holds during a train step, in bytes by part, from the config alone.

Nothing is compiled: parameters say where they rest (sharding.PARAM), and what a layer keeps for the backward pass
follows from the remat policy (model/stack.py). The peak is the larger of two moments: the loss, and a layer's backward
pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.parameters import Parameter, parameters
from maxlm.passes import PART_LOGITS
from maxlm.sharding import PARAM

SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of an element."""
MOMENTS = {"adamw": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}
"""Copies of the parameters that an optimizer keeps; adafactor's rows and columns are small beside them."""
REPLICAS = ("slice", "data", "fsdp", "expert")
"""Logical axes over which sequences are split."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: parameters, and their average where there is one.
        optimizer: its state.
        gradients: of all layers, in the type they are kept in.
        activations: what layers keep for the backward pass, of all microbatches that are under way.
        layer: what one layer's backward pass works with, its gathered weights included.
        head: logits, their gradients, and the gathered projection.
        batch: tokens and what comes with them.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    layer: float
    head: float
    batch: float

    @property
    def arguments(self) -> float:
        """What stays between steps, and the batch."""
        return self.weights + self.optimizer + self.batch

    @property
    def peak(self) -> float:
        """The most that is held at a time."""
        in_head = self.activations + self.head
        in_layer = self.gradients + self.activations + self.layer
        return self.arguments + max(in_head, in_layer)

    def parts(self) -> dict[str, float]:
        """What makes up the peak, by name."""
        shown = {"weights": self.weights, "optimizer": self.optimizer, "activations": self.activations}
        if self.activations + self.head >= self.gradients + self.activations + self.layer:
            shown["head"] = self.head
        else:
            shown |= {"gradients": self.gradients, "layer": self.layer}
        return {**shown, "batch": self.batch}


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
    def layers(self) -> int:
        """That it runs, filled-up ones of a pipeline included."""
        model, stages = self.config.model, self.sizes["stage"]
        if stages == 1:
            return model.num_layers
        shares = stages * self.config.mesh.rounds
        per_share = -(-model.num_repeats // shares)
        return per_share * self.config.mesh.rounds * len(model.main_pattern) + model.num_lead_layers

    def resting(self, path: str, parameter: Parameter) -> float:
        """Elements of a parameter that rest here."""
        split = math.prod(self._size(PARAM[d]) for d in parameter.dims)
        lead = math.prod(parameter.shape[: len(parameter.shape) - len(parameter.dims)])
        if path.startswith("layers/") and self.sizes["stage"] > 1:
            lead = (self.layers - self.config.model.num_lead_layers) // len(self.config.model.main_pattern)
        return lead * math.prod(parameter.own) / split

    def in_use(self, parameter: Parameter) -> float:
        """Elements of one layer's share of a parameter while it is in use: whole over fsdp."""
        return math.prod(parameter.own) / math.prod(self._size(PARAM[d]) for d in parameter.dims if d != "D")

    def _size(self, axis: object) -> int:
        return self.sizes[axis] if isinstance(axis, str) else 1


def predict_memory(config: Config, sizes: Mapping[str, int]) -> Memory:
    """Bytes on one device during a train step.

    Args:
        config: the run, which fits the mesh (mesh.check_fit).
        sizes: devices per logical axis, from mesh.axis_sizes.
    """
    share, found, optim, train = Share(config, sizes), parameters(config.model), config.optim, config.train
    resting = sum(share.resting(path, p) for path, p in found.items())
    of_layers = sum(share.resting(path, p) for path, p in found.items() if "layers/" in path)
    moments = MOMENTS[optim.name] * SIZES[optim.state_dtype] * resting
    if optim.state_over_data:
        moments /= sizes["data"]
    kept = SIZES[train.grad_dtype] if sizes["stage"] == 1 else 4
    rows = math.prod(sizes[axis] for axis in REPLICAS)
    return Memory(
        weights=(8 if optim.ema is not None else 4) * resting,
        optimizer=0 if optim.state_on_host else moments,
        gradients=kept * of_layers * (sizes["fsdp"] if train.gather == "step" else 1) + 4 * (resting - of_layers),
        activations=_kept_activations(share),
        layer=_layer(share),
        head=_head(share),
        batch=4 * 5 * train.tokens_per_step / (rows * 1),
    )


def kept_per_token(config: Config, sizes: Mapping[str, int]) -> float:
    """Bytes per token that one layer keeps for the backward pass: the table of model/stack.py, per device."""
    model, size, tensor = config.model, SIZES[config.model.dtype], sizes["tensor"]
    D, Q, F = model.d_model, model.num_heads * model.head_size / tensor, _mlp_width(config) / tensor
    K = model.kv_heads * model.head_size / min(tensor, model.kv_heads)
    ups, sums = (2 if model.mlp == "gated" else 1), 4 * model.num_heads / tensor
    policies = {
        "full": size * D,
        "attention": size * (D + Q) + sums,
        "dots": size * (2 * D + Q + 2 * K + ups * F),
        "minimal": size * (2 * D + 2 * Q + 2 * K + ups * F) + sums,
        "none": size * (5 * D + 3 * Q + 4 * K + (2 * ups + 1) * F) + sums,
        "offload": 0.0,
    }
    return policies["full" if sizes["stage"] > 1 else config.train.remat]


def _mlp_width(config: Config) -> int:
    """Hidden features that a token visits."""
    model = config.model
    if model.num_experts is None:
        return model.d_ff
    return ((model.experts_per_token or 0) + model.num_shared_experts) * model.expert_width


def _kept_activations(share: Share) -> float:
    config, stages = share.config, share.sizes["stage"]
    if stages == 1:
        each = share.layers / config.train.repeats_per_scan
        return kept_per_token(config, share.sizes) * share.tokens * each
    # 1F1B: the first stage has as many microbatches under way as there are stages, and each round holds its own
    shares = config.mesh.rounds
    under_way = min(config.train.grad_accum, stages) if config.mesh.pipeline == "1f1b" else config.train.grad_accum
    size = SIZES[config.model.dtype] * config.model.d_model
    return size * share.tokens * (under_way * share.layers + config.train.grad_accum * shares / stages)


def _layer(share: Share) -> float:
    """One layer's backward pass: its intermediates with their gradients, and its weights, gathered ahead of use."""
    model, tensor, size = share.config.model, share.sizes["tensor"], SIZES[share.config.model.dtype]
    Q, F = model.num_heads * model.head_size / tensor, _mlp_width(share.config) / tensor
    width = 4 * model.d_model + 4 * Q + (3 if model.mlp == "gated" else 2) * F
    weights = sum(share.in_use(p) for path, p in parameters(model).items() if path.startswith("layers/0/"))
    return size * (share.tokens * width + 2 * weights)


def _head(share: Share) -> float:
    """The loss: float32 logits of the vocabulary's part that is in memory, and the gathered projection."""
    model, train = share.config.model, share.config.train
    table, tensor = model.padded_vocab * model.d_model, share.sizes["tensor"]
    logits = share.tokens * model.padded_vocab / tensor
    parts = train.logit_parts or max(1, math.ceil(logits / PART_LOGITS))
    return 4 * logits / parts + 2 * SIZES[model.dtype] * (table / tensor + share.tokens * model.d_model)
