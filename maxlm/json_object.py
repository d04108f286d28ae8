"""JSON objects from files that anyone may have made."""

import json
from typing import Any


def parse_object(data: bytes, path: str, error: type[Exception] = ValueError) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        data: of the file.
        path: of the file, for messages.
        error: what is raised.

    Raises:
        error: it is none, holds what is no JSON, or names a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen = set[str]()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise _ParseError(f"{path} names {shown(twice)} twice")
        return found

    def refused(text: str) -> None:
        raise _ParseError(f"{path} holds {text}, which is not JSON")

    try:
        tree = json.loads(data.decode(), object_pairs_hook=once, parse_constant=refused)
        json.dumps(tree, ensure_ascii=False).encode()  # surrogates
    except _ParseError as problem:
        raise error(str(problem)) from None
    except RecursionError:
        raise error(f"{path} is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path} does not hold valid JSON: {str(problem)[:120]}") from None
    if not isinstance(tree, dict):
        raise error(f"{path} holds a JSON {type(tree).__name__} where an object belongs")
    return tree


def shown(value: Any) -> str:
    """A name out of a file, short and on one line."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _ParseError(ValueError):
    pass
