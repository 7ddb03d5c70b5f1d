"""Run a function on Ray Train workers, for measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from densenet_dist.cluster.resources import Resources, plan_resources
from densenet_dist.errors import EnvironmentProblem, StorageError, TrainingError
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import ClusterConfig, Config

_WORKERS_PER_CPU = 16


def plan_measurement(cluster: ClusterConfig, workers: int, available: Mapping[str, float]) -> Resources:
    """Return the resources to request for a number of workers, which may share CPU cores.

    Raises:
        EnvironmentProblem: there are fewer GPUs than workers, or more than 16 workers per CPU core.
    """
    single = plan_resources(replace(cluster, workers=1), available, fixed=True)
    cpus, gpus = available["CPU"], available.get("GPU", 0.0)
    if workers > (gpus if single.use_gpu else _WORKERS_PER_CPU * cpus):
        raise EnvironmentProblem(
            f"{workers} workers are too many for {cpus:g} CPUs and {gpus:g} GPUs\n"
            "  use fewer workers, or join a larger cluster with cluster.address"
        )
    share = int(cpus / workers * 1e4) / 1e4  # Ray counts in ten-thousandths of a core
    per_worker = single.per_worker | {"CPU": min(single.per_worker["CPU"], share)}
    return replace(single, fewest=workers, workers=workers, per_worker=per_worker)


def run_on_workers(
    workers: int, function: Callable[..., Any], arguments: tuple[Any, ...], *, config: Config, own_cluster: bool
) -> list[Any]:
    """Call ``function(device, *arguments)`` on every rank of a process group, on the connected cluster.

    Args:
        workers: number of ranks.
        function: defined in a module.
        arguments: picklable.
        config: ``cluster`` and ``storage``, in which Ray keeps files meanwhile, are used.
        own_cluster: whether the cluster is a private one.

    Returns:
        The results by rank.

    Raises:
        EnvironmentProblem: as `plan_measurement`, or a worker was lost.
        DenseNetDistError: raised by a worker.
    """
    import ray

    from densenet_dist.cluster.ray_backend import InterruptibleTrainer

    resources = plan_measurement(config.cluster, workers, ray.cluster_resources())
    payload = {"function": function, "arguments": arguments, "threads": resources.threads or 1}
    trainer = InterruptibleTrainer(
        _run_on_rank, payload, config, resources, name="bench", storage=config.storage, own_cluster=own_cluster
    )
    try:
        return list(trainer.run())
    except TrainingError as error:
        raise EnvironmentProblem(f"the measurement on {workers} workers did not finish: {error}") from error
    finally:
        with suppress(StorageError):
            RunFolder(config.storage, trainer.run_config.name).remove("")


def _run_on_rank(payload: dict[str, Any]) -> list[Any]:
    import ray.train.torch
    import torch
    import torch.distributed as dist

    torch.set_num_threads(payload["threads"])
    result = payload["function"](ray.train.torch.get_device(), *payload["arguments"])
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return results
