"""Training, from a config to a report. The one file that sees every part; it reads top to bottom.

config -> mesh -> data -> run folder -> step and state -> loop -> evaluation, sample, report
"""

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from maxlm import ending, hosts, ledger, storage
from maxlm.checkpoint import CheckpointError, Checkpoints
from maxlm.config import Config
from maxlm.config_file import ConfigError
from maxlm.data.build import ensure_stores
from maxlm.data.cli import show_progress
from maxlm.data.loader import Loader
from maxlm.data.loader import identity as data_identity
from maxlm.feed import DataSource, Feed, HostBatch, StepFunction
from maxlm.init_from import bring_files, read_parameters
from maxlm.loop import Callback, Loop
from maxlm.loss import TokenLoss
from maxlm.mesh import axis_sizes, check_fit, choose_devices, make_mesh, start_devices
from maxlm.metrics import MetricsWriter
from maxlm.plan import receipt
from maxlm.progress import Progress
from maxlm.run_folder import RunFolder, identity
from maxlm.step import Program, State, build_program
from maxlm.steps import split


@dataclass
class Result:
    """What a call of train did.

    Attributes:
        run_dir: the run's folder.
        step: finished steps.
        status: "complete", "stopped" (by a signal or a callback; running again resumes), or "already complete".
        final: train_loss and heldout_loss in nats per token, heldout_bits_per_byte of text.
        primary: this process is the one of its hosts that writes and prints.
    """

    run_dir: str
    step: int
    status: str
    final: dict[str, float] = field(default_factory=dict)
    primary: bool = True


def train(
    config: Config,
    *,
    token_loss: TokenLoss | None = None,
    data: Callable[[int], HostBatch] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs, or resumes, a training run.

    Args:
        config: the run. Running it again continues from the newest checkpoint, bit for bit.
        token_loss: (float32 logits [B, T, V], batch) -> loss of every token [B, T]; default: cross entropy. See
            loss.TokenLoss for what it may look at.
        data: step -> global batch {"tokens", "targets": int32 [B, T], ...}, instead of config.data. Called in a thread
            of its own, always the same one.
        callbacks: called after every step.

    Returns:
        Where the run stands.

    Raises:
        ConfigError: the config does not fit the devices, the data or the run folder.
        CheckpointError: a save failed, or a checkpoint cannot be read.
        FloatingPointError: the loss is not finite any more.
        OSError, ValueError: data or folders cannot be used; one sentence that names them.
    """
    started = time.perf_counter()
    if data is None and not config.model.causal:
        raise ConfigError(
            "model.causal=false: tokens see those that follow, so next-token loss on token stores means nothing; train "
            "it from Python, on masked tokens and their targets: maxlm.train(config, data=FUNCTION)"
        )

    # ---- devices and mesh
    config, devices = choose_devices(config, start_devices(config.mesh))
    # the other hosts hear of a failure before what cleans up after it waits for them
    with contextlib.ExitStack() as stack, hosts.end_together():
        sizes = axis_sizes(config.mesh, len(devices))
        check_fit(config, sizes)
        mesh = make_mesh(config.mesh, devices)
        _use_compilation_cache(config.train.compilation_cache)

        # ---- run folder and data: never two runs in one folder, never other data in the same run
        folder = stack.enter_context(RunFolder(config))
        source, data_id = _open_data(config, data)
        stack.callback(source.close)
        wanted = identity(config, data_id)
        folder.check(wanted, config.train.allow_changed)
        checkpoints = Checkpoints(folder.path, config.checkpoint, run=wanted, tell=folder.tell)
        stack.callback(checkpoints.close)
        done = checkpoints.latest() or 0
        before = folder.read_summary()
        if done >= config.train.num_steps and (before.get("status"), before.get("step")) == ("complete", done):
            return Result(folder.path, done, "already complete", before.get("final", {}), folder.primary)

        # ---- step and state
        stack.enter_context(jax.set_mesh(mesh))
        program = build_program(config, mesh, token_loss)
        state, first = _first_state(program, checkpoints, before, folder.tell)
        folder.write_config(config, wanted)
        plan = None
        if folder.primary:
            begun = None if done else first
            plan = receipt.start(config, devices, sizes, folder.path, first, begun, folder.tell)
            if begun is not None and (place := config.train.init_from or config.train.start_from):
                bring_files(place, folder.path, [] if data else config.data.stores, folder.tell)

        # ---- loop
        age_s = ledger.age_s(time.perf_counter() - started)
        whose = (folder.path, first, mesh.size, age_s, folder.primary, folder.tell)
        usd_per_hour = plan.usd_per_hour if plan else None
        book = stack.enter_context(ledger.Ledger(*whose, resumed=done > 0, usd_per_hour=usd_per_hour))
        facts = ending.facts(program, sizes)
        progress = stack.enter_context(_progress(config, folder, facts, first))
        metrics = stack.enter_context(_metrics(config, folder, first)) if folder.primary else None
        feed = Feed(program, source)
        loop = Loop(program, feed, checkpoints, metrics, progress, book, callbacks, facts, folder.file("profile"))
        finish = ending.Ending(loop, folder, source, facts, started, plan)
        ending.show(loop, facts, folder, source, first, plan)
        with finish.told(first):
            state, step, stopped_by = loop.run(state, first)

            # ---- evaluation, sample, report
            if stopped_by:
                finish.stopped(step, stopped_by)
                return Result(folder.path, step, "stopped", primary=folder.primary)
            return Result(folder.path, step, "complete", finish.complete(state, step), folder.primary)


def _progress(config: Config, folder: RunFolder, facts: dict[str, Any], first: int) -> Progress:
    return Progress(
        config.train.num_steps,
        first,
        facts["peak_flops"],
        facts["flops_per_token"],
        console=None if folder.primary else Console(quiet=True),
        log_file=folder.log_file,
    )


def _metrics(config: Config, folder: RunFolder, first: int) -> MetricsWriter:
    return MetricsWriter(folder.path, config.log, config.model_dump(mode="json"), first or None)


def _use_compilation_cache(folder: str | None) -> None:
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


def _open_data(config: Config, function: Callable[[int], HostBatch] | None) -> tuple[DataSource, dict[str, Any]]:
    if function is not None:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
        return StepFunction(function, config), {"function": name}
    if jax.process_index() == 0:
        with show_progress() as progress:
            ensure_stores(config.data, progress)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("token stores")
    return Loader(config.data, config.train, config.model.vocab_size), data_identity(config.data)


def _first_state(
    program: Program, checkpoints: Checkpoints, before: dict[str, Any], tell: Callable[[str], None]
) -> tuple[State, int]:
    """The run's newest checkpoint, else another run's (train.start_from, init_from), else a new state."""
    train = program.config.train
    if found := checkpoints.restore_newest(program.state_shapes, program.stack):
        return program.complete(found[0]), found[1]
    if before.get("checkpoint") and checkpoints.folders():
        raise CheckpointError(
            f"this run has been saved in {before['checkpoint']}, but no checkpoint in {checkpoints.path} is complete. "
            "Move that folder away to begin anew; maxlm checkpoint ls RUN lists what is wrong with each"
        )
    if train.init_from is not None:
        with _other(program, "init_from", train.init_from) as (other, step, _):
            return program.begin(read_parameters(other, step, program, tell)), 0
    if train.start_from is None:
        return program.init(jax.random.key(train.seed)), 0
    with _other(program, "start_from", train.start_from) as (other, step, is_given):
        if step >= train.num_steps:
            raise ConfigError(f"train.start_from={train.start_from} is at step {step}: set train.steps above it")
        found = None if is_given else other.restore_newest(program.state_shapes, program.stack)
        state, step = found or (other.restore(step, program.state_shapes, program.stack), step)
        return program.complete(state), step


@contextlib.contextmanager
def _other(program: Program, field: str, place: str) -> Iterator[tuple[Checkpoints, int, bool]]:
    """The checkpoints of another run, RUN or RUN@STEP: the step, and whether it is given."""
    path, named = split(place)
    if not storage.exists(storage.join(path, "checkpoints")):
        is_hf = storage.exists(storage.join(path, "config.json"))
        mend = f"; convert it first: maxlm convert from-hf {shlex.quote(path)} FOLDER" if is_hf else ""
        raise ConfigError(f"train.{field}={place}: {path} is not a run folder with checkpoints{mend}")
    with contextlib.closing(Checkpoints(path, program.config.checkpoint, read_only=True)) as other:
        step = other.latest() if named is None else named
        if step is None or step not in other.steps():
            raise ConfigError(f"train.{field}={place}: {path} has the steps {other.steps()}; write RUN or RUN@STEP")
        yield other, step, named is not None
