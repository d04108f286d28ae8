"""Sharded, asynchronous checkpoints through Orbax, restored onto whatever mesh asks for them."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from maxlm import storage
from maxlm.config import CheckpointConfig
from maxlm.restack import Stack
from maxlm.storage import StorageError


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which and what to do."""


class Checkpoints:
    """The checkpoints of one run, in RUN/checkpoints/STEP.

    A step's folder appears under its name only once it is complete: a save that is interrupted leaves the earlier
    ones as they are. The newest `keep_last` are kept, and every step that is a multiple of `keep_every`.
    """

    def __init__(self, run_dir: str, config: CheckpointConfig, *, read_only: bool = False):
        """Opens a run's checkpoints.

        Args:
            run_dir: folder or gs:// bucket of the run.
            config: retention and mode.
            read_only: change nothing: another run's checkpoints.

        Raises:
            StorageError: the folder cannot be used.
        """
        self.path = storage.join(run_dir, "checkpoints")
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else config.keep_last,
            keep_period=None if read_only else config.keep_every,
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        try:
            path = self.path if storage.is_bucket(self.path) else os.path.abspath(self.path)
            self._manager = ocp.CheckpointManager(path, options=options, item_handlers=ocp.StandardCheckpointHandler())
        except OSError as error:
            raise StorageError(f"cannot use {self.path}: {error.strerror or error}") from None
        except ImportError:
            raise StorageError(
                f"checkpoints in {self.path} need another package: pip install 'maxlm[buckets]'"
            ) from None

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Saves the state of a step. Returns once it is copied from the devices.

        Raises:
            CheckpointError: this save, or an earlier one in the background, failed.
        """
        self.wait()
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, step: int, shapes: Any, stack: Stack | None = None) -> Any:
        """Reads a step into arrays of the given shapes, dtypes and shardings.

        Args:
            step: one of steps().
            shapes: the state's tree of ShapeDtypeStruct with shardings (Program.state_shapes).
            stack: how these stack their layers; then a checkpoint of another pipeline, or of none, fits as well.

        Raises:
            CheckpointError: the step cannot be read, or holds other arrays.
        """
        try:
            saved = _leaves(self._manager.item_metadata(step))
            wanted = _leaves(shapes)
            others = {p for p in saved if stack and p in wanted and stack.fits(p, saved[p][0], wanted[p][0])}
            others -= {p for p in others if saved[p] == wanted[p]}
            kept = [{p: v for p, v in leaves.items() if p not in others} for leaves in (saved, wanted)]
            if difference := _difference(*kept):
                raise CheckpointError(f"checkpoint {self.path}/{step} does not fit this run: {difference}")
            if stack is None or not others:
                return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
            as_saved = _map_paths(lambda p, s: stack.as_saved(saved[p][0], s) if p in others else s, shapes)
            state = self._manager.restore(step, args=ocp.args.StandardRestore(as_saved))
            return _map_paths(lambda p, x, s: stack.restack(x, s) if p in others else x, state, shapes)
        except CheckpointError:
            raise
        except Exception as error:
            earlier = [s for s in self.steps() if s < step]
            way_out = (
                f"to go on from step {earlier[-1]}, move {self.step_path(step)} away"
                if earlier
                else "there is no earlier one"
            )
            raise CheckpointError(
                f"cannot read checkpoint {self.step_path(step)}: {_brief(error)}; {way_out}"
            ) from error

    def step_path(self, step: int | None) -> str | None:
        """Folder of a step; None of none."""
        return None if step is None else storage.join(self.path, str(step))

    def wait(self) -> None:
        """Waits for saves in the background.

        Raises:
            CheckpointError: one of them failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Ends the background work. Call wait first, to hear of failures."""
        self._manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        steps = self.steps()
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        return CheckpointError(f"saving step {self._saving} in {self.path} failed: {_brief(error)}; {kept}")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    system = re.search(r"([^:]+) \[os_error_code=", text)  # tensorstore quotes every layer that the error went through
    return system[1].strip() if system else text[:300]


def _map_paths(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps function(path, *leaves), with paths as those of _leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, *x: function("/".join(map(_name, path)), *x), *trees)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    named = {"/".join(_name(k) for k in path): leaf for path, leaf in flat if hasattr(leaf, "shape")}
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in named.items()}


def _name(key: Any) -> str:
    return str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))


def _difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first array by which a checkpoint and a run differ, as a phrase; empty when they fit."""
    for path in [*wanted, *saved]:
        if path not in saved:
            return f"it has no {path}"
        if path not in wanted:
            return f"its {path} has no place here"
        if saved[path] != wanted[path]:
            (shape, dtype), (own_shape, own_dtype) = saved[path], wanted[path]
            return f"{path} is {dtype}{list(shape)} there and {own_dtype}{list(own_shape)} here"
    return ""
