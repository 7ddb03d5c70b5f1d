"""How well a run uses its devices: FLOPs, memory, and how long each rank's forward and backward pass takes."""

from __future__ import annotations

import os
import re
import resource
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from densenet_dist.model import DenseNet
from densenet_dist.model.architecture import Architecture
from densenet_dist.train.ranks import gather_objects

if TYPE_CHECKING:
    from densenet_dist.train.trainer import Trainer

_PEAK_TFLOPS: Final = {
    "GB200": 2500,
    "B200": 2250,
    "H100 PCIe": 756,
    "H800 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    **dict.fromkeys(("H100", "H200", "GH200", "H800"), 989),
    "H20": 148,
    **dict.fromkeys(("A100", "A800"), 312),
    "A30": 165,
    "A40": 150,
    "A10": 125,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Peak dense throughput in bf16 and fp16 with fp32 sums, from NVIDIA's data sheets, which double it for sparsity."""
_OTHER: Final = re.compile(r"\b(MIG|Laptop|D|Ti)\b|-\d+[ABCQ]\b")
"""Names with an unknown peak: parts of a GPU (MIG, or a vGPU such as A100-10C) and variants of those above."""
_MIN_STEPS: Final = 20
_SLOW: Final = 1.3
"""A rank that takes this many times as long as the median rank for its forward and backward pass is reported."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return the peak dense throughput of a GPU in TFLOP/s, for fp32 that of TF32; None if it is unknown."""
    if _OTHER.search(device_name):
        return None
    peak = next((peak for name, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
    return peak / 2 if peak and precision == "fp32" else peak  # TF32 has half the rate on all of them


def train_flops(architecture: Architecture, frozen: str | Sequence[str | int]) -> int:
    """Return the FLOPs of a training step per image, two per multiply-add, in convolutions and the classifier.

    A trained part takes the forward pass, the gradient of its weights and that of its input, which the stem does not
    need. What activation checkpointing computes again does not count.
    """
    total, has_trained = 0, False
    parts = ("stem", *range(1, len(architecture.num_layers) + 1), "head")
    for part, macs in zip(parts, architecture.macs(), strict=True):
        trained = part == "head" or (frozen != "backbone" and part not in frozen)
        # Within the first trained block, layers need the gradients of the layers that they read.
        needs_input_gradient = has_trained or (trained and isinstance(part, int))
        total += 2 * macs * (1 + trained + needs_input_gradient)
        has_trained |= trained
    return total


class StepTimer:
    """Times this rank's own part of each step: the forward and backward pass up to its own last gradient.

    Ranks wait for each other after that, in the exchange of gradients, so whole steps take equally long on all ranks,
    while the own part of a slow rank takes longer. On a GPU CUDA events are recorded, and read after the epoch, so that
    no step waits for the device.

    Args:
        model: its first trainable parameter is the last one to get a gradient.
        device: of this rank.
        captured: whether steps are replayed as a CUDA graph, within which no event is recorded: whole steps are timed.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, captured: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._step: list[Any] = [None, None]
        self._steps: list[list[Any]] = []
        if not captured:
            first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._on_gradient)

    def start(self) -> None:
        """Begin a step, or begin it again."""
        self._step = [self._now(), None]

    def stop(self) -> None:
        """End a step."""
        start, end = self._step
        self._steps.append([start, end or self._now()])

    def take(self) -> list[float]:
        """Return the milliseconds of the steps since the last call. The device must have finished them."""
        steps, self._steps = self._steps, []
        if self._on_gpu:
            return [start.elapsed_time(end) for start, end in steps]
        return [1000 * (end - start) for start, end in steps]

    def _on_gradient(self, _: object) -> None:
        self._step[1] = self._now()  # of several micro-batches the end of the last one stays

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def step_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the ``log.every_steps`` metrics of the steps since the last call. Waits for the device; collective."""
    totals = trainer.metrics.compute(since=trainer.logged)
    before, trainer.logged_at = trainer.logged_at, trainer.train_time()[0]
    trainer.logged.sums.copy_(trainer.metrics.sums)
    return {
        "step/loss": totals["loss"],
        "step/top1": totals["top1"],
        "step/lr": trainer.lr_controller.lr(trainer.position.global_step - 1),
        "step/images_per_s": totals["images"] / (trainer.logged_at - before),
    }


def epoch_metrics(trainer: Trainer, images_per_s: float) -> dict[str, Any]:
    """Return the metrics of an epoch on all ranks; warn once about a slow rank. A collective call.

    Returns:
        Of a DenseNet ``perf/tflops`` of all ranks together and ``perf/mfu`` (its share of their peak, if known);
        ``perf/step_ms_p50``, ``_p95`` and ``_max`` (see `StepTimer`) and ``perf/memory_gib`` of the rank with the
        highest value; with several ranks ``perf/slowest_rank`` (by p50) and ``slowest_host``.
    """
    context, precision = trainer.context, trainer.config.train.precision
    steps = trainer.timer.take()
    peak = None
    if context.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(context.device), precision)
        memory = torch.cuda.max_memory_allocated(context.device) / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    own = np.percentile(steps, (50, 95, 100)).tolist() if steps else []
    ranks = gather_objects((own, memory, peak, os.uname().nodename))
    record: dict[str, Any] = {"perf/memory_gib": max(memory for _, memory, *_ in ranks)}
    if type(trainer.model) is DenseNet:
        flops = train_flops(trainer.model.architecture, trainer.config.train.freeze)
        record["perf/tflops"] = tflops = images_per_s * flops / 1e12
        peaks = [peak for _, _, peak, _ in ranks if peak]
        if len(peaks) == len(ranks):
            record["perf/mfu"] = tflops / sum(peaks)
    if not steps:  # the epoch was complete when the run was resumed
        return record
    for position, name in enumerate(("p50", "p95", "max")):
        record[f"perf/step_ms_{name}"] = max(times[position] for times, *_ in ranks)
    if len(ranks) > 1:
        medians = [times[0] for times, *_ in ranks]
        slowest = int(np.argmax(medians))
        record |= {"perf/slowest_rank": slowest, "slowest_host": ranks[slowest][-1]}
        usual = statistics.median_low(medians)
        if medians[slowest] > _SLOW * usual and len(steps) >= _MIN_STEPS and not trainer.warned_of_slow_rank:
            trainer.warned_of_slow_rank = True
            context.warn(
                f"rank {slowest} on {ranks[slowest][-1]} is slow, and the others wait for it: its forward and backward "
                f"pass takes {medians[slowest]:.0f} ms, that of the median rank {usual:.0f} ms\n"
                "  look for other processes there, a throttled GPU (nvidia-smi -q -d PERFORMANCE) or fewer CPU cores"
            )
    return record
