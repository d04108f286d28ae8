"""The loop over steps: feed, step, metrics a step late, evaluation, saves, stops."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from maxlm.checkpoint import Checkpoints
from maxlm.feed import Feed
from maxlm.metrics import MetricsWriter
from maxlm.progress import Progress
from maxlm.step import Program, State
from maxlm.stop import StopSignals, process_age_s

Callback = Callable[[int, dict[str, float]], bool | None]
"""(finished steps, metrics), called after each step, one step late. Returning True stops the run with a save."""


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
        self._flops_per_step = facts["flops_per_token"] * self.config.train.tokens_per_step
        self._peak_flops, self._profile_dir = facts["peak_flops"], profile_dir
        self._saved: int | None = None
        self._clock = time.perf_counter()

    def run(self, state: State, first: int) -> tuple[State, int, str | None]:
        """Trains from a state after `first` steps to the end, or to a stop.

        Returns:
            The state, its number of finished steps, and what stopped the run early, if anything.

        Raises:
            CheckpointError: a save failed.
            FloatingPointError: the loss is not finite.
        """
        config, total = self.config, self.config.train.num_steps
        self._saved, self._clock = first or None, time.perf_counter()
        late: tuple[int, dict[str, jax.Array]] | None = None
        stopped_by: str | None = None
        step = first
        with self._signals() as signals, contextlib.closing(self.feed.train_batches(first)) as batches:
            while step < total and not stopped_by:
                self._profile(step + 1)
                state, fresh = self.program.step(state, next(batches))
                step += 1
                # The metrics of the step before are read while this one runs: the devices never wait for the host.
                # Only where something else waits for this step anyway is it read at once.
                now = step == first + 1 or step == total or _due(step, config.eval.every)
                for ready in [late, (step, fresh) if now else None]:
                    if ready and self._report(*ready):
                        stopped_by = "a callback"
                late = None if now else (step, fresh)
                stopped_by = stopped_by or signals.requested
                if _due(step, config.eval.every) and step < total:
                    self.evaluate(state, step)
                if stopped_by or step == total or _due(step, config.checkpoint.every):
                    self.checkpoints.save(step, state)
                    self._saved = step
            if late:
                self._report(*late)
        return state, step, stopped_by

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Held-out loss in nats per token, and bits per byte of text; {} where there is no held-out text."""
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

    def _report(self, step: int, device_metrics: dict[str, jax.Array]) -> bool:
        """Reads one step's metrics, logs them and asks the callbacks; True asks to stop."""
        values = {key: float(value) for key, value in jax.device_get(device_metrics).items()}
        del values["targets"]
        now = time.perf_counter()
        values["step_time_s"], self._clock = now - self._clock, now
        values["tokens_per_s"] = self.config.train.tokens_per_step / values["step_time_s"]
        if self._peak_flops:
            values["mfu"] = self._flops_per_step / values["step_time_s"] / self._peak_flops
        if self.first_step_s is None:
            self.first_step_s = process_age_s()
            self.progress.note(f"first step finished {self.first_step_s:.1f} s after the start of the process")
        if self.metrics and (_due(step, self.config.log.every) or step == self.config.train.num_steps):
            self.metrics.train(step, values)
        self.progress.update(step, **values)
        self.step, self.last = step, values
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss of step {step} is {values['loss']}; the newest checkpoint is of step {self._saved}. "
                "Lower optim.learning_rate or lengthen optim.schedule.warmup_steps"
            )
        answers = [callback(step, values) for callback in self.callbacks]  # all are called, whatever one says
        return any(answers)

    def _signals(self) -> StopSignals:
        def first(name: str) -> None:
            self.progress.note(f"{name}: finishing this step and saving; a second Ctrl-C ends at once without a save")

        def second() -> None:
            lost = "everything since the start" if self._saved is None else f"what came after step {self._saved}"
            self.progress.note(f"ended without a save: {lost} is lost. The same command resumes from there.")

        return StopSignals(first, second)

    def _profile(self, step: int) -> None:
        """Starts and stops the profiler around train.profile_steps."""
        first, last = self.config.train.profile_steps or (-1, -1)
        if step == first:
            jax.profiler.start_trace(self._profile_dir)
        if step == last + 1 and last >= 0:
            jax.profiler.stop_trace()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
