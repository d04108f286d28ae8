"""Cloud TPUs through the gcloud command: the commands of its GA track, and what its errors mean."""

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from maxlm.config_file import ConfigError
from maxlm.launch import tools
from maxlm.launch.job import Job, LaunchError

TRIES = 5
"""For what fails while a TPU VM boots or the network is gone for a moment."""
NO_CAPACITY = re.compile(r"(?i)no more capacity|stockout|not enough resources|resources? .*unavailable|exhausted")
NO_QUOTA = re.compile(r"(?i)quota")
NOT_FOUND = re.compile(r"(?i)not.?found|does not exist")
THERE = ("READY", "ACTIVE")
COMING = (
    *("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING"),
    *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
)
"""States that come to an end by themselves; in all others but THERE a TPU is lost."""
GONE = "GONE"


@dataclass(frozen=True)
class Cloud:
    """gcloud's commands for the TPU of a job in one zone."""

    job: Job
    zone: str
    project: str | None

    @property
    def queued(self) -> bool:
        """Whether it is asked for as a queued resource."""
        return self.job.via == "queued-resource"

    @property
    def nodes(self) -> list[str]:
        """Names of its slices."""
        count = self.job.num_slices
        return [self.job.name] if count == 1 else [f"{self.job.name}-{i}" for i in range(count)]

    def create(self) -> list[str]:
        """Asks for it."""
        job, options = self.job, self.job.options
        assert job.machine.tpu is not None and job.machine.tpu.runtime is not None
        image = options.runtime_version or job.machine.tpu.runtime
        what = [f"--accelerator-type={job.machine.name}", f"--labels=maxlm={job.name}"]
        if self.queued and job.num_slices > 1:
            what += [f"--node-prefix={job.name}", f"--node-count={job.num_slices}"]
        elif self.queued:
            what += [f"--node-id={job.name}"]
        what += [f"--runtime-version={image}" if self.queued else f"--version={image}"]
        if self.queued and options.wait_s >= 60:
            what += [f"--valid-until-duration={options.wait_s:.0f}s"]  # no TPU comes when nobody waits any longer
        what += ["--spot"] if options.spot else []
        what += ["--reserved"] if options.reserved else []
        for flag in ("network", "subnetwork", "service_account"):
            if (value := getattr(options, flag)) is not None:
                what.append(f"--{flag.replace('_', '-')}={value}")
        # without the scope a service account's rights do not reach buckets
        what += ["--scopes=https://www.googleapis.com/auth/cloud-platform"]
        what += ["--internal-ips"] if options.internal_ip else []
        return self._command("create", job.name, *what, "--quiet")

    def delete(self) -> list[str]:
        """Deletes it, whatever state it is in."""
        return self._command("delete", self.job.name, *(["--force"] if self.queued else []), "--quiet")

    def describe(self) -> list[str]:
        """Says how it is."""
        return self._command("describe", self.job.name, "--format=json")

    def ssh(self, node: str, command: str, worker: str = "all") -> list[str]:
        """Runs a command on one worker of a slice or on all."""
        ip = ["--internal-ip"] if self.job.options.internal_ip else []
        return self._on_vm("ssh", node, f"--worker={worker}", *ip, "--quiet", f"--command={command}")

    def watch(self, node: str, command: str) -> list[str]:
        """Runs a command that lasts on a slice's first worker; notices within two minutes that it is gone."""
        alive = [f"--ssh-flag=-o {setting}" for setting in ("ServerAliveInterval=30", "ServerAliveCountMax=4")]
        return [*self.ssh(node, command, "0"), *alive]

    def scp(self, node: str, path: str, to: str) -> list[str]:
        """Copies a file to all workers of a slice."""
        ip = ["--internal-ip"] if self.job.options.internal_ip else []
        return self._on_vm("scp", path, f"{node}:{to}", "--worker=all", *ip, "--quiet")

    def state(self) -> tuple[str, str]:
        """Its state in Cloud's words (GONE: there is none), and details where there are some."""
        if (known := self._known()) is None:
            return GONE, ""
        state = known.get("state", "")
        if isinstance(state, dict):  # of a queued resource: the state of its state
            failed = state.get("failedData", {}).get("error", {}).get("message", "")
            return str(state.get("state", "")), failed
        health = known.get("health", "HEALTHY")
        if state == "READY" and health.startswith("UNHEALTHY"):
            return health, known.get("healthDescription", "")
        return state, known.get("healthDescription", "")

    def _known(self) -> dict[str, Any] | None:
        """What Cloud knows of it, or None; no answer at once is no reason to leave a TPU alone."""
        for left in reversed(range(TRIES)):
            try:
                return json.loads(tools.call(self.describe()))
            except LaunchError as error:
                if NOT_FOUND.search(str(error)):
                    return None
                if not left:
                    raise
                time.sleep(self.job.options.poll_s)
        return None

    def _command(self, verb: str, *arguments: str) -> list[str]:
        group = "queued-resources" if self.queued else "tpu-vm"
        return ["gcloud", "compute", "tpus", group, verb, *arguments, *self._where()]

    def _on_vm(self, verb: str, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *arguments, *self._where()]

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]


def signed_in() -> str:
    """The account that gcloud uses.

    Raises:
        ConfigError: there is none.
    """
    account = tools.call(["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]).strip()
    if not account:
        raise ConfigError("gcloud is signed in to no account; run gcloud auth login")
    return account


def setting(name: str, flag: str) -> str:
    """A setting of gcloud's, such as the project.

    Raises:
        ConfigError: it is not set; names the option that says it.
    """
    value = tools.call(["gcloud", "config", "get-value", name]).strip()
    if not value or value == "(unset)":
        raise ConfigError(f"gcloud has no {name.rpartition('/')[2]}; give {flag}, or run gcloud config set {name} ...")
    return value
