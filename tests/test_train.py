"""Whole runs: exact resume, stops, branches, what is refused, and training from Python."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import MODEL

import maxlm
from maxlm.checkpoint import CheckpointError, Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.convert.from_hf import from_hf
from maxlm.convert.to_hf import to_hf
from maxlm.data.build import build_store
from maxlm.mesh import make_mesh
from maxlm.metrics import read_metrics
from maxlm.step import Program, build_program

ROOT = Path(__file__).parent.parent
CACHE: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def runs_compile_once(compiled_once):
    CACHE["folder"] = compiled_once


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small byte store: one document per paragraph of this file, many times over."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(24):
        (folder / f"{i}.txt").write_text(f"document {i}\n" + Path(__file__).read_text()[i * 50 : 3000 + i * 90])
    path = str(folder / "store")
    build_store([str(folder / "*.txt")], path, heldout=0.2, workers=1)
    return path


def config(tmp_path, store, **sections):
    tree = {
        "run": {"name": "r", "root": str(tmp_path)},
        "model": {**MODEL, "vocab_size": 257},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2, "fake_devices": 8},
        "data": {"stores": [{"path": store}], "prefetch": 2, "read_threads": 2},
        "train": {"steps": 6, "batch_size": 8, "seq_len": 32, "compilation_cache": CACHE["folder"]},
        "optim": {"learning_rate": 1e-2, "schedule": {"name": "constant"}, "ema": 0.9},
        "eval": {"every": 3, "batches": 2, "sample_tokens": 0},
        "checkpoint": {"every": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree[name], **fields}
    return maxlm.parse_config(tree)


def final_state(cfg, step):
    """Host copy of a checkpoint."""
    program = build_program(cfg, make_mesh(cfg.mesh, jax.devices()))
    checkpoints = Checkpoints(f"{cfg.run.root}/{cfg.run.name}", CheckpointConfig())
    state = jax.device_get(checkpoints.restore(step, program.state_shapes))
    checkpoints.close()
    return state


def assert_bit_equal(a, b):
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    assert all(jax.tree.leaves(same))


def rows(cfg, key="loss"):
    lines = Path(cfg.run.root, cfg.run.name, "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def test_stop_and_resume_is_bit_exact_on_the_same_and_loss_equal_on_another_mesh(tmp_path, store):
    straight = config(tmp_path / "a", store)
    assert maxlm.train(straight).status == "complete"
    broken = config(tmp_path / "b", store)
    first = maxlm.train(broken, callbacks=[lambda step, _: step == 2])
    assert first.status == "stopped"
    assert 2 <= first.step < 6
    assert maxlm.train(broken).status == "complete"
    assert rows(straight) == rows(broken)
    assert rows(straight, "heldout_loss") == rows(broken, "heldout_loss")
    assert_bit_equal(final_state(straight, 6), final_state(broken, 6))

    moved = config(tmp_path / "c", store)
    stopped = maxlm.train(moved, callbacks=[lambda step, _: step == 2]).step
    moved = config(tmp_path / "c", store, mesh={"data": 1, "fsdp": 4, "tensor": 1, "fake_devices": 4})
    maxlm.train(moved)
    np.testing.assert_allclose(list(rows(moved).values())[stopped:], list(rows(straight).values())[stopped:], rtol=1e-5)
    np.testing.assert_allclose(rows(moved, "heldout_loss")[6], rows(straight, "heldout_loss")[6], rtol=1e-5)


@pytest.mark.long
def test_a_run_moves_into_a_pipeline_and_out_of_it(tmp_path, store):
    """Three layers: two stages of two hold one more, which is never run and is left behind."""
    train = {"grad_accum": 2, "seq_len": 48}
    straight = config(tmp_path / "a", store, train=train)
    maxlm.train(straight)
    meshes = ({}, {"data": 1, "stage": 2}, {"data": 1, "fsdp": 1, "tensor": 1, "stage": 3}, {})
    for steps, mesh in zip((1, 3, 5, 6), meshes, strict=True):
        size = {"fake_devices": 3} if mesh.get("stage") == 3 else {}
        moved = config(tmp_path / "b", store, train={**train, "steps": steps}, mesh={**mesh, **size})
        maxlm.train(moved)
    np.testing.assert_allclose(list(rows(moved).values()), list(rows(straight).values()), rtol=1e-5)


@pytest.mark.slow
def test_a_complete_run_says_so_and_a_longer_one_goes_on(tmp_path, store, capsys):
    cfg = config(tmp_path, store, train={"steps": 2})
    path = tmp_path / "c.yaml"
    path.write_text(maxlm.config_file.to_yaml(cfg))
    from maxlm.cli import main

    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().out
    assert "is complete: 2 steps" in said
    assert "train.steps=4" in said
    longer = config(tmp_path, store, train={"steps": 4})
    assert maxlm.train(longer, callbacks=[lambda step, _: step == 3]).status == "stopped"
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert not summary.keys() & {"final", "receipt", "sample"}, "what the end after two steps said is no longer so"
    assert main(["train", str(path), "train.steps=4"]) == 0
    assert sorted(rows(cfg)) == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["final"] and summary["receipt"]
    assert summary["baselines"]["trigram"] < summary["baselines"]["unigram"]
    for name in ("report.html", "loss.png", "config.yaml", "train.log"):
        assert (tmp_path / "r" / name).stat().st_size > 0


def test_a_run_stopped_on_its_last_step_or_killed_before_its_evaluation_is_finished_by_the_next_start(tmp_path, store):
    cfg = config(tmp_path, store, train={"steps": 2})
    assert maxlm.train(cfg, callbacks=[lambda step, _: step == 2]).status == "complete"
    want = json.loads((tmp_path / "r" / "summary.json").read_text())
    (tmp_path / "r" / "summary.json").write_text(json.dumps({**want, "status": "running", "final": {}}))
    result = maxlm.train(cfg)
    assert (result.status, result.final) == ("complete", want["final"])
    assert maxlm.train(cfg).status == "already complete"
    (tmp_path / "r" / "summary.json").write_text("[]")
    rows = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    (tmp_path / "r" / "metrics.jsonl").write_bytes(b"\xff\n" + rows)
    assert maxlm.train(cfg).final == want["final"], "the state is in the checkpoints, not in these"
    assert (tmp_path / "r" / "metrics.damaged.jsonl").read_bytes() == b"\xff\n" + rows


@pytest.mark.slow
def test_a_profile_is_written_when_the_run_ends_or_resumes_inside_its_window(tmp_path, store):
    cfg = config(tmp_path, store, train={"steps": 3, "profile_steps": [2, 3]})
    maxlm.train(cfg, callbacks=[lambda step, _: step == 2])
    maxlm.train(cfg)
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: {**rows, "tokens": rows["tokens"][:4]}, r"tokens is \[4, 32\]"),
        (lambda rows: {**rows, "targets": rows["targets"] + 257}, "model.vocab_size=257"),
        (lambda rows: {**rows, "text": rows["tokens"]}, "text"),
    ],
)
def test_a_data_function_that_gives_something_else_is_one_sentence(tmp_path, store, change, word):
    rows = {"tokens": np.zeros((8, 32), np.int32), "targets": np.zeros((8, 32), np.int32)}
    with pytest.raises(ValueError, match=word):
        maxlm.train(config(tmp_path, store), data=lambda step: change(rows))


@pytest.mark.slow
def test_a_signal_while_data_is_waited_for_saves_and_ends(tmp_path, store):
    cfg, released, good = config(tmp_path, store, checkpoint={"every": 100}), threading.Event(), bad_batches(None)

    def batch(step):
        if step == 4:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
            released.wait(60)
        return good(step)

    result = maxlm.train(cfg, data=batch)
    assert not released.is_set()
    released.set()
    assert (result.status, result.step) == ("stopped", 4)
    straight = config(tmp_path / "straight", store, train={"steps": 4})
    maxlm.train(straight, data=good)
    assert_bit_equal(final_state(cfg, 4), final_state(straight, 4))


def test_data_that_cannot_be_read_any_more_loses_no_step(tmp_path, store):
    rows = {"tokens": np.zeros((8, 32), np.int32), "targets": np.zeros((8, 32), np.int32)}

    def data(step):
        if step == 3:
            raise OSError("the disk with the text is gone")
        return rows

    with pytest.raises(OSError, match="gone"):
        maxlm.train(config(tmp_path, store, checkpoint={"every": 100}), data=data)
    assert Checkpoints(f"{tmp_path}/r", CheckpointConfig()).latest() == 3
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_cooldown_branches_from_a_checkpoint(tmp_path, store):
    base = config(tmp_path, store, checkpoint={"every": 2, "keep_last": 9})
    maxlm.train(base)
    branch = config(
        tmp_path,
        store,
        run={"name": "cooldown"},
        train={"start_from": f"{tmp_path}/r@4"},
        optim={"schedule": {"name": "wsd", "cooldown_steps": 2, "final_fraction": 0.0}},
    )
    maxlm.train(branch)
    assert sorted(rows(branch)) == [5, 6]
    assert rows(branch)[5] == rows(base)[5], "same weights, same batch"
    assert rows(branch, "learning_rate")[6] < rows(base, "learning_rate")[6]
    with pytest.raises(maxlm.ConfigError, match=r"steps \[2, 4, 6\]"):
        maxlm.train(config(tmp_path, store, run={"name": "x"}, train={"start_from": f"{tmp_path}/r@3"}))


@pytest.mark.long
def test_a_run_begins_with_the_parameters_of_another_or_of_a_converted_model(tmp_path, store):
    model, plain = {"vocab_multiple": 128}, {"mesh": {"data": 4, "tensor": 1}}
    base = config(tmp_path, store, model=model)
    maxlm.train(base)
    to_hf(f"{tmp_path}/r", f"{tmp_path}/hf")
    from_hf(f"{tmp_path}/hf", f"{tmp_path}/m")
    begun = []
    for name, place in [("a", f"{tmp_path}/r@6"), ("b", f"{tmp_path}/m")]:
        run = config(tmp_path, store, model=model, run={"name": name}, train={"init_from": place, "steps": 2}, **plain)
        assert maxlm.train(run).step == 2
        begun.append(rows(run))
    assert begun[0] == begun[1], "the same parameters, a new optimizer"
    assert begun[0][1] < rows(base)[1] - 0.1, "not from scratch"
    other = config(tmp_path, store, model={"d_ff": 32}, run={"name": "c"}, train={"init_from": f"{tmp_path}/m"})
    with pytest.raises(CheckpointError, match="do not fit this run: params/embed is "):
        maxlm.train(other)
    turned = {**model, "rope_theta": 500.0}
    maxlm.train(config(tmp_path, store, model=turned, run={"name": "d"}, train={"init_from": f"{tmp_path}/m"}))
    assert "of a model with rope_theta=10000.0" in (tmp_path / "d" / "train.log").read_text()


def test_a_model_to_begin_with_that_is_refused_leaves_no_run(tmp_path, store):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    run = config(tmp_path, store, train={"init_from": f"{tmp_path}/hf"})
    with pytest.raises(maxlm.ConfigError, match="convert it first: maxlm convert from-hf .*/hf FOLDER"):
        maxlm.train(run)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "train.log").write_text("mine\n")
    with pytest.raises(maxlm.ConfigError, match="convert it first"):
        maxlm.train(run)
    assert [p.read_text() for p in (tmp_path / "r").iterdir()] == ["mine\n"]


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"model": {"d_ff": 32}}, "model.d_ff was 28 and is 32"),
        ({"train": {"seed": 1}}, "train.seed was 0 and is 1"),
        ({"train": {"batch_size": 16}}, "train.batch_size was 8 and is 16"),
        ({"data": {"shuffle": False}}, "data.shuffle"),
        ({"optim": {"name": "lion"}}, "optim.name"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(one_run, sections, word):
    folder, store = one_run
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "train.log")}
    with pytest.raises(maxlm.ConfigError, match=word):
        maxlm.train(config(folder.parent, store, **sections))
    assert all(p.read_bytes() == data for p, data in before.items())


def test_a_run_of_before_a_field_was_added_is_the_same_run(one_run):
    folder, store = one_run
    path = folder / "identity.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "model": {k: v for k, v in saved["model"].items() if k != "causal"}}))
    assert maxlm.train(config(folder.parent, store, train={"steps": 2})).status == "already complete"
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("sections", "allowed", "word"),
    [
        ({"train": {"seed": 1}}, ["train.batch_size"], "train.seed was 0 and is 1.*allow_changed=.train.seed"),
        ({"train": {"seed": 1}, "model": {"d_ff": 32}}, ["train.seed"], "another run: model.d_ff was 28 and is 32. G"),
        ({"train": {"seed": 1}}, ["train.sed"], "train.sed is not part .* did you mean train.seed"),
        ({}, ["train.steps"], "train.steps is not part"),
    ],
)
def test_only_what_is_allowed_may_change(one_run, sections, allowed, word):
    folder, store = one_run
    sections = {**sections, "train": {**sections.get("train", {}), "allow_changed": allowed}}
    with pytest.raises(maxlm.ConfigError, match=word):
        maxlm.train(config(folder.parent, store, **sections))


@pytest.mark.slow
def test_a_change_that_is_allowed_is_told_and_becomes_the_run(tmp_path, store, capsys):
    maxlm.train(config(tmp_path, store, train={"steps": 2}))
    train = {"steps": 3, "seed": 1, "batch_size": 16}
    again = config(tmp_path, store, train={**train, "allow_changed": ["train"]}, data={"shuffle": False})
    with pytest.raises(maxlm.ConfigError, match="data.shuffle was true and is false"):
        maxlm.train(again)
    maxlm.train(config(tmp_path, store, train={**train, "allow_changed": ["train.seed", "train.batch_size"]}))
    assert "train.batch_size was 8 and is 16" in capsys.readouterr().err
    assert maxlm.train(config(tmp_path, store, train=train)).status == "already complete"


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, store):
    root = tmp_path_factory.mktemp("one")
    maxlm.train(config(root, store, train={"steps": 2}))
    return root / "r", store


@pytest.mark.slow
def test_what_may_change_does_not_stop_a_resume(one_run):
    folder, store = one_run
    changed = config(
        folder.parent,
        store,
        train={"steps": 3, "grad_accum": 2, "remat": "none"},
        mesh={"data": 1, "fsdp": 4, "tensor": 1, "fake_devices": 4},
        optim={"learning_rate": 1e-3, "ema": 0.9, "clip_norm": None, "weight_decay": 0.0},
        checkpoint={"every": 1},
    )
    result = maxlm.train(changed)
    assert (result.status, result.step) == ("complete", 3)


@pytest.mark.long
def test_a_run_shrinks_and_grows_with_the_devices_that_are_there(tmp_path, store):
    straight = config(tmp_path / "a", store)
    maxlm.train(straight)
    for steps, there in [(2, 8), (4, 3), (6, 7)]:
        mesh = {"data": 2, "fsdp": -1, "tensor": 1, "allowed": [8, 4, 2], "fake_devices": there}
        moved = config(tmp_path / "b", store, train={"steps": steps}, mesh=mesh)
        maxlm.train(moved)
        summary = json.loads((tmp_path / "b" / "r" / "summary.json").read_text())
        assert summary["num_devices"] == {8: 8, 3: 2, 7: 4}[there]
    np.testing.assert_allclose(list(rows(moved).values()), list(rows(straight).values()), rtol=1e-5)


@pytest.mark.slow
def test_lost_manifests_do_not_begin_a_run_anew(tmp_path, store):
    maxlm.train(config(tmp_path, store, train={"steps": 2}))
    (tmp_path / "r" / "checkpoints" / "2" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is complete"):
        maxlm.train(config(tmp_path, store, train={"steps": 3}))
    assert read_metrics(str(tmp_path / "r")).train, "metrics stay"


def bad_batches(cfg, *steps):
    """Batches of random tokens; those of some steps (0-based) have a loss that is not a number."""

    def batch(step):
        tokens = np.random.default_rng(step).integers(0, 257, (8, 33)).astype(np.int32)
        mask = np.full((8, 32), np.nan if step in steps else 1.0, np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}

    return batch


LONG = [pytest.param(optim, marks=pytest.mark.long) for optim in ({"name": "muon"}, {"state_dtype": "int8"})]


@pytest.mark.parametrize("optim", [{"state_on_host": True}, *LONG], ids=str)
def test_a_bad_step_changes_nothing_but_its_count(tmp_path, store, optim):
    for steps in (3, 4):
        cfg = config(tmp_path, store, optim=optim, checkpoint={"every": 1, "keep_last": None}, train={"steps": steps})
        assert maxlm.train(cfg, data=bad_batches(cfg, 2)).status == "complete"
    before, after, later = (final_state(cfg, step) for step in (2, 3, 4))
    assert int(after.pop("step")) == 3 and int(before.pop("step")) == 2
    assert_bit_equal(before, after)
    assert not np.array_equal(after["params"]["embed"], later["params"]["embed"]), "the next one does"
    assert [row["skipped"] for row in read_metrics(str(tmp_path / "r")).train] == [0, 0, 1, 0]
    assert "step 3 has the loss nan" in (text := (tmp_path / "r" / "train.log").read_text())
    assert "the same bits: it is the data or the model" in text


@pytest.mark.slow
def test_a_step_behind_a_bad_one_is_not_lost(tmp_path, store):
    """It was on its way when the bad one was heard of."""
    each, late = (config(tmp_path / name, store, checkpoint={"every": n}) for name, n in (("a", 1), ("b", 100)))
    for cfg in (each, late):
        maxlm.train(cfg, data=bad_batches(cfg, 3))
    assert_bit_equal(final_state(each, 6), final_state(late, 6))
    assert [row["step"] for row in read_metrics(str(tmp_path / "b" / "r")).train] == [1, 2, 3, 4, 5, 6]


def test_a_bad_step_that_is_good_the_second_time_is_told_from_bad_data(tmp_path, store, monkeypatch):
    straight, faulty = (config(tmp_path / name, store) for name in "ab")
    maxlm.train(straight, data=bad_batches(straight))
    compiled = Program.step.func

    def once_wrong(self):
        step, done = compiled(self), []

        def run(state, batch):
            if int(state["step"]) == 2 and not done:
                done.append(True)
                batch = {**batch, "mask": batch["mask"] * np.float32(np.nan)}
            return step(state, batch)

        return run

    broken = cached_property(once_wrong)
    broken.__set_name__(Program, "step")
    monkeypatch.setattr(Program, "step", broken)
    maxlm.train(faulty, data=bad_batches(faulty))
    assert_bit_equal(final_state(straight, 6), final_state(faulty, 6))
    assert "a fault of the hardware" in (text := (tmp_path / "b" / "r" / "train.log").read_text())
    assert "the second counts" in text


@pytest.mark.long
def test_a_spike_is_skipped_and_the_guard_can_be_turned_on_and_off_within_a_run(tmp_path, store):
    def batch(step):
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, 257 if step == 40 else 4, (8, 33)).astype(np.int32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    guarded = config(tmp_path, store, train={"steps": 39, "spike_sigma": 6.0})
    maxlm.train(guarded, data=batch)
    further = config(tmp_path, store, train={"steps": 42, "spike_sigma": 6.0})
    maxlm.train(further, data=batch)
    assert [row["step"] for row in read_metrics(str(tmp_path / "r")).train if row["skipped"]] == [41]
    off = config(tmp_path, store, train={"steps": 43})
    maxlm.train(off, data=batch)
    on = config(tmp_path, store, train={"steps": 44, "spike_sigma": 6.0})
    assert maxlm.train(on, data=batch).step == 44
    assert set(final_state(on, 44)) - set(final_state(off, 43)) == {"recent"}


def test_bad_steps_in_a_row_end_the_run(tmp_path, store):
    cfg = config(tmp_path, store, train={"max_bad_steps": 2, "steps": 9}, checkpoint={"every": 1})
    with pytest.raises(FloatingPointError, match="step 5 is nan, as in the 1 before; the newest.* of step 3"):
        maxlm.train(cfg, data=bad_batches(cfg, 1, 3, 4, 5))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, store):
    cfg = config(tmp_path, store, optim={"learning_rate": 1e30, "clip_norm": None}, checkpoint={"every": 1})
    with pytest.raises(FloatingPointError, match=r"step \d.*learning_rate"):
        maxlm.train(cfg)
    kept = Checkpoints(f"{tmp_path}/r", CheckpointConfig()).latest()
    if kept is not None:  # what is kept is sound: nothing is saved before its loss is known
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(final_state(cfg, kept)["params"]))
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "diverged"


def test_a_model_with_too_few_ids_for_the_store_is_refused(tmp_path, store):
    with pytest.raises(ValueError, match=r"model\.vocab_size=257"):
        maxlm.train(config(tmp_path, store, model={"vocab_size": 200}))


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path, monkeypatch, store):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code, "README.md has no Python example"
    assert len(code[1].strip().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "configs", tmp_path / "configs")
    exec(compile(code[1], "README.md", "exec"), {"__name__": "__main__"})


def user_environment():
    """The environment without what conftest.py set for jax, but that it locks the folder of compiled programs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return own | {"JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size)}


def start(tmp_path, store, *overrides):
    """`maxlm train` as a user starts it."""
    path = tmp_path / "c.yaml"
    path.write_text(
        maxlm.config_file.to_yaml(config(tmp_path, store, train={"steps": 5000}, checkpoint={"every": 4000}))
    )
    command = [sys.executable, "-m", "maxlm", "train", str(path), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(tmp_path, step):
    path = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, store, number):
    process = start(tmp_path, store)
    wait_for(tmp_path, 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Run the same command again" in said
    step = json.loads((tmp_path / "r" / "summary.json").read_text())["step"]
    assert Checkpoints(str(tmp_path / "r"), CheckpointConfig()).latest() == step


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(tmp_path, store):
    process = start(tmp_path, store, "train.batch_size=8192")  # a step of seconds: both come within one
    wait_for(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "lost" in said


@pytest.mark.slow
def test_two_processes_cannot_train_one_folder(tmp_path, store):
    process = start(tmp_path, store)
    wait_for(tmp_path, 1)
    with pytest.raises(maxlm.ConfigError, match=f"process {process.pid}"):
        maxlm.train(config(tmp_path, store))
    process.kill()
    process.communicate()
    assert maxlm.train(config(tmp_path, store, train={"steps": 2})).status == "complete", "a killed run's lock is gone"


@pytest.mark.slow
def test_the_compilation_cache_is_used_by_a_second_start(tmp_path, store):
    cache = tmp_path / "cache"
    cfg = config(tmp_path, store, train={"steps": 1})
    path = tmp_path / "c.yaml"
    path.write_text(maxlm.config_file.to_yaml(cfg))
    for name in ("one", "two"):
        before = sorted(p.name for p in cache.glob("*-cache")) if cache.exists() else []
        command = [
            sys.executable,
            "-m",
            "maxlm",
            "train",
            str(path),
            f"run.name={name}",
            f"train.compilation_cache={cache}",
        ]
        # jax keeps what took a second to compile, which of so small programs hangs on what else the machine does
        own = user_environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=own)
        after = sorted(p.name for p in cache.glob("*-cache"))
        assert after
        assert name == "one" or before == after
