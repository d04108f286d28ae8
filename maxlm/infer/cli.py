"""`maxlm generate`: continues prompts on the terminal."""

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from maxlm.config_file import mesh_of

DTYPES = ("bfloat16", "float32")
MESH_FIELD = re.compile(r"mesh\.\w+=\S*")
"""What is a setting among the prompts; such a text can be continued from --file."""
EXAMPLES = """examples:
  maxlm generate runs/quickstart "The harbour"                    continue a text
  maxlm generate Llama-3.2-1B-Instruct/ --chat "Why is the sky blue?" --max-tokens 200
  maxlm generate models/llama --file prompts.jsonl --json > out.jsonl
  maxlm generate Llama-3.1-8B/ "Once" mesh.tensor=4 --temperature 0.8 --top-p 0.95 --seed 7
  echo "Dear reader," | maxlm generate runs/a@2000 --stop "\\n\\n"
"""


def add_parser(subparsers: Any) -> None:
    """Adds `generate`; it sets `run`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts with a run's, a converted or a Hugging Face model",
        description="Continues prompts with a model, in batches, with a cache of keys and values.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_generate)
    parser.add_argument("model", metavar="MODEL", help="run folder (RUN or RUN@STEP), converted or Hugging Face folder")
    text = "texts, and settings such as mesh.tensor=4; without a text and --file: standard input"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=text)
    parser.add_argument("--file", metavar="FILE", help='.jsonl of {"prompt": text} or {"messages": [...]}, or one text')
    parser.add_argument("--chat", action="store_true", help="prompts are a user's messages; use the model's template")
    parser.add_argument("--system", metavar="TEXT", help="a system message ahead of them (with --chat)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a continuation, at most (256)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0: the likeliest tokens (the model's own, or 0)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="draw from the likeliest whose chances reach X; 1: all"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="and that have X of the likeliest one's chance; 0: all"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text (\\n is understood)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at a time (8)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and computation (float32 on CPUs, else bfloat16)")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per prompt, in the order they are done"
    )


def _generate(args: argparse.Namespace) -> int:
    mesh = mesh_of([*filter(MESH_FIELD.fullmatch, args.prompts)])
    args.prompts = [prompt for prompt in args.prompts if not MESH_FIELD.fullmatch(prompt)]
    _check(args)
    requests = _requests(args)
    from maxlm.infer.generate import Generator, check_prompts
    from maxlm.infer.model_text import ModelText
    from maxlm.infer.models import find_model
    from maxlm.infer.texts import Options, continue_texts

    found = find_model(args.model)
    check_prompts(found.model, [], args.max_tokens)  # and what follows: weights are read when all else is right
    text = ModelText.of(found)
    stop = tuple(stop.replace("\\n", "\n") for stop in args.stop)
    options = Options(args.max_tokens, _sampling(args, found.folder), stop, args.seed, args.batch)
    read = functools.cache(_template)
    prompts = [_encoded(request, args, lambda: read(args.model, found.folder), text) for request in requests]
    check_prompts(found.model, prompts, args.max_tokens)
    opened = found.open(mesh, args.dtype or _dtype())
    generator = Generator(opened.model, opened.params, opened.mesh)
    shown = _Shown(args, requests)
    start, num_tokens = time.perf_counter(), 0
    for done in continue_texts(generator, text.decode, text.eos_ids, prompts, options, shown.piece):
        num_tokens += len(done.ids)
        shown.done(done)
    seconds = time.perf_counter() - start
    print(
        f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s with compilation",
        file=sys.stderr,
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} must be a count from 1")
    if not -(2**31) <= args.seed < 2**31:
        raise ValueError(f"--seed={args.seed} must be below 2**31")
    if args.system is not None and not args.chat:
        raise ValueError("--system is a message, so it needs --chat")
    if args.file and args.prompts:
        raise ValueError("prompts are given and in --file too; leave one of them out")
    if "" in args.stop:
        raise ValueError("--stop is an empty text, which would end everything at once")


def _requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """{"prompt": text} or {"messages": [...]} of each."""
    if args.prompts or not args.file:
        prompts = args.prompts or [sys.stdin.read().rstrip("\n")]
        return [_is_text({"prompt": prompt}, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
    path = Path(args.file)
    try:
        data = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"--file {path} does not exist") from None
    except UnicodeDecodeError:
        raise ValueError(f"--file {path} is not UTF-8 text") from None
    if path.suffix != ".jsonl":
        return [{"prompt": data.rstrip("\n")}]
    found = [_request(path, i, line) for i, line in enumerate(data.split("\n"), 1) if line.strip()]
    if not found:
        raise ValueError(f"--file {path} has no prompt")
    return found


def _request(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}, line {number}: not a JSON object") from None
    if isinstance(found, dict):
        messages, where = found.get("messages"), f"{path}, line {number}"
        if isinstance(found.get("prompt"), str):
            return _is_text({"prompt": found["prompt"]}, where)
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            return _is_text({"messages": messages}, where)
    raise ValueError(f'{path}, line {number}: {{"prompt": text}} or {{"messages": [...]}} belongs there')


def _is_text(request: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, if all its text can be written as UTF-8."""
    try:
        json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is no text: it holds bytes that are not UTF-8, or half of a character") from None
    return request


def _dtype() -> Any:
    """CPUs have no products of bfloat16 worth the name."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _template(model: str, folder: str | None) -> Any:
    from maxlm.chat import ChatTemplate

    if folder is None:
        raise ValueError(f"{model} has no chat template; leave out --chat and messages")
    return ChatTemplate.read(folder)


def _encoded(request: dict[str, Any], args: argparse.Namespace, template: Callable[[], Any], text: Any) -> list[int]:
    messages = request.get("messages")
    if messages is None and not args.chat:
        return text.encode(request["prompt"])
    if messages is None:
        messages = [{"role": "user", "content": request["prompt"]}]
    if args.system is not None:
        messages = [{"role": "system", "content": args.system}, *messages]
    return text.encode(template().render(messages, add_generation_prompt=True), as_document=False)


def _sampling(args: argparse.Namespace, folder: str | None) -> Any:
    from maxlm.infer.model_text import read_sampling
    from maxlm.infer.sampling import Sampling

    given = {n: v for n in ("temperature", "top_k", "top_p", "min_p") if (v := getattr(args, n)) is not None}
    own = read_sampling(folder) if folder else Sampling()
    if own.temperature == 0 and "temperature" not in given and given:
        given["temperature"] = 1.0  # who sets --top-p wants tokens to be drawn
    return replace(own, **given)


class _Shown:
    """What is printed: one text as it grows, of several each when it is done."""

    def __init__(self, args: argparse.Namespace, requests: list[dict[str, Any]]):
        self._json, self._requests, self._grows = args.json, requests, len(requests) == 1 and not args.json

    def piece(self, number: int, piece: str) -> None:
        if self._grows:
            print(piece, end="", flush=True)

    def done(self, done: Any) -> None:
        request = self._requests[done.number]
        if self._json:
            row = {**request, "number": done.number, "text": done.text, "tokens": len(done.ids)}
            print(json.dumps({**row, "ended_by": done.ended_by}, ensure_ascii=False), flush=True)
        elif self._grows:
            print()
        else:
            print(f"--- {done.number + 1}: {request.get('prompt', '')}\n{done.text}", flush=True)
