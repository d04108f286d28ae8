"""Launches on TPU VMs: whole, against a stand-in for gcloud that refuses what the real one does."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gcs import gcs_bucket
from helpers import MODEL

from maxlm import storage
from maxlm.cli import main
from maxlm.config_file import parse_config, to_yaml

HERE = Path(__file__).parent
STANDINS = HERE / "standins"
FAKE = """#!/bin/bash
# what a test installs instead of maxlm: says what it was asked, then behaves as cue says
echo "asked: $*"; echo "key: ${SOME_KEY:-none}"
trap 'echo saved; exit 0' TERM
cue=$(cat "$STANDIN/cue" 2>/dev/null)
if [ "$cue" = long ]; then for i in $(seq 600); do echo "step $i"; sleep 0.1; done; fi
echo "the end"; exit "${cue:-0}"
"""


class Cloud:
    """The stand-in, from a test's side."""

    def __init__(self, folder: Path):
        self.folder = folder

    def cue(self, **cues):
        (self.folder / "cues.json").write_text(json.dumps(cues))

    def run_is(self, cue):
        (self.folder / "cue").write_text(cue)

    def calls(self, *words):
        rows = map(json.loads, (self.folder / "calls.jsonl").read_text().splitlines())
        return [row for row in rows if set(words) <= set(row)]

    def tpus(self):
        path = self.folder / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        return sorted(key for key in state if "/" in key)

    def preempt(self):
        command = [sys.executable, "-c", "import gcloud; gcloud.preempt()"]
        subprocess.run(command, cwd=STANDINS, check=True)

    def homes(self):
        return sorted((self.folder / "vms").glob("*"))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """gcloud on PATH is the stand-in, and what it installs is a script."""
    folder, binaries = tmp_path / "cloud", tmp_path / "bin"
    folder.mkdir()
    binaries.mkdir()
    (binaries / "gcloud").write_text(f'#!/bin/bash\nexec "{sys.executable}" "{STANDINS}/gcloud.py" "$@"\n')
    (binaries / "gcloud").chmod(0o755)
    (folder / "maxlm").write_text(FAKE)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(folder))
    monkeypatch.setenv("STANDIN_PYTHON", sys.executable)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = Cloud(folder)
    found.cue(settings={"project": "p", "compute/zone": "z1"})
    yield found
    found.preempt()  # ends what still runs


def config(folder, root="gs://some-bucket/runs", **train):
    tree = {
        "run": {"name": "My_Run", "root": root},
        "model": {**MODEL, "vocab_size": 257},
        "mesh": {"data": -1, "fsdp": 1},
        "data": {"stores": [{"path": f"{folder}/store", "text": [__file__], "heldout": 0.0}]},
        "train": {"steps": 8, "batch_size": 16, "seq_len": 32, "compilation_cache": None, **train},
        "optim": {"learning_rate": 1e-2},
        "eval": {"sample_tokens": 0},
        "checkpoint": {"every": 4},
    }
    path = folder / "run.yaml"
    path.write_text(to_yaml(parse_config(tree)))
    return str(path)


def launch(folder, *arguments, on="v5e-16", via="tpu-vm"):
    return main(["launch", config(folder), "--on", on, "--via", via, "--yes", "--poll", "0.05", *arguments])


@pytest.mark.parametrize("via", ["tpu-vm", "queued-resource"])
def test_a_run_is_started_on_all_workers_watched_and_leaves_nothing_billing(via, cloud, tmp_path, capsys):
    (tmp_path / "env").write_text("SOME_KEY=s3cr3t\n")
    assert launch(tmp_path, "optim.learning_rate=0.5", "--env-file", str(tmp_path / "env"), via=via) == 0
    out, err = capsys.readouterr()
    assert "asked: supervise --stopped-code 143 -- train ../config.yaml optim.learning_rate=0.5" in out
    assert "key: s3cr3t" in out, "the variables reached the run"
    assert "19.20 USD per hour" in out
    assert "the run is complete" in err and "nothing is billing" in err
    assert cloud.tpus() == []
    logs = [home / "maxlm-my-run" / "log" for home in cloud.homes()]
    assert len(logs) == 4 and all("the end" in log.read_text() for log in logs)
    env = cloud.homes()[0] / "maxlm-my-run" / "env"
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    assert not any("s3cr3t" in word for call in cloud.calls() for word in call)
    assert main(["launch", "status", "my-run"]) == 2, "nothing is left to look at"


def test_nothing_is_started_without_a_yes(cloud, tmp_path, monkeypatch, capsys):
    arguments = ["launch", config(tmp_path), "--on", "v5e-16", "--via", "tpu-vm", "--price", "1.2"]
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "19.20 USD per hour" in out and "nothing was started" in err
    assert main([*arguments, "--dry-run"]) == 0
    assert cloud.calls("create") == []


def test_slices_are_one_queued_resource(cloud, tmp_path):
    assert launch(tmp_path, "mesh.slices=2", "train.batch_size=32", on="v5litepod-16", via="queued-resource") == 0
    (create,) = cloud.calls("create")
    assert {"--node-count=2", "--node-prefix=my-run"} <= set(create)
    assert len(cloud.homes()) == 8
    assert cloud.tpus() == []


@pytest.mark.parametrize("via", ["tpu-vm", "queued-resource"])
def test_capacity_is_asked_for_elsewhere_and_again(via, cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p"}, create={"z1": ["capacity", "capacity"], "z2": ["capacity", "ok"]})
    assert launch(tmp_path, "--zone", "z1,z2", via=via) == 0
    zones = [word for call in cloud.calls("create") for word in call if word.startswith("--zone")]
    assert zones == ["--zone=z1", "--zone=z2", "--zone=z1", "--zone=z2"]
    assert "asking again" in capsys.readouterr().err
    assert cloud.tpus() == []


def test_quota_is_not_waited_for(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p"}, create={"z1": ["quota"], "z2": ["denied"]})
    assert launch(tmp_path, "--zone", "z1,z2") == 1
    err = capsys.readouterr().err
    assert "z1: gcloud:" in err and "Quota limit" in err and "Permission 'tpu.nodes.create' denied" in err
    assert "Traceback" not in err
    assert len(cloud.calls("create")) == 2
    assert main(["launch", "status", "my-run"]) == 2, "nothing is there, and it may be launched again"


def test_a_lack_of_capacity_ends_when_the_user_waits_no_longer(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p"}, create={"z1": ["capacity"] * 99})
    assert launch(tmp_path, "--zone", "z1", "--wait", "0") == 1
    assert "no zone gave v5litepod-16: z1: gcloud:" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("via", ["tpu-vm", "queued-resource"])
def test_a_preempted_tpu_is_replaced(via, cloud, tmp_path, capsys):
    cloud.run_is("long")

    def take_away():
        until(lambda: "step 3" in log(cloud, 0))
        cloud.run_is("0")
        cloud.preempt()

    thread = threading.Thread(target=take_away)
    thread.start()
    assert launch(tmp_path, "--spot", via=via) == 0
    thread.join()
    out, err = capsys.readouterr()
    assert "the TPU is lost" in err and "step 3" in out and "the end" in out
    assert len(cloud.calls("create", "--spot")) == 2 and cloud.tpus() == []


@pytest.mark.slow
@pytest.mark.parametrize("taken", [True, False])
def test_a_run_that_was_told_to_end_goes_on_only_if_its_tpu_is_taken_away(taken, cloud, tmp_path, capsys):
    """The machine that warned it still answers for a moment."""
    cloud.run_is("143")

    def take_away():
        until(lambda: "the end" in log(cloud, 0))
        cloud.run_is("0")
        cloud.preempt()

    thread = threading.Thread(target=take_away)
    if taken:
        thread.start()
    assert launch(tmp_path, "--spot", on="v5e-1") == (0 if taken else 143)
    if taken:
        thread.join()
    assert len(cloud.calls("create")) == 1 + taken and cloud.tpus() == []
    assert ("the run is complete" if taken else "the run was stopped") in capsys.readouterr().err


def test_a_dead_worker_costs_its_tpu(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p", "compute/zone": "z1"}, dead={"1": 2})
    assert launch(tmp_path) == 0
    assert "Could not SSH into worker 2" in capsys.readouterr().err
    assert len(cloud.calls("create")) == 2 and cloud.tpus() == []


def test_workers_that_die_again_and_again_end_it(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p", "compute/zone": "z1"}, dead={str(i): 0 for i in range(9)})
    assert launch(tmp_path) == 1
    assert "giving up" in capsys.readouterr().err
    assert cloud.tpus() == []


def test_a_run_that_fails_is_not_tried_on_other_tpus(cloud, tmp_path, capsys):
    cloud.run_is("1")
    assert launch(tmp_path) == 1
    assert "exit code 1" in capsys.readouterr().err
    assert len(cloud.calls("create")) == 1 and cloud.tpus() == []


def test_a_kept_tpu_says_that_it_bills_until_it_is_stopped(cloud, tmp_path, capsys):
    assert launch(tmp_path, "--keep") == 0
    assert "billing until you run: maxlm launch stop my-run" in capsys.readouterr().err
    assert cloud.tpus() == ["z1/my-run"]
    assert launch(tmp_path) == 2, "one of that name is there"
    assert main(["launch", "stop", "my-run"]) == 0
    assert cloud.tpus() == []


def test_a_tpu_of_that_name_that_others_made_is_left_alone(cloud, tmp_path, capsys):
    assert launch(tmp_path, "--keep") == 0
    shutil.rmtree(tmp_path / "state")
    assert launch(tmp_path) == 2
    assert "exists already in z1" in capsys.readouterr().err
    assert cloud.tpus() == ["z1/my-run"]


@pytest.mark.slow
def test_a_detached_run_is_looked_at_and_stopped_by_name(cloud, tmp_path, capsys):
    cloud.run_is("long")
    assert launch(tmp_path, "--detach") == 0
    until(lambda: "step 2" in log(cloud, 0))
    assert main(["launch", "status", "my-run"]) == 0
    assert "READY in z1; it is billing" in capsys.readouterr().out
    assert main(["launch", "logs", "my-run"]) == 0
    assert "step 2" in capsys.readouterr().out
    assert main(["launch", "stop", "my-run"]) == 0
    assert "nothing of it is billing" in capsys.readouterr().err
    assert all("saved" in log(cloud, i) for i in range(4)), "the run saved before it was deleted"
    assert cloud.tpus() == []


def test_what_cannot_be_deleted_is_said_to_bill(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p", "compute/zone": "z1"}, undeletable=True)
    assert launch(tmp_path) == 1
    err = capsys.readouterr().err
    assert "may be billing" in err and "gcloud compute tpus tpu-vm delete my-run --quiet --zone=z1" in err
    cloud.cue()
    assert main(["launch", "stop", "my-run"]) == 0
    assert cloud.tpus() == []


def test_a_watched_run_that_is_stopped_in_another_terminal_stays_stopped(cloud, tmp_path):
    cloud.run_is("long")
    arguments = ["launch", config(tmp_path), "--on", "v5e-1", "--via", "tpu-vm", "--yes", "--poll", "0.05"]
    process = subprocess.Popen([sys.executable, "-m", "maxlm", *arguments], cwd=HERE.parent, stderr=subprocess.PIPE)
    until(lambda: "step 3" in log(cloud, 0))
    assert main(["launch", "stop", "my-run"]) == 0
    assert b"stopped from elsewhere" in process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert len(cloud.calls("create")) == 1 and cloud.tpus() == []


def test_a_cloud_that_does_not_answer_for_a_moment_changes_nothing(cloud, tmp_path, capsys):
    cloud.cue(settings={"project": "p", "compute/zone": "z1"}, silent=3)
    assert launch(tmp_path, on="v5e-1") == 0
    cloud.cue(settings={"project": "p", "compute/zone": "z1"}, silent=99)
    assert launch(tmp_path, on="v5e-1") == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_ctrl_c_only_stops_watching(cloud, tmp_path):
    cloud.run_is("long")
    command = [sys.executable, "-m", "maxlm", "launch", config(tmp_path), "--on", "v5e-1", "--via", "tpu-vm", "--yes"]
    process = subprocess.Popen(
        [*command, "--poll", "0.05", "--price", "1.5"], cwd=HERE.parent, stderr=subprocess.PIPE, text=True
    )
    until(lambda: "step 3" in log(cloud, 0))
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "1.50 USD per hour" in err and "maxlm launch stop my-run" in err and "Traceback" not in err
    assert cloud.tpus() == ["z1/my-run"]
    before = log(cloud, 0)
    until(lambda: log(cloud, 0) != before)  # it goes on
    assert main(["launch", "stop", "my-run", "--now"]) == 0


@pytest.mark.long
def test_a_run_on_a_spot_tpu_goes_on_where_it_was_preempted(cloud, tmp_path, capsys):
    """All of it is real but the cloud: the code goes there, trains, is killed, and resumes from the bucket."""
    (cloud.folder / "maxlm").unlink()
    with gcs_bucket() as bucket:

        def take_away():
            until(lambda: storage.exists(f"{bucket}/runs/My_Run/checkpoints/4/MANIFEST.json"), 300)
            cloud.preempt()

        thread = threading.Thread(target=take_away)
        thread.start()
        assert launch(tmp_path, "train.steps=40", on="v5e-1") == 0
        thread.join()
        steps = [json.loads(x)["step"] for x in storage.read_bytes(f"{bucket}/runs/My_Run/metrics.jsonl").splitlines()]
        summary = json.loads(storage.read_bytes(f"{bucket}/runs/My_Run/summary.json"))
    out, err = capsys.readouterr()
    assert "the TPU is lost" in err and "the run is complete" in err
    assert "resum" in out or "continu" in out
    assert summary["status"] == "complete" and summary["step"] == 40 and max(steps) == 40
    assert cloud.tpus() == []


@pytest.mark.parametrize(
    ("arguments", "cues", "words"),
    [
        (["--on", "v5p-127"], {}, "--on v5p-127: there is no such machine; the nearest names are v5p-128"),
        (["--on", "v5f-8"], {}, "v5e-8"),
        ([], {"accounts": []}, "gcloud auth login"),
        ([], {"settings": {"project": "p"}}, "gcloud has no zone; give --zone"),
        ([], {"settings": {"compute/zone": "z1"}}, "gcloud has no project; give --project"),
        (["run.root=runs"], {}, "run.root=runs is a folder of a machine that may be preempted"),
        (["mesh.fake_devices=8"], {}, "set mesh.fake_devices=null"),
        (["mesh.tensor=3"], {}, "needs a multiple of 3 devices, but there are 16"),
        (["mesh.slices=2"], {}, "use queued-resource or gke"),
        (["log.wandb_api_key=abc"], {}, "looks like a credential"),
        (["train.init_from=hf_abcdefghijklmnop"], {}, "looks like a credential"),
        (["--env-file", "nowhere"], {}, "--env-file nowhere is not there"),
        (["--on", "h100:8"], {}, "that is no TPU"),
        (["--on", "tpu7x-16"], {}, "TPU7x is to be had in GKE alone"),
        (["--name", "My_Run"], {}, "must be lower-case"),
        (["--poll", "0"], {}, "--poll"),
        (["--price", "nan"], {}, "--price=nan is to be USD per chip-hour, from 0 to 1,000,000"),
        (["--queue", "q"], {}, "--queue means nothing with --via tpu-vm; it is for gke"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_a_sentence(arguments, cues, words, cloud, tmp_path, capsys):
    cloud.cue(**{"settings": {"project": "p", "compute/zone": "z1"}, **cues})
    assert launch(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (cloud.folder / "calls.jsonl").exists() or cloud.calls("create") == []


def test_a_missing_gcloud_says_how_to_get_it(cloud, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(tmp_path) == 2
    assert "needs gcloud, which is not here: install" in capsys.readouterr().err


def test_an_unknown_name_is_answered_with_those_that_are_known(cloud, tmp_path, capsys):
    assert launch(tmp_path, "--keep") == 0
    for verb in ("status", "logs", "stop"):
        assert main(["launch", verb, "my-rum"]) == 2
        assert "there are my-run" in capsys.readouterr().err
    (tmp_path / "state" / "maxlm" / "launch" / "my-run" / "job.json").write_text("{")
    assert main(["launch", "stop", "my-run"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_gcloud_takes_every_command(cloud, tmp_path, capsys):
    """Its linter parses a command line without running it."""
    real = shutil.which("gcloud", path=os.environ["PATH"].partition(":")[2])
    if real is None:
        pytest.skip("gcloud is not installed")
    for via, more in {"tpu-vm": [], "queued-resource": ["mesh.slices=2", "train.batch_size=32", "--reserved"]}.items():
        full = ["--spot", "--network", "n", "--subnetwork", "s", "--service-account", "a@b", "--internal-ip"]
        full += ["--env-file", config(tmp_path), "--project", "p"]
        launch(tmp_path, *more, *full, "--dry-run", via=via)
        commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud ")]
        assert len(commands) >= 5
        for command in {command.split("--zone")[0].partition(" my-run-1")[0]: command for command in commands}.values():
            done = subprocess.run(
                [real, "meta", "lint-gcloud-commands", "--command-string", command], capture_output=True, text=True
            )
            (verdict,) = json.loads(done.stdout)
            assert verdict["success"], verdict.get("error_message")


def log(cloud, worker):
    found = sorted((cloud.folder / "vms").glob(f"*-{worker}/maxlm-my-run/log"))
    return found[-1].read_text() if found else ""


def until(there, seconds=60):
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
