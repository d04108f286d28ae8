"""A run that begins with the parameters of another, or of a converted model, and nothing else of it."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from maxlm import manifest, storage
from maxlm.chat import CONVERTED
from maxlm.checkpoint import Checkpoints
from maxlm.config import StoreConfig
from maxlm.data.store import TokenStore
from maxlm.fingerprint import fingerprints
from maxlm.json_object import parse_object
from maxlm.leaves import difference, map_paths, named_leaves
from maxlm.manifest import CheckpointError
from maxlm.step import Program
from maxlm.steps import split

PREFIX = "params/"
BESIDE = (".json", ".jinja", ".model", ".txt")
"""What the files of a model that are not its tensors end in."""


def read_parameters(
    checkpoints: Checkpoints, step: int, program: Program, tell: Callable[[str], None] | None = None
) -> Any:
    """Verifies a checkpoint and reads its parameters onto the program's mesh, in the type in which it keeps them.

    Args:
        checkpoints: of the other run.
        step: one of its steps().
        program: says shapes and places; the other run's mesh and pipeline may be others.
        tell: hears of fields of the model that differ, though its parameters fit.

    Returns:
        The tree of parameters.

    Raises:
        DamagedError: the checkpoint is not what was saved.
        CheckpointError: it cannot be read, or holds another model.
    """
    known, path = checkpoints.verify(step), checkpoints.step_path(step)
    if known is None:
        raise CheckpointError(f"{path} is of an older maxlm, without a manifest; train.init_from needs one")
    if "lora" in known.run:
        raise CheckpointError(
            f"{path} is of a run with lora, whose parameters are not its model; merge them with maxlm convert to-hf, "
            "and read that with maxlm convert from-hf"
        )
    shapes, stack = {"params": program.state_shapes["params"]}, program.stack
    saved = {p: (tuple(a.shape), a.dtype) for p, a in known.arrays.items() if p.startswith(PREFIX)}
    wanted = {p: (tuple(s.shape), str(s.dtype)) for p, s in named_leaves(shapes).items()}
    others = {p for p in saved if p in wanted and saved[p][0] != wanted[p][0]}
    others = {p for p in others if stack.fits(p, saved[p][0], wanted[p][0])}
    kept = ({p: (v[0], "float") for p, v in leaves.items() if p not in others} for leaves in (saved, wanted))
    if problem := difference(*kept):
        raise CheckpointError(f"the parameters of {path} do not fit this run: {problem}")

    if tell and (changed := _changed(known.run.get("model"), program)):
        tell(f"train.init_from: the parameters of {path} are those of a model with {', '.join(changed)}")

    def as_saved(p: str, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        found = stack.as_saved(saved[p][0], s) if p in others else s
        return jax.ShapeDtypeStruct(found.shape, jnp.dtype(saved[p][1]), sharding=found.sharding)

    state = _restored(path, map_paths(as_saved, shapes))
    manifest.check_arrays(known, fingerprints(named_leaves(state))())

    def finish(p: str, x: jax.Array, s: jax.ShapeDtypeStruct) -> jax.Array:
        x = x if x.dtype == s.dtype else jax.jit(lambda x: x.astype(s.dtype), out_shardings=x.sharding)(x)
        return stack.restack(x, s) if p in others else x

    return map_paths(finish, state, shapes)["params"]


def bring_files(place: str, run_dir: str, stores: Sequence[StoreConfig], tell: Callable[[str], None]) -> None:
    """Copies what lies beside a converted model, such as its chat template, into a run that begins with it.

    Not if the run's text has another tokenizer; and a run does not end for want of them. Where its text ends documents
    with another token than the model knows, the generation config says this one as well.

    Args:
        place: RUN or RUN@STEP, whose files are copied where it has any.
        run_dir: the new run.
        stores: of its text; none if it is not read from stores.
        tell: hears of a file that cannot be read or written.
    """
    try:
        _bring_files(storage.join(split(place)[0], CONVERTED), run_dir, stores)
    except (OSError, ValueError) as error:
        tell(f"{error}; this run has no tokenizer and chat template of {place}")


def _bring_files(source: str, run_dir: str, stores: Sequence[StoreConfig]) -> None:
    names = [name for name in storage.list_dir(source) if name.endswith(BESIDE) and not name.endswith(".index.json")]
    files = {name: storage.read_bytes(storage.join(source, name)) for name in names}
    if stores and files:
        text = TokenStore(stores[0].path).tokenizer_identity
        if hashlib.sha256(files.get("tokenizer.json", b"")).hexdigest() != text["sha256"]:
            return
        name = "generation_config.json"
        config, tree = (parse_object(files.get(n, b"{}"), storage.join(source, n)) for n in ("config.json", name))
        known = tree.get("eos_token_id", config.get("eos_token_id"))
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if text["eos_id"] not in ends:
            files[name] = json.dumps({**tree, "eos_token_id": [*ends, text["eos_id"]]}, indent=2).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(run_dir, CONVERTED, name), data)


def _restored(path: str, item: Any) -> Any:
    """What a checkpoint holds of a tree of shapes."""
    restore = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            return orbax.restore(path if storage.is_bucket(path) else os.path.abspath(path), args=restore)
    except Exception as error:
        raise CheckpointError(f"cannot read the parameters of {path}: {' '.join(str(error).split())[:300]}") from error


def _changed(there: Any, program: Program) -> list[str]:
    """Fields that say what the model computes and are others there."""
    here = program.config.model.model_dump(mode="json")
    there = {name: value for name, value in there.items() if name in here} if isinstance(there, dict) else {}
    same = ("init_std", "dtype", "aux_loss", "router_z_loss", "router_bias_rate")
    return [f"{name}={str(value)[:40]}" for name, value in there.items() if value != here[name] and name not in same]
