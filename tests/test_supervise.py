"""The supervisor, on real processes that crash and hang."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maxlm.cli import main
from maxlm.supervise import Limits, supervise

HEAD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from maxlm.heartbeat import beat, dump_on_request
dump_on_request()
starts = len(open(sys.argv[1]).readlines()) + 1
print("start", file=open(sys.argv[1], "a"))
"""
QUICK = Limits(step_s=1.0, phase_s=5.0, retries=3, first_wait_s=0.01)


def run(tmp_path, body, limits=QUICK):
    """Supervises a script that knows how often it was started; returns the exit code and that number."""
    script, log = tmp_path / "child.py", tmp_path / "starts"
    script.write_text(HEAD + body)
    log.touch()
    code = supervise([sys.executable, str(script), str(log)], limits)
    return code, len(log.read_text().splitlines())


def test_a_run_that_ends_well_is_not_started_again(tmp_path):
    assert run(tmp_path, "beat('step', 1)") == (0, 1)


def test_a_run_that_was_asked_to_stop_ends_with_a_code_of_its_own(tmp_path):
    limits = dataclasses.replace(QUICK, stopped_code=143)
    assert run(tmp_path, "beat('step', 1)\nbeat('stopped', 1)", limits) == (143, 1)
    assert run(tmp_path, "beat('step', 1)", limits)[0] == 0


def test_a_crash_is_followed_by_a_new_start(tmp_path, capsys):
    assert run(tmp_path, "beat('step', 5)\nsys.exit(1 if starts < 3 else 0)") == (0, 3)
    text = capsys.readouterr().err
    assert "it failed with exit code 1 after step 5; starting again" in text and "(2 of 3)" in text


def test_a_kill_is_named(tmp_path, capsys):
    assert run(tmp_path, "if starts == 1: os.kill(os.getpid(), signal.SIGKILL)") == (0, 2)
    assert "killed by SIGKILL before its first step" in capsys.readouterr().err


def test_it_gives_up_at_the_same_step_and_says_why(tmp_path, capsys):
    code, starts = run(tmp_path, "beat('step', 7)\nsys.exit(3)")
    assert (code, starts) == (3, 1 + QUICK.retries)
    assert "giving up: it failed with exit code 3 after step 7, 4 times" in capsys.readouterr().err


def test_progress_counts_anew(tmp_path):
    assert run(tmp_path, "beat('step', starts)\nsys.exit(1 if starts < 9 else 0)") == (0, 9)


@pytest.mark.parametrize("code", [2, 130])
def test_what_would_fail_again_is_not_tried_again(tmp_path, code):
    assert run(tmp_path, f"sys.exit({code})") == (code, 1)


def test_a_hang_is_ended_after_its_threads_have_said_where(tmp_path, capfd):
    body = """
def stuck_in_here():
    time.sleep(600)
for step in range(1, 20):
    beat("step", step)
    time.sleep(0.02)
if starts == 1:
    stuck_in_here()
"""
    assert run(tmp_path, body) == (0, 2)
    text = capfd.readouterr().err
    assert "no sign of life" in text and "in phase 'step'" in text
    assert "in stuck_in_here" in text, "the stack"
    assert "it hung and was killed after step 19; starting again" in text


def test_slow_phases_are_no_hang(tmp_path):
    body = """
time.sleep(1.6)  # start and compilation
beat("step", 1)
beat("save", 1)
time.sleep(1.6)
beat("step", 2)
"""
    assert run(tmp_path, body) == (0, 1)


def test_a_run_with_long_steps_is_given_time(tmp_path):
    body = """
for step in range(4):
    beat("step", step)
    time.sleep(0.7)
time.sleep(2.5)
"""
    assert run(tmp_path, body) == (0, 1)


def test_long_steps_and_a_long_end_are_no_hang(tmp_path):
    body = """
beat("step", 1)
time.sleep(2.0)  # longer than the least limit, and the first step that is timed
beat("step", 2)
beat("ending", 2)
time.sleep(1.6)
"""
    assert run(tmp_path, body) == (0, 1)


def test_wrong_settings_are_final_only_before_there_was_a_step(tmp_path):
    assert run(tmp_path, "beat('step', 4) if starts == 1 else None\nsys.exit([1, 2, 0][starts - 1])") == (0, 3)


def test_a_phase_that_never_ends_is_a_hang(tmp_path):
    assert run(tmp_path, "if starts == 1: beat('save', 3); time.sleep(600)", Limits(1.0, 1.5, 3, 0.01)) == (0, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_both(tmp_path, number):
    body = """
def stop(*_):
    open(sys.argv[1] + ".saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
beat("step", 1)
while True:
    beat("step", 2)
    time.sleep(0.1)
"""

    def send():
        for _ in range(200):
            time.sleep(0.05)
            if (tmp_path / "starts").exists() and (tmp_path / "starts").read_text():
                break
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert run(tmp_path, body) == (0, 1)
    sender.join()
    assert (tmp_path / "starts.saved").exists()


def test_the_command_is_asked_for(capsys):
    assert main(["supervise", "--", "report", "runs/a"]) == 2
    assert "maxlm supervise -- train" in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_training_ends_as_one_that_was_not(tmp_path):
    """A real run whose process is killed; the supervisor's next start continues it."""
    settings = [
        "model.num_layers=1 model.d_model=32 model.d_ff=64 model.num_heads=2 train.batch_size=4 train.seq_len=32",
        "train.steps=30 optim.schedule.warmup_steps=1 optim.schedule.cooldown_steps=1 checkpoint.every=5",
        f"eval.every=0 eval.sample_tokens=0 train.compilation_cache={tmp_path}/cache run.root={tmp_path}",
    ]
    (tmp_path / "a.txt").write_text("some text to learn from. " * 2000)
    store = f'data.stores=[{{"path": "{tmp_path}/store", "text": ["{tmp_path}/a.txt"]}}]'
    train = ["train", "configs/quickstart.yaml", *" ".join(settings).split(), store]
    root = Path(__file__).parent.parent
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-m", "maxlm", *train, "run.name=a"], cwd=root, env=env, check=False)
    assert done.returncode == 0
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "maxlm", "supervise", "--", *train, "run.name=b"],
        cwd=root,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        time.sleep(0.05)
        if (tmp_path / "b/checkpoints/5/MANIFEST.json").exists():
            break
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0 and "killed by SIGKILL" in errors
    finals = [(tmp_path / run / "checkpoints/30/MANIFEST.json").read_text() for run in "ab"]
    arrays = [text[text.index('"arrays"') : text.index('"run"')] for text in finals]
    assert arrays[0] == arrays[1], "bit for bit, by the fingerprints of all arrays"
