"""The configuration's section on quantized products."""

import re
from typing import Literal

from pydantic import Field, model_validator

from maxlm.config_model import Section

Kind = Literal["int8", "fp8", "bf16"]
"""Type of a product's operands; bf16 stands for the compute dtype, whichever that is."""


class QuantConfig(Section):
    """Types in which products with weights are computed; weights, optimizer and checkpoints stay float32."""

    mode: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Type of the products with weights of layers, forward and backward, unless a rule says otherwise. "
        "int8 is for TPU v5e, v5p and v6e, fp8 for TPU7x and NVIDIA GPUs from H100 on: elsewhere they are no faster. A "
        "run may change it at any step.",
    )
    rules: dict[str, Kind] = Field(
        {},
        description="Types by parameter path, {expression: int8, fp8 or bf16}; the first that matches the whole path "
        "counts. bf16 is the model's own dtype. The projection onto the vocabulary is called lm_head.",
    )
    forward: Kind | None = Field(
        None, description="Type of forward products where rules or mode ask for int8 or fp8; default: that one."
    )
    d_activation: Kind | None = Field(None, description="Likewise of the products that make gradients of activations.")
    d_weight: Kind | None = Field(None, description="Likewise of those that make gradients of weights.")
    backward_weight: Literal["kept", "anew"] = Field(
        "kept",
        description="Weights that gradients of activations are made with: those that the forward pass has rounded, of "
        "which half the bytes of bf16 are gathered; or rounded anew: three quarters, and a 5 % smaller error of these "
        "products.",
    )
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="How gradients are rounded to int8: right on average, or to the nearest."
    )

    @model_validator(mode="after")
    def _expressions(self) -> "QuantConfig":
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}") from None
        return self

    @property
    def kinds(self) -> list[str]:
        """Types that products are quantized to, if any."""
        return sorted({self.mode, *self.rules.values()} - {"none", "bf16"})

    @property
    def used(self) -> bool:
        """Whether any product may be quantized."""
        return bool(self.kinds)

    @property
    def stochastic(self) -> bool:
        """Whether gradients need random bits."""
        return self.used and self.rounding == "stochastic"
