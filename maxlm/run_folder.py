"""The folder of a run: what is in it, who may write to it, and whether a config continues it.

config.yaml      resolved configuration of the last start
identity.json    what must not change within a run: model, data, seed, batch, optimizer
checkpoints/     STEP/ folders, written by Orbax, each with a MANIFEST.json
metrics.jsonl    one line per logged step and per evaluation
summary.json     where the run stands: status, final figures, baselines, sample, times
goodput.json     where the time of each start went, and what it cost
plan.json        what the run was predicted to take, and to cost
train.log        what was printed
report.html      drawn at the end, and by `maxlm report`
loss.png
tensorboard/     when log.tensorboard is on
profile/         when train.profile_steps is set
hf/              tokenizer, chat template and the like of the model that it began with (train.init_from)
.lock            held by the process that trains; local folders only

A local folder that a run makes is its owner's alone (mode 700); one that is there is left as it is.
"""

import contextlib
import difflib
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

import jax
from pydantic import TypeAdapter

from maxlm import storage, summary
from maxlm.config import Config, ModelConfig
from maxlm.config_file import ConfigError, to_yaml


def identity(config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """What a run is: two configs with the same identity continue one another.

    Length, schedule, mesh, microbatches, evaluation, saving and logging are not part of it.

    Args:
        config: the run.
        data: identity of its data (loader.identity).
    """
    train = {
        k: getattr(config.train, k) for k in ("seed", "batch_size", "seq_len", "z_loss", "start_from", "init_from")
    }
    return {
        "model": config.model.model_dump(mode="json"),
        "data": data,
        "train": train,
        "optim.name": config.optim.name,
        "optim.state_dtype": config.optim.state_dtype,
        **({} if config.lora is None else {"lora": config.lora.model_dump(mode="json")}),
    }


class RunFolder:
    """An opened run folder. Use as a context manager: the lock is held inside it.

    Attributes:
        path: folder or bucket url.
        exists: the folder holds a run already.
        primary: this process writes; of many hosts, one does.
        log_file: train.log, opened; None in buckets and on other hosts.
    """

    def __init__(self, config: Config):
        self.path = storage.join(config.run.root, config.run.name)
        self.exists = storage.exists(self.file("identity.json"))
        self.primary = jax.process_index() == 0
        self.log_file: IO[str] | None = None
        self._lock: int | None = None
        self._new: list[str] = []  # what is not there before

    def file(self, name: str) -> str:
        """Path of a file or folder of the run."""
        return storage.join(self.path, name)

    def __enter__(self) -> "RunFolder":
        if not storage.is_bucket(self.path):
            names = ("", "checkpoints", "train.log", ".lock")
            self._new = [self.file(name) for name in names if not os.path.lexists(self.file(name))]
            self._make()
            if self.primary:
                self._take_lock()
                self.log_file = open(self.file("train.log"), "a")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.log_file is not None:
            self.log_file.close()
            if kind is not None and not storage.exists(self.file("identity.json")):
                self._remove_new()  # a run that was refused has not begun
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def tell(self, text: str) -> None:
        """Says something on standard error and in train.log, while there is no progress bar."""
        if not self.primary:
            return
        print(text, file=sys.stderr, flush=True)
        if self.log_file is not None:
            print(text, file=self.log_file, flush=True)

    def check(self, wanted: dict[str, Any], allowed: Sequence[str] = ()) -> None:
        """Refuses a folder that holds another run.

        Args:
            wanted: identity of this run.
            allowed: fields that may differ all the same, such as data.stores or train.seed; it is told.

        Raises:
            ConfigError: names each field that differs, with both values; or one of `allowed` is no such field.
        """
        wanted = json.loads(json.dumps(wanted))
        if self.exists:
            try:
                there = TypeAdapter(Any).validate_json(storage.read_bytes(self.file("identity.json")))
            except ValueError:
                raise ConfigError(
                    f"{self.file('identity.json')} is damaged, so nothing says whether this is the same run; "
                    f"use another run.name, with train.start_from={self.path} to go on from its checkpoints"
                ) from None
            if isinstance(there, dict):
                there.setdefault("optim.state_dtype", "float32")  # of runs before there was a choice
                if isinstance(there.get("model"), dict):
                    there["model"] = {**_model_defaults(), **there["model"]}
            _refuse_unknown(allowed, _fields(wanted) | _fields(there))
            changes = _changes(there, wanted)
            within = {field: any(field == a or field.startswith(f"{a}.") for a in allowed) for field in changes}
            if refused := [field for field in changes if not within[field]]:
                raise ConfigError(
                    f"{self.path} holds another run: {'; '.join(changes[field] for field in refused)}. "
                    "Give this run its own folder (run.name=NAME), go back to those values, or, if the run is to go on "
                    f"with them, allow it: train.allow_changed=[{','.join(refused)}]"
                )
            for text in changes.values():
                self.tell(f"changed within this run, as allowed: {text}")
            return
        _refuse_unknown(allowed, _fields(wanted))
        if storage.exists(self.file("checkpoints")) and storage.list_dir(self.file("checkpoints")):
            raise ConfigError(f"{self.path} has checkpoints but no identity.json; use another run.name")

    def write_config(self, config: Config, wanted: dict[str, Any]) -> None:
        """Saves what was resolved, before the first step."""
        if not self.primary:
            return
        storage.write_bytes(self.file("config.yaml"), to_yaml(config).encode())
        storage.write_bytes(self.file("identity.json"), json.dumps(wanted, indent=1).encode())

    def write_summary(self, known: dict[str, Any]) -> None:
        """Replaces summary.json."""
        if not self.primary:
            return
        storage.write_bytes(self.file("summary.json"), json.dumps(known, indent=1).encode())

    def read_summary(self) -> dict[str, Any]:
        """summary.json, or {} when there is none or it is damaged: the next start writes it anew."""
        try:
            return summary.parse(storage.read_bytes(self.file("summary.json")))
        except (FileNotFoundError, ValueError):
            return {}

    def _make(self) -> None:
        """Each host does: whichever comes first decides who may look into the folder."""
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
        except OSError as error:
            raise storage.StorageError(f"cannot write to run folder {self.path}: {error.strerror}") from None

    def _remove_new(self) -> None:
        for path in reversed(self._new):
            with contextlib.suppress(OSError):  # a folder that holds something stays
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)

    def _take_lock(self) -> None:
        try:
            self._lock = os.open(self.file(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage.StorageError(f"cannot write to run folder {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._lock, 32).decode() or "?"
            os.close(self._lock)
            self._lock = None
            raise ConfigError(
                f"{self.path} is being trained by process {owner}; wait for it, or use another run.name"
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())


def _refuse_unknown(allowed: Sequence[str], fields: set[str]) -> None:
    if unknown := sorted(set(allowed) - fields):
        near = difflib.get_close_matches(unknown[0], sorted(fields), 3, 0.5)
        raise ConfigError(
            f"train.allow_changed: {unknown[0]} is not part of what a run is"
            + (f"; did you mean {' or '.join(near)}?" if near else "; only what a resume refuses needs it")
        )


def _fields(tree: Any, path: str = "") -> set[str]:
    """Paths of all parts of an identity."""
    inner = tree.items() if isinstance(tree, dict) else ()
    return {path} - {""} | {field for key, value in inner for field in _fields(value, f"{path}.{key}".lstrip("."))}


def _model_defaults() -> dict[str, Any]:
    """What models are of runs before a field was added."""
    fields = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    return json.loads(json.dumps(fields))


def _changes(there: Any, here: Any, path: str = "") -> dict[str, str]:
    """What differs, as a phrase, by path."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = {}
        for key in [*there, *(key for key in here if key not in there)]:
            found |= _changes(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
        return found
    if there == here:
        return {}
    return {path: f"{path} was {json.dumps(there)[:80]} and is {json.dumps(here)[:80]}"}
