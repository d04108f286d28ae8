"""TPU slices that are not there: devices to compile for, on any machine that has libtpu."""

import os
from typing import Any

import jax

from maxlm.config_file import ConfigError

QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
"""Keeps libtpu from looking for a TPU VM's metadata, at length, and from complaining that it finds none."""


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """Devices of a TPU slice, which programs can be compiled for and not run on. JAX itself stays on the CPU.

    Args:
        name: a chip and the slice's shape, as jax names it: v5e:4x4, v5p:2x2x4, v6e:16x16.
        num_slices: slices joined by the data-centre network.

    Raises:
        ConfigError: libtpu is not installed, or knows no such slice.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    how: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    if name.startswith("v4:"):
        how["chip_config_name"] = "megacore"  # as on the VMs: a chip's cores are one device
    try:
        return list(topologies.get_topology_desc(name, "tpu", num_slices=num_slices, **how).devices)
    except Exception as error:
        text = " ".join(str(error).split())
        if "not installed" in text:
            raise ConfigError("the TPU compiler is not here; install it: pip install 'maxlm[plan]'") from error
        raise ConfigError(
            f"{name} is no TPU slice to compile for, such as v5e:4x4 or v5p:2x2x4: {text[:200]}"
        ) from error
