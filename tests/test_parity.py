"""The parity matrix: loss and every gradient of each mesh equal those of one device, float32, to 1e-5.

All parameters are perturbed, every dimension has another size, rows are packed, and the loss mask is uneven.
"""

import functools

import jax
import numpy as np
import pytest
from helpers import (
    assert_same_loss_and_grads,
    loss_and_grads,
    perturbed_params,
    place,
    program_on,
    random_batch,
    small_config,
)

SIZES = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 6, "d_model": 24, "d_ff": 40, "vocab_multiple": 8}
FEW_HEADS = {"num_kv_heads": 2, "attention_bias": "all", "qk_norm": True}
WINDOW = {"num_layers": 4, "layer_pattern": ["local", "global"], "sliding_window": 7, "attention_softcap": 3.0}


def compare(mesh, model=None, **train):
    config = small_config(
        model={**small_config().model.model_dump(), **SIZES, **(model or {})},
        train={"batch_size": 16, "seq_len": 32, "z_loss": 1e-2, **train},
    )
    one = program_on(config)
    params, batch = perturbed_params(one), random_batch(config)
    want = loss_and_grads(one, params, batch)
    assert_same_loss_and_grads(loss_and_grads(program_on(config, **mesh), params, batch), want)


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        ({"data": 8}, {}),
        ({"fsdp": 8}, {}),
        ({"tensor": 8}, {}),
        ({"tensor": 4}, FEW_HEADS),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ({"slices": 2, "fsdp": 4}, {}),
        ({"slices": 2, "data": 2, "tensor": 2}, FEW_HEADS),
    ],
    ids=str,
)
def test_data_fsdp_tensor_and_slices(mesh, model):
    compare(mesh, model)


@pytest.mark.parametrize("kind", ["ring", "gather"])
@pytest.mark.parametrize(
    ("mesh", "model", "accum"),
    [
        ({"context": 4, "data": 2}, WINDOW, 1),
        ({"context": 2, "fsdp": 2, "tensor": 2}, FEW_HEADS, 2),
    ],
    ids=str,
)
def test_context(mesh, model, accum, kind):
    compare({**mesh, "context_attention": kind}, model, grad_accum=accum)


EXPERTS = {
    "num_layers": 3,
    "num_dense_layers": 1,
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_d_ff": 12,
    "num_shared_experts": 1,
    "router_scores": "sigmoid",
    "aux_loss": 0.3,
    "router_z_loss": 0.1,
    "router_bias_rate": 0.01,
}


@functools.cache
def experts_on_one_device(accum):
    """Config, parameters, batch, metrics and gradients, with no token between two experts.

    Rounding differs between meshes, by 1e-6: where the last chosen expert leads the next by 1e-4, all choose alike.
    """
    model = {**small_config().model.model_dump(), **SIZES, **EXPERTS}
    config = small_config(model=model, train={"batch_size": 16, "seq_len": 8, "grad_accum": accum})
    one, batch, top_k, margins = program_on(config), random_batch(config), jax.lax.top_k, []

    def watched(scores, k):
        found = top_k(scores, k + 1)
        jax.debug.callback(lambda best: margins.append(np.min(best[..., k - 1] - best[..., k])), found[0])
        return top_k(scores, k)

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(one.mesh):
        patch.setattr(jax.lax, "top_k", watched)
        for seed in range(20):
            margins.clear()
            params = perturbed_params(one, seed)
            grads, metrics = jax.device_get(one.grads(*place(one, params, batch)))
            jax.effects_barrier()
            if min(margins) > 1e-4:
                return config, params, batch, metrics, grads
    pytest.fail("no seed keeps all tokens clear of ties")


@pytest.mark.parametrize(
    ("mesh", "accum"),
    [
        ({"expert": 4, "data": 2}, 1),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"context": 2, "expert": 2, "data": 2}, 1),
    ],
    ids=str,
)
def test_experts(mesh, accum):
    config, params, batch, want, want_grads = experts_on_one_device(accum)
    program = program_on(config, **mesh)
    with jax.set_mesh(program.mesh):
        grads, metrics = jax.device_get(program.grads(*place(program, params, batch)))
    assert metrics == {name: pytest.approx(value, rel=1e-5) for name, value in want.items()}
    assert_same_loss_and_grads((metrics["loss"], grads), (want["loss"], want_grads))


@pytest.mark.parametrize(
    "mesh", [{"expert": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "expert": 2, "data": 2}], ids=str
)
def test_experts_run_in_bfloat16(mesh):
    config, params, batch, want, _ = experts_on_one_device(1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    program = program_on(config, **mesh)
    with jax.set_mesh(program.mesh):
        grads, metrics = jax.device_get(program.grads(*place(program, params, batch)))
    assert metrics["objective"] == pytest.approx(want["objective"], rel=0.02)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
