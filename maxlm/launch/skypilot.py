"""SkyPilot: a task for `sky jobs`, which finds a cloud that has the machine and starts again after preemptions."""

from pathlib import Path
from typing import Any

from maxlm.launch import code, record, text, tools
from maxlm.launch.job import EXTRAS, STOPPED, Job, until_done
from maxlm.machines import GPUS

PORT = 8476


def task(job: Job) -> dict[str, Any]:
    """The task as SkyPilot's YAML has it."""
    folder, root = f"~/maxlm-{job.name}", code.checkout()
    archive = str(record.folder(job.name) / "code.tar.gz")
    setup = ["set -e", f"cd {folder}", "tar xzf code.tar.gz", *code.setup(EXTRAS[job.machine.kind], root)]
    maxlm = "../venv/bin/maxlm"
    if job.options.image:  # it is in there
        setup, maxlm = setup[:3], "maxlm"
    run = [f"cd {folder}/code", *_coordinates(job), *until_done(job.train(maxlm, "../config.yaml")), 'exit "$code"']
    return {
        "name": job.name,
        "num_nodes": job.machine.num_hosts if job.machine.kind != "tpu" else 1,
        "resources": _resources(job),
        "file_mounts": {f"{folder}/code.tar.gz": archive},
        "setup": "\n".join(setup) + "\n",
        "run": "\n".join(run) + "\n",
    }


def render(job: Job) -> str:
    """The task as YAML."""
    return text.to_yaml(task(job))


def commands(job: Job) -> list[list[str]]:
    """What a launch runs."""
    env = ["--secret-file", job.options.env_file] if job.options.env_file else []
    path = str(record.folder(job.name) / "task.yaml")
    return [["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, *env, path]]


def launch(job: Job) -> None:
    """Submits the task."""
    folder = record.folder(job.name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    code.pack(str(folder / "code.tar.gz"), job.config, {})
    Path(folder / "task.yaml").write_text(render(job))
    tools.call(commands(job)[0])


def status_command() -> list[str]:
    """Prints the queue of managed jobs."""
    return ["sky", "jobs", "queue"]


def log_command(job: Job, follow: bool) -> list[str]:
    """Prints what the job prints."""
    return ["sky", "jobs", "logs", *([] if follow else ["--no-follow"]), "--name", job.name]


def stop(job: Job) -> None:
    """Cancels the job; SkyPilot deletes its machines."""
    tools.call(["sky", "jobs", "cancel", "--yes", "--name", job.name])


def _resources(job: Job) -> dict[str, Any]:
    machine, options = job.machine, job.options
    wanted: dict[str, Any] = {}
    if machine.tpu is not None:
        wanted["accelerators"] = f"tpu-{machine.name}"
        runtime = options.runtime_version or machine.tpu.runtime
        wanted["accelerator_args"] = {"tpu_vm": True, **({"runtime_version": runtime} if runtime else {})}
    elif machine.kind == "gpu":
        wanted["accelerators"] = f"{GPUS[machine.name.partition(':')[0]][2]}:{machine.chips_per_host}"
    if options.zones:
        wanted["zone"] = options.zones[0]
    if options.image:
        wanted["image_id"] = f"docker:{options.image}"
    wanted["use_spot"] = options.spot
    # a preempted machine is replaced by itself; this is for runs that fail, and those that were told to save and end
    wanted["job_recovery"] = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [STOPPED]}
    return wanted


def _coordinates(job: Job) -> list[str]:
    """How the nodes find each other; TPUs know it themselves."""
    if job.machine.kind == "tpu" or job.num_hosts == 1:
        return []
    return [
        'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        f'export JAX_COORDINATOR_ADDRESS="$first:{PORT}"',
        'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
    ]
