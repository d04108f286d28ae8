"""Configurations may be anything: a result or one of maxlm's own errors, never a traceback."""

import copy
import datetime
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from fuzz_values import FULL, JSON, MINIMAL, PLAIN, TEXTS, deep, fuzz, mutated, places, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.config_file import ConfigError, load_config, parse_config, read_yaml, to_yaml


def check_config(load):
    """A configuration that is refused, in sentences of bounded length, or that can be written and read again."""
    try:
        config = load()
    except ConfigError as error:
        told(error)
        return
    text = to_yaml(config)
    assert parse_config(read_yaml(text.encode())) == config


def check_file(folder: Path, data: bytes):
    (folder / "c.yaml").write_bytes(data)
    check_config(lambda: load_config(folder / "c.yaml"))


@fuzz(80)
@given(st.binary(max_size=60) | st.text("{}[]:,-?!&*|>'\"#%@` \n\t019.+_eExob~<=a", max_size=40).map(str.encode))
@example(b"? [a]\n: 1")
@example(b"? {a: b}\n: 1")
@example(b"model: !!map x")
@example(b"a: 0b_")
@example(b"a: ._")
@example(b"a: 2001-99-99")
@example(b"a: !!int x")
@example(b"a: !!float x")
@example(b"a: !!bool x")
@example(b"a: !!timestamp x")
@example(b"a: !!binary \xc3\xa4")
@example(b"a: " + b"9" * 5000)
@example(b"a: " + b"1" * 100_000 + b"x")
@example(b"a: 0x" + b"f" * 5000)
@example(b"a: &a [*a]")
@example(b"a: &a {b: *a}")
@example(b"a: &a {<<: *a}")
@example(b'run: {root: "a\\0b"}\n' + MINIMAL.encode())
@example(b"- a: 1\n- b")
@example(b"x" * 100_000 + b": 1")
@example(b"".join(b"key_%d: 1\n" % i for i in range(1_000)))
@example(b"#" * 100_000)
@example(b"#" * 200_000)
@example(b"'" + b"\n" * 200_000)
@example(b"".join(b" " * i + b"a:\n" for i in range(600)))
@example(deep("[", "]").encode())
@example(deep("{a: ", "}").encode())
def test_a_config_file_may_hold_any_bytes(tmp_path, data):
    check_file(tmp_path, data)


@pytest.mark.parametrize("key", ["model", "data", "x"])
@pytest.mark.parametrize(
    "inner",
    ["[*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]", "{{<<: [*{0}, *{0}, *{0}, *{0}]}}"],
    ids=["list", "merge"],
)
def test_a_config_file_cannot_swell(tmp_path, key, inner):
    """Each name stands for several of the one before."""
    lines = ["a0: &n0 {k: v}", *(f"a{i + 1}: &n{i + 1} {inner.format(f'n{i}')}" for i in range(30)), f"{key}: *n30"]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases"):
        load_config(tmp_path / "c.yaml")


def test_a_config_file_may_have_aliases(tmp_path):
    (tmp_path / "c.yaml").write_text(MINIMAL + "optim: {beta1: &b 0.5, beta2: *b}")
    assert load_config(tmp_path / "c.yaml").optim.beta2 == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{0}]",
        "!!python/object/new:os.mkdir [{0}]",
        "!!python/name:os.mkdir {0}",
        "!!python/module:antigravity {0}",
        "!!python/object/apply:subprocess.check_call [[mkdir, {0}]]",
    ],
)
def test_nothing_in_a_config_is_executed(tmp_path, text):
    text = text.format(tmp_path / "made")
    (tmp_path / "c.yaml").write_text(f"{MINIMAL}\nrun: {text}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError):
        parse_config(yaml.safe_load(MINIMAL), [f"run.name={text}"])
    assert os.listdir(tmp_path) == ["c.yaml"]
    assert "antigravity" not in sys.modules


YAML = st.recursive(
    PLAIN | st.dates() | st.binary(max_size=4) | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(PLAIN | st.dates() | st.binary(max_size=4) | st.tuples(PLAIN), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz(80)
@given(YAML | st.dictionaries(st.sampled_from(list(FULL)), YAML, min_size=3))
def test_a_config_file_may_hold_any_structure(tmp_path, tree):
    check_file(tmp_path, yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


@fuzz(120)
@given(mutated(FULL, JSON | st.dates() | st.binary(max_size=4)))
@example({**FULL, "train": {**FULL["train"], "steps": None, "tokens": 10**400}})
@example({**FULL, "train": {**FULL["train"], "batch_size": 10**18 + 9, "grad_accum": 10**17}})
@example({**FULL, "model": {**FULL["model"], "num_heads": 2**61 - 1, "num_kv_heads": 2**60}})
@example({**FULL, "run": {"name": {datetime.date(2001, 1, 1): 1}}})
@example({**FULL, "mesh": {**FULL["mesh"], "data": 2**200}})
@example({**FULL, "optim": {**FULL["optim"], "learning_rate": float("inf")}})
@example({**FULL, "quant": {**FULL["quant"], "rules": {"a{99999999999999999999}": "int8", "(" * 5000: "int8"}}})
def test_one_value_of_a_config_may_be_anything(tmp_path, tree):
    check_config(lambda: parse_config(copy.deepcopy(tree)))
    check_file(tmp_path, yaml.dump(tree).encode("utf-8", "surrogatepass"))


@fuzz(100)
@given(
    st.lists(
        st.text("abc.=[]{}0²-\0", max_size=12)
        | st.tuples(
            st.sampled_from([".".join(map(str, path)) for path in places(FULL)])
            | TEXTS
            | st.sampled_from(["train.steps.x", "data.stores.²", "data.stores.9", "data.stores.-1", "run..name", "."]),
            TEXTS | JSON.map(lambda value: json.dumps(value)[:200]),
        ).map("=".join),
        max_size=3,
    )
)
@example(["data.stores.²=1"])
@example(["data.stores." + "9" * 5000 + "=1"])
@example(["train.steps=" + "9" * 5000])
@example(["train.steps=" + deep("[", "]")])
@example(["train=[]", "train.steps=3"])
@example(["." * 5000 + "=1"])
@example(["train.steps=!!int x"])
def test_overrides_may_be_anything(overrides):
    check_config(lambda: parse_config(yaml.safe_load(MINIMAL), overrides))
