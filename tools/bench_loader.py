"""Loader speed: tokens per second that one core reads, packs and hashes from token stores on a local disk.

Every batch is of another shuffled step of a mixture of three stores, has its document structure computed, and all its
arrays hashed, so that nothing can be left out. Wanted: 5 million tokens per second and core at 2,048 tokens per row.

    python tools/bench_loader.py                           # 1 GB of tokens, the full measurement
    python tools/bench_loader.py --megabytes 64 --steps 40 # a short form
"""

import argparse
import hashlib
import json
import os
import resource
import tempfile
import time
from typing import Any

import numpy as np

from maxlm.config import DataConfig, TrainConfig
from maxlm.data.build import build_store
from maxlm.data.loader import Loader
from maxlm.data.store import MANIFEST, SHARD_BYTES, TokenStore

WANTED_TOKENS_PER_S = 5e6
WEIGHTS = (0.6, 0.3, 0.1)
VOCAB_SIZE = 50_000
MEAN_DOCUMENT_TOKENS = 700


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="tokens on disk, in MB, over three stores (1024)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row (2048)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per batch (32)")
    parser.add_argument("--steps", type=int, default=1000, help="batches (1000)")
    parser.add_argument("--threads", type=int, default=2, help="threads that read ahead (2)")
    parser.add_argument("--folder", help="where to keep the stores between runs (default: temporary)")
    parser.add_argument("--cold", action="store_true", help="drop the stores from the page cache first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        paths = [os.path.join(folder, name) for name in "abc"]
        for seed, path in enumerate(paths):
            if not os.path.exists(os.path.join(path, MANIFEST)):
                _make_store(path, seed, args.megabytes * 1_000_000 // len(paths))
        if args.cold:
            _drop_from_cache(paths)
        result = _measure(paths, args)
    print(json.dumps(result) if args.json else _sentence(result))
    return 0 if result["tokens_per_cpu_s"] >= WANTED_TOKENS_PER_S else 1


def _measure(paths: list[str], args: argparse.Namespace) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    stores = [{"path": path, "weight": weight} for path, weight in zip(paths, WEIGHTS, strict=True)]
    data = DataConfig.model_validate({"stores": stores, "read_threads": args.threads})
    train = TrainConfig(steps=args.steps + 1, batch_size=args.batch_size, seq_len=args.seq_len)
    loader = Loader(data, train, VOCAB_SIZE)
    loader.rows(args.steps, 0, args.batch_size)  # Files are opened on first use.
    digests = set()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for step, batch in enumerate(loader.batches(0, 0, args.batch_size)):
        if step == args.steps:
            break
        digest = hashlib.sha256()
        for key in sorted(batch):
            digest.update(batch[key].data)
        digests.add(digest.digest())
    wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    loader.close()
    os.sched_setaffinity(0, cores)
    assert len(digests) == args.steps, "batches repeat"
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tokens = args.steps * train.tokens_per_step
    return {
        "tokens": tokens,
        "seq_len": args.seq_len,
        "wall_s": round(wall_s, 3),
        "cpu_s": round(cpu_s, 3),
        "tokens_per_wall_s": round(tokens / wall_s),
        "tokens_per_cpu_s": round(tokens / cpu_s),
        "store_bytes": sum(TokenStore(path).num_tokens("train") * 2 for path in paths),
        "max_rss_mb": round(after.ru_maxrss / 1000),
        "cold": args.cold,
        "wanted_tokens_per_s": WANTED_TOKENS_PER_S,
    }


def _make_store(path: str, seed: int, num_bytes: int) -> None:
    """A store of random tokens, as a build would write it; tokenizing so much text would take far longer."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "a.txt"), "w") as file:
            file.write("one document")
        build_store([folder], path)
    manifest_path = os.path.join(path, MANIFEST)
    with open(manifest_path) as file:
        manifest = json.load(file)
    rng = np.random.default_rng(seed)
    shards, digest = [], hashlib.sha256()
    for index, size in enumerate([SHARD_BYTES] * (num_bytes // SHARD_BYTES) + [num_bytes % SHARD_BYTES // 2 * 2]):
        # Small ids are frequent, as in text.
        tokens = (rng.random(size // 2, np.float32) ** 3 * VOCAB_SIZE).astype("<u2")
        tokens[rng.integers(0, len(tokens), len(tokens) // MEAN_DOCUMENT_TOKENS)] = manifest["tokenizer"]["eos_id"]
        name = f"train-{'0' * 16}-{index:05d}.bin"
        tokens.tofile(os.path.join(path, name))
        digest.update(tokens.data)
        shards.append({"name": name, "num_bytes": size})
    num_tokens = sum(shard["num_bytes"] for shard in shards) // 2
    manifest["splits"]["train"] |= {"num_tokens": num_tokens, "sha256": digest.hexdigest(), "shards": shards}
    manifest["tokenizer"]["vocab_size"] = VOCAB_SIZE
    with open(manifest_path, "w") as file:
        json.dump(manifest, file)


def _drop_from_cache(paths: list[str]) -> None:
    for path in paths:
        for name in os.listdir(path):
            descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
            os.fsync(descriptor)  # What is not on disk yet cannot be dropped.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _sentence(result: dict[str, Any]) -> str:
    return (
        f"{result['tokens'] / 1e6:.0f} M tokens in rows of {result['seq_len']} from "
        f"{result['store_bytes'] / 1e9:.2f} GB {'cold' if result['cold'] else 'warm'} on one core: "
        f"{result['wall_s']:.2f} s wall, {result['cpu_s']:.2f} s CPU, "
        f"{result['tokens_per_wall_s'] / 1e6:.1f} M tokens/s, {result['tokens_per_cpu_s'] / 1e6:.1f} M tokens per CPU "
        f"second (wanted {result['wanted_tokens_per_s'] / 1e6:.0f}), {result['max_rss_mb']} MB resident at most"
    )


if __name__ == "__main__":
    raise SystemExit(main())
