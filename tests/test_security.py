"""What must not happen: code that runs what it reads, folders that others can look into, secrets in what is written."""

import ast
import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from maxlm import doctor, places, storage
from maxlm.cli import main
from maxlm.config_file import ConfigError, parse_config, to_yaml
from maxlm.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "maxlm").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""What they read can run code."""
BUILTINS = {"eval", "exec", "compile"}
YAML = {"safe_load", "safe_load_all", "SafeLoader", "CSafeLoader", "dump", "safe_dump", "SafeDumper", "YAMLError"}
"""Names of yaml that read plain values or nothing; and the classes of its nodes."""
KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def dangers(tree: ast.AST):
    """(line, what) of all that could run what a file or a user holds."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Import(names=names):
                yield from ((line, name.name) for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield line, module
                wanted = {"yaml": YAML}.get(module)
                yield from ((line, f"yaml.{n.name}") for n in names if wanted is not None and n.name not in wanted)
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield line, name
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name not in YAML and not name.endswith("Node"):
                yield line, f"yaml.{name}"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield line, "torch.load"
            case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen"):
                yield line, "os.system"
            case ast.Call(func=ast.Attribute(attr="extractall" | "extract" as name), keywords=keywords):
                if not any(k.arg == "filter" and getattr(k.value, "value", "") == "data" for k in keywords):
                    yield line, f"{name} without filter='data'"
            case ast.keyword(arg=str(name), value=value) if name in KEYWORDS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield line, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    assert list(dangers(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import load",
        "import yaml; yaml.load(f, yaml.SafeLoader)",
        "import yaml; yaml.unsafe_load(f)",
        "from yaml import load",
        "class L(yaml.FullLoader): pass",
        "eval(x)",
        "def f(): exec(x)",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "tarfile.open(x).extractall(y)",
        "tarfile.open(x).extractall(y, filter='fully_trusted')",
    ],
)
def test_dangers_are_found(text):
    assert list(dangers(ast.parse(text)))


def test_what_is_harmless_is_no_danger():
    text = "jax.eval_shape(f)\nyaml.safe_load(x)\nnp.load(f)\nt.extractall(x, filter='data')\nf.lower().compile()"
    assert list(dangers(ast.parse(text))) == []


# ---- run folders

MINIMAL = """
model: {vocab_size: 257, num_layers: 2, d_model: 64, d_ff: 128, num_heads: 4}
data: {stores: [{path: x}]}
train: {steps: 10, batch_size: 8, seq_len: 32}
"""


def config(*overrides):
    return parse_config(yaml.safe_load(MINIMAL), overrides)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_run_folder_is_private_and_one_that_is_there_stays_as_it_is(tmp_path):
    before = os.umask(0o022)
    try:
        with RunFolder(config(f"run.root={tmp_path}/all/runs", "run.name=a")) as folder:
            folder.write_summary({"step": 1})
        os.makedirs(tmp_path / "all" / "runs" / "b", 0o755)
        with RunFolder(config(f"run.root={tmp_path}/all/runs", "run.name=b")):
            pass
    finally:
        os.umask(before)
    runs = tmp_path / "all" / "runs"
    assert {name: mode(runs / name) for name in ("", "a", "b")} == {"": 0o755, "a": 0o700, "b": 0o755}
    assert (runs / "a" / "summary.json").exists()


# ---- secrets

SECRET = "s3cr3t"
URLS = [
    f"https://user:{SECRET}@host/data",
    f"https://host/data?token={SECRET}",
    f"s3://key:{SECRET}@bucket/data",
    f"s3://bucket/data?X-Amz-Signature={SECRET}",
    f"gs://{SECRET}@bucket/data",
    f"https://account.blob.core.windows.net/c/b?sv=2022&sig={SECRET}",
]
FIELDS = ["run.root", "data.stores.0.path", "data.stores.0.tokenizer", "train.start_from", "train.init_from"]
FIELDS += ["train.compilation_cache"]


@pytest.mark.parametrize("url", URLS)
def test_urls_with_credentials_are_refused_and_not_repeated(url):
    for field in [*FIELDS, "data.stores.0.text.0", "run.rot", "train.steps"]:
        with pytest.raises(ConfigError) as caught:
            config("data.stores.0.text=[x]", f"{field}={url}")
        assert SECRET not in str(caught.value)
        assert field in str(caught.value)
        if field in FIELDS:
            assert "holds credentials" in str(caught.value)


def test_a_field_that_sounds_secret_is_not_repeated():
    for field in (
        "log.wandb_api_key",
        "run.token",
        "data.stores.0.password",
        "aws_secret",
        "train.AWS_SECRET_ACCESS_KEY",
    ):
        with pytest.raises(ConfigError, match="no such field") as caught:
            config(f"{field}={SECRET}")
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["https://host/data", "http://host", "file:///x", "S3://bucket/x", "az://c/x", "a\0b"]
)
def test_other_urls_are_no_places(place):
    with pytest.raises(ValueError):
        places.checked(place)


@pytest.mark.parametrize(
    "place",
    [
        "runs",
        "/a/b",
        "~/x",
        "gs://bucket/a@100",
        "s3://bucket/a?b",
        "gs://bucket/*.txt",
        "x/y?z=1",
        "a:b",
        "python:stdlib",
    ],
)
def test_paths_and_bucket_urls_are_places(place):
    assert places.checked(place) == place


def test_a_resolved_config_keeps_its_places():
    kept = config("run.root=gs://bucket/runs", "train.start_from=gs://bucket/runs/a@100")
    assert parse_config(yaml.safe_load(to_yaml(kept))) == kept


@pytest.mark.parametrize("url", [url for url in URLS if storage.is_bucket(url)])
def test_storage_takes_no_credentials_in_urls(url):
    for call in (storage.exists, storage.read_bytes, storage.list_tree, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(storage.StorageError, match="holds credentials") as caught:
            call(url)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", URLS)
def test_commands_repeat_no_credentials(url, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    for command in (
        ["report", url],
        ["data", "info", url],
        ["data", "build", url, "--out", str(tmp_path / "s")],
        ["data", "build", str(tmp_path / "a.txt"), "--out", url],
        ["data", "build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "s"), "--tokenizer", url],
        ["checkpoint", "ls", url],
        ["config", url],
    ):
        assert main(command) in (1, 2)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_doctor_shows_no_credentials(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", URLS[0])
    monkeypatch.setenv("JAX_SOME_TOKEN", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    rows = doctor.environment_rows()
    assert {"JAX_COMPILATION_CACHE_DIR", "JAX_SOME_TOKEN"} <= {row.name for row in rows}
    assert SECRET not in json.dumps([[row.text, row.data] for row in rows])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot read s3://u:{SECRET}@b/x: no", "cannot read s3://***@b/x: no"),
        (f"GET https://h/x?a=1&sig={SECRET} failed", "GET https://h/x?*** failed"),
        ("mail a@b.c about gs://bucket/x@3", "mail a@b.c about gs://bucket/x@3"),
        ("is it? yes", "is it? yes"),
    ],
)
def test_credentials_are_blotted_out(text, shown):
    assert places.redacted(text) == shown
