"""Models of every family: their tensors and ours are the same numbers, and both sides are accounted for."""

import json
import re

import numpy as np
import pytest
from helpers import one_document, our_logits, program_on, small_config

from maxlm.config import ModelConfig
from maxlm.convert.families import FAMILIES, FamilyError, family_for, family_of
from maxlm.convert.keys import meaning
from maxlm.convert.mapping import check_tensors, entries
from maxlm.convert.safetensors_writer import Writer
from maxlm.parameters import parameters

SIZES = {
    "vocab_size": 250,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = {
    **SIZES,
    "num_hidden_layers": 8,
    "head_dim": 10,
    "sliding_window": 5,
    "rms_norm_eps": 0.1,  # of small models: a norm of little magnifies what float32 rounds
    "rope_local_base_freq": 10.0,
    "query_pre_attn_scalar": 30,
}
CASES = {  # config.json of a small model of each kind
    "llama": {"model_type": "llama", **SIZES, "head_dim": 10},
    "llama, scaled": {
        "model_type": "llama",
        **SIZES,
        "head_dim": 10,
        "rope_scaling": {**SCALED, "original_max_position_embeddings": 20},
    },
    "llama, biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **SIZES, "head_dim": 10, "sliding_window": 5},
    "mistral, no window": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 10, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "mixtral, window": {
        "model_type": "mixtral",
        **SIZES,
        "head_dim": 10,
        "sliding_window": 5,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "qwen3_moe, normalized": {
        "model_type": "qwen3_moe",
        **SIZES,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe, dense first": {
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [0],
    },
    "olmo2": {"model_type": "olmo2", **SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 250,
        "n_embd": 24,
        "n_inner": 28,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-3,
    },
    "bert": {
        "model_type": "bert",
        **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")},
        "max_position_embeddings": 64,
        "type_vocab_size": 3,
        "layer_norm_eps": 1e-3,
    },
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 10},
    "gemma2": {
        "model_type": "gemma2",
        **SIZES,
        "head_dim": 10,
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {"model_type": "gemma3_text", **GEMMA3},
    "gemma3, scaled": {
        "model_type": "gemma3_text",
        **GEMMA3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "phi3, partial": {"model_type": "phi3", **SIZES, "sliding_window": None, "partial_rotary_factor": 0.5},
}


def read(name):
    """The family and our model config of a case."""
    tree = CASES[name]
    return family_of(tree), family_of(tree).read_config(tree)


def random_tensors(wanted, dtype=np.float32, seed=0, norms=1.0):
    """Tensors in which no number is at its default: norms are around `norms`, all else around zero."""
    rng = np.random.default_rng(seed)
    around = {e.name: norms * bool(re.search("norm/weight", e.parts[0].path)) for e in wanted}
    return {e.name: (around[e.name] + 0.2 * rng.standard_normal(e.shape)).astype(dtype) for e in wanted}


def to_params(model, wanted, tensors):
    """Our parameters as a tree of host arrays."""
    flat = {path: np.zeros(parameter.shape, np.float32) for path, parameter in parameters(model).items()}
    for entry in wanted:
        for part, values in entry.to_ours(tensors[entry.name]):
            flat[part.path][part.slot] = values
    tree = {}
    for path, values in flat.items():
        *above, last = path.split("/")
        holder = tree
        for key in above:
            holder = holder.setdefault(key, {})
        holder[last] = values
    return tree, flat


@pytest.mark.parametrize("name", CASES)
def test_tensors_go_over_and_back(name):
    family, model = read(name)
    wanted = entries(family, model)
    tensors = random_tensors(wanted)
    _, flat = to_params(model, wanted, tensors)
    assert sum(x.size for x in tensors.values()) == sum(np.count_nonzero(x) for x in flat.values())
    for entry in wanted:
        ours = [flat[part.path][part.slot] for part in entry.parts]
        back = entry.to_theirs(ours)
        assert (back.shape, back.tobytes()) == (entry.shape, tensors[entry.name].tobytes()), entry.name


@pytest.mark.parametrize("name", CASES)
def test_configs_go_over_and_back(name):
    family, model = read(name)
    back = family.write_config(model)
    assert {key: back[key] for key in CASES[name]} == CASES[name]
    assert meaning(family.read_config(json.loads(json.dumps(back)))) == meaning(model)
    assert family_for(model, [family.model_type]) == (family, back)
    family_for(model)[0].write_config(model)


def test_rope_is_read_as_transformers_5_writes_it():
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 20, **SCALED}
    tree = {k: v for k, v in CASES["llama"].items() if k != "rope_theta"}
    model = FAMILIES["llama"].read_config({**tree, "rope_parameters": rope})
    assert (model.rope_theta, model.rope_scaling) == (500.0, (8.0, 1.0, 4.0, 20))


def test_gemma_3_is_read_as_transformers_5_writes_it():
    tree = {k: v for k, v in CASES["gemma3"].items() if k not in ("rope_theta", "rope_local_base_freq")}
    full = {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0}
    tree |= {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_theta": 10.0}}}
    tree |= {"layer_types": [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 2]}
    model = FAMILIES["gemma3_text"].read_config(tree)
    assert model == read("gemma3, scaled")[1].model_copy(update={"tie_embeddings": True})
    assert (model.layer_pattern, model.num_lead_layers) == (("local",) * 5 + ("global",), 2)


def test_a_model_of_no_family():
    model = ModelConfig(vocab_size=9, num_layers=1, d_model=8, d_ff=8, num_heads=2, norm="layer")
    with pytest.raises(FamilyError, match=r"no family.*llama has no model with norm='layer'.*phi3 has no"):
        family_for(model)
    with pytest.raises(FamilyError, match="'lama' is not a family .* llama is the nearest"):
        family_of({"model_type": "lama"})
    for tree in ({}, {"model_type": ["llama"]}):
        with pytest.raises(FamilyError, match="is not a family that maxlm knows; those are llama, mistral"):
            family_of(tree)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size": None}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": -3}, "hidden_size: .*greater"),
        ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple"),
        ({"hidden_act": "swoosh"}, "hidden_act='swoosh' is not one of 'silu'"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "type 'yarn' is not one that maxlm has"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "type linear has no factor"),
        ({"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling of layers with a"),
        ({"model_type": "gemma3"}, "model_type=gemma3 is a model of images and text"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types=.* for each of num_hidden_layers=4"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 is not a positive"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "6"}, "sliding_window_pattern='6'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"rope_scaling": {**SCALED}}, "has no original_max_position_embeddings"),
        ({"rope_scaling": 3}, "rope_scaling=3 is to be an object"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not the first layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 1}, "mlp_only_layers=1 is not the first layers"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True is not False"),
    ],
)
def test_configs_that_are_refused(changed, says):
    tree = {**CASES["llama"], **changed}
    with pytest.raises(FamilyError, match=says):
        family_of(tree).read_config(tree)
    with pytest.raises(FamilyError, match="vocab_size is missing"):
        FAMILIES["llama"].read_config({"model_type": "llama"})


def test_every_tensor_is_accounted_for():
    wanted = entries(*read("llama"))
    shapes = {entry.name: entry.shape for entry in wanted}
    check_tensors(wanted, shapes, "here")
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(FamilyError, match=rf"here has no tensor {name}"):
        check_tensors(wanted, {k: v for k, v in shapes.items() if k != name}, "here")
    with pytest.raises(FamilyError, match=rf"tensor {name} is \[24, 28\], and config.json makes it \[28, 24\]"):
        check_tensors(wanted, {**shapes, name: (24, 28)}, "here")
    with pytest.raises(FamilyError, match=r"'model\.layers\.4\.x' that has no place"):
        check_tensors(wanted, {**shapes, "model.layers.4.x": (1,)}, "here")


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    import torch
    import transformers

    family, model = read(name)
    wanted = entries(family, model)
    tensors = random_tensors(wanted, norms=0.0 if model.norm_offset else 1.0)
    model = model.model_copy(update={"dtype": "float32"})
    common = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common |= {} if model.max_positions else {"max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**family.write_config(model), **common}))
    with Writer(str(tmp_path), {k: (v.dtype, v.shape) for k, v in tensors.items()}, 10**9) as writer:
        for key, values in tensors.items():
            writer.write(key, values)
    peer, about = getattr(transformers, family.architecture).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(about.values()), about

    run = small_config(model=model.model_dump(), train={"seq_len": 32, "batch_size": 8})
    program = program_on(run)
    params, _ = to_params(model, wanted, tensors)
    batch = one_document(run)
    tokens = torch.tensor(batch["tokens"][0], dtype=torch.long)
    want = peer.eval()(input_ids=tokens, use_cache=False).logits.detach().numpy()
    got = our_logits(program, params, batch)[..., : model.vocab_size]
    assert want.std() > 0.1
    assert np.abs(got - want).max() <= 2e-5
    check_rows(peer, program, params, batch, model.vocab_size)


def check_rows(peer, program, params, batch, vocab_size):
    """A padded row, and one of two documents, give the logits that transformers gives each document alone."""
    import torch

    B, T = batch["tokens"].shape[1:]
    cuts = np.arange(B) % (T // 2) + T // 2
    after = np.arange(T) >= cuts[:, None]
    positions = np.where(after, np.arange(T) - cuts[:, None], np.arange(T)).astype(np.int32)[None]
    for second in (0, 2):  # padding, and another document
        segments = np.where(after, second, 1).astype(np.int32)[None]
        rows = {**batch, "positions": positions, "segments": segments}
        got = our_logits(program, params, rows)[..., :vocab_size]
        tokens = torch.tensor(batch["tokens"][0], dtype=torch.long)
        mask = torch.tensor(~after, dtype=torch.long)
        want = peer(input_ids=tokens, attention_mask=mask, use_cache=False).logits.detach().numpy()
        assert np.abs(got - want)[~after].max() <= 2e-5
        for row, cut in zip(range(B) if second else [], cuts, strict=False):
            alone = peer(input_ids=tokens[row : row + 1, cut:], use_cache=False).logits.detach().numpy()[0]
            assert np.abs(got[row, cut:] - alone).max() <= 2e-5


def test_a_stack_is_in_the_order_of_the_layers():
    wanted = entries(*read("llama"))
    slots = [part.slot for entry in wanted for part in entry.parts if part.path == "layers/0/attention/q"]
    assert slots == [(0,), (1,), (2,), (3,)]
