import argparse
import json

import pytest

from maxlm.data import cli
from maxlm.data.sources import DataError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("maxlm")
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


def test_from_text_to_a_look_inside(corpus, tmp_path, capsys):
    tokenizer, store = tmp_path / "t.json", tmp_path / "store"
    assert run("train-tokenizer", corpus, "--vocab-size", 300, "--out", tokenizer) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert run("build", corpus, "--tokenizer", tokenizer, "--out", store, "--heldout", 0.1) == 0
    assert f"data.stores to [{{path: {store}}}]" in capsys.readouterr().out
    assert run("info", store, "--verify") == 0
    shown = capsys.readouterr().out
    assert "tokenizers, 300 ids" in shown and "all tokens are as they were written" in shown
    first = json.loads((corpus / "a.jsonl").read_text().splitlines()[0])["text"]
    assert first[:20] in shown or "sample" in shown


def test_json_output_is_json_alone(corpus, tmp_path, capsys):
    store = tmp_path / "store"
    run("build", corpus, "--out", store, "--json")
    built = json.loads(capsys.readouterr().out)
    run("info", store, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert built["splits"] == shown["splits"] and shown["sample"] and len(shown["sources"]) == 33


def test_one_document_says_why_nothing_is_held_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("all there is")
    run("build", tmp_path / "a.txt", "--out", tmp_path / "store")
    assert "nothing is held out, since there is only one document" in capsys.readouterr().out


def test_existing_tokenizers_are_kept(corpus, tmp_path):
    (tmp_path / "t.json").write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        run("train-tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == "mine"


@pytest.mark.parametrize("command", ["build", "train-tokenizer", "info"])
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit):
        run(command, "--help")
    examples = [line.split("#")[0].split() for line in capsys.readouterr().out.splitlines() if "  maxlm data" in line]
    assert examples
    parser = argparse.ArgumentParser("maxlm")
    cli.add_parser(parser.add_subparsers())
    for example in examples:
        assert parser.parse_args([word.strip('"') for word in example[1:]]).run


def test_slow_work_reports_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 20.0, 30.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    with cli.show_progress() as progress:
        for done in (10, 120, 160, 200):
            progress("tokenize", done * 10**6, 200 * 10**6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenize: 120.0 MB of 200.0 MB, 10.0 MB/s, 8 s left"
    assert lines[-1].startswith("tokenize: 200.0 MB of 200.0 MB")
