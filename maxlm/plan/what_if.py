"""Other ways to the same model or the same loss: what each trains, for how long, and what that takes for granted.

The planner prices them side by side. Nothing here is measured by this module: every alternative says in words what it
assumes and whose result that is.
"""

import dataclasses
import math

from maxlm import flops
from maxlm.config import ModelConfig
from maxlm.data.store import TokenStore
from maxlm.plan.laws import Law


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to train.

    Attributes:
        name: short, for a table.
        model: what is trained.
        tokens: that it is trained on.
        flops_per_token: model FLOPs of a token (maxlm/flops.py), those of a teacher included.
        expected_loss: in nats per token; None where nothing tells.
        assumption: what this takes for granted, and whose result that is.
    """

    name: str
    model: ModelConfig
    tokens: float
    flops_per_token: float
    expected_loss: float | None
    assumption: str

    @property
    def flops(self) -> float:
        """Model FLOPs of the training."""
        return self.tokens * self.flops_per_token


def as_configured(model: ModelConfig, seq_len: int, tokens: float, law: Law | None) -> Alternative:
    """The run as its configuration says.

    Args:
        model: what is trained.
        seq_len: tokens per sequence.
        tokens: of the training.
        law: tells the loss, if there is one.
    """
    loss = None if law is None else law.loss(_params(model), tokens)
    assumption = "no law tells the loss" if law is None else f"loss by the law {law.source}"
    return Alternative("as configured", model, tokens, flops.train_flops_per_token(model, seq_len), loss, assumption)


def int8(model: ModelConfig, seq_len: int, tokens: float, law: Law | None) -> Alternative:
    """The same run with int8 products: as many tokens, shorter steps. Args as as_configured."""
    assumption = (
        "products in int8 (quant.mode=int8) reach the loss of bfloat16 in as many tokens: measured on a small model "
        "for 1,000 steps (docs/quantization.md), not at this size; the step time is the planner's"
    )
    same = as_configured(model, seq_len, tokens, law)
    return dataclasses.replace(same, name="int8", assumption=assumption)


def same_loss(model: ModelConfig, seq_len: int, tokens: float, law: Law, share: float = 0.5) -> Alternative:
    """A smaller model that reaches the loss with more tokens.

    Args:
        model: what it replaces.
        seq_len: tokens per sequence.
        tokens: of the training that it replaces.
        law: L(N, D).
        share: its parameters as a share of the model's.

    Raises:
        ValueError: a model so small does not get there, by the law; or there is none of that shape.

    References:
        Sardana et al., arXiv:2401.00448: smaller models that are trained for longer, for what serving them costs.
    """
    loss = law.loss(_params(model), tokens)
    smaller = resized(model, share * _params(model))
    needed = law.tokens_for(_params(smaller), loss)
    per_token = flops.train_flops_per_token(smaller, seq_len)
    serving = per_token / flops.train_flops_per_token(model, seq_len)
    assumption = (
        f"the same loss by the law {law.source}, with {needed / tokens:.3g} times the tokens; a token of the smaller "
        f"model costs {serving:.0%} of the FLOPs, in serving too (Sardana et al., arXiv:2401.00448)"
    )
    return Alternative(f"smaller model ({share:g} N)", smaller, needed, per_token, loss, assumption)


def compute_optimal(model: ModelConfig, seq_len: int, tokens: float, law: Law) -> Alternative:
    """The model and tokens that make the most of the run's FLOPs. Args and raises as same_loss."""
    budget = tokens * flops.train_flops_per_token(model, seq_len)
    best = resized(model, law.optimum(budget)[0])
    per_token = flops.train_flops_per_token(best, seq_len)  # the law counts 6 N or so, this counts attention as well
    affordable = budget / per_token
    assumption = (
        f"the lowest loss for as many FLOPs by the law {law.source} (Hoffmann et al., arXiv:2203.15556), with depth "
        "and width in the proportions of the config"
    )
    loss = law.loss(_params(best), affordable)
    return Alternative("compute-optimal", best, affordable, per_token, loss, assumption)


def pruned_and_distilled(
    student: ModelConfig, teacher: ModelConfig, seq_len: int, tokens: float, fraction: float
) -> Alternative:
    """A model pruned from a trained larger one and distilled, instead of trained from nothing.

    Args:
        student: what is trained.
        teacher: what it is cut out of, which has been paid for.
        seq_len: tokens per sequence.
        tokens: that the student would take from nothing.
        fraction: of these that distillation takes; 1/40 is the least that Minitron reports.

    Raises:
        ValueError: the fraction is not a share, or the teacher is not larger.

    References:
        Muralidharan et al. (Minitron), arXiv:2407.14679, abstract: up to 40 times fewer tokens for each model that
        they derive from one of 15B.
    """
    _check_share("fraction", fraction)
    if _params(teacher) <= _params(student):
        raise ValueError(
            f"a teacher of {_params(teacher):,} parameters is not larger than its student's {_params(student):,}; "
            "nothing can be pruned"
        )
    forward = flops.train_flops_per_token(teacher, seq_len) / 3  # 2 N, and its attention
    per_token = flops.train_flops_per_token(student, seq_len) + forward
    assumption = (
        f"{fraction:.3g} of the tokens are enough: Minitron (arXiv:2407.14679) reports down to 1/40, for models from "
        "a 15B one; the teacher is there, its forward pass is counted and its training is not; no law tells the loss"
    )
    return Alternative("prune and distill", student, tokens * fraction, per_token, None, assumption)


def deduplicated(model: ModelConfig, seq_len: int, tokens: float, fraction: float) -> Alternative:
    """The same passes over data without its duplicates.

    Args:
        model: what is trained.
        seq_len: tokens per sequence.
        tokens: of the training with duplicates.
        fraction: of the tokens that are left: given, or measured_fraction. It has no default, since it is a property
            of the data.

    Raises:
        ValueError: the fraction is not a share.

    References:
        Lee et al., arXiv:2107.06499: models trained on deduplicated data need fewer steps for the same accuracy.
    """
    _check_share("fraction", fraction)
    assumption = (
        f"{fraction:.3g} of the tokens are left, and what is left out taught nothing new (Lee et al., "
        "arXiv:2107.06499); how much the loss changes depends on the data, and no law tells it"
    )
    per_token = flops.train_flops_per_token(model, seq_len)
    return Alternative("deduplicated data", model, tokens * fraction, per_token, None, assumption)


def measured_fraction(before: str, after: str) -> float:
    """Share of a token store's training tokens that deduplication left.

    Args:
        before: store or bucket url, with duplicates.
        after: that of the same text without them.

    Raises:
        ValueError: the stores have different tokenizers, or the second is larger or empty.
        FileNotFoundError, DataError: as TokenStore.
    """
    stores = [TokenStore(path) for path in (before, after)]
    if stores[0].tokenizer_identity != stores[1].tokenizer_identity:
        raise ValueError(f"{before} and {after} have different tokenizers, so their tokens cannot be compared")
    all_tokens, left = (store.num_tokens("train") for store in stores)
    if not 0 < left <= all_tokens:
        raise ValueError(f"{after} has {left:,} training tokens and {before} {all_tokens:,}: it is no part of it")
    return left / all_tokens


def resized(model: ModelConfig, params: float) -> ModelConfig:
    """A model of about so many active parameters, with the proportions, heads and vocabulary of another.

    Width, depth and MLP grow by one factor; widths stay multiples of what divides them now, up to 128.

    Args:
        model: the proportions.
        params: parameters that a token visits.

    Raises:
        ValueError: embeddings alone or the smallest model of that shape have more than 1.5 times as many.
    """
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _params(_scaled(model, middle)) < params else (low, middle)
    found = min((_scaled(model, low), _scaled(model, high)), key=lambda m: abs(_params(m) - params))
    if not params / 1.5 <= _params(found) <= params * 1.5:
        raise ValueError(
            f"no model of this shape has about {params:,.0f} parameters; the nearest has {_params(found):,}, "
            "so change the vocabulary or the proportions"
        )
    return found


def _scaled(model: ModelConfig, factor: float) -> ModelConfig:
    def width(size: int) -> int:
        multiple = math.gcd(size, 128)
        return max(1, round(size * factor / multiple)) * multiple

    period, dense = len(model.layer_pattern), model.num_dense_layers
    kv_heads = max(1, round(model.kv_heads * factor))
    fields = {
        "d_model": width(model.d_model),
        "d_ff": width(model.d_ff),
        "expert_d_ff": None if model.expert_d_ff is None else width(model.expert_d_ff),
        "num_layers": dense + period * max(1, round((model.num_layers - dense) * factor / period)),
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * (model.num_heads // model.kv_heads),
        "head_dim": model.head_size,
    }
    return ModelConfig.model_validate({**model.model_dump(), **fields})


def _params(model: ModelConfig) -> int:
    return flops.num_params(model)["active"]


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be above 0 and at most 1")
