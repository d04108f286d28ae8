"""`maxlm generate` from a folder: prompts, chats and files in, texts out, and one sentence for what cannot be."""

import io
import json

import numpy as np
import pytest
from test_convert_folders import write_model

from maxlm.cli import main

pytestmark = pytest.mark.usefixtures("compiled_once")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """A model of random weights, without a tokenizer."""
    write_model(tmp_path / "hf", dtype=np.dtype(np.float32))
    return tmp_path / "hf"


def add_tokenizer(folder, vocab_size=250):
    """A character for each id but the last, which ends texts."""
    from tokenizers import Tokenizer, decoders, models

    letters = ["\n", *map(chr, range(32, 127))]
    letters += [chr(0x100 + i) for i in range(vocab_size - 1 - len(letters))]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": vocab_size - 1}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text("{}")


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = main(["generate", *map(str, arguments)])
    return code, *capsys.readouterr()


def rows(capsys, *arguments):
    code, out, said = run(capsys, *arguments, "--json")
    assert code == 0, said
    return [json.loads(line) for line in out.split("\n") if line]


def test_prompts_files_and_standard_input_give_the_same_texts(folder, tmp_path, capsys, monkeypatch):
    add_tokenizer(folder)
    code, text, said = run(capsys, folder, "ab", "--max-tokens", 6)
    assert code == 0 and "tokens/s" in said
    (found,) = rows(capsys, folder, "ab", "--max-tokens", 6)
    assert (found["prompt"], found["text"] + "\n", found["tokens"]) == ("ab", text, 6)
    assert found["ended_by"] == "length"
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n\n{"prompt": "a longer one"}\n')
    from_file = rows(capsys, folder, "--file", tmp_path / "p.jsonl", "--max-tokens", 6, "--batch", 1)
    assert {r["number"]: r["text"] for r in from_file}[0] == found["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert rows(capsys, folder, "--max-tokens", 6)[0]["text"] == found["text"]
    on_mesh = rows(capsys, folder, "ab", "mesh.data=4", "--max-tokens", 6, "mesh.tensor=2")
    assert on_mesh[0]["text"] == found["text"]
    cut = rows(capsys, folder, "ab", "--max-tokens", 6, "--stop", found["text"][2])[0]
    assert cut["ended_by"] == "stop" and found["text"].startswith(cut["text"]) and len(cut["text"]) <= 2


def test_a_chat_is_what_the_template_makes_of_it(folder, tmp_path, capsys):
    add_tokenizer(folder)
    (plain,) = rows(capsys, folder, "[system] be brief\n[user] ab\n[a]", "--max-tokens", 4)
    (chat,) = rows(capsys, folder, "ab", "--chat", "--system", "be brief", "--max-tokens", 4)
    assert chat["text"] == plain["text"]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    assert rows(capsys, folder, "--file", tmp_path / "c.jsonl", "--max-tokens", 4)[0]["text"] == plain["text"]


def test_a_model_says_how_it_is_sampled(folder, capsys):
    add_tokenizer(folder)
    greedy = rows(capsys, folder, "ab", "--max-tokens", 12)[0]["text"]
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 50.0}')
    drawn = rows(capsys, folder, "ab", "--max-tokens", 12)[0]["text"]
    assert drawn != greedy == rows(capsys, folder, "ab", "--max-tokens", 12, "--temperature", 0)[0]["text"]
    assert drawn == rows(capsys, folder, "ab", "--max-tokens", 12)[0]["text"]
    assert drawn != rows(capsys, folder, "ab", "--max-tokens", 12, "--seed", 1)[0]["text"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ab", "--max-tokens", "0"], "--max-tokens=0"),
        (["ab", "--top-p", "1.5"], "top_p=1.5"),
        (["ab", "--stop", ""], "--stop"),
        (["ab", "--system", "x"], "--chat"),
        (["ab", "--file", "x"], "--file"),
        (["--file", "none.jsonl"], "none.jsonl does not exist"),
        (["ab", "mesh.tensors=2"], "did you mean mesh.tensor"),
        (["ab", "mesh.stage=2"], "stage"),
        ([""], "prompt 1 is empty"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, capsys, arguments, says):
    add_tokenizer(folder)
    code, out, said = run(capsys, folder, *arguments)
    assert (code, out) == (2, "")
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_prompts_are_checked_before_weights_are_read(folder, capsys):
    add_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"none")
    for prompt, says in [("", "prompt 1 is empty"), ("ab", "no safetensors file")]:
        code, _, said = run(capsys, folder, prompt)
        assert code == 2 and says in said


def test_lines_of_a_file_are_checked_before_anything_runs(folder, tmp_path, capsys):
    add_tokenizer(folder)
    for line in ("no json", '{"text": "a"}', '{"messages": []}', "[1]"):
        (tmp_path / "p.jsonl").write_text(f'{{"prompt": "ab"}}\n{line}\n')
        code, out, said = run(capsys, folder, "--file", tmp_path / "p.jsonl")
        assert (code, out) == (2, "") and "line 2" in said and said.count("\n") == 1


def test_a_folder_without_a_tokenizer_or_with_one_too_large_is_refused(folder, capsys):
    code, out, said = run(capsys, folder, "ab")
    assert (code, out) == (2, "") and "tokenizer" in said and said.count("\n") == 1
    add_tokenizer(folder, 300)
    code, out, said = run(capsys, folder, "ab")
    assert (code, out) == (2, "") and "vocab_size" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", '{"do_sample": true, "temperature": "hot"}'),
        ("generation_config.json", '{"do_sample": true, "top_p": 2}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": ["a"]}'),
        ("tokenizer.json", "{}"),
        ("chat_template.jinja", "{{ messages"),
    ],
)
def test_files_that_say_nothing_are_named(folder, capsys, name, text):
    add_tokenizer(folder)
    (folder / name).write_text(text)
    code, out, said = run(capsys, folder, "ab", "--chat")
    assert (code, out) == (2, "") and said.count("\n") == 1
    assert name.partition(".")[0] in said


def test_prompts_may_stand_behind_options(folder, capsys):
    add_tokenizer(folder)
    (wanted,) = rows(capsys, folder, "ab = c", "--chat", "--max-tokens", 4)
    assert rows(capsys, folder, "--chat", "ab = c", "--max-tokens", 4) == [wanted]
    assert rows(capsys, folder, "--max-tokens", 4, "--chat", "ab = c", "mesh.tensor=2")[0]["text"] == wanted["text"]
    with pytest.raises(SystemExit):
        run(capsys, folder, "ab", "--no-such-option")


def test_lines_of_a_file_end_where_json_says(folder, tmp_path, capsys):
    add_tokenizer(folder)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert len(rows(capsys, folder, "--file", tmp_path / "p.jsonl", "--max-tokens", 2)) == 2


@pytest.mark.parametrize(
    "line", ['{"messages": [1]}', '{"prompt": "\\ud800"}', '{"messages": [{"content": "\\ud800"}]}']
)
def test_what_is_no_text_is_told_with_its_line(line, folder, tmp_path, capsys):
    add_tokenizer(folder)
    (tmp_path / "p.jsonl").write_text(line)
    code, out, said = run(capsys, folder, "--file", tmp_path / "p.jsonl")
    assert (
        (code, out) == (2, "") and said.startswith(f"error: {tmp_path / 'p.jsonl'}, line 1") and said.count("\n") == 1
    )


def test_a_special_token_beyond_the_table_is_told_only_where_a_text_holds_it(folder, capsys):
    add_tokenizer(folder, vocab_size=251)  # such as Gemma 3's for images; the table has 250
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    assert config["vocab_size"] == 250
    assert run(capsys, folder, "ab", "--max-tokens", 2)[0] == 0
    code, _, said = run(capsys, folder, "ab<|endoftext|>", "--max-tokens", 2)
    assert code == 2 and "has the token 250, and vocab_size=250" in said
