"""``densenet-dist bench scaling``: what ranks measure, what is made of it, and the command as a user gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks

from densenet_dist.bench.communication import FABRICS, Bucket, Step, predict_on
from densenet_dist.bench.scaling import _check, _evaluate
from densenet_dist.bench.scaling_gpus import gpu_step_of, predictions
from densenet_dist.bench.scaling_report import draw, print_table
from densenet_dist.bench.scaling_step import MESSAGES, Found, Timing, measure_rank
from densenet_dist.cli import main
from densenet_dist.config import load_config, to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "quickstart.yaml")
TINY = [QUICK, "model.num_layers=[1,1]", "model.growth_rate=4", "cluster.device=cpu", "train.global_batch_size=6"]


def measured(settings: list[str], sizes: list[int]) -> Found:
    config = load_config(*TINY, *settings)
    return measure_rank(torch.device("cpu"), to_dict(config), 10, sizes, 0.0, 2)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.gradient_compression=bf16", "train.bucket_mb=0.004"],
        ["train.grad_accum_steps=2", "train.sync_bn=true", "data.mixup=1"],
    ],
    ids=str,
)
def test_ranks_measure_the_step_of_training(settings):
    for found in run_ranks(measured, 2, settings, [12, 6, 5]):
        assert {size: len(timings) for size, timings in found.timings.items()} == {12: 2, 6: 2, 5: 2}
        for timing in (timing for timings in found.timings.values() for timing in timings):
            assert timing.steps == 2
            assert 0 < timing.step_s < 60
            assert 0 < timing.local_s < 60
        assert sum(found.buckets) == 4 * found.parameters
        assert len(found.buckets) == (2 if "train.bucket_mb=0.004" in settings else 1)
        for shares in found.ready.values():
            assert shares == sorted(shares)
            assert 0 < shares[0] <= shares[-1] < 1
            assert len(shares) == len(found.buckets)
        sent = [size // 2 for size in found.buckets] if "train.bucket_mb=0.004" in settings else found.buckets
        assert {message for message, _ in found.all_reduces} == {*MESSAGES, *sent}
        assert all(seconds > 0 for _, seconds in found.all_reduces)
        assert (found.device, found.backend) == ("CPU", "gloo")


def test_one_rank_exchanges_nothing():
    [found] = run_ranks(measured, 1, [], [6])
    assert found.all_reduces == []
    assert len(found.ready[6]) == 1


def config_of(*settings: str) -> Config:
    return load_config(*TINY, *settings)


def made(images: dict[int, tuple[float, float]], all_reduces: list[tuple[int, float]]) -> Found:
    """A rank that took (step, local) seconds, and a fifth more in its second round."""
    timings = {
        size: [Timing(step, local, 2), Timing(1.2 * step, 1.2 * local, 2)] for size, (step, local) in images.items()
    }
    ready = {size: [0.6, 0.9] for size in images}
    return Found(timings, [400_000, 200_000], ready, all_reduces, 150_000, "CPU", "gloo")


# A ring of two with 1 ms a hop and 0.1 GB/s: 2 hops, and every byte once.
RING = [(message, 2e-3 + message / 1e8) for message in (10_000, 1_000_000, 10_000_000)]


def test_efficiency_and_prediction_follow_from_the_times():
    fast, slow = made({12: (0.11, 0.1), 6: (0.07, 0.06)}, RING), made({12: (0.125, 0.09), 6: (0.06, 0.055)}, RING)
    found = _evaluate(config_of(), {1: [made({6: (0.1, 0.1)}, [])], 2: [fast, slow]}, ("weak", "strong"), room=1)
    rows = {(row["mode"], row["workers"]): row for row in found["rows"]}
    weak, strong = rows["weak", 2], rows["strong", 2]
    assert rows["weak", 1]["efficiency"] == rows["strong", 1]["efficiency"] == 1
    assert (weak["images"], strong["images"]) == (12, 6)
    assert (weak["oversubscribed"], rows["weak", 1]["oversubscribed"]) == (True, False)
    # The slower rank counts in each, and the median of two rounds is 1.1 times the first.
    assert weak["step_ms"] == pytest.approx(137.5)
    assert weak["local_ms"] == pytest.approx(110)
    assert weak["exposed_ms"] == pytest.approx(27.5)
    assert weak["step_ms_spread"] == (125, 150)
    assert weak["images_per_s"] == pytest.approx(12 / 0.1375, rel=1e-4)
    assert weak["efficiency"] == pytest.approx(0.11 / 0.1375)
    assert weak["compute_efficiency"] == pytest.approx(1)
    assert strong["efficiency"] == pytest.approx(0.11 / (2 * 0.077), rel=1e-3)
    assert strong["efficiency_spread"] == pytest.approx((0.11 / (2 * 0.084), 0.11 / (2 * 0.07)), rel=1e-3)
    # The first bucket takes 6 ms from 66 of 110 ms on, the second 4 ms from 99 ms, when the backward pass ends.
    assert weak["predicted_ms"] == pytest.approx(114)
    assert weak["predicted_error"] == pytest.approx(114 / 137.5 - 1, abs=1e-4)
    fit = found["fits"]["2"]
    assert (fit["latency_us"], fit["gb_per_s"]) == (pytest.approx(1000), pytest.approx(0.1))
    assert [one["ms"] for one in fit["all_reduces"]] == pytest.approx([one["fitted_ms"] for one in fit["all_reduces"]])


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_predictions_are_the_models(compression):
    config = config_of(f"train.gradient_compression={compression}")
    rank = made({6: (0.1, 0.1)}, [])
    gpu = gpu_step_of(config, rank, 64, 5.0)
    assert gpu.source == "as given"
    found = predictions(config, rank, gpu)
    scale = 1 if compression == "none" else 0.5
    assert found["message_bytes"] == 600_000 * scale
    rows = {(row["fabric"], row["mode"], row["gpus"]): row for row in found["predictions"]}
    for fabric in FABRICS:
        step = Step(0.005, (Bucket(400_000 * scale, 0.6), Bucket(200_000 * scale, 0.9)))
        for gpus in (1, 64, 1024):
            row, seconds = rows[fabric.name, "weak", gpus], predict_on(step, gpus, fabric).step_s
            assert row["step_ms"] == pytest.approx(seconds * 1e3, rel=1e-4)
            assert row["efficiency"] == pytest.approx(0.005 / seconds, abs=1e-4)
            assert row["images_per_s"] == pytest.approx(64 * gpus / seconds, rel=1e-4)
            assert row["step_ms_without_overlap"] >= row["step_ms"]
        shared = predict_on(replace(step, compute_s=0.005 / 64), 64, fabric).step_s
        assert rows[fabric.name, "strong", 64]["efficiency"] == pytest.approx(0.005 / (64 * shared), abs=1e-4)
        assert (fabric.name, "strong", 128) not in rows


def test_synchronised_statistics_are_waited_for():
    rank = made({6: (0.1, 0.1)}, [])
    plain, synchronised = (
        predictions(config_of(*settings), rank, gpu_step_of(config_of(), rank, 6, 5.0))["predictions"]
        for settings in ([], ["train.sync_bn=true"])
    )
    for one, other in zip(plain, synchronised, strict=True):
        assert other["step_ms"] > one["step_ms"] if one["gpus"] > 1 else other["step_ms"] == one["step_ms"]


def test_a_gpus_step_is_estimated_where_none_was_measured():
    rank = made({6: (0.1, 0.08)}, [])
    few, many = (gpu_step_of(config_of(), rank, images, None) for images in (6, 60))
    assert "not measured" in few.source
    assert many.step_ms == pytest.approx(10 * few.step_ms, rel=1e-3)
    assert gpu_step_of(config_of(), replace(rank, device="NVIDIA H100"), None, None).step_ms == pytest.approx(88)


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "scaling", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*TINY, "--workers", "1,x"], "--workers: 'x' is no number above zero"),
        ([*TINY, "--workers", "0"], "--workers: '0' is no number above zero"),
        ([*TINY, "--workers", "7"], "7 workers cannot share train.global_batch_size=6"),
        ([*TINY, "--mode", "large"], "--mode: there is no 'large'"),
        ([*TINY, "--plot", "scaling.jpeg"], "must end in .png"),
        ([*TINY, "--beside", QUICK], "--beside:"),
        ([*TINY, "model.growth_rate=0"], "growth_rate"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(arguments, said, capsys):
    assert bench(*arguments) == 2
    assert said in capsys.readouterr().err


def test_weak_scaling_needs_no_more_images_than_workers():
    _check(config_of(), [1, 7], ("weak",))
    with pytest.raises(ConfigError):
        _check(config_of(), [1, 7], ("strong",))


@pytest.mark.slow
def test_the_command_on_ray_train(tmp_path, capsys):
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    settings = [*TINY, f"storage={tmp_path / 'runs'}"]
    options = ["--workers", "3", "--seconds", "0.05", "--rounds", "2", "--out", str(out), "--plot", str(plot)]
    done = command(*settings, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(row["mode"], row["workers"], row["images"]) for row in found["rows"]] == [
        ("weak", 1, 6), ("weak", 3, 18), ("strong", 1, 6), ("strong", 3, 6),
    ]  # fmt: skip
    for row in found["rows"]:
        check_row(found, row)
        assert row["oversubscribed"] == (row["workers"] > found["room"])
    assert ("oversubscribed" in done.stdout) == (found["room"] < 3)
    assert list((tmp_path / "runs").iterdir()) == []
    assert plot.read_bytes().startswith(b"\x89PNG")
    draw([found, found], tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > plot.stat().st_size
    print_table(found)
    assert capsys.readouterr().out == done.stdout


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: Ray's warnings are not this project's."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    line = [sys.executable, "-m", "densenet_dist", "bench", "scaling", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def check_row(found: dict[str, Any], row: dict[str, Any]) -> None:
    """Everything in it follows from its times."""
    alone = next(one for one in found["rows"] if (one["mode"], one["workers"]) == (row["mode"], 1))
    work = 1 if row["mode"] == "weak" else row["workers"]
    assert row["efficiency"] == pytest.approx(alone["step_ms"] / (work * row["step_ms"]), rel=1e-2)
    assert row["images_per_s"] == pytest.approx(row["images"] / row["step_ms"] * 1e3, rel=1e-3)
    assert row["exposed_ms"] == pytest.approx(row["step_ms"] - row["local_ms"], abs=1e-2 * row["step_ms"])
    assert row["predicted_ms"] >= row["local_ms"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_gpus_that_are_not_there(tmp_path):
    done = command(*TINY, "cluster.device=cuda", f"storage={tmp_path}", "--workers", "1")
    assert done.returncode == 3
    assert "1 workers need 1 GPUs, the cluster has 0" in done.stderr
