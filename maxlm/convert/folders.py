"""What lies beside the tensors of a model: its config, tokenizer and templates; and folders that appear when whole."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from maxlm import storage
from maxlm.convert.keys import FamilyError
from maxlm.json_object import parse_object

CONFIG = "config.json"
HF = "hf"
"""Folder, in what from-hf writes, of the files that came along."""
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that travel with a model as they are."""
MAX_CONFIG = 1 << 20
"""Bytes of a config.json or generation_config.json."""


class ConvertError(ValueError):
    """A conversion that was asked for wrongly; one sentence that says what would be right."""


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        FamilyError: it is no JSON object.
    """
    path = os.path.join(folder, CONFIG)
    tree = read_object(path)
    if tree is None:
        raise FileNotFoundError(f"{path} does not exist; it says what model the tensors are")
    return tree


def read_object(path: str) -> dict[str, Any] | None:
    """The JSON object of a file beside the tensors; None if there is no such file.

    Raises:
        FamilyError: it is no JSON object, or too large.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_CONFIG:
        raise FamilyError(f"{path} has more than {MAX_CONFIG:,} bytes: is it another file?")
    return parse_object(data, path, FamilyError)


def check_tokenizer(folder: str | None, vocab_size: int) -> None:
    """Refuses a tokenizer that makes ids for which the model has no embedding.

    Raises:
        FamilyError: it does, or is no tokenizer.
    """
    if folder is None or not os.path.exists(path := os.path.join(folder, "tokenizer.json")):
        return
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_file(path)
        special = {token.content for token in found.get_added_tokens_decoder().values() if token.special}
        # those come from no text but their own name, such as Gemma 3's for images, and who encodes it is told
        ids = [i for token, i in found.get_vocab(with_added_tokens=True).items() if token not in special]
    except Exception as error:  # The library raises bare Exception.
        raise FamilyError(f"{path} is no tokenizer: {' '.join(str(error).split())[:200]}") from None
    if ids and max(ids) >= vocab_size:
        raise FamilyError(
            f"{path} makes ids up to {max(ids)}, and the model has embeddings for vocab_size={vocab_size}"
        )


def copy_companions(source: str, target: str) -> list[str]:
    """Copies the files that travel along, and returns their names."""
    names = [name for name in COMPANIONS if os.path.isfile(os.path.join(source, name))]
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
        _sync(os.path.join(target, name))
    return names


def write_text(path: str, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def to_json(tree: dict[str, Any]) -> str:
    """As transformers writes it."""
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Yields a hidden folder beside `path` that gets this name when all has gone well, and else is removed.

    Raises:
        ConvertError: there is something at `path`, or it is in a bucket.
        OSError: the place takes nothing.
    """
    if storage.is_bucket(path):
        raise ConvertError(f"{path} is in a bucket; convert into a local folder and copy it there")
    path = os.path.abspath(path)
    above, name = os.path.split(path)
    partial = os.path.join(above, f".{name}.{secrets.token_hex(4)}.partial")
    try:
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise ConvertError(f"{path} is there already; give another name, or remove it")
        os.makedirs(above, exist_ok=True)
        os.mkdir(partial)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield partial
        _sync(partial)
        os.rename(partial, path)
        _sync(above)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
