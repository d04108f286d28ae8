"""Reads a configuration: YAML file plus dotted overrides, with errors a person can act on."""

import difflib
import json
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from maxlm import places
from maxlm.config import Config, MeshConfig

MAX_BYTES = 1 << 17
"""Of a config file."""
MAX_CHARS = 1 << 20
"""Of all values together, where an alias counts as what it stands for."""
MAX_SENTENCES = 20


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and a fix."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as `model.num_layers=4`.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; values are read as YAML, later ones win. Setting one of
            train.steps and train.tokens clears the other, so that a file's length can be overridden.

    Returns:
        The resolved, frozen configuration.

    Raises:
        ConfigError: one sentence per problem: field, value, what would be right.
    """
    given, path = places.redacted(str(path)), Path(path)
    if not path.is_file():
        folder = next((p for p in (path, path.parent) if p.is_dir()), Path("configs"))
        near = sorted(str(p) for p in folder.glob("*.yaml"))
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"config file {given} {wrong}" + (f"; here are: {', '.join(near)}" if near else ""))
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(
            f"config file {path} has {size:,} bytes, and a config at most {MAX_BYTES:,}: is it another file?"
        )
    try:
        tree = read_yaml(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold keys such as 'model:' and 'train:', found {_kind(tree)}")
    return parse_config(tree, overrides)


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validates a nested dict of settings (as a YAML file holds them) into a Config.

    Args:
        tree: the settings; overrides are written into it.
        overrides: as load_config.

    Raises:
        ConfigError: as load_config.
    """
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        sentences = [_clipped(_sentence(e)) for e in found[:MAX_SENTENCES]]
        more = [f"and {len(found) - MAX_SENTENCES:,} more"] if len(found) > MAX_SENTENCES else []
        raise ConfigError("\n".join([*sentences, *more])) from None


def mesh_of(overrides: Sequence[str]) -> MeshConfig:
    """The mesh that settings such as mesh.tensor=4 describe.

    Raises:
        ConfigError: one is no setting of the mesh.
    """
    if other := next((o for o in overrides if not o.startswith("mesh.")), None):
        raise ConfigError(f"{other} is no setting of the mesh; give such as mesh.tensor=4")
    tree: dict[str, Any] = {"data": {"stores": [{"path": "none"}]}}  # what a config has to have, besides
    tree["model"] = {"vocab_size": 1, "num_layers": 1, "d_model": 2, "d_ff": 1, "num_heads": 1}
    tree["train"] = {"steps": 1, "batch_size": 1, "seq_len": 1}
    return parse_config(tree, overrides).mesh


def read_yaml(text: str | bytes) -> Any:
    """Reads YAML as configs are written: plain values, 3e-4 is a number, no key stands twice.

    Args:
        text: a document; bytes are UTF-8 (or UTF-16 with a byte order mark).

    Returns:
        None, bool, int, float, str, date, bytes, list or dict; None for an empty document.

    Raises:
        ValueError: it is not that, or aliases blow it up; one sentence that says where.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_chars(node, {}) > MAX_CHARS:
            raise ValueError(f"its aliases make it longer than {MAX_CHARS:,} characters")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_clipped(" ".join(str(error).split()))) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML that load_config reads back to an equal Config."""
    return yaml.dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def describe_fields(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every field as (dotted path, type, default, description), in tree order."""
    rows: list[tuple[str, str, str, str]] = []
    for name, field in model.model_fields.items():
        path, kind = f"{prefix}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += describe_fields(kind, f"{path}.")
            continue
        default = "(required)" if field.is_required() else json.dumps(_plain(field.default))
        rows.append((path, _type_name(kind), default, field.description or ""))
        inner = getattr(kind, "__args__", ())
        item = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if item is not None:
            rows += describe_fields(item, f"{path}." if type(None) in inner else f"{path}.0.")
    return rows


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 3e-4 is a number; duplicate keys are an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if _is_mapping(node) else []
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise yaml.YAMLError(f"key '{key.value[:60]}' stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = None if _is_long_number(node) else super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError):  # as of 2001-99-99 and !!bool x
            value = None
        if value is None and node.tag != _TAG + "null":
            kind, line = node.tag.removeprefix(_TAG), node.start_mark.line + 1
            raise yaml.YAMLError(f"'{str(node.value)[:60]}' in line {line} is not a value of type {kind}")
        return value


_TAG = "tag:yaml.org,2002:"


def _is_mapping(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)


def _is_long_number(node: yaml.Node) -> bool:
    """Whether a number has so many digits that reading it takes long."""
    return node.tag in (_TAG + "int", _TAG + "float") and len(node.value) > 100


def _num_chars(node: yaml.Node, known: dict[int, float]) -> float:
    """Length of all that a node stands for, each alias counted; infinite where it stands for itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [item for part in parts for item in (part if isinstance(part, tuple) else (part,))]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + own + sum(_num_chars(item, known) for item in inner)
    return known[id(node)]


# No digit can be matched in two ways: long ones would be tried in all of them.
_FLOAT = r"""^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*
             |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"""
_Loader.add_implicit_resolver(_TAG + "float", re.compile(_FLOAT, re.VERBOSE), list("-+0123456789."))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override '{_clipped(override, 60)}' is not of the form section.field=value, such as train.steps=400"
        )
    try:
        value = read_yaml(text)
    except ValueError:
        raise ConfigError(f"override '{_clipped(override, 60)}': the value is not valid YAML; quote it") from None
    *sections, field = key.split(".")
    node: Any = tree
    for depth, section in enumerate(sections):
        node = _child(node, section, key, ".".join(sections[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, field, key)] = value
    else:
        node[field] = value
    other = {"train.steps": "tokens", "train.tokens": "steps"}.get(key)
    if other and value is not None:
        node[other] = None


def _child(node: Any, section: str, key: str, so_far: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, section, key)]
    else:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"override '{_clipped(key, 60)}': {_clipped(so_far, 60)} is {_kind(child)}, which has no fields"
        )
    return child


def _index(items: list, text: str, key: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) >= len(items):
        raise ConfigError(f"override '{_clipped(key, 60)}': '{_clipped(text, 60)}' is not an index below {len(items)}")
    return int(text)


def _sentence(error: Any) -> str:
    """One pydantic error as one sentence."""
    loc = [str(part) for part in error["loc"]]
    path, value = ".".join(loc), error.get("input")
    if error["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        shown = "..." if places.SECRET.search(loc[-1]) else _short(value)
        return f"{path}={shown}: there is no such field{_nearest(loc, known)}"
    if error["type"] == "missing":
        return f"{path} is required: set it in the config file or with {path}=VALUE"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}={_short(value)}: {message[0].lower()}{message[1:]}{_hint(loc)}"


def _hint(loc: list[str]) -> str:
    row = next((r for r in describe_fields() if r[0] == ".".join(loc)), None)
    return f" ({row[3].rstrip('.')})" if row else ""


def _fields_at(loc: list[str]) -> list[str]:
    prefix = ".".join("0" if part.isdigit() else part for part in loc)
    prefix = f"{prefix}." if prefix else ""
    paths = [row[0] for row in describe_fields()]
    return list(dict.fromkeys(p[len(prefix) :].split(".")[0] for p in paths if p.startswith(prefix)))


def _nearest(loc: list[str], known: list[str]) -> str:
    close = difflib.get_close_matches(loc[-1][:60], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*loc[:-1], close[0]])}?"
    elsewhere = [row[0] for row in describe_fields() if row[0].split(".")[-1] == loc[-1]]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; fields here: {', '.join(known)}"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _short(value: Any) -> str:
    try:
        text = json.dumps(_shown(value), default=str)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not, numbers too long to print, endless trees
        text = type(value).__name__
    return _clipped(text, 60)


def _shown(value: Any) -> Any:
    """The value with ... for all that sounds secret."""
    if isinstance(value, dict):
        return {k: "..." if places.SECRET.search(str(k)) else _shown(v) for k, v in value.items()}
    return [_shown(v) for v in value] if isinstance(value, list | tuple) else value


def _clipped(text: str, size: int = 800) -> str:
    """The text without credentials, and without an end that would fill the screen."""
    text = places.redacted(text[:10_000])
    return text if len(text) <= size else text[: size - 3] + "..."


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{'text' if isinstance(value, str) else type(value).__name__} {_short(value)}"


def _type_name(kind: Any) -> str:
    if getattr(kind, "__name__", None) in ("int", "float", "str", "bool"):
        return kind.__name__
    args = typing.get_args(kind)
    name = str(getattr(kind, "__origin__", kind))
    if "Annotated" in str(type(kind)):
        return _type_name(args[0])
    if "Literal" in name:
        return " | ".join(str(a) for a in args)
    if name == "<class 'tuple'>":
        return f"list of {_type_name(args[0])}"
    if name == "<class 'dict'>":
        return f"map of {_type_name(args[0])} to {_type_name(args[1])}"
    if args:
        return " | ".join("null" if a is type(None) else _type_name(a) for a in args)
    return getattr(kind, "__name__", name)
