"""A model's own text: its tokenizer as its folder has it, the tokens that end a text, and how it would be sampled."""

import os
from collections.abc import Sequence
from typing import Any

from maxlm.convert.folders import check_tokenizer, read_object
from maxlm.data.tokenizer import load_tokenizer
from maxlm.infer.models import Model
from maxlm.infer.sampling import Sampling

FILES = ("tokenizer.json", "tokenizer.model")


class ModelText:
    """Text to tokens and back, as a model expects it.

    Attributes:
        eos_ids: tokens that end a text; may be none.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], is_whole: bool):
        """Args: tokenizer: of the tokenizers library if is_whole, else a data.tokenizer.Tokenizer."""
        self._tokenizer, self.eos_ids, self._is_whole = tokenizer, frozenset(eos_ids), is_whole

    @classmethod
    def of(cls, model: Model) -> "ModelText":
        """A model's. Raises: as of_folder, and ValueError: its tokenizer has too many ids."""
        if model.folder is None:
            return cls(model.tokenizer, [model.tokenizer.eos_id], is_whole=False)
        check_tokenizer(model.folder, model.model.vocab_size)
        return cls.of_folder(model.folder)

    @classmethod
    def of_folder(cls, folder: str) -> "ModelText":
        """Of a folder as Hugging Face models have it.

        Raises:
            FileNotFoundError: there is no tokenizer.
            ValueError: a file cannot be read.
        """
        names = [name for name in FILES if os.path.isfile(os.path.join(folder, name))]
        if not names:
            raise FileNotFoundError(f"{folder} has no tokenizer: neither {' nor '.join(FILES)}")
        path, eos_ids = os.path.join(folder, names[0]), _eos_ids(folder)
        if names[0] != FILES[0]:
            store = load_tokenizer(path)
            return cls(store, eos_ids or [store.eos_id], is_whole=False)
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"{path} is no tokenizer: {' '.join(str(error).split())[:200]}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, eos_ids, is_whole=True)

    def encode(self, text: str, as_document: bool = True) -> list[int]:
        """Token ids.

        Args:
            text: what names special tokens becomes them, if the tokenizer's file says so.
            as_document: with what the tokenizer puts around a text, such as a token that begins it; without for text
                that a chat template has made, which has its own.
        """
        if self._is_whole:
            return self._tokenizer.encode(text, add_special_tokens=as_document).ids
        begin = [self._tokenizer.bos_id] if as_document and self._tokenizer.bos_id is not None else []
        return [*begin, *self._tokenizer.encode_batch([text])[0].tolist()]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(ids))


def read_sampling(folder: str) -> Sampling:
    """How a model's generation_config.json says that it is sampled; the likeliest tokens where it does not."""
    path = os.path.join(folder, "generation_config.json")
    found = read_object(path) or {}
    if found.get("do_sample") is not True:
        return Sampling()
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # those of transformers
    given = {name: found[name] for name in defaults if found.get(name) is not None}
    try:
        return Sampling(**{**defaults, **given})  # pyrefly: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error)[:120]}") from None


def _eos_ids(folder: str) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        if (found := (read_object(path) or {}).get("eos_token_id")) is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{path}: eos_token_id is to be a token id or a list of them")
            return ids
    return []
