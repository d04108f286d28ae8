import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from maxlm.data.tokenizer import load_tokenizer, tokenizer_from_bytes, train_bpe

TEXTS = ["hello world", "naïve café 你好 🙂\n\ttab", "", "x" * 1000, "a\0b", "line\r\nline"]
INJECTION = "a<|endoftext|>b</s>c<s>d"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A SentencePiece model with byte fallback, so that it can encode any text."""
    path = tmp_path_factory.mktemp("sp") / "sp.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"the quick brown fox {i} jumps over the lazy dog" for i in range(200)]),
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return str(path)


@pytest.fixture
def spec(request, bpe, model) -> str:
    return {"byte": "byte", "bpe": bpe, "model": model}[request.param]


@pytest.mark.parametrize("spec", ["byte", "bpe", "model"], indirect=True)
def test_texts_survive(spec):
    tokenizer = load_tokenizer(spec)
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert all(ids.dtype == np.uint32 and (ids < tokenizer.vocab_size).all() for ids in encoded)
    assert tokenizer.decode([*encoded[0], tokenizer.eos_id]) == TEXTS[0]


@pytest.mark.parametrize("spec", ["byte", "bpe", "model"], indirect=True)
def test_text_cannot_inject_control_tokens(spec):
    tokenizer = load_tokenizer(spec)
    (ids,) = tokenizer.encode_batch([INJECTION])
    assert tokenizer.eos_id not in ids and (tokenizer.bos_id is None or tokenizer.bos_id not in ids)
    assert tokenizer.decode(ids) == INJECTION


def test_eos_that_the_file_does_not_mark_as_special_cannot_be_injected(bpe, tmp_path):
    tree = json.loads(Path(bpe).read_text())
    for token in tree["added_tokens"]:
        token["special"] = False
    (tmp_path / "plain.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(str(tmp_path / "plain.json"))
    assert tokenizer.eos_id not in tokenizer.encode_batch([INJECTION])[0]


@pytest.mark.parametrize("spec", ["byte", "bpe", "model"], indirect=True)
def test_its_bytes_rebuild_it(spec):
    tokenizer = load_tokenizer(spec)
    bos = "none" if tokenizer.bos_id is None else tokenizer.bos_id
    again = tokenizer_from_bytes(tokenizer.kind, tokenizer.data, tokenizer.eos_id, bos)
    assert again.identity() == tokenizer.identity()
    assert [ids.tolist() for ids in again.encode_batch(TEXTS)] == [
        ids.tolist() for ids in tokenizer.encode_batch(TEXTS)
    ]
    json.dumps(tokenizer.identity())


def test_padding_and_truncation_of_the_file_are_ignored(bpe, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(bpe)
    library.enable_truncation(4)
    library.enable_padding(length=16)
    library.save(str(tmp_path / "t.json"))
    long, short = load_tokenizer(str(tmp_path / "t.json")).encode_batch(["word " * 100, "a"])
    assert len(long) > 100 and len(short) == 1


def test_control_tokens_by_name(bpe, model):
    assert load_tokenizer(bpe, bos="none").bos_id is None
    assert load_tokenizer(model).bos_id == 1 and load_tokenizer(model, bos="none").bos_id is None
    assert load_tokenizer(model, eos="<s>").eos_id == 1
    for spec in (bpe, model):
        with pytest.raises(ValueError, match="occurs in text and cannot end or begin documents"):
            load_tokenizer(spec, eos="a")


@pytest.mark.parametrize(
    ("content", "eos", "message"),
    [
        (b'{"no": "tokenizer"}', None, "not a tokenizers JSON file"),
        (b"\x00garbage", None, "not a SentencePiece model"),
        (None, "<|missing|>", r"--eos <\|missing\|> is not among its \d+ tokens"),
        (b"no eos", None, "name its own with --eos"),
    ],
)
def test_files_that_are_no_tokenizer(bpe, tmp_path, content, eos, message):
    path = tmp_path / "tokenizer.json"
    if content == b"no eos":
        tree = json.loads(Path(bpe).read_text())
        tree["added_tokens"] = []
        vocab = tree["model"]["vocab"]
        vocab["end"] = vocab.pop("<|endoftext|>")
        content = json.dumps(tree).encode()
    path.write_bytes(Path(bpe).read_bytes() if content is None else content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(str(path), eos=eos)
    assert str(path) in str(error.value)


def test_missing_file_and_byte_options():
    with pytest.raises(FileNotFoundError, match="give byte, a tokenizer"):
        load_tokenizer("nothing.json")
    with pytest.raises(ValueError, match="leave out --eos"):
        load_tokenizer("byte", eos="x")


def test_train_bpe_size_progress_and_repeatability():
    texts = ["some words and some more words"] * 20
    seen: list[int] = []
    data = train_bpe(texts, 270, seen.append)
    assert seen[-1] == sum(map(len, texts)) and seen == sorted(seen)
    assert train_bpe(texts, 270) == data
    assert tokenizer_from_bytes("tokenizers", data).vocab_size == 270
    with pytest.raises(ValueError, match="vocab_size=256 is too small"):
        train_bpe(texts, 256)
