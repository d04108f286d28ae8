"""`maxlm convert`: from Hugging Face folders to checkpoints and back."""

import argparse
import gc
import importlib
import json
import shlex
from typing import Any

from maxlm import units
from maxlm.commands import add_command

DTYPES = ("float32", "bfloat16", "float16")
EXAMPLES = {
    "from-hf": "examples:\n  maxlm convert from-hf Llama-3.1-8B/ models/llama3.1-8b --verify\n"
    "  maxlm train configs/my.yaml train.init_from=models/llama3.1-8b",
    "to-hf": "examples:\n  maxlm convert to-hf runs/a a-hf --dtype bfloat16 --like Llama-3.1-8B/\n"
    "  maxlm convert to-hf models/llama3.1-8b back --verify",
}


def add_parser(subparsers: Any) -> None:
    """Adds `convert from-hf` and `convert to-hf`; each sets `run`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert Hugging Face folders to checkpoints and back",
        description="Converts models a few tensors at a time: never the whole of one is in memory.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "make a checkpoint of a local folder of safetensors"
    from_hf = add_command(commands, "from-hf", _from_hf, text, EXAMPLES["from-hf"])
    from_hf.add_argument("folder", metavar="FOLDER", help="with config.json and model.safetensors, or an index")
    text = "make a folder that transformers loads of a run's checkpoint"
    to_hf = add_command(commands, "to-hf", _to_hf, text, EXAMPLES["to-hf"])
    to_hf.add_argument("folder", metavar="RUN", help="folder of a run, or one that from-hf made; RUN@STEP")
    to_hf.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (the newest)")
    to_hf.add_argument("--like", metavar="FOLDER", help="take the tokenizer and further settings from here (RUN/hf)")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="files of at most so many GB (5)")
    for command in (from_hf, to_hf):
        command.add_argument("out", metavar="OUT", help="the new folder")
        command.add_argument("--dtype", choices=DTYPES, help="type of what is written (that of what is read)")
        command.add_argument("--verify", action="store_true", help="read both sides again and compare every bit")
        command.add_argument("--json", action="store_true", help="print what was converted as JSON")


def _from_hf(args: argparse.Namespace) -> int:
    from_hf = _loaded("from_hf").from_hf
    done = from_hf(args.folder, args.out, dtype=args.dtype, verify=args.verify, console=_console())
    then = f"put model.yaml's section into a config, and set train.init_from={shlex.quote(args.out)}"
    if not done.model.causal:
        then = f"Encoder(open_model({args.out!r})).hidden_states(texts), see docs/convert.md"
    _show(args, done, then)
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    to_hf = _loaded("to_hf").to_hf
    from maxlm.convert.folders import ConvertError

    if not 0 < args.shard_gb < 1e6:
        raise ConvertError(f"--shard-gb={args.shard_gb} is to be a size in GB, above 0")
    done = to_hf(
        args.folder,
        args.out,
        step=args.step,
        like=args.like,
        dtype=args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        verify=args.verify,
        console=_console(),
    )
    kind = "CausalLM" if done.model.causal else "MaskedLM"
    _show(args, done, f"AutoModelFor{kind}.from_pretrained({args.out!r})")
    return 0


def _show(args: argparse.Namespace, done: Any, then: str) -> None:
    facts = {"out": args.out, "family": done.family, "tensors": done.num_tensors, "bytes": done.num_bytes}
    if args.json:
        print(json.dumps({**facts, "companions": done.companions, "left_out": done.left_out, "verified": args.verify}))
        return
    print(
        f"{args.out}: {done.family}, {done.num_tensors:,} tensors, {units.size(done.num_bytes)}"
        + (", the same bits on both sides" if args.verify else "")
    )
    if done.left_out:
        print(f"  left out, no part of the model: {', '.join(done.left_out)}")
    print(f"  came along: {', '.join(done.companions) or 'nothing'}\n  next: {then}")


def _loaded(name: str) -> Any:
    """A module of maxlm.convert, with JAX on the CPU: accelerators may be busy training."""
    gc.disable()  # imports make objects that stay, and the collector visits them often, and once more at the end
    import jax

    jax.config.update("jax_platforms", "cpu")
    module = importlib.import_module(f"maxlm.convert.{name}")
    gc.freeze()
    gc.enable()
    return module


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
