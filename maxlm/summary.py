"""summary.json, where a run stands: what is read from it, checked before anyone counts on it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float


class _Summary(BaseModel):
    """The fields that maxlm reads; there may be more."""

    model_config = ConfigDict(strict=True, extra="allow")

    status: str = ""
    step: Count = 0
    params: Count | None = None
    flops_per_token: Number | None = None
    mesh: dict[str, Count] = {}
    num_devices: Count | None = None
    device_kind: str | None = None
    bytes_per_device: Count | dict[str, Count] | None = None
    first_step_s: Number | None = None
    wall_s: Number = 0.0
    checkpoint: str | None = None
    final: dict[str, Number] = {}
    baselines: dict[str, Number] | None = None
    receipt: dict[str, Number] | None = None
    predicted_by: str | None = None
    prompt: str | None = None
    sample: str | None = None


def parse(text: str | bytes) -> dict[str, Any]:
    """Reads a summary.

    Raises:
        ValueError: it is not JSON, or a field has not its type; one sentence without the file's name.
    """
    try:
        return _Summary.model_validate_json(text).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ValueError(f"{where + ': ' if where else ''}{first['msg'][:200]}") from None
