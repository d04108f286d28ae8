"""`maxlm eval`: perplexity of texts, multiple choice, and the tasks of lm-eval."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from maxlm.commands import add_command
from maxlm.config_file import ConfigError, mesh_of

BATCH_TOKENS = 8192
LONGEST_CONTEXT = 4096
"""Tokens of a window, unless given: models that were made for many more are slow to be measured with all of them."""
EXAMPLES = {
    "perplexity": "examples:\n  maxlm eval perplexity runs/a --store stores/docs\n"
    "  maxlm eval perplexity Llama-3.1-8B/ --text book.txt --context 4096 --stride 2048 mesh.tensor=4",
    "choices": 'example:\n  maxlm eval choices runs/a questions.jsonl\n\nA line: {"question": "2 + 2 =", "choices": '
    '["3", "4"], "answer": 1}',
    "lm-eval": "example:\n  maxlm eval lm-eval Llama-3.1-8B/ --tasks hellaswag,arc_easy --limit 100",
}


def add_parser(subparsers: Any) -> None:
    """Adds `eval perplexity`, `eval choices` and `eval lm-eval`; each sets `run`."""
    parser = subparsers.add_parser(
        "eval", help="evaluate a model: perplexity, multiple choice, lm-eval", description="Evaluates a model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    perplexity = _add(commands, "perplexity", _perplexity, "perplexity of a text, by windows that slide over it")
    text = perplexity.add_mutually_exclusive_group(required=True)
    text.add_argument("--store", metavar="STORE", help="token store; its documents are one text, one after another")
    text.add_argument("--text", metavar="FILE", help="UTF-8 text, which the model's tokenizer encodes")
    perplexity.add_argument("--split", choices=("heldout", "train"), default="heldout", help="of the store (heldout)")
    perplexity.add_argument("--context", type=int, metavar="T", help="tokens of a window (the model's, up to 4096)")
    perplexity.add_argument("--stride", type=int, metavar="S", help="tokens by which it moves on (half the context)")

    choices = _add(commands, "choices", _choices, "accuracy over questions with given answers")
    choices.add_argument("file", metavar="FILE", help=".jsonl, a question each line")

    tasks = _add(commands, "lm-eval", _lm_eval, "run tasks of EleutherAI's lm-eval: pip install 'maxlm[eval]'")
    tasks.add_argument("--tasks", required=True, metavar="NAMES", help="names of tasks, with commas, or a folder")
    tasks.add_argument("--include-path", metavar="FOLDER", help="folder of more tasks (YAML)")
    tasks.add_argument("--limit", type=int, metavar="N", help="only so many examples of each task")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in each prompt (as the task says)")
    for command in (perplexity, choices, tasks):  # behind FILE
        command.add_argument("overrides", metavar="mesh.field=value", nargs="*", help="the mesh, such as mesh.tensor=4")


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
    command = add_command(commands, name, run, text, EXAMPLES[name])
    command.add_argument("model", metavar="MODEL", help="run folder, converted model or Hugging Face folder; @STEP")
    command.add_argument("--batch", type=int, metavar="B", help="rows of full context at a time (8192 tokens)")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights (bfloat16)")
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _perplexity(args: argparse.Namespace) -> int:
    from maxlm.evaluate import perplexity
    from maxlm.evaluate.scoring import EvaluationError

    context, stride = args.context, args.stride
    if context is not None:
        perplexity.check_windows(context, _stride(context, stride))
    for path in filter(None, [args.text]):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--text {path} is not a file")
        if not os.path.getsize(path):
            raise EvaluationError(f"--text {path} is empty; a perplexity needs some text")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(_store(args.store)) if args.store else None
        scorer = _scorer(args, context)
        opened = scorer.opened
        context = min(opened.context, LONGEST_CONTEXT) if context is None else context
        if store is not None:
            if store.vocab_size > opened.model.vocab_size:
                raise EvaluationError(
                    f"--store {args.store} has token ids up to {store.vocab_size - 1}, and {args.model} has "
                    f"embeddings for vocab_size={opened.model.vocab_size}"
                )
            num_tokens, num_bytes = store.num_tokens(args.split), store.num_bytes(args.split)
            read: perplexity.Read = lambda start, stop: store.read(args.split, start, stop)  # noqa: E731
        else:
            ids, num_bytes = _encoded(opened.tokenizer, args.text)
            num_tokens, read = len(ids), lambda start, stop: ids[start:stop]
        advance = stack.enter_context(_track("evaluate", max(0, num_tokens - 1), "tokens"))
        stride = _stride(context, stride)
        found = perplexity.measure(scorer, read, num_tokens, num_bytes, context, stride, advance)
    facts = {"model": opened.place, "text": args.text or args.store, "dtype": args.dtype, **found.facts()}
    if args.json:
        print(json.dumps(facts))
        return 0
    print(
        f"{facts['text']} with {opened.place}: perplexity {found.perplexity:.4f}, {found.nats_per_token:.4f} nats/token"
        f", {found.bits_per_byte:.4f} bits/byte\n  {found.tokens:,} tokens, context {context}, stride {stride}"
    )
    return 0


def _choices(args: argparse.Namespace) -> int:
    from maxlm.evaluate import choices

    if not os.path.isfile(args.file):
        raise FileNotFoundError(f"{args.file} is not a file of questions")
    with open(args.file, "rb") as file:
        questions = choices.read_questions(file, args.file)
    scorer = _scorer(args, None)
    with _track("evaluate", sum(len(q.choices) for q in questions), "choices") as advance:
        found, scores = choices.measure(scorer, questions, advance)
    facts = {name: None if x != x else x for name, x in asdict(found).items()}  # JSON has no NaN
    if args.json:
        print(json.dumps({"model": scorer.opened.place, "file": args.file, **facts, "loglikelihoods": scores}))
        return 0
    accuracies = []
    for name in ("acc", "acc_norm"):
        stderr = facts[f"{name}_stderr"]  # a single question has none
        accuracies.append(f"{name} {facts[name]:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}"))
    print(f"{args.file} with {scorer.opened.place}: {found.questions:,} questions\n  {', '.join(accuracies)}")
    return 0


def _lm_eval(args: argparse.Namespace) -> int:
    from maxlm.evaluate import lm_eval_model

    lm_eval_model.check_installed()
    found = lm_eval_model.run_tasks(
        _scorer(args, None),
        args.tasks.split(","),
        args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    if args.json:
        print(json.dumps({"model": args.model, "results": found}, default=str))
        return 0
    for task, values in found.items():
        figures = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float) and math.isfinite(v)]
        print(f"{task}: {', '.join(figures)}")
    return 0


def _scorer(args: argparse.Namespace, context: int | None) -> Any:
    """The model, opened."""
    if args.batch is not None and args.batch < 1:
        raise ConfigError(f"--batch {args.batch} must be 1 or more")
    mesh = mesh_of(args.overrides)
    from maxlm.evaluate.scoring import Scorer
    from maxlm.infer.models import open_model

    opened = open_model(args.model, mesh, args.dtype)
    row = min(context or opened.context, BATCH_TOKENS)
    return Scorer(opened, mesh, args.batch * row if args.batch else BATCH_TOKENS)


@contextlib.contextmanager
def _store(path: str) -> Iterator[Any]:
    from maxlm.data.store import TokenStore

    with contextlib.closing(TokenStore(path)) as store:
        yield store


def _encoded(tokenizer: Any, path: str) -> tuple[np.ndarray, int]:
    """Token ids of a text, behind the token that begins documents if there is one, and the text's bytes."""
    from maxlm.evaluate.scoring import EvaluationError

    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"--text {path} is not UTF-8 at byte {error.start}; convert it") from None
    ids = tokenizer.encode_batch([text])[0]
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.asarray(first, ids.dtype), ids]), len(data)


def _stride(context: int, stride: int | None) -> int:
    return max(1, context // 2) if stride is None else stride


def _track(label: str, total: int, unit: str) -> Any:
    from rich.console import Console

    from maxlm.progress import track

    return track(label, total, unit, Console(stderr=True))
