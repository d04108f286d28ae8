"""maxlm bench: measured on fake devices."""

import json

import jax
import numpy as np
import pytest

from maxlm import bench_quant
from maxlm.bench_quant import gathered_bytes
from maxlm.cli import main
from maxlm.cost import top_operations, words
from maxlm.hlo import sources

MODEL = "vocab_size=512 num_layers=2 d_model=128 d_ff=256 num_heads=4".split()
SETTINGS = [f"model.{field}" for field in MODEL] + ["train.seq_len=128", "train.batch_size=8", "mesh.tensor=2"]


@pytest.fixture
def config(tmp_path):
    jax.devices()  # the tests' eight, before a command makes as many as it wants
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{stores: [{{path: {tmp_path}/none}}]}}\ntrain: {{steps: 1, batch_size: 1, seq_len: 1}}\n")
    return str(path)


def bench(capsys, *arguments):
    code = main(["bench", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_measures_the_step_without_data(config, capsys, tmp_path):
    code, result = bench(
        capsys,
        config,
        *SETTINGS,
        "--steps",
        "3",
        "--trace",
        str(tmp_path / "trace"),
        "--top",
        "50",
        "mesh.fake_devices=4",
    )
    assert code == 0
    assert result["num_devices"] == 4
    assert len(result["step_times_s"]) == 3
    assert sorted(result["step_times_s"])[1] == result["step_time_s"] > 0
    assert result["tokens_per_s_per_device"] == pytest.approx(8 * 128 / 4 / result["step_time_s"])
    assert result["first_step_s"] > result["compile_s"] > 0
    assert abs(result["loss"] - 6.24) < 0.5, "log(512), of random tokens"
    assert result["matmul_flops"] > 1.2 * result["model_flops"] / 2, "layers run twice"
    assert {row["axes"] for row in result["collectives"]} >= {"fsdp", "tensor"}
    assert result["arguments_bytes"] > result["state_bytes"] > 0
    assert result["mfu"] is None
    assert result["cycles"] is None
    seen = " ".join(row["place"] for row in result["places"])
    assert all(word in seen for word in ("mlp", "attention", "head", "optimizer", "(backward)", "(forward)")), seen
    assert sum(row["share"] for row in result["places"]) <= 1.0001
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--steps", "0"], "counts from 1"), (["mesh.tensor=3"], "tensor")],
)
def test_refuses_with_a_sentence(config, capsys, arguments, sentence):
    assert main(["bench", config, *SETTINGS, "mesh.fake_devices=4", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_settings_may_stand_behind_options_but_nothing_else(config, capsys):
    with pytest.raises(SystemExit):
        main(["bench", config, "--steps", "2", "nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err


def test_operations_are_named_in_the_words_of_the_model():
    backward = "jit(_step)/transpose(jvp())/while/body/closed_call/checkpoint/mlp/BTD,DF->BTF/dot_general"
    assert words(backward) == "mlp BTD,DF->BTF (backward)"
    assert words(backward.replace("mlp", "rematted_computation/mlp")) == "mlp BTD,DF->BTF (recomputed)"
    assert words("jit(_step)/jvp(head)/reduce_max") == "head reduce_max (forward)"
    assert words("jit(_step)/optimizer/mul") == "optimizer mul"
    top = top_operations([(backward, 3.0), ("jit(_step)/optimizer/mul", 1.0), (backward, 1.0)], 1)
    assert top == [{"place": "mlp BTD,DF->BTF (backward)", "cost": 4.0, "share": 0.8}]


def test_sources_of_a_program():
    text = '  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(f)/mlp/add"}\n'
    assert sources(text + "  ROOT %b = f32[] add()") == {"fusion.1": "jit(f)/mlp/add"}


@pytest.mark.long
def test_products_in_each_type_side_by_side(config, capsys):
    arguments = [config, *SETTINGS, "--quant", "--steps", "2", "mesh.fake_devices=4"]
    code, result = bench(capsys, *arguments)
    assert code == 0
    assert set(result) == {"bf16", "int8", "fp8"}
    gathered = {kind: gathered_bytes(found) for kind, found in result.items()}
    assert gathered["int8"] < 0.6 * gathered["bf16"]
    losses = [found["loss"] for found in result.values()]
    assert len(set(losses)) == 3
    assert np.ptp(losses) < 0.05
    text = bench_quant.show(result)
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["bf16", "int8", "fp8"]


def test_quant_does_not_trace(config, capsys):
    assert main(["bench", config, *SETTINGS, "--quant", "--profile"]) == 2
    assert "--quant" in capsys.readouterr().err
