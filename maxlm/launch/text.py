"""YAML as people write it: scripts as blocks."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    pass


def to_yaml(*documents: Any) -> str:
    """One YAML text of plain values; strings of several lines are blocks."""
    parts = [yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents]
    return "---\n".join(parts)


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _string)
