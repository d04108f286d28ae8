"""A model's config.json and a converted checkpoint may be anything: a result or one sentence, never a traceback."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
from fuzz_values import DEEP_JSON, cut_or_changed, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.cli import main
from maxlm.convert.families import FAMILIES, FamilyError, family_of
from maxlm.convert.from_hf import from_hf
from maxlm.convert.mapping import entries
from maxlm.convert.safetensors_writer import Writer

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {**ROPE, "original_max_position_embeddings": 20, "rope_theta": 1e4},
}


@fuzz(300)
@given(mutated(CONFIG), st.sampled_from(sorted(FAMILIES)))
def test_a_config_may_say_anything(tree, name):
    if tree.get("model_type") == "llama":
        tree["model_type"] = name
    try:
        family = family_of(tree)
        model = family.read_config(tree)
        with contextlib.suppress(FamilyError):
            assert family.read_config(family.write_config(model)).d_model == model.d_model
    except FamilyError as error:
        told(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "hf"
    path.mkdir()
    wanted = entries(FAMILIES["llama"], FAMILIES["llama"].read_config(CONFIG))
    with Writer(str(path), {e.name: (np.dtype(np.float32), e.shape) for e in wanted}) as writer:
        for entry in wanted:
            writer.write(entry.name, np.ones(entry.shape, np.float32))
    return path


@fuzz(60)
@given(mutated(CONFIG).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(json.dumps(CONFIG).encode()))
@example(DEEP_JSON[0])
@example(DEEP_JSON[1])
@example(json.dumps({**CONFIG, "num_hidden_layers": 2**62}).encode())
@example(json.dumps({**CONFIG, "head_dim": 2**62}).encode())
@example(json.dumps({**CONFIG, "num_key_value_heads": 2**40, "num_attention_heads": 2**40}).encode())
def test_a_folder_is_converted_or_nothing_is_left(folder, data):
    (folder / "config.json").write_bytes(data)
    out = folder.parent / "out"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(["convert", "from-hf", str(folder), str(out)])
    if code == 0:
        os.rename(out, folder.parent / f"whole{len(os.listdir(folder.parent))}")
    else:
        assert "error: " in errors.getvalue()
    assert all(name == "hf" or name.startswith("whole") for name in os.listdir(folder.parent))


@fuzz(60)
@given(st.data())
def test_files_of_a_converted_model_may_be_changed(folder, data):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    run, out = folder.parent / "run", folder.parent / "whole-back"
    if not run.exists():
        from_hf(str(folder), str(run))
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size)
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    file.write_bytes(data.draw(cut_or_changed(before)))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(["convert", "to-hf", str(run), str(out)])
        assert code == 0 or "error: " in errors.getvalue()
        assert out.exists() == (code == 0)
    finally:
        file.write_bytes(before)
        if out.exists():
            os.rename(out, folder.parent / f"whole-back{len(os.listdir(folder.parent))}")
