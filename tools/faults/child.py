"""`maxlm train` with a fault inside: python tools/faults/child.py CONFIG [section.field=value ...].

What goes wrong is in the environment variable CHAOS, as JSON:

    hashes     file that takes {global row: hash} of each batch that the loop reads, a line each
    slow       {phase: seconds} of sleep: "evaluation" (before each of its batches), "save" (before the call), "commit"
               (in the background, before the manifest) or "data" (before each batch)
    data_at    step, from 0, at which alone "data" sleeps
    marker     file that is made when a sleep begins
    hang_at    step, from 0, whose batch never comes while `hung` does not exist
    hung       file that is made when it hangs
    bad_at     steps, from 0, whose loss mask is NaN; the data comes from a function then, not from token stores
    without    steps, from 0, that are left out by that function
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maxlm import checkpoint, cli, config_file, feed, trainer
from maxlm.data import loader
from tools.faults.compare import row_hash

FAULT: dict[str, Any] = json.loads(os.environ.get("CHAOS", "{}"))


def sleep(phase: str) -> None:
    """Makes a phase long."""
    if phase in FAULT.get("slow", {}):
        if "marker" in FAULT:
            Path(FAULT["marker"]).touch()
        time.sleep(FAULT["slow"][phase])


class WatchedLoader(loader.Loader):
    """Writes down what is read; is slow or hangs where the fault says so."""

    def batches(self, first_step: int, start: int, stop: int) -> Generator[loader.Batch, None, None]:
        """As Loader.batches."""
        inner = super().batches(first_step, start, stop)
        try:
            for step, batch in enumerate(inner, first_step):
                if FAULT.get("data_at", step) == step:
                    sleep("data")
                self._hang(step)
                self._write(step, start, batch)
                yield batch
        finally:
            inner.close()

    def _hang(self, step: int) -> None:
        if FAULT.get("hang_at") == step and not Path(FAULT["hung"]).exists():
            Path(FAULT["hung"]).touch()
            while True:
                time.sleep(1)

    def _write(self, step: int, start: int, batch: dict[str, np.ndarray]) -> None:
        if "hashes" in FAULT:
            first = step * self._train.batch_size + start
            rows = {first + i: row_hash(batch, i) for i in range(len(batch["tokens"]))}
            with open(FAULT["hashes"], "a") as file:
                file.write("\n" + json.dumps(rows))  # after a line that a kill cut off


class Bad:
    """A data function: the token stores' batches, of which some are left out and some have a NaN."""

    def __init__(self, path: str, overrides: list[str]):
        config = config_file.load_config(path, overrides)
        self._size = config.train.batch_size
        self._loader = loader.Loader(config.data, config.train, config.model.vocab_size)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        for gone in sorted(FAULT.get("without", [])):
            step += gone <= step
        batch = self._loader.rows(step, 0, self._size)
        if step in FAULT.get("bad_at", []):
            batch["mask"] = batch["mask"] * np.float32("nan")
        return batch


def slowly(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that sleeps before."""

    def slow(*args: Any, **options: Any) -> Any:
        sleep(phase)
        return function(*args, **options)

    return slow


def slow_heldout(batches: Callable[..., Any]) -> Callable[..., Any]:
    """Feed.heldout_batches that sleeps before each batch, which is in the phase "evaluation"."""

    def slow(*args: Any) -> Iterator[Any]:
        for batch in batches(*args):
            sleep("evaluation")
            yield batch

    return slow


def main() -> int:
    """Trains."""
    trainer.Loader = WatchedLoader
    checkpoint.Checkpoints.save = slowly("save", checkpoint.Checkpoints.save)
    checkpoint.Checkpoints._finish = slowly("commit", checkpoint.Checkpoints._finish)
    feed.Feed.heldout_batches = slow_heldout(feed.Feed.heldout_batches)
    if "bad_at" in FAULT or "without" in FAULT:
        trainer.train = partial(trainer.train, data=Bad(sys.argv[1], sys.argv[2:]))
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
