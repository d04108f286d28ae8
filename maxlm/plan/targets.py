"""Machines to plan for: what the catalogs know of them, by the names that users give them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from maxlm import hardware
from maxlm.config_file import ConfigError
from maxlm.machines import Machine, machine
from maxlm.plan.factors import Factors
from maxlm.plan.search import Place

TOPOLOGIES = {"TPU v4": "v4", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU7x": "tpu7x"}
"""How jax names slices, before their shape."""


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        machine: one slice, or all GPUs.
        place: its devices.
    """

    machine: Machine
    place: Place

    @property
    def name(self) -> str:
        """As the user may write it."""
        count = self.place.num_slices
        return f"{count}x{self.machine.name}" if count > 1 else self.machine.name

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.machine.num_chips * self.place.num_slices

    @property
    def whole_chip(self) -> hardware.Chip:
        """What is paid for, of which a device may be a part."""
        chip = hardware.named(self.machine.chip or "")
        assert chip
        return chip

    @property
    def topology(self) -> str | None:
        """As jax names it; None where there is no compiler for it."""
        known = TOPOLOGIES.get(self.machine.chip or "")
        return f"{known}:{self.machine.shape}" if known and self.machine.kind == "tpu" else None


def target(name: str) -> Target:
    """A machine by its name, of several slices where that begins with their number: 4xv5p-512.

    Raises:
        ConfigError: there is none, or nothing is known of its chips.
    """
    match = re.fullmatch(r"(\d{1,4})x(.+)", name)
    count, own = (int(match[1]), match[2]) if match else (1, name)
    found = machine(own)
    chip = hardware.named(found.chip) if found.chip else None
    if count < 1:
        raise ConfigError(f"--on {name}: that is no slice at all; {own} is one")
    if chip is None:
        raise ConfigError(f"--on {name}: there are no figures of its chips, so nothing can be planned for it")
    if found.tpu is None:
        return Target(found, Place(chip, (found.num_chips,), count))
    shape, each = tuple(map(int, (found.shape or "").split("x"))), found.tpu.devices
    torus = (*shape, each) if each > 1 else shape
    return Target(found, Place(chip.part(1 / each), torus, count))


def taught(where: Target, known: Mapping[str, Mapping[str, Factors]]) -> Target:
    """The machine, with what runs have taught of its chips. Args: known: of factors.read."""
    return replace(where, place=replace(where.place, factors=known.get(where.place.chip.name, {})))
