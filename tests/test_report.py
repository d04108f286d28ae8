import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from maxlm.config_file import to_yaml
from maxlm.report import report_data, text_summary, write_report
from maxlm.report.charts import smoothed, thinned

EVIL = "<script>alert(1)</script> & \x1b[2Jgone"


def make_run(folder: Path, steps=60, loss=lambda s: 2 + 3 / s, restarts=(), summary=True, heldout=True, **sections):
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    config = small_config(run={"name": folder.name}, **{"train": {"steps": 60}, **sections})
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = []
    for s in range(1, steps + 1):
        if s - 1 in restarts:
            rows.append({"step": s - 1, "restart": True, "time": 1e9 + s})
        started = s == 1 or s - 1 in restarts
        row = {"loss": loss(s), "grad_norm": 0.5, "learning_rate": 1e-3, "step_time_s": 9.0 if started else 0.5}
        rows.append({"step": s, **row, "tokens_per_s": 96 / row["step_time_s"], "time": 1e9 + s})
        if heldout and s % 20 == 0:
            rows.append({"step": s, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.25, "time": 1e9 + s})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        known = {
            "status": "complete",
            "step": steps,
            "baselines": {"unigram": 2.75, "trigram": 1.5},
            "sample": EVIL,
            "prompt": "Once",
        }
        known |= {"mesh": {"data": 2, "fsdp": 4}, "bytes_per_device": {"parameters": 3 * 2**20}, "wall_s": 75.0}
        known |= {"num_devices": 8, "device_kind": "cpu", "first_step_s": 9.0, "final": {"heldout_loss": 2.5}}
        (folder / "summary.json").write_text(json.dumps(known))
    return str(folder)


class Page(HTMLParser):
    """Tags, outside links and visible text of a page; complains about tags that do not close."""

    VOID = {"meta", "br", "img", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(paths: list[str]) -> tuple[str, Page]:
    text = Path(paths[0]).read_text()
    return text, Page(text)


def test_a_finished_run(tmp_path):
    paths = write_report([make_run(tmp_path / "small", restarts=[30])])
    assert [Path(p).name for p in paths] == ["report.html", "loss.png"]
    assert Path(paths[1]).read_bytes().startswith(b"\x89PNG")
    text, page = page_of(paths)
    assert page.links == [], "nothing is loaded from elsewhere"
    assert "script" not in page.tags
    assert "url(http" not in text
    assert EVIL.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in page.text
    for shown in ("complete, step 60 of 60", "2.500", "1.250", "unigram", "trigram", "2.750", "9.00 s", "1 min 15 s"):
        assert shown in page.text
    assert "3.00 MiB" in page.text
    assert "d_model: 20" in page.text
    assert "restart" in page.text
    assert "MFU" not in page.text, "no peak is known, so there is no MFU"
    assert text.count("<svg") == 5, "loss (wide and narrow), learning rate, gradient norm, throughput"
    assert "var(--s0)" in text
    assert not re.search(r"\.pairs th {[^}]*nowrap", text), "long names would leave no room for their values"
    assert "#0101" not in text, "every stand-in color has been replaced"
    for start in range(5):
        ET.fromstring("<svg" + text.split("<svg")[start + 1].split("</svg>")[0] + "</svg>")


def test_a_run_that_is_still_going(tmp_path):
    folder = make_run(tmp_path / "going", steps=7, summary=False, heldout=False)
    _, page = page_of(write_report([folder]))
    assert "unfinished, step 7 of 60" in page.text
    assert "held-out" not in page.text
    assert "Sample" not in page.text
    assert "unfinished, step 7 of 60" in text_summary(folder)
    Path(folder, "metrics.jsonl").unlink()
    _, page = page_of(write_report([folder]))
    assert "No finite loss has been recorded yet" in page.text


def test_one_step_and_constant_values_can_be_drawn(tmp_path):
    write_report([make_run(tmp_path / "one", steps=1)])
    write_report([make_run(tmp_path / "flat", loss=lambda s: 0.0)])


def test_a_run_that_diverged_says_since_when(tmp_path):
    folder = make_run(tmp_path / "bad", loss=lambda s: 3.0 / s if s < 41 else None)
    _, page = page_of(write_report([folder]))
    assert "loss not finite since step 41" in page.text
    assert "loss not finite since step 41" in text_summary(folder)
    data = report_data([folder])
    assert data["runs"][0]["train_loss"] is None
    json.dumps(data, allow_nan=False)
    _, page = page_of(write_report([make_run(tmp_path / "worse", loss=lambda s: None, heldout=False)]))
    assert "No finite loss" in page.text


def test_several_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", loss=lambda s: 2.5 + 3 / s, optim={"learning_rate": 0.5})
    paths = write_report([a, b])
    assert Path(paths[0]).resolve().parent == tmp_path
    text, page = page_of(paths)
    assert "optim.learning_rate" in page.text
    assert "optim.beta1" not in page.text.split("Configuration of")[0], "only what differs is in the table"
    assert "var(--s1)" in text
    data = report_data([a, b])
    assert data["config_differences"] == {"optim.learning_rate": [0.01, 0.5]}
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    # over steps where the batches are alike, over tokens where they are not
    assert ">tokens<" not in text
    c = make_run(tmp_path / "c", train={"steps": 60, "batch_size": 16})
    text, _ = page_of(write_report([a, c], str(tmp_path / "out")))
    assert ">tokens<" in text
    write_report([a] * 10, str(tmp_path / "many"))


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / root / "same") for root in ("x", "y")]
    assert [run["name"] for run in report_data(runs)["runs"]] == runs


def test_numbers_are_those_of_steady_steps(tmp_path):
    known = report_data([make_run(tmp_path / "a", restarts=[30])])["runs"][0]
    assert known["tokens_per_s"] == 192.0
    assert known["step_time_s"] == 0.5
    assert known["train_loss"] == pytest.approx(np.mean([2 + 3 / s for s in (58, 59, 60)]))
    assert known["tokens"] == 60 * 96
    assert known["params"] == known["params_by_part"]["total_unpadded"]
    assert known["restarts"] == [30]
    only_starts = report_data([make_run(tmp_path / "b", steps=1)])["runs"][0]
    assert only_starts["step_time_s"] == 9.0


def test_text_summary(tmp_path):
    text = text_summary(make_run(tmp_path / "small"))
    assert text.startswith("small: complete, step 60 of 60")
    for line in (
        "held-out loss      2.5000",
        "trigram baseline   1.5000 bits per byte",
        "devices            8 × cpu, data 2 × fsdp 4",
    ):
        assert line in text
    assert "█" in text
    assert "\x1b" not in text, "generated text cannot move the cursor"


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^run folder .*/no does not exist$"):
        write_report([str(tmp_path / "no")])
    with pytest.raises(ValueError, match=r"holds no run: it has none of config.yaml, metrics.jsonl and summary.json$"):
        text_summary(str(tmp_path))
    with pytest.raises(ValueError, match="at least one run folder"):
        report_data([])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json cannot be read: "):
        report_data([str(tmp_path)])


def test_a_configuration_of_another_version_is_still_shown(tmp_path):
    folder = make_run(tmp_path / "old")
    Path(folder, "config.yaml").write_text("run: {name: old}\nmodel: {unknown_field: 1}\ntrain: {}\n")
    _, page = page_of(write_report([folder]))
    assert "unknown_field: 1" in page.text
    assert "params" not in report_data([folder])["runs"][0]


def test_smoothing_keeps_level_and_leaves_out_what_is_not_finite():
    values = np.array([5.0, 1.0, math.nan, 1.0, 1.0, 1.0])
    got = smoothed(values, 2)
    assert got[0] == 5.0, "the start of a steep curve is not averaged away"
    assert math.isnan(got[2])
    assert got[-1] == 1.0
    line = np.linspace(9.0, 1.0, 50)
    np.testing.assert_allclose(smoothed(line, 4)[:46], line[:46])


def test_thinning_keeps_spikes_and_ends():
    x = np.arange(100_000.0)
    y = np.ones_like(x)
    y[54_321] = 9.0
    y[70_000:80_000] = math.nan
    short_x, short_y = thinned(x, y, parts=100)
    assert len(short_x) <= 202
    assert 9.0 in short_y
    assert short_x[0] == 0
    assert short_x[-1] == 99_999
    assert np.isnan(short_y).any(), "a gap stays a gap"


def test_a_complete_run_that_goes_on_is_unfinished(tmp_path):
    folder = make_run(tmp_path / "a", steps=20)
    assert report_data([folder])["runs"][0]["status"] == "complete"
    with open(Path(folder, "metrics.jsonl"), "a") as file:
        file.write('{"step": 21, "loss": 2.0, "time": 1e9}\n')
    assert report_data([folder])["runs"][0]["status"] == "unfinished"


def test_baselines_are_drawn_where_they_lie_on_the_loss_axis(tmp_path):
    # 2.5 nats a token are 1.25 bits a byte, so 1.5 bits a byte are 3 nats a token: inside a loss from 5 to 2
    text, _ = page_of(write_report([make_run(tmp_path / "a")]))
    wide = text.split("<svg")[1]
    assert ">trigram<" in wide
    assert ">unigram<" not in wide, "5.5 nats are out of the picture"
