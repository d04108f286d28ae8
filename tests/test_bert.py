"""Models whose tokens see both sides: attention, meshes, BERT's files, and what such models are not for."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same_loss_and_grads,
    loss_and_grads,
    our_logits,
    perturbed_params,
    place,
    program_on,
    random_batch,
    small_config,
)
from test_convert import read
from test_convert_folders import hashes, write_model

from maxlm.cli import main
from maxlm.config import MeshConfig, ModelConfig
from maxlm.config_file import ConfigError
from maxlm.convert.families import FamilyError
from maxlm.convert.from_hf import from_hf
from maxlm.convert.to_hf import to_hf
from maxlm.flops import attention_flops_per_token, num_params
from maxlm.infer.encode import Encoder
from maxlm.infer.models import ModelError, open_model
from maxlm.mesh import make_mesh
from maxlm.parallel.attention import sharded_attention, zigzag_order
from maxlm.sharding import compute_spec
from maxlm.trainer import train

BERT = {
    "vocab_multiple": 8,
    "num_layers": 4,
    "d_model": 24,
    "d_ff": 40,
    "num_heads": 4,
    "num_kv_heads": None,
    "head_dim": None,
    "norm": "layer",
    "norm_bias": True,
    "norm_position": "residual",
    "norm_eps": 1e-3,
    "embed_norm": True,
    "position": "learned",
    "max_positions": 40,
    "num_token_types": 3,
    "mlp": "plain",
    "mlp_bias": True,
    "activation": "gelu",
    "attention_bias": "all",
    "tie_embeddings": True,
    "head_transform": True,
    "unembed_bias": True,
    "causal": False,
}


def bert_config(model=None, **train):
    fields = {**small_config().model.model_dump(), **BERT, **(model or {})}
    return small_config(model=fields, train={"batch_size": 8, "seq_len": 32, **train})


def batch_with_types(config):
    batch = random_batch(config)
    types = np.random.default_rng(5).integers(0, config.model.num_token_types, batch["tokens"].shape, np.int32)
    return {**batch, "token_types": types}


# ---- attention


def reference(q, k, v, segments, scale):
    """Attention to all tokens of a token's segment, in numpy and float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) * scale
    seen = segments[:, None, :, None] == segments[:, None, None, :]
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("mesh", "kind", "local"),
    [
        ({}, "ring", "plain"),
        ({}, "ring", "splash"),
        ({}, "ring", "cudnn"),
        ({"context": 2, "tensor": 2}, "ring", "plain"),
        ({"context": 4}, "gather", "plain"),
        pytest.param({"context": 2}, "ring", "splash", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_queries_see_both_sides_of_their_segment(mesh, kind, local):
    rng = np.random.default_rng(0)
    T, shards = 512, mesh.get("context", 1)
    dtype = jnp.bfloat16 if local == "cudnn" else jnp.float32
    draw = lambda heads: rng.standard_normal((2, T, heads, 16)).astype(dtype).astype(np.float32)  # noqa: E731
    q, k, v, do = draw(4), draw(2), draw(2), draw(4)
    segments = np.sort(rng.integers(0, 4, (2, T)), 1).astype(np.int32)
    order = zigzag_order(T, shards) if shards > 1 else np.arange(T)
    sizes = MeshConfig(**{"fsdp": 1, **mesh})

    def run(q, k, v, segments, do):
        options = {"scale": 0.3, "causal": False, "interpret": True}
        attend = lambda q, k, v: sharded_attention(kind, local, q, k, v, segments, **options)  # noqa: E731
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    one = make_mesh(sizes, jax.devices()[: shards * mesh.get("tensor", 1)])
    with jax.set_mesh(one), jax.numpy_dtype_promotion("standard" if local == "cudnn" else "strict"):
        put = lambda x, dims: jax.device_put(x[:, order], compute_spec(dims))  # noqa: E731
        heads = [put(x.astype(dtype), dims) for x, dims in ((q, "BTNH"), (k, "BTKH"), (v, "BTKH"), (do, "BTNH"))]
        placed = *heads[:3], put(segments, "BT"), heads[3]
        o, *grads = (np.asarray(x, np.float64)[:, np.argsort(order)] for x in jax.jit(run)(*placed))
    bound = 2e-2 if local == "cudnn" else 2e-5
    assert np.abs(o - reference(q, k, v, segments, 0.3)).max() <= bound
    for i, grad in enumerate(grads):  # along a direction, by differences
        step = rng.standard_normal(grad.shape)
        move = lambda t, i=i, step=step: [x + t * step if j == i else x for j, x in enumerate(map(to64, (q, k, v)))]  # noqa: E731
        up, down = (reference(*move(t), segments=segments, scale=0.3) for t in (1e-5, -1e-5))
        want = ((up - down) / 2e-5 * to64(do)).sum()
        assert abs((grad * step).sum() - want) <= bound * 10 * max(1.0, abs(want))


def to64(x):
    return np.asarray(x, np.float64)


# ---- the model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accum"),
    [
        ({"tensor": 2, "fsdp": 2}, 1),
        ({"context": 2, "fsdp": 2, "context_attention": "ring"}, 2),
        ({"context": 2, "tensor": 2, "context_attention": "gather"}, 1),
        ({"stage": 2, "tensor": 2}, 2),
    ],
    ids=str,
)
def test_meshes_give_what_one_device_gives(mesh, accum):
    config = bert_config({"attention_bias": "none"}, grad_accum=accum)  # by a bias of keys the gradient is zero
    one = program_on(config)
    params, batch = perturbed_params(one), batch_with_types(config)
    want = loss_and_grads(one, params, batch)
    assert_same_loss_and_grads(loss_and_grads(program_on(config, **mesh), params, batch), want)


@pytest.mark.parametrize("mesh", [{"tensor": 2, "fsdp": 2}, {"context": 2}], ids=str)
def test_logits_on_meshes_are_those_of_one_device(mesh):
    config = bert_config({"num_layers": 2})
    one = program_on(config)
    params, batch = perturbed_params(one), batch_with_types(config)
    want = our_logits(one, params, batch)
    assert np.abs(our_logits(program_on(config, **mesh), params, batch) - want)[..., :251].max() <= 1e-5


def test_a_row_of_documents_gives_what_each_gives_alone():
    config = bert_config()
    program = program_on(config)
    params, batch = perturbed_params(program), batch_with_types(config)
    with jax.set_mesh(program.mesh):
        run = jax.jit(lambda p, b: program.passes.hidden_states(p, {k: v[0] for k, v in b.items()}))
        hidden = np.asarray(run(*place(program, params, batch)))
        segments, T = batch["segments"][0], batch["tokens"].shape[-1]
        for row in range(3):
            at = segments[row] == 2
            alone = {name: np.zeros_like(x) for name, x in batch.items()}
            for name in ("tokens", "token_types", "positions"):
                alone[name][0, row, : at.sum()] = batch[name][0, row, at]
            alone["segments"][0, row, : at.sum()] = 1
            assert 0 < at.sum() < T
            got = np.asarray(run(*place(program, params, alone)))[row, : at.sum()]
            assert np.abs(got - hidden[row, at]).max() <= 1e-5
            alone["tokens"][0, row, at.sum() - 1] += 1  # the last token is seen by the first
            changed = np.asarray(run(*place(program, params, alone)))[row, 0]
            assert at.sum() == 1 or np.abs(changed - got[0]).max() > 1e-3


def test_token_types_are_zero_unless_given():
    config = bert_config()
    program = program_on(config)
    params, batch = perturbed_params(program), batch_with_types(config)
    without = our_logits(program, params, {k: v for k, v in batch.items() if k != "token_types"})
    zeros = our_logits(program, params, {**batch, "token_types": 0 * batch["token_types"]})
    assert np.array_equal(without, zeros)
    assert np.abs(our_logits(program, params, batch) - zeros).max() > 1e-2


def test_what_it_costs():
    config = bert_config()
    shapes = program_on(config).state_shapes["params"]
    assert num_params(config.model)["total"] == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    both = attention_flops_per_token(config.model, 32)
    assert both == 2 * attention_flops_per_token(config.model.model_copy(update={"causal": True}), 32)
    base = {"vocab_size": 30522, "vocab_multiple": 1, "num_layers": 12, "d_model": 768, "d_ff": 3072, "num_heads": 12}
    model = ModelConfig.model_validate({**BERT, **base, "max_positions": 512, "num_token_types": 2})
    assert num_params(model)["total"] == 109_514_298  # of transformers.BertForMaskedLM(BertConfig())


@pytest.mark.slow
def test_it_learns_masked_tokens(tmp_path):
    config = bert_config({"num_layers": 1}, steps=12, batch_size=8, seq_len=16)
    config = config.model_copy(update={"run": config.run.model_copy(update={"root": str(tmp_path)})})
    losses = []

    def data(step):
        rng = np.random.default_rng(step)
        targets = np.repeat(rng.integers(1, 9, (8, 8)), 2, 1)  # a token's neighbour, before or behind, says it
        masked = np.zeros((8, 16), bool)
        masked[np.arange(8), rng.integers(0, 16, 8)] = True
        return {"tokens": np.where(masked, 0, targets), "targets": targets, "mask": masked.astype(np.float32)}

    train(config, data=data, callbacks=[lambda step, metrics: losses.append(metrics["loss"])])
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5, losses


# ---- files


def test_older_files_have_other_names_and_more_tensors(tmp_path, capsys):
    tensors = write_model(tmp_path / "new", "bert")
    renamed = {}
    for name, x in tensors.items():
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed |= {new: x, **({} if new == name else {name: None})}
    more = {"bert.pooler.dense.weight": np.ones((24, 24), np.float32), "cls.seq_relationship.bias": np.ones(2, "f4")}
    more |= {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}
    more |= {"cls.predictions.decoder.bias": tensors["cls.predictions.bias"]}
    more |= {"bert.embeddings.position_ids": np.arange(64)[None]}
    write_model(tmp_path / "old", "bert", **renamed, **more)
    assert main(["convert", "from-hf", str(tmp_path / "old"), str(tmp_path / "ours"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "left out, no part of the model: bert.pooler.dense.weight, cls.seq_relationship.bias\n" in shown
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), verify=True)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "new")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cls.predictions.decoder.bias": np.ones(250, np.float32)}, "decoder.bias differs from cls.predictions.bias"),
        ({"cls.predictions.transform.dense.weight": None}, "has no tensor cls.predictions.transform.dense.weight"),
        ({"bert.embeddings.LayerNorm.gamma": np.ones(24, np.float32)}, "LayerNorm.gamma' that has no place"),
        ({"classifier.weight": np.ones((2, 24), np.float32)}, "'classifier.weight' that has no place"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_files_that_are_refused(changed, says, tmp_path):
    write_model(tmp_path / "hf", "bert", **changed)
    with pytest.raises(FamilyError, match=says):
        from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_configs_that_are_refused(key, value):
    family, model = read("bert")
    with pytest.raises(FamilyError, match=f"{key}={value!r} is not"):
        family.read_config({**family.write_config(model), key: value})


# ---- what it is for, and what not


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    write_model(folder / "hf", "bert", np.dtype(np.float32))
    from_hf(str(folder / "hf"), str(folder / "ours"))
    return str(folder / "ours")


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_hidden_states_of_texts_do_not_hang_on_their_neighbours(converted, axes, monkeypatch):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    monkeypatch.setattr("maxlm.infer.models.start_devices", lambda config: devices)
    mesh = MeshConfig(**axes)
    encoder = Encoder(open_model(converted, mesh, "float32"), mesh, batch_tokens=128)
    texts = [list(range(1, 2 + n)) for n in (4, 40, 1, 63, 4)]
    types = [[0] + [2] * (len(text) - 1) for text in texts]
    together = encoder.hidden_states(texts, types)
    assert [x.shape for x in together] == [(len(text), 24) for text in texts]
    for text, row, got in zip(texts, types, together, strict=True):
        assert np.abs(encoder.hidden_states([text], [row])[0] - got).max() <= 1e-5
    assert np.abs(encoder.hidden_states(texts)[0] - together[0]).max() > 1e-3
    assert [x.shape for x in encoder.logits(texts[:2])] == [(5, 250), (41, 250)]
    for given, says in [
        (([[1], []],), "text 2 has 0 tokens; it must have 1 to 64"),
        (([[1] * 65],), "text 1 has 65 tokens"),
        (([[250]],), "token ids 250 to 250, and the model has 250"),
        (([[1]], [[3]]), "token types 3 to 3, and the model has 3"),
        (([[1]], [[0, 0]]), "a number for each token"),
    ]:
        with pytest.raises(ModelError, match=says):
            encoder.hidden_states(*given)


def test_what_needs_the_next_token_is_refused(converted, tmp_path, capsys):
    (tmp_path / "text").write_text("abc")
    (tmp_path / "run.yaml").write_text(json.dumps(tree_of(bert_config(), tmp_path)))
    bare = shutil.copytree(converted, tmp_path / "bare")  # it is refused before weights are read
    shutil.rmtree(bare / "checkpoints" / "0" / "params.embed")
    for command, says in [
        (["generate", str(bare), "abc"], "model.causal=false: each token sees those that follow"),
        (["train", str(tmp_path / "run.yaml")], "model.causal=false: tokens see those that follow, so next-token loss"),
        (["eval", "perplexity", converted, "--text", str(tmp_path / "text")], "next-token likelihoods mean nothing"),
    ]:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert says in error and "Traceback" not in error
    from maxlm.infer.generate import Generator

    opened = open_model(converted, MeshConfig(), "float32")
    with pytest.raises(ValueError, match=r"model.causal=false: .* cannot continue a text"):
        Generator(opened.model, opened.params, opened.mesh)
    with pytest.raises(ConfigError, match="causal=false has no sliding windows; leave layer_pattern"):
        bert_config({"layer_pattern": ["local"], "sliding_window": 4})


def tree_of(config, folder):
    tree = config.model_dump(mode="json", exclude_defaults=True)
    return {**tree, "run": {"root": str(folder)}}


@pytest.mark.oracle
def test_hidden_states_and_logits_are_those_of_transformers(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 120, "num_hidden_layers": 5, "num_attention_heads": 6}
    config = transformers.BertConfig(**shape, intermediate_size=480, max_position_embeddings=70, type_vocab_size=2)
    peer = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert peer.num_parameters() > 1_000_000
    peer.save_pretrained(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), verify=True)
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), verify=True)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
    _, about = transformers.BertForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(about.values()), about

    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 1000, n).tolist() for n in (5, 33, 64, 70)]
    types = [rng.integers(0, 2, len(text)).tolist() for text in texts]
    encoder = Encoder(open_model(str(tmp_path / "ours"), dtype="float32"))
    padded = {"input_ids": texts, "token_type_ids": types, "attention_mask": [[1] * len(text) for text in texts]}
    rows = {key: torch.tensor([row + [0] * (70 - len(row)) for row in x]) for key, x in padded.items()}
    with torch.no_grad():
        want = peer(**rows, output_hidden_states=True)
    found = (encoder.hidden_states(texts, types), want.hidden_states[-1]), (encoder.logits(texts, types), want.logits)
    for ours, theirs in found:
        assert theirs.std() > 0.1
        for text, got, row in zip(texts, ours, theirs.numpy(), strict=True):
            assert np.abs(got - row[: len(text)]).max() <= 2e-5
