"""The model's part of the configuration tree, and what all parts are made of."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from maxlm import places

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Place = Annotated[str, AfterValidator(places.checked)]
"""Path or bucket url."""


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The transformer. Model families are values of these fields, not code."""

    vocab_size: Positive = Field(description="Token ids the tokenizer may emit, as a count.")
    vocab_multiple: Positive = Field(
        128, description="Embedding rows are padded to this multiple so that they shard; padding is masked in the loss."
    )
    num_layers: Positive = Field(description="Transformer blocks, as a count.")
    d_model: Positive = Field(description="Width of the residual stream, in features.")
    d_ff: Positive = Field(description="Hidden width of a dense layer's MLP, in features.")
    num_heads: Positive = Field(description="Query heads, as a count.")
    num_kv_heads: Positive | None = Field(None, description="Key/value heads (GQA); null means num_heads.")
    head_dim: Positive | None = Field(None, description="Features per head; null means d_model / num_heads.")

    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm or LayerNorm.")
    norm_position: Literal["pre", "post", "both", "residual"] = Field(
        "pre",
        description="Normalize a sublayer's input (pre), its output before it is added (post), both, or the residual "
        "stream after each addition, with no norm at the end (residual, as in the original transformer).",
    )
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance in every norm.")
    norm_bias: bool = Field(False, description="LayerNorm has a bias.")
    norm_offset: bool = Field(False, description="The norm's weight is stored as an offset from one (Gemma).")
    qk_norm: bool = Field(False, description="Normalize queries and keys before attention.")
    qk_norm_span: Literal["head", "all"] = Field(
        "head", description="With qk_norm: each head by itself, or all heads of a token together (OLMo 2)."
    )

    position: Literal["rope", "learned", "none"] = Field("rope", description="Position encoding.")
    rope_theta: float = Field(10_000.0, gt=0, description="RoPE base wavelength, in tokens / 2 pi.")
    rope_theta_local: float | None = Field(None, gt=0, description="RoPE base of local layers; null means rope_theta.")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Share of each head's features that RoPE rotates.")
    rope_scaling_factor: float | None = Field(
        None, ge=1, description="RoPE waves that are long turn slower by this in global layers (Llama 3.1); null: none."
    )
    rope_scaling_low: float = Field(
        1.0, gt=0, description="Waves that fit at most so often into rope_scaling_positions are long."
    )
    rope_scaling_high: float = Field(
        4.0, gt=0, description="Waves that fit at least so often stay as they are; those between change in part."
    )
    rope_scaling_positions: Positive | None = Field(
        8192, description="Context before RoPE was scaled, in tokens; null: all waves turn slower (linear scaling)."
    )
    max_positions: Positive | None = Field(
        None, description="Rows of the learned position table, in tokens; needed when position=learned."
    )

    num_token_types: Count = Field(
        0, description="Rows of the table of token types, which is added to the embeddings; 0: there is none."
    )
    embed_norm: bool = Field(False, description="Normalize what enters the layers: the sum of all embeddings.")

    mlp: Literal["gated", "plain"] = Field("gated", description="Gated (SwiGLU-like) or two-matrix MLP.")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = Field(
        "silu", description="MLP nonlinearity; gelu is exact, gelu_tanh its approximation, relu2 the squared ReLU."
    )
    mlp_bias: bool = Field(False, description="Biases on the MLP's matrices.")
    attention_bias: Literal["none", "qkv", "all"] = Field(
        "none", description="Biases on the query/key/value projections, or on the output projection as well."
    )

    num_experts: Positive | None = Field(
        None, description="Routed experts of a layer, as a count; null means dense layers."
    )
    experts_per_token: Positive | None = Field(
        None, description="Routed experts that a token visits, as a count; needed with num_experts."
    )
    expert_d_ff: Positive | None = Field(None, description="Hidden width of one expert, in features; null means d_ff.")
    num_shared_experts: Count = Field(
        0, description="Experts that every token visits, as a count: one MLP of their joint width."
    )
    num_dense_layers: Count = Field(
        0, description="Leading layers that have a dense MLP of width d_ff instead of experts, as a count."
    )
    router_scores: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="Scores are a softmax over all experts, or a sigmoid for each (DeepSeek-V3)."
    )
    router_normalize: bool = Field(True, description="A token's weights of its experts are divided by their sum.")
    router_scale: float = Field(1.0, gt=0, description="Weights of experts are multiplied by this, afterwards.")
    aux_loss: NonNegative = Field(
        0.0, description="Weight of each layer's load-balancing loss, which is 1 when balanced (Switch, equation 4)."
    )
    router_z_loss: NonNegative = Field(
        0.0, description="Weight of each layer's mean log(Z)**2 of router logits (ST-MoE, equation 5)."
    )
    router_bias_rate: NonNegative = Field(
        0.0,
        description="Step of the per-expert bias that balances load without a loss (arXiv:2408.15664), in units of "
        "scores; 0 means no bias. DeepSeek-V3 uses 0.001.",
    )

    causal: bool = Field(True, description="A token sees those before it and itself; false: all of its document.")
    layer_pattern: tuple[Literal["global", "local"], ...] = Field(
        ("global",), description="Kinds of layers, repeated to num_layers; local ones use sliding_window.", min_length=1
    )
    sliding_window: Positive | None = Field(None, description="Keys a local layer sees, itself included, in tokens.")
    attention_scale: float | None = Field(None, gt=0, description="Query scale; null means head_dim ** -0.5.")
    attention_softcap: float | None = Field(None, gt=0, description="Attention logits become c * tanh(logits / c).")
    logit_softcap: float | None = Field(None, gt=0, description="Output logits become c * tanh(logits / c).")

    tie_embeddings: bool = Field(False, description="The output projection is the embedding table.")
    head_transform: bool = Field(
        False, description="Before the output projection: a matrix (biased with mlp_bias), the activation, and a norm."
    )
    unembed_bias: bool = Field(False, description="A bias on the output projection: one number per token id.")
    embedding_scale: float | None = Field(
        None, gt=0, description="Embeddings are multiplied by this (Gemma: d_model ** 0.5); null leaves them."
    )
    init_std: float = Field(
        0.02, gt=0, description="Standard deviation of the embeddings; matrices use fan_in ** -0.5."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Type of the computation. Master weights, optimizer and loss are float32."
    )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, after the default."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Features per head, after the default."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert, after the default."""
        return self.expert_d_ff or self.d_ff

    @property
    def rope_scaling(self) -> tuple[float, float, float, int | None] | None:
        """Factor, low, high and positions of model.rope.scaled; None without scaling."""
        if self.rope_scaling_factor is None:
            return None
        return self.rope_scaling_factor, self.rope_scaling_low, self.rope_scaling_high, self.rope_scaling_positions

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def num_lead_layers(self) -> int:
        """Layers ahead of the repeats: dense ones before experts, or what the repeats of the pattern leave over."""
        return self.num_dense_layers if self.num_experts else self.num_layers % len(self.layer_pattern)

    @property
    def lead_pattern(self) -> tuple[Literal["global", "local"], ...]:
        """Kinds of the leading layers, which may repeat."""
        return self.layer_pattern[: self.num_lead_layers]

    @property
    def main_pattern(self) -> tuple[Literal["global", "local"], ...]:
        """The pattern as the layers after the leading ones repeat it."""
        first = self.num_lead_layers % len(self.layer_pattern)
        return self.layer_pattern[first:] + self.layer_pattern[:first]

    def num_layers_of(self, kind: str) -> int:
        """Layers of a kind of layer_pattern."""
        repeats, rest = divmod(self.num_layers, len(self.layer_pattern))
        return repeats * self.layer_pattern.count(kind) + self.layer_pattern[:rest].count(kind)

    @property
    def num_repeats(self) -> int:
        """Repeats of the layer pattern, after the leading layers."""
        return (self.num_layers - self.num_lead_layers) // len(self.layer_pattern)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table, padding included."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}; change one or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"use a divisor such as {divisor_at_most(self.num_heads, self.kv_heads)}"
            )
        if self.num_layers < len(self.layer_pattern):
            raise ValueError(
                f"num_layers={self.num_layers} is less than layer_pattern's {len(self.layer_pattern)} kinds; shorten it"
            )
        if "local" in self.layer_pattern and self.sliding_window is None:
            raise ValueError("layer_pattern has local layers, so sliding_window must be set")
        if "local" in self.layer_pattern and not self.causal:
            raise ValueError("causal=false has no sliding windows; leave layer_pattern at its default, global")
        if self.position == "learned" and self.max_positions is None:
            raise ValueError("position=learned needs max_positions, the longest sequence in tokens")
        if self.norm_bias and self.norm != "layer":
            raise ValueError("norm_bias=true needs norm=layer; RMSNorm has no bias")
        if self.position == "rope" and int(self.head_size * self.rope_fraction) % 2:
            raise ValueError(
                f"RoPE rotates pairs, but head size {self.head_size} x rope_fraction={self.rope_fraction} is odd"
            )
        if self.rope_scaling_high <= self.rope_scaling_low:
            raise ValueError(
                f"rope_scaling_high={self.rope_scaling_high} must be above rope_scaling_low={self.rope_scaling_low}"
            )
        return self

    @model_validator(mode="after")
    def _consistent_experts(self) -> "ModelConfig":
        if self.num_experts is None:
            for name in EXPERT_FIELDS:
                if (value := getattr(self, name)) != ModelConfig.model_fields[name].default:
                    raise ValueError(f"{name}={value} needs num_experts; without it all layers are dense")
            return self
        if self.experts_per_token is None:
            raise ValueError(f"num_experts={self.num_experts} needs experts_per_token, the experts that a token visits")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; lower it"
            )
        if self.experts_per_token == 1 and self.router_normalize:
            raise ValueError(
                "experts_per_token=1 with router_normalize=true gives every expert the weight 1, from which the router "
                "learns nothing; set router_normalize=false"
            )
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} leaves none of num_layers={self.num_layers} for experts"
            )
        if self.num_layers % len(self.layer_pattern):
            raise ValueError(
                f"num_layers={self.num_layers} is not a multiple of layer_pattern's {len(self.layer_pattern)} kinds, "
                "which models with experts need"
            )
        if self.num_dense_layers % len(self.layer_pattern):
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} is not a multiple of layer_pattern's "
                f"{len(self.layer_pattern)} kinds"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias=true does not go with num_experts; experts have no biases")
        return self


EXPERT_FIELDS = (
    "experts_per_token",
    "expert_d_ff",
    "num_shared_experts",
    "num_dense_layers",
    "router_scores",
    "router_normalize",
    "router_scale",
    "aux_loss",
    "router_z_loss",
    "router_bias_rate",
)
"""Fields that mean nothing without num_experts."""


def divisor_at_most(n: int, limit: int) -> int:
    """Largest divisor of n that is at most `limit`; of n above 1e10, the largest that is found quickly."""
    small = [d for d in range(1, min(math.isqrt(n), 100_000) + 1) if n % d == 0]
    return max(d for s in small for d in (s, n // s) if d <= limit)
