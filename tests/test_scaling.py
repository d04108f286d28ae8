import json
from pathlib import Path

import numpy as np
import pytest
from helpers import MODEL, small_config

from maxlm import flops, hardware, parse_config, train
from maxlm.cli import main
from maxlm.config_file import load_config, to_yaml
from maxlm.data.build import build_store
from maxlm.plan import laws, scaling
from maxlm.plan.scaling import scaling_report
from maxlm.report.data import plain

TRUTH = laws.Law(1.7, 8.0, 40.0, 0.30, 0.35, "made up")
NOISE = 0.003
WIDTHS, STEPS = (20, 60, 180), (200, 1000, 5000)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(laws, "NUM_DRAWS", 60)


def make_run(folder, width=20, steps=200, loss=None, noise=0.0, identity=True, heldout=True, bits=0.5, **sections):
    """A run folder as training leaves it, with the loss of TRUTH unless given."""
    folder.mkdir(parents=True)
    model = {**MODEL, "d_model": width, "d_ff": 2 * width, **sections.pop("model", {})}
    config = small_config(run={"name": folder.name}, model=model, train={"steps": steps, **sections.pop("train", {})})
    (folder / "config.yaml").write_text(to_yaml(config))
    if loss is None:
        params = flops.num_params(config.model)["active"]
        loss = TRUTH.loss(params, steps * config.train.tokens_per_step) * np.exp(noise)
    rows = [{"step": steps, "loss": loss, "time": 1e9}]
    if heldout:
        rows.append({"step": steps, "heldout_loss": loss, "heldout_bits_per_byte": loss * bits, "time": 1e9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"status": "complete", "step": steps}))
    if identity:
        store = {"tokenizer": "t", "heldout": "h", **sections.pop("store", {})}
        (folder / "identity.json").write_text(json.dumps({"data": {"stores": [store]}}))
    assert not sections
    return str(folder)


def grid_of_runs(folder: Path, seed: int) -> list[str]:
    """Nine runs of three sizes and lengths."""
    rng = np.random.default_rng(seed)
    cells = [(width, steps) for width in WIDTHS for steps in STEPS]
    return [make_run(folder / f"{w}-{s}", w, s, noise=NOISE * rng.standard_normal()) for w, s in cells]


def test_known_constants_lie_in_the_intervals_of_noisy_runs(tmp_path):
    report = scaling_report(grid_of_runs(tmp_path, 0))
    assert report["unit"] == "nats per token"
    assert report["notes"] == []
    for name, found in report["size_law"]["constants"].items():
        low, high = found["interval"]
        assert low <= getattr(TRUTH, name) <= high, (name, found)
        assert low <= found["value"] <= high
    exact = laws.fit(np.array([[n, d] for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9)]), np.array([2.0] * 6))
    assert exact.constants[0] == pytest.approx(2.0, rel=1e-3), "a loss that does not fall is all E"


def test_without_noise_the_constants_are_exact():
    law = laws.PUBLISHED["chinchilla-replicated"]
    x = np.array([[n, n * ratio] for n in (4e7, 2e8, 1e9) for ratio in (5, 20, 80)])
    fitted = laws.fit(x, np.array([law.loss(*point) for point in x]))
    assert fitted.constants == pytest.approx([law.E, law.A, law.B, law.alpha, law.beta], rel=1e-3)


def test_forecast_intervals_hold_a_new_run_as_often_as_they_say():
    """Of 40 forecasts with an interval of 90 %, 36 are expected to hold; 31 or more in 99 % of such tests."""
    truth, held = np.array([1.7, 2.0 * 1e17**0.15, 0.15]), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = np.geomspace(1e17, 1e19, 6)[:, None]
        fitted = laws.fit(x, laws.predict(truth, x) * np.exp(0.005 * rng.standard_normal(6)))
        low, high = laws.interval(fitted.losses(1e20)[1]) or (0.0, 0.0)
        held += low <= laws.predict(truth, np.array([1e20])) * np.exp(0.005 * rng.standard_normal()) <= high
    assert held >= 31


def test_a_forecast_names_the_best_size_and_how_far_it_reaches(tmp_path):
    runs = grid_of_runs(tmp_path, 1)
    largest = max(p.flops for p in scaling.read_points(runs).points)
    near = scaling_report(runs, 5 * largest)
    found = near["forecast"]["by_size"]
    assert near["forecast"]["factor"] == pytest.approx(5)
    assert found["params"] * found["tokens"] * near["flops_per_token_param"] == pytest.approx(5 * largest)
    assert found["interval"][0] <= TRUTH.loss(found["params"], found["tokens"]) <= found["interval"][1]
    for other in (0.5, 2.0):  # any other split of the budget has a higher loss
        assert scaling.fitted_law(runs).loss(found["params"] * other, found["tokens"] / other) > found["loss"]
    assert not any("times beyond the largest compute" in note for note in near["notes"])
    far = scaling_report(runs, 1000 * largest)
    assert any("1,000 times beyond the largest compute" in note for note in far["notes"])


def test_runs_of_one_ratio_give_the_law_of_compute_alone(tmp_path):
    runs = [make_run(tmp_path / str(w), w, w * 10) for w in (20, 40, 80, 160)]
    report = scaling_report(runs, 1e15)
    assert "6 runs" in report["size_law"]["refused"]
    assert report["forecast"]["by_size"] is None
    assert report["forecast"]["by_compute"]["interval"] is not None
    three = scaling_report(runs[:3], 1e15)
    assert three["forecast"]["by_compute"]["interval"] is None, "three runs fix three constants and leave no error"


def test_what_cannot_be_fitted_is_refused_in_one_sentence(tmp_path):
    good = [make_run(tmp_path / str(w), w, w * 10) for w in (20, 60, 180)]

    def refused(*runs):
        with pytest.raises(ValueError) as error:
            scaling_report([*runs])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "at least 3 runs" in refused(*good[:2])
    assert "at least 3 runs" in refused(*good[:2], good[0])
    same = [make_run(tmp_path / f"same-{steps}", 20, steps) for steps in (100, 200, 400)]
    assert "runs of different sizes" in refused(*same)
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused(*good, str(tmp_path / "empty"))
    assert "bad has diverged" in refused(*good, make_run(tmp_path / "bad", loss=float("nan"), heldout=False))
    assert "worse has diverged" in refused(*good, make_run(tmp_path / "worse", loss=float("nan")))
    tuned = make_run(tmp_path / "tuned", train={"init_from": "elsewhere"})
    assert "train.init_from" in refused(*good, tuned)
    fresh = Path(make_run(tmp_path / "fresh"))
    (fresh / "metrics.jsonl").unlink()
    (fresh / "summary.json").unlink()
    assert "no finished step" in refused(*good, str(fresh))
    bare = Path(make_run(tmp_path / "bare"))
    (bare / "config.yaml").unlink()
    assert "no config.yaml" in refused(*good, str(bare))


def test_losses_of_several_tokenizers_are_compared_in_bits_per_byte_or_not_at_all(tmp_path):
    runs = [make_run(tmp_path / str(w), w, w * 10) for w in (20, 60, 180)]
    other = make_run(tmp_path / "other", 120, 1200, loss=2.5, store={"tokenizer": "another"}, bits=0.49)
    report = scaling_report([*runs, other])
    assert report["unit"] == "bits per byte"
    assert report["runs"][-1]["loss"] == pytest.approx(2.5 * 0.49)
    assert "one tokenizer" in report["size_law"]["refused"]
    trained = make_run(tmp_path / "trained", 120, 1200, store={"tokenizer": "another"}, heldout=False)
    with pytest.raises(ValueError, match="different tokenizers"):
        scaling_report([*runs, trained])
    unknown = make_run(tmp_path / "unknown", 120, 1200, identity=False, model={"vocab_size": 128})
    with pytest.raises(ValueError, match="different tokenizers"):
        scaling_report([*runs, trained, unknown])


def test_what_weakens_a_comparison_is_said(tmp_path):
    runs = [make_run(tmp_path / str(w), w, w * 10) for w in (20, 60, 180)]
    without = make_run(tmp_path / "without", 120, 1200, heldout=False)
    going = Path(make_run(tmp_path / "going", 100, 1000))
    (going / "summary.json").unlink()
    steep = [make_run(tmp_path / f"steep-{w}", w, w * 10, loss=x) for w, x in ((20, 4.0), (60, 3.5), (180, 2.0))]
    assert "E is as good as 0" in scaling_report(steep)["notes"][0]
    elsewhere = make_run(tmp_path / "elsewhere", 140, 1400, store={"heldout": "another"})
    notes = "\n".join(scaling_report([*runs, without, str(going), elsewhere])["notes"])
    for text in ("smoothed training losses", "going is unfinished", "held-out texts are not the same"):
        assert text in notes


def test_the_command(tmp_path, capsys):
    runs = grid_of_runs(tmp_path, 2)
    assert main(["scaling", *runs, "--budget-flops", "1e14"]) == 0
    text = capsys.readouterr().out
    for shown in ("20-200", "held-out loss, nats per token", "fitted to 9 runs", "best model size", "best tokens"):
        assert shown in text
    for wrong in (["--budget-flops", "-1"], ["--law", "chinchilla"]):
        assert main(["scaling", *runs, *wrong]) == 2
    assert main(["scaling"]) == 2
    assert main(["scaling", "--law", "moore"]) == 2


def test_dollars_become_compute_by_the_plan(tmp_path, capsys):
    runs = grid_of_runs(tmp_path, 2)
    arguments = ["plan", "configs/1b.yaml", "--on", "v5e-16", "--compile", "0", "--top", "1", "--scaling", *runs]
    assert main([*arguments, "--budget", "50", "--json"]) == 0, "which is less than the run costs"
    found = json.loads(capsys.readouterr().out)
    (row,), forecast = found["plans"], found["scaling"]["forecast"]
    chip = hardware.named("TPU v5e")
    at_worst = 50 / 1.20 * 3600 * chip.bf16_flops * row["high"]["mfu"]
    assert forecast["budget_flops"] == pytest.approx(at_worst, rel=1e-6), "chip-hours at the predicted MFU"
    assert forecast == plain(scaling_report(runs, forecast["budget_flops"])["forecast"])
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = load_config("configs/1b.yaml")
    tokens = config.train.num_steps * config.train.tokens_per_step
    of_run = tokens * flops.train_flops_per_token(config.model, config.train.seq_len)
    assert found["scaling"]["forecast"]["budget_flops"] == pytest.approx(of_run)
    assert main([*arguments, "--budget", "50"]) == 0
    out = capsys.readouterr().out
    assert "50 USD buy" in out and "FLOPs on v5litepod-16" in out and "best model size" in out
    unpriced = ["--on", "tpu7x-8", "--budget", "50", "--price-kind", "reserved"]
    assert main([*arguments[:2], *unpriced, "--compile", "0", "--scaling", *runs]) == 2
    assert "give your price with --prices" in capsys.readouterr().err


def test_published_laws_say_whose_they_are(capsys):
    """Besiroglu et al.: their law agrees with the 20 tokens per parameter of Chinchilla's own training."""
    assert main(["scaling", "--law", "chinchilla-replicated", "--budget-flops", "5.76e23"]) == 0
    text = capsys.readouterr().out
    assert "Besiroglu" in text
    assert "another tokenizer than yours" in text
    params, tokens = laws.PUBLISHED["chinchilla-replicated"].optimum(5.76e23)
    assert 15 < tokens / params < 30
    assert laws.PUBLISHED["chinchilla"].loss(70e9, 1.4e12) == pytest.approx(1.94, abs=0.01)


@pytest.mark.long
def test_the_largest_of_five_runs_is_what_the_others_forecast(tmp_path):
    """Four tiny models on Python source tell the loss of a fifth, of three times their compute."""
    files = sorted(str(path) for path in Path(json.__file__).parent.parent.glob("[a-d]*.py"))
    build_store(files, str(tmp_path / "store"), heldout=0.1, workers=1)
    for width, steps in ((16, 120), (24, 200), (32, 300), (48, 500), (64, 800)):
        shape = {"num_layers": 2, "d_model": width, "d_ff": 3 * width, "num_heads": 2}
        tree = {
            "run": {"name": f"{width}", "root": str(tmp_path)},
            "model": {"vocab_size": 257, **shape, "dtype": "float32", "tie_embeddings": True, "qk_norm": True},
            "mesh": {"fake_devices": 1},
            "data": {"stores": [{"path": str(tmp_path / "store")}]},
            "train": {"steps": steps, "batch_size": 16, "seq_len": 64, "remat": "none", "compilation_cache": None},
            "optim": {"learning_rate": 1e-2, "schedule": {"name": "wsd", "warmup_steps": 10, "cooldown_steps": 40}},
            "eval": {"every": 1000, "batches": 8, "sample_tokens": 0},
            "checkpoint": {"every": 1000},
        }
        train(parse_config(tree))
    *small, largest = [str(tmp_path / f"{width}") for width in (16, 24, 32, 48, 64)]
    truth = scaling.read_points([*small, largest]).points[-1]
    forecast = scaling_report(small, truth.flops)["forecast"]["by_compute"]
    low, high = forecast["interval"]
    print(f"largest run {truth.loss:.4f}, forecast {forecast['loss']:.4f} ({low:.4f} to {high:.4f})")
    assert low <= truth.loss <= high
    assert forecast["loss"] == pytest.approx(truth.loss, rel=0.1)
