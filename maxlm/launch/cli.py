"""`maxlm launch`: renders what it will run, says what it costs, asks, and starts it."""

import argparse
import dataclasses
import subprocess
import sys
from typing import Any

from maxlm.config_file import ConfigError
from maxlm.launch import gke, local, record, remote, skypilot, slurm, tools, tpu
from maxlm.launch.gcloud import Cloud
from maxlm.launch.job import TARGETS, Job, LaunchError, Options, make_job, price_text
from maxlm.plan.prices import MAX_USD

TOOLS = {"gke": "kubectl", "slurm": "sbatch", "skypilot": "sky"}
VERBS = ("status", "logs", "stop")
DESCRIPTION = """Trains the run that CONFIG describes on other machines, under `maxlm supervise`. Prints what it will
run and what the machine costs, and asks before anything is started. --via tpu-vm and queued-resource watch the run,
create the TPU anew when it is preempted, and delete it at the end; Ctrl-C only stops watching. The run's folder has to
be in a bucket: that is what a new machine continues from; so have token stores."""
EPILOG = """examples:
  maxlm launch CONFIG run.root=gs://b/runs --on v5p-128 --via queued-resource --spot --zone us-east5-a
  maxlm launch CONFIG run.root=gs://b/runs --on v6e:4x4 --via gke --image REGION-docker.pkg.dev/p/r/maxlm
  maxlm launch configs/1b.yaml --on h100:16 --via slurm --partition gpu --time 1-00:00:00
  maxlm launch configs/quickstart.yaml --on cpu:2 --via local
  maxlm launch status NAME          how it is, and whether it is billing
  maxlm launch logs NAME --follow   watch it again
  maxlm launch stop NAME            save, end and delete it
"""


def add_parser(subparsers: Any) -> None:
    """Adds `launch`; sets `run`."""
    parser = subparsers.add_parser(
        "launch",
        help="train on TPU VMs, GKE, Slurm, SkyPilot or several local processes; status, logs, stop",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file; or status, logs or stop, followed by the NAME of a launch")
    add("overrides", metavar="section.field=value", nargs="*", help="settings that replace the file's")
    add("--on", metavar="MACHINE", help="v5p-128, v5litepod-16, v6e-16, v5p:4x4x4; h100:16 (GPUs); cpu:2 (hosts)")
    add("--via", choices=TARGETS, help="how to get it")
    add("--name", help="of the launch (the run's)")
    add("--dry-run", action="store_true", help="only print what would be run")
    add("--yes", action="store_true", help="do not ask")
    add("--price", type=float, metavar="USD", help="what a chip costs per hour, where you know better")
    add("--spot", action="store_true", help="capacity that costs less and may be taken away")
    add("--env-file", metavar="FILE", help="lines NAME=VALUE for the run, such as API keys; only its owner can read it")
    add("--service-account", metavar="NAME", help="that the run's machines have")
    add("--follow", action="store_true", help="logs: go on watching, and create lost TPUs anew")
    add("--now", action="store_true", help="stop: delete it without waiting for a save")
    clouds = parser.add_argument_group("tpu-vm, queued-resource")
    add = clouds.add_argument
    add("--zone", metavar="ZONE,...", default="", help="where to ask for it, in this order (gcloud's)")
    add("--project", help="Google Cloud project (gcloud's)")
    add("--reserved", action="store_true", help="from a reservation")
    add("--network", help="VPC network")
    add("--subnetwork", help="VPC subnetwork")
    add("--internal-ip", action="store_true", help="without external addresses")
    add("--runtime-version", metavar="IMAGE", help="of the TPU VM (that of its generation)")
    add("--keep", action="store_true", help="do not delete the TPU at the end: it goes on billing")
    add("--detach", action="store_true", help="do not watch: nobody creates a lost TPU anew, or deletes it at the end")
    add("--poll", type=float, default=15, metavar="S", help="seconds between looks at it (15)")
    add("--wait", type=float, default=24, metavar="H", help="hours to wait for capacity (24)")
    kubernetes = parser.add_argument_group("gke, skypilot")
    add = kubernetes.add_argument
    add("--image", help="container image with maxlm in it (see Dockerfile)")
    add("--namespace", help="of Kubernetes")
    add("--queue", help="Kueue's LocalQueue")
    add("--secret", help="Kubernetes Secret whose entries are the run's environment")
    cluster = parser.add_argument_group("slurm")
    add = cluster.add_argument
    add("--partition", help="of the cluster")
    add("--account", help="to charge")
    add("--time", help="limit, such as 1-00:00:00; the run saves before and goes on in a new job")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.config in VERBS:
        if len(args.overrides) != 1:
            raise ConfigError(f"{args.config} what? write: maxlm launch {args.config} NAME")
        job, facts = record.read(args.overrides[0])
        return {"status": _status, "logs": _logs, "stop": _stop}[args.config](job, facts, args)
    if args.on is None or args.via is None:
        raise ConfigError(f"--on MACHINE and --via {'|'.join(TARGETS)} say where; such as --on v5p-128 --via tpu-vm")
    job = make_job(args.config, args.overrides, args.on, args.via, args.name, _options(args))
    if not args.dry_run and job.via != "local" and (record.folder(job.name) / "job.json").exists():
        raise ConfigError(
            f"{job.name} has been launched already; look at it with maxlm launch status {job.name}, end it with "
            f"maxlm launch stop {job.name}, or give this one another --name"
        )
    places = tpu.clouds(job, args.dry_run) if job.via in ("tpu-vm", "queued-resource") else []
    print(_rendered(job, places))
    if job.via != "local":
        print(price_text(job))
    if args.dry_run:
        return 0
    if job.via in TOOLS:
        tools.need(TOOLS[job.via], job.via)
    if job.via != "local" and not args.yes and not _agreed():
        _say("nothing was started")
        return 1
    return _launch(job, places, args.detach)


def _options(args: argparse.Namespace) -> Options:
    names = {field.name for field in dataclasses.fields(Options)}
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    if args.poll <= 0 or args.wait < 0:
        raise ConfigError("--poll and --wait are times, and not negative")
    if args.price is not None and not 0 <= args.price <= MAX_USD:
        raise ConfigError(f"--price={args.price} is to be USD per chip-hour, from 0 to {MAX_USD:,.0f}")
    zones = tuple(zone for zone in args.zone.split(",") if zone)
    given |= {"zones": zones, "poll_s": args.poll, "wait_s": args.wait * 3600}
    return Options(**given)


def _rendered(job: Job, places: list[Cloud]) -> str:
    """All that will be run, for people."""
    if job.via == "local":
        return local.render(job)
    if places:
        files = [f"# ---- {name}\n{text}" for name, text in remote.scripts(job).items()]
        steps = [f"# {what}\n{tools.shown(command)}" for what, command in tpu.plan(job, places)]
        return "\n".join([*files, "# ---- commands", *steps])
    target = {"gke": gke, "slurm": slurm, "skypilot": skypilot}[job.via]
    return "\n".join([target.render(job), *(f"# {tools.shown(command)}" for command in target.commands(job))])


def _launch(job: Job, places: list[Cloud], detach: bool) -> int:
    if job.via == "local":
        return local.launch(job)
    if places:
        return _watched(job, lambda: tpu.launch(job, places, _say, detach))
    if job.via == "slurm":
        record.write(job, number=slurm.launch(job))
    else:
        record.write(job)  # so that stop finds it, whatever happens
        try:
            {"gke": gke, "skypilot": skypilot}[job.via].launch(job)
        except LaunchError:
            if job.via == "gke":  # nothing is left
                record.forget(job.name)
            raise
    _say(f"{job.name} is started; maxlm launch logs {job.name} shows what it prints, stop {job.name} ends it")
    return 0


def _watched(job: Job, follow: Any) -> int:
    """Follows a run; Ctrl-C leaves it alone and says what that costs."""
    try:
        return follow()
    except LaunchError as error:
        if not (record.folder(job.name) / "job.json").exists():
            raise
        raise LaunchError(f"{error}; if it is there it is billing: maxlm launch stop {job.name}") from None
    except KeyboardInterrupt:
        _say(
            f"\nno longer watching; {price_text(job)}, and it goes on billing, also when the run has ended.\n"
            f"  watch again:  maxlm launch logs {job.name} --follow\n  stop it:      maxlm launch stop {job.name}"
        )
        return 130


def _status(job: Job, facts: dict[str, Any], args: argparse.Namespace) -> int:
    if "zone" in facts:
        print(tpu.status(job, _cloud(job, facts)))
    elif job.via == "skypilot":
        return _passed_on(skypilot.status_command())
    else:
        print(slurm.status(job, str(facts.get("number"))) if job.via == "slurm" else gke.status(job))
    print(price_text(job))
    return 0


def _logs(job: Job, facts: dict[str, Any], args: argparse.Namespace) -> int:
    if "zone" not in facts:
        return _passed_on({"gke": gke, "slurm": slurm, "skypilot": skypilot}[job.via].log_command(job, args.follow))
    cloud = _cloud(job, facts)
    if not args.follow:
        tpu.print_log(job, cloud)
        return 0
    others = [dataclasses.replace(cloud, zone=zone) for zone in job.options.zones if zone != cloud.zone]
    return _watched(job, lambda: tpu.follow(job, cloud, [cloud, *others], _say))


def _stop(job: Job, facts: dict[str, Any], args: argparse.Namespace) -> int:
    if "zone" in facts:
        tpu.stop(job, _cloud(job, facts), args.now, _say)
    elif job.via == "slurm":
        slurm.stop(str(facts["number"]))
    else:
        {"gke": gke, "skypilot": skypilot}[job.via].stop(job)
    if "zone" not in facts:
        _say(f"{job.name} is stopped")
    record.forget(job.name)
    return 0


def _cloud(job: Job, facts: dict[str, Any]) -> Cloud:
    return Cloud(job, facts["zone"], facts.get("project"))


def _passed_on(command: list[str]) -> int:
    tools.need(command[0], command[0]) if command[0] in tools.INSTALL else None
    return subprocess.run(command, check=False).returncode


def _agreed() -> bool:
    """Whether the user wants it; nobody there to ask is a no."""
    try:
        return input("start it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
