"""TPU VMs, created directly or as queued resources: created, given the run, watched, created anew, deleted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxlm import units
from maxlm.config_file import ConfigError
from maxlm.launch import code, record, remote, tools
from maxlm.launch.gcloud import COMING, GONE, NO_CAPACITY, NO_QUOTA, THERE, TRIES, Cloud, setting, signed_in
from maxlm.launch.job import ASKED_WRONGLY, STOPPED, Job, LaunchError

HEALTHY_S = 600.0
"""A run that lasted so long was not ended by how it was started: failures are counted from there."""
MAX_FAILURES = 3
"""Failures in a row, other than preemptions and lack of capacity, before giving up."""
MAX_WAIT_S = 600.0
WARNED = 10
"""Looks at a TPU whose run was told to end, before that is taken for somebody's wish."""
STOPPED_ELSEWHERE = "{} was stopped from elsewhere"


@dataclass(frozen=True)
class End:
    """How a watched run ended: its exit code, or None where the TPU was lost."""

    code: int | None
    why: str = ""


def plan(job: Job, clouds: list[Cloud]) -> list[tuple[str, list[str]]]:
    """(what for, command) of all that a launch runs, in this order."""
    cloud, steps = clouds[0], [("create it", clouds[0].create())]
    steps += [(f"or, if {clouds[0].zone} has none", other.create()) for other in clouds[1:]]
    for node in cloud.nodes:
        steps += [*_delivery(job, cloud, node), ("start, on all workers", cloud.ssh(node, remote.start(job)))]
    steps += [("watch", cloud.watch(cloud.nodes[0], remote.watch(job, 0)))]
    return [*steps, ("and at the end" if not job.options.keep else "not by itself (--keep)", cloud.delete())]


def clouds(job: Job, dry: bool) -> list[Cloud]:
    """gcloud for each zone that was named, or for the one that gcloud knows.

    Args:
        job: the job.
        dry: only to show it: nobody has to be signed in.

    Raises:
        ConfigError: gcloud is not here or signed out, or there is no zone or project.
    """
    options = job.options
    if not (dry and options.zones):
        tools.need("gcloud", job.via)
    if not dry:
        signed_in()
    project = options.project or (None if dry else setting("project", "--project"))
    return [Cloud(job, zone, project) for zone in options.zones or (setting("compute/zone", "--zone"),)]


def launch(job: Job, places: list[Cloud], say: Callable[[str], None], detach: bool) -> int:
    """Creates the TPU, starts the run and watches it to its end; creates the TPU anew where it is lost.

    Args:
        job: the job.
        places: where it may run.
        say: tells the user.
        detach: return when the run has been started.

    Returns:
        The run's exit code; STOPPED if it was stopped.
    """
    for cloud in places:
        if cloud.state()[0] != GONE:
            raise ConfigError(f"{job.name} exists already in {cloud.zone}: it is not this launch's; use another --name")
    record.folder(job.name).mkdir(mode=0o700, parents=True, exist_ok=True)
    record.write(job)
    code.pack(str(record.folder(job.name) / "code.tar.gz"), job.config, remote.scripts(job))
    cloud = _create(job, places, say)
    return follow(job, cloud, places, say, started=False, detach=detach)


def follow(
    job: Job, cloud: Cloud, places: list[Cloud], say: Callable[[str], None], started: bool = True, detach: bool = False
) -> int:
    """Watches a run to its end, on new TPUs where they are lost; deletes the TPU then, unless it is to be kept.

    Args:
        job: the job.
        cloud: where its TPU is.
        places: where it may be created anew.
        say: tells the user.
        started: the run goes on there already.
        detach: return when the run has been started.
    """
    failures = 0
    while True:
        began = time.monotonic()
        end = End(None, "it could not be prepared")
        try:
            if not started:
                deliver(job, cloud, say)
            if detach:
                say(f"started; {_billing(job)}")
                return 0
            end = watch(job, cloud, say)
        except LaunchError as error:
            end = End(None, str(error))
        if record.is_stopped(job):
            say(STOPPED_ELSEWHERE.format(job.name))
            return STOPPED
        lost = end.code is None or (end.code != 0 and _is_lost(job, cloud, end.code))
        if not lost:
            return _finish(job, cloud, end, say)
        preempted = cloud.state()[0] in ("PREEMPTED", "SUSPENDED", "SUSPENDING", GONE)
        failures = 0 if preempted or time.monotonic() - began > HEALTHY_S else failures + 1
        if failures > MAX_FAILURES:
            say(f"giving up after {MAX_FAILURES} new TPUs: {end.why}")
            return _finish(job, cloud, End(1, end.why), say)
        say(f"the TPU is lost ({end.why or cloud.state()[0]}); deleting it and asking for a new one")
        remove(cloud)
        cloud, started = _create(job, places, say), False


def deliver(job: Job, cloud: Cloud, say: Callable[[str], None]) -> None:
    """Copies the code, installs it and starts the run on all workers.

    Raises:
        LaunchError: a worker does not answer, or the installation failed.
    """
    say(f"copying the code to {job.num_hosts} worker(s) and installing it")
    for node in cloud.nodes:
        for _, command in _delivery(job, cloud, node):
            _patiently(job, command)
    for node in cloud.nodes:
        tools.call(cloud.ssh(node, remote.start(job)))


def watch(job: Job, cloud: Cloud, say: Callable[[str], None]) -> End:
    """Prints what the first worker prints, until the run has ended or the TPU is lost."""
    seen, silent = 0, 0
    while True:
        lines, code_text = _stream(cloud.watch(cloud.nodes[0], remote.watch(job, seen)))
        seen += lines
        if code_text and code_text.isdecimal():
            return End(int(code_text), f"the run ended with exit code {code_text}")
        state, details = cloud.state()
        silent = silent + 1 if not lines and state in THERE else 0
        if state not in (*THERE, *COMING):
            return End(None, " ".join(filter(None, [state, details])))
        if code_text == "" and state in THERE:  # no exit code and no process: the machine has been restarted
            say("the run is gone from its machine; starting it again")
            tools.call(cloud.ssh(cloud.nodes[0], remote.start(job)))
        if silent > TRIES:
            return End(None, "its first worker does not answer")
        time.sleep(job.options.poll_s)


def status(job: Job, cloud: Cloud) -> str:
    """How it is, as text."""
    state, details = cloud.state()
    if state == GONE:
        return f"{job.name}: there is no such TPU in {cloud.zone}; nothing is billing"
    return f"{job.name}: {state}{f' ({details})' if details else ''} in {cloud.zone}; {_billing(job)}"


def stop(job: Job, cloud: Cloud, now: bool, say: Callable[[str], None]) -> None:
    """Lets the run save and end, then deletes the TPU.

    Args:
        job: the job.
        cloud: where its TPU is.
        now: delete it without waiting for a save.
        say: tells the user.
    """
    record.write(job, stopped=True)  # whoever watches it must not create it anew
    if not now and cloud.state()[0] in THERE:
        say("asking the run to save and end (--now does not wait)")
        for node in cloud.nodes:
            with contextlib.suppress(LaunchError):  # it goes anyway
                tools.call(cloud.ssh(node, remote.end(job)))
    remove(cloud)
    say(f"{job.name} is deleted; nothing of it is billing")


def remove(cloud: Cloud) -> None:
    """Deletes the TPU; there may be none."""
    why = ""
    for attempt in range(TRIES):
        state = cloud.state()[0]
        if state == GONE:
            return
        if attempt:
            time.sleep(cloud.job.options.poll_s)
        if state == "DELETING":
            continue
        try:
            tools.call(cloud.delete())
        except LaunchError as error:
            why = f": {error}"
    if cloud.state()[0] != GONE:
        raise LaunchError(
            f"{cloud.job.name} in {cloud.zone} could not be deleted and may be billing{why}; try again with "
            f"{tools.shown(cloud.delete())}"
        )


def print_log(job: Job, cloud: Cloud) -> None:
    """Prints the end of what the first worker has printed."""
    print(tools.call(cloud.ssh(cloud.nodes[0], remote.log(job), "0")), end="")


def _delivery(job: Job, cloud: Cloud, node: str) -> list[tuple[str, list[str]]]:
    """(what for, command) that bring the run to the workers of a slice."""
    archive = str(record.folder(job.name) / "code.tar.gz")
    steps = [
        (f"copy to the {job.machine.num_hosts} worker(s) of {node}", cloud.scp(node, archive, remote.archive(job)))
    ]
    if job.options.env_file:
        steps += [("and the variables", cloud.scp(node, job.options.env_file, remote.variables(job)))]
    return [*steps, ("install", cloud.ssh(node, remote.install(job)))]


def _create(job: Job, places: list[Cloud], say: Callable[[str], None]) -> Cloud:
    """Creates the TPU in the first zone that has it, waiting for one.

    Raises:
        LaunchError: no zone may give it, or none did in time.
    """
    end, wait_s, reasons = time.monotonic() + job.options.wait_s, job.options.poll_s, {}
    places = list(places)
    while places and not record.is_stopped(job):
        for cloud in list(places):
            say(f"asking for {job.machine.name} in {cloud.zone}")
            record.write(job, zone=cloud.zone, project=cloud.project)  # so that stop finds it, whatever happens
            try:
                tools.call(cloud.create())
                _wait_for(job, cloud, say)
                if not record.is_stopped(job):
                    return cloud
                raise LaunchError("nobody wants it any more")
            except LaunchError as error:
                reasons[cloud.zone] = str(error)
                say(f"{cloud.zone}: {error}")
                remove(cloud)
                if NO_QUOTA.search(str(error)) or not NO_CAPACITY.search(str(error)):
                    places.remove(cloud)  # waiting would not help
        if time.monotonic() > end:
            break
        if places:
            say(f"no capacity; asking again in {units.duration(wait_s)}")
            time.sleep(wait_s)
            wait_s = min(MAX_WAIT_S, 2 * wait_s)
    if record.is_stopped(job):
        raise LaunchError(STOPPED_ELSEWHERE.format(job.name))
    record.forget(job.name)
    raise LaunchError(f"no zone gave {job.machine.name}: " + "; ".join(f"{z}: {r}" for z, r in reasons.items()))


def _wait_for(job: Job, cloud: Cloud, say: Callable[[str], None]) -> None:
    """Waits until the TPU is there.

    Raises:
        LaunchError: it will not be.
    """
    end, before = time.monotonic() + job.options.wait_s, ""
    while True:
        state, details = cloud.state()
        if state in THERE:
            return
        if state not in COMING:
            raise LaunchError(f"{job.name} is {state}{f': {details}' if details else ''}")
        if time.monotonic() > end:
            raise LaunchError(f"{job.name} was still {state} after {units.duration(job.options.wait_s)} (--wait)")
        if state != before:
            say(f"{job.name}: {state}")
            before = state
        time.sleep(job.options.poll_s)


def _is_lost(job: Job, cloud: Cloud, ended: int) -> bool:
    """Whether a run ended since its TPU, or one of its workers, went away."""
    answers = False
    # one that was told to end may have been told by a machine that is about to go, and still answers
    for attempt in range(WARNED if ended == STOPPED else TRIES):
        if attempt:
            time.sleep(job.options.poll_s)
        if record.is_stopped(job):
            return False
        if cloud.state()[0] not in (*THERE, *COMING):
            return True
        try:
            for node in cloud.nodes:
                tools.call(cloud.ssh(node, "true"))
            answers = True
        except LaunchError:
            answers = False
        if answers and ended != STOPPED:
            break
    return not answers


def _finish(job: Job, cloud: Cloud, end: End, say: Callable[[str], None]) -> int:
    say({0: "the run is complete", STOPPED: "the run was stopped"}.get(end.code or 0, end.why))
    if end.code == ASKED_WRONGLY:
        say("its command or config is wrong there; see above")
    if job.options.keep:
        say(_billing(job))
    else:
        remove(cloud)
        record.forget(job.name)
        say("the TPU is deleted; nothing is billing")
    return end.code or 0


def _patiently(job: Job, command: list[str]) -> None:
    """Runs a command that fails while a machine boots."""
    for left in reversed(range(TRIES)):
        try:
            tools.call(command)
            return
        except LaunchError:
            if not left:
                raise
            time.sleep(job.options.poll_s)


def _stream(command: list[str]) -> tuple[int, str | None]:
    """Passes a watching ssh's output on: number of lines, and the exit code that it tells (None: it broke off)."""
    lines, told = 0, None
    # in a session of its own Ctrl-C does not reach gcloud, which would report it
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **quiet) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if line.startswith(remote.EXIT):
                    told = line.removeprefix(remote.EXIT).strip()
                else:
                    lines += 1
                    sys.stdout.write(line)
                    sys.stdout.flush()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
    return lines, told


def _billing(job: Job) -> str:
    return f"it is billing until you run: maxlm launch stop {job.name}"
