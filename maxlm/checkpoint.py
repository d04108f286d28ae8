"""Sharded, asynchronous checkpoints through Orbax: verified, restored onto whatever mesh asks for them.

A save is a folder STEP that Orbax writes, and a manifest (maxlm.manifest) that is written into it last: a step without
one does not exist. A restore reads every file and every array and compares; where a step is damaged it is put aside and
the one before is taken.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp

from maxlm import guard, hosts, manifest, storage
from maxlm.config import CheckpointConfig
from maxlm.fingerprint import fingerprints
from maxlm.leaves import difference, map_paths, named_leaves, shapes_of
from maxlm.manifest import ArrayRecord, CheckpointError, DamagedError, FileRecord, Manifest
from maxlm.restack import Stack
from maxlm.steps import DAMAGED, Steps
from maxlm.storage import StorageError

WRITERS = ("maxlm", "jax", "orbax-checkpoint", "tensorstore")
_COUNT = itertools.count()  # of saves in this process
HOSTS_S = 1200.0
"""Hosts wait so long for each other's part of a save, in seconds."""


class Checkpoints(Steps):
    """The checkpoints of one run, in RUN/checkpoints/STEP.

    The newest `keep_last` are kept, and every step that is a multiple of `keep_every`; a temporary one until the next
    is complete.
    """

    def __init__(
        self,
        run_dir: str,
        config: CheckpointConfig,
        *,
        run: Mapping[str, Any] | None = None,
        read_only: bool = False,
        tell: Callable[[str], None] | None = None,
    ):
        """Opens a run's checkpoints.

        Args:
            run_dir: folder or gs:// bucket of the run.
            config: retention and mode.
            run: identity of the run, for the manifests.
            read_only: change nothing: another run's checkpoints.
            tell: is told what a person should know; default: standard error.

        Raises:
            StorageError: the folder cannot be used.
        """
        super().__init__(run_dir)
        self._config, self._run, self._read_only = config, dict(run or {}), read_only
        self._tell = tell or partial(print, file=sys.stderr, flush=True)
        self._pending: tuple[int, Future[None]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="maxlm-save")
        self._newest: int | None = None  # that is complete, as far as this process knows
        self._kinds: dict[int, bool] = {}  # whether a step is temporary, as far as its manifest has been read
        # folders that cannot be made are heard of at once
        options = ocp.AsyncOptions(timeout_secs=int(HOSTS_S), create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
        if not read_only:
            self._open()

    # ---- saves

    def save(self, step: int, state: Any, *, temporary: bool = False) -> None:
        """Saves the state of a step. Returns once it is copied from the devices.

        Args:
            step: finished steps.
            state: tree of arrays.
            temporary: the next save replaces it.

        Raises:
            CheckpointError: this save, or an earlier one in the background, failed.
        """
        self.wait()
        named = named_leaves(state)
        taken = fingerprints({path: x for path, x in named.items() if isinstance(x, jax.Array)})
        try:
            self._look_for_newest(step)
            self._orbax.save(_place(self.step_path(step)), args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._aside.discard(step)
        shapes = {path: (str(x.dtype), tuple(x.shape)) for path, x in named.items()}
        finish = partial(self._finish, step, shapes, taken, temporary, next(_COUNT))
        self._pending = step, self._pool.submit(finish)
        if not self._config.asynchronous:
            self.wait()

    def check(self) -> None:
        """Does not wait.

        Raises:
            CheckpointError: a save in the background has failed.
        """
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for saves in the background, up to their manifests.

        Raises:
            CheckpointError: one of them failed.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Ends the background work. Call wait first, to hear of failures."""
        self._pool.shutdown(wait=True)
        try:
            self._orbax.close()
        except Exception as error:
            self._tell(f"a save in the background failed: {_brief(error)}")

    def remove(self, step: int) -> None:
        """Removes a step; one that is removed in part does not look complete.

        Raises:
            StorageError: it cannot be removed.
        """
        storage.remove_tree(storage.join(self.step_path(step), manifest.NAME))
        storage.remove_tree(self.step_path(step))

    # ---- restores

    def restore_newest(self, shapes: Any, stack: Stack | None = None) -> tuple[Any, int] | None:
        """The newest step that is whole: its state and its number; None where there is none at all.

        Steps that are damaged are put aside, and said so.

        Args:
            shapes: as those of restore.
            stack: likewise.

        Raises:
            CheckpointError: all are damaged, or one cannot be read or holds other arrays.
        """
        self._tell_of_unfinished()
        while (step := self.latest()) is not None:
            try:
                found, self._newest = self.restore(step, shapes, stack), step
                return found, step
            except DamagedError as error:
                self.put_aside(step, str(error))
        if self._aside or any(DAMAGED in storage.list_dir(self.step_path(step)) for step in self.folders()):
            raise CheckpointError(
                f"all checkpoints in {self.path} are damaged. Move that folder away to begin anew; "
                "maxlm checkpoint ls RUN lists what is wrong with each"
            )
        return None

    def restore(self, step: int, shapes: Any, stack: Stack | None = None) -> Any:
        """Verifies a step and reads it into arrays of the given shapes, dtypes and shardings.

        Args:
            step: one of steps().
            shapes: the state's tree of ShapeDtypeStruct with shardings (Program.state_shapes). What the spike guard
                remembers (guard.RECENT) need not be on both sides: it is left out.
            stack: how these stack their layers; then a checkpoint of another pipeline, or of none, fits as well.

        Raises:
            DamagedError: it is not what was saved.
            CheckpointError: the step cannot be read, or holds other arrays.
        """
        known = self.verify(step)
        path = self.step_path(step) if known else storage.join(self.step_path(step), "default")
        try:
            saved = shapes_of(self._orbax.metadata(_place(path)).item_metadata)
        except Exception as error:
            raise self._unreadable(step, error) from error
        shapes, surplus = guard.as_saved(saved, shapes)
        wanted = shapes_of(shapes)
        others = {p for p in saved if stack and p in wanted and stack.fits(p, saved[p][0], wanted[p][0])}
        others -= {p for p in others if saved[p] == wanted[p]}
        kept = [{p: v for p, v in leaves.items() if p not in others} for leaves in (saved, wanted)]
        if problem := difference(*kept):
            raise CheckpointError(f"checkpoint {self.path}/{step} does not fit this run: {problem}")
        as_saved = map_paths(lambda p, s: stack.as_saved(saved[p][0], s) if stack and p in others else s, shapes)
        try:
            state = self._orbax.restore(_place(path), args=ocp.args.StandardRestore(as_saved))
        except Exception as error:
            raise self._unreadable(step, error) from error
        if known:
            manifest.check_arrays(known, fingerprints(named_leaves(state))())
        state = map_paths(lambda p, x, s: stack.restack(x, s) if stack and p in others else x, state, shapes)
        return {name: x for name, x in state.items() if name != surplus} if surplus else state

    def verify(self, step: int) -> Manifest | None:
        """Reads all files of a step and compares them with its manifest; each host reads a share.

        Returns:
            The manifest; None for checkpoints from before there were any, of which nothing is known.

        Raises:
            DamagedError: names a file and what is wrong with it.
            CheckpointError: it cannot be read, or is of a newer maxlm.
        """
        known, problem, unreadable = None, "", ""
        try:
            known = self.manifest(step)
            if known:
                share = sorted(known.files)[jax.process_index() :: jax.process_count()]
                manifest.check_files(self.step_path(step), known, share)
        except DamagedError as error:
            problem = str(error)
        except (CheckpointError, StorageError) as error:
            unreadable = str(error)
        if unreadable := next(filter(None, hosts.agreed(unreadable)), ""):
            raise CheckpointError(f"cannot verify checkpoint {self.step_path(step)}: {unreadable}")
        if problem := next(filter(None, hosts.agreed(problem)), ""):
            raise DamagedError(problem)
        if known is None:
            self._tell(f"{self.step_path(step)} is of an older maxlm, without a manifest: it cannot be verified")
        return known

    def put_aside(self, step: int, reason: str) -> None:
        """Marks a step as damaged, so that nothing uses it; its files stay until later steps take its place."""
        self._aside.add(step)
        left = [other for other in self.steps() if other < step]
        self._tell(
            f"DAMAGED: checkpoint {self.step_path(step)}: {reason}. It is put aside; "
            + (f"going on from step {left[-1]}" if left else "there is no earlier one")
        )
        if self._read_only:
            return
        if hosts.is_first():
            text = json.dumps({"reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
            with contextlib.suppress(StorageError):  # then the next start finds out again
                storage.write_bytes(storage.join(self.step_path(step), DAMAGED), text.encode())
        hosts.agreed("")  # nobody looks before it is written

    # ---- inside

    def _open(self) -> None:
        """Makes the folder, and removes what Orbax left behind of saves that were cut off."""
        try:
            if not storage.is_bucket(self.path):
                os.makedirs(self.path, exist_ok=True)
            elif self.path.startswith("gs://"):
                import gcsfs  # noqa: F401 (Orbax needs it)
        except OSError as error:
            raise StorageError(f"cannot use {self.path}: {error.strerror or error}") from None
        except ImportError:
            raise StorageError(
                f"checkpoints in {self.path} need another package: pip install 'maxlm[buckets]'"
            ) from None
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        if hosts.is_first():
            for name in storage.list_dir(self.path):
                if "orbax-checkpoint-tmp" in name:
                    storage.remove_tree(storage.join(self.path, name))

    def _finish(
        self,
        step: int,
        shapes: dict[str, tuple[str, tuple[int, ...]]],
        taken: Callable[[], dict[str, str]],
        temporary: bool,
        count: int,
    ) -> None:
        """In the background: waits for Orbax, hashes what it wrote, each host a share, and writes the manifest."""
        self._orbax.wait_until_finished()
        self._look_for_newest(step)
        folder, topic = self.step_path(step), f"save/{count}"
        names = manifest.saved_files(folder)[jax.process_index() :: jax.process_count()]
        parts = hosts.gather(json.dumps(manifest.hash_files(folder, names)), HOSTS_S, topic)
        if hosts.is_first():
            files: dict[str, FileRecord] = {}
            for host, part in enumerate(parts):
                if part is None:
                    raise TimeoutError(f"host {host} did not finish its part")
                files |= {name: FileRecord(*record) for name, record in json.loads(part).items()}
            unseen = set(manifest.saved_files(folder)) - set(files)  # by hosts whose listing is older
            files |= manifest.hash_files(folder, sorted(unseen))
            found = taken()
            arrays = {path: ArrayRecord(*shape, found.get(path, "")) for path, shape in shapes.items()}
            versions = {name: importlib.metadata.version(name) for name in WRITERS}
            Manifest(
                step=step, temporary=temporary, files=files, arrays=arrays, run=self._run, versions=versions
            ).write(folder)
            self._kinds[step] = temporary
            self._retire(step)
        hosts.follow("done" if hosts.is_first() else None, HOSTS_S, topic)
        self._newest = step

    def _look_for_newest(self, step: int) -> None:
        """Orbax would make a folder anew that is not there any more, such as that of a disk that was lost."""
        newest = self._newest
        if newest is not None and newest != step and not storage.exists(self.step_path(newest)):
            raise FileNotFoundError(f"the checkpoint of step {newest} has vanished from there")

    def _retire(self, newest: int) -> None:
        """Removes what need not be kept any more. The newest complete step always stays."""
        try:
            steps = self.steps()
            lasting = [step for step in steps if not self._temporary(step)]
            recent = {newest, *(lasting[-self._config.keep_last :] if self._config.keep_last else lasting)}
            every = self._config.keep_every
            kept = recent | {step for step in lasting if every and step % every == 0}
            for step in self.folders():
                aside = DAMAGED in storage.list_dir(self.step_path(step))
                last = min(recent) if aside else newest  # what is put aside may be looked at for a while
                if step not in kept and (step in steps or step < last):
                    self.remove(step)
        except StorageError as error:
            self._tell(f"an old checkpoint stays: {error}")

    def _temporary(self, step: int) -> bool:
        if step not in self._kinds:
            try:
                known = self.manifest(step)
            except CheckpointError:
                return False
            self._kinds[step] = known is not None and known.temporary
        return self._kinds[step]

    def _tell_of_unfinished(self) -> None:
        for step in self.folders():
            names = storage.list_dir(self.step_path(step))
            if not self._complete(step) and DAMAGED not in names:
                self._tell(
                    f"{self.step_path(step)} has no {manifest.NAME}: the save was cut off, or the file is lost. "
                    "It is not used"
                )

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        """Files that are as they were written and cannot be read are not damaged: memory, a disk, another Orbax."""
        return CheckpointError(f"cannot read checkpoint {self.step_path(step)}: {_brief(error)}")

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        try:
            newest = self.latest()
            kept = "there is no earlier checkpoint" if newest is None else f"the checkpoint of step {newest} is intact"
            self._remove_leftovers()  # they may be what fills the disk
        except OSError as other:
            kept = str(other)
        return CheckpointError(f"saving step {step} in {self.path} failed: {_brief(error)}; {kept}")


def _place(path: str) -> str:
    return path if storage.is_bucket(path) else os.path.abspath(path)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    # tensorstore quotes every layer that the error went through
    system = re.search(r"([^:]+) \[(os_error_code|tensorstore_spec)=", text)
    return system[1].strip() if system else text[:300]
