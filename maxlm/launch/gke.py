"""GKE and other Kubernetes clusters: a JobSet, queued by Kueue where a queue is named."""

import contextlib
import json
from pathlib import Path
from typing import Any

from maxlm.config_file import ConfigError
from maxlm.launch import text, tools
from maxlm.launch.job import ASKED_WRONGLY, Job, LaunchError, until_done
from maxlm.machines import GPUS

PORT = 8476
MAX_RESTARTS = 1000
"""A lost node costs one; each waits for a new one anyway."""
GRACE_S = 120
"""From SIGTERM to SIGKILL, for the save; spot nodes have less."""
_GROUP = "workers"


def manifests(job: Job) -> list[dict[str, Any]]:
    """The ConfigMap with the run's config, and the JobSet."""
    if job.options.image is None:
        raise ConfigError("--via gke needs --image: an image with maxlm in it, built from the Dockerfile")
    name, space = job.name, {"namespace": job.options.namespace} if job.options.namespace else {}
    data = {"config.yaml": Path(job.config).read_text()}
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **space}, "data": data}
    queue = job.options.queue
    metadata: dict[str, Any] = {"name": name, **space, "labels": {"app.kubernetes.io/managed-by": "maxlm"}}
    if queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = queue
    if job.machine.kind == "tpu":  # a slice is a node pool: its pods must share one, and no two slices the same
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    spec = {
        "failurePolicy": {
            "maxRestarts": MAX_RESTARTS,
            # the command or config is wrong: starting again would not help
            "rules": [{"name": "asked-wrongly", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": _GROUP, "replicas": job.num_slices, "template": {"spec": _job(job)}}],
        **({"suspend": True} if queue else {}),  # Kueue lets it go
    }
    return [files, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]


def render(job: Job) -> str:
    """The manifests as YAML."""
    return text.to_yaml(*manifests(job))


def commands(job: Job) -> list[list[str]]:
    """What a launch runs; the YAML is its standard input."""
    return [["kubectl", "create", "-f", "-"]]


def launch(job: Job) -> None:
    """Creates both, or neither.

    Raises:
        LaunchError: there is one of that name, no JobSet in this cluster, or no right to create one.
    """
    try:
        tools.call(commands(job)[0], render(job))
    except LaunchError as error:
        if "exist" not in str(error):  # else it is not this launch's
            with contextlib.suppress(LaunchError):
                tools.call(_kubectl(job, "delete", "configmap", job.name, "--ignore-not-found"))
        raise


def status(job: Job) -> str:
    """How it is, as text."""
    try:
        found = json.loads(tools.call(_kubectl(job, "get", "jobset", job.name, "-o", "json")))
    except LaunchError as error:
        if "NotFound" in str(error) or "not found" in str(error):
            return f"{job.name}: there is no such JobSet; its nodes are the cluster's"
        raise
    known = found.get("status", {})
    last = next((c["type"] for c in reversed(known.get("conditions", [])) if c.get("status") == "True"), "waiting")
    ready = next((j.get("ready", 0) for j in known.get("replicatedJobsStatus", [])), 0)
    return (
        f"{job.name}: {last.lower()}, {ready} of {job.num_slices} jobs ready, {known.get('restarts', 0)} restarts; "
        f"its nodes are billing while they are there: maxlm launch stop {job.name}"
    )


def log_command(job: Job, follow: bool) -> list[str]:
    """Prints what the first host prints."""
    selector = f"jobset.sigs.k8s.io/jobset-name={job.name},batch.kubernetes.io/job-completion-index=0"
    which = f"{selector},jobset.sigs.k8s.io/job-index=0"
    return _kubectl(job, "logs", "-l", which, "--tail=100", *(["--follow"] if follow else []))


def stop(job: Job) -> None:
    """Deletes the JobSet: its pods get SIGTERM, save and end. An autoscaled node pool then shrinks."""
    tools.call(_kubectl(job, "delete", "jobset,configmap", job.name, "--ignore-not-found"))


def _kubectl(job: Job, *arguments: str) -> list[str]:
    space = ["--namespace", job.options.namespace] if job.options.namespace else []
    return ["kubectl", *arguments, *space]


def _job(job: Job) -> dict[str, Any]:
    """The Job of one slice, or of all hosts with GPUs or CPUs."""
    hosts = job.machine.num_hosts
    wrong = {"containerName": "maxlm", "operator": "In", "values": [ASKED_WRONGLY]}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod less and the others cannot go on: the JobSet starts all again
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong}]},
        "template": {"spec": _pod(job)},
    }


def _pod(job: Job) -> dict[str, Any]:
    script = [*until_done(job.train("maxlm", "/etc/maxlm/config.yaml")), 'exit "$code"', ""]
    container: dict[str, Any] = {
        "name": "maxlm",
        "image": job.options.image,
        "command": ["bash", "-c", "\n".join(script)],
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/maxlm", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if env := _environment(job):
        container["env"] = env
    if job.options.secret:
        container["envFrom"] = [{"secretRef": {"name": job.options.secret}}]
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}.get(job.machine.kind)
    if resource:
        count = str(job.machine.chips_per_host)
        container["resources"] = {"requests": {resource: count}, "limits": {resource: count}}
    if job.machine.kind == "tpu":
        container["ports"] = [{"containerPort": PORT}, {"containerPort": 8471}]  # 8471: libtpu's own
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": job.name}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # data loading and NCCL need more than 64 MB
        ],
    }
    if selector := _selector(job):
        pod["nodeSelector"] = selector
    if job.options.spot:
        key = "cloud.google.com/gke-spot"
        pod["tolerations"] = [{"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if job.options.service_account:
        pod["serviceAccountName"] = job.options.service_account
    return pod


def _environment(job: Job) -> list[dict[str, Any]]:
    """How the hosts find each other; on TPUs GKE says it."""
    if job.machine.kind == "tpu" or job.num_hosts == 1:
        return []
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    first = f"{job.name}-{_GROUP}-0-0.{job.name}"  # a JobSet's service gives its pods these names
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(job.num_hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _selector(job: Job) -> dict[str, str]:
    """Labels of the nodes that are wanted."""
    spot = {"cloud.google.com/gke-spot": "true"} if job.options.spot else {}
    if job.machine.tpu is not None and job.machine.shape is not None:
        return {
            "cloud.google.com/gke-tpu-accelerator": job.machine.tpu.gke,
            "cloud.google.com/gke-tpu-topology": job.machine.shape,
            **spot,
        }
    gpu = GPUS.get(job.machine.name.partition(":")[0])
    return {"cloud.google.com/gke-accelerator": gpu[1], **spot} if gpu and gpu[1] else spot
