"""The loop over steps: feed, step, metrics a step late, evaluation, saves, stops."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm import flops
from maxlm.checkpoint import Checkpoints
from maxlm.feed import Feed
from maxlm.heartbeat import STEP, beat
from maxlm.metrics import MetricsWriter
from maxlm.progress import Progress
from maxlm.quant_rules import outliers
from maxlm.step import Program, State
from maxlm.stop import StopSignals, process_age_s

Callback = Callable[[int, dict[str, float]], bool | None]
"""(finished steps, metrics), called after each step, one step late. Returning True stops the run with a save."""

AGREE_EVERY = 10
"""Steps between the moments when many hosts agree to stop."""


class Loop:
    """Trains one start of a run.

    Attributes:
        step: newest step whose metrics were read.
        last: its metrics: loss (nats per token), grad_norm, learning_rate, step_time_s, tokens_per_s; mfu where the
            hardware's peak is known; objective where another loss is minimized.
        first_step_s: seconds from the start of the process to the end of the first step.
    """

    def __init__(
        self,
        program: Program,
        feed: Feed,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        progress: Progress,
        callbacks: Sequence[Callback],
        facts: dict[str, Any],
        profile_dir: str,
    ):
        self.program, self.config, self.feed = program, program.config, feed
        self.checkpoints, self.metrics, self.progress, self.callbacks = checkpoints, metrics, progress, callbacks
        self.step = 0
        self.last: dict[str, float] = {}
        self.first_step_s: float | None = None
        self._flops_per_token = facts["flops_per_token"]
        self._peak_flops, self._profile_dir = facts["peak_flops"], profile_dir
        self._callback_stops: str | None = None
        self._tracing = self._told_of_outliers = False
        self._clock = self._saved_at = time.perf_counter()

    def run(self, state: State, first: int) -> tuple[State, int, str | None]:
        """Trains from a state after `first` steps to the end, or to a stop.

        Returns:
            The state, its number of finished steps, and what stopped the run early, if anything.

        Raises:
            CheckpointError: a save failed.
            FloatingPointError: the loss or the gradient is not finite.
        """
        config, total = self.config, self.config.train.num_steps
        self._clock = time.perf_counter()
        late: tuple[int, dict[str, jax.Array]] | None = None
        stopped_by: str | None = None
        step = first
        with (
            self._signals() as signals,
            contextlib.closing(self.feed.train_batches(first)) as batches,
            self._profiler(),
        ):
            while step < total and not stopped_by:
                self._profile(step + 1, state)
                try:
                    batch = next(batches)
                except Exception:
                    self._rescue(state, step, late)
                    raise
                state, fresh = self.program.step(state, batch)
                step += 1
                # The metrics of the step before are read while this one runs: the devices never wait for the host.
                # Where something waits for this step anyway it is read at once: what is saved is known to be finite.
                if late:
                    self._report(*late)
                late = (step, fresh)
                self.checkpoints.check()
                due = step == total or _due(step, config.checkpoint.every)
                if due or step == first + 1 or _due(step, config.eval.every):
                    self._report(*late)
                    late = None
                stopped_by, save = self._agreed(step, signals.requested or self._callback_stops, due)
                if save and late:
                    self._report(*late)
                    late = None
                if _due(step, config.eval.every) and step < total:
                    self.evaluate(state, step)
                    beat(STEP, step)
                if save:
                    self._save(state, step, temporary=not due)
                    beat(STEP, step)
            beat("ending", step)
        return state, step, stopped_by if step < total else None

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Held-out loss in nats per token, and bits per byte of text; {} where there is no held-out text."""
        beat("evaluation", step)
        params = state.get("ema", state["params"])
        sums = [self.program.evaluate(params, batch) for batch in self.feed.heldout_batches(self.config.eval.batches)]
        targets = sum(float(count) for _, count in sums)
        if not targets:
            return {}
        values = {"heldout_loss": sum(float(loss) for loss, _ in sums) / targets}
        if self.feed.tokens_per_byte:
            values["heldout_bits_per_byte"] = values["heldout_loss"] / math.log(2) * self.feed.tokens_per_byte
        if self.metrics:
            self.metrics.heldout(step, values)
        self.progress.note(f"step {step}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items()))
        self._clock = time.perf_counter()
        return values

    def _report(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        """Reads one step's metrics, logs them and asks the callbacks."""
        values = {key: float(value) for key, value in jax.device_get(device_metrics).items()}
        del values["targets"]
        now = time.perf_counter()
        values["step_time_s"], self._clock = now - self._clock, now
        values["tokens_per_s"] = self.config.train.tokens_per_step / values["step_time_s"]
        if self._peak_flops:
            values["mfu"] = flops.mfu(values["tokens_per_s"], self._flops_per_token, self._peak_flops)
        if self.first_step_s is None:
            self.first_step_s = process_age_s()
            self.progress.note(f"first step finished {self.first_step_s:.1f} s after the start of the process")
        if not self._told_of_outliers and (text := outliers(values)):
            self._told_of_outliers = True
            self.progress.note(text)
        if self.metrics and (_due(step, self.config.log.every) or step == self.config.train.num_steps):
            self.metrics.train(step, values)
        self.progress.update(step, **{name: x for name, x in values.items() if "/" not in name})
        self.step, self.last = step, values
        beat(STEP, step)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"the {name} of step {step} is {values[name]}; the newest checkpoint is of step "
                    f"{self.checkpoints.latest()}. Lower optim.learning_rate or lengthen optim.schedule.warmup_steps"
                )
        for callback in self.callbacks:
            if callback(step, values):
                self._callback_stops = "a callback"

    def _save(self, state: State, step: int, temporary: bool) -> None:
        beat("save", step)
        if self.metrics:
            self.metrics.flush()  # no checkpoint is ahead of its metrics
        self.checkpoints.save(step, state, temporary=temporary)
        self._clock = self._saved_at = time.perf_counter()

    def _rescue(self, state: State, step: int, late: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Saves what is trained before an error of the data ends the run."""
        if jax.process_count() > 1:  # the other hosts are waiting in the step, and cannot join in a save
            return
        beat("ending", step)
        self.checkpoints.wait()
        if late:
            self._report(*late)
        if step and self.checkpoints.latest() != step:
            self._save(state, step, temporary=True)
        self.checkpoints.wait()

    def _agreed(self, step: int, stop: str | None, save: bool) -> tuple[str | None, bool]:
        """What stops the run after this step, and whether it is saved.

        Many hosts ask each other now and then: all must leave, and save, at one step.
        """
        minutes = self.config.checkpoint.minutes
        late = minutes is not None and time.perf_counter() - self._saved_at > 60 * minutes
        if jax.process_count() > 1:
            if step % AGREE_EVERY:
                return None, save
            wishes = multihost_utils.process_allgather(np.array([stop is not None, late]))
            stop, late = stop or ("another host" if wishes[:, 0].any() else None), bool(wishes[:, 1].any())
        return stop, save or late or stop is not None

    def _signals(self) -> StopSignals:
        def first(name: str) -> None:
            self.progress.note(f"{name}: finishing this step and saving; a second Ctrl-C ends at once without a save")

        def second() -> None:
            saved = self.checkpoints.latest()
            lost = "everything since the start" if saved is None else f"what came after step {saved}"
            self.progress.note(f"ended without a save: {lost} is lost. The same command resumes from there.")
            self.progress.close()

        return StopSignals(first, second)

    def _profile(self, step: int, state: State) -> None:
        """Starts and ends the profiler around train.profile_steps."""
        first, last = self.config.train.profile_steps or (1, 0)
        inside = first <= step <= last
        if inside and not self._tracing:
            jax.profiler.start_trace(self._profile_dir)
        elif self._tracing and not inside:
            beat("profile", step - 1)
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        self._tracing = inside

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[None]:
        """Ends a trace that the run's end cuts short."""
        try:
            yield
        finally:
            if self._tracing:
                jax.profiler.stop_trace()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
