"""`maxlm data`: build token stores, train a tokenizer, look into a store."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from maxlm import storage
from maxlm.commands import add_command
from maxlm.data import sources
from maxlm.data.build import Progress, build_store
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, TokenStore
from maxlm.data.tokenizer import train_bpe

TEXT_HELP = "files (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), folders, quoted globs, or python:stdlib"
SAMPLE_TOKENS = 120

_BUILD_EXAMPLES = """\
examples:
  maxlm data build corpus/ --out data/corpus
  maxlm data build "web/*.jsonl.zst" --text-field content --tokenizer tokenizer.json --out gs://bucket/web
  maxlm data build chats.jsonl --chat models/llama --out data/chats      # conversations, to fine-tune on the answers
  maxlm data build python:stdlib --out /tmp/py          # needs no download: Python's own source code

A build that is interrupted continues when the same command is run again, and gives the same bytes.
Documents are held out for evaluation by a hash of their text, so the same ones each time.
"""
_TRAIN_EXAMPLES = """\
example:
  maxlm data train-tokenizer corpus/ --vocab-size 32000 --out tokenizer.json
  maxlm data build corpus/ --tokenizer tokenizer.json --out data/corpus
"""
_INFO_EXAMPLES = """\
examples:
  maxlm data info data/corpus
  maxlm data info s3://bucket/corpus --verify --json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `data build`, `data train-tokenizer` and `data info`.

    Each sets `run`, a function of the parsed arguments that returns the exit code and raises ValueError or OSError
    with one sentence for what the user can mend.
    """
    data = subparsers.add_parser(
        "data",
        help="build token stores from text, train tokenizers, inspect stores",
        description="Turns text into token stores, the form in which maxlm reads training data.",
    )
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_train_tokenizer(commands)
    _add_info(commands)


def _add_build(commands: Any) -> None:
    parser = add_command(commands, "build", _build, "tokenize text into a store, in parallel", _BUILD_EXAMPLES)
    parser.add_argument("text", nargs="+", metavar="TEXT", help=TEXT_HELP)
    parser.add_argument("--out", required=True, metavar="STORE", help="folder or gs://, s3:// url of the new store")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        metavar="NAME",
        help="byte (default; 256 bytes and one end token), a tokenizer.json, or a SentencePiece .model",
    )
    parser.add_argument(
        "--chat",
        metavar="FOLDER",
        help='TEXT are .jsonl files of conversations, {"messages": [{"role": ..., "content": ...}, ...]} per line, '
        "written by the chat template and tokenizer.json of this folder (Hugging Face, or maxlm convert from-hf)",
    )
    parser.add_argument(
        "--heldout", type=float, default=0.01, metavar="SHARE", help="share of documents kept for evaluation (0.01)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="KEY", help="key of JSON lines, column of parquet (text)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (one per core)")
    parser.add_argument("--eos", metavar="TOKEN", help="token that ends documents, if it has none of the usual names")
    parser.add_argument(
        "--bos", metavar="TOKEN", help="token that begins documents; none for none (default: the usual names)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a complete store, once the new one is ready")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")


def _add_train_tokenizer(commands: Any) -> None:
    about = "train a byte-level BPE tokenizer on text"
    parser = add_command(commands, "train-tokenizer", _train_tokenizer, about, _TRAIN_EXAMPLES)
    parser.add_argument("text", nargs="+", metavar="TEXT", help=TEXT_HELP)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="token ids, as a count (257 or more)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it, such as tokenizer.json")
    parser.add_argument(
        "--text-field", default="text", metavar="KEY", help="key of JSON lines, column of parquet (text)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_info(commands: Any) -> None:
    parser = add_command(commands, "info", _info, "show what a store holds", _INFO_EXAMPLES)
    parser.add_argument("store", metavar="STORE", help="folder or gs://, s3:// url of a store")
    parser.add_argument("--verify", action="store_true", help="read all tokens and compare them with the recorded hash")
    parser.add_argument("--json", action="store_true", help="print the manifest and the sample as JSON")


def _build(args: argparse.Namespace) -> int:
    with show_progress() as progress:
        manifest = build_store(
            args.text,
            args.out,
            args.tokenizer,
            heldout=args.heldout,
            workers=args.workers,
            text_field=args.text_field,
            eos=args.eos,
            bos=args.bos,
            overwrite=args.overwrite,
            chat=args.chat,
            progress=progress,
        )
    if args.json:
        print(json.dumps({"store": args.out, **manifest}))
    else:
        print(_summary(args.out, manifest))
        print(
            f"next: set data.stores to [{{path: {args.out}}}] in a config, or look inside: maxlm data info {args.out}"
        )
    return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
    if storage.exists(args.out) and not args.overwrite:
        raise DataError(f"{args.out} already exists; choose another --out, or replace it with --overwrite")
    files = sources.expand(args.text)
    total = sum(file.num_bytes for file in files)
    texts = (document.text for file in files for document in sources.read_documents(file, args.text_field))
    with show_progress() as progress:
        data = train_bpe(texts, args.vocab_size, lambda done: progress("read", min(done, total), total))
    storage.write_bytes(args.out, data)
    print(f"{args.out}: {len(json.loads(data)['model']['vocab']):,} tokens, trained on {len(files):,} files")
    print(f"next: maxlm data build TEXT --tokenizer {args.out} --out STORE")
    return 0


def _info(args: argparse.Namespace) -> int:
    store = TokenStore(args.store)
    if args.verify:
        for split in SPLITS:
            store.verify(split)
    sample = store.tokenizer().decode(store.read("train", 0, min(SAMPLE_TOKENS, store.num_tokens("train"))))
    if args.json:
        print(json.dumps({"store": args.store, **store.manifest, "sample": sample}))
        return 0
    print(_summary(args.store, store.manifest))
    if args.verify:
        print("  verified   all tokens are as they were written")
    entries = store.manifest["sources"]
    print(f"  sources    {len(entries):,} files, {_size(sum(entry['num_bytes'] for entry in entries))}")
    for entry in entries[:5]:
        print(f"             {entry['name']}  {_size(entry['num_bytes'])}  sha256 {entry['sha256'][:12]}")
    if len(entries) > 5:
        print(f"             ... and {len(entries) - 5:,} more (--json lists all)")
    print("  sample     " + sample.replace("\n", "\n             "))
    return 0


def _summary(path: str, manifest: dict[str, Any]) -> str:
    tokenizer = manifest["tokenizer"]
    lines = [
        f"token store {path}",
        f"  tokenizer  {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, end of document {tokenizer['eos_id']}, "
        f"sha256 {tokenizer['sha256'][:12]}",
    ]
    for split, counts in manifest["splits"].items():
        ratio = f", {counts['num_bytes'] / counts['num_tokens']:.2f} bytes per token" if counts["num_tokens"] else ""
        replaced = f", {counts['replaced_bytes']:,} invalid bytes replaced" if counts["replaced_bytes"] else ""
        learned = f", {counts['num_learned']:,} learned" if counts.get("num_learned") is not None else ""
        lines.append(
            f"  {split:9}  {counts['num_tokens']:,} tokens in {counts['num_documents']:,} documents, "
            f"{_size(counts['num_bytes'])} of text{ratio}{replaced}{learned}"
        )
    if skipped := manifest["options"].get("skipped"):
        lines.append("  skipped    " + ", ".join(f"{count:,}: {reason}" for reason, count in skipped.items()))
    if manifest["options"]["heldout"] > 0 and not manifest["splits"]["heldout"]["num_tokens"]:
        lines.append("             nothing is held out, since there is only one document; give more, or smaller files")
    return "\n".join(lines)


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Yields a Progress that draws bytes, MB/s and time left on standard error; plain lines if it is no terminal."""
    if not sys.stderr.isatty():
        yield _plain_progress(time.monotonic())
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with RichProgress(TextColumn("{task.description:9}"), *columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield update


def _plain_progress(start: float, interval_s: float = 10.0) -> Progress:
    """A line every ten seconds, and one at the end of each stage that took longer."""
    begun: dict[str, float] = {}
    shown: dict[str, float] = {}

    def update(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun.setdefault(stage, now if begun else start)
        elapsed = max(now - begun[stage], 1e-9)
        last = shown.get(stage, begun[stage])
        if now - last < interval_s and not (done >= total and stage in shown):
            return
        shown[stage] = now
        left = elapsed * (total - done) / max(done, 1)
        rate = done / elapsed / 1e6
        print(
            f"{stage}: {_size(done)} of {_size(total)}, {rate:.1f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True
        )

    return update


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
