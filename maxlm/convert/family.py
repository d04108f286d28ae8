"""A family of models: rows for its tensors, keys for its config.

A row says how their tensor lies in memory, in dimension letters: "(NH)D" is a matrix [N H, D], heads and their features
in one dimension. Our order is that of the parameter's own letters (model/attention.py: "DNH"), so that a row is at once
the reshape and the transpose, in both directions. A tensor that is several of our parameters names them all.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from maxlm.config_model import ModelConfig
from maxlm.convert.keys import FamilyError, Key, Part, Tree, meaning, short

LOCAL_FIELDS = ("vocab_multiple", "init_std", "dtype", "aux_loss", "router_z_loss", "router_bias_rate")
"""Of a model config: what says nothing about the function that the model is."""


class Row(NamedTuple):
    """A tensor of theirs, "{}" being the number of the layer, and what it is made of.

    Attributes:
        theirs: its name.
        parts: our parameter ("*" for the layer) and its layout in the tensor; several are joined. Of a parameter of
            all experts, a layout without E says that each expert has a tensor of its own (a second "{}").
        axis: dimension along which they are joined.
    """

    theirs: str
    parts: tuple[tuple[str, str], ...]
    axis: int = 0


def row(theirs: str, ours: str, dims: str) -> Row:
    """A tensor that is one parameter."""
    return Row(theirs, ((ours, dims),))


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of config.json.
        architecture: likewise.
        rows: its tensors; those whose parameters a model has not are left out.
        parts: of its config.
        fields: what its models have in common, of ours.
        prefix: of tensors' names; files may leave it out of all that have it.
        buffers: regular expression of the names of tensors that files may hold and that the config says.
        left_out: likewise of tensors that are no part of the model, about which users are told.
        aliases: names of tensors that files may hold, beside those that they have to be the same as.
        renamed: endings of names in older files, and what they are.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]
    fields: tuple[tuple[str, Any], ...] = ()
    prefix: str = "model."
    buffers: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    left_out: str = r"(?!)"
    aliases: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def embedding(self) -> str:
        """Name of the table of embeddings."""
        return self._holding("embed")

    @property
    def head(self) -> str:
        """Name of the output projection, which files of tied embeddings may leave out."""
        return self._holding("unembed")

    def full_name(self, names: Collection[str]) -> Callable[[str], str]:
        """Puts the prefix before the names of a file's tensors, if it has been left out, and renames endings."""
        prefixed = any(name.startswith(self.prefix) for name in names)
        outside = {row.theirs for row in self.rows if not row.theirs.startswith(self.prefix)}

        def full(name: str) -> str:
            for old, new in self.renamed:
                if name.endswith(old) and (other := name.removesuffix(old) + new) not in names:
                    name = other
            return name if prefixed or name in outside else self.prefix + name

        return full

    def _holding(self, ours: str) -> str:
        return next(row.theirs for row in self.rows if row.parts[0][0] == ours)

    def read_config(self, tree: Tree) -> ModelConfig:
        """Our model config of their config.json.

        Raises:
            FamilyError: a key is missing, or says what maxlm has not.
        """
        fields = dict(self.fields)
        for part in self.parts:
            fields |= part.read(tree)
        try:
            model = ModelConfig(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            theirs = {part.ours: part.theirs for part in self.parts if isinstance(part, Key)}.get(where, where)
            text = first["msg"].removeprefix("Value error, ")
            raise FamilyError(f"{theirs}: {text}" if theirs else text) from None
        if model.rope_scaling and "local" in model.layer_pattern and model.rope_theta_local is None:
            raise FamilyError("rope_scaling of layers with a sliding window is not one that maxlm has")
        return model

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Their config.json of our model config.

        Raises:
            FamilyError: this family has no such models; names the first field that does not go over.
        """
        tree: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            tree |= part.write(model)
        back, wanted = meaning(self.read_config(tree)), meaning(model)
        for name, value in wanted.items():
            if name not in LOCAL_FIELDS and back[name] != value:
                raise FamilyError(f"{self.model_type} has no model with {name}={short(value)}")
        return tree
