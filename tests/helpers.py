"""Small runs for tests: every dimension has another size, so that a swapped one shows."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import AXES, Config, MeshConfig
from maxlm.config_file import parse_config
from maxlm.mesh import make_mesh
from maxlm.step import Program, build_program

MODEL = {
    "vocab_size": 251,
    "vocab_multiple": 2,
    "num_layers": 3,
    "d_model": 20,
    "d_ff": 28,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "dtype": "float32",
}
QUICK_TO_COMPILE = {"compiler_options": {"xla_tpu_scoped_vmem_limit_kib": 16384}}
"""Of train, for programs of v5e whose collectives are looked at: the tiles of the compiler's own default, which it
chooses in half the time of those of the chip's options."""


def small_config(**sections: dict[str, Any]) -> Config:
    """A float32 config with distinct dimension sizes; sections override fields."""
    tree: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {"stores": [{"path": "unused"}]},
        "train": {"steps": 8, "batch_size": 8, "seq_len": 12, "compilation_cache": None},
        "optim": {"learning_rate": 1e-2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return parse_config(tree)


def program_on(config: Config, torus: tuple[int, ...] | None = None, **mesh: int) -> Program:
    """The config's program on fake CPU devices, such as program_on(c, data=2, fsdp=2, tensor=2)."""
    sizes = MeshConfig(**{"fsdp": 1, **mesh})
    count = sizes.slices * math.prod(getattr(sizes, axis) for axis in AXES)
    config = config.model_copy(update={"mesh": sizes})
    return build_program(config, make_mesh(sizes, jax.devices()[:count], torus))


def perturbed_params(program: Program, seed: int = 0) -> Any:
    """Host parameters with every leaf random, norms and biases too: default ones hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = program.state_shapes["params"]

    def draw(path: Any, s: Any) -> np.ndarray:
        around = 1.0 if "norm" in jax.tree_util.keystr(path) and "weight" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.2 * rng.standard_normal(s.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(config: Config, seed: int = 1) -> dict[str, np.ndarray]:
    """A packed host batch [M, B, T] with several documents per row and an uneven loss mask."""
    rng, train = np.random.default_rng(seed), config.train
    shape = (train.batch_size, train.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    starts = rng.random(shape) < 0.2
    starts[:, 0] = True
    segments = np.cumsum(starts, 1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(shape[1]), 0), 1)
    mask = (rng.random(shape) < np.linspace(0.1, 1.0, shape[0])[:, None]).astype(np.float32)
    flat = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": (np.arange(shape[1]) - first).astype(np.int32),
        "mask": mask,
    }
    return {k: microbatches(v, train.grad_accum) for k, v in flat.items()}


def microbatches(rows: np.ndarray, count: int) -> np.ndarray:
    """[B, T] -> [M, B / M, T]."""
    return rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)


def stacked(program: Program, params: Any) -> Any:
    """Host parameters of the plain path in the shape of a pipeline's; what fills a stack up is not zero."""
    shape = program.stack_shape
    if shape is None:
        return params

    def stack(x: np.ndarray) -> np.ndarray:
        return np.resize(x, (math.prod(shape), *x.shape[1:])).reshape(*shape, *x.shape[1:])

    return {**params, "layers": jax.tree.map(stack, params["layers"])}


def unstacked(program: Program, params: Any) -> Any:
    """The opposite of stacked."""
    if program.stack_shape is None:
        return params
    flat = lambda x: x.reshape(-1, *x.shape[3:])[: program.config.model.num_repeats]  # noqa: E731
    return {**params, "layers": jax.tree.map(flat, params["layers"])}


def place(program: Program, params: Any, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, jax.Array]]:
    """Host parameters and batch on the program's mesh."""
    params = jax.tree.map(jax.device_put, stacked(program, params), program.state_shardings["params"])
    return params, {k: jax.device_put(v, program.batch_sharding) for k, v in batch.items()}


def loss_and_grads(program: Program, params: Any, batch: dict[str, np.ndarray]) -> tuple[float, Any]:
    """Mean loss and host gradients of a host batch."""
    with jax.set_mesh(program.mesh):
        grads, metrics = program.grads(*place(program, params, batch))
    return float(metrics["loss"]), unstacked(program, jax.device_get(grads))


def our_logits(program: Program, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [B, T, V] of a host batch [1, B, T]."""
    with jax.set_mesh(program.mesh):
        run = jax.jit(lambda p, b: program.passes.logits(p, {k: v[0] for k, v in b.items()}))
        return np.asarray(run(*place(program, params, batch)))


def one_document(config: Config) -> dict[str, np.ndarray]:
    """A host batch [1, B, T] of rows that are one document each."""
    batch = random_batch(config)
    positions = np.broadcast_to(np.arange(config.train.seq_len, dtype=np.int32), batch["tokens"].shape).copy()
    return batch | {"segments": np.ones_like(positions), "positions": positions}


def worst_error(a: Any, b: Any) -> float:
    """Largest max|a - b| / max|b| over the leaves."""
    errors = jax.tree.map(lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()), a, b)
    return max(jax.tree.leaves(errors))


def assert_same_loss_and_grads(got: tuple[float, Any], want: tuple[float, Any], bound: float = 1e-5) -> None:
    """Parity of loss and of every gradient leaf; all gradients must be alive."""
    assert abs(got[0] - want[0]) <= bound * abs(want[0])
    alive = jax.tree.map(lambda g: bool(jnp.abs(g).max() > 0), want[1])
    assert all(jax.tree.leaves(alive)), alive
    assert worst_error(got[1], want[1]) <= bound
