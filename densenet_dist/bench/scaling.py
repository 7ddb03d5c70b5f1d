"""``densenet-dist bench scaling``: how training speeds up with workers.

Measured is training's own step, on images that lie ready, on 1, 2, ... Ray Train workers. Weak scaling gives every
worker the same number of images: efficiency is T(1) / T(n). Strong scaling shares one batch: T(1) / (n T(n)).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

from densenet_dist.bench.model import num_classes
from densenet_dist.bench.process import median_and_spread, rounded
from densenet_dist.bench.scaling_rank import Probe, RankMeasurements, measure_rank
from densenet_dist.cluster.launch import absolute
from densenet_dist.cluster.measured import measuring_workers
from densenet_dist.config import to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config
from densenet_dist.train.environment import describe_environment
from densenet_dist.train.network import check_run

MODES: Final = ("weak", "strong")

DEFINITIONS: Final = {
    "images": "of the global batch",
    "oversubscribed": "more workers than cores: the times say how cores are shared, not how training scales",
    "step_ms": "a training step of the slowest rank: forward, loss, backward with the exchange of gradients, optimizer",
    "local_ms": "the same step where gradients stay on their rank (no_sync)",
    "exposed_ms": "step_ms - local_ms: communication during which nothing is computed, and what it slows down",
    "efficiency": "weak: T(1) / T(n); strong: T(1) / (n T(n)); T is step_ms",
    "compute_efficiency": "the same of local_ms: what is lost to shared cores, caches and memory, not to communication",
    "spreads": "lowest and highest of the rounds",
}


def bench_scaling(
    config: Config,
    *,
    workers: Sequence[int] = (1, 2),
    modes: Sequence[str] = MODES,
    seconds: float = 1.0,
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda text: None,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """Measure every number of workers.

    Args:
        config: whose net, loss, optimizer and exchange of gradients are run. Weak scaling gives each worker
            ``train.global_batch_size`` images, strong scaling all workers together.
        workers: how many; 1 is measured always.
        modes: weak, strong.
        seconds: how long each measurement takes, about.
        rounds: of which the medians count.
        on_progress: told what is being measured.
        probe: what else every rank measures.

    Returns:
        Plain values: ``rows``, with the figures of `DEFINITIONS`, and what they were measured on and with; ``probed``:
        what the probe returned on rank 0, by number of workers.

    Raises:
        ConfigError, EnvironmentProblem: as for training; and more workers than images, or than GPUs.
    """
    config, counts = absolute(config), sorted({1, *workers})
    if "strong" in modes and counts[-1] > config.train.global_batch_size:
        raise ConfigError(
            f"--workers: {counts[-1]} workers cannot share train.global_batch_size={config.train.global_batch_size}\n"
            "  raise it, or measure weak scaling alone with --mode weak"
        )
    check_run(config)
    results: dict[int, list[RankMeasurements]] = {}
    with measuring_workers(config.cluster, config.storage) as cluster:
        for count in counts:
            on_progress(f"{count} workers of {', '.join(map(str, counts))}")
            sizes = list(dict.fromkeys(_images(config, mode, count) for mode in modes))
            arguments = (to_dict(config), num_classes(config), sizes, seconds, rounds, probe)
            results[count] = cluster.run(count, measure_rank, *arguments)
        room, threads = cluster.room, config.cluster.cpus_per_worker
    first = results[1][0]
    outcome = {
        "rows": rows(config, results, modes, room),
        "notes": [f"*: {DEFINITIONS['oversubscribed']}"] if counts[-1] > room else [],
        "name": config.name,
        "model": to_dict(config)["model"],
        "parameters": first.parameters,
        "precision": config.train.precision,
        "gradient_compression": config.train.gradient_compression,
        "images": config.train.global_batch_size,
        "device": first.device,
        "backend": first.backend,
        "threads": 1 if threads == "auto" else threads,
        "room": room,
        "seconds": seconds,
        "rounds": rounds,
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
    }
    if probe is not None:
        outcome["probed"] = {count: ranks[0].probed for count, ranks in results.items()}
    return outcome


def _images(config: Config, mode: str, workers: int) -> int:
    """Of the global batch."""
    return config.train.global_batch_size * (workers if mode == "weak" else 1)


def rows(
    config: Config, results: dict[int, list[RankMeasurements]], modes: Sequence[str], room: int
) -> list[dict[str, Any]]:
    """The figures of each number of workers in each mode, from what their ranks measured; see `DEFINITIONS`."""
    made = []
    for mode in modes:
        alone = statistics.median(_slowest(results[1], _images(config, mode, 1)))
        for count, ranks in results.items():
            images = _images(config, mode, count)
            step = [1e3 * seconds for seconds in _slowest(ranks, images)]
            step_ms, spread = median_and_spread(step)
            local_ms = 1e3 * statistics.median(_slowest(ranks, images, exchange=count == 1))
            ideal = 1e3 * alone / (1 if mode == "weak" else count)
            made.append(
                {
                    "mode": mode,
                    "workers": count,
                    "images": images,
                    "oversubscribed": count > room,
                    "step_ms": step_ms,
                    "step_ms_spread": spread,
                    "local_ms": rounded(local_ms),
                    "exposed_ms": rounded(statistics.median(step) - local_ms),
                    "images_per_s": rounded(1e3 * images / step_ms),
                    "images_per_s_spread": tuple(rounded(1e3 * images / ms) for ms in reversed(spread)),
                    "efficiency": rounded(ideal / step_ms, 4),
                    "efficiency_spread": tuple(rounded(ideal / ms, 4) for ms in reversed(spread)),
                    "compute_efficiency": rounded(ideal / local_ms, 4),
                }
            )
    return made


def _slowest(ranks: Sequence[RankMeasurements], images: int, *, exchange: bool = True) -> list[float]:
    """Seconds of a step, round by round, of whichever rank took longest."""
    return [max(times) for times in zip(*(rank.timings[images, exchange] for rank in ranks), strict=True)]
