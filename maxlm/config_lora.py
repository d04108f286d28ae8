"""The configuration's section on low-rank adapters."""

import re
from typing import Literal

from pydantic import Field, model_validator

from maxlm.config_model import Positive, Section


class LoraConfig(Section):
    """Low-rank adapters, which are trained in place of the weights they stand beside (LoRA)."""

    rank: Positive = Field(16, description="Rank of an adapter: what it adds to a weight is a product through so many.")
    alpha: float = Field(32.0, gt=0, description="What adapters add is multiplied by alpha / rank.")
    targets: tuple[str, ...] = Field(
        ("attention.*", "mlp.*"),
        description="Expressions of the weights that get adapters, by their names in a layer, such as attention.q or "
        "mlp.*; each must match a whole name. Routed experts, norms, biases and embeddings stay as they are.",
        min_length=1,
    )
    base_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type in which the frozen weights rest; bfloat16 halves their memory and checkpoints."
    )

    @model_validator(mode="after")
    def _expressions(self) -> "LoraConfig":
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"targets: {pattern!r} is not a regular expression: {error}") from None
        return self

    @property
    def scale(self) -> float:
        """By what the product of an adapter's matrices is multiplied."""
        return self.alpha / self.rank

    def check(self, begins_from: str | None, optimizer: str, num_stages: int) -> None:
        """Raises ValueError where the rest of a config does not go with adapters.

        Args:
            begins_from: the run or model whose weights they stand beside.
            optimizer: its name.
            num_stages: mesh.stage.
        """
        if begins_from is None:
            raise ValueError(
                "lora trains adapters of a model that has been trained, and train.init_from is null; set it to a run, "
                "or to what maxlm convert from-hf made"
            )
        if optimizer == "muon":
            raise ValueError("optim.name=muon is for whole matrices, and lora trains factors of them; use adamw")
        if num_stages != 1:
            raise ValueError(f"mesh.stage={num_stages}: lora does not go with a pipeline; use mesh.fsdp or mesh.tensor")
