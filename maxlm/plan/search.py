"""Which mesh, microbatch and remat policy: every one that fits a machine, the fastest first, before any is compiled."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from maxlm.config import Config
from maxlm.config_file import ConfigError, parse_config
from maxlm.hardware import Chip
from maxlm.mesh import axis_sizes, check_fit
from maxlm.plan.memory import REPLICAS, Memory, predict_memory
from maxlm.plan.step_time import StepTime, predict_step_time

REMAT = ("none", "minimal", "dots", "attention", "full", "offload")
REMAT_WITHOUT_SPLASH = ("none", "dots", "full")
"""The others are these, or are for TPUs (model/stack.py)."""
MOST_TENSOR, MOST_STAGES, MOST_CONTEXT, MOST_MICROBATCHES = 16, 16, 16, 64
LONG = 16_384
"""Tokens of a sequence from which splitting it is looked at."""
ROOM = 0.95
"""Share of the memory that a plan may fill before it is compiled, for the prediction may err."""


@dataclass(frozen=True)
class Place:
    """What a plan is for.

    Attributes:
        chip: what one device can do.
        torus: dimensions of a slice in devices; one for GPUs.
        num_slices: slices joined by the data-centre network.
    """

    chip: Chip
    torus: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_devices(self) -> int:
        """Of all slices."""
        return math.prod(self.torus) * self.num_slices


@dataclass(frozen=True)
class Plan:
    """A way to run a config, and what it is predicted to take.

    Attributes:
        overrides: what is set in the config for it.
        config: with them.
        sizes: devices per logical axis.
        memory: on a device.
        time: of a step.
    """

    overrides: tuple[str, ...]
    config: Config
    sizes: Mapping[str, int]
    memory: Memory
    time: StepTime


def search(config: Config, place: Place) -> list[Plan]:
    """All ways that were found to run a config: those that fit, the fastest first; if none does, the leanest first.

    The global batch, the model and its numbers stay: what is looked for are mesh, microbatches and remat policy.

    Raises:
        ConfigError: no mesh divides model and batch.
    """
    found, refused = list[Plan](), "no number of microbatches does"
    policies = REMAT if place.chip.name.startswith("TPU") else REMAT_WITHOUT_SPLASH
    for mesh in meshes(config, place):
        for remat in ("full",) if mesh["stage"] > 1 else policies:
            plans = list[Plan]()
            try:
                plans += [_plan(config, place, mesh, grad_accum, remat) for grad_accum in microbatches(config, mesh)]
                if plans:  # what stands in a config together is checked where it is read; model_copy does not
                    parse_config(plans[0].config.model_dump(mode="json"))
            except ConfigError as error:
                refused = str(error)
                continue
            found += plans
    if not found:
        raise ConfigError(f"no mesh of {place.num_devices} devices divides this model and batch: {refused}")
    fitting = [plan for plan in found if plan.memory.peak <= ROOM * place.chip.hbm_bytes]
    return sorted(fitting, key=lambda plan: plan.time.rank) or sorted(found, key=lambda plan: plan.memory.peak)


def meshes(config: Config, place: Place) -> Iterator[dict[str, int]]:
    """Sizes of the logical axes of a slice that may make sense, as mesh.* fields."""
    model, per_slice = config.model, math.prod(place.torus)
    experts = _divisors(model.num_experts) if model.num_experts else [1]
    contexts = [n for n in _divisors(per_slice) if n <= MOST_CONTEXT] if config.train.seq_len >= LONG else [1]
    for tensor in (n for n in _divisors(per_slice) if n <= MOST_TENSOR):
        for stage in (n for n in _divisors(per_slice // tensor) if n <= min(MOST_STAGES, model.num_repeats)):
            for context in contexts:
                for expert in experts:
                    inner = tensor * stage * context * expert
                    if per_slice % inner:
                        continue
                    for fsdp in _divisors(per_slice // inner):
                        data = per_slice // inner // fsdp
                        sizes = {"data": data, "stage": stage, "fsdp": fsdp, "expert": expert}
                        yield {"slices": place.num_slices, **sizes, "context": context, "tensor": tensor}


def microbatches(config: Config, mesh: Mapping[str, int]) -> list[int]:
    """Numbers of microbatches that the global batch can be cut into on a mesh."""
    rows = math.prod(mesh["slices" if axis == "slice" else axis] for axis in REPLICAS)
    whole = config.train.batch_size // rows if config.train.batch_size % rows == 0 else 0
    if mesh["stage"] > 1:
        return [n for n in _divisors(whole) if 2 * mesh["stage"] <= n <= MOST_MICROBATCHES]
    return [n for n in _divisors(whole) if n <= MOST_MICROBATCHES]


def _plan(config: Config, place: Place, mesh: Mapping[str, int], grad_accum: int, remat: str) -> Plan:
    fields = {**mesh, "rounds": 1, "allowed": (), "fake_devices": None}
    changed = config.model_copy(
        update={
            "mesh": config.mesh.model_copy(update=fields),
            "train": config.train.model_copy(update={"grad_accum": grad_accum, "remat": remat}),
        }
    )
    sizes = axis_sizes(changed.mesh, place.num_devices)
    check_fit(changed, sizes)
    overrides = [
        f"{name}.{field}={_text(getattr(getattr(changed, name), field))}"
        for name, among in (("mesh", fields), ("train", ("grad_accum", "remat")))
        for field in among
        if getattr(getattr(changed, name), field) != getattr(getattr(config, name), field)
    ]
    memory = predict_memory(changed, sizes)
    return Plan(tuple(overrides), changed, sizes, memory, predict_step_time(changed, sizes, place.chip, place.torus))


def _text(value: object) -> str:
    return "null" if value is None else "[]" if value == () else str(value)


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
