"""The configuration tree: frozen, typed, validated once, never changed afterwards.

Every field says what it means and its unit; `maxlm config --fields` prints them all. Files and
`a.b=c` overrides are read in `config_file.py`. What depends on the data or the devices at hand is
checked where they are known (`mesh.resolve`, `data.store.open_stores`), with the same kind of error.
"""

import math
from typing import Literal

from pydantic import Field, model_validator

from maxlm.config_lora import LoraConfig
from maxlm.config_model import (
    BelowOne,
    Count,
    Fraction,
    Integer,
    ModelConfig,
    NonNegative,
    Place,
    Positive,
    Section,
    divisor_at_most,
)
from maxlm.config_quant import QuantConfig


class RunConfig(Section):
    """Where a run lives and what it is called."""

    name: str = Field("run", description="Name of the run; its folder is root/name.", pattern=r"^[A-Za-z0-9][\w.\-]*$")
    root: Place = Field("runs", description="Folder or gs:// bucket that holds runs.")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.root.startswith("s3://"):
            raise ValueError(
                f"root={self.root}: Orbax cannot write checkpoints to s3://; use a folder or gs:// "
                "(token stores may stay in s3://)"
            )
        return self


class MeshConfig(Section):
    """How many devices each mesh axis has. At most one axis may be -1: it takes what is left of a slice."""

    slices: Positive = Field(
        1, description="Slices joined by the data-centre network; each holds all axes, and they are replicas."
    )
    data: Integer = Field(1, description="Replicas of the weights, in devices.")
    stage: Integer = Field(1, description="Pipeline stages: devices that hold different layers.")
    rounds: Positive = Field(
        1, description="Shares of layers per stage; each microbatch passes the stages this often, with less idling."
    )
    pipeline: Literal["1f1b", "gpipe"] = Field(
        "1f1b", description="Pipeline schedule; 1f1b keeps the same few microbatches however many there are."
    )
    fsdp: Integer = Field(-1, description="Devices that share one copy of the weights; -1 fills what is left.")
    expert: Integer = Field(1, description="Devices that hold different experts, and different sequences elsewhere.")
    context: Integer = Field(1, description="Devices that split each sequence.")
    tensor: Integer = Field(1, description="Devices that split heads, MLP width and vocabulary.")
    context_attention: Literal["ring", "gather"] = Field(
        "ring",
        description="How queries meet keys of other context shards: keys travel around a ring (less memory), or are "
        "gathered (fewer, larger messages).",
    )
    expert_dispatch: Literal["auto", "gather", "exchange"] = Field(
        "auto",
        description="How tokens meet experts of other devices: all tokens are gathered over the expert axis, or each "
        "is sent to its experts alone (exchange; TPU and GPU). auto exchanges on TPU and gathers elsewhere.",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="Rows that a device keeps for tokens of its experts, as a multiple of the mean; what overflows is "
        "dropped and counted as dropped_tokens. null: room for the worst case, nothing is ever dropped.",
    )
    allowed: tuple[Positive, ...] = Field(
        (),
        description="Numbers of devices that the run may have, such as [8, 4, 2]: it takes the largest that is there. "
        "With fewer than the first the axis of -1 is shorter and a step has more microbatches, so that the global "
        "batch and what a device holds of it stay.",
    )
    fake_devices: Positive | None = Field(
        None, description="Run on this many fake CPU devices, to try a mesh without an accelerator."
    )

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        free = [name for name in AXES if getattr(self, name) == -1]
        for name in AXES:
            if (size := getattr(self, name)) == 0 or size < -1:
                raise ValueError(f"{name}={size} is not a number of devices; use 1 or more, or -1 to fill what is left")
        if self.allowed:
            first = self.allowed[0]
            if list(self.allowed) != sorted(set(self.allowed), reverse=True) or any(first % n for n in self.allowed):
                raise ValueError(f"allowed={list(self.allowed)} must fall, and all must divide the first, as [8, 4, 2]")
            if not free:
                raise ValueError(f"allowed={list(self.allowed)} needs an axis that may be shorter: set fsdp=-1, say")
        if len(free) > 1:
            raise ValueError(f"only one axis may be -1, but {' and '.join(free)} are; give one of them a size")
        if self.fake_devices and self.expert_dispatch == "exchange" and self.expert != 1:
            raise ValueError("expert_dispatch=exchange needs ragged_all_to_all, which CPUs do not have; use gather")
        return self


AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
"""Mesh axes of a slice, outermost first: what talks most sits innermost."""


class StoreConfig(Section):
    """One token store of the mixture."""

    path: Place = Field(description="Folder or bucket of the token store.")
    weight: float = Field(1.0, gt=0, description="Share of the mixture, relative to the other stores.")
    text: tuple[Place, ...] = Field(
        (),
        description="Build the store from this text when it is missing: files, folders, globs, or python:stdlib.",
    )
    tokenizer: Place = Field(
        "byte", description="Tokenizer of such a build: byte, or the path of a tokenizer.json or SentencePiece .model."
    )
    text_field: str = Field("text", description="Key or column of its .jsonl and .parquet files that holds the text.")
    eos: str | None = Field(None, description="Token that ends its documents, if it has none of the usual names.")
    bos: str | None = Field(None, description="Token that begins them; default: looked for by name. none: no such.")
    heldout: Fraction = Field(0.01, description="Share of documents that such a build keeps for evaluation.")


class DataConfig(Section):
    """What is read, and how rows are cut from it."""

    stores: tuple[StoreConfig, ...] = Field(description="Token stores and their weights.", min_length=1)
    shuffle: bool = Field(True, description="Visit rows in a random order, another one each epoch.")
    segment_mask: bool = Field(True, description="Tokens attend within their own document only.")
    read_threads: Positive = Field(8, description="Threads that read rows ahead, per host.")
    prefetch: Positive = Field(4, description="Global batches kept ready, per host.")


class TrainConfig(Section):
    """Length, batch and the trade of memory against time."""

    steps: Positive | None = Field(None, description="Optimizer steps of the whole run. Give steps or tokens.")
    tokens: Positive | None = Field(None, description="Tokens of the whole run, rounded up to whole steps.")
    batch_size: Positive = Field(description="Sequences per optimizer step, over all devices.")
    seq_len: Positive = Field(description="Tokens per sequence.")
    grad_accum: Positive = Field(1, description="Microbatches per step; each holds batch_size / grad_accum sequences.")
    gather: Literal["layer", "step"] = Field(
        "layer",
        description="Gather sharded weights layer by layer (less memory) or once a step (less traffic), as a pipeline "
        "(mesh.stage) always does.",
    )
    grad_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Gradients of layers are kept and summed over microbatches in this type; bfloat16 halves their "
        "memory. Pipelines keep float32.",
    )
    remat: Literal["none", "full", "attention", "dots", "minimal", "offload"] = Field(
        "full",
        description="What the backward pass recomputes: nothing (none); whole layers (full, as pipelines always do); "
        "all but attention; all but products with weights (dots); all but products (minimal). offload is full, with "
        "the layers' inputs kept by the host. attention and minimal keep what splash gives: without it they are full "
        "and dots.",
    )
    repeats_per_scan: Positive = Field(
        1,
        description="Repeats of the layer pattern in one iteration of the loop over layers. Of n only the first one's "
        "input is kept for the backward pass, a 1/n of the memory, and their forward pass runs once more; with "
        "remat=none nothing but the loop changes.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of weights and data order.")
    max_bad_steps: Positive = Field(
        3,
        description="Steps in a row without a finite loss and gradient that end the run. Such a step is skipped: it "
        "leaves weights and optimizer as they are.",
    )
    spike_sigma: float | None = Field(
        None,
        gt=0,
        description="Skip steps whose loss or gradient norm is so many standard deviations above the mean of the 127 "
        "before (OLMo 2 has 6). null: off.",
    )
    dropout: BelowOne = Field(
        0.0, description="Share of features dropped after the embedding and after each sublayer, in training alone."
    )
    attention: Literal["auto", "plain", "splash", "cudnn"] = Field(
        "auto",
        description="What computes attention: plain XLA, or a kernel that holds no logits, splash on TPU, cudnn on "
        "NVIDIA GPUs (elsewhere both are imitated, slowly, for tests). auto takes that of the device. Plain all the "
        "same: for splash rows that are no multiple of 128 tokens; for cudnn float32, soft-caps, heads over 128 and "
        "mesh.context.",
    )
    logit_parts: Positive | None = Field(
        None,
        description="Parts of the vocabulary whose logits are in memory at a time; 1 keeps all logits, null takes as "
        "many parts as keep a part below 512 MiB on a device. A token_loss of your own sees all logits.",
    )
    z_loss: NonNegative = Field(0.0, description="Weight of log(Z)**2, which keeps logits from drifting (PaLM, 5).")
    start_from: Place | None = Field(
        None,
        description="Start a new run from another run's checkpoint: RUN or RUN@STEP (to branch a cooldown, say).",
    )
    init_from: Place | None = Field(
        None,
        description="Begin a new run with the parameters of another run, or of what maxlm convert made: RUN or "
        "RUN@STEP. The optimizer and the step begin anew.",
    )
    allow_changed: tuple[str, ...] = Field(
        (),
        description="Fields that may differ from what this run was so far, such as [data.stores, train.seed]: a resume "
        "refuses other models, data, seeds and batches.",
    )
    compilation_cache: Place | None = Field(
        "~/.cache/maxlm/xla", description="Folder of compiled programs, reused by later starts; null turns it off."
    )
    compiler_options: dict[str, bool | int | float | str] = Field(
        {}, description="XLA options of the step, such as {xla_tpu_scoped_vmem_limit_kib: 65536}, over maxlm's own."
    )
    profile_steps: tuple[Positive, Positive] | None = Field(
        None, description="[first, last] step of a profiler trace written to the run folder."
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.batch_size * self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / self.tokens_per_step)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if (self.steps is None) == (self.tokens is None):
            what = (
                "neither is set" if self.steps is None else f"steps={self.steps} and tokens={self.tokens} are both set"
            )
            raise ValueError(f"the length is given by steps or tokens, but {what}; set one and leave the other null")
        if self.batch_size % self.grad_accum:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by grad_accum={self.grad_accum}; "
                f"use grad_accum={divisor_at_most(self.batch_size, self.grad_accum)}"
            )
        if self.start_from and self.init_from:
            raise ValueError("start_from and init_from are both set; a run has one beginning")
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} ends before it starts")
        return self


class ScheduleConfig(Section):
    """Learning rate over time: warmup, then one of five shapes."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="Shape after the warmup; wsd is warmup-stable-decay."
    )
    warmup_steps: Count = Field(0, description="Steps of linear warmup from zero.")
    cooldown_steps: Count = Field(0, description="wsd: steps of the final linear decay.")
    final_fraction: Fraction = Field(0.1, description="Learning rate at the end, as a share of its peak.")


class OptimConfig(Section):
    """The optimizer, from optax, and what surrounds it."""

    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = Field("adamw", description="Optimizer.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rate over time.")
    beta1: BelowOne = Field(0.9, description="Decay of the first moment (adamw, lion; muon's Adam part).")
    beta2: BelowOne = Field(0.95, description="Decay of the second moment (adamw, lion; muon's Adam part).")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    momentum: BelowOne = Field(0.95, description="Momentum (sgd, muon).")
    weight_decay: NonNegative = Field(0.1, description="Decoupled weight decay, multiplied by the learning rate.")
    decay_mask: str = Field(
        r".*(norm|bias).*|embed|positions|token_types",
        description="Parameters whose path matches this expression are not decayed.",
    )
    adam_lr: float | None = Field(
        None,
        gt=0,
        description="muon: peak learning rate of its Adam part (embeddings, norms); null means learning_rate.",
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="Global gradient norm is clipped to this; null turns it off."
    )
    state_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="Type of the optimizer's moments between steps; rounding to it is stochastic. "
        "It cannot change within a run.",
    )
    state_over_data: bool = Field(
        False,
        description="Split the optimizer's state over mesh.data too: each replica updates a share of the weights, and "
        "all gather them (ZeRO, stage 1).",
    )
    state_on_host: bool = Field(
        False, description="Keep the optimizer's state in the host's memory; it visits the device for each update."
    )
    lr_rules: dict[str, float] = Field(
        {}, description="Learning-rate multipliers by parameter path: {expression: factor}; the first match counts."
    )
    freeze: tuple[str, ...] = Field((), description="Parameters whose path matches one of these are not trained.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential average of the weights, kept and used for evaluation."
    )

    @model_validator(mode="after")
    def _on_host(self) -> "OptimConfig":
        if self.state_on_host and self.name in ("adafactor", "muon"):
            raise ValueError(
                f"state_on_host=true updates layer by layer, and {self.name} looks at several layers at once; "
                "use adamw, sgd or lion, or leave the state on the devices (state_dtype=int8 makes it small)"
            )
        return self


class EvalConfig(Section):
    """Held-out evaluation."""

    every: Count = Field(0, description="Steps between evaluations; 0 evaluates at the end only.")
    batches: Positive = Field(8, description="Held-out global batches per evaluation.")
    sample_tokens: Count = Field(200, description="Tokens of sample text generated at the end; 0 for none.")
    sample_prompt: str = Field(
        "", description="Text that the sample continues; empty begins as the held-out text does."
    )


class CheckpointConfig(Section):
    """When state is saved and what is kept."""

    every: Positive = Field(1000, description="Steps between saves; the last step is always saved.")
    minutes: float | None = Field(
        None, gt=0, description="Also save when so many minutes have passed; such a save is kept until the next one."
    )
    keep_last: Positive | None = Field(
        2, description="Newest checkpoints kept, of those at multiples of `every`; null keeps all."
    )
    keep_every: Positive | None = Field(None, description="Checkpoints at multiples of this step are kept for good.")
    asynchronous: bool = Field(True, description="Write in the background while training goes on.")


class LogConfig(Section):
    """Progress and metrics. metrics.jsonl is always written."""

    every: Positive = Field(1, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events into the run folder.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project.")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(RunConfig(), description="Name and place of the run.")
    model: ModelConfig = Field(description="The transformer.")
    mesh: MeshConfig = Field(MeshConfig(), description="Devices per mesh axis.")
    data: DataConfig = Field(description="Token stores.")
    train: TrainConfig = Field(description="Length and batch.")
    quant: QuantConfig = Field(QuantConfig(), description="Types of products.")
    lora: LoraConfig | None = Field(None, description="Low-rank adapters, trained in place of the weights; null: off.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and schedule.")
    eval: EvalConfig = Field(EvalConfig(), description="Held-out evaluation.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="Saves.")
    log: LogConfig = Field(LogConfig(), description="Progress and metrics.")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        table = self.model.max_positions
        if self.model.position == "learned" and table is not None and table < self.train.seq_len:
            raise ValueError(
                f"train.seq_len={self.train.seq_len} is longer than model.max_positions={table}; raise max_positions"
            )
        lead = self.model.num_lead_layers // max(1, len(self.model.lead_pattern))
        for name, repeats in (("", self.model.num_repeats), ("leading ", lead)):
            if repeats % self.train.repeats_per_scan:
                raise ValueError(
                    f"train.repeats_per_scan={self.train.repeats_per_scan} does not divide the model's {repeats} {name}"
                    f"repeats of its layer pattern; use {divisor_at_most(repeats, self.train.repeats_per_scan)}"
                )
        if self.train.repeats_per_scan > 1 and self.train.remat == "offload":
            raise ValueError("train.repeats_per_scan and remat=offload both save the layers' inputs; use one of them")
        if self.mesh.stage > 1 and self.train.repeats_per_scan > 1:
            raise ValueError("train.repeats_per_scan is of runs without a pipeline; leave it at 1 or set mesh.stage=1")
        if self.lora is not None:
            self.lora.check(self.train.init_from or self.train.start_from, self.optim.name, self.mesh.stage)
        schedule, steps = self.optim.schedule, self.train.num_steps
        if schedule.warmup_steps + schedule.cooldown_steps > steps:
            raise ValueError(
                f"optim.schedule: warmup_steps={schedule.warmup_steps} + cooldown_steps={schedule.cooldown_steps} "
                f"is more than the run's {steps} steps; shorten them or raise train.steps"
            )
        if schedule.cooldown_steps and schedule.name != "wsd":
            raise ValueError(
                f"optim.schedule.cooldown_steps={schedule.cooldown_steps} belongs to name=wsd, but name={schedule.name}"
            )
        return self
