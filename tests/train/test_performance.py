"""FLOPs as PyTorch counts them, the peaks of GPUs, and the slow rank of several."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from runs import notes_of, run_of, tiny
from torch.utils.flop_counter import FlopCounterMode

from densenet_dist.config import load_config
from densenet_dist.train.network import build_model
from densenet_dist.train.performance import peak_tflops, train_flops
from densenet_dist.train.trainer import Trainer


@pytest.mark.parametrize("frozen", [(), ("stem", 1), "backbone"])
@pytest.mark.parametrize("variant", ["notebook", "densenet", "densenet_bc", "densenet121"])
def test_flops_of_training_are_those_that_pytorch_counts(variant, frozen):
    size = {} if variant == "densenet121" else {"model.num_layers": [2, 3], "model.growth_rate": 6}
    config = load_config({"model.variant": variant, "model.block": "reference"}, size)
    with torch.device("meta"):
        model = build_model(config.model, 10, side := 64 if variant == "densenet121" else 32)
        model.freeze(frozen)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, side, side)).sum().backward()
    assert 2 * train_flops(model.architecture, frozen) == counter.get_total_flops()


def test_the_peak_is_that_of_the_whole_gpu_or_unknown():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA L4")
    assert [peak_tflops(name, "bf16") for name in names] == [989, 756, 989, 835, 121]
    assert peak_tflops("NVIDIA A100 80GB PCIe", "fp32") == 156  # TF32
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "bf16") == 312
    for name in (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-10C",
        "GRID A100D-20C",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla V100-SXM2-16GB",
        "L400",
    ):
        assert peak_tflops(name, "bf16") is None


def train_with_a_slow_rank(storage: str) -> list[str]:
    original = Trainer.forward_backward

    def slow(self: Trainer, *arguments: Any, **more: Any) -> Any:
        time.sleep(0.2 * dist.get_rank())
        return original(self, *arguments, **more)

    Trainer.forward_backward = slow
    return notes_of(tiny(storage, "data.limit=270", "train.global_batch_size=8", "train.epochs=2"))


def test_a_slow_rank_is_named_once(tmp_path):
    notes, _ = run_ranks(train_with_a_slow_rank, 2, str(tmp_path))
    (warning,) = [note for note in notes if "is slow" in note]
    assert warning.startswith("rank 1 on ")
    for record in run_of(tiny(tmp_path)).read_records()[:2]:
        assert (record["perf/slowest_rank"], record["slowest_host"]) == (1, warning.split()[3])
        assert 200 <= record["perf/step_ms_p50"] <= record["perf/step_ms_p95"] <= record["perf/step_ms_max"]
