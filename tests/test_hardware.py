from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.hardware import CHIPS, Chip, detect, find


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
