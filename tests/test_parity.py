"""The parity matrix: loss and every gradient of each mesh equal those of one device, float32, to 1e-5.

All parameters are perturbed, every dimension has another size, rows are packed, and the loss mask is uneven.
"""

import pytest
from helpers import assert_same_loss_and_grads, loss_and_grads, perturbed_params, program_on, random_batch, small_config

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
