"""The device mesh of a run: from configured axis sizes to a jax Mesh with Explicit axes."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from maxlm import hosts
from maxlm.config import AXES, Config, MeshConfig, ModelConfig, TrainConfig
from maxlm.config_file import ConfigError


def start_devices(config: MeshConfig) -> list[Any]:
    """Starts the backend and returns the devices of the run; joins the other hosts of a pod first.

    How hosts find each other is told in hosts.join. With fake_devices the run uses that many CPU devices.

    Raises:
        ConfigError: fake_devices is set after JAX has started with fewer devices, or the hosts cannot meet.
    """
    if config.fake_devices:
        # many devices share few cores: a slow collective is to be waited for
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_cpu_collective_call" not in flags:
            patience = {"warn_stuck": 120, "terminate": 3600}
            more = [f"--xla_cpu_collective_call_{name}_timeout_seconds={s}" for name, s in patience.items()]
            os.environ["XLA_FLAGS"] = " ".join([flags, *more]).strip()
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", config.fake_devices)
        except RuntimeError:
            pass  # the backend runs already (a notebook, a test): what it has is checked below
        devices = jax.devices("cpu")
        if len(devices) < config.fake_devices:
            raise ConfigError(
                f"mesh.fake_devices={config.fake_devices}, but JAX has already started with {len(devices)} devices; "
                "set it before anything else uses JAX"
            )
        return devices[: config.fake_devices]
    hosts.join()
    with hosts.end_together():  # all hosts start their devices, or none does
        return jax.devices()


def choose_devices(config: Config, devices: Sequence[Any]) -> tuple[Config, list[Any]]:
    """The devices that a run takes, of those that are there, and its config for them: see mesh.allowed.

    Raises:
        ConfigError: there are fewer than allowed, more on several hosts, or the microbatches do not divide the batch.
    """
    allowed = config.mesh.allowed
    if not allowed:
        return config, list(devices)
    count = next((n for n in allowed if n <= len(devices)), None)
    if count is None or (count != len(devices) and jax.process_count() > 1):
        hosts_text = f" on {jax.process_count()} hosts; start hosts that have one of these" if count else ""
        raise ConfigError(f"mesh.allowed={list(allowed)}, but there are {len(devices)} devices{hosts_text}")
    train = config.train
    num_micro = train.grad_accum * (allowed[0] // count)
    if train.batch_size % num_micro:
        raise ConfigError(
            f"on {count} devices train.batch_size={train.batch_size} would have to be cut into {num_micro} "
            f"microbatches, which do not divide it; leave {count} out of mesh.allowed={list(allowed)}"
        )
    train = train.model_copy(update={"grad_accum": num_micro})
    return config.model_copy(update={"train": train}), list(devices[:count])


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the logical axes, "slice" first, with -1 filled in.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {"slice": config.slices, **{name: getattr(config, name) for name in AXES}}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    text = mesh_text(sizes)
    free = [name for name, size in sizes.items() if size == -1]
    if num_devices % fixed or (not free and fixed != num_devices):
        raise ConfigError(
            f"mesh {text} needs {'a multiple of ' if free else ''}{fixed} devices, but there are {num_devices}; "
            f"{_mesh_advice(sizes, num_devices, fixed)}"
        )
    return {name: num_devices // fixed if size == -1 else size for name, size in sizes.items()}


def mesh_text(sizes: dict[str, int]) -> str:
    """Axes that are not of size one, such as "data 2 x fsdp 4"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "of 1 device"


def make_mesh(config: MeshConfig, devices: Sequence[Any], torus: Sequence[int] | None = None) -> Mesh:
    """Lays the logical axes over devices: slice outermost, then config.AXES, tensor innermost.

    A reduce-scatter over a whole multi-dimensional TPU slice compiles to a full all-reduce, one over a single
    torus dimension does not. So fsdp becomes one mesh axis per torus dimension it spans (fsdp0, fsdp1, ...),
    cut where the row-major order of the devices crosses from one dimension to the next. `sharding.py` names
    them together as fsdp.

    Args:
        config: axis sizes, at most one of them -1.
        devices: the devices; TPU devices are put in order of their slice and torus coordinates.
        torus: sizes of the torus dimensions; default: read from the devices' coordinates.

    Returns:
        A Mesh whose axes are all Explicit. Of the axes of size one only data, fsdp and tensor are kept.

    Raises:
        ConfigError: the sizes do not fit the devices or their slices.
    """
    sizes = axis_sizes(config, len(devices))
    num_slices = len({getattr(d, "slice_index", 0) for d in devices})
    if num_slices > 1 and num_slices != config.slices:
        raise ConfigError(f"mesh.slices={config.slices}, but the devices are in {num_slices} slices; set mesh.slices")
    if torus is None:
        devices, torus = _torus_order(devices)
    names: list[str] = []
    shape: list[int] = []
    inner = len(devices)
    for name, size in sizes.items():
        inner //= size
        if size == 1 and name not in ("data", "fsdp", "tensor"):
            continue
        parts = axis_parts(size, inner, torus) if name == "fsdp" else [size]
        names += [f"{name}{i}" for i in range(len(parts))] if len(parts) > 1 else [name]
        shape += parts
    return Mesh(np.array(devices).reshape(shape), tuple(names), axis_types=(AxisType.Explicit,) * len(names))


def check_fit(config: Config, sizes: dict[str, int]) -> None:
    """Checks that model and batch divide over the mesh.

    Args:
        config: the run.
        sizes: logical axis sizes, from axis_sizes.

    Raises:
        ConfigError: names the field, its value, and a value that fits.
    """
    check_model(config.model, sizes)
    _check_batch(config.train, sizes)
    _check_pipeline(config, sizes)
    D, shards = config.model.d_model, sizes["fsdp"] * sizes["data"]
    if config.optim.state_over_data and D % shards:
        raise ConfigError(
            f"optim.state_over_data=true splits model.d_model={D} over fsdp x data = {shards} devices, which do not "
            "divide it; change one of them, or leave state_over_data=false"
        )


def check_model(model: ModelConfig, sizes: dict[str, int]) -> None:
    """Checks that a model divides over the mesh; errors are those of check_fit."""
    experts = model.num_experts or 0
    for field, value, axis in (
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.d_ff", 0 if experts and not model.num_dense_layers else model.d_ff, "tensor"),
        ("model.expert_d_ff", model.expert_width if experts else 0, "tensor"),
        ("model.num_experts", experts, "expert"),
        ("model.vocab_size, padded to vocab_multiple,", model.padded_vocab, "tensor"),
        ("model.d_model", model.d_model, "fsdp"),
    ):
        if value % sizes[axis]:
            raise ConfigError(
                f"{field}={value} is not divisible by mesh.{axis}={sizes[axis]}; "
                f"use mesh.{axis}={_fitting(value, sizes[axis])} or change {field}"
            )
    heads, kv_heads = sizes["tensor"], model.kv_heads
    if kv_heads % heads and model.num_heads % math.lcm(heads, kv_heads):
        raise ConfigError(
            f"mesh.tensor={heads} can neither split nor repeat model.num_kv_heads={kv_heads} for "
            f"model.num_heads={model.num_heads}; use mesh.tensor={_fitting(kv_heads, heads)}"
        )


def _check_batch(train: TrainConfig, sizes: dict[str, int]) -> None:
    rows = train.batch_size // train.grad_accum
    shards = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
    if rows % shards:
        raise ConfigError(
            f"train.batch_size={train.batch_size} in {train.grad_accum} microbatches gives {rows} sequences, which do "
            f"not divide over slices x data x fsdp x expert = {shards} devices; use train.batch_size="
            f"{max(1, round(rows / shards)) * shards * train.grad_accum}"
        )
    parts = sizes["context"] * sizes["stage"] * (2 if sizes["context"] > 1 else 1)
    if train.seq_len % parts:
        raise ConfigError(
            f"train.seq_len={train.seq_len} does not divide into {parts} parts (context {sizes['context']}, in halves, "
            f"x stage {sizes['stage']}); use train.seq_len={max(1, round(train.seq_len / parts)) * parts}"
        )


def _check_pipeline(config: Config, sizes: dict[str, int]) -> None:
    shares = sizes["stage"] * config.mesh.rounds
    if config.mesh.rounds > 1 and sizes["stage"] == 1:
        raise ConfigError(f"mesh.rounds={config.mesh.rounds} needs a pipeline: set mesh.stage, or mesh.rounds=1")
    if sizes["stage"] > 1 and shares > config.model.num_repeats:
        raise ConfigError(
            f"mesh.stage={sizes['stage']} x mesh.rounds={config.mesh.rounds} is {shares} shares of layers, but the "
            f"model has {config.model.num_repeats} repeats of its layer pattern; make one smaller"
        )


def _torus_order(devices: Sequence[Any]) -> tuple[list[Any], list[int]]:
    if not all(hasattr(d, "coords") for d in devices):
        return list(devices), [len(devices)]
    # slices outermost: what crosses between them crosses the data-centre network
    coords = [(getattr(d, "slice_index", 0), *d.coords, getattr(d, "core_on_chip", 0)) for d in devices]
    torus = [len(set(along)) for along in zip(*coords, strict=True)]
    if math.prod(torus) != len(devices):  # part of a slice: no box of devices to follow
        return list(devices), [len(devices)]
    order = sorted(range(len(devices)), key=lambda i: coords[i])
    return [devices[i] for i in order], torus


def axis_parts(size: int, inner: int, torus: Sequence[int]) -> list[int]:
    """Cuts an axis of `size` devices at stride `inner` where row-major order leaves a torus dimension."""
    return [part for part, _ in axis_dims(size, inner, torus)]


def axis_dims(size: int, inner: int, torus: Sequence[int]) -> list[tuple[int, int]]:
    """Parts of an axis as axis_parts, each with the extent of the torus dimension it is in; 0 of several."""
    parts: list[int] = []
    extents: list[int] = []
    boundary = 1
    for extent in reversed(torus):
        boundary *= extent
        done = inner * math.prod(parts)
        part = math.gcd(boundary // done, size // math.prod(parts)) if boundary % done == 0 else 1
        if part > 1:
            parts.append(part)
            extents.append(extent)
    left = size // math.prod(parts)
    found = list(zip(parts, extents, strict=True))
    return [*([(left, 0)] if left > 1 else []), *reversed(found)] or [(1, 0)]


def _fitting(value: int, size: int) -> int:
    return next(d for d in range(min(size, value), 0, -1) if value % d == 0)


def _mesh_advice(sizes: dict[str, int], num_devices: int, fixed: int) -> str:
    if num_devices < fixed:
        return f"make an axis smaller, or set mesh.fake_devices={fixed} to try it on CPU"
    if num_devices % fixed == 0:
        return f"set one axis to -1 (for example mesh.fsdp=-1) or mesh.data={sizes['data'] * num_devices // fixed}"
    return f"choose sizes whose product divides {num_devices}"
