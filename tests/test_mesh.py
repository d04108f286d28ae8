"""Axis sizes, layouts over a torus, and what does not fit."""

import itertools
from dataclasses import dataclass

import jax
import pytest
from helpers import MODEL, small_config

from maxlm.config import AXES, MeshConfig
from maxlm.config_file import ConfigError
from maxlm.mesh import axis_sizes, check_fit, make_mesh


@dataclass(frozen=True)
class Device:
    """What a mesh reads of a TPU device."""

    id: int
    coords: tuple[int, ...]


def torus(*shape):
    """Devices in an order that is not that of their coordinates."""
    all_coords = itertools.product(*(range(n) for n in reversed(shape)))
    return [Device(i, tuple(reversed(c))) for i, c in enumerate(all_coords)]


def test_minus_one_fills_what_is_left():
    sizes = axis_sizes(MeshConfig(slices=2, stage=2, fsdp=-1, tensor=2), 16)
    assert sizes == {"slice": 2, "data": 1, "stage": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "num_devices", "word"),
    [
        ({"data": 3}, 8, "divides 8"),
        ({"fsdp": 2, "tensor": 2}, 8, "mesh.fsdp=-1"),
        ({"data": 4, "fsdp": 4}, 8, "mesh.fake_devices=16"),
    ],
)
def test_sizes_that_do_not_fit_the_devices(mesh, num_devices, word):
    with pytest.raises(ConfigError, match=word):
        axis_sizes(MeshConfig(**mesh), num_devices)


@pytest.mark.parametrize(
    ("shape", "mesh", "names", "sizes"),
    [
        ((4, 4), {}, ("data", "fsdp0", "fsdp1", "tensor"), (1, 4, 4, 1)),
        ((4, 4), {"tensor": 2}, ("data", "fsdp0", "fsdp1", "tensor"), (1, 4, 2, 2)),
        ((4, 4), {"data": 2, "fsdp": 4, "tensor": 2}, ("data", "fsdp0", "fsdp1", "tensor"), (2, 2, 2, 2)),
        ((4, 4), {"data": 4, "fsdp": 4}, ("data", "fsdp", "tensor"), (4, 4, 1)),
        ((2, 2, 4), {}, ("data", "fsdp0", "fsdp1", "fsdp2", "tensor"), (1, 2, 2, 4, 1)),
    ],
)
def test_fsdp_is_cut_at_torus_dimensions(shape, mesh, names, sizes):
    made = make_mesh(MeshConfig(**mesh), torus(*shape))
    assert made.axis_names == names
    assert made.devices.shape == sizes


def test_every_fsdp_axis_walks_one_torus_dimension():
    made = make_mesh(MeshConfig(tensor=2), torus(4, 4))
    for axis, dimension in ((1, 0), (2, 1)):
        first = [0] * made.devices.ndim
        walked = []
        for i in range(made.devices.shape[axis]):
            first[axis] = i
            walked.append(made.devices[tuple(first)].coords)
        assert all(c[1 - dimension] == walked[0][1 - dimension] for c in walked)


def test_devices_without_coordinates_are_one_dimension():
    assert make_mesh(MeshConfig(tensor=2), jax.devices()).axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("sections", "sizes", "words"),
    [
        ({}, {"tensor": 4}, ["model.num_heads=6", "mesh.tensor=4", "mesh.tensor=3"]),
        (
            {"model": {**MODEL, "num_kv_heads": 6}},
            {"tensor": 4},
            ["model.num_heads=6", "mesh.tensor=3"],
        ),
        ({"train": {"seq_len": 18}}, {"context": 2, "stage": 2}, ["train.seq_len=18", "train.seq_len=16"]),
        ({}, {"fsdp": 8}, ["model.d_model=20", "mesh.fsdp=5"]),
        (
            {"model": {**MODEL, "num_experts": 6, "experts_per_token": 2, "expert_d_ff": 9}},
            {"expert": 4},
            ["model.num_experts=6", "mesh.expert=3"],
        ),
        (
            {"model": {**MODEL, "num_experts": 6, "experts_per_token": 2, "expert_d_ff": 9}},
            {"tensor": 2},
            ["model.expert_d_ff=9", "mesh.tensor=1"],
        ),
        ({"train": {"batch_size": 6}}, {"data": 2, "fsdp": 2}, ["train.batch_size=6", "train.batch_size=8"]),
        ({"train": {"grad_accum": 4}}, {"fsdp": 4}, ["4 microbatches", "train.batch_size=16"]),
    ],
)
def test_model_and_batch_must_divide_over_the_mesh(sections, sizes, words):
    with pytest.raises(ConfigError) as caught:
        check_fit(small_config(**sections), {"slice": 1, **dict.fromkeys(AXES, 1), **sizes})
    for word in words:
        assert word in str(caught.value)


def test_the_largest_allowed_number_of_devices_is_taken():
    from maxlm.mesh import choose_devices

    config = small_config(mesh={"fsdp": -1, "allowed": [8, 4, 2]}, train={"batch_size": 16, "grad_accum": 2})
    for there, taken, num_micro in [(8, 8, 2), (7, 4, 4), (4, 4, 4), (3, 2, 8)]:
        chosen, devices = choose_devices(config, range(there))
        assert (len(devices), chosen.train.grad_accum) == (taken, num_micro)
    with pytest.raises(ConfigError, match="there are 1 devices"):
        choose_devices(config, range(1))
    small = small_config(mesh={"fsdp": -1, "allowed": [8, 2]}, train={"batch_size": 2, "grad_accum": 1})
    with pytest.raises(ConfigError, match="4 microbatches, which do not divide it; leave 2 out"):
        choose_devices(small, range(2))


@pytest.mark.parametrize("mesh", [{"allowed": [2, 4]}, {"allowed": [8, 3]}, {"allowed": [8], "fsdp": 8}], ids=str)
def test_allowed_numbers_that_make_no_sense_are_refused(mesh):
    with pytest.raises(ConfigError, match="allowed"):
        small_config(mesh=mesh)
