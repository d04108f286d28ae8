"""Machines by the names that people use: v5p-128, v5litepod-16, v6e-16, v5p:4x4x4, h100:16, cpu:2."""

import difflib
import math
import re
from dataclasses import dataclass

from maxlm.config_file import ConfigError

MAX_CHARS = 40
"""Of a name that is looked up; no machine's is longer."""
CHIPS_PER_HOST = 4
"""Of a slice of several hosts, on every generation."""


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    Attributes:
        chip: its name in hardware.CHIPS.
        prefix: of Cloud's accelerator types, followed by a number.
        aliases: other prefixes that people write.
        cores: what the number in an accelerator type counts, per chip: 2 where it counts cores.
        devices: jax devices per chip.
        shapes: topologies of the slices that accelerator types stand for, the smallest first.
        runtime: version of the TPU VM's image; None where there are no TPU VMs, only GKE.
        gke: value of the node label cloud.google.com/gke-tpu-accelerator.
        single_host: chips of slices that are one host.
    """

    chip: str
    prefix: str
    aliases: tuple[str, ...]
    cores: int
    devices: int
    shapes: tuple[str, ...]
    runtime: str | None
    gke: str
    single_host: tuple[int, ...]


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Cloud TPU documentation: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, .../runtimes, and GKE's
# "Plan TPUs" for the labels. TPU7x is to be had in GKE alone.
TPUS = (
    Tpu("TPU v4", "v4", (), 2, 1, (*_CUBES,), "tpu-ubuntu2204-base", "tpu-v4-podslice", (4,)),
    Tpu(
        *("TPU v5e", "v5litepod", ("v5e", "v5lite"), 1, 1, _SQUARES),
        *("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", (1, 4, 8)),
    ),
    Tpu(
        *("TPU v5p", "v5p", (), 2, 1, (*_CUBES, "16x16x16", "16x16x24")),
        *("v2-alpha-tpuv5", "tpu-v5p-slice", (4,)),
    ),
    Tpu("TPU v6e", "v6e", (), 1, 1, _SQUARES, "v2-alpha-tpuv6e", "tpu-v6e-slice", (1, 4, 8)),
    Tpu("TPU7x", "tpu7x", ("v7x",), 2, 2, _CUBES, None, "tpu7x", (4,)),
)

GPUS_PER_NODE = 8
# name people use: (name in hardware.CHIPS, GKE's node label cloud.google.com/gke-accelerator, SkyPilot's name)
GPUS = {
    "a100": ("A100 40GB", "nvidia-tesla-a100", "A100"),
    "a100-80gb": ("A100 80GB", "nvidia-a100-80gb", "A100-80GB"),
    "h100": ("H100", "nvidia-h100-80gb", "H100"),
    "h200": ("H200", "nvidia-h200-141gb", "H200"),
    "b200": ("B200", "nvidia-b200", "B200"),
    "mi300x": ("MI300X", None, "MI300X"),
}


@dataclass(frozen=True)
class Machine:
    """One slice of TPUs, a number of GPUs, or hosts without accelerators.

    Attributes:
        name: as Cloud or its users write it: v5p-128, h100:16, cpu:2.
        kind: "tpu", "gpu" or "cpu".
        chip: name in hardware.CHIPS; None for CPUs.
        num_chips: chips, or hosts of CPUs.
        num_hosts: hosts, each of which runs one process.
        num_devices: jax devices; for CPUs one per host.
        shape: topology of a TPU slice, such as "4x4x4".
        tpu: the generation of a TPU slice.
    """

    name: str
    kind: str
    chip: str | None
    num_chips: int
    num_hosts: int
    num_devices: int
    shape: str | None = None
    tpu: Tpu | None = None

    @property
    def chips_per_host(self) -> int:
        """Chips of one host."""
        return self.num_chips // self.num_hosts


def machine(name: str) -> Machine:
    """Looks up a machine.

    Args:
        name: v5p-128 and v4-128 count cores, two per chip; v5litepod-16 (v5e-16) and v6e-16 count chips; v5p:4x4x4
            says the slice's shape; h100:16 and cpu:2 the number of GPUs and of hosts without any.

    Raises:
        ConfigError: there is no such machine; names the nearest.
    """
    name = name if len(name) <= MAX_CHARS else f"{name[:MAX_CHARS]}..."
    kind, separator, size = name.lower().rpartition(":" if ":" in name else "-")
    tpu = next((t for t in TPUS if kind in (t.prefix, *t.aliases)), None)
    if separator and tpu is not None:
        shapes = {name_of(tpu, shape): shape for shape in tpu.shapes}
        shape = size if size in tpu.shapes else shapes.get(f"{tpu.prefix}-{size}")
        if shape:
            return _slice(tpu, shape)
    if separator and size.isdecimal() and 0 < int(size) < 10**6:
        if kind == "cpu":
            return Machine(f"cpu:{size}", "cpu", None, int(size), int(size), int(size))
        if kind in GPUS and (int(size) in (1, 2, 4, 8) or int(size) % GPUS_PER_NODE == 0):
            hosts = max(1, int(size) // GPUS_PER_NODE)
            return Machine(f"{kind}:{int(size)}", "gpu", GPUS[kind][0], int(size), hosts, int(size))
    near = ", ".join(_near(name.lower(), kind, tpu))
    raise ConfigError(f"--on {name}: there is no such machine; the nearest names are {near}")


def name_of(tpu: Tpu, shape: str) -> str:
    """Cloud's accelerator type of a slice, such as v5p-128 for 4x4x4."""
    return f"{tpu.prefix}-{_size(shape) * tpu.cores}"


def _slice(tpu: Tpu, shape: str) -> Machine:
    chips = _size(shape)
    hosts = 1 if chips in tpu.single_host else chips // CHIPS_PER_HOST
    return Machine(name_of(tpu, shape), "tpu", tpu.chip, chips, hosts, chips * tpu.devices, shape, tpu)


def _size(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _near(name: str, kind: str, tpu: Tpu | None) -> list[str]:
    """Names like a wrong one: of the same generation if that was right."""
    if tpu is not None:
        sizes = {f"{kind}-{_size(shape) * tpu.cores}": _size(shape) for shape in tpu.shapes}
        size = name[len(kind) + 1 :]
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
            chips = _size(size) if "x" in size else int(size) / tpu.cores
            return sorted(sizes, key=lambda n: abs(math.log(sizes[n]) - math.log(chips)))[:3]
        known = list(sizes)
    elif kind in GPUS:
        known = [f"{kind}:{n}" for n in (1, 2, 4, 8, 16, 32)]
    else:
        known = [f"{p}-{_size(s) * t.cores}" for t in TPUS for p in (t.prefix, *t.aliases) for s in t.shapes]
        known += [f"{gpu}:{n}" for gpu in GPUS for n in (1, 2, 4, 8, 16, 32, 64)]
    return difflib.get_close_matches(name, known, 3, 0.5) or [*known[:2], known[-1]]
