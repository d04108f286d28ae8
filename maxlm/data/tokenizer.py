"""Tokenizers: raw bytes, Hugging Face `tokenizers` files, SentencePiece models; and training one on one's own text.

A tokenizer is a pure function of a file's bytes and two ids, so a token store carries a copy of it and needs nothing
else to be decoded. Encoding never adds special tokens and never finds them in text: a document that contains the
characters "<|endoftext|>" must not be able to end itself. Documents are framed by the builder alone.
"""

import array
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from maxlm import storage

Kind = Literal["byte", "tokenizers", "sentencepiece"]

# Names under which published tokenizers keep the tokens that end and begin a document, most specific first.
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<eos>",
    "</s>",
    "<|eos|>",
    "[EOS]",
    "<|endofdoc|>",
)
BOS_NAMES = ("<|begin_of_text|>", "<|begin▁of▁sentence|>", "<bos>", "<s>", "<|bos|>", "[BOS]")
FILE_NAMES: dict[Kind, str] = {"tokenizers": "tokenizer.json", "sentencepiece": "tokenizer.model"}
NO_BOS = "none"
# Bits beside a token's id in a store of conversations. Where one ends cannot be told from ids: in many templates the
# token that ends a turn is the one that ends a text.
LEARNED, FIRST = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Identity:
    """What makes two tokenizers the same: their kind, file and control ids."""

    kind: Kind
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int | None


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        kind: "byte", "tokenizers" or "sentencepiece".
        data: bytes of the tokenizer's file; empty for kind "byte".
        vocab_size: one more than the largest id.
        eos_id: id that ends a document.
        bos_id: id that begins a document, or None.
    """

    kind: Kind
    data: bytes
    vocab_size: int
    eos_id: int
    bos_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts to uint32 [num_tokens] each, without special tokens."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes token ids to text; control tokens are left out."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON-able dict(kind, sha256, vocab_size, eos_id, bos_id)."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 and one end-of-document token, id 256."""

    kind: Kind = "byte"
    data = b""
    vocab_size = 257
    eos_id = 256
    bos_id: int | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts to uint32 [num_bytes] each."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes byte values; bytes that are no UTF-8 become the replacement character, ids over 255 vanish."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def identity(self) -> dict[str, Any]:
        """JSON-able dict(kind, sha256, vocab_size, eos_id, bos_id)."""
        return _identity(self)


class JsonTokenizer:
    """A `tokenizers` file (tokenizer.json), as published with most models.

    Args:
        data: bytes of the file.
        eos, bos: token or id that ends or begins a document; None searches well-known names, bos "none" turns it off.

    Raises:
        ValueError: the file is no tokenizer, or has no such token.
    """

    kind: Kind = "tokenizers"

    def __init__(self, data: bytes, eos: str | int | None = None, bos: str | int | None = None):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"not a tokenizers JSON file ({' '.join(str(error).split())})") from None
        self.data = data
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eos_id, self.bos_id = _control_ids(vocab.get, self.vocab_size, eos, bos)
        # Control tokens must be marked as special for encode_special_tokens to keep them out of text.
        names = [self._tokenizer.id_to_token(i) for i in (self.eos_id, self.bos_id) if i is not None]
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
        self._tokenizer.encode_special_tokens = True
        _refuse_ordinary_tokens(self, self._tokenizer.id_to_token)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts to uint32 [num_tokens] each, without special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        # Through array, since numpy takes four times as long to turn a list into an array.
        return [np.frombuffer(array.array("I", e.ids), np.uint32) for e in encodings]

    def encode_marked(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes text in which special tokens are written out, as chat templates write them.

        Args:
            text: of one conversation.
            spans: parts [start, stop) of it, in characters.

        Returns:
            uint32 [num_tokens], and bool [num_tokens]: which tokens have a character within a span.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        starts_N, stops_N = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        inside_N = np.zeros(len(starts_N), bool)
        for start, stop in spans:
            # From the first to the last, since some tokens of white space have no place of their own.
            (hit,) = np.nonzero((starts_N < stop) & (stops_N > start))
            if len(hit):
                inside_N[hit[0] : hit[-1] + 1] = True
        return np.array(encoding.ids, np.uint32), inside_N

    def special_tokens(self) -> list[str]:
        """Text of the tokens that steer a model and are no language."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes token ids to text; special tokens are left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def identity(self) -> dict[str, Any]:
        """JSON-able dict(kind, sha256, vocab_size, eos_id, bos_id)."""
        return _identity(self)


class SentencePieceTokenizer:
    """A SentencePiece model file (tokenizer.model).

    Args, Raises: as JsonTokenizer.
    """

    kind: Kind = "sentencepiece"

    def __init__(self, data: bytes, eos: str | int | None = None, bos: str | int | None = None):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # The library raises RuntimeError or its own kinds, by version.
            raise ValueError(f"not a SentencePiece model ({' '.join(str(error).split())})") from None
        self.data = data
        self.vocab_size = self._model.get_piece_size()
        if not self.vocab_size:
            raise ValueError("not a SentencePiece model (it has no pieces)")
        if eos is None and self._model.eos_id() >= 0:
            eos = self._model.eos_id()
        if bos is None and self._model.bos_id() >= 0:
            bos = self._model.bos_id()
        self.eos_id, self.bos_id = _control_ids(self._id_of, self.vocab_size, eos, bos)
        _refuse_ordinary_tokens(self, self._model.id_to_piece)

    def _id_of(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts to uint32 [num_tokens] each, without special tokens."""
        encoded = self._model.encode(list(texts), out_type=int, num_threads=1)
        return [np.frombuffer(array.array("I", ids), np.uint32) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes token ids to text; control tokens are left out."""
        return self._model.decode([i for i in np.asarray(ids).tolist() if not self._model.is_control(i)])

    def identity(self) -> dict[str, Any]:
        """JSON-able dict(kind, sha256, vocab_size, eos_id, bos_id)."""
        return _identity(self)


def load_tokenizer(spec: str, eos: str | None = None, bos: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        spec: "byte", or the path or bucket url of a tokenizers JSON file or a SentencePiece .model.
        eos: token that ends documents; None looks for the well-known names.
        bos: token that begins documents; None looks for the well-known names, "none" means none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no tokenizer, no end-of-document token is found, or it is one that text can contain.
    """
    if spec == "byte":
        if eos is not None or bos not in (None, NO_BOS):
            raise ValueError("tokenizer byte has a fixed end-of-document token, id 256; leave out --eos and --bos")
        return ByteTokenizer()
    if not storage.exists(spec):
        raise FileNotFoundError(f"tokenizer {spec} does not exist; give byte, a tokenizer.json or a .model file")
    data = storage.read_bytes(spec)
    kind: Kind = "tokenizers" if data.lstrip()[:1] == b"{" else "sentencepiece"
    try:
        return tokenizer_from_bytes(kind, data, eos, bos)
    except ValueError as error:
        raise ValueError(f"tokenizer {spec}: {error}") from None


def tokenizer_from_bytes(
    kind: Kind, data: bytes, eos: str | int | None = None, bos: str | int | None = None
) -> Tokenizer:
    """Rebuilds a tokenizer from the bytes of its file; eos, bos and errors as load_tokenizer."""
    if kind == "byte":
        return ByteTokenizer()
    return JsonTokenizer(data, eos, bos) if kind == "tokenizers" else SentencePieceTokenizer(data, eos, bos)


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Callable[[int], None] | None = None) -> bytes:
    """Trains a byte-level BPE tokenizer (GPT-2's split), which can encode any text.

    Args:
        texts: documents.
        vocab_size: ids in all: 256 bytes, merges, and <|endoftext|>. Little text may give fewer.
        progress: called with the UTF-8 bytes read so far.

    Returns:
        The bytes of a tokenizers JSON file.

    Raises:
        ValueError: vocab_size is below 257.
    """
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is too small: the 256 bytes and {EOS_NAMES[0]} need 257")
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyrefly: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_counted(texts, progress), trainer)
    return tokenizer.to_str(pretty=True).encode()


def _counted(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text.encode())
        if progress:
            progress(done)


def _identity(tokenizer: Tokenizer) -> dict[str, Any]:
    digest = hashlib.sha256(tokenizer.data or b"byte").hexdigest()
    return asdict(Identity(tokenizer.kind, digest, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id))


def _control_ids(
    lookup: Callable[[str], int | None], vocab_size: int, eos: str | int | None, bos: str | int | None
) -> tuple[int, int | None]:
    def find(given: str | int | None, names: Sequence[str], option: str) -> int | None:
        if given is None:
            return next((found for name in names if (found := lookup(name)) is not None), None)
        found = given if isinstance(given, int) else lookup(given)
        if found is None or not 0 <= found < vocab_size:
            raise ValueError(f"{option} {given} is not among its {vocab_size} tokens")
        return found

    eos_id = find(eos, EOS_NAMES, "--eos")
    if eos_id is None:
        raise ValueError(f"it has none of the end-of-document tokens {', '.join(EOS_NAMES)}; name its own with --eos")
    return eos_id, None if bos == NO_BOS else find(bos, BOS_NAMES, "--bos")


def _refuse_ordinary_tokens(tokenizer: Tokenizer, name_of: Callable[[int], str | None]) -> None:
    """A control token that text can produce would tear documents apart."""
    for control in (tokenizer.eos_id, tokenizer.bos_id):
        name = None if control is None else name_of(control)
        if name is not None and control in tokenizer.encode_batch([name])[0]:
            raise ValueError(f"token {name!r} ({control}) occurs in text and cannot end or begin documents")
