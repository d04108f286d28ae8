"""Build speed: text per second of a store build, as a share of what the `tokenizers` library alone reaches.

Both encode the same text, with the same tokenizer and on the same cores, by turns; medians count. The library gets
the documents in memory and its tokens are thrown away; the build reads, splits, hashes and writes as well. What a
build spends on starting its processes is part of it, so more text (--repeat) gives a higher share. Wanted: 0.85.

    python tools/bench_build.py                        # three times the standard library, 95 MB
    python tools/bench_build.py --repeat 1 --rounds 1  # a short form
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from maxlm.data import sources
from maxlm.data.build import build_store
from maxlm.data.tokenizer import train_bpe

WANTED = 0.85

ALONE = """
import json, sys, time
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
encode = getattr(tokenizer, sys.argv[3])
start = time.perf_counter()
tokens = 0
for first in range(0, len(texts), 1000):
    tokens += sum(map(len, encode(texts[first : first + 1000], add_special_tokens=False)))
print(time.perf_counter() - start)
"""


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=["python:stdlib"], help="text to encode (python:stdlib)")
    parser.add_argument("--repeat", type=int, default=3, help="copies of the text (3)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (3)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="ids of the tokenizer, trained first (8192)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = os.path.join(folder, "text.jsonl"), os.path.join(folder, "tokenizer.json")
        num_bytes = _write_text(args, text, tokenizer)
        ways: dict[str, Callable[[], float]] = {
            "encode_batch": lambda: _alone(tokenizer, text, "encode_batch"),
            "encode_batch_fast": lambda: _alone(tokenizer, text, "encode_batch_fast"),
            "build": lambda: _build(text, os.path.join(folder, "store"), tokenizer),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                times[name].append(way())
    result = {f"{name}_mb_per_s": num_bytes / 1e6 / statistics.median(taken) for name, taken in times.items()}
    result |= {f"ratio_to_{name}": result["build_mb_per_s"] / result[f"{name}_mb_per_s"] for name in list(ways)[:2]}
    result |= {"text_mb": num_bytes / 1e6, "cores": len(os.sched_getaffinity(0)), "wanted_ratio": WANTED}
    if args.json:
        print(json.dumps({"times_s": times, **result}))
    else:
        for name, value in result.items():
            print(f"{name:28} {value:.2f}")
    return 0 if result["ratio_to_encode_batch"] >= WANTED else 1


def _write_text(args: argparse.Namespace, text: str, tokenizer: str) -> int:
    """Writes the documents as one JSON lines file and trains a tokenizer; returns UTF-8 bytes."""
    documents = [d.text for source in sources.expand(args.text) for d in sources.read_documents(source)]
    with open(text, "w", encoding="utf-8") as file:
        for _ in range(args.repeat):
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    with open(tokenizer, "wb") as file:
        file.write(train_bpe(documents, args.vocab_size))
    return args.repeat * sum(len(document.encode()) for document in documents)


def _alone(tokenizer: str, text: str, method: str) -> float:
    # In a process of its own, as a build's workers are: caches that warm up over rounds would not be fair.
    done = subprocess.run([sys.executable, "-c", ALONE, tokenizer, text, method], check=True, capture_output=True)
    return float(done.stdout)


def _build(text: str, out: str, tokenizer: str) -> float:
    start = time.perf_counter()
    build_store([text], out, tokenizer, overwrite=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
