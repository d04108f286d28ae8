"""Evaluation gives the numbers of transformers and of lm-eval's own model."""

import json
import math
import os

import numpy as np
import pytest
from test_evaluate import ONE, TEXT, model_with_tokenizer

from maxlm.cli import main
from maxlm.evaluate.lm_eval_model import make_generate, make_lm
from maxlm.evaluate.perplexity import windows
from maxlm.evaluate.scoring import Scorer
from maxlm.infer.models import open_model

pytestmark = [pytest.mark.oracle, pytest.mark.slow]


def theirs(folder):
    """The same folder in transformers, in float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32").eval()


@pytest.mark.parametrize(("context", "stride"), [(32, 8), (48, 47)])
def test_perplexity_is_that_of_transformers_in_the_same_windows(context, stride, tmp_path, capsys):
    import torch

    folder = model_with_tokenizer(tmp_path / "hf")
    (tmp_path / "text").write_text(TEXT)
    args = ["eval", "perplexity", str(folder), "--text", str(tmp_path / "text"), "--dtype", "float32", "--json"]
    assert main([*args, "--context", str(context), "--stride", str(stride), "mesh.fake_devices=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = theirs(folder)
    ids = open_model(str(folder), ONE).tokenizer.encode_batch([TEXT])[0].astype(np.int64)
    total = 0.0
    for start, first, stop in windows(len(ids), context, stride):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None, start:stop])).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[start + 1 : stop]), reduction="none")
        total += float(losses[first - start - 1 :].sum())
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)


def write_tasks(folder):
    """Three small tasks for lm-eval: of choices, of a whole text, of generated text."""
    folder.mkdir()
    words = ["cat", "dog", "mat", "hat", "the", "sat on"]
    docs = [
        {"q": f"the {words[i % 6]} and", "choices": [words[i % 5], words[(i + 2) % 6], "on the mat"], "answer": i % 3}
        for i in range(12)
    ]
    texts = [{"text": TEXT[: 37 * (i + 1)]} for i in range(4)]
    for name, rows in (("docs", docs), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = lambda name: (  # noqa: E731
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / name}.jsonl\ntest_split: test\nmetadata:\n  version: 1\n"
    )
    (folder / "choices.yaml").write_text(
        f"task: our_choices\noutput_type: multiple_choice\n{files('docs')}"
        'doc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n'
        "  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: our_texts\noutput_type: loglikelihood_rolling\n{files('texts')}"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
        "  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (folder / "generate.yaml").write_text(
        f"task: our_words\noutput_type: generate_until\n{files('docs')}"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["\\n"]\n'
        "  max_gen_toks: 8\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    )
    return folder


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it brings
def test_lm_eval_gives_what_its_own_model_gives(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    folder, tasks = model_with_tokenizer(tmp_path / "hf"), write_tasks(tmp_path / "tasks")
    names = ["our_choices", "our_texts", "our_words"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token
    want = HFLM(pretrained=theirs(folder), tokenizer=tokenizer, max_length=64, batch_size=2, device="cpu")
    opened = open_model(str(folder), ONE, "float32")
    ours = make_lm(Scorer(opened, ONE, 256), make_generate(opened, 2))

    pairs = [("the cat", " sat"), ("", "the dog"), ("the ", "cat"), (TEXT[:200], " the hat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, (TEXT[:n],), i) for i, n in enumerate((5, 64, 330))]
    a, b = ours.loglikelihood(requests), want.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in a], [x for x, _ in b], atol=1e-4)
    assert [hit for _, hit in a] == [hit for _, hit in b]
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), want.loglikelihood_rolling(rolling), rtol=1e-6)
    options = {"until": ["\n", "zz"], "max_gen_toks": 8, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, options), i) for i, (text, _) in enumerate(pairs) if text]
    texts = ours.generate_until(prompts)
    assert texts == want.generate_until(prompts)
    assert any(texts)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    reference = simple_evaluate(want, tasks=names, task_manager=manager)["results"]
    capsys.readouterr()
    args = ["eval", "lm-eval", str(folder), "--include-path", str(tasks), "--dtype", "float32", "mesh.fake_devices=1"]
    assert main([*args, "--tasks", ",".join(names), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    for task, metrics in (
        ("our_choices", ("acc", "acc_norm")),
        ("our_texts", ("word_perplexity", "bits_per_byte")),
        ("our_words", ("exact_match",)),
    ):
        for metric in metrics:
            assert found[task][f"{metric},none"] == pytest.approx(reference[task][f"{metric},none"], rel=1e-5)
    assert 0 < found["our_choices"]["acc,none"] < 1
    assert main([*args, "--tasks", "nothing"]) == 2
    assert "task nothing is not known" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
