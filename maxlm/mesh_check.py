"""Whether the devices of a mesh can talk: each collective over each axis, with values known beforehand."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH = 2
"""Values in each of the blocks that devices exchange: small, so that the times are those of the start-up."""
TIMED_CALLS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Collective:
    """One collective and what it has to give.

    Attributes:
        name: as XLA calls it.
        run: (one device's values float32 [n, WIDTH], axis name, n = size of the axis) -> its result, in shard_map.
        expected: (values of the devices along the axis float32 [n, n, WIDTH], a device's place among them) -> the
            result of that device.
    """

    name: str
    run: Callable[[jax.Array, str, int], jax.Array]
    expected: Callable[[np.ndarray, int], np.ndarray]


COLLECTIVES = (
    Collective("all-reduce", lambda x, axis, n: lax.psum(x, axis), lambda all_, i: all_.sum(0)),
    Collective("all-gather", lambda x, axis, n: lax.all_gather(x[0], axis), lambda all_, i: all_[:, 0]),
    Collective("reduce-scatter", lambda x, axis, n: lax.psum_scatter(x, axis), lambda all_, i: all_[:, i].sum(0)),
    Collective(
        "ppermute",
        lambda x, axis, n: lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]),
        lambda all_, i: all_[i - 1],
    ),
    Collective("all-to-all", lambda x, axis, n: lax.all_to_all(x, axis, 0, 0), lambda all_, i: all_[:, i]),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one collective over one axis, as far as this host's devices show.

    Attributes:
        axis: mesh axis.
        collective: its name.
        problem: one sentence; empty when all values are right.
        wrong_devices: ids of this host's devices with wrong values.
        time_s: the fastest of a few calls, in seconds; None where it failed.
        hangs: it did not come back, so this process can use its devices no more.
    """

    axis: str
    collective: str
    problem: str = ""
    wrong_devices: list[int] = field(default_factory=list)
    time_s: float | None = None
    hangs: bool = False


def check_mesh(mesh: Mesh, collectives: Sequence[Collective] = COLLECTIVES, timeout_s: float = 60) -> list[Outcome]:
    """Runs each collective over each axis larger than one; all hosts of the mesh call it together.

    Args:
        mesh: any mesh, whatever its axes are called.
        collectives: which.
        timeout_s: after so many seconds without an answer a collective counts as hanging, and no further one is tried.

    Returns:
        One outcome for each axis and collective.
    """
    outcomes: list[Outcome] = []
    for axis, size in mesh.shape.items():
        for collective in collectives if size > 1 else ():
            name, hung = collective.name, next((o for o in outcomes if o.hangs), None)
            if hung:
                problem = f"{name} over {axis} was not tried, since {hung.collective} over {hung.axis} hangs"
                outcomes.append(Outcome(axis, name, problem))
                continue
            try:
                outcomes.append(within(timeout_s, lambda axis=axis, c=collective: _check(mesh, axis, c)))
            except TimeoutError:
                problem = f"{name} over {axis} gave no answer within {timeout_s:g} s"
                outcomes.append(Outcome(axis, name, problem, hangs=True))
            except Exception as error:
                outcomes.append(Outcome(axis, name, f"{name} over {axis} failed: {sentence(error)}"))
    return outcomes


def within(seconds: float, function: Callable[[], T]) -> T:
    """Calls a function in a thread of its own and waits so long for it, in seconds.

    Raises:
        TimeoutError: it is still running; its thread is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def sentence(error: BaseException) -> str:
    """An error as the one line of a report."""
    text = " ".join(str(error).split())[:300]
    return text if type(error).__module__.startswith("maxlm.") and text else f"{type(error).__name__}: {text}"


def _check(mesh: Mesh, axis: str, collective: Collective) -> Outcome:
    n, names = mesh.shape[axis], tuple(mesh.axis_names)
    ranks = np.arange(mesh.size).reshape(mesh.devices.shape)
    along = np.moveaxis(ranks, names.index(axis), -1).reshape(-1, n)  # rows: devices that exchange values
    spec = PartitionSpec(names)

    def part(index: Any) -> np.ndarray:
        return _values(np.arange(index[0].start or 0, index[0].stop or mesh.size), n)

    x = jax.make_array_from_callback((mesh.size, n, WIDTH), NamedSharding(mesh, spec), part)
    body = jax.shard_map(lambda x: collective.run(x[0], axis, n)[None], mesh=mesh, in_specs=spec, out_specs=spec)
    call = jax.jit(body)
    result = jax.block_until_ready(call(x))
    times = []
    for _ in range(TIMED_CALLS):
        started = time.perf_counter()
        jax.block_until_ready(call(x))
        times.append(time.perf_counter() - started)

    wrong: dict[int, str] = {}
    for shard in result.addressable_shards:
        rank = shard.index[0].start or 0
        row, place = (int(i) for i in np.argwhere(along == rank)[0])
        difference = _difference(np.asarray(shard.data)[0], collective.expected(_values(along[row], n), place))
        if difference:
            wrong[shard.device.id] = difference
    ids = sorted(wrong)
    listed = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
    problem = (
        f"{collective.name} over {axis} is wrong on device {listed}: device {ids[0]} {wrong[ids[0]]}" if ids else ""
    )
    return Outcome(axis, collective.name, problem, ids, min(times))


def _difference(got: np.ndarray, want: np.ndarray) -> str:
    if got.shape != want.shape:
        return f"has shape {list(got.shape)} where {list(want.shape)} belongs"
    if (got == want).all():
        return ""
    at = tuple(np.argwhere(got != want)[0])
    return f"has {got[at]:g} where {want[at]:g} belongs"


def _values(ranks: np.ndarray, n: int) -> np.ndarray:
    """What devices put in: float32 [ranks, n, WIDTH]; small whole numbers, so that all sums are exact."""
    block, column = np.arange(n)[:, None], np.arange(WIDTH)
    return ((31 * ranks[:, None, None] + 7 * block + 3 * column) % 251).astype(np.float32)
