"""Keys of config.json beside fields of our model config: what the tables of families are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from maxlm.config_model import ModelConfig

Tree = Mapping[str, Any]
REQUIRED = object()


class FamilyError(ValueError):
    """A model that is of no known family, or not as its family is; one sentence that says what."""


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
        also: another name of theirs.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    values: tuple[tuple[Any, Any], ...] = ()
    also: str = ""

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        value = tree.get(self.theirs, tree.get(self.also, self.default))
        if value is REQUIRED:
            raise FamilyError(f"{self.theirs} is missing")
        if not self.values:
            return {self.ours: value}
        for theirs, ours in self.values:
            if type(theirs) is type(value) and theirs == value:
                return {self.ours: ours}
        known = ", ".join(repr(theirs) for theirs, _ in self.values)
        raise FamilyError(f"{self.theirs}={short(value)} is not one of {known}, which maxlm has")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        value = getattr(model, self.ours) if self.ours == "d_ff" else meaning(model)[self.ours]
        pairs = [theirs for theirs, ours in self.values if ours == value]
        return {self.theirs: pairs[0] if pairs else value}


@dataclass(frozen=True)
class Rope:
    """rope_theta, and the scaling of Llama 3.1 or of all waves, as transformers 4 and 5 write them.

    Attributes:
        partial: the family may rotate a share of each head's features.
        theta: what it means that the key is not there.
        local: likewise of layers with a sliding window; None: theirs is that of the others.
    """

    partial: bool = False
    theta: float = 10_000.0
    local: float | None = None

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        scaling = _object(tree, "rope_parameters") or _object(tree, "rope_scaling")
        fields: dict[str, Any] = {}
        if self.local is not None:
            windowed = _object(scaling, "sliding_attention")
            if windowed.get("rope_type", "default") != "default":
                raise FamilyError(f"rope_type={short(windowed['rope_type'])} of sliding_attention is not default")
            fields["rope_theta_local"] = windowed.get("rope_theta", tree.get("rope_local_base_freq", self.local))
            scaling = _object(scaling, "full_attention") or scaling
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        share = scaling.get("partial_rotary_factor", tree.get("partial_rotary_factor", 1.0))
        if share != 1.0 and not self.partial:
            raise FamilyError(f"partial_rotary_factor={short(share)} is not 1, the one that this family has")
        theta = scaling.get("rope_theta", tree.get("rope_theta", self.theta))
        fields |= {"rope_theta": theta, "rope_fraction": share}
        if kind not in ("default", "llama3", "linear"):
            raise FamilyError(
                f"rope_scaling of type {short(kind)} is not one that maxlm has: default, llama3 and linear"
            )
        for theirs, ours in {"llama3": ROPE_SCALING, "linear": ROPE_SCALING[:1]}.get(kind, ()):
            if theirs not in scaling:
                raise FamilyError(f"rope_scaling of type {kind} has no {theirs}")
            fields[ours] = scaling[theirs]
        return fields | ({"rope_scaling_positions": None} if kind == "linear" else {})

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        kind, which = ("linear", ROPE_SCALING[:1]) if model.rope_scaling_positions is None else ("llama3", ROPE_SCALING)
        scaling = {"rope_type": kind, **{theirs: getattr(model, ours) for theirs, ours in which}}
        local = {} if self.local is None else {"rope_local_base_freq": model.rope_theta_local or model.rope_theta}
        return {
            "rope_theta": model.rope_theta,
            "rope_scaling": None if model.rope_scaling_factor is None else scaling,
            **local,
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
class Layers:
    """Layers with a sliding window and without, by turns.

    Attributes:
        period: of these layers one, the last, has no window.
        window: what it means that the key is not there, in tokens.
    """

    period: int
    window: int

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        count, kinds = tree.get("num_hidden_layers"), tree.get("layer_types")
        if type(count) is not int or not 0 < count <= MOST_LAYERS:
            raise FamilyError(f"num_hidden_layers={short(count)} is not a count of layers up to {MOST_LAYERS:,}")
        if kinds is None:
            period = tree.get("sliding_window_pattern", self.period)
            if type(period) is not int or not 0 < period <= MOST_LAYERS:
                raise FamilyError(f"sliding_window_pattern={short(period)} is not a count of layers")
            pattern = ["local"] * (period - 1) + ["global"]
        elif not isinstance(kinds, list) or len(kinds) != count or any(k not in list(LAYER_TYPES) for k in kinds):
            known = " or ".join(LAYER_TYPES)
            raise FamilyError(f"layer_types={short(kinds)} is not {known} for each of num_hidden_layers={count}")
        else:
            pattern = [LAYER_TYPES[kind] for kind in kinds]
        pattern = shortest_pattern(pattern, count)
        window = tree.get("sliding_window", self.window)
        if window is None and "local" in pattern:
            raise FamilyError("sliding_window is null, and there are layers that have one")
        return {"sliding_window": window, "layer_pattern": pattern}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        theirs, pattern = {ours: name for name, ours in LAYER_TYPES.items()}, model.layer_pattern
        kinds = [theirs[pattern[i % len(pattern)]] for i in range(min(model.num_layers, MOST_LAYERS))]
        return {"sliding_window": model.sliding_window or self.window, "layer_types": kinds}


LAYER_TYPES: Mapping[str, str] = {"full_attention": "global", "sliding_attention": "local"}
MOST_LAYERS = 10_000
"""Of a model whose layers are of several kinds, a bound for what files may say."""


def shortest_pattern(pattern: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """The shortest pattern that gives the same layers."""
    kinds = [pattern[i % len(pattern)] for i in range(min(num_layers, 2 * len(pattern)))]
    length = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
    return tuple(kinds[:length])


@dataclass(frozen=True)
class Widened:
    """A width that is so many times another where the key is not there.

    Attributes:
        theirs, ours: their names.
        of: key of the other width.
        times: how many times.
    """

    theirs: str
    ours: str
    of: str
    times: int

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        value, width = tree.get(self.theirs), tree.get(self.of)
        return {self.ours: self.times * width if value is None and type(width) is int else value}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class RootScale:
    """Embeddings are multiplied by the root of the width, about which config.json says nothing."""

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        width = tree.get("hidden_size")
        return {"embedding_scale": width**0.5 if type(width) is int and 0 < width < 2**63 else None}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {}


@dataclass(frozen=True)
class QueryScale:
    """What queries are scaled by, to the power of -1/2.

    Attributes:
        theirs: its name.
        default: what it means that the key is not there.
    """

    theirs: str
    default: int

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        value = tree.get(self.theirs, self.default)
        if type(value) not in (int, float) or not 0 < value < 2**63:
            raise FamilyError(f"{self.theirs}={short(value)} is not a positive number")
        return {"attention_scale": value**-0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        value = (model.attention_scale or model.head_size**-0.5) ** -2
        return {self.theirs: round(value) if 0.5 < value < 2**63 else value}


@dataclass(frozen=True)
class Only:
    """A key that must have a value, since maxlm has no other.

    Attributes:
        theirs: the key.
        value: what it must be, or be left out.
        also: what means the same.
    """

    theirs: str
    value: Any
    also: tuple[Any, ...] = ()

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        found = tree.get(self.theirs, self.value)
        if not any(type(found) is type(value) and found == value for value in (self.value, *self.also)):
            raise FamilyError(f"{self.theirs}={short(found)} is not {self.value}, the one that maxlm has")
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {self.theirs: self.value}


@dataclass(frozen=True)
class DenseFirst:
    """Layers without experts, which in maxlm are the first ones."""

    def read(self, tree: Tree) -> dict[str, Any]:
        """See Part."""
        found = tree.get("mlp_only_layers")
        found = [] if found is None else found
        if not isinstance(found, list) or any(type(n) is not int or n != i for i, n in enumerate(found)):
            raise FamilyError(f"mlp_only_layers={short(found)} is not the first layers, 0 and so on, as maxlm has them")
        return {"num_dense_layers": len(found)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See Part."""
        return {"mlp_only_layers": list(range(min(model.num_dense_layers, MOST_LAYERS)))}


def _object(tree: Tree, name: str) -> Tree:
    value = tree.get(name) or {}
    if not isinstance(value, dict):
        raise FamilyError(f"{name}={short(value)} is to be an object")
    return value


def short(value: Any) -> str:
    """A value as messages show it."""
    return ascii(value)[:80]


def meaning(model: ModelConfig) -> dict[str, Any]:
    """The fields with their defaults filled in, and those that mean nothing here left at none."""
    fields = {name: getattr(model, name) for name in ModelConfig.model_fields}
    fields |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_size}
    fields["attention_scale"] = model.attention_scale or model.head_size**-0.5
    if "local" not in model.layer_pattern:
        fields |= {"sliding_window": None, "rope_theta_local": None}
    fields["layer_pattern"] = shortest_pattern(model.layer_pattern, model.num_layers)
    fields["expert_d_ff"] = model.expert_width if model.num_experts else None
    if model.num_expert_layers == model.num_layers:
        fields["d_ff"] = None
    if model.position != "learned":
        fields["max_positions"] = None
    if model.position != "rope":
        fields |= {"rope_theta": None, "rope_fraction": None}
    if model.rope_scaling_factor is None or model.position != "rope":
        fields |= {ours: None for _, ours in ROPE_SCALING}
    elif model.rope_scaling_positions is None:
        fields |= {"rope_scaling_low": None, "rope_scaling_high": None}
    return fields
