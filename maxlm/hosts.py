"""Many hosts: how they find each other, and how the failure of one ends them all."""

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from maxlm.config_file import ConfigError

HEARTBEAT_S = 60
"""A host that is silent for so long is dead: jax's coordination service then ends the others."""
WAITING_S = 20.0
"""A host that has waited so long for the others to join says so; jax gives up after 300 s."""
POLL_S = 1.0
"""Seconds between a host's signs of life, and between its looks at how the others are."""
SILENT_ROUNDS = 10
"""Such rounds without a sign of life from a host, and the first host warns."""
PATIENCE_S = 10.0
"""After a failure: how long to wait for a sign of life of each other host before it is taken for dead."""
EXIT_S = 60.0
"""A host whose failure is known to the others may clean up for so long."""

NO_ANSWER = (RuntimeError, ValueError)
"""What calls of the coordination service raise; jaxlib has both."""
_FAILED, _ALIVE, _REPORT = "maxlm/failed/", "maxlm/alive/", "maxlm/report/"


def join() -> None:
    """Joins the other hosts of this run, if there are any.

    Hosts find each other on Cloud TPU pods and slices (GCE, GKE), under Slurm (srun) and Open MPI (mpirun), and in
    Kubernetes' indexed Jobs and JobSets where jax[k8s] is installed; elsewhere, and with precedence, by
    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single host needs nothing.

    Raises:
        ConfigError: the settings are incomplete, or the hosts cannot meet; one sentence.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    sign = "JAX_COORDINATOR_ADDRESS" if "JAX_COORDINATOR_ADDRESS" in env else _cluster(env)
    if sign is None:
        return
    options = _options(sign, env)
    asks = ["waiting for the other hosts; have all of them been started?"]
    waits = threading.Timer(WAITING_S, print, asks, {"file": sys.stderr})
    waits.daemon = True
    waits.start()
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, and tells no one (agreement.py does)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S, **options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if sign == _CHIPS and not _pod_is_known(error):
            return
        raise ConfigError(
            f"this host is one of many ({sign}), but could not join them: {' '.join(str(error).split())[:300]}; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID to say where they are"
        ) from None
    finally:
        waits.cancel()


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """While entered: an exception on one host ends all of them, and each prints whose failure it was.

    Collectives wait for hosts that will never come, so the others cannot be left to notice for themselves. A host
    that fails writes its error into the key-value store of jax's coordination service and raises it. A thread on
    each other host finds it there, prints it and ends the process with code 1. A host that was killed writes
    nothing: where the others' collectives fail they look who gives no sign of life, and where they hang, the first
    host warns and the coordination service ends them all after HEARTBEAT_S. Does nothing on a single host.
    """
    client, host, num_hosts = service()
    if num_hosts == 1:
        yield
        return
    watch = _Watch(client, host)
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.close()


def gather(report: str, timeout_s: float, topic: str = "") -> list[str | None]:
    """Collects one text from each host at the first one, without collectives of the devices.

    Args:
        report: this host's text.
        timeout_s: how long to wait for each of the others, in seconds.
        topic: another one each time.

    Returns:
        On the first host the texts by host, None for those that did not answer; elsewhere [report].
    """
    client, host, num_hosts = service()
    if num_hosts == 1:
        return [report]
    client.key_value_set(f"{_REPORT}{topic}/{host}", report)
    if host:
        return [report]
    texts: list[str | None] = []
    for other in range(num_hosts):
        try:
            texts.append(client.blocking_key_value_get(f"{_REPORT}{topic}/{other}", int(timeout_s * 1000)))
        except NO_ANSWER:
            texts.append(None)
    client.key_value_delete(f"{_REPORT}{topic}/")
    return texts


def follow(text: str | None, timeout_s: float, topic: str) -> str:
    """What the first host says, on all hosts; likewise without collectives.

    Args:
        text: what it says; None elsewhere.
        timeout_s: how long to wait for it, in seconds.
        topic: another one each time.

    Raises:
        RuntimeError, ValueError: the first host said nothing in that time.
    """
    client, host, num_hosts = service()
    if num_hosts == 1:
        assert text is not None
        return text
    if host == 0:
        assert text is not None
        client.key_value_set(f"{_REPORT}{topic}", text)
        return text
    return client.blocking_key_value_get(f"{_REPORT}{topic}", int(timeout_s * 1000))


def agreed(text: str) -> list[str]:
    """The texts of all hosts, cut at 1,000 bytes, on all of them: a collective."""
    if jax.process_count() == 1:
        return [text]
    own = np.zeros(1000, np.uint8)
    data = text.encode()[: own.size]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    found = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in found]


def is_first() -> bool:
    """Whether this is the host that prints, known even where devices do not start."""
    return service()[1] == 0


class _Watch:
    """Shows that this host lives, and ends it when another one has failed."""

    def __init__(self, client: Any, host: int):
        self._client, self._host = client, host
        self._name = f"host {host} ({socket.gethostname()})"
        self._closing, self._failing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="maxlm-hosts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread: it must not be inside the client when jax shuts that down."""
        self._closing.set()
        self._thread.join(PATIENCE_S)
        if not self._failing.is_set():
            with contextlib.suppress(*NO_ANSWER):
                self._client.key_value_delete(f"{_ALIVE}{self._host}")

    def failed(self, error: BaseException) -> None:
        """Tells the others of this host's error; does not return if it only follows from another host's."""
        self._failing.set()
        own = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        first = {"who": self._name, "what": own}
        with contextlib.suppress(*NO_ANSWER):  # without the service there is nobody to tell
            first = self._publish(self._first_failure() or self._dead_host() or first)
        if first["what"] != own:
            _end(self._host, first, f"\nhere, in consequence or not: {own[:500]}")
        # The others end now and meet in no barrier, neither in Orbax's nor in that of jax at exit.
        threading.Thread(target=self._deadline, args=(first,), daemon=True).start()
        atexit.register(_exit)
        linger(self._host)

    def _run(self) -> None:
        tick, before = 0, {}
        while not self._closing.wait(POLL_S):
            tick += 1
            with contextlib.suppress(*NO_ANSWER):  # a service that is gone for good ends the process itself
                self._client.key_value_set(f"{_ALIVE}{self._host}", str(tick), allow_overwrite=True)
                if self._host == 0 and tick % SILENT_ROUNDS == 0:
                    before = self._warn_of_silence(before)
                first = self._first_failure()
                # One more round: where all hosts fail alike, each may say so itself.
                if first and not self._closing.wait(POLL_S) and not self._failing.is_set():
                    _end(self._host, first)

    def _warn_of_silence(self, before: dict[int, str]) -> dict[int, str]:
        """Names hosts whose counts stand still; a warning only, since whoever holds Python's lock for long may live."""
        now = self._ticks()
        for host in sorted(host for host, tick in now.items() if tick == before.get(host)):
            since = f"gave no sign of life for {SILENT_ROUNDS * POLL_S:.0f} s"
            print(f"\nwarning: host {host} {since}; if it is dead, all hosts end soon", file=sys.stderr, flush=True)
        return now

    def _first_failure(self) -> dict[str, str] | None:
        found = self._client.key_value_dir_get(_FAILED)
        return json.loads(found[0][1]) if found else None

    def _publish(self, failure: dict[str, str]) -> dict[str, str]:
        """Writes a failure unless there is an earlier one; returns the one that counts."""
        with contextlib.suppress(*NO_ANSWER):  # another host was faster
            self._client.key_value_set(f"{_FAILED}first", json.dumps(failure))
        return self._first_failure() or failure

    def _dead_host(self) -> dict[str, str] | None:
        """The failure that explains this host's: a report that comes in, or a host without a sign of life."""
        before, deadline = self._ticks(), time.monotonic() + PATIENCE_S
        silent = set(before)
        while silent and time.monotonic() < deadline:
            time.sleep(POLL_S)
            if first := self._first_failure():
                return first
            silent &= {host for host, tick in self._ticks().items() if tick == before.get(host)}
        if not silent:
            return None
        hosts = ", ".join(map(str, sorted(silent)))
        what = "gave no sign of life: it was killed, ran out of memory, or lost its machine or network"
        return {"who": f"host {hosts}", "what": what}

    def _ticks(self) -> dict[int, str]:
        found = self._client.key_value_dir_get(_ALIVE)
        ticks = {int(key.rpartition("/")[2]): tick for key, tick in found}
        return {host: tick for host, tick in ticks.items() if host != self._host}

    def _deadline(self, first: dict[str, str]) -> None:
        time.sleep(EXIT_S)
        _end(self._host, first)


def _end(host: int, failure: Mapping[str, str], more: str = "") -> None:
    """Prints a failure and ends the process: its main thread may sit in a collective that nothing interrupts."""
    console = Console(stderr=True, soft_wrap=True)
    console.show_cursor()  # a progress bar may have hidden it
    console.print(f"\nerror: {failure['who']} {failure['what']}{more}", markup=False, highlight=False)
    linger(host)
    _exit()


def linger(host: int | None) -> None:
    """Before the first of many hosts ends: the coordination service lives there, and the others have yet to read."""
    if host == 0:
        time.sleep(4 * POLL_S)


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def service() -> tuple[Any, int, int]:
    """The client of the coordination service (None on a single host), this host's number, and their count."""
    # jax gives no public way to its key-value store; multihost_utils and Orbax take this one as well.
    from jax._src import distributed

    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


_CHIPS = "it has TPU chips"


def _cluster(env: Mapping[str, str]) -> str | None:
    """What shows that jax can find the other hosts of this one; None where it seems to be alone."""
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "TPU_PROCESS_ADDRESSES_PATH"):
        if name in env:
            return name
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in env.get(name, ""):
            return name
    # SLURM_NTASKS is set in a batch script as well, where the other tasks do not run
    for name, rank in (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        if rank in env and int(env.get(name, "1")) > 1:
            return name
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(env) and importlib.util.find_spec("kubernetes"):
        return "JOB_COMPLETION_INDEX"
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    # On GCE only the metadata server knows whether a TPU VM is part of a pod; jax asks it.
    return _CHIPS if chips and importlib.util.find_spec("libtpu") and not _one_tpu_host(env) else None


def _options(sign: str, env: Mapping[str, str]) -> dict[str, Any]:
    """What jax has to be told beside what it finds itself."""
    count, index = env.get("JAX_NUM_PROCESSES"), env.get("JAX_PROCESS_ID")
    if sign == "JAX_COORDINATOR_ADDRESS":
        if count is None and index is None and _cluster(env):
            return {}
        try:
            return {"num_processes": int(count or ""), "process_id": int(index or "")}
        except ValueError:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set to numbers"
            ) from None
    if sign == "SLURM_STEP_NUM_TASKS" and env.get("SLURM_STEP_NUM_NODES") == env[sign]:
        # jax would give a node's only task one GPU
        return {"local_device_ids": list(range(int(env.get("SLURM_GPUS_ON_NODE", "0")))) or None}
    if sign == "OMPI_COMM_WORLD_SIZE" and "OMPI_MCA_orte_hnp_uri" not in env:
        return {"cluster_detection_method": "mpi4py"}  # Open MPI 5 does not say where its first process is
    return {}


def _one_tpu_host(env: Mapping[str, str]) -> bool:
    return "TPU_WORKER_HOSTNAMES" in env or "TPU_SKIP_MDS_QUERY" in env


def _pod_is_known(error: Exception) -> bool:
    """Whether a TPU VM could not join although it was told of other hosts."""
    if isinstance(error, OSError | ImportError) or "should be defined" in str(error):
        return False  # no metadata server, or it knows of no pod
    return "must be called before" not in str(error) or jax.process_count() > 1
