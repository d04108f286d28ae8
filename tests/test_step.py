"""The same loss and gradients on any mesh, in any number of microbatches, for every kind of model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_loss_and_grads, loss_and_grads, perturbed_params, program_on, random_batch, small_config

from maxlm.config_file import ConfigError

pytestmark = pytest.mark.usefixtures("compiled_once")

MODELS = {
    "llama": {},
    "gpt2": {
        "norm": "layer",
        "norm_bias": True,
        "position": "learned",
        "max_positions": 14,
        "mlp": "plain",
        "activation": "gelu_tanh",
        "attention_bias": "all",
        "mlp_bias": True,
        "tie_embeddings": True,
    },
    "gemma": {
        "num_layers": 4,
        "norm_position": "both",
        "norm_offset": True,
        "qk_norm": True,
        "layer_pattern": ["local", "global"],
        "sliding_window": 5,
        "rope_theta_local": 100.0,
        "attention_softcap": 3.0,
        "logit_softcap": 2.0,
        "embedding_scale": 4.5,
        "tie_embeddings": True,
        "activation": "gelu",
    },
    "olmo": {"norm_position": "post", "qk_norm": True, "rope_fraction": 0.4, "mlp_bias": True, "activation": "relu2"},
    "qwen": {"attention_bias": "qkv", "attention_scale": 0.2},
}


@pytest.mark.parametrize("name", MODELS)
def test_mesh_gives_the_loss_and_gradients_of_one_device(name):
    config = small_config(model={**small_config().model.model_dump(), **MODELS[name]}, train={"z_loss": 1e-2})
    one = program_on(config)
    params, batch = perturbed_params(one), random_batch(config)
    want = loss_and_grads(one, params, batch)
    got = loss_and_grads(program_on(config, data=2, fsdp=2, tensor=2), params, batch)
    if name == "gpt2":  # without RoPE a bias of the keys moves all logits of a query alike: its gradient is zero
        for _, grads in (got, want):
            attention = grads["layers"]["0"]["attention"]
            assert np.abs(attention.pop("k_bias")).max() < 1e-5 * np.abs(attention["q_bias"]).max()
    assert_same_loss_and_grads(got, want)


@pytest.mark.parametrize("gather", ["layer", "step"])
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_four_microbatches_give_the_gradients_of_one(mesh, gather):
    config = small_config(train={"batch_size": 16})
    one = program_on(config)
    params = perturbed_params(one)
    want = loss_and_grads(one, params, random_batch(config))
    four = small_config(train={"batch_size": 16, "grad_accum": 4, "gather": gather})
    assert_same_loss_and_grads(loss_and_grads(program_on(four, **mesh), params, random_batch(four)), want)


@pytest.mark.parametrize("torus", [(2, 4), (2, 2, 2)])
def test_fsdp_over_several_torus_dimensions(torus):
    config = small_config(model={**small_config().model.model_dump(), "d_model": 24})
    one = program_on(config)
    params, batch = perturbed_params(one), random_batch(config)
    split = program_on(config, torus, fsdp=8)
    assert sum(name.startswith("fsdp") for name in split.mesh.axis_names) == len(torus)
    assert_same_loss_and_grads(loss_and_grads(split, params, batch), loss_and_grads(one, params, batch))


@pytest.mark.long
def test_more_than_ten_kinds_of_layers_run_in_their_order():
    pattern = ["global"] * 11 + ["local"]
    model = {**small_config().model.model_dump(), "num_layers": 12, "layer_pattern": pattern, "sliding_window": 2}
    config = small_config(model=model)
    program = program_on(config)
    params, batch = perturbed_params(program), random_batch(config)
    loss, _ = loss_and_grads(program, params, batch)
    # the same layers as a plain stack of 12, but for the one that sees less: exchange its window with another's
    model = {**model, "layer_pattern": ["local", *["global"] * 11]}
    order = [str(i) for i in (11, *range(11))]
    turned = {**params, "layers": {str(i): params["layers"][old] for i, old in enumerate(order)}}
    other, _ = loss_and_grads(program_on(small_config(model=model)), turned, batch)
    assert loss != other, "the local layer stands elsewhere"
    plain = small_config(model={**model, "layer_pattern": ["global"], "sliding_window": None})
    stacked = jax.tree.map(lambda *xs: np.concatenate(xs), *(params["layers"][str(i)] for i in range(12)))
    wide = small_config(model={**model, "layer_pattern": pattern, "sliding_window": 12})
    want, _ = loss_and_grads(program_on(plain), {**params, "layers": {"0": stacked}}, batch)
    got, _ = loss_and_grads(program_on(wide), params, batch)
    assert abs(got - want) < 1e-6 * want, "a window as long as the row is none: order alone decides"


@pytest.mark.parametrize("remat", ["none", "attention", "dots", "minimal", "offload"])
def test_remat_changes_no_number(remat):
    config = small_config()
    one = program_on(config)
    params, batch = perturbed_params(one), random_batch(config)
    other = program_on(small_config(train={"remat": remat}), fsdp=2, tensor=2)
    assert_same_loss_and_grads(loss_and_grads(other, params, batch), loss_and_grads(one, params, batch))


@pytest.mark.parametrize(("remat", "grad_accum", "num_layers"), [("full", 1, 6), ("dots", 2, 3), ("none", 2, 6)])
def test_several_repeats_in_an_iteration_change_no_number(remat, grad_accum, num_layers):
    config = small_config(model={**small_config().model.model_dump(), "num_layers": num_layers})
    one = program_on(config)
    params, batch = perturbed_params(one), random_batch(config)
    train = {"remat": remat, "repeats_per_scan": 3, "grad_accum": grad_accum}
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    other = program_on(config, data=2, fsdp=2, tensor=2)
    assert_same_loss_and_grads(loss_and_grads(other, params, random_batch(config)), loss_and_grads(one, params, batch))
    if remat != "none":
        kept = [x.shape[0] for x in jax.tree.leaves(kept_of_layers(config)) if x.shape[1:] == (8 // grad_accum, 12, 20)]
        assert kept == [num_layers // 3], "the inputs of iterations, not of repeats"


def test_repeats_in_an_iteration_divide_the_layers():
    with pytest.raises(ConfigError, match="repeats_per_scan=2 does not divide the model's 3 repeats"):
        small_config(train={"repeats_per_scan": 2})


def kept_of_layers(config):
    """Shapes of what the forward pass of the layers keeps for the backward pass, on one device."""
    program = program_on(config)
    with jax.set_mesh(program.mesh):
        params = program.state_shapes["params"]
        rows = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in program.batch_shapes.items()}
        layers = lambda p, r: program.passes._run(p, r)[0].x_BTD  # noqa: E731
        return jax.eval_shape(lambda p, r: jax.vjp(lambda p: layers(p, r), p)[1], params, rows)


@pytest.mark.parametrize(
    ("remat", "kept"),  # features per token: width D, queries Q, keys and values K, feed-forward F; and heads N
    [("full", "D"), ("attention", "DQ"), ("dots", "DDQKKFF"), ("minimal", "DDQQKKFF")],
)
def test_a_remat_policy_keeps_what_it_says(remat, kept):
    """In float32, as the table in model/stack.py says for two bytes."""
    model = {"num_layers": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 128, "d_model": 20, "d_ff": 28}
    config = small_config(model=model, train={"remat": remat, "attention": "splash", "seq_len": 128, "batch_size": 2})
    sizes = {"D": 20, "Q": 6 * 128, "K": 2 * 128, "F": 28}
    pull = kept_of_layers(config)
    stacked = [
        x.shape for x in jax.tree.leaves(pull) if x.dtype == jnp.float32 and x.shape[:3] in [(1, 2, 128), (1, 2, 6)]
    ]
    log_z = 6 if remat in ("attention", "minimal") else 0
    assert sum(math.prod(shape) for shape in stacked) / (2 * 128) == sum(sizes[letter] for letter in kept) + log_z


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("grad_accum", [1, 4])
def test_bfloat16_gradients_are_rounded_gradients(mesh, grad_accum):
    config = small_config(train={"batch_size": 16})
    params, batch = perturbed_params(program_on(config)), random_batch(config)
    _, want = loss_and_grads(program_on(config), params, batch)
    rounded = small_config(train={"batch_size": 16, "grad_accum": grad_accum, "grad_dtype": "bfloat16"})
    _, got = loss_and_grads(program_on(rounded, **mesh), params, random_batch(rounded))
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), got, want)
    assert 1e-5 < max(jax.tree.leaves(errors["layers"])) < 1e-2
