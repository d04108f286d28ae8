"""Generation with a cache gives what the whole model gives on the whole text, on any mesh."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from helpers import perturbed_params, place, program_on, random_batch, small_config

from maxlm.data.tokenizer import ByteTokenizer
from maxlm.infer.generate import Generator, pack_left
from maxlm.infer.sampling import Sampling, kept_logits
from maxlm.infer.text import TextStream

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "local": {
        "num_heads": 8,
        "num_layers": 4,
        "layer_pattern": ["local", "global"],
        "sliding_window": 5,
        "rope_theta_local": 50.0,
    },
    "gemma": {
        "norm_position": "both",
        "norm_offset": True,
        "qk_norm": True,
        "attention_softcap": 1.5,
        "logit_softcap": 2.0,
        "embedding_scale": 4.0,
        "tie_embeddings": True,
    },
    "learned": {"position": "learned", "max_positions": 64, "norm": "layer", "norm_bias": True, "mlp": "plain"},
    "experts": {"num_experts": 4, "experts_per_token": 2, "num_dense_layers": 1, "expert_d_ff": 12},
}
MESHES = {"one": {}, "tensor": {"tensor": 4}, "many": {"data": 2, "fsdp": 2, "tensor": 2}, "expert": {"expert": 2}}
PROMPTS = [[5, 9, 200], [7], list(range(30, 53))]
NUM_TOKENS = 12


@cache
def reference(model: str) -> list[list[int]]:
    """Greedy continuations, each token from a forward pass of its text alone, without padding or cache."""
    config = small_config(model=MODELS[model], train={"batch_size": 1, "seq_len": 40})
    program = program_on(config)
    batch = random_batch(config)
    params, _ = place(program, perturbed_params(program), batch)
    run = jax.jit(program.passes.logits)
    texts = []
    with jax.set_mesh(program.mesh):
        for prompt in PROMPTS:
            text = list(prompt)
            for _ in range(NUM_TOKENS):
                tokens = np.zeros((1, 40), np.int32)
                tokens[0, : len(text)] = text
                rows = {"tokens": tokens, "positions": np.arange(40, dtype=np.int32)[None]}
                rows["segments"] = np.ones_like(tokens)
                rows = {k: jax.device_put(v, jax.P(None, None)) for k, v in rows.items()}
                text.append(int(np.asarray(run(params, rows))[0, len(text) - 1].argmax()))
            texts.append(text[len(prompt) :])
    return texts


def generator(model: str, **mesh: int) -> Generator:
    config = small_config(model=MODELS[model], train={"batch_size": 8})
    program = program_on(config, **mesh)
    params, _ = place(program, perturbed_params(program), random_batch(config))
    return Generator(config.model, params, program.mesh)


def continued(made: Generator, *arguments: Any, **options: Any) -> list[list[int]]:
    return np.stack(list(made.tokens(*arguments, **options)), axis=1).tolist()


@pytest.mark.parametrize(
    ("model", "mesh"),
    [*((model, "one") for model in MODELS), ("local", "tensor"), ("gemma", "many"), ("experts", "expert")],
)
def test_greedy_tokens_are_those_of_the_whole_text(model, mesh):
    found = continued(generator(model, **MESHES[mesh]), PROMPTS, NUM_TOKENS)
    assert found == reference(model)


def test_layers_with_a_window_keep_no_more_than_it():
    made = generator("local")
    with jax.set_mesh(made.mesh):
        rows = [jax.device_put(x, jax.P(*[None] * x.ndim)) for x in pack_left(PROMPTS, len(PROMPTS))]
        numbers, seed = jax.numpy.zeros(3, jax.numpy.int32), jax.numpy.int32(0)
        _, cache = made._decoder.prefill(made._params, *rows, numbers, seed, size=64, sampling=Sampling())
    assert [(k.shape[1], v.shape[1]) for k, v in cache.layers] == [(5, 5), (64, 64)] * 2


def test_what_is_drawn_hangs_on_seed_and_number_alone():
    made, sampling = generator("plain"), Sampling(temperature=2.0)
    together = continued(made, PROMPTS, NUM_TOKENS, sampling, seed=3)
    alone = [continued(made, [p], NUM_TOKENS, sampling, seed=3, numbers=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone == continued(generator("plain", tensor=2), PROMPTS, NUM_TOKENS, sampling, seed=3)
    assert together != continued(made, PROMPTS, NUM_TOKENS, sampling, seed=4)
    # the same prompt twice: two texts
    twice = continued(made, PROMPTS[:1] * 2, NUM_TOKENS, sampling, seed=3)
    assert twice[0] != twice[1]


def test_the_likeliest_token_alone_is_greedy():
    made = generator("plain")
    for sampling in (Sampling(temperature=3.0, top_k=1), Sampling(temperature=3.0, top_p=1e-6)):
        assert continued(made, PROMPTS, NUM_TOKENS, sampling) == reference("plain")
    assert continued(made, PROMPTS, NUM_TOKENS, Sampling(temperature=3.0, min_p=0.999)) == reference("plain")


def test_few_programs_are_compiled():
    made = generator("plain")
    for prompts in ([[1, 2, 3]], [[4] * 16], [[5]]):
        continued(made, prompts, NUM_TOKENS)
    assert made._decoder.prefill._cache_size() == made._decoder.step._cache_size() == 1
    continued(made, [[5] * 17], NUM_TOKENS)
    assert (made._decoder.prefill._cache_size(), made._decoder.step._cache_size()) == (2, 1)


def test_a_sampling_keeps_what_it_says():
    """Against the definitions, one row at a time."""
    logits = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32) * 3
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kept = lambda s: np.asarray(kept_logits(jax.numpy.asarray(logits), s)) > -1e30  # noqa: E731
    for row, ours in enumerate(kept(Sampling(1.0, top_k=7))):
        assert set(np.flatnonzero(ours)) == set(np.argsort(-logits[row])[:7])
    for row, ours in enumerate(kept(Sampling(1.0, top_p=0.8))):
        order = np.argsort(-logits[row])
        count = int(np.searchsorted(np.cumsum(chances[row][order]), 0.8)) + 1
        assert set(np.flatnonzero(ours)) == set(order[:count])
    assert (kept(Sampling(1.0, min_p=0.1)) == (chances >= 0.1 * chances.max(1, keepdims=True))).all()


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.0}]
)
def test_a_sampling_that_says_nothing_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)


def test_prompts_that_cannot_be_continued_are_refused():
    made = generator("learned")
    for prompts, text in (([[1], []], "prompt 2 is empty"), ([[251]], "vocab_size=251"), ([[1] * 60], "64 positions")):
        with pytest.raises(ValueError, match=text):
            next(made.tokens(prompts, 8))


# ---- text


def pieces(text: str, *stop: str, max_tokens: int = 1000, eos: bool = True) -> tuple[list[str], TextStream]:
    """What comes out as the bytes of a text go in, one by one."""
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer.decode, {tokenizer.eos_id}, stop, max_tokens)
    ids = [*tokenizer.encode_batch([text])[0].tolist(), *([tokenizer.eos_id] if eos else [])]
    return [stream.push(token) for token in ids], stream


def test_text_comes_in_whole_characters():
    text = "a é 漢 \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} end"
    out, stream = pieces(text)
    assert "".join(out) == stream.text == text and stream.ended_by == "eos"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in out)
    assert out[0] == "a"  # not held back until the end


@pytest.mark.parametrize(
    ("text", "stop", "given"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab", ["ab"], "a"),
        ("x<|end", ["<|end|>"], "x<|end"),  # a beginning that is none
        ("漢字かな", ["字か"], "漢"),
        ("abc", ["bc", "c", "abcd"], "a"),
        ("stop", ["stop"], ""),
    ],
)
def test_a_stop_text_ends_it_and_is_left_out(text, stop, given):
    out, stream = pieces(text, *stop)
    assert "".join(out) == stream.text == given
    assert stream.ended_by == ("stop" if given != text else "eos")


def test_length_ends_a_text():
    out, stream = pieces("abcdef", max_tokens=4)
    assert "".join(out) == "abcd" and stream.ended_by == "length" and len(stream.ids) == 4
