"""XLA options that make the compiled step cheaper, per chip; each is here for what it did to a compiled program.

They are given to jax.jit, so that train, bench and plan compile the same program. What users set in
train.compiler_options comes on top.
"""

from typing import Any

from maxlm.hardware import detect

Options = dict[str, bool | int | float | str]

OPTIONS: dict[str, Options] = {
    # Memory of the core that one fusion may use: products take larger tiles and are read from HBM less often. Estimated
    # cycles without and with it, by tools/bench_aot.py: 7B 1,160 M and 981 M, 7B 4,484 M and 3,733 M, 8B 3,596 M and
    # 2,601 M. Compiling takes 2 to 5 times as long; more than this gained little (7B on v5e 967 M with 65536) or lost
    # (1,002 M with 98304).
    "TPU v5e": {"xla_tpu_scoped_vmem_limit_kib": 49152},
    "TPU v5p": {"xla_tpu_scoped_vmem_limit_kib": 32768},
    "TPU v6e": {"xla_tpu_scoped_vmem_limit_kib": 98304},
}
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
