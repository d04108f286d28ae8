"""Names of machines, and what is remembered of a launch, may be anything: an answer or a ConfigError."""

import json

import pytest
from fuzz_values import JSON, TEXTS, cut_or_changed, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.config_file import ConfigError
from maxlm.launch import record
from maxlm.launch.job import Job, Options
from maxlm.machines import machine

TREE = {"job": Job("r", "tpu-vm", "v5p-8", "/c.yaml", (), "gs://b/r", 1, Options(), None, "0").to_json(), "zone": "z"}
PARTS = ["v5p", "v6e", "h100", "cpu", ":", "-", "x", "4", "16"]
FILES = (mutated(TREE) | JSON).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(json.dumps(TREE).encode())


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@fuzz(300)
@given(TEXTS | st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
@example("v5p-" + "9" * 5000)
@example("v6e:" + "9" * 5000 + "x1")
@example("v6e:0x4")
@example("cpu:²")
def test_names_of_machines(name):
    try:
        found = machine(name)
    except ConfigError as error:
        told(error, "--on")
    else:
        assert found.num_devices >= found.num_hosts >= 1


@fuzz(150)
@given(FILES)
@example(b"[" * 100_000)
def test_what_is_remembered(data):
    path = record.folder("r") / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        record.read("r")
    except ConfigError as error:
        told(error, "job.json")
