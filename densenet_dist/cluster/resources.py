"""How many workers, on what: what a configuration asks for against what a cluster has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig
from densenet_dist.sweep.schema import SweepConfig


@dataclass(frozen=True)
class Resources:
    """What Ray is asked for.

    Attributes:
        fewest: DDP workers at least.
        workers: at most; as many, where the number is fixed.
        use_gpu: one GPU each.
        per_worker: Ray resources of one worker.
        threads: torch threads a worker; None for its share of the cores of its node.
    """

    fewest: int
    workers: int
    use_gpu: bool
    per_worker: dict[str, float]
    threads: int | None


def plan_resources(config: ClusterConfig, available: Mapping[str, float], *, fixed: bool) -> Resources:
    """Decide on workers and resources.

    Args:
        config: what is asked for.
        available: the cluster's resources, as `ray.cluster_resources` gives them.
        fixed: whether the cluster can get no more than that (it is this machine alone).

    Raises:
        EnvironmentProblem: a fixed cluster does not have what the fewest workers need.
    """
    cpus, gpus = int(available.get("CPU", 0)), int(available.get("GPU", 0))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    if config.workers != "auto":
        fewest, workers = config.worker_range
    else:
        fewest = workers = max(gpus, 1) if use_gpu else min(2, max(cpus, 1))
    share = config.cpus_per_worker
    per_worker: dict[str, float] = {"CPU": 1 if share == "auto" else share}
    if use_gpu:
        per_worker["GPU"] = 1
    needed = {name: amount * fewest for name, amount in per_worker.items()}
    missing = ", ".join(
        f"{fewest} workers need {amount:g} {name}s, the cluster has {available.get(name, 0):g}"
        for name, amount in needed.items()
        if available.get(name, 0) < amount
    )
    if missing and fixed:
        raise EnvironmentProblem(
            f"{missing}\n  ask for fewer with cluster.workers, train on the CPU with cluster.device=cpu, "
            "or join a larger cluster with cluster.address"
        )
    return Resources(fewest, workers, use_gpu, per_worker, None if share == "auto" else share)


def shortage(workers: int, per_worker: Mapping[str, float]) -> str:
    """Why there is no room now: what is requested, what is free, and which jobs run; empty where there is room.

    Looks at every node of the cluster that this process is connected to, because a worker is never divided.
    """
    import ray
    from ray._private import state

    nodes, total = list(state.available_resources_per_node().values()), ray.cluster_resources()
    room = sum(count_fitting(node, per_worker) for node in nodes)
    if room >= workers:
        return ""
    free = ", ".join(
        f"{sum(node.get(name, 0) for node in nodes):g} of {total.get(name, 0):g} {name}s" for name in per_worker
    )
    own = ray.get_runtime_context().get_job_id()
    jobs = [job["Entrypoint"] for job in state.jobs() if not job["IsDead"] and job["JobID"] != own]
    others = "".join(f"\n  another job: {command}" for command in jobs)
    requested = f"{workers} workers with {_in_words(per_worker)} each are requested"
    return f"{requested}, and there is room for {room}; free: {free}{others}"


def _in_words(per_worker: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in per_worker.items())


def count_fitting(resources: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Return how many workers fit on a node with these resources."""
    return min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in per_worker.items() if amount)


@dataclass(frozen=True)
class TrialRoom:
    """What trials of a sweep get.

    Attributes:
        per_worker: Ray resources of one worker.
        per_trial: what Tune requests for a trial: with several workers next to nothing, as Ray Train requests those.
        concurrent: trials at a time.
        gpus_per_trial: for the budget; on a cluster without GPUs its workers.
        threads: torch threads per worker.
        settings: of every trial's configuration, by dotted key.
        missing: what the cluster does not have yet, in words.
    """

    per_worker: dict[str, float]
    per_trial: dict[str, float]
    concurrent: int
    gpus_per_trial: float
    threads: int
    settings: dict[str, Any]
    missing: str = ""


def plan_trials(
    sweep: SweepConfig, cluster: ClusterConfig, trials: int, nodes: Sequence[Mapping[str, float]], *, fixed: bool
) -> TrialRoom:
    """Decide how many trials run at a time.

    The workers of a trial are placed all or none, and never more trials are started than have room at the same time, so
    that none waits for what another one holds.

    Args:
        sweep: what is asked for.
        cluster: of the base configuration.
        trials: of the sweep.
        nodes: the resources of each node of the cluster, by Ray's names.
        fixed: whether the cluster can get no more than that.

    Raises:
        EnvironmentProblem: a fixed cluster has no room for one trial, or a cluster not enough for a population.
    """
    gpus = sweep.gpus_per_worker
    if gpus == "auto":
        has_gpus = any(node.get("GPU", 0) > 0 for node in nodes)
        gpus = 1.0 if cluster.device == "cuda" or (cluster.device == "auto" and has_gpus) else 0.0
    cpus = 1 if sweep.cpus_per_worker == "auto" else sweep.cpus_per_worker
    per_worker = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    slots = sum(count_fitting(node, per_worker) for node in nodes)
    room = slots // sweep.workers
    has = f"with {_in_words(per_worker)} per worker the cluster has room for {slots}"
    missing = "" if room else f"a trial needs {sweep.workers} workers; {has}"
    if missing and fixed:
        raise EnvironmentProblem(
            f"{missing}\n  ask for less with workers, gpus_per_worker or cpus_per_worker, "
            "or join a larger cluster with cluster.address"
        )
    if sweep.scheduler.name == "pbt" and sweep.workers > 1 and 0 < room < trials:
        raise EnvironmentProblem(
            f"pbt needs room for all {trials} trials of {sweep.workers} workers at a time; {has}\n"
            "  ask for fewer trials, or for trials of one worker, which take turns"
        )
    settings = {
        "cluster.workers": sweep.workers,
        "cluster.cpus_per_worker": cpus,
        "cluster.device": "cuda" if gpus else "cpu",
        "cluster.engine": "ray",
        "cluster.max_failures": sweep.max_failures,
    }
    wanted = trials if sweep.concurrent == "auto" else sweep.concurrent
    return TrialRoom(
        per_worker=per_worker,
        per_trial=per_worker if sweep.workers == 1 else {"CPU": 0.0, "memory": 1e6},
        concurrent=max(1, min(wanted, room, trials)),
        gpus_per_trial=(gpus or 1.0) * sweep.workers,
        threads=cpus,
        settings=settings,
        missing=missing,
    )


def share_of_cores(workers: int) -> int:
    """Torch threads for one of `workers` Ray workers on this machine.

    One core is left to Ray's own processes: two torch threads on two cores ran 12 % slower beside them than alone, and
    no faster than one.
    """
    return max(1, (len(os.sched_getaffinity(0)) - 1) // workers)


def local_threads(config: ClusterConfig, processes: int = 1) -> int:
    """Torch threads for one of `processes` processes on this machine.

    Raises:
        EnvironmentProblem: the machine has not as many cores as ``cluster.cpus_per_worker`` asks for.
    """
    cores, threads = len(os.sched_getaffinity(0)), config.cpus_per_worker
    if threads != "auto" and threads > cores:
        raise EnvironmentProblem(f"cluster.cpus_per_worker: {threads} are too many, this machine has {cores} cores")
    return max(1, cores // processes) if threads == "auto" else threads
