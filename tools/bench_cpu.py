"""What maxlm's step costs on a CPU with fake devices, against a plain single-file JAX step (tools/yardstick.py).

Both train the same Llama (8192 ids, 6 layers, width 256, 8 query and 4 key/value heads of 32, feed-forward 1024) on the
same 8 x 512 tokens from the same weights, in bfloat16 with full rematerialization and fsdp over 8 fake devices. They
run in processes of their own, one after the other, in rounds; medians count. Seconds are CPU seconds of a step, which
other programs on the machine change less than its time; the time to the first step is from the start of the process and
begins without any compiled program. Exit code 1: the first losses differ, or maxlm is slower by more than 10 %.

    python tools/bench_cpu.py                          # some minutes on two cores
    python tools/bench_cpu.py --rounds 1 --steps 2     # a short form
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = {
    "vocab_size": 8192,
    "num_layers": 6,
    "d_model": 256,
    "d_ff": 1024,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "norm_eps": 1e-6,
}
BATCH, SEQ_LEN, DEVICES = 8, 512, 8
MAX_DIFFERENCE, MAX_RATIO = 2e-3, 1.1


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a turn (6)")
    parser.add_argument("--set", nargs="*", default=[], help="fields of maxlm's config, such as train.remat=none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", choices=("maxlm", "yardstick"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_worker(args)))
        return 0
    result = _compare(args)
    if args.json:
        print(json.dumps(result))
    else:
        for name in ("maxlm", "yardstick"):
            row = result[name]
            print(
                f"{name:10} {row['cpu_s']:.2f} CPU seconds and {row['wall_s']:.2f} s a step, first step after "
                f"{row['first_step_s']:.1f} s, first loss {row['first_loss']:.4f}"
            )
        print(f"maxlm / yardstick: {result['ratio']:.2f} of the CPU seconds of a step")
    return 0 if result["loss_difference"] < MAX_DIFFERENCE and result["ratio"] < MAX_RATIO else 1


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    turns: dict[str, list[dict[str, Any]]] = {"maxlm": [], "yardstick": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.npz"))
        for _ in range(args.rounds):
            for name, found in turns.items():  # maxlm first: it writes the weights
                found.append(_turn(name, weights, args))
    rows = {}
    for name, found in turns.items():
        each = {key: [x for turn in found for x in turn[key]] for key in ("cpu_s", "wall_s")}
        rows[name] = {key: statistics.median(values) for key, values in each.items()}
        rows[name]["first_step_s"] = statistics.median(turn["first_step_s"] for turn in found)
        rows[name]["first_loss"] = found[0]["losses"][0]
    difference = abs(rows["maxlm"]["first_loss"] / rows["yardstick"]["first_loss"] - 1)
    return {**rows, "ratio": rows["maxlm"]["cpu_s"] / rows["yardstick"]["cpu_s"], "loss_difference": difference}


def _turn(name: str, weights: str, args: argparse.Namespace) -> dict[str, Any]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--worker", name, "--weights", weights, "--steps", str(args.steps)]
    if args.set:
        command += ["--set", *args.set]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ---- a process that trains


def _worker(args: argparse.Namespace) -> dict[str, Any]:
    start = {"maxlm": _maxlm, "yardstick": _yardstick}[args.worker]
    step = start(args.weights, args.set)
    import jax

    from maxlm.stop import process_age_s

    turn: dict[str, Any] = {"cpu_s": [], "wall_s": [], "losses": []}
    for i in range(args.steps + 2):
        cpu, wall = time.process_time(), time.perf_counter()
        loss = jax.block_until_ready(step())
        if i == 0:
            turn["first_step_s"] = process_age_s()
        if i > 1:  # one more to warm up
            turn["cpu_s"].append(time.process_time() - cpu)
            turn["wall_s"].append(time.perf_counter() - wall)
        turn["losses"].append(float(loss))
    return turn


def _tokens() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (BATCH, SEQ_LEN + 1), np.int32)


def _maxlm(weights: str, settings: list[str]) -> Any:
    import jax
    import numpy as np

    from maxlm.config_file import parse_config
    from maxlm.mesh import make_mesh
    from maxlm.step import build_program

    tree = {
        "model": {**MODEL, "dtype": "bfloat16"},
        "data": {"stores": [{"path": "none"}]},
        "train": {"steps": 1000, "batch_size": BATCH, "seq_len": SEQ_LEN, "compilation_cache": None},
        "optim": {"learning_rate": 1e-3, "schedule": {"name": "constant"}},
    }
    config = parse_config(tree, settings)
    mesh = make_mesh(config.mesh, jax.devices())
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
    if not Path(weights).exists():
        _write(weights, state["params"])
    tokens = _tokens()
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((BATCH, SEQ_LEN), np.int32),
        "positions": np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), (BATCH, SEQ_LEN)),
        "mask": np.ones((BATCH, SEQ_LEN), np.float32),
    }
    batch = {name: jax.device_put(x[None], program.batch_sharding) for name, x in rows.items()}

    def step() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.step(state, batch)
        return metrics["loss"]

    return step


def _write(path: str, params: Any) -> None:
    import numpy as np

    layer = params["layers"]["0"]
    arrays = {"embed": params["embed"], "unembed": params["unembed"], "final_norm": params["final_norm"]["weight"]}
    arrays |= {name: layer["attention"][name] for name in "qkvo"}
    arrays |= {name: layer["mlp"][name] for name in ("gate", "up", "down")}
    arrays |= {name: layer[name]["weight"] for name in ("attention_norm", "mlp_norm")}
    written: dict[str, Any] = {name: np.asarray(x) for name, x in arrays.items()}
    np.savez(path, **written)


def _yardstick(weights: str, settings: list[str]) -> Any:
    import jax
    import numpy as np
    import yardstick  # pyrefly: ignore[missing-import]  # beside this file

    mesh, step, params, opt_state = yardstick.make_step(
        dict(np.load(weights)), MODEL["num_heads"], MODEL["num_kv_heads"]
    )
    tokens = _tokens()

    def run() -> Any:
        nonlocal params, opt_state
        with jax.set_mesh(mesh):
            params, opt_state, loss = step(params, opt_state, tokens)
        return loss

    return run


if __name__ == "__main__":
    sys.exit(main())
