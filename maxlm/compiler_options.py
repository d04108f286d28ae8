"""XLA options that make the compiled step cheaper, per chip; each is here for what it did to a compiled program.

They are given to jax.jit, so that train, bench and plan compile the same program. What users set in
train.compiler_options comes on top; XLA_FLAGS and LIBTPU_INIT_ARGS count as ever.
"""

from typing import Any

from maxlm.hardware import detect

Options = dict[str, bool | int | float | str]

OPTIONS: dict[str, Options] = {}
"""By hardware.Chip.name."""


def compiler_options(device: Any, more: Options) -> Options | None:
    """Options for programs of a device.

    Args:
        device: a jax device, of a topology or real.
        more: set by the user, over those of the table.

    Returns:
        What jax.jit takes; None for none, which leaves the choice to XLA.
    """
    chip = detect(device)
    return {**(OPTIONS.get(chip.name, {}) if chip else {}), **more} or None
