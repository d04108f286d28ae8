"""What the tests under fuzz/ draw: values, trees with one of them changed, and files cut or changed.

Examples are drawn the same way each time (derandomize); what a search once found stands among the examples by name.
"""

import copy

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from maxlm.config_file import parse_config

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


DEEP_JSON = [deep("[", "]").encode(), deep('{"a":', "}").encode(), deep("[", "]", 150).encode()]
