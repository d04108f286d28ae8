"""Which mesh, microbatch and remat policy: every one that fits a machine, the fastest first, before any is compiled.

On demand also what changes the numbers of a run: the type of the optimizer's state, and quantized products.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from maxlm.config import AXES, Config
from maxlm.config_file import ConfigError, parse_config
from maxlm.hardware import Chip
from maxlm.mesh import axis_sizes, check_fit
from maxlm.plan.factors import Factors, of_run
from maxlm.plan.memory import REPLICAS, Memory, predict_memory
from maxlm.plan.step_time import INT8, StepTime, predict_step_time

REMAT = ("none", "minimal", "dots", "attention", "full", "offload")
REMAT_WITHOUT_SPLASH = ("none", "dots", "full")
"""The others are these, or are for TPUs (model/stack.py)."""
MOST_TENSOR, MOST_STAGES, MOST_CONTEXT, MOST_MICROBATCHES = 16, 16, 16, 64
ROUNDS = (1, 2, 4)
"""Shares of layers that a pipeline's stage may have."""
LONG = 16_384
"""Tokens of a sequence from which splitting it is looked at, and not only where nothing else fits."""
STATE_DTYPES = ("float32", "bfloat16", "int8")
"""Types of the optimizer's state, the widest first."""
NUMERICS = {"state_dtype": ("optim", "state_dtype"), "quant": ("quant", "mode")}
"""What may change the numbers of a run, by the name that the user gives it: section and field."""
WORTH = 1.01
"""A step has to be so many times as long before the numbers of a run are changed for it."""
SEARCHED = {
    "mesh": ("slices", *AXES, "rounds", "allowed", "fake_devices"),
    "train": ("grad_accum", "remat"),
    **{section: (field,) for section, field in NUMERICS.values()},
}
"""Fields that plans may set, by section."""
_NUMBERS = tuple(f"{section}.{field}=" for section, field in NUMERICS.values())
ROOM = 0.95
"""Share of the memory that a plan may fill before it is compiled, for the prediction may err."""


@dataclass(frozen=True)
class Place:
    """What a plan is for.

    Attributes:
        chip: what one device can do.
        torus: dimensions of a slice in devices; one for GPUs.
        num_slices: slices joined by the data-centre network.
        factors: what runs have taught of the chip, by type of the products.
    """

    chip: Chip
    torus: tuple[int, ...]
    num_slices: int = 1
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        """Of all slices."""
        return math.prod(self.torus) * self.num_slices

    def step_time(self, config: Config, sizes: Mapping[str, int]) -> StepTime:
        """Predicts a step: by the formulas, and by what runs have taught. Args as predict_step_time's."""
        time = predict_step_time(config, sizes, self.chip, self.torus)
        taught = self.taught(config)
        return time if taught is None else taught.applied(time, config, sizes, self.chip)

    def taught(self, config: Config) -> Factors | None:
        """What runs have taught of the chip, for a run."""
        return of_run(self.factors, config, others_do=True)

    def fits(self, memory: Memory) -> bool:
        """Whether a device has room for it."""
        return memory.peak <= ROOM * self.chip.hbm_bytes


@dataclass(frozen=True)
class Plan:
    """A way to run a config, and what it is predicted to take.

    Attributes:
        overrides: what is set in the config for it.
        config: with them.
        place: where.
        sizes: devices per logical axis.
        memory: on a device.
    """

    overrides: tuple[str, ...]
    config: Config
    place: Place
    sizes: Mapping[str, int]
    memory: Memory

    @functools.cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return self.place.step_time(self.config, self.sizes)

    @property
    def rank(self) -> float:
        """What plans are compared by: time, where other numbers than the config's have to be WORTH it."""
        return self.time.rank * WORTH ** sum(text.startswith(_NUMBERS) for text in self.overrides)


def search(config: Config, place: Place, numerics: Collection[str] = ()) -> list[Plan]:
    """All ways that were found to run a config: those that fit, the fastest first; if none does, the leanest first.

    The global batch and the model stay: what is looked for are mesh, microbatches and remat policy. Sequences that are
    not LONG are split where nothing fits otherwise.

    Args:
        config: the run.
        place: where.
        numerics: names of NUMERICS that may change as well; the others stay as they are, too.

    Raises:
        ConfigError: no mesh divides model and batch.
    """
    found, refused = list[Plan](), "no number of microbatches does"
    for split in (False, True) if config.train.seq_len < LONG else (True,):
        for own in variants(config, place.chip, numerics):
            for mesh in meshes(own, place, split):
                plans, problem = _with_mesh(config, own, place, mesh)
                found += plans
                refused = problem or refused
        if fitting := [plan for plan in found if place.fits(plan.memory)]:
            return sorted(fitting, key=lambda plan: plan.rank)
    if not found:
        raise ConfigError(f"no mesh of {place.num_devices} devices divides this model and batch: {refused}")
    return sorted(found, key=lambda plan: plan.memory.peak)


def variants(config: Config, chip: Chip, numerics: Collection[str]) -> list[Config]:
    """The config, and what becomes of it with other numbers that a chip may gain from.

    Args:
        config: the run.
        chip: what one device can do. int8 products are tried where the formulas know a gain.
        numerics: names of NUMERICS that may change.
    """
    state, mode = config.optim.state_dtype, config.quant.mode
    states = STATE_DTYPES[STATE_DTYPES.index(state) :] if "state_dtype" in numerics else (state,)
    modes = ("none", "int8") if "quant" in numerics and mode == "none" and chip.name in INT8 else (mode,)
    optims = [config.optim.model_copy(update={"state_dtype": value}) for value in states]
    quants = [config.quant.model_copy(update={"mode": value}) for value in modes]
    return [config.model_copy(update={"optim": o, "quant": q}) for o in optims for q in quants]


def meshes(config: Config, place: Place, split: bool) -> Iterator[dict[str, int]]:
    """Sizes of the logical axes of a slice that may make sense, as mesh.* fields.

    Args:
        config: the run.
        place: where.
        split: sequences may be.
    """
    repeats, per_slice = config.model.num_repeats, math.prod(place.torus)
    parts = _divisors(per_slice)
    tensors, stages = [n for n in parts if n <= MOST_TENSOR], [n for n in parts if n <= min(MOST_STAGES, repeats)]
    contexts = [n for n in parts if n <= MOST_CONTEXT] if split else [1]
    experts = _divisors(config.model.num_experts or 1)
    for tensor, stage, rounds, context, expert, fsdp in itertools.product(
        tensors, stages, ROUNDS, contexts, experts, parts
    ):
        data, left = divmod(per_slice, tensor * stage * context * expert * fsdp)
        if left == 0 and (rounds == 1 or (stage > 1 and stage * rounds <= repeats)):
            within = {"data": data, "stage": stage, "fsdp": fsdp, "expert": expert, "context": context}
            yield {"slices": place.num_slices, **within, "tensor": tensor, "rounds": rounds}


def microbatches(config: Config, mesh: Mapping[str, int]) -> list[int]:
    """Numbers of microbatches that the global batch can be cut into on a mesh."""
    rows = math.prod(mesh["slices" if axis == "slice" else axis] for axis in REPLICAS)
    whole = config.train.batch_size // rows if config.train.batch_size % rows == 0 else 0
    found, stages, rounds = [n for n in _divisors(whole) if n <= MOST_MICROBATCHES], mesh["stage"], mesh["rounds"]
    if stages == 1:
        return found
    # of several rounds each group of as many microbatches as stages goes through all, so part of a group idles
    return [n for n in found if n * rounds >= 2 * stages and (rounds == 1 or n % stages == 0)]


def _with_mesh(base: Config, own: Config, place: Place, mesh: Mapping[str, int]) -> tuple[list[Plan], str | None]:
    """Plans with a mesh, by policies and microbatches, and what the last that cannot be was refused for."""
    found, refused = list[Plan](), None
    policies = REMAT if place.chip.name.startswith("TPU") else REMAT_WITHOUT_SPLASH
    for remat in ("full",) if mesh["stage"] > 1 else policies:
        if remat == "offload" and any(place.fits(plan.memory) for plan in found):
            continue  # what it takes to and from the host is not known: only where there is no other way
        try:
            plans = [_plan(base, own, place, mesh, grad_accum, remat) for grad_accum in microbatches(own, mesh)]
            if plans:  # what stands in a config together is checked where it is read; model_copy does not
                parse_config(plans[0].config.model_dump(mode="json"))
        except ConfigError as error:
            refused = str(error)
            continue
        found += plans
    return found, refused


def _plan(base: Config, own: Config, place: Place, mesh: Mapping[str, int], grad_accum: int, remat: str) -> Plan:
    """Args: base: what overrides are of. own: with its numbers."""
    fields = {**mesh, "allowed": (), "fake_devices": None}
    changed = own.model_copy(
        update={
            "mesh": own.mesh.model_copy(update=fields),
            "train": own.train.model_copy(update={"grad_accum": grad_accum, "remat": remat}),
        }
    )
    sizes = axis_sizes(changed.mesh, place.num_devices)
    check_fit(changed, sizes)
    overrides = [
        f"{section}.{field}={_text(getattr(getattr(changed, section), field))}"
        for section, among in SEARCHED.items()
        for field in among
        if getattr(getattr(changed, section), field) != getattr(getattr(base, section), field)
    ]
    return Plan(tuple(overrides), changed, place, sizes, predict_memory(changed, sizes))


def _text(value: object) -> str:
    return "null" if value is None else "[]" if value == () else str(value)


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
