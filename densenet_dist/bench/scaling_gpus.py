"""What ``bench scaling`` predicts for GPUs that were not there: the measured net and its buckets elsewhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from densenet_dist.bench.communication import FABRICS, Bucket, Fabric, Step, predict_on
from densenet_dist.bench.model import classes_of
from densenet_dist.bench.roofline import count_flops, traffic
from densenet_dist.bench.scaling_step import Found, sent_bytes
from densenet_dist.bench.ways import configured_for
from densenet_dist.bench.workers import rounded
from densenet_dist.model import DenseNet
from densenet_dist.schema import Config
from densenet_dist.train.network import AUTOCAST, build_model

GPUS: Final = tuple(2**power for power in range(11))
"""How many GPUs predictions are made for."""
# Of an H100 SXM (NVIDIA's data sheet): dense tensor-core FLOP/s, and bytes/s of its memory.
_H100_FLOPS: Final = {"fp32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}
_H100_BYTES_PER_S: Final = 3.35e12


@dataclass(frozen=True)
class GpuStep:
    """What predictions for GPUs start from.

    Attributes:
        images: of one GPU.
        step_ms: of a step without communication.
        source: how that is known.
    """

    images: int
    step_ms: float
    source: str


def slowest(ranks: Sequence[Found], images: int) -> tuple[list[float], list[float]]:
    """Seconds of a step and of one without communication, round by round, of whichever rank took longest."""
    rounds = list(zip(*(rank.timings[images] for rank in ranks), strict=True))
    steps = [max(timing.step_s for timing in timings) for timings in rounds]
    return steps, [max(timing.local_s for timing in timings) for timings in rounds]


def step_of(config: Config, rank: Found, images: int, compute_s: float, blocking: tuple[float, ...] = ()) -> Step:
    """A step of so many seconds whose buckets are filled at the shares that a rank measured."""
    buckets = zip(rank.buckets, rank.ready[images], strict=True)
    return Step(compute_s, tuple(Bucket(sent_bytes(size, config), share) for size, share in buckets), blocking)


def predictions(config: Config, rank: Found, gpu: GpuStep) -> dict[str, Any]:
    """Weak scaling of what one GPU does, and strong scaling of the same batch, on every fabric."""
    step = step_of(config, rank, config.train.global_batch_size, gpu.step_ms / 1e3, _blocking(config))
    rows = []
    for fabric in FABRICS:
        for count in GPUS:
            rows.append(_predicted("weak", count, fabric, step, gpu.images * count))
            if count <= gpu.images:
                # Taken as proportional to images: a GPU with few of them is less efficient, which is left out.
                shared = Step(step.compute_s / count, step.buckets, step.blocking)
                rows.append(_predicted("strong", count, fabric, shared, gpu.images))
    for row in rows:
        work = 1 if row["mode"] == "weak" else row["gpus"]
        row["efficiency"] = rounded(gpu.step_ms / (work * row["step_ms"]), 4)
    return {
        "gpu": asdict(gpu),
        "message_bytes": sum(bucket.message for bucket in step.buckets),
        "predictions": rows,
    }


def _predicted(mode: str, gpus: int, fabric: Fabric, step: Step, images: int) -> dict[str, Any]:
    with_overlap = predict_on(step, gpus, fabric)
    return {
        "fabric": fabric.name,
        "mode": mode,
        "gpus": gpus,
        "step_ms": rounded(with_overlap.step_s * 1e3),
        "exposed_ms": rounded(with_overlap.exposed_s * 1e3),
        "communication_ms": rounded(with_overlap.communication_s * 1e3),
        "step_ms_without_overlap": rounded(predict_on(step, gpus, fabric, overlap=False).step_s * 1e3),
        "images_per_s": rounded(images / with_overlap.step_s),
    }


def _blocking(config: Config) -> tuple[float, ...]:
    """Bytes of the all-reduces of synchronised batch normalisation, as torch's sends them.

    Forward mean, inverse deviation and count of each channel, backward two sums of its gradient; float32.
    """
    if not config.train.sync_bn:
        return ()
    model = _on_paper(config)
    widths = [module.num_features for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return tuple(4.0 * numbers for width in widths for numbers in (2 * width + 1, 2 * width))


def gpu_step_of(config: Config, rank: Found, images: int | None, step_ms: float | None) -> GpuStep:
    """What is told, or measured here, or estimated, in this order."""
    size = images or config.train.global_batch_size
    if step_ms is not None:
        return GpuStep(size, step_ms, "as given")
    if rank.device != "CPU" and size == config.train.global_batch_size:
        local = statistics.median(slowest([rank], size)[1])
        return GpuStep(size, rounded(local * 1e3), f"measured here on one {rank.device}")
    model = _on_paper(config)
    precision = config.train.precision
    arithmetic = count_flops(model) / _H100_FLOPS[precision]
    memory = traffic(model.architecture, "fused", AUTOCAST[precision].itemsize) / _H100_BYTES_PER_S
    return GpuStep(
        size,
        rounded(size * max(arithmetic, memory) * 1e3),
        "estimate, not measured: the roofline of an H100 SXM, less than a step takes, so communication weighs too much",
    )


def _on_paper(config: Config) -> DenseNet:
    """The net in its reference form, without weights."""
    with torch.device("meta"):
        return build_model(configured_for(config, "reference").model, classes_of(config), config.data.side)
