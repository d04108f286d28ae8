"""The parameters in a checkpoint of a run with lora, with what their adapters add."""

from collections.abc import Mapping

import numpy as np
from pydantic import ValidationError

from maxlm.config_lora import LoraConfig
from maxlm.convert.arrays import ArrayReader, Shape
from maxlm.manifest import CheckpointError

PREFIX = "lora/"


def open_arrays(folder: str) -> ArrayReader:
    """The parameters of a checkpoint, adapters merged into them where it has some.

    Args:
        folder: of a step, local.

    Raises:
        CheckpointError: the manifest cannot be read, or its adapters are not those of its weights.
    """
    plain, adapters = ArrayReader(folder), ArrayReader(folder, PREFIX)
    said = plain.manifest.run.get("lora")
    if said is None and not adapters.shapes:
        return plain
    try:
        lora = LoraConfig.model_validate(said)
    except ValidationError as error:
        problem = str(error).splitlines()[-1].strip()[:120]
        raise CheckpointError(f"the manifest of {folder} does not say what its adapters are: {problem}") from None
    return MergedReader(folder, adapters, lora)


class MergedReader(ArrayReader):
    """An ArrayReader whose weights are W + scale A B, in float32, where the checkpoint has adapters A and B."""

    def __init__(self, folder: str, adapters: ArrayReader, lora: LoraConfig):
        """Reads the manifest.

        Args:
            folder: of a step, local.
            adapters: of the same.
            lora: their rank and scale.

        Raises:
            CheckpointError: an adapter has another shape than its weight.
        """
        super().__init__(folder)
        self._adapters, self._scale = adapters, lora.scale
        for path in {name.rpartition("/")[0] for name in adapters.shapes}:
            weight, (a, b) = self.shapes.get(path), (adapters.shapes.get(f"{path}/{n}", ()) for n in "ab")
            lead = len(a) + len(b) - 2 - len(weight or ())
            fits = weight is not None and lead in (1, 3) and (*a[:-1], *b[lead + 1 :]) == weight
            if not fits or a[:lead] != b[:lead] or a[-1] != lora.rank or b[lead] != lora.rank:
                raise CheckpointError(f"the checkpoint {folder} has adapters {list(a)} and {list(b)} beside {path}")

    def read(self, path: str, slot: Shape) -> np.ndarray:
        """As ArrayReader.read."""
        values = super().read(path, slot)
        if f"{path}/a" not in self._adapters.shapes:
            return values
        a, b = (self._adapters.read(f"{path}/{name}", slot).astype(np.float32) for name in "ab")
        added = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
        return values.astype(np.float32) + np.float32(self._scale) * added.reshape(values.shape)

    def check(self, num_layer_dims: Mapping[str, int]) -> None:
        """As ArrayReader.check, of adapters too."""
        super().check(num_layer_dims)
        self._adapters.check({name: num_layer_dims[name.rpartition("/")[0]] for name in self._adapters.shapes})
