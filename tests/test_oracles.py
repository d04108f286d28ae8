"""The same numbers as other people's code: transformers' models and torch's AdamW, float32, every tensor perturbed."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    loss_and_grads,
    one_document,
    our_logits,
    perturbed_params,
    program_on,
    small_config,
)

from maxlm.optim import update

pytestmark = pytest.mark.oracle

LOGITS = 2e-5  # max |a - b|; logits are of the order of one
GRADIENTS = 2e-5  # max |a - b| / max |b| of every parameter
Weights = dict[str, np.ndarray]

MODEL = {  # no padding of the vocabulary on any mesh used here
    "vocab_size": 250,
    "vocab_multiple": 1,
    "num_layers": 4,
    "d_model": 24,
    "d_ff": 28,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "norm_eps": 1e-3,
    "rope_theta": 100.0,
    "dtype": "float32",
}
GPT2 = {
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 6,
    "norm": "layer",
    "norm_bias": True,
    "position": "learned",
    "max_positions": 17,
    "mlp": "plain",
    "activation": "gelu_tanh",
    "attention_bias": "all",
    "mlp_bias": True,
    "tie_embeddings": True,
}
GEMMA2 = {
    "norm_position": "both",
    "norm_offset": True,
    "layer_pattern": ["local", "global"],
    "sliding_window": 5,
    "attention_scale": 7.0**-0.5,
    "attention_softcap": 1.5,
    "logit_softcap": 2.0,
    "embedding_scale": 24**0.5,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}
# OLMo 2 normalizes queries and keys over all heads together, maxlm per head: they are the same with one head.
OLMO2 = {"norm_position": "post", "qk_norm": True, "num_heads": 1, "num_kv_heads": 1}


# ---- models of transformers, and maxlm's weights under their names


def llama_weights(params: Any, pattern: int = 1) -> Weights:
    """Weights of Llama, or gradients, under the names of LlamaForCausalLM; `pattern` layer kinds take turns."""
    return {
        **decoder_weights(params, pattern),
        **norm_weights(params, pattern, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    }


def gemma2_weights(params: Any) -> Weights:
    """Weights of Gemma 2: four norms in a layer, local and global layers by turns."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return {**decoder_weights(params, 2), **norm_weights(params, 2, **norms)}


def olmo2_weights(params: Any) -> Weights:
    """Weights of OLMo 2: norms after the sublayers."""
    norms = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    return {**decoder_weights(params, 1), **norm_weights(params, 1, **norms)}


def decoder_weights(params: Any, pattern: int) -> Weights:
    """What Llama, Qwen 2 and 3, Gemma 2 and OLMo 2 have in common; torch's matrices are [out, in]."""
    out = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]["weight"]}
    out["lm_head.weight"] = params["unembed"].T if "unembed" in params else params["embed"]
    for name, layer in each_layer(params, pattern):
        a, mlp, D = layer["attention"], layer["mlp"], params["embed"].shape[1]
        for letter in "qkv":
            out[f"{name}.self_attn.{letter}_proj.weight"] = a[letter].reshape(D, -1).T
            if f"{letter}_bias" in a:
                out[f"{name}.self_attn.{letter}_proj.bias"] = a[f"{letter}_bias"].reshape(-1)
            if f"{letter}_norm" in a:
                out[f"{name}.self_attn.{letter}_norm.weight"] = a[f"{letter}_norm"]["weight"]
        out[f"{name}.self_attn.o_proj.weight"] = a["o"].reshape(-1, D).T
        out |= {f"{name}.mlp.{m}_proj.weight": mlp[m].T for m in ("gate", "up", "down")}
    return out


def norm_weights(params: Any, pattern: int, **names: str) -> Weights:
    """Norms of the layers: names of ours = names of theirs."""
    layers = list(each_layer(params, pattern))
    return {f"{n}.{theirs}.weight": p[ours]["weight"] for n, p in layers for ours, theirs in names.items()}


def gpt2_weights(params: Any) -> Weights:
    """Weights of GPT-2: matrices are [in, out], and queries, keys and values are one."""
    out = {"transformer.wte.weight": params["embed"], "transformer.wpe.weight": params["positions"]}
    out |= {f"transformer.ln_f.{kind}": params["final_norm"][kind] for kind in ("weight", "bias")}
    out["lm_head.weight"], D = params["embed"], params["embed"].shape[1]
    for name, layer in each_layer(params, 1, "transformer.h"):
        a, mlp = layer["attention"], layer["mlp"]
        for kind in ("weight", "bias"):
            out[f"{name}.ln_1.{kind}"] = layer["attention_norm"][kind]
            out[f"{name}.ln_2.{kind}"] = layer["mlp_norm"][kind]
        out[f"{name}.attn.c_attn.weight"] = np.concatenate([a[m].reshape(D, D) for m in "qkv"], 1)
        out[f"{name}.attn.c_attn.bias"] = np.concatenate([a[f"{m}_bias"].reshape(D) for m in "qkv"])
        out |= {f"{name}.attn.c_proj.weight": a["o"].reshape(D, D), f"{name}.attn.c_proj.bias": a["o_bias"]}
        out |= {f"{name}.mlp.c_fc.weight": mlp["up"], f"{name}.mlp.c_fc.bias": mlp["up_bias"]}
        out |= {f"{name}.mlp.c_proj.weight": mlp["down"], f"{name}.mlp.c_proj.bias": mlp["down_bias"]}
    return out


def each_layer(params: Any, pattern: int, prefix: str = "model.layers") -> Any:
    """Yields (name, parameters) of every layer: layers["i"] stacks every pattern-th one, from layer i on."""
    for i in range(pattern):
        stack = params["layers"][str(i)]
        for repeat in range(len(jax.tree.leaves(stack)[0])):
            yield f"{prefix}.{repeat * pattern + i}", jax.tree.map(lambda x, r=repeat: x[r], stack)


def transformers_config(m: Any, **more: Any) -> dict[str, Any]:
    """Arguments that the configs of Llama, Qwen, Gemma and OLMo share."""
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": m.d_ff,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_size,
        "rms_norm_eps": m.norm_eps,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "attn_implementation": "eager",
        "tie_word_embeddings": m.tie_embeddings,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def gemma2_config(m: Any) -> dict[str, Any]:
    return transformers_config(
        m,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=7,
        sliding_window=m.sliding_window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_logit_softcapping=m.attention_softcap,
        final_logit_softcapping=m.logit_softcap,
    )


def gpt2_config(m: Any) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "n_positions": m.max_positions,
        "n_embd": m.d_model,
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_inner": m.d_ff,
        "bos_token_id": None,
        "eos_token_id": None,
        "layer_norm_epsilon": m.norm_eps,
        "attn_implementation": "eager",
        "use_cache": False,
    }


FAMILIES = {  # transformers' class, our fields, our weights under its names, its config
    "Llama": ({}, llama_weights, transformers_config),
    "Qwen2": ({"attention_bias": "qkv"}, llama_weights, transformers_config),
    "Qwen3": ({"qk_norm": True}, llama_weights, transformers_config),
    "GPT2": (GPT2, gpt2_weights, gpt2_config),
    "Gemma2": (GEMMA2, gemma2_weights, gemma2_config),
    "Olmo2": (OLMO2, olmo2_weights, transformers_config),
}


def both(family: str, **mesh: int) -> SimpleNamespace:
    """One program of ours and one model of theirs with the same random weights."""
    import torch
    import transformers

    fields, to_theirs, to_config = FAMILIES[family]
    config = small_config(model={**MODEL, **fields}, train={"seq_len": 16, "batch_size": 8})
    program = program_on(config, **mesh)
    params = perturbed_params(program)
    if config.model.norm_offset:  # their draws are around one
        params = jax.tree_util.tree_map_with_path(lambda k, x: x - ("norm" in jax.tree_util.keystr(k)), params)
    peer_config = getattr(transformers, f"{family}Config")(**to_config(config.model))
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    peer = getattr(transformers, f"{family}{suffix}")(peer_config).eval()
    weights = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in to_theirs(params).items()}
    peer.load_state_dict(weights, strict=True)
    # every number of ours went over, and every parameter of theirs came from us (strict)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.size for p in jax.tree.leaves(params))
    return SimpleNamespace(config=config, program=program, params=params, peer=peer, to_theirs=to_theirs)


def their_logits(peer: Any, tokens: np.ndarray) -> Any:
    """Logits of tokens [B, T], a torch tensor [B, T, V]."""
    import torch

    return peer(input_ids=torch.tensor(tokens, dtype=torch.long)).logits


# ---- tests


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    case = both(family)
    batch = one_document(case.config)
    want = their_logits(case.peer, batch["tokens"][0]).detach().numpy()
    got = our_logits(case.program, case.params, batch)
    assert want.std() > 0.1  # logits that say something
    assert np.abs(got - want).max() <= LOGITS


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_packed_documents_are_those_documents_alone(family):
    case = both(family)
    batch, cut = one_document(case.config), 7
    batch["segments"][:, :, cut:] = 2
    batch["positions"][:, :, cut:] -= cut
    got = our_logits(case.program, case.params, batch)
    for part in (slice(0, cut), slice(cut, None)):
        want = their_logits(case.peer, batch["tokens"][0][:, part]).detach().numpy()
        assert np.abs(got[:, part] - want).max() <= LOGITS


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_gradients_on_a_sharded_mesh_are_those_of_torch(family):
    import torch

    case = both(family, data=2, fsdp=2, tensor=2)
    batch = one_document(case.config)
    loss, grads = loss_and_grads(case.program, case.params, batch)
    mask, targets = torch.tensor(batch["mask"][0]), torch.tensor(batch["targets"][0], dtype=torch.long)
    logits = their_logits(case.peer, batch["tokens"][0])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    want = (each * mask.flatten()).sum() / mask.sum()
    want.backward()
    assert abs(loss - want.item()) <= 1e-6 * want.item()
    ours = case.to_theirs(grads)
    for name, parameter in case.peer.named_parameters():
        theirs = parameter.grad.numpy()
        assert np.abs(theirs).max() > 0, name
        assert np.abs(ours[name] - theirs).max() <= GRADIENTS * np.abs(theirs).max(), name


def test_adamw_is_that_of_torch():
    """Clipping, moments, decay by mask and a learning rate that changes: the same parameters after every step."""
    import torch

    optim = {"learning_rate": 1e-2, "weight_decay": 0.3, "clip_norm": 30.0, "schedule": {"name": "linear"}}
    program = program_on(small_config(model=MODEL, optim=optim), fsdp=2, tensor=2)
    rng, host = np.random.default_rng(3), perturbed_params(program)
    paths, treedef = jax.tree_util.tree_flatten_with_path(host)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    theirs = [torch.nn.Parameter(torch.tensor(leaf)) for _, leaf in paths]
    # what maxlm leaves out by default: norms and embeddings, but not the output projection
    kept = [any(word in name for word in ("norm", "'embed'")) for name in names]
    groups = [
        {"params": [p for p, k in zip(theirs, kept, strict=True) if k], "weight_decay": 0.0},
        {"params": [p for p, k in zip(theirs, kept, strict=True) if not k], "weight_decay": 0.3},
    ]
    peer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    clipped = []
    with jax.set_mesh(program.mesh):
        shardings = program.state_shardings
        params = jax.tree.map(jax.device_put, host, shardings["params"])
        opt = jax.jit(program.optimizer.init)(params)
        step = jax.jit(lambda p, o, g: update(program.optimizer, p, o, g))
        for i in range(6):
            grads = [((1 + i % 3) * 0.1 * rng.standard_normal(p.shape)).astype(np.float32) for p in theirs]
            placed = jax.tree.map(jax.device_put, jax.tree.unflatten(treedef, grads), shardings["params"])
            params, opt = step(params, opt, placed)
            for parameter, grad in zip(theirs, grads, strict=True):
                parameter.grad = torch.tensor(grad)
            clipped.append(torch.nn.utils.clip_grad_norm_(theirs, 30.0).item() > 30.0)
            for group in peer.param_groups:
                group["lr"] = float(program.schedule(i))
            peer.step()
            for name, ours, want in zip(names, jax.tree.leaves(params), theirs, strict=True):
                assert np.abs(np.asarray(ours) - want.detach().numpy()).max() <= 1e-6, (i, name)
    assert set(clipped) == {True, False}


AQT = {
    "BTD,DF->BTF": ((2, 128, 512), (512, 384), (((2,), (0,)), ((), ()))),
    "BTD,DNH->BTNH": ((2, 64, 128), (128, 4, 32), (((2,), (0,)), ((), ()))),
    "BTNH,NHD->BTD": ((2, 64, 4, 32), (4, 32, 128), (((2, 3), (0, 1)), ((), ()))),
    "ECD,EDF->ECF": ((4, 32, 64), (4, 64, 48), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subscripts", AQT)
def test_int8_is_that_of_aqt_to_the_last_bit(subscripts):
    import aqt.jax.v2.config as aqt

    from maxlm.parallel.quantized import quantized_einsum
    from maxlm.quant import Recipe

    x_shape, w_shape, dimensions = AQT[subscripts]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    g = jax.random.normal(keys[2], jax.eval_shape(lambda: jax.lax.dot_general(x, w, dimensions)).shape)
    config = aqt.config_v4(fwd_bits=8, dlhs_bits=8, drhs_bits=8)
    aqt.set_stochastic_rounding(config, False, False, "jax.uniform")
    config = aqt.set_context(config, key=None, train_step=None)

    def gradients(product):
        def run(x, w, g):
            y, pull = jax.vjp(product, x, w)
            return y, *pull(g)

        return jax.device_get(jax.jit(run)(x, w, g))

    theirs = gradients(lambda x, w: config(x, w, dimensions))
    ours = gradients(lambda x, w: quantized_einsum(subscripts, Recipe(anew=True), x, w)[0])
    for name, a, b in zip(("output", "by activations", "by weights"), ours, theirs, strict=True):
        assert a.any()
        np.testing.assert_array_equal(a, b, err_msg=name)
