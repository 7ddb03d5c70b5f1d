"""``benchmarks/scaling.py`` and ``predict_scaling.py``: what ranks measure, and what is made of it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_ranks

from densenet_dist.config import load_config

ROOT = Path(__file__).parents[2]
NET = ["model.num_layers=[1,1]", "model.growth_rate=4"]
TINY = ["quickstart", *NET, "cluster.device=cpu", "train.global_batch_size=6"]


def measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from predict_scaling import probe_exchange
    from scaling import measure_rank

    train = ("gradient_compression=bf16", "bucket_mb=0.004", "grad_accum_steps=2", "sync_bn=true")
    config = load_config(*TINY, *(f"train.{setting}" for setting in train), "data.mixup=1")
    return measure_rank(torch.device("cpu"), config, 10, [12, 5], 0.0, 2, partial(probe_exchange, rounds=2))


def test_ranks_measure_the_step_of_training():
    for timings, about in run_ranks(measured, 2):
        assert set(timings) == {(12, True), (12, False), (5, True), (5, False)}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.values())
        assert (about["device"], about["backend"]) == ("CPU", "gloo")
        buckets = about["probed"]["buckets"]
        assert (len(buckets), sum(buckets)) == (2, 4 * about["parameters"])
        assert {size // 2 for size in buckets} < set(about["probed"]["all_reduces"])  # sent as bf16
        for shares in about["probed"]["ready"].values():
            assert 0 < shares[0] <= shares[-1] < 1


def rank(timings):
    """A rank that took these seconds in its first round, and a fifth more in the second."""
    return {key: [s, 1.2 * s] for key, s in timings.items()}


def test_efficiency_follows_from_the_times(script):
    fast = rank({(12, True): 0.11, (12, False): 0.1, (6, True): 0.07, (6, False): 0.06})
    slow = rank({(12, True): 0.125, (12, False): 0.09, (6, True): 0.06, (6, False): 0.055})
    results = {1: [rank({(6, True): 0.1})], 2: [fast, slow]}
    rows = script("scaling").rows(load_config(*TINY), results, ("weak", "strong"), 1)
    found = {(row["mode"], row["workers"]): row for row in rows}
    alone, weak, strong = found["weak", 1], found["weak", 2], found["strong", 2]
    assert (alone["efficiency"], alone["exposed_ms"], alone["oversubscribed"]) == (1, 0, False)
    assert (weak["images"], strong["images"], weak["oversubscribed"]) == (12, 6, True)
    assert (weak["step_ms"], weak["local_ms"], weak["exposed_ms"]) == pytest.approx((137.5, 110, 27.5))
    assert weak["images_per_s"] == pytest.approx(12 / 0.1375, rel=1e-4)
    assert (weak["efficiency"], weak["compute_efficiency"]) == pytest.approx((0.8, 1))
    assert strong["efficiency"] == pytest.approx(0.11 / (2 * 0.077), rel=1e-3)
    assert strong["efficiency_spread"] == pytest.approx((0.11 / (2 * 0.084), 0.11 / (2 * 0.07)), rel=1e-3)


@pytest.mark.nightly
def test_the_script_on_ray_train(tmp_path):
    out = tmp_path / "scaling.json"
    options = ["--workers", "3", "--seconds", "0.05", "--rounds", "2", "--out", out]
    subprocess.run([sys.executable, ROOT / "benchmarks/scaling.py", *TINY, *options], cwd=tmp_path, check=True)
    found = json.loads(out.read_text())
    assert [(row["mode"], row["workers"], row["images"]) for row in found["rows"]] == [
        ("weak", 1, 6), ("weak", 3, 18), ("strong", 1, 6), ("strong", 3, 6),
    ]  # fmt: skip
    assert bool(found["notes"]) == (found["room"] < 3)
    assert list(tmp_path.iterdir()) == [out]


def test_predictions_are_those_on_record(tmp_path, script):
    record = ROOT / "benchmarks/results/scaling_notebook100.json"
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    files = ["--measured", record, "--out", out, "--plot", plot, "--beside", record]
    arguments = ["cifar100_notebook", "train.global_batch_size=16", "--gpu-images", 64, *files]
    script("predict_scaling").main([str(argument) for argument in arguments])
    before, after = json.loads(record.read_text()), json.loads(out.read_text())
    assert (after["gpu"], after["message_bytes"]) == (before["gpu"], before["message_bytes"])
    for one, other in zip(before["predictions"], after["predictions"], strict=True):
        assert one["efficiency"] == pytest.approx(other["efficiency"], abs=2e-4)
    for one, other in zip(before["rows"], after["rows"], strict=True):  # the record's was fitted to every round
        assert one["predicted_error"] == pytest.approx(other["predicted_error"], abs=0.002)
    assert plot.read_bytes().startswith(b"\x89PNG")
