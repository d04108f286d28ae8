"""What a run says at its start and at its end: facts, sample, baselines, report."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from maxlm import flops, goodput, receipt, report, units
from maxlm.config import Config
from maxlm.data.baseline import ngram_bits_per_byte
from maxlm.data.loader import Loader
from maxlm.feed import DataSource
from maxlm.hardware import detect
from maxlm.loop import Loop
from maxlm.mesh import mesh_text
from maxlm.metrics import read_metrics
from maxlm.progress import summary_table
from maxlm.quant_rules import advice
from maxlm.receipt import Prediction
from maxlm.run_folder import RunFolder
from maxlm.sample import sample
from maxlm.step import Program, State

SAMPLE_TEMPERATURE = 0.8
OF_THE_END = ("final", "baselines", "receipt", "predicted_by", "prompt", "sample")
"""What summary.json has of a run that is complete."""


def facts(program: Program, sizes: dict[str, int]) -> dict[str, Any]:
    """What is known of a run before its first step, as JSON.

    Args:
        program: the run's program.
        sizes: logical mesh axes.

    Returns:
        params (count), flops_per_token, peak_flops (FLOP/s of all devices, None where unknown), mesh, num_devices,
        device_kind, bytes_per_device (state: weights and optimizer), advice (on quantized products, None for none),
        adapters (count of their weights, None without lora).
    """
    config, device = program.config, program.mesh.devices.flat[0]
    chip = detect(device)
    peak = chip.peak(config.model.dtype) if chip else None
    return {
        "params": flops.num_params(config.model)["total_unpadded"],
        "flops_per_token": program.flops_per_token,
        "peak_flops": peak * program.mesh.size if peak else None,
        "mesh": sizes,
        "num_devices": program.mesh.size,
        "device_kind": device.device_kind,
        "bytes_per_device": bytes_per_device(program.state_shapes),
        "advice": advice(config.quant, chip),
        "adapters": program.num_adapters,
    }


def bytes_per_device(shapes: Any) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs with shardings; not what the host holds."""
    leaves = [x for x in jax.tree.leaves(shapes) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def show(
    loop: Loop, run_facts: dict[str, Any], folder: RunFolder, source: DataSource, first: int, plan: Prediction | None
) -> None:
    """Prints the summary with which a run starts."""
    config, train = loop.config, loop.config.train
    tokens = (train.num_steps - first) * train.tokens_per_step
    mesh = mesh_text(run_facts["mesh"])
    chunks = f" in {train.grad_accum} microbatches" if train.grad_accum > 1 else ""
    at_rest = "float32" if config.lora is None else config.lora.base_dtype
    updates = "" if at_rest == "float32" else "float32 "
    rows = {
        "run": f"{folder.path}" + (f", continued after step {first}" if first else ""),
        "parameters": units.count(run_facts["params"]),
        "adapters": None if config.lora is None else f"{units.count(run_facts['adapters'])}, which alone are trained",
        "batch": f"{train.batch_size} x {train.seq_len} = {units.count(train.tokens_per_step)} tokens{chunks}",
        "length": f"steps {first + 1} to {train.num_steps}: {units.count(tokens)} tokens",
        "model FLOPs": f"{units.count(run_facts['flops_per_token'] * tokens)} in all, "
        f"{units.count(run_facts['flops_per_token'])} per token",
        "mesh": f"{mesh} on {run_facts['num_devices']} {run_facts['device_kind']} devices",
        "state": f"{units.size(run_facts['bytes_per_device'])} per device ({at_rest} weights, {config.optim.name} state"
        f"{'' if config.optim.state_dtype == 'float32' else ' in ' + config.optim.state_dtype}"
        f"{' on the host' if config.optim.state_on_host else ''})",
        "held-out": _missing_heldout(source, train.seq_len),
        "precision": f"{config.model.dtype} compute{_products(config)}, {at_rest} weights, {updates}updates and loss",
        "predicted": receipt.foretold(plan),
        "note": run_facts["advice"],
    }
    loop.progress.note(summary_table(rows))
    for note in source.notes if isinstance(source, Loader) else []:
        loop.progress.note(note)
    loop.progress.note("compiling the step; the first one takes a while")


def _products(config: Config) -> str:
    return f", products in {' and '.join(config.quant.kinds)}" if config.quant.used else ""


def _missing_heldout(source: DataSource, seq_len: int) -> str | None:
    if not isinstance(source, Loader) or any(
        store.num_tokens("heldout") > (1 if store.is_chat else seq_len) for store in source.stores
    ):
        return None
    return "none: no row of held-out text (maxlm data build --heldout 0.01)"


def hbm_peak_bytes(devices: Sequence[Any]) -> float | None:
    """The most that one of these devices has held since the process began; None where none tells, as CPUs."""
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((float(peak) for peak in told if peak), default=None)


@dataclass
class Ending:
    """Closes a run: summary.json, and when it is complete the final figures, sample and report.

    Attributes:
        loop: the run's loop.
        folder: its folder.
        source: its data.
        facts: from `facts`.
        started: time.perf_counter() when this start began.
        plan: what the run was predicted to take; None where nothing was.
    """

    loop: Loop
    folder: RunFolder
    source: DataSource
    facts: dict[str, Any]
    started: float
    plan: Prediction | None = None

    def __post_init__(self) -> None:
        self._wall_before_s = self.folder.read_summary().get("wall_s", 0.0)

    @property
    def wall_s(self) -> float:
        """Seconds spent on the run; earlier starts count up to when they last wrote summary.json."""
        return self._wall_before_s + time.perf_counter() - self.started

    def write(self, step: int, status: str, **more: Any) -> None:
        """Replaces summary.json: facts, status ("running", "stopped", "diverged", "failed", "complete") and more.

        What the end of a run says goes when it is extended.
        """
        before = {name: value for name, value in self.folder.read_summary().items() if name not in OF_THE_END}
        self.folder.write_summary(
            {
                **before,
                **self.facts,
                "status": status,
                "step": step,
                **({"first_step_s": self.loop.first_step_s} if self.loop.first_step_s else {}),
                "wall_s": self.wall_s,
                "checkpoint": self.loop.checkpoints.latest_path(),
                **more,
            }
        )

    @contextlib.contextmanager
    def told(self, first: int) -> Iterator[None]:
        """Writes that the run is running, and, when an error leaves, that it failed."""
        self.write(first, "running")
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # the disk may be what failed
                self.write(self.loop.step, "diverged" if isinstance(error, FloatingPointError) else "failed")
            raise

    def stopped(self, step: int, stopped_by: str) -> None:
        """After a signal or a callback: the state is saved, say how to go on."""
        self.loop.checkpoints.wait()
        self.write(step, "stopped")
        path, saved = self.loop.checkpoints.path, self.loop.checkpoints.latest() == step
        self.loop.progress.note(
            f"stopped by {stopped_by} after step {step}, "
            + (f"which is saved in {path}.\n" if saved else "with nothing trained in this start.\n")
            + "Run the same command again to continue."
        )
        self.loop.progress.note(summary_table(goodput.rows(self.loop.ledger.goodput())))

    def complete(self, state: State, step: int) -> dict[str, float]:
        """After the last step. Returns the final figures."""
        note = self.loop.progress.note
        final = {"train_loss": self._train_loss(), **self.loop.evaluate(state, step)}
        self.loop.enter("ending", step)
        more: dict[str, Any] = {"final": final}
        stores = self.source.stores if isinstance(self.source, Loader) and self.folder.primary else []
        if len(stores) == 1 and "heldout_bits_per_byte" in final:  # a mixture has no one split to count on
            more["baselines"] = ngram_bits_per_byte(stores[0])
        more |= self._sample(state)
        self.loop.checkpoints.wait()
        if self.folder.primary:
            more |= self._receipt(step)
        self.write(step, "complete", **more)
        note(summary_table(self._closing_rows(final, more)))
        if self.folder.primary:
            self.loop.ledger.write()
            paths = report.write_report([self.folder.path])
            note("report       " + "\n             ".join(str(path) for path in paths))
        return final

    def _receipt(self, step: int) -> dict[str, Any]:
        """What was measured beside what was predicted, for summary.json; also the last row of the metrics."""
        try:
            return self._measured(step)
        except (OSError, ValueError) as error:  # the run itself is complete
            self.folder.tell(f"{error}; there is no receipt")
            return {}

    def _measured(self, step: int) -> dict[str, Any]:
        loop, since = self.loop, self.plan.since_step if self.plan else 0
        step_time_s = receipt.median(receipt.step_times(read_metrics(self.folder.path), since))
        mfu = None
        if step_time_s and (peak := self.facts["peak_flops"]):
            rate = loop.config.train.tokens_per_step / step_time_s
            mfu = flops.mfu(rate, self.facts["flops_per_token"], peak)
        measured = {
            "step_time_s": step_time_s,
            "hbm_peak_bytes": hbm_peak_bytes(loop.program.mesh.local_devices) if loop.last else None,
            "mfu": mfu,
            "usd": loop.ledger.usd,
        }
        record = receipt.compare(self.plan, measured)
        if loop.metrics and record:
            loop.metrics.receipt(step, record)
        return {"receipt": record, "predicted_by": self.plan.basis if self.plan else None}

    def _train_loss(self) -> float:
        """Of the newest step that counted; from the metrics, of a run that was killed before its last evaluation."""
        if self.loop.last:
            return self.loop.last["loss"]
        rows = [row for row in read_metrics(self.folder.path).train if not row.get("skipped")]
        return rows[-1]["loss"] if rows else math.nan

    def _sample(self, state: State) -> dict[str, str]:
        config = self.loop.config.eval
        no_text = not config.sample_prompt and _missing_heldout(self.source, 1) is not None
        if not isinstance(self.source, Loader) or not config.sample_tokens or no_text:
            return {}
        store = self.source.stores[0]
        tokenizer = store.tokenizer()
        prompt = [int(i) for i in tokenizer.encode_batch([config.sample_prompt])[0]]
        if tokenizer.bos_id is not None:
            prompt = [tokenizer.bos_id, *prompt]
        elif not prompt:  # no model has seen what comes before a document's first token
            prompt = [int(i) for i in store.read("heldout", 0, 1)]
        params = self.loop.program.weights(state)
        ids = sample(self.loop.program, params, prompt, config.sample_tokens, tokenizer.eos_id, SAMPLE_TEMPERATURE)
        said = tokenizer.decode([i for i in prompt if i != tokenizer.bos_id])
        text = tokenizer.decode(ids)
        self.loop.progress.note(f"sample (temperature {SAMPLE_TEMPERATURE}):\n{said}{text}\n")
        return {"prompt": said, "sample": text}

    def _closing_rows(self, final: dict[str, float], more: dict[str, Any]) -> dict[str, str]:
        rows = {"train loss": f"{final['train_loss']:.4f} nats per token"}
        if "heldout_loss" in final:
            rows["held-out loss"] = f"{final['heldout_loss']:.4f} nats per token"
        if bits := final.get("heldout_bits_per_byte"):
            rows["bits per byte"] = f"{bits:.3f} held out"
        if base := more.get("baselines"):
            rows["bits per byte"] += (
                f"; counting models on the same split: trigram {base['trigram']:.3f}, unigram {base['unigram']:.3f}"
            )
        first = self.loop.first_step_s
        rows["time"] = units.duration(self.wall_s) + (f", first step after {first:.1f} s" if first else "")
        rows |= goodput.rows(self.loop.ledger.goodput())
        rows |= receipt.rows(more.get("receipt", {}), more.get("predicted_by"))
        rows["checkpoint"] = str(self.loop.checkpoints.latest_path())
        return rows
