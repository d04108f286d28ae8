import jax
import pytest
from helpers import program_on, small_config

from maxlm.config import ModelConfig
from maxlm.cost import cost_of
from maxlm.flops import mfu, num_params, train_flops_per_token


def llama_8b(**fields):
    return ModelConfig.model_validate(
        {
            "vocab_size": 128256,
            "num_layers": 32,
            "d_model": 4096,
            "d_ff": 14336,
            "num_heads": 32,
            "num_kv_heads": 8,
            **fields,
        }
    )


def gpt2(**fields):
    return ModelConfig.model_validate(
        {
            "vocab_size": 50257,
            "num_layers": 12,
            "d_model": 768,
            "d_ff": 3072,
            "num_heads": 12,
            "norm": "layer",
            "norm_bias": True,
            "position": "learned",
            "max_positions": 1024,
            "mlp": "plain",
            "mlp_bias": True,
            "attention_bias": "all",
            "tie_embeddings": True,
            **fields,
        }
    )


def test_llama_8b_has_its_published_parameters():
    counts = num_params(llama_8b())
    assert counts["embedding"] == counts["unembedding"] == 128256 * 4096
    assert counts["attention"] == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert counts["mlp"] == 32 * 3 * 4096 * 14336
    assert counts["norms"] == 65 * 4096
    assert counts["total"] == counts["total_unpadded"] == 8_030_261_248


def test_gpt2_has_its_published_parameters():
    counts = num_params(gpt2())
    assert counts["total_unpadded"] == 124_439_808
    assert counts["total"] == 124_439_808 + (50304 - 50257) * 768
    assert counts["positions"] == 1024 * 768
    assert counts["unembedding"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True, "vocab_multiple": 8},
        {"mlp": "plain", "mlp_bias": True, "attention_bias": "qkv"},
        {"mlp_bias": True, "attention_bias": "all", "norm_position": "both"},
        {"norm": "layer", "norm_bias": True, "qk_norm": True, "norm_position": "post"},
        {"qk_norm": True, "qk_norm_span": "all"},
        {"position": "learned", "max_positions": 17, "num_kv_heads": None},
        {"num_experts": 4, "experts_per_token": 2, "expert_d_ff": 12, "num_dense_layers": 1, "router_bias_rate": 0.01},
        {"head_transform": True, "unembed_bias": True, "embed_norm": True, "num_token_types": 2},
        {"num_layers": 5, "layer_pattern": ["local", "local", "global"], "sliding_window": 7},
        {"num_experts": 4, "experts_per_token": 1, "router_normalize": False, "num_shared_experts": 2, "mlp": "plain"},
    ],
    ids=str,
)
def test_counts_are_those_of_the_real_model(fields):
    config = small_config(model={**small_config().model.model_dump(), **fields})
    shapes = program_on(config).state_shapes["params"]
    assert num_params(config.model)["total"] == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_mixtral_8x7b_has_its_published_parameters_and_computes_two_experts():
    model = llama_8b(vocab_size=32000, num_experts=8, experts_per_token=2)
    counts = num_params(model)
    assert (counts["total"], counts["active"]) == (46_702_792_704, 12_879_925_248)
    # a dense model of the same width with MLPs of two experts, and the routers
    two = llama_8b(vocab_size=32000, d_ff=2 * 14336)
    assert train_flops_per_token(model, 4096) == train_flops_per_token(two, 4096) + 6 * 32 * 4096 * 8


def test_deepseek_moe_16b_has_its_published_parameters():
    # arXiv:2401.06066: 16.4 B parameters, 2.8 B active; one dense layer, 64 routed and 2 shared experts, 6 visited
    model = llama_8b(
        vocab_size=102400,
        num_layers=28,
        d_model=2048,
        d_ff=10944,
        num_heads=16,
        num_kv_heads=16,
        num_experts=64,
        experts_per_token=6,
        expert_d_ff=1408,
        num_shared_experts=2,
        num_dense_layers=1,
        router_normalize=False,
    )
    counts = num_params(model)
    assert counts["total"] == 16_375_728_128
    assert counts["active"] == counts["total"] - 27 * (64 - 6) * 3 * 2048 * 1408
    visited = 27 * (6 + 2) * 3 * 2048 * 1408 + 27 * 2048 * 64
    others = 28 * 4 * 2048 * 2048 + 3 * 2048 * 10944 + 2048 * 102400
    assert train_flops_per_token(model, 4096) == 6 * (visited + others) + 28 * 12 * 2048 * 2048


def test_llama_8b_flops_by_hand():
    # 6 x (32 layers x (41,943,040 + 176,160,768) + 4096 x 128256) = 45.03 G, and per layer and token attention is
    # 12 FLOPs x 4096 features x 8192 / 2 keys: 6.44 G
    assert train_flops_per_token(llama_8b(), 8192) == 45_027_950_592 + 6_442_450_944
    # counted in full, as in MaxText's older tables, attention is twice that: 7,207 tokens/s/chip on v6e are 45.5 %
    assert mfu(7207, 45_027_950_592 + 2 * 6_442_450_944, 918e12) == pytest.approx(0.455, abs=5e-4)
    assert mfu(256 * 7207, train_flops_per_token(llama_8b(), 8192), 256 * 918e12) == pytest.approx(0.404, abs=5e-4)


def test_flops_leave_out_what_does_no_work():
    base = train_flops_per_token(gpt2(), 1024)
    assert train_flops_per_token(gpt2(vocab_multiple=4096), 1024) == base
    assert train_flops_per_token(gpt2(mlp_bias=False, attention_bias="none"), 1024) == base
    assert train_flops_per_token(gpt2(position="rope"), 1024) == base
    # the output projection is a matmul whether or not its table is tied
    assert train_flops_per_token(gpt2(tie_embeddings=False), 1024) == base


def test_sliding_window_costs_its_window():
    full = train_flops_per_token(llama_8b(), 8192)
    local = {"layer_pattern": ("local",)}
    assert train_flops_per_token(llama_8b(**local, sliding_window=8192), 8192) == full
    assert train_flops_per_token(llama_8b(**local, sliding_window=10**6), 8192) == full
    # all queries see 1024 keys but the first 1024, which see half of that on average
    keys = 1024 * (7168 / 8192) + 512 * (1024 / 8192)
    window = train_flops_per_token(llama_8b(**local, sliding_window=1024), 8192)
    assert full - window == pytest.approx(12 * 32 * 4096 * (4096 - keys))
    half = train_flops_per_token(llama_8b(layer_pattern=("local", "global"), sliding_window=1024), 8192)
    assert half == pytest.approx((full + window) / 2)


def test_layers_that_the_pattern_leaves_over_cost_what_their_kind_costs():
    """Gemma 3 with 26 layers: four repeats of five local layers and a global one, and two local layers more."""
    fields = {"num_layers": 26, "sliding_window": 512}
    mixed = train_flops_per_token(llama_8b(**fields, layer_pattern=("local",) * 5 + ("global",)), 8192)
    local, whole = (train_flops_per_token(llama_8b(**fields, layer_pattern=(k,)), 8192) for k in ("local", "global"))
    assert mixed == pytest.approx((22 * local + 4 * whole) / 26)


@pytest.mark.slow
def test_a_compiled_step_multiplies_as_much_with_layers_left_over():
    """Plain attention looks at all keys and masks them, so that kinds of layers differ in nothing else."""
    fields = {**small_config().model.model_dump(), "num_layers": 5, "sliding_window": 7}
    found = []
    for pattern in (["global"], ["local", "global"]):
        program = program_on(small_config(model={**fields, "layer_pattern": pattern}, train={"remat": "none"}))
        found.append(cost_of(program, program.lower_step().compile())["matmul_flops"])
    assert found[0] == found[1] > 0


def test_attention_flops_approach_an_exact_count():
    # the mean number of keys over a causal sequence with a window, counted query by query
    seq_len, window = 4096, 512
    exact = sum(min(t + 1, window) for t in range(seq_len)) / seq_len
    model = llama_8b(layer_pattern=("local",), sliding_window=window)
    attention = train_flops_per_token(model, seq_len) - 45_027_950_592
    assert attention / (12 * 32 * 4096) == pytest.approx(exact, rel=2e-3)
