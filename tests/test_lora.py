"""Adapters: the gradients of their definition on any mesh, weights that stay as they are, exact resumes, exports."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, assert_same_loss_and_grads, loss_and_grads, program_on, random_batch, small_config

import maxlm
from maxlm.checkpoint import CheckpointError, Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.config_file import ConfigError
from maxlm.convert.from_hf import from_hf
from maxlm.convert.to_hf import to_hf
from maxlm.data.build import build_store
from maxlm.ending import bytes_per_device
from maxlm.flops import attention_flops_per_token
from maxlm.init_from import read_parameters
from maxlm.manifest import DamagedError, Manifest
from maxlm.mesh import make_mesh
from maxlm.run_folder import identity
from maxlm.step import build_program

CACHE: dict[str, str] = {}
ALPHA, RANK = 8.0, 4
EXPERTS = {
    "num_layers": 4,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_d_ff": 14,
    "num_shared_experts": 1,
    "num_dense_layers": 1,
}


@pytest.fixture(scope="module", autouse=True)
def programs_compile_once(compiled_once):
    CACHE["folder"] = compiled_once


def lora_config(lora=None, **sections):
    sections["model"] = {**MODEL, **sections.get("model", {})}
    sections["train"] = {"init_from": "somewhere", **sections.get("train", {})}
    return small_config(lora={"rank": RANK, "alpha": ALPHA, **(lora or {})}, **sections)


def random_weights(program, seed=0):
    """Host parameters and adapters, all random: zeros hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = {name: program.state_shapes[name] for name in ("params", "lora")}
    return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def lora_loss_and_grads(program, weights, batch):
    with jax.set_mesh(program.mesh):
        placed = jax.tree.map(jax.device_put, weights, {name: program.state_shardings[name] for name in weights})
        batch = {k: jax.device_put(v, program.batch_sharding) for k, v in batch.items()}
        grads, metrics = program.grads(program.weights(placed), batch)
    return float(metrics["loss"]), jax.device_get(grads)


def with_adapters(function, params, adapters):
    """The tree of parameters with function(weight, a, b) where there is an adapter."""
    if not isinstance(params, dict):
        return function(params, adapters["a"], adapters["b"])
    return {k: with_adapters(function, x, adapters[k]) if k in adapters else x for k, x in params.items()}


def merged(weights):
    """W + alpha / rank * A B of every layer, by its definition."""

    def merge(w, a, b):
        layers = zip(w, a, b, strict=True)
        return jnp.stack([w + ALPHA / RANK * jnp.tensordot(a, b, 1) for w, a, b in layers])

    return with_adapters(merge, weights["params"], weights["lora"])


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "attention_bias": "all"}, EXPERTS], ids=str)
def test_gradients_are_those_of_the_merged_weights(model):
    config = lora_config({"targets": ["attention.*", "mlp.up", ".*down"]} if not model else {}, model=model)
    program, batch = program_on(config), random_batch(config)
    weights = random_weights(program)
    plain = program_on(small_config(model={**MODEL, **model}))
    whole, pull = jax.vjp(lambda lora: merged({**weights, "lora": lora}), weights["lora"])
    loss, grads = loss_and_grads(plain, jax.device_get(whole), batch)
    assert_same_loss_and_grads(lora_loss_and_grads(program, weights, batch), (loss, jax.device_get(pull(grads)[0])))


@pytest.mark.parametrize(
    ("mesh", "train", "model"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {}),
        ({"fsdp": 2, "context": 2, "tensor": 2}, {"grad_accum": 4, "remat": "none"}, {"num_kv_heads": 1}),
        ({"slices": 2, "fsdp": 4}, {"gather": "step", "repeats_per_scan": 3}, {"tie_embeddings": True}),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"remat": "dots"}, EXPERTS),
    ],
    ids=str,
)
def test_any_mesh_gives_the_gradients_of_one_device(mesh, train, model):
    config = lora_config(model=model)
    one = program_on(config)
    weights, batch = random_weights(one), random_batch(config)
    want = lora_loss_and_grads(one, weights, batch)
    config = lora_config(model=model, train=train)
    assert_same_loss_and_grads(lora_loss_and_grads(program_on(config, **mesh), weights, random_batch(config)), want)


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(n, marks=pytest.mark.long) for n in ("adafactor", "lion"))])
def test_only_adapters_change_and_only_they_have_optimizer_state(name):
    optim = {"name": name, "ema": 0.9, "weight_decay": 0.1}
    plain, program = program_on(small_config(optim=optim)), program_on(lora_config(optim=optim), data=2, fsdp=2)
    batch = random_batch(program.config)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        before = jax.device_get(state)
        placed = {k: jax.device_put(v, program.batch_sharding) for k, v in batch.items()}
        for _ in range(2):
            state, metrics = program.step(state, placed)
        after = jax.device_get(state)
    first, _ = loss_and_grads(plain, before["params"], batch)
    assert float(metrics["loss"]) < first
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    changed = jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), after["lora"], before["lora"]))
    assert all(changed)
    for part in ("opt", "ema"):
        sizes = [sum(x.size for x in jax.tree.leaves(p.state_shapes[part])) for p in (plain, program)]
        assert sizes[1] < 0.5 * sizes[0], "at rank 4 of a model of width 20"


@pytest.mark.slow
@pytest.mark.parametrize(
    "optim",
    [
        {"state_on_host": True},
        pytest.param({"state_over_data": True, "state_dtype": "bfloat16"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_state_may_rest_elsewhere(optim):
    config = lora_config(optim=optim)
    losses = []
    for program in (program_on(lora_config()), program_on(config, data=2, fsdp=2)):
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            placed = {k: jax.device_put(v, program.batch_sharding) for k, v in random_batch(config).items()}
            losses.append([])
            for _ in range(3):
                state, metrics = program.step(state, placed)
                losses[-1].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3 if "state_dtype" in optim else 1e-5)


@pytest.mark.slow
def test_frozen_weights_may_multiply_in_int8():
    config = lora_config(quant={"mode": "int8", "rounding": "nearest"})
    one = program_on(config)
    weights, batch = random_weights(one), random_batch(config)
    loss, grads = lora_loss_and_grads(one, weights, batch)
    loss_on, grads_on = lora_loss_and_grads(program_on(config, data=2, fsdp=2, tensor=2), weights, batch)
    exact, exact_grads = lora_loss_and_grads(program_on(lora_config()), weights, batch)
    assert loss_on == pytest.approx(loss, rel=1e-3)
    assert loss == pytest.approx(exact, rel=2e-2)
    for some in (grads, grads_on):
        for g, want in zip(jax.tree.leaves(some), jax.tree.leaves(exact_grads), strict=True):
            assert np.linalg.norm(g - want) < 0.2 * np.linalg.norm(want)


def test_flops_are_those_of_forward_passes_and_of_gradients_that_are_made():
    plain, program = program_on(small_config()), program_on(lora_config({"targets": ["mlp.down"]}))
    assert program.num_adapters == 3 * RANK * (28 + 20)
    of_attention = attention_flops_per_token(plain.config.model, 12)
    of_weights = plain.flops_per_token - of_attention
    assert program.flops_per_token == of_weights * 4 / 6 + of_attention + 6 * program.num_adapters


def test_a_new_adapter_adds_nothing():
    config = lora_config(model={"num_kv_heads": 2})
    program, plain, batch = program_on(config), program_on(small_config()), random_batch(config)
    with jax.set_mesh(program.mesh):
        state = jax.device_get(program.init(jax.random.key(3)))
    assert lora_loss_and_grads(program, {k: state[k] for k in ("params", "lora")}, batch)[0] == pytest.approx(
        loss_and_grads(plain, state["params"], batch)[0], rel=1e-7
    )
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(state["lora"]) if x.shape[-1] == RANK)


def test_a_step_needs_no_memory_for_gradients_of_frozen_weights():
    model = {"num_layers": 8, "d_model": 256, "d_ff": 512, "head_dim": 32, "num_heads": 8}
    model = {**MODEL, **model, "dtype": "bfloat16"}
    train = {"batch_size": 1}
    bytes_of = {}
    for name, config in [
        ("plain", small_config(model=model, train=train)),
        ("lora", lora_config({"base_dtype": "bfloat16"}, model=model, train=train)),
    ]:
        program = program_on(config)
        memory = program.lower_step().compile().memory_analysis()
        params = program.state_shapes["params"]
        bytes_of[name] = memory.temp_size_in_bytes, bytes_per_device(params), bytes_per_device(program.state_shapes)
    (plain_temp, plain_params, plain_state), (temp, params, state) = bytes_of["plain"], bytes_of["lora"]
    assert params == plain_params / 2
    assert state < 0.3 * plain_state
    assert plain_temp > plain_params, "gradients"
    assert temp < 0.5 * plain_temp


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": {"rank": 0}}, r"lora.rank.*0"),
        ({"lora": {"alpha": 0}}, r"lora.alpha.*0"),
        ({"lora": {"targets": ["("]}}, r"'\(' is not a regular expression"),
        ({"lora": {"ranks": 3}}, "did you mean lora.rank"),
        ({"train": {"init_from": None}}, "train.init_from is null"),
        ({"optim": {"name": "muon"}}, "optim.name=muon"),
        ({"mesh": {"stage": 2}}, "mesh.stage=2: lora does not go with a pipeline"),
    ],
)
def test_what_does_not_go_is_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        lora_config(sections.pop("lora", {}), **sections)


@pytest.mark.parametrize(
    ("target", "words"),
    [("attention.query", "did you mean attention."), ("embed", "there are attention.k, attention.o")],
)
def test_a_target_that_matches_nothing_is_refused(target, words):
    with pytest.raises(ConfigError, match=words):
        program_on(lora_config({"targets": ["mlp.up", target]}))


# ---- exports and whole runs


def read_back(folder, program):
    """Host parameters of a Hugging Face folder, by way of a conversion beside it."""
    from_hf(f"{folder}", f"{folder}-back")
    with contextlib.closing(Checkpoints(f"{folder}-back", CheckpointConfig(), read_only=True)) as other:
        return jax.device_get(read_parameters(other, 0, program))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_an_export_is_the_merged_model(dtype, tmp_path):
    model = {"vocab_multiple": 128, "tie_embeddings": True}
    config = lora_config({"base_dtype": dtype}, model=model)
    program, plain = program_on(config, fsdp=2, tensor=2), program_on(small_config(model={**MODEL, **model}))
    weights = random_weights(program)
    weights["params"] = jax.tree.map(lambda x: x.astype(dtype), weights["params"])
    padding = weights["params"]["embed"][config.model.vocab_size :]
    padding[:] = 0  # is not exported
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        state |= jax.tree.map(jax.device_put, weights, {name: program.state_shardings[name] for name in weights})
        with contextlib.closing(Checkpoints(f"{tmp_path}/run", CheckpointConfig(), run=identity(config, {}))) as mine:
            mine.save(3, state)
            mine.wait()
    to_hf(f"{tmp_path}/run", f"{tmp_path}/hf", dtype="float32", verify=True)
    weights = jax.tree.map(lambda x: x.astype(np.float32), weights)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, read_back(tmp_path / "hf", plain), merged(weights))

    step = f"{tmp_path}/run/checkpoints/3"
    saved = Manifest.read(step)
    name = "lora/layers/0/attention/q/a"
    other = saved.arrays[name]._replace(fingerprint=saved.arrays[f"{name[:-1]}b"].fingerprint)
    for changed, error, words in [
        ({"run": {**saved.run, "lora": None}}, CheckpointError, "does not say what its adapters are"),
        ({"run": {**saved.run, "lora": {"rank": 2}}}, CheckpointError, "has adapters"),
        ({"arrays": {**saved.arrays, name: other}}, DamagedError, f"array {name} is not the one"),
    ]:
        saved.model_copy(update=changed).write(step)
        with pytest.raises(error, match=words):
            to_hf(f"{tmp_path}/run", f"{tmp_path}/no")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(16):
        (folder / f"{i}.txt").write_text(Path(__file__).read_text()[i * 50 : 3000 + i * 90])
    build_store([str(folder / "*.txt")], str(folder / "store"), heldout=0.2, workers=1)
    return str(folder / "store")


def run_config(tmp_path, store, name, **sections):
    tree = {
        "run": {"name": name, "root": str(tmp_path)},
        "model": {**MODEL, "vocab_size": 257, "vocab_multiple": 128},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2, "fake_devices": 8},
        "data": {"stores": [{"path": store}]},
        "train": {"steps": 4, "batch_size": 8, "seq_len": 32, "compilation_cache": CACHE["folder"]},
        "optim": {"learning_rate": 1e-2, "schedule": {"name": "constant"}},
        "eval": {"batches": 2, "sample_tokens": 2},
        "checkpoint": {"every": 2},
    }
    return maxlm.parse_config(tree | {k: {**tree.get(k, {}), **v} for k, v in sections.items()})


def restored(config, step):
    program = build_program(config, make_mesh(config.mesh, jax.devices()))
    checkpoints = Checkpoints(f"{config.run.root}/{config.run.name}", CheckpointConfig(), read_only=True)
    assert ("lora" in checkpoints.manifest(step).run) == (config.lora is not None)
    state = jax.device_get(checkpoints.restore(step, program.state_shapes))
    checkpoints.close()
    return program, state


@pytest.mark.slow
def test_a_run_resumes_exactly_and_exports_what_it_trained(tmp_path, store):
    maxlm.train(run_config(tmp_path, store, "base"))
    sections = {"lora": {"rank": RANK, "alpha": ALPHA}, "train": {"init_from": f"{tmp_path}/base", "steps": 4}}
    whole = run_config(tmp_path, store, "whole", **sections, optim={"ema": 0.9})
    result = maxlm.train(whole)
    half = run_config(tmp_path, store, "half", **sections, optim={"ema": 0.9})
    stop = lambda step, _: step == 2  # noqa: E731
    assert maxlm.train(half, callbacks=[stop]).status == "stopped"
    assert maxlm.train(half).final == result.final
    program, state = restored(whole, 4)
    jax.tree.map(np.testing.assert_array_equal, restored(half, 4)[1], state)
    base = restored(run_config(tmp_path, store, "base"), 4)[1]
    jax.tree.map(np.testing.assert_array_equal, base["params"], state["params"])
    with pytest.raises(ConfigError, match="lora.rank was 4 and is 2"):
        maxlm.train(run_config(tmp_path, store, "half", **{**sections, "lora": {"rank": 2, "alpha": ALPHA}}))

    # what is exported is the merged model
    with pytest.raises(CheckpointError, match="is of a run with lora, .* merge them with maxlm convert to-hf"):
        maxlm.train(run_config(tmp_path, store, "other", train={"init_from": f"{tmp_path}/whole"}))
    to_hf(f"{tmp_path}/whole", f"{tmp_path}/hf", verify=True)
    params = read_back(tmp_path / "hf", build_program(run_config(tmp_path, store, "plain"), program.mesh))
    want = merged({name: state[name] for name in ("params", "lora")})
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, params["layers"], want["layers"])
