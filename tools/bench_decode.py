"""Generation beside transformers with torch, on the same CPU: the same model, the same prompts, the same tokens.

    python tools/bench_decode.py                           # 110 million parameters, float32; needs `make test-oracles`
    python tools/bench_decode.py --dtype bfloat16 --batch 8 --rounds 5

A Llama of random weights is saved as transformers saves it, and both continue the same prompts greedily, in turns. The
first round of each, with compilation, is not counted. Columns: milliseconds until the first token, tokens per second
after it (medians), and maxlm's speed over that of transformers. Speeds count the tokens of all prompts.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as printed with --json."""
    import torch

    prompts = np.random.default_rng(0).integers(0, 32_000, (args.batch, args.prompt))
    with tempfile.TemporaryDirectory() as folder:
        peer = save_model(folder, args.layers, args.width).to(getattr(torch, args.dtype))
        opened = open_model(folder, dtype=args.dtype)
    generator = Generator(opened.model, opened.params, opened.mesh)
    sides = {
        "maxlm": lambda: ours(generator, prompts, args.tokens),
        "transformers": lambda: theirs(peer, prompts, args.tokens),
    }
    tokens = {name: run()[2] for name, run in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            times[name].append(run()[:2])
    made = args.batch * (args.tokens - 1)
    speeds = {name: statistics.median(made / rest for _, rest in found) for name, found in times.items()}
    return {
        "parameters": sum(p.numel() for p in peer.parameters()),
        "first_token_s": {name: statistics.median(first for first, _ in found) for name, found in times.items()},
        "tokens_per_s": speeds,
        "ratio": speeds["maxlm"] / speeds["transformers"],
        "same_tokens": float((tokens["maxlm"] == tokens["transformers"]).mean()),
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("layers", 12), ("width", 768), ("batch", 1), ("prompt", 64), ("tokens", 128), ("rounds", 3)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
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
    print(f"maxlm / transformers {result['ratio']:.2f}; {result['same_tokens']:.0%} of the tokens are the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
