"""Evaluation: every token is scored once, on any mesh the same, and what cannot be evaluated is said in a sentence."""

import json
import math

import jax
import numpy as np
import pytest
from test_convert_folders import write_model

from maxlm.cli import main
from maxlm.config import MeshConfig
from maxlm.data.tokenizer import load_tokenizer, train_bpe
from maxlm.evaluate.choices import encode_pair
from maxlm.evaluate.perplexity import windows
from maxlm.evaluate.scoring import Scorer
from maxlm.infer.models import open_model

TEXT = "the cat sat on the mat, and the dog ate the cat's hat.\n" * 6
ONE = MeshConfig(fake_devices=1)


def model_with_tokenizer(folder, **changed):
    """A tiny Llama of 250 ids whose tokenizer has fewer: one token for each of the usual characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    write_model(folder, "llama", np.dtype(np.float32))
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters)[:240])}
    vocab |= {name: len(vocab) + i for i, name in enumerate(["<|endoftext|>", "the", "cat"])}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "th": len(vocab), "ca": len(vocab) + 1}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    eos = {"eos_token_id": vocab["<|endoftext|>"], "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps({**config, **eos, **changed}))
    return folder


MERGES = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t")]


def test_windows_score_every_token_once_after_enough_others():
    for num_tokens in range(2, 40):
        for context in range(2, 12):
            for stride in range(1, context):
                found = list(windows(num_tokens, context, stride))
                assert [i for w in found for i in range(w.first, w.stop)] == list(range(1, num_tokens))
                for w in found:
                    assert w.stop - w.start <= context
                    assert w.start == 0 or w.first - w.start >= context - stride


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 4, "context": 2}])
def test_a_mesh_scores_as_one_device_does(sizes, tmp_path):
    folder = model_with_tokenizer(tmp_path / "hf")
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 250, n).tolist()  # noqa: E731
    pairs = [(ids(n), ids(m)) for n, m in ((1, 1), (30, 4), (64, 7), (90, 2), (3, 64), (5, 5))]
    found = []
    for mesh in (ONE, MeshConfig(fake_devices=8, **sizes)):
        scorer = Scorer(open_model(str(folder), mesh, "float32"), mesh, 256)
        found.append(scorer.loglikelihoods(pairs))
    np.testing.assert_allclose([x for x, _ in found[1]], [x for x, _ in found[0]], rtol=1e-5)
    assert [hit for _, hit in found[0]] == [hit for _, hit in found[1]]


def test_greedy_is_what_is_likeliest(tmp_path):
    opened = open_model(str(model_with_tokenizer(tmp_path / "hf")), ONE, "float32")
    scorer = Scorer(opened, ONE, 256)
    pairs = [([3, 4, 5], [i]) for i in range(250)]
    found = scorer.loglikelihoods(pairs)
    assert math.fsum(math.exp(x) for x, _ in found) == pytest.approx(1, rel=1e-5)
    assert [hit for _, hit in found].index(True) == int(np.argmax([x for x, _ in found]))
    assert sum(hit for _, hit in found) == 1


def test_perplexity_from_the_command_line(tmp_path, capsys):
    folder = model_with_tokenizer(tmp_path / "hf")
    (tmp_path / "text").write_text(TEXT)
    base = ["eval", "perplexity", str(folder), "--text", str(tmp_path / "text"), "--dtype", "float32"]
    base += ["mesh.fake_devices=1"]
    assert main([*base, "--context", "32", "--stride", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids = load_tokenizer(str(folder / "tokenizer.json")).encode_batch([TEXT])[0]
    assert (found["context"], found["stride"], found["tokens"]) == (32, 8, len(ids) - 1)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    nats = found["nats_per_token"] * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))
    assert main([*base, "--batch", "3"]) == 0
    assert "context 64, stride 32" in capsys.readouterr().out


def test_choices_from_the_command_line(tmp_path, capsys):
    folder = model_with_tokenizer(tmp_path / "hf")
    opened = open_model(str(folder), ONE, "float32")
    scorer = Scorer(opened, ONE, 256)
    lines, right = [], 0
    for i, (context, choices) in enumerate([("the", ["cat", "hat sat"]), ("a cat", ["ate", "sat"]), ("", ["x", "yy"])]):
        after = [f" {c}" if context else c for c in choices]
        scores = [scorer.loglikelihoods([encode_pair(opened.tokenizer, context, c)])[0][0] for c in after]
        answer = int(np.argmax(scores)) if i else 1 - int(np.argmax(scores))
        right += i > 0
        lines.append(json.dumps({("question", "context")[i % 2]: context, "choices": choices, "answer": answer}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n\n")
    args = ["eval", "choices", str(folder), str(tmp_path / "q.jsonl"), "mesh.fake_devices=1", "--dtype", "float32"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], found["acc"]) == (3, pytest.approx(right / 3))
    assert found["acc_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert main(args) == 0
    assert "3 questions\n  acc 0.6667 ± 0.3333" in capsys.readouterr().out
    (tmp_path / "q.jsonl").write_text(lines[0])
    assert main(args) == 0
    assert "1 questions\n  acc 0.0000, acc_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "a", "choices": [], "answer": 0}', "line 1: choices: Tuple should have at least 2 items"),
        ('{"question": "a", "choices": ["b", " "], "answer": 0}', "a choice is empty"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer=2 is not one of 2 choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": -1}', "answer: Input should be greater than or equal"),
        ('{"choices": ["b", "c"], "answer": 1}', "it needs context or question"),
        ("[]", "it is no object"),
        ("{", "Invalid JSON"),
        ("", "has no questions"),
    ],
)
def test_questions_that_are_refused(line, says, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(line)
    assert main(["eval", "choices", "none", str(tmp_path / "q.jsonl")]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_refused(tmp_path, capsys):
    folder = model_with_tokenizer(tmp_path / "hf")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    cases = [
        (["--text", str(tmp_path / "empty")], "is empty"),
        (["--text", str(tmp_path / "short")], "has 1 tokens"),
        (["--text", str(tmp_path / "latin")], "is not UTF-8 at byte 3"),
        (["--text", str(tmp_path / "nowhere")], "is not a file"),
        (["--store", str(tmp_path / "nowhere")], "does not exist"),
        (["--text", str(tmp_path / "short"), "--context", "8", "--stride", "8"], "--stride 8 must be from 1 to 7"),
        (["--text", str(tmp_path / "short"), "--batch", "0"], "--batch 0"),
        (["--text", str(tmp_path / "short"), "train.steps=1"], "train.steps=1 is no setting of the mesh"),
    ]
    for args, says in cases:
        assert main(["eval", "perplexity", str(folder), *args]) == 2, says
        assert says in capsys.readouterr().err
    (folder / "tokenizer.json").write_bytes(train_bpe([TEXT], 300))
    assert main(["eval", "perplexity", str(folder), "--text", str(tmp_path / "short")]) == 2
    assert "makes ids up to" in capsys.readouterr().err
    assert jax.device_count() == 8


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_store(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(TEXT)
    (tmp_path / "docs" / "b.txt").write_text(TEXT[100:])
    store = str(tmp_path / "store")
    assert main(["data", "build", str(tmp_path / "docs"), "--out", store, "--heldout", "0.5"]) == 0
    model = {"vocab_size": 257, "num_layers": 2, "d_model": 16, "d_ff": 16, "num_heads": 2, "dtype": "float32"}
    tree = {
        "run": {"root": str(tmp_path), "name": "run"},
        "model": {**model, "position": "learned", "max_positions": 24},
        "mesh": {"fake_devices": 1},
        "data": {"stores": [{"path": store}]},
        "train": {"steps": 2, "batch_size": 2, "seq_len": 20, "compilation_cache": None},
        "optim": {"learning_rate": 1e-2},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    capsys.readouterr()
    args = ["eval", "perplexity", str(tmp_path / "run"), "--dtype", "float32", "mesh.fake_devices=1"]
    assert main([*args, "--store", store, "--split", "train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["context"], found["stride"]) == (f"{tmp_path / 'run'}@2", 20, 10)
    assert 4 < found["nats_per_token"] < 6.5
    text = ["--text", str(tmp_path / "docs" / "a.txt"), "--context"]
    assert main([*args, *text, "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len(TEXT) - 1
    assert main([*args, *text, "25"]) == 2
    assert "context=25 is more than the 24 positions" in capsys.readouterr().err
