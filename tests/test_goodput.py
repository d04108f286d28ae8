"""Where a run's time went: the sums, the ledger on a clock of its own, and real runs that are killed and resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import MODEL

import maxlm
from maxlm import goodput, ledger
from maxlm.config_file import to_yaml
from maxlm.goodput import Start, read, rows, summarize
from maxlm.ledger import Ledger
from maxlm.report import report_data, text_summary, write_report

ROOT = Path(__file__).parent.parent


def start(began, first, step, devices=8, /, **seconds):
    return Start(began, first, step, began + sum(seconds.values()), devices, seconds)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def opened(tmp_path, clock, first=0, **more):
    """A ledger on a fake clock, which is both seconds that grow and seconds since 1970 less 1e9."""
    more = {"tell": pytest.fail, **more}
    return Ledger(str(tmp_path), first, 8, clock=clock, wall_clock=lambda: 1e9 + clock.now, **more)


# ---- sums


def test_one_start_is_what_it_recorded():
    found = summarize([start(100.0, 0, 50, start=5.0, compile=20.0, step=70.0, save=5.0)])
    assert found.seconds == {"step": 70.0, "compile": 20.0, "save": 5.0, "start": 5.0}
    assert (found.total_s, found.fraction, found.lost_steps, found.starts) == (100.0, 0.7, 0, 1)
    assert found.device_hours == pytest.approx(8 * 100 / 3600)


def test_steps_that_a_crash_took_are_lost_and_the_wait_for_the_next_start_is_idle():
    # 50 steps of 2 s each, saved at 40; 30 s later another start does the last 10 again
    starts = [start(100.0, 0, 50, start=10.0, step=100.0), start(240.0, 40, 60, start=10.0, step=40.0)]
    found = summarize(starts)
    assert found.seconds == {"step": 120.0, "start": 20.0, "lost": 20.0, "idle": 30.0}
    assert found.lost_steps == 10
    assert found.total_s == starts[-1].updated - starts[0].began == 190.0
    assert found.fraction == 120 / 190
    assert found.running == 120 / 160


def test_a_run_that_stopped_and_went_on_lost_nothing():
    found = summarize([start(0.0, 0, 50, step=100.0), start(160.0, 50, 60, step=20.0)])
    assert found.seconds == {"step": 120.0, "idle": 60.0}
    assert found.lost_steps == 0


def test_a_step_that_two_starts_lose_is_counted_where_it_was_done():
    # the checkpoint of 40 turns out to be damaged: the third start goes back to 20, behind both
    starts = [start(0.0, 0, 50, step=50.0), start(50.0, 40, 60, step=40.0), start(90.0, 20, 80, step=60.0)]
    found = summarize(starts)
    assert found.lost_steps == (50 - 20) + (60 - 40)
    assert found.seconds == {"step": 20.0 + 60.0, "lost": 30.0 + 40.0}
    assert found.total_s == 150.0


def test_a_start_without_a_finished_step_did_nothing_that_counts():
    found = summarize([start(0.0, 0, 0, compile=9.0, step=3.0), start(20.0, 0, 4, step=8.0)])
    assert found.seconds == {"step": 8.0, "compile": 9.0, "lost": 3.0, "idle": 8.0}
    alone = summarize([start(0.0, 0, 0, compile=9.0, step=3.0)])
    assert alone.seconds["step"] == 3.0, "it may still be at it"


def test_a_run_that_shrinks_holds_fewer_devices():
    found = summarize([start(0.0, 0, 10, 8, step=3600.0), start(7200.0, 10, 20, 2, step=7200.0)])
    assert found.device_hours == 8 + 2 * 2
    assert found.seconds == {"step": 10800.0, "idle": 3600.0}


def test_clocks_that_disagree_do_not_make_idle_time_negative():
    starts = [start(100.0, 0, 10, step=50.0), start(120.0, 10, 20, step=50.0), start(190.0, 20, 30, step=50.0)]
    assert summarize(starts).seconds == {"step": 150.0, "idle": 20.0}


def test_a_run_without_starts_has_no_goodput():
    assert (summarize([]).total_s, summarize([]).fraction, summarize([]).running) == (0.0, 0.0, 0.0)


def test_the_lines_for_a_table():
    starts = [start(0.0, 0, 50, start=10.0, step=100.0), start(140.0, 40, 60, start=10.0, step=40.0, save=0.01)]
    said = rows(summarize(starts))
    assert said["goodput"] == ("63.2% of 3 min 10 s went into steps that count; 75.0% without the time between starts")
    assert said["other time"] == "between starts 30.0 s, start 20.0 s, lost steps 20.0 s, 10 steps done again"
    assert rows(summarize([start(0.0, 0, 5, step=9.0)])) == {"goodput": "100.0% of 9.00 s went into steps that count"}


# ---- the file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[{",
        "{}x",
        "7",
        "[7]",
        '[{"began": 1}]',
        '{"began": 1}',
        "\x00\x01",
        json.dumps([{**vars(start(0.0, 0, 5, step=9.0)), "step": "5"}]),
        json.dumps([{**vars(start(0.0, 0, 5, step=9.0)), "step": 5.5}]),
        json.dumps([{**vars(start(0.0, 7, 5, step=9.0))}]),
        json.dumps([{**vars(start(0.0, 0, 5, step=float("nan")))}]),
        json.dumps([{**vars(start(0.0, 0, 5, step=-1.0))}]),
        json.dumps([{**vars(start(0.0, 0, 5)), "seconds": [1, 2]}]),
        json.dumps([{**vars(start(0.0, 0, 5)), "began": None}]),
        json.dumps([{**vars(start(0.0, 0, 5)), "began": 10**400}]),
        json.dumps([{**vars(start(0.0, 0, 5)), "usd_per_hour": -1.0}]),
        json.dumps([{**vars(start(0.0, 0, 5)), "usd_per_hour": "3"}]),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_told_and_begun_anew(tmp_path, clock, text):
    (tmp_path / goodput.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"goodput\.json is damaged"):
        read(str(tmp_path))
    told = []
    with opened(tmp_path, clock, 5, tell=told.append) as book:
        clock.sleep(2.0)
        assert book.goodput().total_s == 2.0
    assert len(told) == 1 and "goodput.json is damaged; the time of earlier starts is not counted" in told[0]
    assert [s.seconds for s in read(str(tmp_path))] == [{"start": 2.0}]


def test_a_file_of_before_there_were_prices_is_read(tmp_path, clock):
    entry = vars(start(0.0, 0, 5, 8, step=3600.0)).copy()
    del entry["usd_per_hour"]
    (tmp_path / goodput.FILE).write_text(json.dumps([entry]))
    with opened(tmp_path, clock, 5, usd_per_hour=16.0) as book:
        clock.sleep(1800.0)
        assert book.goodput().usd == 16 + 16 / 2
    assert [s.usd_per_hour for s in read(str(tmp_path))] == [None, 16.0]


def test_a_missing_file_is_told_where_there_were_steps_before(tmp_path, clock):
    told = []
    with opened(tmp_path / "new", clock, 0, tell=told.append):
        pass
    assert told == []
    with opened(tmp_path / "old", clock, 40, tell=told.append):
        pass
    assert told == ["no goodput.json tells of the time up to step 40; it is not counted"]


def test_a_folder_that_cannot_be_written_does_not_end_a_run(tmp_path, clock):
    (tmp_path / "file").write_text("")
    told = []
    with opened(tmp_path / "file", clock, tell=told.append) as book:
        clock.sleep(60.0)
        book.enter("step", 1)
    assert "the time of this start is not recorded" in told[-1]


def test_hosts_that_do_not_write_leave_no_file(tmp_path, clock):
    with opened(tmp_path, clock, write=False) as book:
        clock.sleep(3.0)
        book.enter("step", 1)
    assert list(tmp_path.iterdir()) == []
    assert book.goodput().total_s == 3.0


# ---- the ledger


def test_the_clock_is_in_one_phase_at_a_time_from_before_the_ledger_was_opened(tmp_path, clock):
    clock.sleep(30.0)
    with opened(tmp_path, clock, age_s=20.0) as book:
        for phase, step, seconds in (("step", 1, 4.0), ("save", 1, 2.0), ("step", 1, 8.0), ("evaluation", 3, 1.0)):
            book.enter(phase, step)
            clock.sleep(seconds)
        book.enter("ending", 3)
        clock.sleep(0.5)
    (found,) = read(str(tmp_path))
    assert found.seconds == {"start": 20.0, "step": 12.0, "save": 2.0, "evaluation": 1.0, "ending": 0.5}
    assert (found.began, found.updated) == (1e9 + 10.0, 1e9 + clock.now)
    assert (found.first, found.step, found.devices) == (0, 3, 8)


def test_starts_are_added_to_those_before(tmp_path, clock):
    for first, step in ((0, 4), (3, 9)):
        with opened(tmp_path, clock, first) as book:
            book.enter("step", first)
            clock.sleep(step - first)
            book.enter("ending", step)
            told = book.goodput()
        clock.sleep(100.0)
    assert told.seconds == {"step": 9.0, "lost": 1.0, "idle": 100.0}
    assert told == summarize(read(str(tmp_path)))


def test_it_is_written_now_and_then_and_after_saves_and_compilation(tmp_path, clock):
    def written():
        book._writer.join()
        return read(str(tmp_path))[-1].step

    book = opened(tmp_path, clock, age_s=7.0)
    assert written() == 0
    assert read(str(tmp_path))[-1].seconds == {"start": 7.0}, "what came before is known from the beginning"
    clock.sleep(ledger.EVERY_S - 1)
    book.enter("step", 1)
    assert written() == 0
    clock.sleep(1.0)
    book.enter("step", 2)
    assert written() == 2
    book.enter("save", 3)
    assert written() == 2
    book.enter("step", 3)
    assert written() == 3
    book.enter("compile", 4)
    assert written() == 3
    book.enter("step", 4)
    assert written() == 4


def test_what_a_start_did_after_its_newest_step_is_lost_with_an_error(tmp_path, clock):
    def hangs_after_its_first_step():
        with opened(tmp_path, clock) as book:
            book.enter("step", 0)
            clock.sleep(5.0)
            book.enter("step", 1)
            clock.sleep(300.0)  # a collective that waits, and then fails
            raise RuntimeError

    with pytest.raises(RuntimeError):
        hangs_after_its_first_step()
    assert read(str(tmp_path))[0].seconds == {"start": 0.0, "step": 5.0, "lost": 300.0}


class Devices:
    """Runs steps of a given length one after another, and the loop that feeds them, on a fake clock."""

    def __init__(self, book, clock, step_s):
        self.book, self.clock, self.step_s = book, clock, step_s
        self.free_at, self.ends = 0.0, {}
        self.idle_s = 0.0

    def train(self, waits, read_at_once=2, compile_s=50.0):
        for step, wait_s in enumerate(waits, 1):
            self.book.enter("data")
            self.clock.sleep(wait_s)
            self.book.enter("step" if step > 1 else "compile")
            self.clock.sleep(compile_s if step == 1 else 0.0)
            self.book.enter("step")
            begins = max(self.clock.now, self.free_at)
            self.idle_s += begins - self.free_at if step > 1 else 0.0
            self.ends[step] = self.free_at = begins + self.step_s
            if step > 1:
                self.report(step - 1)
            if step <= read_at_once:
                self.report(step)
        self.report(len(waits))

    def report(self, step):
        self.clock.sleep(max(0.0, self.ends[step] - self.clock.now))
        self.book.enter("step", step)


@pytest.mark.parametrize(
    ("waits", "data_s"),
    [
        ([3.0] + [0.0] * 9, 3.0),  # the first batch is waited for by everyone
        ([0.0, 0.0, 0.0] + [1.5] * 10, 0.0),  # shorter than a step: hidden behind it
        ([0.0, 0.0, 0.0] + [5.0] * 10, 3.0 * 10),  # longer: each step of 2 s hides as much
        ([0.0, 0.0, 0.0, 1.0, 9.0, 0.0, 1.0, 1.0], 7.0),  # one that sticks out
        ([0.0, 4.0] + [0.0] * 5, 4.0),  # after the first step, which is read at once
    ],
)
def test_only_what_the_devices_waited_for_is_a_wait_for_data(tmp_path, clock, waits, data_s):
    with opened(tmp_path, clock) as book:
        devices = Devices(book, clock, step_s=2.0)
        devices.train(waits)
        seconds = book.goodput().seconds
    assert seconds.get("data", 0.0) == pytest.approx(data_s)
    assert data_s == pytest.approx(devices.idle_s + waits[0]), "and that is what they did wait"
    assert seconds["step"] == pytest.approx(2.0 * len(waits))
    assert seconds["compile"] == 50.0


def test_the_first_step_without_its_compilation_tells_how_long_a_step_is(tmp_path, clock):
    with opened(tmp_path, clock) as book:
        devices = Devices(book, clock, step_s=2.0)
        devices.train([0.0, 0.0] + [5.0] * 4, read_at_once=1)
    assert book.goodput().seconds["data"] == pytest.approx(3.0 * 4) == pytest.approx(devices.idle_s)


def test_steps_that_take_longer_than_the_shortest_are_no_wait(tmp_path, clock):
    """Data at hand is no wait, however long a step takes."""
    with opened(tmp_path, clock) as book:
        devices = Devices(book, clock, step_s=1.0)
        devices.train([0.0] * 3)
        devices.step_s = 6.0
        for _ in range(5):
            book.enter("data")
            book.enter("step")
            clock.sleep(6.0)
    assert book.goodput().seconds.get("data", 0.0) == 0.0


# ---- whole runs


def config(tmp_path, **sections):
    tree = {
        "run": {"name": "r", "root": str(tmp_path)},
        "model": {**MODEL, "vocab_size": 257, "num_layers": 1},
        "mesh": {"data": 2, "fsdp": 1, "fake_devices": 2},
        "data": {"stores": [{"path": f"{tmp_path}/store", "text": [__file__], "heldout": 0.0}]},
        "train": {"steps": 6, "batch_size": 8, "seq_len": 32, "compilation_cache": None},
        "optim": {"learning_rate": 1e-2, "schedule": {"name": "constant"}},
        "eval": {"sample_tokens": 0},
        "checkpoint": {"every": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree[name], **fields}
    return maxlm.parse_config(tree)


@pytest.mark.slow
def test_a_run_that_is_resumed_tells_where_its_time_went(tmp_path, capsys):
    began = time.time()
    stopped = maxlm.train(config(tmp_path), callbacks=[lambda step, _: step == 2])
    assert "went into steps that count" in capsys.readouterr().out
    (first,) = read(str(tmp_path / "r"))
    assert (first.first, first.step, first.devices) == (0, stopped.step, 2)
    assert maxlm.train(config(tmp_path)).status == "complete"
    said = capsys.readouterr().out
    assert "went into steps that count" in said and "compilation" in said
    starts = read(str(tmp_path / "r"))
    assert [(s.first, s.step) for s in starts] == [(0, stopped.step), (stopped.step, 6)]
    assert {"start", "compile", "step", "data", "save", "ending"} <= set(starts[1].seconds)
    assert all(s.seconds["compile"] > 0 and s.seconds["step"] > 0 and s.seconds["save"] > 0 for s in starts)
    assert starts[1].began >= began, "the second start did not begin with the process"
    found = summarize(starts)
    assert found.total_s == pytest.approx(starts[1].updated - starts[0].began)
    assert found.lost_steps == 0
    known = report_data([str(tmp_path / "r")])["runs"][0]
    assert known["goodput"] == found.fraction
    assert known["seconds_by_phase"] == found.seconds
    assert "Where the time went" in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.long
def test_a_run_that_is_killed_knows_what_it_lost(tmp_path):
    """A real process, killed right after a save and some steps; the next start does those again."""
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config(tmp_path, train={"steps": 12}, checkpoint={"every": 4})))
    body = f"""
import os, signal, sys, time
import maxlm
from maxlm import ledger
ledger.EVERY_S = 0.0  # not every ten seconds, but whenever the write before has ended
def callback(step, _):
    if step == 7 and sys.argv[1] == "kill":
        while not os.path.exists({str(tmp_path / "r/checkpoints/4/MANIFEST.json")!r}):
            time.sleep(0.1)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
maxlm.train(maxlm.load_config({str(path)!r}), callbacks=[callback])
"""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("JAX_")}
    for how, code in (("kill", -9), ("go on", 0)):
        done = subprocess.run(
            [sys.executable, "-c", body, how], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
    starts = read(str(tmp_path / "r"))
    assert [s.first for s in starts] == [0, 4]
    assert 5 <= starts[0].step <= 7, "what was not written yet is unknown"
    assert starts[1].step == 12
    assert all(s.seconds["start"] > 0.5 for s in starts), "imports take longer: the process's age counts"
    found = summarize(starts)
    lost = starts[0].step - 4
    assert found.lost_steps == lost
    assert found.seconds["lost"] == pytest.approx(starts[0].seconds["step"] * lost / starts[0].step)
    assert found.seconds["lost"] > 0.2
    assert found.seconds["idle"] > 0
    assert found.total_s == pytest.approx(starts[1].updated - starts[0].began)
    assert f"{lost} step{'s' * (lost > 1)} done again" in done.stdout


# ---- the report


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "r"
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(config(tmp_path)))
    starts = [
        start(0.0, 0, 50, start=10.0, compile=25.0, step=100.0, data=4.0, evaluation=3.0, save=5.0),
        start(170.0, 40, 60, start=10.0, compile=5.0, step=40.0, save=2.5, ending=1.5),
    ]
    (path / goodput.FILE).write_bytes(goodput.to_json(starts))
    return path


def test_the_report_shows_it(folder):
    page = Path(write_report([str(folder)])[0]).read_text()
    card = page.split("Where the time went")[1].split("</section>")[0]
    found = summarize(read(str(folder)))
    assert f"goodput {found.fraction:.1%} of 3 min 49 s" in card
    assert "2 starts, 10 steps done again, 0.458 device-hours" in card
    widths = [float(part.split("%")[0]) for part in card.split('<i style="width:')[1:]]
    assert len(widths) == len(found.seconds) == 9
    assert sum(widths) == pytest.approx(100.0, abs=0.01)
    assert widths[0] == pytest.approx(100 * 120 / 229, abs=0.001), "steps come first"
    for name, seconds in (("compilation", "30.0 s"), ("lost steps", "20.0 s"), ("between starts", "23.0 s")):
        assert f"{name}</th><td>{seconds}</td>" in card
    text = text_summary(str(folder))
    assert f"{found.fraction:.1%} of 3 min 49 s went into steps that count" in text


def test_a_comparison_shows_goodput_and_marks_the_better(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(to_yaml(config(tmp_path, run={"name": "other"})))
    (other / goodput.FILE).write_bytes(goodput.to_json([start(0.0, 0, 60, step=90.0, start=10.0)]))
    page = Path(write_report([str(folder), str(other)], str(tmp_path / "out"))[0]).read_text()
    assert "<th>goodput</th>" in page
    assert "<td class=best>90.0%</td>" in page


@pytest.mark.parametrize("text", [None, "[{", "[]"])
def test_a_report_without_it_is_as_before(folder, text):
    path = folder / goodput.FILE
    path.unlink() if text is None else path.write_text(text)
    page = Path(write_report([str(folder)])[0]).read_text()
    assert "Where the time went" not in page
    assert "goodput" not in report_data([str(folder)])["runs"][0]
    assert "went into steps" not in text_summary(str(folder))
