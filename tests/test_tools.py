"""The programs under tools/ in their short forms: that they run and print figures, not how fast this machine is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert_folders import write_model

from maxlm.kernels.splash_blocks import Mask, choose

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.long


def figures(*command):
    """What a program prints with --json. Exit code 1 says that a wanted speed was missed, which is no matter here."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("JAX_")}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command, "--json"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_convert_is_that_of_the_command_line(tmp_path):
    write_model(tmp_path / "hf")
    done = figures("tools/convert.py", "from-hf", str(tmp_path / "hf"), str(tmp_path / "ours"), "--verify")
    assert (done["family"], done["verified"]) == ("llama", True)
    assert figures("tools/convert.py", "to-hf", str(tmp_path / "ours"), str(tmp_path / "back"))["tensors"] > 0
    assert (tmp_path / "back/model.safetensors").exists()


def test_bench_loader():
    result = figures("tools/bench_loader.py", "--megabytes", "8", "--steps", "8", "--batch-size", "8")
    assert result["tokens_per_cpu_s"] > 0
    assert result["tokens"] == 8 * 8 * 2048


def test_bench_build(tmp_path):
    (tmp_path / "a.txt").write_text(Path(__file__).read_text() * 50)
    result = figures("tools/bench_build.py", "--text", str(tmp_path), "--repeat", "1", "--rounds", "1")
    assert result["ratio_to_encode_batch"] > 0


def test_bench_start(tmp_path):
    (tmp_path / "a.txt").write_text(Path(__file__).read_text() * 20)
    store = {"path": str(tmp_path / "store"), "text": [str(tmp_path / "a.txt")]}
    small = ["model.num_layers=1", "train.batch_size=8", f"data.stores={json.dumps([store])}"]
    result = figures("tools/bench_start.py", "configs/quickstart.yaml", *small, "--rounds", "1")
    assert result["times_s"]["first"][0] > result["times_s"]["second"][0] > 0


def test_bench_cpu():
    result = figures("tools/bench_cpu.py", "--rounds", "1", "--steps", "1")
    assert result["loss_difference"] < 2e-3, "both compute the same model"
    assert result["ratio"] > 0


def test_bench_checkpoint(tmp_path):
    result = figures(
        "tools/bench_checkpoint.py", "--params", "1", "--tokens", "256", "--times", "1", "--folder", str(tmp_path)
    )
    assert all(seconds > 0 for seconds in result.values())
    assert result["maxlm complete"] >= result["maxlm blocking"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_bench_aot():
    small = "num_layers=2 d_model=1024 d_ff=2048 num_heads=8 vocab_size=4096".split()
    result = figures("tools/bench_aot.py", "7b-v5e", *(f"model.{field}" for field in small), "train.logit_parts=2")
    assert result["num_pallas_calls"] == 2 * 4, "splash forward, forward again and two of its backward, for two layers"
    assert result["over_roofline"] > 1
    assert 0.9 < result["wire_over_least"] < 1.5


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_splash_blocks():
    """The compiler schedules what the table says it does."""
    blocks = choose("TPU v5e", 128, "fwd", Mask(8192, 8192))
    command = [sys.executable, "tools/splash_blocks.py", "--chip", "v5e", "--head-size", "128"]
    done = subprocess.run(
        [*command, "--blocks", ",".join(map(str, blocks))], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = (ROOT / "maxlm/kernels/splash_blocks.csv").read_text().splitlines()
    rows = [row.split(",") for row in done.stdout.splitlines()]
    assert [row[2] for row in rows] == ["fwd", "dq", "dkv"]
    (want,) = (row.split(",") for row in table if row.startswith(",".join(rows[0][:6]) + ","))
    assert abs(int(rows[0][6]) / int(want[6]) - 1) < 0.1


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_bench_quant():
    result = figures("tools/bench_quant.py", "v5e:2x2", "int8")
    assert result["s8"] == 7 + 7 + 7 + 6, "forward, gradients by activations and by weights, and all but one again"
    assert result["of_bf16"] <= 0.76


def test_quant_loss(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(Path(__file__).read_text() + str(i))
    store = {"path": str(tmp_path / "store"), "text": [str(tmp_path / "*.txt")], "heldout": 0.3}
    small = ["model.num_layers=1", "model.d_model=64", "train.batch_size=8", f"data.stores={json.dumps([store])}"]
    command = [*small, "--kinds", "int8", "--seeds", "0", "--steps", "2", "--root", str(tmp_path)]
    for _ in range(2):  # the second time it only reads
        curve = tmp_path / "curve.png"
        done = subprocess.run(
            [sys.executable, "tools/quant_loss.py", *command, "--curve", str(curve)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        *_, plain, int8 = done.stdout.splitlines()
        assert "bfloat16" in plain
        assert "minus bfloat16" in int8
        assert curve.read_bytes()[:4] == b"\x89PNG"


def test_plan_accuracy_on_a_cpu():
    result = figures("tools/plan_accuracy.py", "--cpu", "fsdp", "tensor", "data", "deep", "--steps", "6")
    assert result["factors"]["num_runs"] == 3 and list(result["predicted_over_measured"]) == ["deep"]
    assert 0 < result["predicted_over_measured"]["deep"] < 10


def test_chaos():
    """Five kills, five cycles over meshes, twenty pairs of meshes."""
    command = ("tools/chaos.py", "--short", "kills", "meshes", "soak")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    tried = {row[0].removeprefix("| "): row[1:3] for row in rows[2:]}
    assert sorted(tried.values()) == [["20", "20"], ["5", "5"], ["5", "5"]], done.stdout


def test_bench_convert(tmp_path):
    result = figures(
        "tools/bench_convert.py", "--layers", "1", "--width", "256", "--rounds", "1", "--folder", str(tmp_path)
    )
    assert result["same_tensors"]
    assert all(ratio > 0 for ratio in result["speed_to_cp"].values())
    assert max(result["peak_bytes"].values()) < 2 * result["memory_limit_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_bench_decode():
    result = figures(
        *("tools/bench_decode.py", "--alone", "--layers", "1", "--width", "128", "--tokens", "8", "--rounds", "1")
    )
    assert result["parameters"] == 2 * 32_000 * 128 + (2 * 128 + 2 * 64) * 128 + 128 * 3 * 352 + 3 * 128
    assert result["tokens_per_s"]["maxlm"] > 0
    assert result["share_of_bandwidth"] is None, "nobody has told the bandwidth of this CPU"
