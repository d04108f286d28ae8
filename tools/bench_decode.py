"""Generation beside transformers with torch, on the same CPU: the same model, the same prompts, the same tokens.

    python tools/bench_decode.py                           # 110 million parameters, float32; needs `make test-oracles`
    python tools/bench_decode.py --dtype bfloat16 --batch 8 --rounds 5
    python tools/bench_decode.py --alone --layers 32 --width 4096 --dtype bfloat16      # on an accelerator

A Llama of random weights is saved as transformers saves it, and both continue the same prompts greedily, in turns. The
first round of each, with compilation, is not counted. Columns: milliseconds until the first token, tokens per second
after it (medians), and maxlm's speed over that of transformers. Speeds count the tokens of all prompts. --alone leaves
transformers out. Where the catalog knows the device's memory bandwidth, the share of it that was reached is told: each
step reads all weights but the embedding table, and the keys and values of all tokens before.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_convert import write_model

from maxlm.flops import num_params
from maxlm.hardware import detect
from maxlm.infer.generate import Generator
from maxlm.infer.models import open_model


def save_model(folder: str, layers: int, width: int) -> Any:
    """Saves a Llama of random weights, and returns it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.05,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def ours(generator: Generator, prompts: np.ndarray, count: int) -> tuple[float, float, np.ndarray]:
    """Seconds to the first token and for the others, and the tokens [B, count]."""
    start, steps = time.perf_counter(), generator.tokens(prompts.tolist(), count)
    found = [next(steps)]
    first = time.perf_counter() - start
    found += steps
    return first, time.perf_counter() - start - first, np.stack(found, 1)


def theirs(model: Any, prompts: np.ndarray, count: int) -> tuple[float, float, np.ndarray]:
    """As ours, with transformers' generate."""
    import torch

    ids = torch.tensor(prompts)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, **options)
        first = time.perf_counter() - start
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, **options)
        rest = time.perf_counter() - start - first
    return first, rest, out[:, prompts.shape[1] :].numpy()


def share_of_bandwidth(opened: Any, args: argparse.Namespace, steps_per_s: float) -> float | None:
    """Share of the devices' memory bandwidth that reading weights and cache takes; None where it is not known."""
    chip, model = detect(opened.mesh.devices.flat[0]), opened.model
    if chip is None:
        return None
    weights = sum(x.nbytes for x in jax.tree.leaves(opened.params))
    weights -= 0 if model.tie_embeddings else opened.params["embed"].nbytes
    tokens = args.batch * (args.prompt + args.tokens / 2)
    cache = 2 * model.num_layers * model.kv_heads * model.head_size * tokens * np.dtype(model.dtype).itemsize
    return (weights + cache) * steps_per_s / (chip.hbm_bytes_per_s * opened.mesh.size)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as printed with --json."""
    prompts = np.random.default_rng(0).integers(0, 32_000, (args.batch, args.prompt))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        if args.alone:
            peer, _ = None, write_model(folder, args.layers, args.width)
        else:
            import torch

            peer = save_model(str(folder), args.layers, args.width).to(getattr(torch, args.dtype))
        opened = open_model(str(folder), dtype=args.dtype)
    generator = Generator(opened.model, opened.params, opened.mesh)
    sides = {"maxlm": lambda: ours(generator, prompts, args.tokens)}
    if peer is not None:
        sides["transformers"] = lambda: theirs(peer, prompts, args.tokens)
    tokens = {name: run()[2] for name, run in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            times[name].append(run()[:2])
    made = args.batch * (args.tokens - 1)
    speeds = {name: statistics.median(made / rest for _, rest in found) for name, found in times.items()}
    result = {
        "device": opened.mesh.devices.flat[0].device_kind,
        "parameters": num_params(opened.model)["total_unpadded"],
        "first_token_s": {name: statistics.median(first for first, _ in found) for name, found in times.items()},
        "tokens_per_s": speeds,
        "share_of_bandwidth": share_of_bandwidth(opened, args, speeds["maxlm"] / args.batch),
    }
    if peer is not None:
        result["ratio"] = speeds["maxlm"] / speeds["transformers"]
        result["same_tokens"] = float((tokens["maxlm"] == tokens["transformers"]).mean())
    return result


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("layers", 12), ("width", 768), ("batch", 1), ("prompt", 64), ("tokens", 128), ("rounds", 3)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['parameters'] / 1e6:.0f} M parameters, {args.dtype}, {args.batch} x {args.prompt} tokens")
    print(f"{'':14}{'first token':>12}{'tokens/s':>10}")
    for name, speed in result["tokens_per_s"].items():
        print(f"{name:14}{result['first_token_s'][name] * 1e3:9.0f} ms{speed:10.1f}")
    if result["share_of_bandwidth"] is not None:
        print(f"{result['share_of_bandwidth']:.0%} of the memory bandwidth of {result['device']}")
    if "ratio" in result:
        print(f"maxlm / transformers {result['ratio']:.2f}; {result['same_tokens']:.0%} of the tokens are the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
