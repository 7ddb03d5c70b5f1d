"""How many workers, on what: what a configuration asks for against what a cluster has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig


@dataclass(frozen=True)
class Resources:
    """What Ray is asked for.

    Attributes:
        workers: DDP workers.
        use_gpu: one GPU each.
        per_worker: Ray resources of one worker.
        threads: torch threads a worker; None for its share of the cores of its node.
        lacking: what the cluster does not have yet, in words; empty where it has everything.
    """

    workers: int
    use_gpu: bool
    per_worker: dict[str, float]
    threads: int | None
    lacking: str


def plan_resources(config: ClusterConfig, available: Mapping[str, float], *, fixed: bool) -> Resources:
    """Decide on workers and resources.

    Args:
        config: what is asked for.
        available: the cluster's resources, as `ray.cluster_resources` gives them.
        fixed: whether the cluster can get no more than that (it is this machine alone).

    Raises:
        EnvironmentProblem: where a fixed cluster cannot do it.
    """
    cpus, gpus = int(available.get("CPU", 0)), int(available.get("GPU", 0))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    if config.workers != "auto":
        workers = config.workers
    else:
        workers = max(gpus, 1) if use_gpu else min(2, max(cpus, 1))
    share = config.cpus_per_worker
    per_worker: dict[str, float] = {"CPU": 1 if share == "auto" else share}
    if use_gpu:
        per_worker["GPU"] = 1
    needed = {name: amount * workers for name, amount in per_worker.items()}
    lacking = ", ".join(
        f"{workers} workers need {amount:g} {name}s, the cluster has {available.get(name, 0):g}"
        for name, amount in needed.items()
        if available.get(name, 0) < amount
    )
    if lacking and fixed:
        raise EnvironmentProblem(
            f"{lacking}\n  ask for fewer with cluster.workers, train on the CPU with cluster.device=cpu, "
            "or join a larger cluster with cluster.address"
        )
    return Resources(workers, use_gpu, per_worker, None if share == "auto" else share, lacking)


def share_of_cores(workers: int) -> int:
    """Torch threads for one of `workers` Ray workers on this machine.

    One core is left to Ray's own processes: two torch threads on two cores ran 12 % slower beside them than alone, and
    no faster than one.
    """
    return max(1, (len(os.sched_getaffinity(0)) - 1) // workers)


def local_threads(config: ClusterConfig, processes: int = 1) -> int:
    """Torch threads for one of `processes` processes on this machine."""
    if config.cpus_per_worker != "auto":
        return config.cpus_per_worker
    return max(1, len(os.sched_getaffinity(0)) // processes)
