"""What is launched: the run, its machine and how it is started; and what is refused before anything is paid for."""

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from maxlm import places, storage
from maxlm.config import Config
from maxlm.config_file import ConfigError, load_config
from maxlm.machines import Machine, machine
from maxlm.plan.prices import find_price

TARGETS = ("tpu-vm", "queued-resource", "gke", "slurm", "skypilot", "local")
EXTRAS = {"tpu": "tpu,buckets", "gpu": "cuda,buckets", "cpu": "buckets"}
STOPPED = 143
"""Exit code of a run that a signal ended after its save: it is to go on elsewhere."""
ASKED_WRONGLY = 2
"""Exit code of maxlm with which starting again would change nothing."""
_SECRET_VALUE = re.compile(r"(hf_|sk-|ghp_|github_pat_|AKIA|ya29\.|AIza|xox[bp]-)[\w.\-]{12,}")
"""How tokens of well-known services begin."""


class LaunchError(OSError):
    """Something that a cloud refused, or that broke on the way; one sentence."""


_TPU = ("tpu-vm", "queued-resource")
WHERE = {
    **dict.fromkeys(["project", "reserved", "network", "subnetwork", "internal_ip", "keep"], _TPU),
    "zones": (*_TPU, "skypilot"),
    "spot": (*_TPU, "gke", "skypilot"),
    "runtime_version": (*_TPU, "skypilot"),
    "service_account": (*_TPU, "gke"),
    "env_file": (*_TPU, "slurm", "skypilot"),
    "image": ("gke", "skypilot"),
    **dict.fromkeys(["namespace", "queue", "secret"], ("gke",)),
    **dict.fromkeys(["partition", "account", "time"], ("slurm",)),
}
"""Options and the targets that know them."""


@dataclass(frozen=True)
class Options:
    """What the user chose beside run and machine; None where nothing was said.

    Attributes:
        zones: where to ask for the machine, in this order.
        price: USD per chip-hour.
        poll_s: seconds between looks at the state of things.
        wait_s: how long to wait for capacity, in seconds.
        others: see `maxlm launch --help`.
    """

    zones: tuple[str, ...] = ()
    project: str | None = None
    spot: bool = False
    reserved: bool = False
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None
    internal_ip: bool = False
    runtime_version: str | None = None
    env_file: str | None = None
    price: float | None = None
    keep: bool = False
    poll_s: float = 15.0
    wait_s: float = 86400.0
    image: str | None = None
    namespace: str | None = None
    queue: str | None = None
    secret: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None


@dataclass(frozen=True)
class Job:
    """A run on a machine.

    Attributes:
        name: of the launch, and of what is made for it in the cloud.
        via: one of TARGETS.
        on: the machine as it was asked for.
        config: absolute path of the config.
        overrides: settings that replace the config's.
        run: where the run's folder is.
        num_slices: slices of TPUs, each a machine.
        options: what else was chosen.
        fake_devices: CPU devices of all processes together, with --via local.
        id: tells it from others of its name.
    """

    name: str
    via: str
    on: str
    config: str
    overrides: tuple[str, ...]
    run: str
    num_slices: int
    options: Options
    fake_devices: int | None = None
    id: str = dataclasses.field(default_factory=lambda: os.urandom(8).hex())

    @property
    def machine(self) -> Machine:
        """One of its slices, or all of its GPUs."""
        return machine(self.on)

    @property
    def num_hosts(self) -> int:
        """Processes of the run."""
        return self.machine.num_hosts * self.num_slices

    def train(self, maxlm: str, config: str) -> str:
        """The command that trains and starts again after crashes, for a shell.

        Args:
            maxlm: how the program is called there.
            config: path of the config there.
        """
        return f"{maxlm} supervise --stopped-code {STOPPED} -- train {shlex.join([config, *self.overrides])}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; from_json takes them back."""
        return dataclasses.asdict(self)


def from_json(tree: Any) -> Job:
    """A job that to_json wrote.

    Raises:
        ValueError: it did not.
    """
    return TypeAdapter(Job).validate_python(tree)


def make_job(config: str, overrides: list[str], on: str, via: str, name: str | None, options: Options) -> Job:
    """Checks what can be known before anything is started.

    Args:
        config: YAML file.
        overrides: "section.field=value".
        on: name of the machine.
        via: one of TARGETS.
        name: of the launch; default: the run's.
        options: what else was chosen.

    Raises:
        ConfigError: the run does not fit the machine, would be lost with it, or a secret would be shown.
    """
    _refuse_secrets(overrides)
    for option, targets in WHERE.items():
        if getattr(options, option) and via not in targets:
            flag = "zone" if option == "zones" else option.replace("_", "-")
            raise ConfigError(f"--{flag} means nothing with --via {via}; it is for {', '.join(targets)}")
    run, wanted = load_config(config, overrides), machine(on)
    _check_target(run, wanted, via, on)
    if via != "local":
        _check_places(run, via)
    if not run.mesh.allowed:
        count = run.mesh.fake_devices or wanted.num_devices * run.mesh.slices
        from maxlm.mesh import axis_sizes, check_fit  # imports JAX, and other commands import this

        check_fit(run, axis_sizes(run.mesh, count))
    if options.env_file is not None and not os.path.isfile(options.env_file):
        raise ConfigError(f"--env-file {options.env_file} is not there; it holds lines such as WANDB_API_KEY=...")
    name = _checked_name(name, run.run.name)
    root = storage.join(run.run.root, run.run.name)
    path, fake = os.path.abspath(config), run.mesh.fake_devices
    return Job(name, via, on, path, tuple(overrides), root, run.mesh.slices, options, fake)


def price_text(job: Job) -> str:
    """What it costs while it is there, as a sentence; says so where nobody knows."""
    wanted, count = job.machine, job.num_slices
    what = f"{count} x {wanted.name}" if count > 1 else wanted.name
    parts = f"{what}, {wanted.num_chips * count} {'hosts' if wanted.kind == 'cpu' else 'chips'}"
    price, source = job.options.price, "--price"
    if price is None:
        kind = "spot" if job.options.spot else "on-demand"
        listed = find_price(wanted.chip, kind) if wanted.chip else None
        if listed is None:
            return f"{parts}: {kind} price unknown (say it with --price USD_PER_CHIP_HOUR)"
        price, source = listed.usd_per_chip_hour, f"{listed.kind}, {listed.date}, {listed.source}"
    total = price * wanted.num_chips * count
    return f"{parts}: {total:,.2f} USD per hour, {24 * total:,.0f} USD per day ({source})"


def until_done(command: str) -> list[str]:
    """Lines of a bash script that run a command and leave its exit code in $code.

    A run that gets SIGTERM saves and ends with 0, as one that is complete does; the script tells them apart, so that
    a preempted run is started again: $code is then STOPPED.
    """
    return [
        "stopped=",
        """trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM""",
        f"{command} &",
        "child=$!",
        'wait "$child"; code=$?',
        """while [ -n "$stopped" ] && kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done""",
        f"""if [ -n "$stopped" ] && [ "$code" = 0 ]; then code={STOPPED}; fi""",
    ]


def _check_target(run: Config, wanted: Machine, via: str, on: str) -> None:
    if via == "local" and wanted.kind != "cpu":
        raise ConfigError(f"--on {on}: --via local starts processes without accelerators; use cpu:2, say, for two")
    if via in ("tpu-vm", "queued-resource") and (wanted.tpu is None or wanted.tpu.runtime is None):
        where = "TPU7x is to be had in GKE alone" if wanted.tpu else "that is no TPU"
        raise ConfigError(f"--on {on} --via {via}: {where}; use --via gke or skypilot")
    if via == "slurm" and wanted.kind == "tpu":
        raise ConfigError(f"--on {on}: --via slurm takes GPUs (h100:16) and CPUs (cpu:4); TPUs are in clouds")
    if via == "local" and (run.mesh.fake_devices or wanted.num_hosts) % wanted.num_hosts:
        raise ConfigError(
            f"mesh.fake_devices={run.mesh.fake_devices} cannot be shared by the {wanted.num_hosts} processes of {on}"
        )
    if wanted.name.startswith("mi300x") and via != "slurm":
        raise ConfigError(f"--on {on} --via {via}: maxlm installs jax for TPUs and NVIDIA's GPUs; use --via slurm")
    if run.mesh.fake_devices and via != "local":
        raise ConfigError(
            f"mesh.fake_devices={run.mesh.fake_devices} would train on the CPUs of {on}: set mesh.fake_devices=null"
        )
    if run.mesh.slices > 1 and via in ("tpu-vm", "skypilot"):
        raise ConfigError(f"mesh.slices={run.mesh.slices}: --via {via} makes one slice; use queued-resource or gke")


def _check_places(run: Config, via: str) -> None:
    """Refuses folders that vanish with their machine."""
    if via != "slurm" and not storage.is_bucket(run.run.root):
        raise ConfigError(
            f"run.root={run.run.root} is a folder of a machine that may be preempted and is deleted at the end: all "
            "would be lost; set run.root=gs://BUCKET/runs"
        )
    for i, store in enumerate(run.data.stores):
        if via != "slurm" and not storage.is_bucket(store.path) and not store.text:
            raise ConfigError(f"data.stores.{i}.path={store.path} is not on the machine; put the store into a bucket")


def _checked_name(name: str | None, run: str) -> str:
    """A name that TPUs, Kubernetes and Slurm all take."""
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:40]
        name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ConfigError(f"--name {name} must be lower-case letters, digits and hyphens, a letter first, at most 40")
    return name


def _refuse_secrets(overrides: list[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        if places.SECRET.search(key) or _SECRET_VALUE.search(value):
            raise ConfigError(
                f"override {key}=... looks like a credential, which command lines, logs and cloud consoles would show; "
                "put it into a file of lines NAME=VALUE and give --env-file (or --secret with --via gke)"
            )
