"""``densenet-dist bench scaling``: how training speeds up with workers, measured, and predicted for up to 1024 GPUs.

Measured is training's own step, on images that lie ready, on 1, 2, ... Ray Train workers. Weak scaling gives every
worker the same number of images: efficiency is T(1) / T(n). Strong scaling shares one batch: T(1) / (n T(n)).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from densenet_dist.bench.communication import Fabric, all_reduce_s, fit_ring, predict_on
from densenet_dist.bench.model import classes_of
from densenet_dist.bench.scaling_gpus import gpu_step_of, predictions, slowest, step_of
from densenet_dist.bench.scaling_step import Found, measure_rank
from densenet_dist.bench.ways import configured_for
from densenet_dist.bench.workers import rounded
from densenet_dist.cluster.launch import absolute, check_model
from densenet_dist.cluster.measured import Workers, measuring_workers
from densenet_dist.config import to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config
from densenet_dist.train.environment import describe_environment

MODES: Final = ("weak", "strong")

DEFINITIONS: Final = {
    "step_ms": "a training step of the slowest rank: forward, loss, backward with the exchange of gradients, optimizer",
    "local_ms": "the same step where gradients stay on their rank (no_sync)",
    "exposed_ms": "step_ms - local_ms: communication during which nothing is computed, and what it slows down",
    "efficiency": "weak: T(1) / T(n); strong: T(1) / (n T(n)); T is step_ms",
    "compute_efficiency": "the same of local_ms: what is lost to shared cores, caches and memory, not to communication",
    "predicted_ms": "from local_ms, the shares of it at which buckets were filled, and the fit to isolated all-reduces",
    "spreads": "lowest and highest of the rounds",
    "fit": "isolated all-reduces as a ring: latency of a hop, bandwidth of a worker's link (bench/communication.py)",
}


@dataclass(frozen=True)
class Row:
    """One number of workers in one mode; figures are in `DEFINITIONS`, `images` is of the global batch."""

    mode: str
    workers: int
    images: int
    oversubscribed: bool
    step_ms: float
    step_ms_spread: tuple[float, float]
    local_ms: float
    exposed_ms: float
    images_per_s: float
    images_per_s_spread: tuple[float, float]
    efficiency: float
    efficiency_spread: tuple[float, float]
    compute_efficiency: float
    predicted_ms: float
    predicted_error: float


def bench_scaling(
    config: Config,
    *,
    workers: Sequence[int] = (1, 2),
    modes: Sequence[str] = MODES,
    seconds: float = 1.0,
    rounds: int = 3,
    gpu_images: int | None = None,
    gpu_step_ms: float | None = None,
    listener: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every number of workers, check the communication model on them, and predict.

    Args:
        config: whose net, loss, optimizer and exchange of gradients are run. Weak scaling gives each worker
            ``train.global_batch_size`` images, strong scaling all workers together.
        workers: how many; 1 is measured always.
        modes: weak, strong.
        seconds: how long each measurement takes, about.
        rounds: of which the medians count.
        gpu_images: images a step of one GPU, in predictions; by default ``train.global_batch_size``.
        gpu_step_ms: its time for them without communication; by default as measured, on GPUs, or else an estimate.
        listener: told what is being measured.

    Returns:
        ``rows`` (as `Row`, plain), ``fits``, ``predictions``, ``notes``, and what they were measured on and with.

    Raises:
        ConfigError, EnvironmentProblem: as for training; and more workers than images, or than GPUs.
    """
    config, counts = absolute(config), sorted({1, *workers})
    _check(config, counts, modes)
    tell = listener or _ignore
    with measuring_workers(config.cluster, config.storage) as cluster:
        found = {}
        for count in counts:
            tell(f"{count} workers of {', '.join(map(str, counts))}")
            found[count] = _measure(config, cluster, count, modes, seconds, rounds)
        room, threads = cluster.room, config.cluster.cpus_per_worker
    measured = found[1][0]
    gpu = gpu_step_of(config, measured, gpu_images, gpu_step_ms)
    notes = [
        f"{count} workers share {room} cores: oversubscribed; their times say how cores are shared, not how it scales"
        for count in counts
        if count > room
    ]
    return {
        **_evaluate(config, found, modes, room),
        **predictions(config, measured, gpu),
        "notes": notes,
        "name": config.name,
        "model": to_dict(config)["model"],
        "parameters": measured.parameters,
        "buckets": measured.buckets,
        "precision": config.train.precision,
        "gradient_compression": config.train.gradient_compression,
        "images": config.train.global_batch_size,
        "device": measured.device,
        "backend": measured.backend,
        "threads": 1 if threads == "auto" else threads,
        "room": room,
        "seconds": seconds,
        "rounds": rounds,
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
    }


def _check(config: Config, counts: Sequence[int], modes: Sequence[str]) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ConfigError(f"--mode: there is no {''.join(unknown[:1])!r}; choose weak, strong or both")
    if counts[0] < 1:
        raise ConfigError(f"--workers: {counts[0]} workers cannot train; write them as 1,2,4")
    if "strong" in modes and counts[-1] > config.train.global_batch_size:
        raise ConfigError(
            f"--workers: {counts[-1]} workers cannot share train.global_batch_size={config.train.global_batch_size}\n"
            "  raise it, or measure weak scaling alone with --mode weak"
        )
    check_model(configured_for(config, "reference"))


def _images(config: Config, mode: str, workers: int) -> int:
    """Of the global batch."""
    return config.train.global_batch_size * (workers if mode == "weak" else 1)


def _measure(
    config: Config, cluster: Workers, count: int, modes: Sequence[str], seconds: float, rounds: int
) -> list[Found]:
    sizes = list(dict.fromkeys(_images(config, mode, count) for mode in modes))
    found: list[Found] = cluster.run(count, measure_rank, to_dict(config), classes_of(config), sizes, seconds, rounds)
    return found


def _evaluate(config: Config, found: dict[int, list[Found]], modes: Sequence[str], room: int) -> dict[str, Any]:
    """Efficiencies, and the model's error on what was measured."""
    fits = {
        count: fit_ring(ranks[0].all_reduces, count, ranks[0].backend) for count, ranks in found.items() if count > 1
    }
    rows = []
    for mode in modes:
        alone = slowest(found[1], _images(config, mode, 1))
        for count, ranks in found.items():
            images = _images(config, mode, count)
            step, local = slowest(ranks, images)
            predicted = statistics.median(local)
            if count > 1:  # synchronised batch normalisation is in `local` already
                step_alone = step_of(config, ranks[0], images, predicted)
                predicted = predict_on(step_alone, count, fits[count]).step_s
            row = _row(mode, count, images, (step, local), alone, predicted)
            rows.append(Row(**row, oversubscribed=count > room))
    return {
        "rows": [asdict(row) for row in rows],
        "fits": {str(count): _fit(fit, count, found[count][0]) for count, fit in fits.items()},
        "ready": {str(count): ranks[0].ready for count, ranks in found.items()},
    }


def _row(
    mode: str,
    count: int,
    images: int,
    times: tuple[list[float], list[float]],
    alone: tuple[list[float], list[float]],
    predicted: float,
) -> dict[str, Any]:
    """Figures of a row from seconds: of steps and of steps without communication, round by round."""
    step, local = map(statistics.median, times)
    one, one_local = map(statistics.median, alone)
    fastest, slowest = min(times[0]), max(times[0])
    work = 1 if mode == "weak" else count
    return {
        "mode": mode,
        "workers": count,
        "images": images,
        "step_ms": rounded(step * 1e3),
        "step_ms_spread": (rounded(fastest * 1e3), rounded(slowest * 1e3)),
        "local_ms": rounded(local * 1e3),
        "exposed_ms": rounded((step - local) * 1e3),
        "images_per_s": rounded(images / step),
        "images_per_s_spread": (rounded(images / slowest), rounded(images / fastest)),
        "efficiency": rounded(one / (work * step), 4),
        "efficiency_spread": (rounded(one / (work * slowest), 4), rounded(one / (work * fastest), 4)),
        "compute_efficiency": rounded(one_local / (work * local), 4),
        "predicted_ms": rounded(predicted * 1e3),
        "predicted_error": rounded(predicted / step - 1, 4),
    }


def _fit(fit: Fabric, count: int, rank: Found) -> dict[str, Any]:
    """The fit and what it was fitted to, plain."""
    by_size: dict[int, list[float]] = {}
    for message, seconds in rank.all_reduces:
        by_size.setdefault(message, []).append(seconds)
    return {
        "latency_us": rounded(fit.inside.ring_latency_s * 1e6),
        "gb_per_s": rounded(fit.inside.bytes_per_s / 1e9) if math.isfinite(fit.inside.bytes_per_s) else None,
        "all_reduces": [
            {
                "bytes": message,
                "ms": rounded(statistics.median(times) * 1e3),
                "ms_spread": (rounded(min(times) * 1e3), rounded(max(times) * 1e3)),
                "fitted_ms": rounded(all_reduce_s(message, count, fit) * 1e3),
            }
            for message, times in sorted(by_size.items())
        ],
    }


def _ignore(_: str) -> None:
    pass
