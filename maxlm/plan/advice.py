"""What a plan tells beside its rows: what other numbers would bring, and where nothing fits, why and what would do."""

from collections.abc import Collection, Iterator

from maxlm.config import AXES, Config
from maxlm.config_file import ConfigError
from maxlm.machines import GPUS_PER_NODE, name_of
from maxlm.mesh import axis_sizes
from maxlm.plan.factors import products_type
from maxlm.plan.memory import Memory, predict_memory
from maxlm.plan.search import NUMERICS, ROOM, WORTH, Place, Plan, search, variants
from maxlm.plan.targets import Target, target

SMALL = 0.05 * 2**30
"""Bytes of a part below which it is not told."""
GPUS = (1, 2, 4, *range(GPUS_PER_NODE, 512, GPUS_PER_NODE), 512, 1024, 2048, 4096)
"""Numbers of GPUs among which the smallest that would do is looked for."""


def gains(config: Config, place: Place, best: Plan, numerics: Collection[str]) -> dict[str, float]:
    """What single changes of a run's numbers would save, by formulas.

    Args:
        config: the run.
        place: where.
        best: its fastest plan.
        numerics: names of search.NUMERICS that may change already, and are not tried.

    Returns:
        Share of the step's time, by setting (optim.state_dtype=bfloat16), where it is WORTH it.
    """
    found = {setting: plan.time.rank / best.time.rank for setting, plan in _changed(config, place, numerics) if plan}
    return {setting: 1 - share for setting, share in found.items() if share * WORTH <= 1}


def caveats(config: Config, where: Target) -> list[str]:
    """What is to be said of the formulas on a machine: which runs they were fitted to, and products without a rate."""
    chip, asked, known = where.place.chip.name, products_type(config), where.place.factors
    fitted, dtype = where.place.taught(config), config.model.dtype
    if fitted is not None:
        return [f"{chip}, {asked}: by {fitted.basis}" + ("" if asked in known else f", of {dtype} products")]
    unknown = {"fp8", *({"float32"} if where.machine.tpu is None else ())} & {*config.quant.kinds, dtype}
    return [f"{chip}: {kind} products are taken for bfloat16 ones; their rate is unknown" for kind in sorted(unknown)]


def misfit(config: Config, where: Target, least: Plan, numerics: Collection[str]) -> str:
    """A sentence on a model that does not fit: by how much, what uses the memory, and what would do.

    Args:
        config: the run.
        where: the machine.
        least: the leanest plan there.
        numerics: names of search.NUMERICS that may change.
    """
    room, peak = ROOM * where.place.chip.hbm_bytes, least.memory.peak
    text = (
        f"{where.name}: the model does not fit: the leanest plan ({' '.join(least.overrides)}) needs "
        f"{peak / 2**30:.1f} GiB on a chip, {(peak - room) / 2**30:.1f} more than the {room / 2**30:.1f} of "
        f"{where.place.chip.hbm_bytes / 2**30:.0f} that a plan may fill ({uses(least.memory)})"
    )
    others = [setting for setting, plan in _changed(config, where.place, numerics) if plan]
    here = f"; here it would fit with {' or '.join(others)}: see --numerics" if others else ""
    return text + would_do(config, where, numerics) + here


def uses(memory: Memory) -> str:
    """What a device's memory is used for, in GiB, the most first."""
    parts = sorted(memory.parts().items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts if size >= SMALL)


def would_do(config: Config, where: Target, numerics: Collection[str]) -> str:
    """The end of a sentence on a machine that will not do: which one would. Args as smallest."""
    found = smallest(config, where, numerics)
    if found is None:
        return f"; no {'slice' if where.machine.tpu else 'number of GPUs'} of this kind would do with this batch"
    return f"; {found.name} is the smallest of its kind that would do, {found.num_chips} chips"


def smallest(config: Config, where: Target, numerics: Collection[str]) -> Target | None:
    """The machine with the fewest chips, of the kind of another one, on which a run fits; None where there is none.

    Args:
        config: the run.
        where: tells the kind. Of several slices, one and as many are looked at.
        numerics: names of search.NUMERICS that may change.
    """
    state_bytes = min(_state_bytes(own) for own in variants(config, where.place.chip, numerics))
    for other in _of_kind(where):
        place = other.place
        if state_bytes * place.num_slices > ROOM * place.chip.hbm_bytes * place.num_devices:
            continue  # a slice holds all of it, however it is split
        try:
            if place.fits(search(config, place, numerics)[0].memory):
                return other
        except ConfigError:
            continue
    return None


def _of_kind(where: Target) -> Iterator[Target]:
    """Machines of a kind, that with the fewest chips first."""
    tpu, counts = where.machine.tpu, {1, where.place.num_slices}
    if tpu is None:
        names = [f"{where.machine.name.partition(':')[0]}:{n}" for n in GPUS]
    else:
        names = [f"{count}x{name_of(tpu, shape)}" for count in counts for shape in tpu.shapes]
    yield from sorted(map(target, names), key=lambda other: (other.num_chips, other.place.num_slices))


def _changed(config: Config, place: Place, numerics: Collection[str]) -> Iterator[tuple[str, Plan | None]]:
    """Settings that change one of the numbers, each with its fastest plan; None where nothing fits."""
    for name, (section, field) in NUMERICS.items():
        for own in [] if name in numerics else variants(config, place.chip, {name})[1:]:
            try:
                plan = search(own, place, numerics)[0]
            except ConfigError:
                continue
            setting = f"{section}.{field}={getattr(getattr(own, section), field)}"
            yield setting, plan if place.fits(plan.memory) else None


def _state_bytes(config: Config) -> float:
    """Of weights and optimizer, all together."""
    mesh = config.mesh.model_copy(update={**dict.fromkeys(AXES, 1), "slices": 1, "rounds": 1})
    memory = predict_memory(config.model_copy(update={"mesh": mesh}), axis_sizes(mesh, 1))
    return memory.weights + memory.optimizer
