import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.hardware import CHIPS, Chip, detect, find, named


def known(chip: Chip | None) -> Chip:
    assert chip is not None
    return chip


@pytest.mark.parametrize(
    ("kind", "name", "tflops"),
    [
        ("TPU v5 lite", "TPU v5e", 197),
        ("TPU v5e", "TPU v5e", 197),
        ("TPU v5", "TPU v5p", 459),
        ("TPU v6 lite", "TPU v6e", 918),
        ("TPU7x", "TPU7x", 2307),
        ("NVIDIA H100 80GB HBM3", "H100", 989),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 312),
        ("NVIDIA H200", "H200", 989),
        ("AMD Instinct MI300X", "MI300X", 1307),
    ],
)
def test_chips_are_known_by_the_name_that_jax_gives_them(kind, name, tflops):
    chip = known(find(kind))
    assert chip.name == name
    assert chip.bf16_flops == tflops * 1e12


def test_other_devices_have_no_peak():
    assert detect(jax.devices("cpu")[0]) is None
    # the PCIe card is slower than the SXM one; a wrong peak would be worse than none
    assert find("NVIDIA H100 PCIe") is None


def test_peak_depends_on_the_type():
    v5e, h100 = known(find("TPU v5e")), known(find("NVIDIA H100 80GB HBM3"))
    assert v5e.peak("bfloat16") == v5e.peak(jnp.bfloat16) == v5e.peak(jnp.dtype(jnp.bfloat16)) == 197e12
    assert v5e.peak("int8") == v5e.peak(np.int8) == 394e12
    assert v5e.peak("float8_e4m3fn") is None
    assert h100.peak(jnp.float8_e5m2) == 1979e12
    assert v5e.peak("float32") is h100.peak(jnp.float32) is None


# TFLOP/s in bf16, int8 and fp8, all dense: data sheets of GPUs print the double, with sparsity; GB of HBM, GB/s
@pytest.mark.parametrize(
    ("name", "bf16", "int8", "fp8", "hbm", "hbm_rate", "interconnect"),
    [
        ("TPU v4", 275, 275, None, 32 * 1.073741824, 1230, 540),
        ("TPU v5e", 197, 394, None, 16 * 1.073741824, 820, 360),
        ("TPU v5p", 459, 918, 459, 95 * 1.073741824, 2765, 1200),
        ("TPU v6e", 918, 1836, 918, 32 * 1.073741824, 1638, 800),
        ("TPU7x", 2307, None, 4614, 192 * 1.073741824, 7380, 1200),
        ("A100 40GB", 312, 624, None, 40, 1555, 600),
        ("A100 80GB", 312, 624, None, 80, 2039, 600),
        ("H100", 989, 1979, 1979, 80, 3350, 900),
        ("H200", 989, 1979, 1979, 141, 4800, 900),
        ("B200", 2250, 4500, 4500, 180, 8000, 1800),
        ("MI300X", 1307, 2615, 2615, 192, 5300, 896),
    ],
)
def test_figures_are_dense_and_as_published(name, bf16, int8, fp8, hbm, hbm_rate, interconnect):
    chip = known(named(name))
    assert chip.bf16_flops == bf16 * 1e12
    assert (chip.int8_ops, chip.fp8_flops) == tuple(None if x is None else x * 1e12 for x in (int8, fp8))
    assert (chip.hbm_bytes / 1e9, chip.hbm_bytes_per_s / 1e9) == pytest.approx((hbm, hbm_rate))
    assert chip.interconnect_bytes_per_s == interconnect * 1e9


def test_int8_is_no_gain_everywhere():
    assert known(named("TPU v4")).int8_ops == known(named("TPU v4")).bf16_flops, "no gain"
    assert known(named("TPU7x")).int8_ops is None
    for chip in map(known, (named("tpu v5e"), named("TPU v5p"))):
        assert chip.int8_ops == 2 * chip.bf16_flops
    assert known(named("TPU v6e")).peak("float8_e4m3fn") == known(named("TPU v6e")).bf16_flops


def test_links_carry_the_bandwidth_between_chips():
    rates = {"TPU v4": (6, 45e9), "TPU v5e": (4, 45e9), "TPU v5p": (6, 100e9), "TPU v6e": (4, 100e9)}
    assert {c.name: (c.num_links, c.link_bytes_per_s) for c in CHIPS if c.num_links} == rates
    half = known(detect(SimpleNamespace(device_kind="TPU v4", num_cores=1)))
    assert (half.num_links, half.link_bytes_per_s) == (6, 22.5e9)  # both cores send over the same links


def test_what_is_not_known_is_none_and_never_zero():
    for chip in CHIPS:
        assert 0 not in dataclasses.astuple(chip)
        assert chip.link_bytes_per_s != 0
    assert known(named("TPU v6e")).watts is None
    assert known(named("TPU7x")).link_bytes_per_s is None
    assert named("TPU v1") is None


def test_a_core_that_is_a_device_has_its_part_of_the_chip():
    whole = known(find("TPU7x"))
    half = known(detect(SimpleNamespace(device_kind="TPU7x", num_cores=1)))
    assert half.share == 0.5
    assert half.peak("bfloat16") == whole.bf16_flops / 2
    assert half.hbm_bytes == 96 * 2**30
    assert half.int8_ops is None
    # v4 and v5p join the two cores of a chip into one device
    assert detect(SimpleNamespace(device_kind="TPU v4", num_cores=2)) is find("TPU v4")


def test_catalog_is_plausible():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    for chip in CHIPS:
        assert chip.sources
        assert 1e14 < chip.bf16_flops < 1e16
        assert 1e10 < chip.hbm_bytes < 1e12
        # a memory-bound chip would have an arithmetic intensity under 100 FLOPs a byte; units mixed up give 0.2 or 2e5
        assert 100 < chip.bf16_flops / chip.hbm_bytes_per_s < 1000
        assert 1e11 < chip.interconnect_bytes_per_s < chip.hbm_bytes_per_s


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "name", "share"),
    [("v5e:2x2", "TPU v5e", 1), ("v5p:2x2x1", "TPU v5p", 1), ("v6e:2x2", "TPU v6e", 1), ("tpu7x:2x2x1", "TPU7x", 0.5)],
)
def test_devices_of_the_tpu_compiler_are_known(topology, name, share):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, "tpu").devices
    chip = known(detect(devices[0]))
    assert (chip.name, chip.share) == (name, share)
    assert len(devices) * chip.share == 4  # chips
