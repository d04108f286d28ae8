"""What runs have measured of a kind of hardware (calibrate.py), and a step's time by the formulas with it.

Where the catalog has no figures, of CPUs among others, the formulas' unit of time is arbitrary, and these factors alone
give it a meaning.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from maxlm import hardware, storage
from maxlm.config import Config
from maxlm.config_file import ConfigError
from maxlm.hardware import Chip
from maxlm.plan.memory import MOMENTS, SIZES, Share, kept_per_repeat
from maxlm.plan.step_time import StepTime, again, predict_step_time

FILE_VARIABLE = "MAXLM_CALIBRATION"
SPREAD = 0.25
"""How far a prediction may be off, relatively, where too few runs tell."""

_Factor = Annotated[float, Field(ge=0, le=1e12)]


class Factors(BaseModel):
    """What is known of a kind of hardware, as the user's file holds it.

    Attributes:
        products: measured time over that of the formulas; so are attention, memory and wires.
        overhead_s: seconds for each layer and microbatch.
        num_runs: that it was fitted to.
        error: mean of their relative errors with these factors.
        left_out: the same where each is predicted from the others alone; None for fewer than TO_LEAVE_ONE_OUT.
        spread: how far a prediction may be off, relatively.
        date: of the fit, YYYY-MM-DD.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    products: _Factor
    attention: _Factor
    memory: _Factor
    wires: _Factor
    overhead_s: _Factor
    num_runs: Annotated[int, Field(ge=1, lt=2**31)]
    error: _Factor
    left_out: _Factor | None
    spread: _Factor
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]

    @property
    def basis(self) -> str:
        """What a prediction with them rests on."""
        return f"formulas, fitted to {self.num_runs} run{'s' * (self.num_runs > 1)} on {self.date}"

    def applied(self, time: StepTime, config: Config, sizes: Mapping[str, int], chip: Chip) -> StepTime:
        """A step's time by the formulas as it was measured to be. Args as predict's."""
        core = time.products + time.attention + time.memory
        fitted = dataclasses.replace(
            time,
            products=self.products * time.products,
            attention=self.attention * time.attention,
            memory=self.memory * time.memory,
            wires={axis: s if s is None else self.wires * s for axis, s in time.wires.items()},
            overhead=self.overhead_s * visits(config, sizes, chip),
        )
        longer = (fitted.products + fitted.attention + fitted.memory) / core if core else 1.0
        return dataclasses.replace(fitted, bubble=longer * time.bubble)


def products_type(config: Config) -> str:
    """Type of a run's products, by which factors are kept: int8, fp8, or the compute dtype."""
    return " and ".join(config.quant.kinds) or config.model.dtype


def of_run(known: Mapping[str, Factors], config: Config, others_do: bool) -> Factors | None:
    """What runs have taught of a chip for a run.

    Args:
        known: by type of the products.
        config: the run.
        others_do: of quantized products that no run has taught those of the compute dtype are taken, with a range that
            is no closer than that of too few runs: the formulas know how the types' products differ.
    """
    own = known.get(products_type(config))
    if own is not None or not others_do or config.model.dtype not in known:
        return own
    other = known[config.model.dtype]
    return other.model_copy(update={"spread": max(SPREAD, other.spread)})


_FILE = TypeAdapter(dict[str, dict[str, Factors]])


def chip_of(name: str, share: float) -> tuple[Chip, bool]:
    """What one device can do, and whether these are known figures.

    Args:
        name: hardware.Chip.name, or anything else: then figures are arbitrary, of the size of a CPU's.
        share: of a chip, or of a host's cores, that a device is.
    """
    chip = hardware.named(name)
    if chip is not None:
        return chip.part(share), True
    unknown = "figures are arbitrary"
    rates = {"bf16_flops": 1e11, "hbm_bytes_per_s": 1e10, "interconnect_bytes_per_s": 1e10}
    empty = {"int8_ops": None, "fp8_flops": None, "hbm_bytes": 0, "watts": None}
    return Chip(name, (), **rates, **empty, sources=unknown).part(share), False


def predict(config: Config, sizes: Mapping[str, int], chip: Chip, known: bool, torus: Sequence[int]) -> StepTime:
    """A step's time by the formulas.

    Args:
        config: the run, which fits the mesh.
        sizes: devices per logical axis, from mesh.axis_sizes.
        chip: what one device can do; so is `known`, from chip_of.
        known: whether its figures are.
        torus: dimensions of a slice; one where there is no torus.
    """
    time = predict_step_time(config, sizes, chip, torus)
    if known:
        return time
    # what hides behind products depends on rates that nobody knows, and CPUs copy with the cores that compute
    bare = predict_step_time(config, sizes, dataclasses.replace(chip, bf16_flops=math.inf), torus)
    memory = _traffic(Share(config, sizes)) / chip.hbm_bytes_per_s
    return dataclasses.replace(time, wires=bare.wires, memory=memory)


def _traffic(share: Share) -> float:
    """Bytes that a device moves in a step where nothing is known of what a compiler fuses, as it is of TPUs.

    Passes over arrays of a layer, forward, again, and twice as many backward: of the residual stream those of two norms
    and two sums, of heads rotations and copies, of an MLP what its products write and read and its activation between;
    what is kept for the backward pass is cleared, written, copied and read. An adapter reads what its weight reads and
    adds to what that gives, and backward the same with gradients. Then logits, sums of gradients, the update.
    """
    config, model, train = share.config, share.config.model, share.config.train
    size, tensor, micro = SIZES[model.dtype], share.sizes["tensor"], train.grad_accum
    heads = (model.num_heads / tensor + model.kv_heads / share.kv_split) * model.head_size
    visited = (model.experts_per_token or 0) + model.num_shared_experts
    width = (model.d_ff if model.num_experts is None else visited * model.expert_width) / tensor
    more = again(config, share.sizes)
    layer = size * (3 + more) * (12 * model.d_model + 6 * heads + 8 * width)
    adapters = size * ((6 + more) * share.adapted("a") + (6 + 4 * more) * share.adapted("b"))
    logits = 4 * 4 * model.padded_vocab / (tensor * share.sizes["stage"])
    per_token = layer * share.layers + adapters + 4 * kept_per_repeat(config, share) * share.repeats + logits
    gradient, moments = SIZES[train.grad_dtype], MOMENTS[config.optim.name] * SIZES[config.optim.state_dtype]
    resting = share.resting(share.trained)
    per_weight = 2 * 4 + 2 * moments + gradient + 3 * gradient * (micro - 1)
    return micro * share.tokens * per_token + resting * per_weight


def visits(config: Config, sizes: Mapping[str, int], chip: Chip) -> float:
    """Layers times microbatches of a device; of all that share a host's cores, since these launch them in turn."""
    together = 1.0 if hardware.named(chip.name) else 1 / chip.share
    return config.train.grad_accum * Share(config, sizes).layers * together


# ---- the user's file


def file_path() -> str | None:
    """Where factors are kept: $MAXLM_CALIBRATION, else maxlm/calibration.json in the user's folder of settings.

    Returns:
        The path; None where the variable is set to nothing.
    """
    if (given := os.environ.get(FILE_VARIABLE)) is not None:
        return given or None
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(folder, "maxlm", "calibration.json")


def read() -> dict[str, dict[str, Factors]]:
    """Factors by hardware and type; none where there is no file.

    Raises:
        ConfigError: the file is damaged; says what to do about it.
        StorageError: it cannot be read.
    """
    path = file_path()
    try:
        if path is None:
            return {}
        return _FILE.validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ConfigError(
            f"{path} is damaged ({where + ': ' if where else ''}{first['msg'][:100]}); remove it, and calibrate again "
            "with: maxlm plan --calibrate RUN"
        ) from None


def write(found: Mapping[tuple[str, str], Factors]) -> str | None:
    """Adds factors to the user's file, in place of those of the same hardware and type.

    Returns:
        The file; None where the user wants none.

    Raises:
        ConfigError: it is damaged.
        StorageError: it cannot be read or written.
    """
    path, known = file_path(), read()
    if path is None:
        return None
    for (name, dtype), factors in found.items():
        known.setdefault(name, {})[dtype] = factors
    storage.write_bytes(path, _FILE.dump_json(known, indent=1))
    return path
