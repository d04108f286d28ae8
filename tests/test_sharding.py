"""Every parameter says where it rests, and rests there."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import program_on, small_config

from maxlm.model import mlp
from maxlm.step import build_program

DECLARED = {
    "embed": "VD",
    "positions": "TD",
    "unembed": "DV",
    "final_norm.weight": "D",
    "final_norm.bias": "D",
    "attention.q": "DNH",
    "attention.k": "DKH",
    "attention.v": "DKH",
    "attention.o": "NHD",
    "attention.q_bias": "NH",
    "attention.k_bias": "KH",
    "attention.v_bias": "KH",
    "attention.o_bias": "D",
    "attention.q_norm.weight": "H",
    "attention.k_norm.weight": "H",
    "attention.q_norm.bias": "H",
    "attention.k_norm.bias": "H",
    "attention_norm.weight": "D",
    "attention_norm.bias": "D",
    "attention_post_norm.weight": "D",
    "attention_post_norm.bias": "D",
    "mlp_norm.weight": "D",
    "mlp_norm.bias": "D",
    "mlp_post_norm.weight": "D",
    "mlp_post_norm.bias": "D",
    "mlp.up": "DF",
    "mlp.gate": "DF",
    "mlp.down": "FD",
    "mlp.up_bias": "F",
    "mlp.gate_bias": "F",
    "mlp.down_bias": "D",
    "moe.router.weight": "DX",
    "moe.router.bias": "X",
    "moe.up": "EDF",
    "moe.gate": "EDF",
    "moe.down": "EFD",
    "moe.shared.up": "DF",
    "moe.shared.gate": "DF",
    "moe.shared.down": "FD",
}
"""Parameters of all models; those of layers without the dims that stack them."""

RESTS = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "E": "expert", "P": "stage"}

EVERYTHING = {
    "num_layers": 4,
    "num_heads": 4,
    "norm": "layer",
    "norm_bias": True,
    "norm_position": "both",
    "qk_norm": True,
    "position": "learned",
    "max_positions": 12,
    "attention_bias": "all",
}
DENSE = {**EVERYTHING, "mlp_bias": True}
EXPERTS = {
    **EVERYTHING,
    "num_dense_layers": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_d_ff": 12,
    "num_shared_experts": 1,
    "router_bias_rate": 0.01,
}
MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"stage": 2, "fsdp": 2, "tensor": 2},
    {"stage": 2, "expert": 2, "tensor": 2},
]


def make_program(model, mesh):
    return program_on(small_config(model=model), **mesh)


def found(program):
    """{path: (dims, size, spec)} of every parameter; paths of layers begin after the layer's number."""
    params, parameters = program.state_shapes["params"], {}
    for (keys, shape), dims in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(program.dims), strict=True):
        path = [key.key for key in keys]
        name = ".".join(path[2:] if path[0].endswith("layers") else path)
        parameters.setdefault(name, []).append((dims, shape.shape, shape.sharding.spec))
    return parameters


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_every_parameter_rests_where_its_letters_say(model, mesh):
    for name, places in found(make_program(model, mesh)).items():
        for dims, shape, spec in places:
            assert dims.lstrip("RPL") == DECLARED[name], f"declare {name} here, and where it rests"
            assert len(dims) == len(shape)
            wanted = [RESTS.get(letter) if mesh.get(RESTS.get(letter), 1) > 1 else None for letter in dims]
            assert list(spec) == wanted, name


def test_the_table_has_no_parameter_that_no_model_has():
    names = {name for model in (DENSE, EXPERTS) for name in found(make_program(model, {}))}
    assert names == set(DECLARED)


def test_a_parameter_without_letters_or_with_unknown_ones_is_refused(monkeypatch):
    program, make = make_program(DENSE, {}), mlp.Mlp.__init__

    def add(parameter):
        def init(self, *arguments):
            make(self, *arguments)
            self.extra = parameter(arguments)

        monkeypatch.setattr(mlp.Mlp, "__init__", init)

    add(lambda _: nnx.Param(jnp.zeros(8)))
    with pytest.raises(KeyError, match="dims"):
        build_program(program.config, program.mesh)
    add(lambda arguments: mlp.constant("Q", arguments[1], 0.0))
    with pytest.raises(KeyError, match="Q"):
        build_program(program.config, program.mesh)
