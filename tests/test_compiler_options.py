"""The table of compiler options: the TPU compiler takes each of them."""

import jax
import pytest
from helpers import small_config

from maxlm.compiler_options import OPTIONS, compiler_options
from maxlm.mesh import make_mesh
from maxlm.step import build_program
from maxlm.topology import topology_devices

pytestmark = [pytest.mark.tpu, pytest.mark.xdist_group("tpu")]
SLICES = {"TPU v5e": "v5e:2x2", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}


def test_every_chip_of_the_table_is_tested():
    assert set(OPTIONS) == set(SLICES)


@pytest.mark.parametrize("chip", SLICES)
def test_the_compiler_takes_them(chip):
    device = topology_devices(SLICES[chip])[0]
    assert compiler_options(device, {}) == OPTIONS[chip]
    shape = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=jax.sharding.SingleDeviceSharding(device))
    for name, value in OPTIONS[chip].items():
        jax.jit(lambda x: x @ x, compiler_options={name: value}).lower(shape).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        jax.jit(lambda x: x @ x, compiler_options={"xla_tpu_no_such_option": 1}).lower(shape).compile()


def test_a_step_is_compiled_with_them_and_users_have_the_last_word():
    devices = topology_devices(SLICES["TPU v5e"])
    more = {"xla_tpu_scoped_vmem_limit_kib": 20000}
    config = small_config(model={"dtype": "bfloat16"}, train={"compiler_options": more})
    assert compiler_options(devices[0], config.train.compiler_options) == {**OPTIONS["TPU v5e"], **more}
    build_program(config, make_mesh(config.mesh, devices)).lower_step().compile()
    refused = small_config(model={"dtype": "bfloat16"}, train={"compiler_options": {"xla_tpu_no_such_option": 1}})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        build_program(refused, make_mesh(refused.mesh, devices)).lower_step().compile()
