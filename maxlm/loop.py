"""The loop over steps: feed, step, metrics a step late, evaluation, saves, stops, steps that do not count."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from maxlm import flops
from maxlm.agreement import SAVE, TERM, Agreement
from maxlm.checkpoint import Checkpoints
from maxlm.feed import Ahead, Feed
from maxlm.goodput import COMPILE, DATA
from maxlm.heartbeat import STEP, beat
from maxlm.ledger import Ledger
from maxlm.loss import Batch
from maxlm.metrics import MetricsWriter
from maxlm.progress import Progress
from maxlm.quant_rules import outliers
from maxlm.step import Program, State
from maxlm.stop import StopSignals, process_age_s

Callback = Callable[[int, dict[str, float]], bool | None]
"""(finished steps, metrics), called after each step, one step late. Returning True stops the run with a save."""


class Running(NamedTuple):
    """A step whose metrics have not been read: its number, from 1, its metrics on the devices, and its batch."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch


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
        ledger: Ledger,
        callbacks: Sequence[Callback],
        facts: dict[str, Any],
        profile_dir: str,
    ):
        self.program, self.config, self.feed = program, program.config, feed
        self.checkpoints, self.metrics, self.progress, self.callbacks = checkpoints, metrics, progress, callbacks
        self.ledger = ledger
        self.step = 0
        self.last: dict[str, float] = {}
        self.first_step_s: float | None = None
        self._flops_per_token = facts["flops_per_token"]
        self._peak_flops, self._profile_dir = facts["peak_flops"], profile_dir
        self._agreement = Agreement(self._leave)
        self._wish: str | None = None  # agreed on, and not yet obeyed
        self._bad_steps = 0  # in a row
        self._tracing = self._told_of_outliers = False
        self._clock = self._saved_at = time.perf_counter()

    def run(self, state: State, first: int) -> tuple[State, int, str | None]:
        """Trains from a state after `first` steps to the end, or to a stop; what was trained is saved when it returns.

        Returns:
            The state, its number of finished steps, and what stopped the run early, if anything.

        Raises:
            CheckpointError: a save failed.
            FloatingPointError: too many steps in a row had no finite loss and gradient.
        """
        config, total = self.config, self.config.train.num_steps
        self._clock = time.perf_counter()
        step, saved, late = first, first, None
        stopped_by: str | None = None
        self.enter(COMPILE, step)
        with (
            self._agreement,
            self._signals(),
            contextlib.closing(Ahead(self.feed.train_batches(first))) as batches,
            self._profiler(),
        ):
            while step < total:
                self._ask_by_clock()
                if wish := self._wished():
                    state, late, self._wish = self._read(state, late), None, None
                    if saved != step:
                        self._save(state, saved := step, temporary=True)
                    if wish != SAVE:
                        stopped_by = wish
                        break
                    self.enter(STEP, step)
                self._profile(step + 1, state)
                self.ledger.enter(DATA)
                try:
                    batch = batches.next(give_up=lambda: self._agreement.asked)
                except Exception:
                    self._rescue(state, step, late)
                    raise
                if batch is None:
                    continue
                self.ledger.enter(STEP if step > first else COMPILE)
                state, fresh = self.program.step(state, batch)
                self.ledger.enter(STEP)
                step += 1
                # The metrics of the step before are read while this one runs: the devices never wait for the host.
                # Where something waits for this step anyway it is read at once: what is saved is known to be good.
                # So are the first two, and the ledger knows how long the devices take for one.
                if (settled := self._read(state, late)) is not state:
                    state, fresh = self.program.step(settled, batch)  # it changed nothing the first time
                late = Running(step, fresh, batch)
                self.checkpoints.check()
                due = step == total or _due(step, config.checkpoint.every)
                if due or step <= first + 2 or _due(step, config.eval.every):
                    state, late = self._read(state, late), None
                if _due(step, config.eval.every) and step < total:
                    self.evaluate(state, step, stoppable=True)
                    self.enter(STEP, step)
                # A run that cannot get beyond bad steps is not to be saved further and further within them.
                if due and (step == total or not self._bad_steps):
                    self._save(state, saved := step, temporary=False)
                    self.enter(STEP, step)
            self.enter("ending", step)
            self.checkpoints.wait()
        return state, step, stopped_by

    def enter(self, phase: str, step: int) -> None:
        """Tells the supervisor and the ledger what the run does from now on, and its newest finished step."""
        beat(phase, step)
        self.ledger.enter(phase, step)

    def evaluate(self, state: State, step: int, stoppable: bool = False) -> dict[str, float]:
        """Held-out loss in nats per token, and bits per byte of text; {} where there is no held-out text.

        Args:
            state: to evaluate.
            step: finished steps.
            stoppable: what stops the run cuts it short, and it returns {}.
        """
        self.enter("evaluation", step)
        params = self.program.weights(state)
        sums = []
        for batch in self.feed.heldout_batches(self.config.eval.batches):
            if stoppable and self._wished() not in (None, SAVE):
                self.progress.note(f"the evaluation of step {step} is cut short")
                return {}
            sums.append(self.program.evaluate(params, batch))
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

    def _read(self, state: State, late: Running | None) -> State:
        """Reads one step's metrics, logs them and asks the callbacks.

        Args:
            state: the newest one.
            late: the step; None does nothing.

        Returns:
            The state; another one, after `late.step` steps, where that one was skipped and all later ones with it.
        """
        if late is None:
            return state
        values = _to_host(late.metrics)
        if values["skipped"]:
            state, values = self._look_again(state, late, values)
        self._report(late.step, values)
        return state

    def _look_again(self, state: State, late: Running, before: dict[str, float]) -> tuple[State, dict[str, float]]:
        """Runs a step that was skipped once more: the same inputs have to give the same bits.

        Returns:
            The state after that step, and its metrics, of the second time.
        """
        state, metrics = self.program.step(self._at(state, late.step - 1), late.batch)
        values = _to_host(metrics)
        seen = [(v["loss"], v["grad_norm"]) for v in (before, values)]
        if np.array_equal(*seen, equal_nan=True):
            told = "once more it gives the same bits: it is the data or the model, not the hardware"
        else:
            told = (
                f"once more it gives {seen[1][0]:.6g} and {seen[1][1]:.6g}. The same inputs must give the same bits: "
                "a fault of the hardware, or on GPUs a program that is not deterministic "
                "(XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
            )
        fate = "it is skipped, weights and optimizer stay as they are" if values["skipped"] else "the second counts"
        what = f"step {late.step} has the loss {seen[0][0]:.6g} and the gradient norm {seen[0][1]:.6g}"
        self.progress.note(f"{what}; {told}; {fate}")
        return self._at(state, late.step), values

    def _at(self, state: State, step: int) -> State:
        place = self.program.state_shardings["step"]
        return {**state, "step": jax.make_array_from_callback((), place, lambda _: np.int32(step))}

    def _report(self, step: int, values: dict[str, float]) -> None:
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
        skipped = values["skipped"]
        if self.metrics and (_due(step, self.config.log.every) or step == self.config.train.num_steps or skipped):
            self.metrics.train(step, values)
        shown = {name: x for name, x in values.items() if "/" not in name and name != "skipped"}
        self.progress.update(step, **shown, usd=self.ledger.usd)
        self._agreement.begun, self.step = True, step
        self.enter(STEP, step)
        if not skipped:
            self.last = values
        if all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
            self._bad_steps = 0
        else:
            self._bad(step, values)
        for callback in self.callbacks:
            if callback(step, values):
                self._agreement.ask("a callback")

    def _bad(self, step: int, values: dict[str, float]) -> None:
        """Counts a step without finite numbers."""
        self._bad_steps, limit = self._bad_steps + 1, self.config.train.max_bad_steps
        if self._bad_steps >= limit:
            self.checkpoints.wait()
            name = next(name for name in ("loss", "grad_norm") if not math.isfinite(values[name]))
            before = f", as in the {limit - 1} before" if limit > 1 else ""
            raise FloatingPointError(
                f"the {name} of step {step} is {values[name]}{before}; the newest checkpoint is of step "
                f"{self.checkpoints.latest()}. Lower optim.learning_rate or lengthen optim.schedule.warmup_steps"
            )

    def _save(self, state: State, step: int, temporary: bool) -> None:
        self.enter("save", step)
        if self.metrics:
            self.metrics.flush()  # no checkpoint is ahead of its metrics
        self.checkpoints.save(step, state, temporary=temporary)
        self._clock = self._saved_at = time.perf_counter()

    def _rescue(self, state: State, step: int, late: Running | None) -> None:
        """Saves what is trained before an error of the data ends the run."""
        if jax.process_count() > 1:  # the other hosts are waiting in the step, and cannot join in a save
            return
        self.enter("ending", step)
        self.checkpoints.wait()
        state = self._read(state, late)
        if step and self.checkpoints.latest() != step:
            self._save(state, step, temporary=True)
        self.checkpoints.wait()

    def _wished(self) -> str | None:
        """What all hosts do now, if anything; comes before each program that they start together."""
        if self._wish in (None, SAVE):
            self._wish = self._agreement.due() or self._wish
        return self._wish

    def _ask_by_clock(self) -> None:
        minutes = self.config.checkpoint.minutes
        if minutes is not None and jax.process_index() == 0 and time.perf_counter() - self._saved_at > 60 * minutes:
            self._agreement.ask(SAVE)

    def _leave(self, wish: str) -> None:
        """Before the process ends because nothing has been trained yet."""
        newest = self.checkpoints.latest()
        where = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
        self.progress.note(f"stopped by {wish} before a step was finished: nothing is lost, {where}")
        self.progress.close()

    def _signals(self) -> StopSignals:
        def first(name: str) -> None:
            self._agreement.ask(name)
            if self._agreement.begun or name != TERM:
                self.progress.note(f"{name}: finishing this step and saving; a second Ctrl-C ends at once, unsaved")

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
            self.enter("profile", step - 1)
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


def _to_host(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(metrics).items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
