"""Training throughput on this CPU or GPU: maxlm against Hugging Face transformers' Llama in torch, in the same run.

Both train the same Llama, in float32 or (--dtype bfloat16) with bfloat16 products on float32 weights, from the same
weights on the same random tokens, with AdamW (torch's is the fused one), clipping, and the same cores. Each lives in a
process of its own that sleeps while another one measures; they take turns, and medians count. What other programs took
of the cores meanwhile is printed: above some percent the times of a step are theirs too, and torch's threads, which
wait for one another, lose more than maxlm's. Then trust CPU seconds and --cores 1. Before any timing the losses of the
first step are compared: they have to agree to 1e-4 (1e-2 in bfloat16), and exit code 1 says that they do not.
Torch's attention is measured twice, eager and fused (sdpa); the faster one is what
maxlm is compared with. Needs torch and transformers: pip install 'maxlm[oracles]'.

    python tools/bench_peer.py                                    # 17 M parameters, some minutes on two cores
    python tools/bench_peer.py --layers 2 --rounds 2 --steps 2    # a short form
    python tools/bench_peer.py --cores 1 --set train.remat=full --torch-compile
    python tools/bench_peer.py --gpu                              # 1.2 B parameters on one GPU, against torch.compile
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the first losses, relative
GPU_SIZES = {
    "vocab": 128256,
    "layers": 16,
    "width": 2048,
    "ff": 8192,
    "heads": 32,
    "kv_heads": 8,
    "seq_len": 2048,
    "batch": 8,
    "warmup": 4,
    "steps": 10,
    "rounds": 3,
}
BETAS, EPS, DECAY, LEARNING_RATE, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0
TrainStep = Callable[[np.ndarray], float]
"""Token ids int32 [B, T + 1] -> mean loss in nats, of the weights before the update."""


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu, sizes = "--gpu" in sys.argv, {}
    for name, default, what in (
        ("vocab", 8192, "ids of the vocabulary"),
        ("layers", 6, "transformer blocks"),
        ("width", 384, "features of the residual stream"),
        ("ff", 1024, "features of the MLP"),
        ("heads", 6, "query heads"),
        ("kv-heads", 6, "key/value heads"),
        ("seq-len", 256, "tokens in a sequence"),
        ("batch", 8, "sequences in a step"),
        ("warmup", 2, "steps before any timing, after the first"),
        ("steps", 4, "timed steps in a turn"),
        ("rounds", 5, "turns of each"),
        ("cores", len(os.sched_getaffinity(0)), "cores to use"),
    ):
        sizes[name] = GPU_SIZES.get(name.replace("-", "_"), default) if on_gpu else default
        parser.add_argument(f"--{name}", type=int, default=sizes[name], help=f"{what} ({sizes[name]})")
    parser.add_argument("--gpu", action="store_true", help="on one GPU, in bfloat16, with Llama 3.2 1B's sizes")
    dtype = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help=f"of products ({dtype})")
    parser.add_argument(
        "--set", nargs="*", default=["train.remat=none"], help="fields of maxlm's config (train.remat=none)"
    )
    parser.add_argument("--torch-compile", action="store_true", help="measure torch.compile too; it needs a compiler")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args)
    result = _measure(args)
    print(json.dumps(result) if args.json else _table(result))
    return 0 if result["first_loss_difference"] <= MAX_DIFFERENCE[args.dtype] else 1


# ---- the process that compares


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    names = ["maxlm", "torch-eager", "torch-sdpa"] + ["torch-compile"] * args.torch_compile
    names = ["maxlm", "torch-sdpa", "torch-compile"] if args.gpu else names
    load, busy, used, wall = os.getloadavg()[0], 0.0, 0.0, 0.0
    cpu_times: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        workers = {name: _Worker(name, weights) for name in names}  # maxlm comes first: it writes the weights
        try:
            about = {k: v for worker in workers.values() for k, v in worker.read().items()}
            losses = {name: worker.steps(0, 1)["losses"] for name, worker in workers.items()}
            firsts = [values[0] for values in losses.values()]
            difference = (max(firsts) - min(firsts)) / min(firsts)
            turns = args.rounds if difference <= MAX_DIFFERENCE[args.dtype] else 0
            starts = [1 + args.warmup + turn * args.steps for turn in range(turns)]
            for first, count in [(1, args.warmup), *((start, args.steps) for start in starts)]:
                for name, worker in workers.items():
                    start, before = time.perf_counter(), _busy_s()
                    done = worker.steps(first, count)
                    losses[name] += done["losses"]
                    if first in starts:
                        times[name] += done["times_s"]
                        cpu_times[name] += done["cpu_times_s"]
                        busy, used = busy + _busy_s() - before, used + sum(done["cpu_times_s"])
                        wall += time.perf_counter() - start
        finally:
            for worker in workers.values():
                worker.close()
    lasts = [values[-1] for values in losses.values()]
    result = about | {
        "cpu": _cpu_name(),
        "cores": args.cores,
        "dtype": args.dtype,
        "load_average_before": round(load, 2),
        "tokens_per_step": args.batch * args.seq_len,
        "num_steps": len(losses["maxlm"]),
        "first_loss_difference": difference,
        "last_loss_difference": (max(lasts) - min(lasts)) / min(lasts),
        "last_losses": dict(zip(names, lasts, strict=True)),
        "times_s": times,
        "cpu_times_s": cpu_times,
    }
    if not turns:
        return result
    others = max(0.0, busy - used) / (wall * len(os.sched_getaffinity(0)))
    return result | _rates(result, times) | {"share_of_other_programs": others}


def _rates(result: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = min((name for name in times if name != "maxlm"), key=lambda name: medians[name])
    cpu = {name: statistics.median(values) for name, values in result["cpu_times_s"].items()}
    return {
        "median_step_s": medians,
        "median_step_cpu_s": cpu,
        "tokens_per_s": {name: result["tokens_per_step"] / median for name, median in medians.items()},
        "fastest_peer": peer,
        "ratio_to_fastest_peer": medians[peer] / medians["maxlm"],
        "ratio_in_cpu_s": min(value for name, value in cpu.items() if name != "maxlm") / cpu["maxlm"],
    }


class _Worker:
    """A process that trains when told to; between turns it waits for its standard input."""

    def __init__(self, name: str, weights: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--weights", weights]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if "--gpu" in sys.argv:
            env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # they share its memory
        else:
            env |= {"JAX_PLATFORMS": "cpu"}
        self._name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def steps(self, first: int, count: int) -> dict[str, list[float]]:
        """Trains on batches [first, first + count)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([first, count]) + "\n")
        self._process.stdin.flush()
        done = self.read()
        time.sleep(0.3)  # its idle threads spin for a moment
        return done

    def read(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the process of {self._name} ended with code {self._process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def _busy_s() -> float:
    """Seconds that all cores have worked since the machine started; 0 where that is not told."""
    try:
        with open("/proc/stat") as file:
            user, nice, system = file.readline().split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown CPU"


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['cpu']}, {result['cores']} cores, load {result['load_average_before']}; jax {result['jax']}, "
        f"torch {result['torch']}, transformers {result['transformers']}",
        f"{result['num_params'] / 1e6:.1f} M parameters, {result['tokens_per_step']} tokens a step, "
        f"{result['flops_per_token'] / 1e6:.0f} M model FLOPs per token",
        f"losses differ by {result['first_loss_difference']:.1e} at the first step, "
        f"{result['last_loss_difference']:.1e} at step {result['num_steps']} (relative)",
    ]
    if "median_step_s" not in result:
        return "\n".join([*lines, f"not measured: the first losses have to agree to {MAX_DIFFERENCE[result['dtype']]}"])
    lines.append(f"other programs took {result['share_of_other_programs']:.0%} of the machine")
    lines += ["", f"{'':14}{'tokens/s':>10}{'GFLOP/s':>10}{'step':>10}{'CPU':>10}   fastest to slowest step"]
    for name, times in result["times_s"].items():
        rate, step, cpu = (result[k][name] for k in ("tokens_per_s", "median_step_s", "median_step_cpu_s"))
        lines.append(
            f"{name:14}{rate:10.0f}{rate * result['flops_per_token'] / 1e9:10.0f}{step:8.3f} s{cpu:8.3f} s"
            f"   {min(times):.3f} to {max(times):.3f} s"
        )
    if result.get("peak_flops"):
        lines.append(
            f"MFU of maxlm {result['tokens_per_s']['maxlm'] * result['flops_per_token'] / result['peak_flops']:.1%}"
        )
    ratio, in_cpu_s = result["ratio_to_fastest_peer"], result["ratio_in_cpu_s"]
    sentence = f"maxlm is {ratio:.2f} times as fast as {result['fastest_peer']}; by CPU seconds, {in_cpu_s:.2f} times"
    return "\n".join([*lines, "", sentence])


# ---- the processes that train


def _work(args: argparse.Namespace) -> int:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    about, step = _maxlm(args) if args.worker == "maxlm" else _torch(args)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        first, count = json.loads(line)
        times, cpu_times, losses = [], [], []
        for i in range(first, first + count):
            tokens = np.random.default_rng(i).integers(0, args.vocab, (args.batch, args.seq_len + 1), dtype=np.int32)
            start, cpu_start = time.perf_counter(), time.process_time()
            losses.append(step(tokens))
            times.append(time.perf_counter() - start)
            cpu_times.append(time.process_time() - cpu_start)
        print(json.dumps({"times_s": times, "cpu_times_s": cpu_times, "losses": losses}), flush=True)
    return 0


def _maxlm(args: argparse.Namespace) -> tuple[dict[str, Any], TrainStep]:
    """Ours, on one CPU device; writes its first weights for the others."""
    import jax

    from maxlm.config import MeshConfig
    from maxlm.config_file import load_config
    from maxlm.flops import num_params, train_flops_per_token
    from maxlm.hardware import detect
    from maxlm.mesh import make_mesh
    from maxlm.step import build_program

    path = os.path.join(os.path.dirname(args.weights), "maxlm.yaml")
    with open(path, "w") as file:
        json.dump(_config_tree(args), file)  # JSON is YAML
    config = load_config(path, args.set)
    program = build_program(config, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    shape = (1, args.batch, args.seq_len)
    rest = {
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), shape),
        "mask": np.ones(shape, np.float32),
    }
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
    unfinished = f"{args.weights}.part.npz"
    weights: dict[str, Any] = _llama_weights(jax.device_get(state["params"]))
    np.savez(unfinished, **weights)
    os.replace(unfinished, args.weights)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        batch = {"tokens": tokens[None, :, :-1], "targets": tokens[None, :, 1:], **rest}
        with jax.set_mesh(program.mesh):
            placed = {key: jax.device_put(value, program.batch_sharding) for key, value in batch.items()}
            state, metrics = program.step(state, placed)
            jax.block_until_ready(state)
        return float(metrics["loss"])

    chip = detect(jax.devices()[0])
    about = {"peak_flops": chip.peak(args.dtype) if chip else None, "device": jax.devices()[0].device_kind}
    about |= {"jax": jax.__version__, "num_params": num_params(config.model)["total"], "set": args.set}
    return about | {"flops_per_token": train_flops_per_token(config.model, args.seq_len)}, step


def _config_tree(args: argparse.Namespace) -> dict[str, Any]:
    """A run of maxlm, as its YAML file would say."""
    model = {
        "vocab_size": args.vocab,
        "vocab_multiple": 1,
        "num_layers": args.layers,
        "d_model": args.width,
        "d_ff": args.ff,
        "num_heads": args.heads,
        "num_kv_heads": args.kv_heads,
        "norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "dtype": args.dtype,
    }
    optim = {
        "learning_rate": LEARNING_RATE,
        "schedule": {"name": "constant"},
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "weight_decay": DECAY,
        "clip_norm": CLIP,
    }
    num_steps = 1 + args.warmup + args.steps * args.rounds
    train = {"steps": num_steps, "batch_size": args.batch, "seq_len": args.seq_len}
    return {"model": model, "optim": optim, "train": train, "data": {"stores": [{"path": "unused"}]}}


def _llama_weights(params: Any) -> dict[str, np.ndarray]:
    """maxlm's weights under the names of transformers, whose matrices are [out, in]."""
    D, stack = params["embed"].shape[1], params["layers"]["0"]
    weights = {"model.embed_tokens.weight": params["embed"], "lm_head.weight": params["unembed"].T}
    weights["model.norm.weight"] = params["final_norm"]["weight"]
    for i in range(len(stack["attention"]["q"])):
        name = f"model.layers.{i}"
        weights |= {f"{name}.self_attn.{m}_proj.weight": stack["attention"][m][i].reshape(D, -1).T for m in "qkv"}
        weights[f"{name}.self_attn.o_proj.weight"] = stack["attention"]["o"][i].reshape(-1, D).T
        weights |= {f"{name}.mlp.{m}_proj.weight": stack["mlp"][m][i].T for m in ("gate", "up", "down")}
        weights[f"{name}.input_layernorm.weight"] = stack["attention_norm"]["weight"][i]
        weights[f"{name}.post_attention_layernorm.weight"] = stack["mlp_norm"]["weight"][i]
    return weights


def _torch(args: argparse.Namespace) -> tuple[dict[str, Any], TrainStep]:
    """Theirs, as a user would write the loop."""
    import torch
    import transformers

    torch.set_num_threads(args.cores)
    device = "cuda" if args.gpu else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        rms_norm_eps=NORM_EPS,
        max_position_embeddings=args.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="eager" if args.worker == "torch-eager" else "sdpa",
        use_cache=False,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).train().to(device)
    while not os.path.exists(args.weights):
        time.sleep(0.1)
    with np.load(args.weights) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name].copy()) for name in weights}, strict=True)
    kept = [p for name, p in model.named_parameters() if "norm" in name or "embed" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name and "embed" not in name]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": others, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    forward = torch.compile(model) if args.worker == "torch-compile" else model

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = forward(input_ids=ids[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    num_params = sum(math.prod(p.shape) for p in model.parameters())
    return {"torch": torch.__version__, "transformers": transformers.__version__, "num_params": num_params}, step


if __name__ == "__main__":
    raise SystemExit(main())
