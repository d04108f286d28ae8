"""What maxlm reads may be anything: every file ends in a result or in one of its own errors, never in a traceback.

Examples are drawn the same way each time (derandomize); what a search once found stands among the examples by name.
"""

import contextlib
import copy
import datetime
import gzip
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from maxlm import manifest
from maxlm.cli import main
from maxlm.config import LogConfig
from maxlm.config_file import ConfigError, load_config, parse_config, read_yaml, to_yaml
from maxlm.data import sources
from maxlm.data.build import build_store
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore
from maxlm.data.tokenizer import load_tokenizer, train_bpe
from maxlm.manifest import CheckpointError, Manifest
from maxlm.metrics import MetricsWriter, read_metrics
from maxlm.report import report_data, text_summary, write_report
from maxlm.run_folder import RunFolder, identity
from maxlm.storage import StorageError

MINIMAL = """
model: {vocab_size: 257, num_layers: 2, d_model: 64, d_ff: 128, num_heads: 4}
data: {stores: [{path: x}]}
train: {steps: 10, batch_size: 8, seq_len: 32}
"""
FULL = parse_config(yaml.safe_load(MINIMAL)).model_dump(mode="json")
DEEP = 3_000


def fuzz(count, **options):
    """Settings of a test: the same examples each time, and how many."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=checks, **options
    )


# ---- values

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a/../../x", "a\0b", "\u2028", "²", "9" * 5000, "gs://", "\x1b[2J", "%s{}"]
)
NUMBERS = st.sampled_from(
    [
        -1,
        0,
        1,
        2,
        3,
        2**31,
        2**60,
        2**63,
        -(2**63),
        10**400,
        0.5,
        -0.5,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ]
)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def places(tree, path=()):
    """Paths of all values inside a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, tree, values=JSON):
    """The tree with one or two things in it replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(tree))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        holder = tree
        for part in above:
            holder = holder[part]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add", "wrap"])):
            case "replace":
                holder[key] = draw(values)
            case "remove":
                del holder[key]
            case "wrap":
                holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, [holder[key]] * 2]))
            case _ if isinstance(holder, list):
                holder.insert(key, draw(values))
            case "rename":
                holder[draw(TEXTS)] = holder.pop(key)
            case "add":
                holder[draw(TEXTS)] = draw(values)
    return tree


def told(error: Exception, *words: str) -> None:
    """Checks what a refusal says: something, no screenful, and what it is about."""
    text = str(error)
    assert 0 < len(text) < 20_000
    assert all(word in text for word in words)


def deep(opening: str, closing: str, count: int = DEEP) -> str:
    return opening * count + closing * count


def cut_or_changed(data: bytes):
    """Bytes of a file that ends early, has one other byte, or more at its end."""
    places = st.integers(0, len(data) - 1)
    return (
        places.map(lambda at: data[:at])
        | st.tuples(places, st.integers(1, 255)).map(
            lambda c: data[: c[0]] + bytes([data[c[0]] ^ c[1]]) + data[c[0] + 1 :]
        )
        | st.binary(min_size=1, max_size=40).map(lambda tail: data + tail)
    )


# ---- configurations


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


# ---- checkpoints

OPENED: list[str] | None = None


def _note(event, args):
    if event == "open" and OPENED is not None and isinstance(args[0], str | bytes):
        OPENED.append(os.path.realpath(os.fsdecode(args[0])))


@pytest.fixture(scope="module")
def opened():
    """A context manager that gives the paths that are opened inside it."""
    sys.addaudithook(_note)

    @contextlib.contextmanager
    def recorded():
        global OPENED
        OPENED = []
        try:
            yield OPENED
        finally:
            OPENED = None

    return recorded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "7"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a").write_bytes(b"abc")
    (folder / "b").write_bytes(b"")
    (folder.parent / "outside").write_bytes(b"abc")
    files = manifest.hash_files(str(folder), manifest.saved_files(str(folder)))
    arrays = {"params/w": manifest.ArrayRecord("float32", (2, 3), "00")}
    Manifest(step=7, files=files, arrays=arrays, run={"model": {"d_model": 3}}, versions={"jax": "1"}).write(
        str(folder)
    )
    return folder


def signed(body: str) -> bytes:
    """A manifest's file around any text, with the hash of it."""
    return f'{{"manifest": {body},\n"blake3": "{blake3(body.encode()).hexdigest()}"}}\n'.encode()


GOOD_FILE = ["d/a", [3, blake3(b"abc").hexdigest()]]
RECORD = {
    "format": 1,
    "step": 7,
    "temporary": False,
    "files": {GOOD_FILE[0]: GOOD_FILE[1]},
    "arrays": {"params/w": ["float32", [2, 3], "00"]},
    "run": {"model": {"d_model": 3}},
    "versions": {"jax": "1"},
}


def check_manifest(folder: Path, opened):
    """A manifest that is refused, or names files in its folder alone."""
    with opened() as paths:
        try:
            known = Manifest.read(str(folder))
            manifest.check_files(str(folder), known)
            manifest.check_arrays(known, {"params/w": "00"})
        except (CheckpointError, StorageError) as error:
            told(error)
    assert [path for path in paths if not path.startswith(f"{os.path.realpath(folder)}{os.sep}")] == []


@fuzz(60)
@given(
    st.binary(max_size=60) | st.text('{}"manifest: ,\n').map(str.encode) | cut_or_changed(signed(json.dumps(RECORD)))
)
@example(signed(deep('{"a":', "}")))
@example(signed(deep("{", "}")))
@example(signed('{"format": ' + "9" * 5000 + "}"))
@example(signed("{}"))
@example(signed('{"a": "\\ud800"}'))
def test_a_checkpoint_manifest_may_hold_any_bytes(checkpoint, opened, data):
    (checkpoint / manifest.NAME).write_bytes(data)
    check_manifest(checkpoint, opened)


@fuzz(250)
@given(mutated(RECORD))
@example({**RECORD, "files": {"../outside": GOOD_FILE[1]}})
@example({**RECORD, "files": {"d/../../outside": GOOD_FILE[1]}})
@example({**RECORD, "files": {"/etc/passwd": GOOD_FILE[1]}})
@example({**RECORD, "files": {"a\0b": GOOD_FILE[1]}})
@example({**RECORD, "files": {"": GOOD_FILE[1]}})
@example({**RECORD, "files": {"x" * 300: GOOD_FILE[1]}})
@example({**RECORD, "files": {"b": [-1, GOOD_FILE[1][1]]}})
@example({**RECORD, "files": {"b": [2**200, GOOD_FILE[1][1]]}})
def test_a_checkpoint_manifest_with_a_right_hash_may_hold_anything(checkpoint, opened, record):
    (checkpoint / manifest.NAME).write_bytes(signed(json.dumps(record)))
    check_manifest(checkpoint, opened)


@pytest.mark.parametrize("name", ["../outside", "d/../../outside", "{0}/outside", "", ".", "d/./a", "d//a", "a\0b"])
def test_a_checkpoint_manifest_names_files_in_its_folder(checkpoint, name):
    name = name.format(checkpoint.parent)
    (checkpoint / manifest.NAME).write_bytes(signed(json.dumps({**RECORD, "files": {name: GOOD_FILE[1]}})))
    with pytest.raises(manifest.DamagedError, match=r"MANIFEST\.json"):
        Manifest.read(str(checkpoint))


# ---- token stores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store with a tokenizer of its own, and its manifest."""
    folder = tmp_path_factory.mktemp("store")
    texts = [f"a text about number {i}, and another about {i * i}" for i in range(60)]
    (folder / "tokenizer.json").write_bytes(train_bpe(texts, 300))
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    build_store([str(folder)], str(folder / "s"), str(folder / "tokenizer.json"), heldout=0.3)
    shutil.copy(folder / "tokenizer.json", folder / "outside.json")
    return folder / "s", json.loads((folder / "s" / "manifest.json").read_bytes())


def check_store(folder: Path, opened):
    """A store that is refused, or can be read from end to end."""
    inside = f"{os.path.realpath(folder)}{os.sep}"
    with opened() as paths:
        try:
            with contextlib.closing(TokenStore(str(folder))) as tokens:
                for split in SPLITS:
                    assert len(tokens.read(split, 0, tokens.num_tokens(split))) == tokens.num_tokens(split) >= 0
                    tokens.verify(split)
                assert 0 <= tokens.eos_id < tokens.vocab_size
                tokens.tokenizer()
        except (DataError, StorageError) as error:
            told(error)
    assert [path for path in paths if str(folder.parent) in path and not path.startswith(inside)] == []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["data", "info", str(folder)]) in (0, 1, 2)


@fuzz(120)
@given(st.data())
def test_a_token_store_manifest_may_hold_anything(store, opened, data):
    folder, known = store
    whole = json.dumps(known).encode()
    text = data.draw(mutated(known).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(whole))
    (folder / "manifest.json").write_bytes(text)
    check_store(folder, opened)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("splits.train.shards.0.name", "../0.txt"),
        ("splits.train.shards.0.name", "/etc/passwd"),
        ("splits.train.shards.0.name", ""),
        ("splits.train.shards.0.num_bytes", -1),
        ("splits.train.shards", []),
        ("splits.train.num_tokens", 2**60),
        ("splits.train.num_tokens", -5),
        ("splits.train.num_tokens", float("nan")),
        ("splits.train.num_tokens", True),
        ("splits.train", None),
        ("splits", {}),
        ("dtype", "O"),
        ("dtype", "uint32"),
        ("format", True),
        ("sources", None),
        ("options", {}),
        ("tokenizer.file", "../outside.json"),
        ("tokenizer.vocab_size", 2**40),
        ("tokenizer.eos_id", -1),
        ("tokenizer.kind", "pickle"),
    ],
)
def test_a_token_store_that_does_not_agree_with_itself_is_refused(store, path, value):
    folder, known = store
    known = holder = copy.deepcopy(known)
    *above, key = path.split(".")
    for part in above:
        holder = holder[int(part) if part.isdigit() else part]
    holder[int(key) if key.isdigit() else key] = value
    (folder / "manifest.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match=str(folder)):
        TokenStore(str(folder))


@pytest.mark.parametrize(
    "text",
    [deep("[", "]"), deep('{"a":', "}"), "9" * 5000, '{"format": 1}', "\ud800", "[]", ""],
    ids=["deep list", "deep map", "huge", "format alone", "surrogate", "list", "empty"],
)
def test_a_token_store_manifest_that_is_none(store, text):
    folder, _ = store
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenStore(str(folder))


# ---- run folders

SUMMARY = {
    "status": "complete",
    "step": 2,
    "params": 1000,
    "flops_per_token": 6000.0,
    "peak_flops": None,
    "mesh": {"data": 2, "fsdp": 4},
    "num_devices": 8,
    "device_kind": "cpu",
    "bytes_per_device": 3 * 2**20,
    "advice": None,
    "first_step_s": 9.0,
    "wall_s": 75.0,
    "checkpoint": "runs/a/checkpoints/2",
    "final": {"train_loss": 2.0, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.5},
    "baselines": {"unigram": 2.75, "trigram": 1.5},
    "prompt": "Once",
    "sample": "upon a time",
}
ROWS = [
    {"step": 1, "loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_s": 9.0, "step_time_s": 9, "time": 1},
    {"step": 1, "restart": True, "time": 2.0},
    {"step": 2, "loss": None, "grad_norm": 0.5, "tokens_per_s": 9.0, "step_time_s": 1, "mfu": 0.1, "time": 3.0},
    {"step": 2, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.25, "time": 4.0},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = {"config.yaml": to_yaml(parse_config(yaml.safe_load(MINIMAL))).encode(), "metrics.jsonl": lines(ROWS)}
GOOD |= {"summary.json": json.dumps(SUMMARY).encode(), "identity.json": b"{}"}
DEEP_JSON = [deep("[", "]").encode(), deep('{"a":', "}").encode(), deep("[", "]", 150).encode()]
RUN_FILES = (
    st.tuples(
        st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json"]),
        st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()) | st.sampled_from(DEEP_JSON),
    )
    | mutated(SUMMARY).map(lambda tree: ("summary.json", json.dumps(tree).encode()))
    | mutated(ROWS).map(lambda rows: ("metrics.jsonl", lines(rows)))
    | mutated(FULL).map(lambda tree: ("config.yaml", yaml.safe_dump(tree).encode("utf-8", "surrogatepass")))
)


def run_with(folder: Path, name: str, data: bytes) -> str:
    for other, good in GOOD.items():
        (folder / other).write_bytes(data if other == name else good)
    return str(folder)


@fuzz(100)
@given(RUN_FILES)
@example(("summary.json", b"[]"))
@example(("summary.json", b'{"step": "1", "status": 3}'))
@example(("summary.json", json.dumps({**SUMMARY, "params": 10**400}).encode()))
@example(("summary.json", json.dumps({**SUMMARY, "mesh": [2]}).encode()))
@example(("metrics.jsonl", b'{"step": Infinity}\n{"step": 1}\n'))
@example(("metrics.jsonl", lines([{"step": "1", "loss": 1.0}])))
@example(("metrics.jsonl", lines([{"step": 1, "loss": "x"}])))
@example(("metrics.jsonl", lines([{"step": 1, "loss": 10**400}] * 2)))
@example(("metrics.jsonl", lines([{"step": 1, "heldout_loss": []}])))
@example(("config.yaml", b"run: [a]"))
@example(("config.yaml", b"run: {name: [a]}"))
@example(("config.yaml", b"train: [a]"))
@example(("config.yaml", b"train: {batch_size: aaaaaaaaaa, seq_len: 1000000000}"))
@example(("config.yaml", b"train: {steps: x, tokens: y}"))
@example(("config.yaml", b"model: 3\ntrain: 3"))
@example(("config.yaml", b"a: 2001-99-99"))
@example(("config.yaml", b"? [a]\n: 1"))
def test_a_report_of_any_run_folder(tmp_path, file):
    run = run_with(tmp_path, *file)
    try:
        assert text_summary(run).encode()
        assert json.dumps(report_data([run]))
    except ValueError as error:
        told(error, file[0])


@fuzz(3)
@given(
    mutated(SUMMARY).map(lambda tree: ("summary.json", json.dumps(tree).encode()))
    | mutated(ROWS, NUMBERS).map(lambda rows: ("metrics.jsonl", lines(rows)))
    | mutated(FULL).map(lambda tree: ("config.yaml", yaml.safe_dump(tree).encode("utf-8", "surrogatepass")))
)
@example(("metrics.jsonl", lines([{"step": s, "loss": 1e308} for s in range(3)])))
@example(("metrics.jsonl", lines([{"step": 2**62, "loss": -1e308}, {"step": 0, "loss": 1e308}])))
@example(("summary.json", json.dumps({**SUMMARY, "baselines": {"a": -1e308, "b": float("inf")}}).encode()))
def test_a_drawn_report_of_any_run_folder(tmp_path, file):
    run = run_with(tmp_path, *file)
    try:
        write_report([run])
    except ValueError as error:
        told(error, file[0])


@fuzz(100)
@given(
    st.binary(max_size=60) | mutated(SUMMARY).map(lambda tree: json.dumps(tree).encode()) | st.sampled_from(DEEP_JSON)
)
@example(b"[]")
@example(b'{"status": "complete", "step": 10}')
def test_a_resume_reads_any_summary(tmp_path, data):
    config = parse_config(yaml.safe_load(MINIMAL), [f"run.root={tmp_path}"])
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "summary.json").write_bytes(data)
    found = RunFolder(config).read_summary()
    assert isinstance(found.get("wall_s", 0.0) + 1.0, float)
    assert all(f"{value:.4f}" for value in found.get("final", {}).values())
    RunFolder(config).write_summary({**found, "step": 3})


@fuzz(100)
@given(
    st.binary(max_size=60)
    | mutated({"model": {"a": 1}, "data": {}, "train": {"seed": 0}}).map(lambda tree: json.dumps(tree).encode())
    | st.sampled_from(DEEP_JSON)
)
@example(b"[]")
@example(b"9" * 5000)
@example(b'{"model": "\\ud800"}')
def test_a_resume_with_any_identity(tmp_path, data):
    config = parse_config(yaml.safe_load(MINIMAL), [f"run.root={tmp_path}"])
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "identity.json").write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()):
        for allowed in ((), ("model", "data", "train", "optim")):
            with contextlib.suppress(ConfigError):
                RunFolder(config).check(identity(config, {"stores": []}), allowed)


@fuzz(60)
@given(st.lists(st.binary(max_size=30) | mutated(ROWS).map(lines), max_size=4).map(b"\n".join))
@example(b"garbage\n" + lines(ROWS))
@example(b"\0" * 4096 + b"\n" + lines(ROWS))
@example(lines([{"step": "2", "loss": 1.0}, *ROWS]))
@example(lines([{"step": 1, "loss": 10**400}, *ROWS]))
def test_a_resume_with_any_metrics(tmp_path, data):
    """Metrics are a record: what is no row is left out, and kept beside, and the run goes on."""
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with MetricsWriter(str(tmp_path), LogConfig(), {}, resume_step=2) as writer:
        writer.train(3, {"loss": 1.0})
    read = read_metrics(str(tmp_path))
    assert read.train[-1]["step"] == 3
    assert read.restarts[-1] == 2


# ---- text and tokenizers


def read_text(path: Path) -> None:
    """Text that is refused, or whose documents can be encoded."""
    try:
        (source,) = sources.expand([str(path)])
        for document in sources.read_documents(source):
            assert document.text.encode()
            assert document.replaced_bytes >= 0
    except (DataError, StorageError) as error:
        told(error)


JSONL = b"".join(json.dumps({"text": f"document {i}", "n": i}).encode() + b"\n" for i in range(200))
PACKED = {".gz": gzip.compress(JSONL, mtime=0), ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)}


@fuzz(250)
@given(
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"]).flatmap(
        lambda name: st.tuples(
            st.just(name), st.binary(max_size=40) | cut_or_changed(PACKED.get(Path(name).suffix, JSONL[:200]))
        )
    )
    | st.tuples(st.just("a.jsonl"), JSON.map(lambda value: json.dumps(value).encode()))
)
@example(("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}"))
@example(("a.jsonl", deep('{"text": [', "]}").encode()))
@example(("a.jsonl", deep("[", "]", 950).encode()))
@example(("a.jsonl", json.dumps({f"key {i}": i for i in range(50_000)}).encode()))
@example(("a.jsonl", b'{"text": "a\\ud800b"}'))
@example(("a.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1"))
def test_text_may_hold_any_bytes(tmp_path, file):
    name, data = file
    (tmp_path / name).write_bytes(data)
    read_text(tmp_path / name)


@pytest.mark.parametrize("ending", PACKED)
def test_packed_text_that_is_cut_is_damaged(tmp_path, ending):
    """Half a file must not pass for a whole one."""
    for size in (len(PACKED[ending]) // 2, len(PACKED[ending]) - 1):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(PACKED[ending][:size])
        with pytest.raises(DataError, match="damaged after line"):
            list(sources.read_documents(*sources.expand([str(path)])))


def test_zstd_frames_of_all_kinds_are_whole(tmp_path):
    """Sized or not, with a checksum or without, of one repeated byte, empty, skippable: as pzstd and cat make them."""
    same = b'{"text": "' + b"a" * 500_000 + b'"}\n'
    unsized = zstandard.ZstdCompressor(write_content_size=False, write_checksum=False)
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    frames = [
        skipped,
        unsized.compress(same),
        PACKED[".zst"],
        zstandard.compress(b""),
        zstandard.compress(same),
        skipped,
    ]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    documents = list(sources.read_documents(*sources.expand([str(tmp_path / "a.jsonl.zst")])))
    assert len(documents) == 202


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_beyond_the_limit_is_refused(tmp_path, ending):
    """A small file may unpack to a line that no memory holds."""
    path, size = tmp_path / f"a.jsonl{ending}", sources.MAX_JSON_BYTES + 1000
    opened = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[ending]
    with opened(path, "wb") as file:
        file.write(b'{"text": "fine"}\n{"text": "')
        for _ in range(size >> 16):
            file.write(b"a" * (1 << 16))
        file.write(b'a"}\n')
    documents = sources.read_documents(*sources.expand([str(path)]))
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=rf"line 2 is longer than {sources.MAX_JSON_BYTES:,} bytes"):
        next(documents)


@pytest.fixture(scope="module")
def tokenizer_json():
    return train_bpe(["some text to learn from, and some more of it"] * 3, 270)


@fuzz(150)
@given(st.data())
def test_a_tokenizer_file_may_hold_anything(tmp_path, tokenizer_json, data):
    known = json.loads(tokenizer_json)
    known["model"]["vocab"] = {**dict(list(known["model"]["vocab"].items())[:3]), "<|endoftext|>": 3}
    known["model"]["merges"] = known["model"]["merges"][:2]
    content = data.draw(
        st.binary(max_size=40)
        | cut_or_changed(tokenizer_json)
        | mutated(known).map(lambda tree: json.dumps(tree).encode())
        | st.sampled_from([b"{" + x for x in DEEP_JSON])
    )
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    try:
        loaded = load_tokenizer(str(path))
    except ValueError as error:
        told(error, str(path))
        return
    assert 0 <= loaded.eos_id < loaded.vocab_size
    for ids in loaded.encode_batch(["some text", ""]):
        loaded.decode(ids)
