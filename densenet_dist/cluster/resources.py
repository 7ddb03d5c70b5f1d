"""The number of workers and their resources: what a configuration requests and what a cluster has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig
from densenet_dist.sweep.definition import SweepConfig


@dataclass(frozen=True)
class Resources:
    """The workers to request from Ray.

    Attributes:
        fewest, workers: smallest and largest number of workers; the same unless the run is elastic.
        per_worker: Ray resources of one worker.
        threads: torch threads per worker; None for its share of the node's cores.
    """

    fewest: int
    workers: int
    use_gpu: bool
    per_worker: dict[str, float]
    threads: int | None


def plan_resources(config: ClusterConfig, available: Mapping[str, float], *, fixed: bool) -> Resources:
    """Choose the number of workers and their resources.

    Raises:
        EnvironmentProblem: a fixed cluster, which cannot grow, lacks the resources of the smallest number of workers.
    """
    cpus, gpus = int(available.get("CPU", 0)), int(available.get("GPU", 0))
    use_gpu = _uses_gpus(config, gpus > 0)
    if config.workers != "auto":
        fewest, workers = config.worker_range
    else:
        fewest = workers = max(gpus, 1) if use_gpu else min(2, max(cpus, 1))
    share = config.cpus_per_worker
    per_worker = {"CPU": 1 if share == "auto" else share} | config.node_resources
    if use_gpu:
        per_worker["GPU"] = 1
    needed = {name: amount * fewest for name, amount in per_worker.items()}
    missing = ", ".join(
        f"{fewest} workers need {amount:g} {name}s, the cluster has {available.get(name, 0):g}"
        for name, amount in needed.items()
        if available.get(name, 0) < amount
    )
    if missing and fixed:
        use_cpu = "train on the CPU with cluster.device=cpu, " if use_gpu else ""
        raise EnvironmentProblem(
            f"{missing}\n  request less with cluster.workers or cluster.cpus_per_worker, {use_cpu}"
            "or join a larger cluster with cluster.address"
        )
    return Resources(fewest, workers, use_gpu, per_worker, None if share == "auto" else share)


def _uses_gpus(config: ClusterConfig, available: bool) -> bool:
    return config.device == "cuda" or (config.device == "auto" and available)


def shortage(workers: int, per_worker: Mapping[str, float]) -> str:
    """Describe why workers cannot start now: requested and free resources, and running jobs; empty if they can.

    Free resources are compared node by node, since a worker needs all of its resources on one node.
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
    requested = f"{workers} workers with {_describe(per_worker)} each are requested"
    return f"{requested}, and there is room for {room}; free: {free}{others}"


def _describe(per_worker: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in per_worker.items())


def count_fitting(resources: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Return how many workers fit into these resources of a node."""
    return min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in per_worker.items() if amount)


@dataclass(frozen=True)
class TrialCapacity:
    """The resources of a sweep's trials.

    Attributes:
        per_worker: Ray resources of one worker.
        per_trial: resources that Tune requests for a trial; with several workers almost none, since Ray Train requests
            those of the workers.
        concurrent: most trials at the same time.
        settings: of every trial's configuration, by dotted key.
        missing: description of resources that the cluster lacks at present.
    """

    per_worker: dict[str, float]
    per_trial: dict[str, float]
    concurrent: int
    settings: dict[str, Any]
    missing: str = ""


def plan_trials(
    sweep: SweepConfig, cluster: ClusterConfig, trials: int, nodes: Sequence[Mapping[str, float]], *, fixed: bool
) -> TrialCapacity:
    """Choose how many of a sweep's trials run at the same time on a cluster with these nodes.

    A cluster that can grow is asked for all trials of one worker at once, except with Optuna, which suggests each trial
    from the results of earlier ones. No more trials of several workers are started than fit at present, so that none
    waits for resources that another one holds.

    Raises:
        EnvironmentProblem: one trial does not fit on a fixed cluster.
    """
    gpus = sweep.gpus_per_worker
    if gpus == "auto":
        gpus = float(_uses_gpus(cluster, any(node.get("GPU", 0) > 0 for node in nodes)))
    cpus = 1 if sweep.cpus_per_worker == "auto" else sweep.cpus_per_worker
    per_worker = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) | cluster.node_resources
    slots = sum(count_fitting(node, per_worker) for node in nodes)
    room = slots // sweep.workers
    has = f"with {_describe(per_worker)} per worker the cluster has room for {slots}"
    missing = "" if room else f"a trial needs {sweep.workers} workers; {has}"
    if missing and fixed:
        raise EnvironmentProblem(
            f"{missing}\n  request less with workers, gpus_per_worker or cpus_per_worker, "
            "or join a larger cluster with cluster.address"
        )
    wanted = trials if sweep.concurrent == "auto" else min(sweep.concurrent, trials)
    grows = sweep.workers == 1 and not fixed and sweep.search.name != "optuna"
    return TrialCapacity(
        per_worker=per_worker,
        # Ray Train requests the resources of several workers; Tune rejects a trial without any, hence 1 MB of memory.
        per_trial=per_worker if sweep.workers == 1 else {"CPU": 0.0, "memory": 1e6},
        concurrent=wanted if grows else max(1, min(wanted, room)),
        settings={
            "cluster.workers": sweep.workers,
            "cluster.cpus_per_worker": cpus,
            "cluster.device": "cuda" if gpus else "cpu",
            "cluster.engine": "ray",
            "cluster.max_failures": sweep.max_failures,
        },
        missing=missing,
    )


def share_of_cores(workers: int) -> int:
    """Return the number of torch threads for one of `workers` Ray workers on this machine.

    One core is left to Ray's processes: beside them, two torch threads on two cores were no faster than one.
    """
    return max(1, (len(os.sched_getaffinity(0)) - 1) // workers)


def local_threads(config: ClusterConfig, processes: int = 1) -> int:
    """Return the number of torch threads for one of `processes` processes on this machine.

    Raises:
        EnvironmentProblem: ``cluster.cpus_per_worker`` is more than the machine's cores.
    """
    cores, threads = len(os.sched_getaffinity(0)), config.cpus_per_worker
    if threads != "auto" and threads > cores:
        raise EnvironmentProblem(f"cluster.cpus_per_worker: {threads} are too many, this machine has {cores} cores")
    return max(1, cores // processes) if threads == "auto" else threads
