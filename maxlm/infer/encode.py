"""Hidden states and logits of whole texts, many at a time: what models are for whose tokens see both sides."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Config, MeshConfig
from maxlm.config_file import parse_config
from maxlm.infer.models import ModelError, OpenModel
from maxlm.mesh import axis_sizes, check_fit
from maxlm.passes import PlainPasses
from maxlm.sharding import compute_spec
from maxlm.step import build_program

SMALLEST_BUCKET = 32
"""Tokens; shorter rows are padded to it, longer ones to its doubles, so that few programs are compiled."""
BATCH_TOKENS = 8192
"""Tokens of a batch, unless one row has more."""
LOGITS = 2**28
"""Logits that a device holds at a time, at most, as a count (1 GiB), where they are asked for."""

Rows = Sequence[Sequence[int]]


class Encoder:
    """A model, ready to encode token ids.

    Args:
        opened: the model.
        mesh: that with which it was opened.
        batch_tokens: tokens on all devices at a time.
    """

    def __init__(self, opened: OpenModel, mesh: MeshConfig | None = None, batch_tokens: int = BATCH_TOKENS):
        self.opened, self._mesh, self._batch_tokens = opened, mesh or MeshConfig(), batch_tokens
        sizes = axis_sizes(self._mesh, opened.mesh.size)
        self._shards = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
        self._runs = dict[tuple[str, int, int], Callable]()

    def hidden_states(self, texts: Rows, token_types: Rows | None = None) -> list[np.ndarray]:
        """What leaves the last layer and, where there is one, the last norm: transformers' last_hidden_state.

        Args:
            texts: token ids of each, one or more.
            token_types: of each token; default: 0.

        Returns:
            For each text float32 [T, D].

        Raises:
            ModelError: a text is empty or too long, or has ids that the model has not.
        """
        return self._encoded("hidden_states", texts, token_types)

    def logits(self, texts: Rows, token_types: Rows | None = None) -> list[np.ndarray]:
        """float32 logits [T, V] of each text, without padding of the vocabulary. Args and Raises: as hidden_states."""
        vocab_size = self.opened.model.vocab_size
        return [x[:, :vocab_size] for x in self._encoded("logits", texts, token_types)]

    def _encoded(self, what: str, texts: Rows, token_types: Rows | None) -> list[np.ndarray]:
        types = [[0] * len(text) for text in texts] if token_types is None else token_types
        self._check(texts, types, token_types is not None)
        found: list[np.ndarray] = [np.empty(0)] * len(texts)
        by_bucket = dict[int, list[int]]()
        for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
            by_bucket.setdefault(bucket(len(texts[i]), self._limit), []).append(i)
        for T, numbers in by_bucket.items():
            num_rows, run = self._run(what, T, len(numbers))
            for first in range(0, len(numbers), num_rows):
                batch = np.zeros((3, num_rows, T), np.int32)  # ids, types, and 1 where there is a token
                chosen = numbers[first : first + num_rows]
                for row, i in enumerate(chosen):
                    batch[:, row, : len(texts[i])] = texts[i], types[i], [1] * len(texts[i])
                with jax.set_mesh(self.opened.mesh):
                    out = whole(run(self.opened.params, *map(put_rows, batch)))
                for row, i in enumerate(chosen):
                    found[i] = out[row, : len(texts[i])]
        return found

    @property
    def _limit(self) -> int | None:
        return self.opened.model.max_positions if self.opened.model.position == "learned" else None

    def _check(self, texts: Rows, types: Rows, has_types: bool) -> None:
        model = self.opened.model
        if [len(text) for text in texts] != [len(row) for row in types]:
            raise ModelError("token_types must have a number for each token of each text")
        for name, rows, count in (
            ("token ids", texts, model.vocab_size),
            ("token types", types if has_types else [], model.num_token_types),
        ):
            for i, row in enumerate(rows):
                if not len(row) or (self._limit is not None and len(row) > self._limit):
                    most = "" if self._limit is None else f" to {self._limit}, the positions that the model has learned"
                    raise ModelError(f"text {i + 1} has {len(row)} tokens; it must have 1{most or ' or more'}")
                if min(row) < 0 or max(row) >= count:
                    raise ModelError(f"text {i + 1} has {name} {min(row)} to {max(row)}, and the model has {count}")

    def _run(self, what: str, T: int, count: int) -> tuple[int, Callable]:
        """Rows at a time, for so many texts, and the compiled function of that many."""
        tokens = self._batch_tokens
        if what == "logits":
            tokens = min(tokens, LOGITS // self.opened.model.padded_vocab)
        most, wanted = max(1, tokens // T // self._shards), -(-count // self._shards)
        num_rows = min(most, 1 << (wanted - 1).bit_length()) * self._shards
        if (what, T, num_rows) not in self._runs:
            passes = passes_of(self.opened, self._mesh, num_rows, T)
            self._runs[what, T, num_rows] = jax.jit(partial(_rows_through, getattr(passes, what)))
        return num_rows, self._runs[what, T, num_rows]


def bucket(length: int, limit: int | None) -> int:
    """Tokens of the row in which so many are computed, limit at most; what the mesh's context shards divide."""
    T = max(SMALLEST_BUCKET, 1 << (max(1, length) - 1).bit_length())
    return T if limit is None else min(T, limit)


def passes_of(opened: OpenModel, mesh: MeshConfig, num_rows: int, T: int) -> PlainPasses:
    """The passes of an open model for batches [num_rows, T].

    Args:
        opened: the model.
        mesh: that with which it was opened.
        num_rows: rows on all devices.
        T: tokens of a row.

    Raises:
        ConfigError: they do not fit the mesh.
    """
    train = {"steps": 1, "batch_size": num_rows, "seq_len": T, "remat": "none"}
    model = opened.model.model_dump(mode="json")
    config: Config = parse_config({"model": model, "data": {"stores": [{"path": "none"}]}, "train": train})
    config = config.model_copy(update={"mesh": mesh})
    check_fit(config, axis_sizes(mesh, opened.mesh.size))
    passes = build_program(config, opened.mesh).passes
    assert isinstance(passes, PlainPasses)
    return passes


def put_rows(x_BT: np.ndarray) -> jax.Array:
    """Rows of the current mesh's hosts on its devices."""
    place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), compute_spec("BS"))
    return jax.make_array_from_callback(x_BT.shape, place, lambda at: x_BT[at])


def whole(x: jax.Array) -> np.ndarray:
    """An array of all hosts' devices on this host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _rows_through(
    run: Callable, params: dict, tokens_BT: jax.Array, types_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    places_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=compute_spec("BS"))
    rows = {"tokens": tokens_BT, "token_types": types_BT, "positions": places_BT, "segments": segments_BT}
    return run(params, rows).astype(jnp.float32)
