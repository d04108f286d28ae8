"""Launches other than on TPU VMs: names of machines, local processes, JobSets, Slurm scripts, SkyPilot tasks."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from pathlib import Path

import pytest
import yaml
from helpers import MODEL

from maxlm.cli import main
from maxlm.config_file import ConfigError, parse_config, to_yaml
from maxlm.launch import code
from maxlm.launch.job import Job, Options, price_text
from maxlm.machines import machine

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def config(folder, root="gs://some-bucket/runs", **sections):
    tree = {
        "run": {"name": "r", "root": root},
        "model": {**MODEL, "vocab_size": 257},
        "mesh": {"data": -1, "fsdp": 1},
        "data": {"stores": [{"path": f"{folder}/store", "text": [__file__], "heldout": 0.0}]},
        "train": {"steps": 8, "batch_size": 64, "seq_len": 32, "compilation_cache": None},
        "optim": {"learning_rate": 1e-2},
        "eval": {"sample_tokens": 0},
        "checkpoint": {"every": 5},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(to_yaml(parse_config(tree)))
    return str(path)


def rendered(folder, capsys, *arguments, **sections):
    """What a dry run prints, without its comments and the price."""
    assert main(["launch", config(folder, **sections), *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    return re.sub(r"^(#(?!!|SBATCH) |.*price unknown|.* USD per hour).*\n", "", out, flags=re.MULTILINE)


# ---- machines


@pytest.mark.parametrize(
    ("name", "cloud_name", "chips", "hosts", "devices", "shape"),
    [
        ("v4-8", "v4-8", 4, 1, 4, "2x2x1"),
        ("v4-32", "v4-32", 16, 4, 16, "2x2x4"),
        ("v5p-8", "v5p-8", 4, 1, 4, "2x2x1"),
        ("v5p-128", "v5p-128", 64, 16, 64, "4x4x4"),
        ("v5p:4x4x4", "v5p-128", 64, 16, 64, "4x4x4"),
        ("v5p-12288", "v5p-12288", 6144, 1536, 6144, "16x16x24"),
        ("v5litepod-1", "v5litepod-1", 1, 1, 1, "1x1"),
        ("v5litepod-4", "v5litepod-4", 4, 1, 4, "2x2"),
        ("v5e-8", "v5litepod-8", 8, 1, 8, "2x4"),
        ("v5e-16", "v5litepod-16", 16, 4, 16, "4x4"),
        ("v5e:4x8", "v5litepod-32", 32, 8, 32, "4x8"),
        ("V6E-8", "v6e-8", 8, 1, 8, "2x4"),
        ("v6e-256", "v6e-256", 256, 64, 256, "16x16"),
        ("tpu7x-16", "tpu7x-16", 8, 2, 16, "2x2x2"),
        ("h100:4", "h100:4", 4, 1, 4, None),
        ("h100-16", "h100:16", 16, 2, 16, None),
        ("cpu:3", "cpu:3", 3, 3, 3, None),
    ],
)
def test_machines_are_known_by_the_names_that_people_use(name, cloud_name, chips, hosts, devices, shape):
    found = machine(name)
    assert (found.name, found.num_chips, found.num_hosts, found.num_devices, found.shape) == (
        *(cloud_name, chips, hosts, devices),
        shape,
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5p-100", "v5p-128"),
        ("v5e-12", "v5e-16"),
        ("v6e:4x5", "v6e-16"),
        ("v5-128", "v5p-128"),
        ("h100:12", "h100:1"),
        ("h1000:8", "h100:8"),
        ("cpu:0", ""),
        ("", ""),
        ("v5p-99999999999999999999999", "v5p-12288"),
    ],
)
def test_unknown_machines_are_answered_with_the_nearest(name, near):
    with pytest.raises(ConfigError, match="there is no such machine; the nearest names are") as caught:
        machine(name)
    assert near in str(caught.value)


@pytest.mark.parametrize(
    ("on", "options", "text"),
    [
        ("v5p-128", {}, "64 chips: 268.80 USD per hour, 6,451 USD per day (on-demand, "),
        ("v5p-128", {"price": 1.5}, "64 chips: 96.00 USD per hour, 2,304 USD per day (--price)"),
        ("v5p-128", {"spot": True}, "64 chips: spot price unknown (say it with --price USD_PER_CHIP_HOUR)"),
        ("cpu:2", {}, "2 hosts: on-demand price unknown"),
    ],
)
def test_a_price_has_its_source_and_an_unknown_one_is_unknown(on, options, text):
    job = Job("a", "slurm", on, "run.yaml", (), "gs://bucket/a", 1, Options(**options))
    assert text in price_text(job)


# ---- local processes


@pytest.mark.long
def test_local_processes_train_one_run_and_resume_when_one_is_killed(tmp_path):
    mesh = {"data": 2, "fsdp": 2, "fake_devices": 4}
    path = config(tmp_path, str(tmp_path / "runs"), mesh=mesh, checkpoint={"every": 40})
    command = [sys.executable, "-m", "maxlm", "launch", path, "train.steps=100", "--on", "cpu:2", "--via", "local"]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: list((tmp_path / "runs" / "r" / "checkpoints").glob("*/MANIFEST.json")), launcher)
    trainers = [pid for pid in descendants(launcher.pid) if b"supervise" not in cmdline(pid)]
    os.kill(trainers[-1], signal.SIGKILL)
    out = launcher.communicate(timeout=500)[0]
    assert launcher.returncode == 0, out
    assert "[0] supervise:" in out and "[1] supervise:" in out and "starting again" in out
    assert "continued after step 40" in out or "continued after step 80" in out
    summary = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("complete", 100)


def test_local_processes_have_no_accelerators(tmp_path, capsys):
    assert main(["launch", config(tmp_path), "--on", "v5e-8", "--via", "local"]) == 2
    assert "use cpu:2" in capsys.readouterr().err


# ---- Kubernetes

# Fields of a JobSet (kubernetes-sigs/jobset, api/jobset/v1alpha2) that are used here; its Jobs are Kubernetes' own.
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "namespace?": str, "labels": dict, "annotations?": dict},
    "spec": {
        "suspend?": bool,
        "failurePolicy": {"maxRestarts": int, "rules": [{"name": str, "action": str, "onJobFailureReasons": list}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": dict}}],
    },
}


def conform(tree, schema, path="JobSet"):
    if isinstance(schema, dict):
        names = {name.rstrip("?"): name for name in schema}
        assert set(tree) <= set(names), f"{path}: {set(tree) - set(names)}"
        assert {n for n in schema if not n.endswith("?")} <= set(tree), path
        for name, value in tree.items():
            conform(value, schema[names[name]], f"{path}.{name}")
    elif isinstance(schema, list):
        for item in tree:
            conform(item, schema[0], path)
    else:
        assert tree == schema if isinstance(schema, str) else isinstance(tree, schema), path


def jobset(folder, capsys, *arguments):
    text = rendered(folder, capsys, *arguments, "--via", "gke", "--image", "i/maxlm:1")
    files, found = yaml.safe_load_all(text)
    conform(found, JOBSET)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    return files, found, job, job["template"]["spec"]


def test_a_jobset_asks_for_whole_slices(tmp_path, capsys):
    files, found, job, pod = jobset(
        tmp_path, capsys, "mesh.slices=2", "--on", "v5e-16", "--queue", "team", "--secret", "keys"
    )
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert "env" not in container, "GKE tells TPUs where the others are"
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team" and found["spec"]["suspend"]
    assert yaml.safe_load(files["data"]["config.yaml"])["run"]["name"] == "r"
    assert (
        "maxlm supervise --stopped-code 143 -- train /etc/maxlm/config.yaml mesh.slices=2 &" in container["command"][2]
    )


def test_hosts_with_gpus_are_told_where_the_first_one_is(tmp_path, capsys):
    _, _, job, pod = jobset(tmp_path, capsys, "--on", "h100:16", "--spot", "--name", "a")
    (container,) = pod["containers"]
    assert job["parallelism"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    env = {row["name"]: row.get("value") for row in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == "a-workers-0-0.a:8476" and env["JAX_NUM_PROCESSES"] == "2"
    assert "job-completion-index" in container["env"][2]["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "arguments",
    [["--on", "v5p-128", "--queue", "q", "--secret", "s", "--namespace", "n"], ["--on", "h100:16", "--spot"]],
)
def test_kubernetes_own_schemas_take_the_jobs(arguments, tmp_path, capsys):
    validate = pytest.importorskip("kubernetes_validate")
    files, _, job, _ = jobset(tmp_path, capsys, *arguments)
    validate.validate(files, "1.34", strict=True)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "r"}, "spec": job}
    validate.validate(job, "1.34", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**job, "spec": {**job["spec"], "paralelism": 2}}, "1.34", strict=True)


def test_kubectl_gets_the_manifests_and_deletes_them(tmp_path, capsys, monkeypatch):
    stand_in(tmp_path, monkeypatch, "kubectl", 'cat > "$0.in"')
    arguments = ["--on", "v5e-8", "--via", "gke", "--image", "i", "--namespace", "n", "--yes"]
    assert main(["launch", config(tmp_path), *arguments]) == 0
    capsys.readouterr()
    got = list(yaml.safe_load_all((tmp_path / "bin" / "kubectl.in").read_text()))
    assert [document["kind"] for document in got] == ["ConfigMap", "JobSet"]
    assert all(document["metadata"]["namespace"] == "n" for document in got)
    assert main(["launch", "stop", "r"]) == 0
    assert calls(tmp_path, "kubectl") == [
        "create -f -",
        "delete jobset,configmap r --ignore-not-found --namespace n",
    ]


def test_what_kubectl_refuses_leaves_nothing(tmp_path, capsys, monkeypatch):
    refusal = """error: resource mapping not found for name: "r": no matches for kind "JobSet" in version"""
    stand_in(tmp_path, monkeypatch, "kubectl", f"[ $1 = delete ] || {{ echo '{refusal}' >&2; exit 1; }}")
    arguments = ["launch", config(tmp_path), "--on", "v5e-8", "--via", "gke", "--image", "i", "--yes"]
    for _ in range(2):
        assert main(arguments) == 1
        assert 'no matches for kind "JobSet"' in capsys.readouterr().err
    assert calls(tmp_path, "kubectl") == ["create -f -", "delete configmap r --ignore-not-found"] * 2


def test_kubernetes_needs_an_image(tmp_path, capsys):
    assert main(["launch", config(tmp_path), "--on", "v5e-8", "--via", "gke", "--yes"]) == 2
    assert "--via gke needs --image" in capsys.readouterr().err


# ---- the wrapper of a run


@pytest.mark.parametrize(
    ("command", "signalled", "code_is"),
    [
        ("true", False, 0),
        ("(exit 3)", False, 3),
        ("bash -c 'trap \"exit 0\" TERM; while :; do sleep 0.05; done'", True, 143),
        ("bash -c 'trap \"exit 1\" TERM; while :; do sleep 0.05; done'", True, 1),
    ],
)
def test_a_run_that_was_told_to_end_is_not_taken_for_complete(command, signalled, code_is):
    from maxlm.launch.job import until_done

    script = "\n".join([*until_done(command), 'exit "$code"'])
    process = subprocess.Popen(["bash", "-c", script])
    if signalled:
        time.sleep(1)
        process.terminate()
    assert process.wait(30) == code_is


@pytest.mark.long
@pytest.mark.parametrize("moment", ["compiling", "training"])
def test_a_host_that_stops_with_another_one_is_not_taken_for_complete_either(moment, tmp_path):
    path = config(tmp_path, str(tmp_path / "runs"))
    command = [sys.executable, "-m", "maxlm", "supervise", "--stopped-code", "143", "--", "train", path]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    starts = [{"cwd": ROOT, "env": {**env, "JAX_PROCESS_ID": str(i)}, "start_new_session": True} for i in range(2)]
    hosts = [subprocess.Popen([*command, "train.steps=9000"], **start) for start in starts]
    run = tmp_path / "runs" / "r"
    try:
        if moment == "training":
            until(lambda: list((run / "checkpoints").glob("*/MANIFEST.json")), hosts[0])
        else:
            until(lambda: (run / "train.log").exists() and "compiling" in (run / "train.log").read_text(), hosts[0])
            time.sleep(2)  # the other host, which writes no log, compiles as well
        hosts[1].terminate()
        assert [host.wait(120) for host in hosts] == [143, 143]
    finally:
        for host in hosts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- Slurm


def test_slurm_scripts_are_shell_and_say_what_they_need(tmp_path, capsys):
    arguments = ["--on", "h100:16", "--via", "slurm", "--partition", "gpu", "--time", "1-00:00:00"]
    script = rendered(tmp_path, capsys, "eval.sample_prompt=it's $HOME", *arguments)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --signal=B:USR1@300\n" in script and "scontrol requeue" in script


SRUN = """
code=0; pids=
forward() { for pid in $pids; do kill -TERM $pid; done; }
trap forward TERM
for i in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_PROCID=$i "${@:2}" & pids="$pids $!"; done
for pid in $pids; do
  wait $pid; it=$?
  while kill -0 $pid 2>/dev/null; do wait $pid; it=$?; done
  [ $it -gt $code ] && code=$it
done
exit $code
"""


@pytest.mark.long
def test_a_slurm_job_saves_when_its_time_is_up_and_goes_on_in_the_next(tmp_path, capsys, monkeypatch):
    """Two nodes are two processes here; srun and scontrol are stand-ins, all else is real."""
    stand_in(tmp_path, monkeypatch, "srun", SRUN)
    stand_in(tmp_path, monkeypatch, "scontrol", '[ "$1" = show ] && echo 127.0.0.1')
    stand_in(tmp_path, monkeypatch, "sbatch", "echo 42")
    path = config(tmp_path, str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["train.steps=2000", "--on", "cpu:2", "--via", "slurm", "--yes"]
    assert main(["launch", path, *arguments]) == 0
    capsys.readouterr()
    script = tmp_path / "state" / "maxlm" / "launch" / "r" / "job.sh"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    job = subprocess.Popen(["bash", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: list((tmp_path / "runs" / "r" / "checkpoints").glob("*/MANIFEST.json")), job)
    job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 143, out
    assert f"requeue {os.getpid()}" in calls(tmp_path, "scontrol")
    step = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())["step"]
    assert 5 <= step < 2000
    text = script.read_text().replace("train.steps=2000", f"train.steps={step + 3}")
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("complete", step + 3)


def test_a_slurm_job_that_is_stopped_is_not_queued_again(tmp_path, capsys, monkeypatch):
    for tool, text in {"sbatch": "echo '42;cluster'", "scontrol": "", "scancel": "", "squeue": "echo RUNNING"}.items():
        stand_in(tmp_path, monkeypatch, tool, text)
    path = config(tmp_path, str(tmp_path / "runs"))
    assert main(["launch", path, "--on", "h100:8", "--via", "slurm", "--yes"]) == 0
    assert main(["launch", "status", "r"]) == 0
    assert "job 42 RUNNING" in capsys.readouterr().out
    assert main(["launch", "stop", "r"]) == 0
    assert calls(tmp_path, "scontrol") == ["update JobId=42 Requeue=0"] and calls(tmp_path, "scancel") == ["42"]


def test_a_slurm_job_that_has_ended_is_forgotten(tmp_path, monkeypatch, capsys):
    for tool in ("scontrol", "scancel", "squeue"):
        stand_in(tmp_path, monkeypatch, tool, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stand_in(tmp_path, monkeypatch, "sbatch", "echo 42")
    path = config(tmp_path, str(tmp_path / "runs"))
    assert main(["launch", path, "--on", "h100:8", "--via", "slurm", "--yes"]) == 0
    assert main(["launch", "stop", "r"]) == 0
    stand_in(tmp_path, monkeypatch, "squeue", "echo RUNNING")
    assert main(["launch", path, "--on", "h100:8", "--via", "slurm", "--yes"]) == 0
    assert main(["launch", "stop", "r"]) == 1, "it runs and cannot be cancelled"
    assert "Invalid job id" in capsys.readouterr().err


# ---- SkyPilot


def test_a_sky_task_says_where_the_first_node_is(tmp_path, capsys):
    task = yaml.safe_load(rendered(tmp_path, capsys, "--on", "h100:16", "--via", "skypilot", "--spot"))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"]
    assert 'JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"' in task["run"] and "SKYPILOT_NODE_IPS" in task["run"]
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True, check=False).returncode == 0
    task = yaml.safe_load(rendered(tmp_path, capsys, "--on", "v5p-32", "--via", "skypilot"))
    assert task["num_nodes"] == 1 and task["resources"]["accelerators"] == "tpu-v5p-32"
    assert "JAX_" not in task["run"], "TPUs know where the others are"


@pytest.mark.oracle
@pytest.mark.parametrize("on", ["h100:16", "v5p-32", "v6e-8", "cpu:2"])
def test_sky_takes_the_task(on, tmp_path, capsys):
    sky = pytest.importorskip("sky")
    text = rendered(tmp_path, capsys, "--on", on, "--via", "skypilot", "--spot")
    tree = yaml.safe_load(text)
    (archive,) = tree["file_mounts"].values()
    Path(archive).parent.mkdir(parents=True)
    Path(archive).touch()
    assert sky.Task.from_yaml_config(tree).num_nodes == tree["num_nodes"]


# ---- the code that goes along


def test_a_working_copy_goes_as_it_is_on_disk(tmp_path):
    code.pack(str(tmp_path / "a.tar.gz"), config(tmp_path), {"run.sh": "true\n"})
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        names = set(archive.getnames())
        script, text = archive.getmember("run.sh"), archive.extractfile("config.yaml").read().decode()
    assert {"code/pyproject.toml", "code/maxlm/cli.py", "code/README.md", "config.yaml"} <= names
    assert not any("__pycache__" in name or ".git/" in name or "tests" in name for name in names)
    assert script.mode & stat.S_IXUSR and yaml.safe_load(text)["run"]["name"] == "r"


@pytest.mark.slow
def test_what_goes_along_can_be_installed(tmp_path):
    """A working copy goes, is installed there, and goes on from there as a wheel, which is installed again."""
    program = "import sys; from maxlm.launch import code; code.pack(sys.argv[1], sys.argv[2], {}); print(code.__file__)"
    path, python, told = config(tmp_path), sys.executable, []
    for place, cwd in {"a": ROOT, "b": tmp_path, "c": tmp_path}.items():
        command = [python, "-c", program, str(tmp_path / f"{place}.tar.gz"), path]
        env = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        with tarfile.open(tmp_path / f"{place}.tar.gz") as archive:
            archive.extractall(tmp_path / place, filter="data")
        python = installed(tmp_path / place / "code", tmp_path / f"venv-{place}")
    assert (tmp_path / "a" / "code" / "pyproject.toml").exists()
    assert [path.suffix for path in (tmp_path / "b" / "code").iterdir()] == [".whl"]
    assert "venv-a" in told[1] and "venv-b" in told[2]


def installed(source, environment):
    """A Python with this one's packages and the maxlm of a folder."""
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    if (source / "pyproject.toml").exists():
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source)]
        subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


# ---- helpers


def stand_in(folder, monkeypatch, name, script):
    """A program on PATH that records its arguments and then does what the script says."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/bash\necho "$*" >> "$0.calls"\n{script}\n')
    path.chmod(0o755)
    if str(path.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def calls(folder, name):
    return (folder / "bin" / f"{name}.calls").read_text().splitlines()


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def until(there, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
