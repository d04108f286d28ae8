"""Supervised fine-tuning, from a folder of Hugging Face files and lines of chat to a model that answers better."""

import json
import shutil

import pytest
from helpers import MODEL
from tokenizers import AddedToken, Tokenizer

import maxlm
from maxlm.cli import main
from maxlm.convert.from_hf import from_hf
from maxlm.convert.to_hf import to_hf
from maxlm.data.build import build_store
from maxlm.data.tokenizer import train_bpe
from maxlm.metrics import read_metrics

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def config(tmp_path, name, store, **train):
    return {
        "run": {"name": name, "root": str(tmp_path)},
        "model": {**MODEL, "vocab_size": 300, "vocab_multiple": 128},
        "mesh": {"data": 2, "fsdp": 4, "fake_devices": 8},
        "data": {"stores": [{"path": str(store)}]},
        "train": {"steps": 12, "batch_size": 8, "seq_len": 64, **train},
        "optim": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 0}},
        "eval": {"every": 0, "sample_tokens": 0},
    }


def byte_store(tmp_path):
    build_store([str(tmp_path / "*.txt")], str(tmp_path / "bytes-text"), heldout=0)
    return tmp_path / "bytes-text"


@pytest.mark.slow
def test_a_converted_model_learns_to_answer(tmp_path, capsys):
    """The loss on answers falls, though what users say cannot be foreseen."""
    words = Tokenizer.from_str(train_bpe(["what is the answer to question number"] * 9, 280).decode())
    words.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("what is the answer to it all? " * 200)
    (tmp_path / "b.txt").write_text("the question is what it is. " * 200)
    build_store([str(tmp_path / "*.txt")], str(tmp_path / "text"), str(tmp_path / "tokenizer.json"), heldout=0)
    maxlm.train(maxlm.parse_config(config(tmp_path, "base", tmp_path / "text", steps=2)))
    to_hf(str(tmp_path / "base"), str(tmp_path / "hf"))
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    from_hf(str(tmp_path / "hf"), str(tmp_path / "model"))

    with open(tmp_path / "chats.jsonl", "w") as file:
        for i in range(40):
            turns = [("user", f"what is {i * 7919 % 1000}?"), ("assistant", "the answer to the question")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
        file.write(json.dumps({"messages": [{"role": "user", "content": "hello?"}]}) + "\n")
    build = ["data", "build", f"{tmp_path}/chats.jsonl", "--chat", f"{tmp_path}/model", "--out", f"{tmp_path}/chats"]
    assert main([*build, "--eos", "<|im_end|>", "--heldout", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "learned" in printed and "1: no assistant turn" in printed

    start = {"init_from": str(tmp_path / "model")}
    result = maxlm.train(maxlm.parse_config(config(tmp_path, "sft", tmp_path / "chats", **start)))
    losses = [row["loss"] for row in read_metrics(str(tmp_path / "sft")).train]
    assert losses[-1] < 0.5 * losses[0]
    assert result.final["heldout_loss"] < 0.5 * losses[0]
    assert "heldout_bits_per_byte" not in result.final, "a loss on answers says nothing about the bytes of the rest"

    done = to_hf(str(tmp_path / "sft"), str(tmp_path / "tuned"))
    assert done.companions == ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
    ends = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())["eos_token_id"]
    assert words.token_to_id("<|im_end|>") in ends, "what ends an answer here ends it there"
    (tmp_path / "sft" / "hf" / "model.safetensors").write_bytes(b"tensors")
    (tmp_path / "sft" / "hf" / "notes").mkdir()
    again = {"steps": result.step + 1, "start_from": str(tmp_path / "sft")}
    maxlm.train(maxlm.parse_config(config(tmp_path, "branch", tmp_path / "chats", **again)))
    beside = {path.name for path in (tmp_path / "branch" / "hf").iterdir()}
    assert beside == {*done.companions, "config.json"}, "a branch has them too, and no tensors"
    chat = ["generate", str(tmp_path / "sft"), "--chat", "what is 5?", "--max-tokens", "3"]
    assert main([*chat, "mesh.fsdp=4", "mesh.data=2"]) == 0, capsys.readouterr().err
    maxlm.train(maxlm.parse_config(config(tmp_path, "bytes", byte_store(tmp_path), steps=1, **start)))
    assert not (tmp_path / "bytes" / "hf").exists(), "its text has another tokenizer"
