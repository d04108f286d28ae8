"""The catalog of accelerators: what one chip can do at most, and where each number comes from.

Figures are dense (no structured sparsity) and per chip. Vendors state GPU memory in GB; it is read as 10**9 bytes,
a little less than what the driver reports, so that plans err on the safe side.
"""

import dataclasses
from typing import Any

_CLOUD = "Cloud TPU documentation, docs.cloud.google.com/tpu/docs/"
_TPU_POWER = "power is not published"
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, or of the part of it that one JAX device is (see detect).

    Attributes:
        name: what people call it.
        device_kinds: `device.device_kind` strings by which JAX reports it.
        bf16_flops: dense bfloat16 matmul rate, in FLOP/s.
        int8_ops: dense int8 matmul rate, in op/s; None where there is no native int8.
        fp8_flops: dense fp8 matmul rate, in FLOP/s; None where there is no native fp8.
        hbm_bytes: memory, in bytes.
        hbm_bytes_per_s: memory bandwidth, in bytes/s.
        interconnect_bytes_per_s: chip-to-chip bandwidth over all links, both directions together, in bytes/s.
        num_links: links of a TPU to its neighbours in the torus; None where it is not known, and for GPUs, whose
            switches know no neighbours.
        watts: maximum power of the chip, in W; None where it is not published.
        sources: where the numbers come from.
        flops_per_cycle: bf16 FLOPs of a TPU's matrix units in a cycle of the TPU compiler's estimates; None where
            it gives none.
        cores: cores per chip, where JAX may show them as devices of their own; see detect.
        share: part of the chip that these figures are for; 1 for the catalog's entries.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    int8_ops: float | None
    fp8_flops: float | None
    hbm_bytes: int
    hbm_bytes_per_s: float
    interconnect_bytes_per_s: float
    watts: float | None
    sources: str
    flops_per_cycle: int | None = None
    cores: int = 1
    num_links: int | None = None
    share: float = 1.0

    @property
    def link_bytes_per_s(self) -> float | None:
        """Bandwidth of one link in one direction, in bytes/s; None where the number of links is not known."""
        return self.num_links and self.interconnect_bytes_per_s / self.num_links / 2

    def peak(self, dtype: Any) -> float | None:
        """Matmul rate for operands of a type, in FLOP/s (or op/s for int8).

        Args:
            dtype: a name such as "bfloat16", or a numpy or jax dtype.

        Returns:
            The rate, or None where the catalog has none: float32 among others, whose rate depends on how many
            bfloat16 or TF32 passes the matmul precision asks for.
        """
        name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", "")
        if name.startswith("float8"):
            return self.fp8_flops
        return {"bfloat16": self.bf16_flops, "int8": self.int8_ops}.get(name)

    def part(self, share: float) -> "Chip":
        """Figures of a part of the chip, such as half of it, which one JAX device may be."""
        if share == 1:
            return self
        return dataclasses.replace(
            self,
            share=share,
            bf16_flops=self.bf16_flops * share,
            int8_ops=_scaled(self.int8_ops, share),
            fp8_flops=_scaled(self.fp8_flops, share),
            hbm_bytes=int(self.hbm_bytes * share),
            hbm_bytes_per_s=self.hbm_bytes_per_s * share,
            interconnect_bytes_per_s=self.interconnect_bytes_per_s * share,
            watts=_scaled(self.watts, share),
            flops_per_cycle=self.flops_per_cycle and int(self.flops_per_cycle * share),
        )


CHIPS: tuple[Chip, ...] = (
    Chip(
        name="TPU v4",
        device_kinds=("TPU v4",),
        bf16_flops=275e12,
        int8_ops=275e12,
        fp8_flops=None,
        hbm_bytes=32 * GiB,
        hbm_bytes_per_s=1.23e12,
        interconnect_bytes_per_s=6 * 90e9,
        num_links=6,
        watts=192,
        sources=f"{_CLOUD}v4 (FLOP/s, HBM, 192 W maximum); links: 6 x 45 GB/s each way, jax-ml.github.io/scaling-book",
        cores=2,
        flops_per_cycle=2**18,
    ),
    Chip(
        name="TPU v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        bf16_flops=197e12,
        int8_ops=394e12,
        fp8_flops=None,
        hbm_bytes=16 * GiB,
        hbm_bytes_per_s=8.2e11,
        interconnect_bytes_per_s=4 * 90e9,
        num_links=4,
        watts=None,
        sources=f"{_CLOUD}v5e (which rounds the links to 400 GB/s); HBM rate: jax tpu_info; links: 4 x 45 GB/s each "
        f"way, jax-ml.github.io/scaling-book; {_TPU_POWER}",
        flops_per_cycle=2**17,
    ),
    Chip(
        name="TPU v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        bf16_flops=459e12,
        int8_ops=918e12,
        fp8_flops=459e12,
        hbm_bytes=95 * GiB,
        hbm_bytes_per_s=2.765e12,
        interconnect_bytes_per_s=1200e9,
        num_links=6,
        watts=None,
        sources=f"{_CLOUD}v5p (1200 GB/s over 6 links; jax tpu_info has 2460 GB/s of HBM); int8: jax tpu_info; "
        f"{_TPU_POWER}",
        cores=2,
        flops_per_cycle=2**18,
    ),
    Chip(
        name="TPU v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        bf16_flops=918e12,
        int8_ops=1836e12,
        fp8_flops=918e12,
        hbm_bytes=32 * GiB,
        hbm_bytes_per_s=1.638e12,
        interconnect_bytes_per_s=800e9,
        num_links=4,
        watts=None,
        sources=f"{_CLOUD}v6e (800 GB/s over 4 links); {_TPU_POWER}",
        flops_per_cycle=2**19,
    ),
    Chip(
        name="TPU7x",
        device_kinds=("TPU7x",),
        bf16_flops=2307e12,
        int8_ops=None,
        fp8_flops=4614e12,
        hbm_bytes=192 * GiB,
        hbm_bytes_per_s=7.38e12,
        interconnect_bytes_per_s=1200e9,
        watts=None,
        sources=f"{_CLOUD}tpu7x; number of links not known; {_TPU_POWER}",
        cores=2,
    ),
    Chip(
        name="A100 40GB",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        bf16_flops=312e12,
        int8_ops=624e12,
        fp8_flops=None,
        hbm_bytes=40 * 10**9,
        hbm_bytes_per_s=1.555e12,
        interconnect_bytes_per_s=600e9,
        watts=400,
        sources="NVIDIA A100 data sheet, SXM column",
    ),
    Chip(
        name="A100 80GB",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        bf16_flops=312e12,
        int8_ops=624e12,
        fp8_flops=None,
        hbm_bytes=80 * 10**9,
        hbm_bytes_per_s=2.039e12,
        interconnect_bytes_per_s=600e9,
        watts=400,
        sources="NVIDIA A100 data sheet, SXM column",
    ),
    Chip(
        name="H100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        bf16_flops=989e12,
        int8_ops=1979e12,
        fp8_flops=1979e12,
        hbm_bytes=80 * 10**9,
        hbm_bytes_per_s=3.35e12,
        interconnect_bytes_per_s=900e9,
        watts=700,
        sources="NVIDIA H100 data sheet, SXM column, half of its figures with sparsity; int8: recalled",
    ),
    Chip(
        name="H200",
        device_kinds=("NVIDIA H200",),
        bf16_flops=989e12,
        int8_ops=1979e12,
        fp8_flops=1979e12,
        hbm_bytes=141 * 10**9,
        hbm_bytes_per_s=4.8e12,
        interconnect_bytes_per_s=900e9,
        watts=700,
        sources="NVIDIA H200 data sheet, SXM column, half of its figures with sparsity; int8: recalled",
    ),
    Chip(
        name="B200",
        device_kinds=("NVIDIA B200",),
        bf16_flops=2250e12,
        int8_ops=4500e12,
        fp8_flops=4500e12,
        hbm_bytes=180 * 10**9,
        hbm_bytes_per_s=8e12,
        interconnect_bytes_per_s=1800e9,
        watts=1000,
        sources="NVIDIA DGX B200 data sheet divided by 8, half of its figures with sparsity; 180 of 192 GB are usable",
    ),
    Chip(
        name="MI300X",
        device_kinds=("AMD Instinct MI300X", "AMD Instinct MI300X VF"),
        bf16_flops=1307e12,
        int8_ops=2615e12,
        fp8_flops=2615e12,
        hbm_bytes=192 * 10**9,
        hbm_bytes_per_s=5.3e12,
        interconnect_bytes_per_s=896e9,
        watts=750,
        sources="AMD Instinct MI300X data sheet; int8: recalled",
    ),
)


def find(device_kind: str) -> Chip | None:
    """The whole chip that JAX reports as device_kind, or None if the catalog does not have it."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def named(name: str) -> Chip | None:
    """The chip that people call so, in upper or lower case, or None if the catalog does not have it."""
    return next((chip for chip in CHIPS if chip.name.lower() == name.lower()), None)


def detect(device: Any) -> Chip | None:
    """What one JAX device can do at most.

    A device is usually a whole chip. On some TPUs (TPU7x; v4 without its megacore mode) each of a chip's two cores
    is a device of its own: then all figures are for that half, and `share` is 0.5.

    Args:
        device: a `jax.Device`, or a device of a topology description.

    Returns:
        Figures per device, or None for a CPU or a chip that the catalog does not have: there is no peak to compare
        with, so no MFU is shown.
    """
    chip = find(device.device_kind)
    share = getattr(device, "num_cores", chip.cores) / chip.cores if chip is not None else 1.0
    return chip and chip.part(share)


def _scaled(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor
