import pytest
from helpers import MODEL, small_config

from maxlm import flops
from maxlm.config import ModelConfig
from maxlm.data.build import build_store
from maxlm.plan import what_if
from maxlm.plan.laws import PUBLISHED

LAW = PUBLISHED["chinchilla-replicated"]
LLAMA_8B = ModelConfig(
    vocab_size=128256, num_layers=32, d_model=4096, d_ff=14336, num_heads=32, num_kv_heads=8, rope_theta=5e5
)
SEQ_LEN, TOKENS = 4096, 1e12


def active(model):
    return flops.num_params(model)["active"]


@pytest.mark.parametrize("share", [0.25, 0.5, 2.0])
def test_a_resized_model_has_the_proportions_of_the_other(share):
    model = what_if.resized(LLAMA_8B, share * active(LLAMA_8B))
    assert active(model) == pytest.approx(share * active(LLAMA_8B), rel=0.15)
    assert model.d_model % 128 == 0
    assert model.d_ff / model.d_model == pytest.approx(3.5, rel=0.1)
    assert model.d_model / model.num_layers == pytest.approx(128, rel=0.2)
    assert (model.head_size, model.num_heads // model.kv_heads) == (128, 4)
    assert (model.vocab_size, model.rope_theta) == (LLAMA_8B.vocab_size, LLAMA_8B.rope_theta)


def test_models_of_every_shape_are_resized_and_what_there_is_not_is_refused():
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_d_ff": 24, "num_dense_layers": 1, "num_layers": 9}
    for fields in (experts, {"layer_pattern": ("local", "global"), "sliding_window": 8, "num_layers": 8}):
        model = small_config(model={**MODEL, **fields}).model
        assert active(what_if.resized(model, 4 * active(model))) == pytest.approx(4 * active(model), rel=0.2)
    with pytest.raises(ValueError, match="no model of this shape"):
        what_if.resized(LLAMA_8B, 1e5)


def test_a_smaller_model_reaches_the_loss_with_more_tokens():
    base = what_if.as_configured(LLAMA_8B, SEQ_LEN, TOKENS, LAW)
    smaller = what_if.same_loss(LLAMA_8B, SEQ_LEN, TOKENS, LAW)
    assert base.expected_loss == smaller.expected_loss
    assert LAW.loss(active(smaller.model), smaller.tokens) == pytest.approx(smaller.expected_loss)
    assert smaller.tokens > TOKENS
    assert 0.4 < smaller.flops_per_token / base.flops_per_token < 0.65
    assert "arXiv:2404.10102" in smaller.assumption
    with pytest.raises(ValueError, match="any number of tokens"):
        what_if.same_loss(LLAMA_8B, SEQ_LEN, 1e14, LAW, share=0.25)


def test_the_compute_optimal_model_costs_as_much_and_is_better():
    base = what_if.as_configured(LLAMA_8B, SEQ_LEN, 1e13, LAW)
    best = what_if.compute_optimal(LLAMA_8B, SEQ_LEN, 1e13, LAW)
    assert best.flops == pytest.approx(base.flops)
    assert best.expected_loss < base.expected_loss
    assert active(best.model) > active(LLAMA_8B), "1,250 tokens per parameter are far more than the optimum"


def test_int8_takes_as_many_tokens_and_a_run_without_a_law_has_no_loss():
    base = what_if.as_configured(LLAMA_8B, SEQ_LEN, TOKENS, None)
    rounded = what_if.int8(LLAMA_8B, SEQ_LEN, TOKENS, None)
    assert (rounded.tokens, rounded.flops, rounded.expected_loss) == (base.tokens, base.flops, None)
    assert "docs/quantization.md" in rounded.assumption


def test_distillation_pays_for_the_teachers_forward_pass():
    student = what_if.resized(LLAMA_8B, active(LLAMA_8B) / 2)
    found = what_if.pruned_and_distilled(student, LLAMA_8B, SEQ_LEN, TOKENS, 1 / 40)
    assert found.tokens == TOKENS / 40
    assert found.expected_loss is None
    forward = found.flops_per_token - flops.train_flops_per_token(student, SEQ_LEN)
    assert forward == pytest.approx(2 * active(LLAMA_8B), rel=0.1)
    assert "2407.14679" in found.assumption
    with pytest.raises(ValueError, match="not larger"):
        what_if.pruned_and_distilled(LLAMA_8B, student, SEQ_LEN, TOKENS, 1 / 40)
    with pytest.raises(ValueError, match="fraction=40"):
        what_if.pruned_and_distilled(student, LLAMA_8B, SEQ_LEN, TOKENS, 40)


def test_what_deduplication_left_is_measured_in_stores(tmp_path):
    for name, texts in (("all", ["abc " * 500, "abc " * 500, "xyz " * 400]), ("once", ["abc " * 500, "xyz " * 400])):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
        build_store([str(tmp_path / name)], str(tmp_path / f"{name}.store"), heldout=0.0, workers=1)
    stores = [str(tmp_path / "all.store"), str(tmp_path / "once.store")]
    fraction = what_if.measured_fraction(*stores)
    assert fraction == pytest.approx(3602 / 5603)
    found = what_if.deduplicated(LLAMA_8B, SEQ_LEN, TOKENS, fraction)
    assert found.tokens == pytest.approx(TOKENS * fraction)
    assert found.expected_loss is None
    with pytest.raises(ValueError, match="no part of it"):
        what_if.measured_fraction(*reversed(stores))
