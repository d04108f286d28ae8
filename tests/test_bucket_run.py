"""A whole run in a bucket: data, checkpoints, metrics and report."""

import json
from pathlib import Path

import pytest
from gcs import gcs_bucket
from helpers import MODEL

import maxlm
from maxlm import goodput, storage


def config(root, steps, **checkpoint):
    return maxlm.parse_config(
        {
            "run": {"name": "r", "root": f"{root}/runs"},
            "model": {**MODEL, "vocab_size": 257},
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2, "fake_devices": 8},
            "data": {"stores": [{"path": f"{root}/store", "text": [__file__], "heldout": 0.0}]},
            "train": {"steps": steps, "batch_size": 8, "seq_len": 32, "compilation_cache": None},
            "optim": {"learning_rate": 1e-2, "schedule": {"name": "constant"}},
            "checkpoint": {"every": 2, "keep_last": 2, **checkpoint},
        }
    )


@pytest.mark.long
def test_a_run_in_a_bucket_resumes_as_a_local_one_does(tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs not installed; install with: pip install 'maxlm[buckets]'")
    with gcs_bucket() as root:
        assert maxlm.train(config(root, 4)).status == "complete"
        assert maxlm.train(config(root, 4)).status == "already complete"
        assert maxlm.train(config(root, 6)).step == 6
        there = storage.list_dir(f"{root}/runs/r")
        assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "loss.png", "goodput.json"} <= set(there)
        assert storage.list_dir(f"{root}/runs/r/checkpoints") == ["4", "6"]
        assert [(s.first, s.step) for s in goodput.read(f"{root}/runs/r")] == [(0, 4), (4, 6)]
        bucket = storage.read_bytes(f"{root}/runs/r/metrics.jsonl").decode()
    maxlm.train(config(tmp_path, 6))
    local = Path(tmp_path, "runs", "r", "metrics.jsonl").read_text()
    rows = [[json.loads(line) for line in text.splitlines()] for text in (bucket, local)]
    losses = [{row["step"]: row["loss"] for row in lines if "loss" in row} for lines in rows]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [1, 2, 3, 4, 5, 6]


def test_a_run_in_s3_is_refused_before_it_starts():
    with pytest.raises(maxlm.ConfigError, match=r"root=s3://some-bucket/runs.*gs://"):
        config("s3://some-bucket", 4)
