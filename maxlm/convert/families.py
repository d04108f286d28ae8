"""Model families as data: their tensors beside our parameters, their config.json beside our model config.

A family is a row for each kind of tensor and a key for each field. To add one, write both tables and put it into
FAMILIES; the tests in tests/test_convert.py then take it up.

A row says how their tensor lies in memory, in dimension letters: "(NH)D" is a matrix [N H, D], heads and their features
in one dimension. Our order is that of the parameter's own letters (model/attention.py: "DNH"), so that a row is at once
the reshape and the transpose, in both directions. A tensor that is several of our parameters names them all, joined
along its first dimension.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from maxlm.config_model import ModelConfig

Tree = Mapping[str, Any]
REQUIRED = object()
LOCAL_FIELDS = ("vocab_multiple", "init_std", "dtype", "aux_loss", "router_z_loss", "router_bias_rate")
"""Of a model config: what says nothing about the function that the model is."""


class FamilyError(ValueError):
    """A model that is of no known family, or not as its family is; one sentence that says what."""


# ---- tensors


class Row(NamedTuple):
    """A tensor of theirs, "{}" being the number of the layer, and what it is made of.

    Attributes:
        theirs: its name.
        parts: our parameter ("*" for the layer) and its layout in the tensor; several are joined along dimension 0.
    """

    theirs: str
    parts: tuple[tuple[str, str], ...]


def row(theirs: str, ours: str, dims: str) -> Row:
    """A tensor that is one parameter."""
    return Row(theirs, ((ours, dims),))


EMBEDDINGS = (
    row("model.embed_tokens.weight", "embed", "VD"),
    row("model.norm.weight", "final_norm/weight", "D"),
    row("lm_head.weight", "unembed", "VD"),
)
PRE_NORMS = (
    row("model.layers.{}.input_layernorm.weight", "layers/*/attention_norm/weight", "D"),
    row("model.layers.{}.post_attention_layernorm.weight", "layers/*/mlp_norm/weight", "D"),
)
OUTPUTS = (
    row("model.layers.{}.self_attn.o_proj.weight", "layers/*/attention/o", "D(NH)"),
    row("model.layers.{}.self_attn.o_proj.bias", "layers/*/attention/o_bias", "D"),
    row("model.layers.{}.mlp.down_proj.weight", "layers/*/mlp/down", "DF"),
    row("model.layers.{}.mlp.down_proj.bias", "layers/*/mlp/down_bias", "D"),
)
INPUTS = (
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.weight", f"layers/*/attention/{m}", "(NH)D") for m in "q"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.weight", f"layers/*/attention/{m}", "(KH)D") for m in "kv"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.bias", f"layers/*/attention/{m}_bias", "(NH)") for m in "q"),
    *(row(f"model.layers.{{}}.self_attn.{m}_proj.bias", f"layers/*/attention/{m}_bias", "(KH)") for m in "kv"),
    *(row(f"model.layers.{{}}.self_attn.{m}_norm.weight", f"layers/*/attention/{m}_norm/weight", "H") for m in "qk"),
    *(row(f"model.layers.{{}}.mlp.{m}_proj.weight", f"layers/*/mlp/{m}", "FD") for m in ("gate", "up")),
    *(row(f"model.layers.{{}}.mlp.{m}_proj.bias", f"layers/*/mlp/{m}_bias", "F") for m in ("gate", "up")),
)
FUSED_INPUTS = (
    Row(
        "model.layers.{}.self_attn.qkv_proj.weight",
        tuple((f"layers/*/attention/{m}", "(NH)D" if m == "q" else "(KH)D") for m in "qkv"),
    ),
    Row("model.layers.{}.mlp.gate_up_proj.weight", (("layers/*/mlp/gate", "FD"), ("layers/*/mlp/up", "FD"))),
)


# ---- config.json


class Part(Protocol):
    """Some keys of config.json and the fields of ours that say the same."""

    def read(self, tree: Tree) -> dict[str, Any]:
        """Our fields; FamilyError for what maxlm has not."""
        ...

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Their keys."""
        ...


@dataclass(frozen=True)
class Key:
    """One key and one field.

    Attributes:
        theirs, ours: their names.
        default: what it means that the key is not there; REQUIRED: it has to be.
        values: pairs of their value and ours; empty: they are the same.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    values: tuple[tuple[Any, Any], ...] = ()

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        value = tree.get(self.theirs, self.default)
        if value is REQUIRED:
            raise FamilyError(f"{self.theirs} is missing")
        if not self.values:
            return {self.ours: value}
        for theirs, ours in self.values:
            if type(theirs) is type(value) and theirs == value:
                return {self.ours: ours}
        known = ", ".join(repr(theirs) for theirs, _ in self.values)
        raise FamilyError(f"{self.theirs}={_short(value)} is not one of {known}, which maxlm has")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        value = _meaning(model)[self.ours]
        pairs = [theirs for theirs, ours in self.values if ours == value]
        return {self.theirs: pairs[0] if pairs else value}


@dataclass(frozen=True)
class Rope:
    """rope_theta, and the scaling of Llama 3.1, as transformers 4 and 5 write them.

    Attributes:
        partial: the family may rotate a share of each head's features.
    """

    partial: bool = False

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        scaling = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise FamilyError(f"rope_scaling={_short(scaling)} is to be an object")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        share = scaling.get("partial_rotary_factor", tree.get("partial_rotary_factor", 1.0))
        if share != 1.0 and not self.partial:
            raise FamilyError(f"partial_rotary_factor={_short(share)} is not 1, the one that this family has")
        theta = scaling.get("rope_theta", tree.get("rope_theta", 10_000.0))
        fields = {"rope_theta": theta, "rope_fraction": share}
        if kind == "llama3":
            for theirs, ours in ROPE_SCALING:
                if theirs not in scaling:
                    raise FamilyError(f"rope_scaling of type llama3 has no {theirs}")
                fields[ours] = scaling[theirs]
        elif kind != "default":
            raise FamilyError(f"rope_scaling of type {_short(kind)} is not one that maxlm has: default and llama3")
        return fields

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        scaling = {theirs: getattr(model, ours) for theirs, ours in ROPE_SCALING}
        is_scaled = model.rope_scaling_factor is not None
        return {
            "rope_theta": model.rope_theta,
            "rope_scaling": {"rope_type": "llama3", **scaling} if is_scaled else None,
            **({"partial_rotary_factor": model.rope_fraction} if self.partial else {}),
        }


ROPE_SCALING = (
    ("factor", "rope_scaling_factor"),
    ("low_freq_factor", "rope_scaling_low"),
    ("high_freq_factor", "rope_scaling_high"),
    ("original_max_position_embeddings", "rope_scaling_positions"),
)


@dataclass(frozen=True)
class Window:
    """A sliding window of all layers.

    Attributes:
        default: what it means that the key is not there.
    """

    default: int | None = None

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        window = tree.get("sliding_window", self.default)
        return {"sliding_window": window, "layer_pattern": ("global" if window is None else "local",)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {"sliding_window": model.sliding_window if set(model.layer_pattern) == {"local"} else None}


@dataclass(frozen=True)
class Only:
    """A key that must have a value, since maxlm has no other.

    Attributes:
        theirs: the key.
        value: what it must be, or be left out.
    """

    theirs: str
    value: Any

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        found = tree.get(self.theirs, self.value)
        if type(found) is not type(self.value) or found != self.value:
            raise FamilyError(f"{self.theirs}={_short(found)} is not {self.value}, the one that maxlm has")
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {self.theirs: self.value}


BIASES = ((False, "none"), (True, "all"))
SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("intermediate_size", "d_ff"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("hidden_act", "activation", "silu", (("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"))),
    Key("tie_word_embeddings", "tie_embeddings", False),
    Only("quantization_config", None),
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of config.json.
        architecture: likewise.
        rows: its tensors; those whose parameters a model has not are left out.
        parts: of its config.
        fields: what its models have in common, of ours.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]
    fields: tuple[tuple[str, Any], ...] = ()

    def read_config(self, tree: Tree) -> ModelConfig:
        """Our model config of their config.json.

        Raises:
            FamilyError: a key is missing, or says what maxlm has not.
        """
        fields = dict(self.fields)
        for part in self.parts:
            fields |= part.read(tree)
        try:
            return ModelConfig(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            theirs = {part.ours: part.theirs for part in self.parts if isinstance(part, Key)}.get(where, where)
            text = first["msg"].removeprefix("Value error, ")
            raise FamilyError(f"{theirs}: {text}" if theirs else text) from None

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Their config.json of our model config.

        Raises:
            FamilyError: this family has no such models; names the first field that does not go over.
        """
        tree: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            tree |= part.write(model)
        back, wanted = _meaning(self.read_config(tree)), _meaning(model)
        for name, value in wanted.items():
            if name not in LOCAL_FIELDS and back[name] != value:
                raise FamilyError(f"{self.model_type} has no model with {name}={_short(value)}")
        return tree


def _short(value: Any) -> str:
    return ascii(value)[:80]


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """The fields with their defaults filled in, and those that mean nothing here left at none."""
    fields = {name: getattr(model, name) for name in ModelConfig.model_fields}
    fields |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_size}
    fields["attention_scale"] = model.attention_scale or model.head_size**-0.5
    if "local" not in model.layer_pattern:
        fields |= {"sliding_window": None, "rope_theta_local": None}
    if model.position != "learned":
        fields["max_positions"] = None
    if model.rope_scaling_factor is None:
        fields |= {ours: None for _, ours in ROPE_SCALING}
    return fields


# ---- the families

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*EMBEDDINGS, *PRE_NORMS, *INPUTS, *OUTPUTS),
    (
        *SIZES,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("head_dim", "head_dim", None),
        Key("attention_bias", "attention_bias", False, BIASES),
        Key("mlp_bias", "mlp_bias", False),
    ),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    LLAMA.rows,
    (*SIZES, Rope(), Key("num_key_value_heads", "num_kv_heads", 8), Key("head_dim", "head_dim", None), Window(4096)),
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA.rows,
    (*SIZES, Rope(), Key("num_key_value_heads", "num_kv_heads", 32), Only("use_sliding_window", False)),
    (("attention_bias", "qkv"),),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA.rows,
    (
        *SIZES,
        Rope(),
        Key("num_key_value_heads", "num_kv_heads", 32),
        Key("head_dim", "head_dim", 128),
        Key("attention_bias", "attention_bias", False, BIASES),
        Only("use_sliding_window", False),
    ),
    (("qk_norm", True),),
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (*EMBEDDINGS, *PRE_NORMS, *FUSED_INPUTS, *OUTPUTS),
    (
        *(part for part in SIZES if part != Key("rms_norm_eps", "norm_eps", 1e-6)),
        Key("rms_norm_eps", "norm_eps", 1e-5),
        Key("num_key_value_heads", "num_kv_heads", None),
        Rope(partial=True),
        Window(),
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3)}


def family_of(tree: Tree) -> Family:
    """The family of a config.json.

    Raises:
        FamilyError: it is not known; lists those that are, and the nearest.
    """
    name = tree.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name)[:40], FAMILIES, 1, 0.5)
    raise FamilyError(
        f"model_type={_short(name)} is not a family that maxlm knows; those are {', '.join(FAMILIES)}"
        + (f", and {near[0]} is the nearest" if near else "")
    )


def family_for(model: ModelConfig, names: Sequence[str] = tuple(FAMILIES)) -> tuple[Family, dict[str, Any]]:
    """The first family that has such a model, and the model's config.json.

    Raises:
        FamilyError: none has; says why of each.
    """
    reasons = []
    for name in names:
        try:
            return FAMILIES[name], FAMILIES[name].write_config(model)
        except FamilyError as error:
            reasons.append(str(error))
    raise FamilyError(f"this model is of no family that maxlm can write: {'; '.join(reasons)}")
