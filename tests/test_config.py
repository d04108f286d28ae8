"""Config files, overrides, and the sentences that bad ones end in."""

import json

import pytest
import yaml

from maxlm.cli import main
from maxlm.config_file import ConfigError, describe_fields, load_config, parse_config, to_yaml

MINIMAL = """
model: {vocab_size: 257, num_layers: 2, d_model: 64, d_ff: 128, num_heads: 4}
data: {stores: [{path: x}]}
train: {steps: 10, batch_size: 8, seq_len: 32}
optim: {learning_rate: 3e-4}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    return tmp_path / "c.yaml"


def test_overrides_and_numbers(path):
    config = load_config(path, ["model.num_layers=4", "data.stores.0.weight=2", "optim.learning_rate=1e-2"])
    assert (config.model.num_layers, config.data.stores[0].weight, config.optim.learning_rate) == (4, 2.0, 0.01)


def test_resolved_config_reads_back_equal(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_a_resolved_config_cannot_change(path):
    with pytest.raises(Exception, match="frozen"):
        setattr(load_config(path).train, "seed", 3)  # noqa: B010


def test_length_by_tokens_is_whole_steps_and_replaces_steps(path):
    config = load_config(path, ["train.tokens=1000"])
    assert config.train.steps is None
    assert config.train.num_steps == 4  # 1000 / (8 * 32), rounded up


def test_every_field_is_documented():
    assert [row[0] for row in describe_fields() if not row[3].endswith(".")] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=3", ["model.num_layer=3", "did you mean model.num_layers?"]),
        ("num_layers=3", ["did you mean model.num_layers?"]),
        ("model.num_layers=x", ["model.num_layers", '"x"', "integer"]),
        ("model.num_heads=5", ["d_model=64", "num_heads=5", "head_dim"]),
        ("model.num_kv_heads=3", ["num_kv_heads=3", "such as 2"]),
        ("model.position=learned", ["max_positions"]),
        ("model.layer_pattern=[local]", ["sliding_window"]),
        ("model.num_experts=4", ["num_experts=4", "experts_per_token"]),
        ("model.experts_per_token=2", ["experts_per_token=2", "num_experts"]),
        ("mesh={expert_dispatch: exchange, expert: 2, fake_devices: 4}", ["expert_dispatch=exchange", "gather"]),
        ("foo.bar=1", ["foo", "no such field", "model"]),
        ("train.steps", ["train.steps", "section.field=value"]),
        ("train.steps.x=3", ["train.steps"]),
        ("train.steps=null", ["steps or tokens"]),
        ("train.grad_accum=3", ["batch_size=8", "grad_accum=3", "grad_accum=2"]),
        ("mesh.fsdp=0", ["fsdp=0"]),
        ("mesh.data=-1", ["data and fsdp"]),
        ("optim.name=adam", ["optim.name", "adam", "adamw"]),
        ("optim.schedule.warmup_steps=11", ["warmup_steps=11", "10 steps"]),
        ("optim.schedule.cooldown_steps=2", ["wsd"]),
        ("data.stores.3.path=x", ["'3'", "below 1"]),
        ("data.stores=[]", ["data.stores"]),
        ("run.name=../x", ["run.name"]),
    ],
)
def test_a_bad_setting_is_one_sentence_and_exit_code_2(path, override, words, capsys):
    assert main(["config", str(path), override]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["experts_per_token=3"], ["experts_per_token=3", "num_experts=2"]),
        (["experts_per_token=1"], ["experts_per_token=1", "router_normalize=false"]),
        (["experts_per_token=2", "num_dense_layers=2"], ["num_dense_layers=2", "num_layers=2"]),
        (["experts_per_token=2", "mlp_bias=true"], ["mlp_bias=true"]),
        (
            ["experts_per_token=2", "num_dense_layers=1", "layer_pattern=[global,local]", "sliding_window=4"],
            ["num_dense_layers=1", "layer_pattern's 2"],
        ),
    ],
)
def test_experts_that_do_not_go_together_are_one_sentence(path, fields, words, capsys):
    assert main(["config", str(path), "model.num_experts=2", *(f"model.{field}" for field in fields)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "nothing"), ("- a", "list"), ("a: [", "YAML"), (MINIMAL + "train: {}\n", "twice")],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, word):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_config(tmp_path / "c.yaml")


def test_a_folder_in_place_of_a_config_is_told_with_what_is_in_it(path):
    with pytest.raises(ConfigError, match=r"is a folder; here are: .*c\.yaml$"):
        load_config(path.parent)


def test_a_missing_file_names_those_that_are_there(path, capsys):
    assert main(["config", str(path.parent / "d.yaml")]) == 2
    assert "c.yaml" in capsys.readouterr().err


def test_config_command_prints_yaml_json_and_fields(path, capsys):
    assert main(["config", str(path)]) == 0
    as_yaml = yaml.safe_load(capsys.readouterr().out)
    assert main(["config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == as_yaml
    assert main(["config", "--fields", "--json"]) == 0
    assert any(row["field"] == "train.seq_len" for row in json.loads(capsys.readouterr().out))
