"""A stand-in for gcloud that runs TPU VMs as folders of this machine and refuses what the real one would.

The grammar is that of the GA track of Google Cloud CLI 528. STANDIN names a folder:
  cues.json    what is to go wrong, and gcloud's settings; tests write it
  state.json   TPUs by zone and name
  calls.jsonl  command lines
  vms/         homes of the workers: ssh runs commands there, as they are
  maxlm        if there, what is installed instead of maxlm
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STANDIN"])
WIDE = "account billing-project configuration flags-file flatten format impersonate-service-account project verbosity"
WIDE_SWITCHES = "help log-http quiet user-output-enabled"
MAKE = (
    "accelerator-type data-disk description labels metadata metadata-from-file network range scopes service-account "
    "subnetwork tags topology type zone"
)
MAKE_SWITCHES = "async internal-ips reserved shielded-secure-boot spot"
SHELL = "ssh-key-expiration ssh-key-expire-after ssh-key-file strict-host-key-checking worker zone"
SHELL_SWITCHES = "dry-run force-key-file-overwrite internal-ip plain"
LISTED = "filter limit page-size sort-by"
# command: (flags with a value, switches, number of positional arguments at least and at most)
GRAMMAR = {
    "auth list": (f"{LISTED} filter-account", "", 0, 0),
    "config get-value": ("", "", 1, 1),
    "compute tpus tpu-vm create": (f"{MAKE} version queue-count", f"{MAKE_SWITCHES} preemptible", 1, 1),
    "compute tpus tpu-vm delete": ("zone", "async", 1, 1),
    "compute tpus tpu-vm describe": ("zone", "", 1, 1),
    "compute tpus tpu-vm list": (f"{LISTED} zone", "uri", 0, 0),
    "compute tpus tpu-vm ssh": (f"{SHELL} command output-directory ssh-flag", SHELL_SWITCHES, 1, 99),
    "compute tpus tpu-vm scp": (f"{SHELL} scp-flag", f"{SHELL_SWITCHES} compress recurse", 2, 99),
    "compute tpus queued-resources create": (
        f"{MAKE} node-count node-id node-prefix runtime-version valid-after-duration valid-after-time "
        "valid-until-duration valid-until-time reservation-host-folder reservation-host-organization "
        "reservation-host-project",
        f"{MAKE_SWITCHES} guaranteed",
        1,
        1,
    ),
    "compute tpus queued-resources delete": ("zone", "async force", 1, 1),
    "compute tpus queued-resources describe": ("zone", "", 1, 1),
    "compute tpus queued-resources list": (f"{LISTED} zone", "uri", 0, 0),
}
WORKERS = {"v5litepod-1": 1, "v5litepod-8": 1, "v5litepod-16": 4, "v5p-16": 2, "v6e-16": 4}
ERRORS = {
    "capacity": '{"code": 8, "message": "There is no more capacity in the zone \\"ZONE\\"; you can try in another zone '
    'where Cloud TPU Nodes are offered [EID: 0x1]"}',
    "quota": '{"code": 8, "message": "Quota limit \'TPUV5sLitepodPerProjectPerZoneForTPUAPI\' has been exceeded. '
    'Limit: 0 in zone ZONE."}',
    "denied": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p/locations/ZONE'",
}


class Refused(Exception):
    pass


def main() -> int:
    command, flags, positionals = parse(sys.argv[1:])
    with locked():
        append("calls.jsonl", sys.argv[1:])
    try:
        return run(command, flags, positionals)
    except Refused as error:
        print(f"ERROR: (gcloud.{command.replace(' ', '.')}) {error}", file=sys.stderr)
        return 1


def parse(argv):
    """Command, flags and positional arguments; ends with code 2, as gcloud does, on what it does not know."""
    command = next((c for n in (4, 2) if (c := " ".join(argv[:n])) in GRAMMAR), None)
    if command is None:
        usage(f"Invalid choice: {' '.join(argv[:4])!r}.")
    values, switches, least, most = GRAMMAR[command]
    values, switches = {*values.split(), *WIDE.split()}, {*switches.split(), *WIDE_SWITCHES.split()}
    flags, positionals, rest = {}, [], list(argv[len(command.split()) :])
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positionals.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name in values:
            flags.setdefault(name, []).append(value if equals else rest.pop(0) if rest else usage(f"{word}: no value"))
        elif name in switches and not equals:
            flags[name] = ["true"]
        else:
            usage(f"unrecognized arguments: {word}")
    if not least <= len(positionals) <= most:
        usage(f"argument positions: {positionals}")
    if command.endswith("create"):
        check_create(command, flags)
    return command, {name: value[-1] for name, value in flags.items()}, positionals


def check_create(command, flags):
    queued = "queued" in command
    version = "runtime-version" if queued else "version"
    if version not in flags:
        usage(f"argument --{version}: Must be specified.")
    if ("accelerator-type" in flags) == ("topology" in flags):
        usage("Exactly one of (--accelerator-type | --topology --type) must be specified.")
    if queued and ("node-id" in flags) == ("node-count" in flags or "node-prefix" in flags):
        usage("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.")


def usage(text):
    print(f"ERROR: (gcloud) {text}\n\nTo search the help text of gcloud commands, run:\n  gcloud help", file=sys.stderr)
    sys.exit(2)


def run(command, flags, positionals):
    cues = read("cues.json")
    if command == "auth list":
        print("\n".join(cues.get("accounts", ["someone@example.com"])))
        return 0
    if command == "config get-value":
        value = cues.get("settings", {}).get(positionals[0])
        print(value or "(unset)", file=sys.stdout if value else sys.stderr)
        return 0
    zone = flags.get("zone") or cues.get("settings", {}).get("compute/zone")
    if not zone:
        raise Refused("The required property [zone] is not currently set.")
    *_, group, verb = command.split()
    if verb == "create":
        return create(positionals[0], zone, flags, queued=group == "queued-resources")
    if verb == "scp":
        *paths, target = positionals
        node, _, name = target.partition(":")
        for home in homes(node.rpartition("@")[2], zone, flags):
            for path in paths:
                shutil.copy(path, home / name)
        return 0
    if verb == "ssh":
        return ssh(homes(positionals[0].rpartition("@")[2], zone, flags), flags["command"])
    return look(group, verb, positionals[0], zone)


def create(name, zone, flags, queued):
    with locked():
        cues, state = read("cues.json"), read("state.json")
        if f"{zone}/{name}" in state:
            raise Refused(f"ALREADY_EXISTS: {name} already exists")
        outcome = (cues.get("create", {}).get(zone) or ["ok"]).pop(0)
        write("cues.json", cues)
        if outcome in ERRORS and not (queued and outcome == "capacity"):
            raise Refused(ERRORS[outcome].replace("ZONE", zone))
        number = state.setdefault("created", 0) + 1
        state["created"] = number
        if "node-count" in flags:
            nodes = [f"{flags['node-prefix']}-{i}" for i in range(int(flags["node-count"]))]
        else:
            nodes = [flags.get("node-id", name)]
        state[f"{zone}/{name}"] = {
            "number": number,
            "queued": queued,
            "nodes": nodes,
            "workers": WORKERS[flags["accelerator-type"]],
            # a queued resource waits first, for as many looks as it is told
            "states": ["WAITING_FOR_RESOURCES"] * 2 + ["PROVISIONING", "ACTIVE"] if queued else ["READY"],
        }
        if queued and outcome == "capacity":
            state[f"{zone}/{name}"]["states"] = ["WAITING_FOR_RESOURCES", "FAILED"]
        write("state.json", state)
    return 0


def look(group, verb, name, zone):
    with locked():
        cues, state = read("cues.json"), read("state.json")
        if verb == "describe" and cues.get("silent", 0) > 0:
            write("cues.json", {**cues, "silent": cues["silent"] - 1})
            raise Refused("UNAVAILABLE: the service is currently unavailable")
        tpu = state.get(f"{zone}/{name}")
        if tpu is None or tpu["queued"] != (group == "queued-resources"):
            raise Refused(f"NOT_FOUND: Resource 'projects/p/locations/{zone}/nodes/{name}' was not found")
        if verb == "delete":
            if cues.get("undeletable"):
                raise Refused("INTERNAL: try again")
            kill(tpu)
            del state[f"{zone}/{name}"]
        now = tpu["states"].pop(0) if len(tpu["states"]) > 1 else tpu["states"][0]
        write("state.json", state)
    if verb == "describe":
        failed = {"failedData": {"error": {"code": 8, "message": json.loads(ERRORS["capacity"])["message"]}}}
        queued = {"state": now, **(failed if now == "FAILED" else {})}
        health = {"health": "HEALTHY"} if now == "READY" else {}
        print(json.dumps({"name": name, "state": queued if tpu["queued"] else now, **health}))
    return 0


def homes(node, zone, flags):
    """Homes of the workers that a command is for."""
    cues, state = read("cues.json"), read("state.json")
    tpu = next((t for k, t in state.items() if k.startswith(f"{zone}/") and node in t["nodes"]), None)
    if tpu is None or tpu["states"][-1] not in ("READY", "ACTIVE"):
        raise Refused(f"Node {node} is not READY; could not connect")
    worker = flags.get("worker", "0")
    wanted = range(tpu["workers"]) if worker == "all" else [int(worker)]
    dead = cues.get("dead", {}).get(str(tpu["number"]))
    if dead in wanted:
        raise Refused(f"Could not SSH into worker {dead}: Connection timed out")
    paths = [ROOT / "vms" / f"{tpu['number']}-{node}-{i}" for i in wanted]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    return paths


def ssh(paths, command):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    codes = []
    for home in paths:
        here = {**env, "HOME": str(home), "PATH": f"{Path(__file__).parent / 'vm'}:{env['PATH']}"}
        codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=here, check=False).returncode)
    return next((code for code in codes if code), 0)


def kill(tpu):
    """Ends all that runs on a TPU's workers, as a machine does that goes away."""
    for file in (ROOT / "vms").glob(f"{tpu['number']}-*/maxlm-*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def preempt():
    """What a test calls: all TPUs are taken away."""
    with locked():
        state = read("state.json")
        for tpu in (tpu for tpu in state.values() if isinstance(tpu, dict)):
            tpu["states"] = ["SUSPENDED" if tpu["queued"] else "PREEMPTED"]
            kill(tpu)
        write("state.json", state)


@contextlib.contextmanager
def locked():
    with open(ROOT / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(name):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else {}


def write(name, tree):
    (ROOT / f"{name}.new").write_text(json.dumps(tree, indent=1))
    os.replace(ROOT / f"{name}.new", ROOT / name)


def append(name, row):
    with open(ROOT / name, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
