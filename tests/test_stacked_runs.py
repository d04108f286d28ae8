"""Checkpoints of pipelines, of split experts and of layers that the pattern leaves over: read anywhere, to the bit."""

import contextlib

import jax
import numpy as np
import pytest
from helpers import MODEL, perturbed_params, place, program_on, random_batch, small_config, unstacked
from test_convert_folders import hashes, init_program, write_model

from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig, MeshConfig
from maxlm.convert.from_hf import from_hf
from maxlm.convert.to_hf import to_hf
from maxlm.infer.models import open_model
from maxlm.init_from import read_parameters
from maxlm.leaves import named_leaves
from maxlm.manifest import CheckpointError

pytestmark = pytest.mark.slow

LEFT_OVER = {  # as Gemma 3: three repeats, and a layer more
    "num_layers": 7,
    "layer_pattern": ["local", "global"],
    "sliding_window": 5,
    "rope_theta_local": 50.0,
}
DENSE_FIRST = {"num_layers": 4, "num_dense_layers": 1, "num_experts": 4, "experts_per_token": 2, "expert_d_ff": 12}
SPLIT = {"stage": 2, "expert": 2, "tensor": 2}


def config_of(model):
    return small_config(model={**MODEL, **model}, train={"grad_accum": 2})


def save(folder, program, params, step=3):
    """A run's checkpoint, as far as it is parameters; they are on the program's mesh."""
    run = {"model": program.config.model.model_dump(mode="json"), "train": {"seq_len": 12}}
    with contextlib.closing(Checkpoints(str(folder), CheckpointConfig(), run=run)) as checkpoints:
        checkpoints.save(step, {"params": params})
        checkpoints.wait()


def save_random(folder, model, **mesh):
    """Such a checkpoint with random parameters [L, ...], which it returns."""
    config = config_of(model)
    params = perturbed_params(program_on(config))
    program = program_on(config, **mesh)
    save(folder, program, place(program, params, random_batch(config))[0])
    return params


def bits(tree):
    return {path: np.asarray(x).tobytes() for path, x in named_leaves(tree).items()}


@pytest.mark.parametrize("there", [{}, {"stage": 3, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=str)
def test_layers_that_the_pattern_leaves_over_move_between_meshes(there, tmp_path):
    """Two stages of two repeats hold one that is never run; the layer ahead is of no stage."""
    params = save_random(tmp_path, LEFT_OVER, stage=2, fsdp=2)
    program = program_on(config_of(LEFT_OVER), **there)
    with contextlib.closing(Checkpoints(str(tmp_path), CheckpointConfig())) as checkpoints:
        found = checkpoints.restore(3, {"params": program.state_shapes["params"]}, program.stack)["params"]
    assert bits(unstacked(program, jax.device_get(found))) == bits(params)
    wanted = {path: shape.sharding for path, shape in named_leaves(program.state_shapes["params"]).items()}
    assert {path: x.sharding for path, x in named_leaves(found).items()} == wanted


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixtral", {"stage": 2, "tensor": 2}),
        ("mixtral", {"expert": 3, "fsdp": 2}),
        ("qwen3_moe", {"stage": 2, "data": 2}),
        ("qwen3_moe", {"expert": 5}),
        ("qwen3_moe, dense first", {"stage": 2, "tensor": 2}),
        ("qwen3_moe, dense first", {"expert": 5}),
    ],
)
def test_what_split_runs_export_is_what_they_began_with(name, mesh, tmp_path):
    write_model(tmp_path / "hf", name, np.dtype(np.float32))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    program = init_program(tmp_path / "m", {}, {"grad_accum": 2}, **mesh)
    with contextlib.closing(Checkpoints(str(tmp_path / "m"), CheckpointConfig(), read_only=True)) as other:
        save(tmp_path / "run", program, read_parameters(other, 0, program))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"), like=str(tmp_path / "hf"), verify=True)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


@pytest.mark.parametrize("model", [LEFT_OVER, DENSE_FIRST], ids=["left over", "experts"])
def test_pipelines_are_opened_and_damage_in_them_is_named(model, tmp_path):
    mesh = SPLIT if model is DENSE_FIRST else {"stage": 2, "fsdp": 2}
    params = save_random(tmp_path, model, **mesh)
    for there in (MeshConfig(fake_devices=1), MeshConfig(fsdp=2, tensor=2, fake_devices=4)):
        assert bits(open_model(str(tmp_path), there, "float32").params) == bits(params)

    file = max((tmp_path / "checkpoints/3").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="params/|cannot read"):
        open_model(str(tmp_path), MeshConfig(fake_devices=1))
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        open_model(str(tmp_path), MeshConfig(fake_devices=1))
