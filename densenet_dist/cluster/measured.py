"""Functions on Ray Train workers, for what is measured rather than trained: a process group for each call."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from densenet_dist.cluster.connection import WORKER_ENV, connected
from densenet_dist.cluster.resources import plan_resources
from densenet_dist.errors import EnvironmentProblem, TrainingError
from densenet_dist.schema import ClusterConfig

Work: TypeAlias = Callable[..., Any]
"""A function of a module, called as ``work(device, *arguments)`` on every rank of a process group."""


@dataclass(frozen=True)
class Workers:
    """A cluster, and how functions run on it.

    Attributes:
        cluster: the configuration; ``workers`` is given call by call.
        storage: a folder that all nodes see.
        available: the cluster's resources, by Ray's names.
        own: whether the cluster is this process' own.
    """

    cluster: ClusterConfig
    storage: str
    available: dict[str, float]
    own: bool

    @property
    def on_gpus(self) -> bool:
        """Whether each worker has a GPU of its own."""
        return plan_resources(replace(self.cluster, workers=1), self.available, fixed=False).use_gpu

    @property
    def room(self) -> int:
        """How many workers have a core (``cpus_per_worker`` of them), or a GPU, of their own."""
        if self.on_gpus:
            return int(self.available.get("GPU", 0))
        return int(self.available.get("CPU", 1) / self._cores)

    @property
    def _cores(self) -> int:
        return 1 if self.cluster.cpus_per_worker == "auto" else self.cluster.cpus_per_worker

    def run(self, workers: int, work: Work, *arguments: Any) -> list[Any]:
        """Call a function on so many workers; where they are more than the cores, they share these.

        Returns:
            What each rank returned, by rank.

        Raises:
            EnvironmentProblem: there are far fewer cores, or fewer GPUs, than workers, or a worker was lost.
            DenseNetDistError: what a worker raised on purpose.
        """
        cpus, gpus = (self.available.get(name, 0.0) for name in ("CPU", "GPU"))
        if workers > (gpus if self.on_gpus else 16 * cpus) or self._cores > cpus:
            raise EnvironmentProblem(
                f"{workers} workers of {self._cores} CPUs are too many: there are {cpus:g} CPUs, {gpus:g} GPUs\n"
                "  ask for fewer, or join a larger cluster with cluster.address"
            )
        try:
            return self._fit(workers, {"work": work, "arguments": arguments, "threads": self._cores})
        except TrainingError as error:
            raise EnvironmentProblem(f"the measurement on {workers} workers did not finish: {error}") from error

    def _fit(self, workers: int, payload: dict[str, Any]) -> list[Any]:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.api.config import LoggingConfig

        from densenet_dist.cluster.ray_backend import InterruptibleTrainer, NodeAddressTorchConfig

        # Ray counts in ten-thousandths of a core.
        cores = min(float(self._cores), int(self.available.get("CPU", 1) / workers * 1e4) / 1e4)
        name = f"bench-{workers}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        trainer = InterruptibleTrainer(
            _work_on_rank,
            train_loop_config=payload,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=self.on_gpus,
                resources_per_worker={"CPU": cores} | ({"GPU": 1.0} if self.on_gpus else {}),
            ),
            torch_config=NodeAddressTorchConfig(timeout_s=int(self.cluster.timeout_s)),
            run_config=RunConfig(
                name=name,
                storage_path=self.storage,
                worker_runtime_env=None if self.own else {"env_vars": WORKER_ENV},
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        trainer.wait_s = self.cluster.timeout_s
        try:
            return list(trainer.run())
        finally:
            if "://" not in self.storage:
                shutil.rmtree(os.path.join(self.storage, name), ignore_errors=True)


@contextmanager
def measuring_workers(cluster: ClusterConfig, storage: str) -> Iterator[Workers]:
    """Connect to the cluster that is named or joined already, or start one for as long as the context lasts.

    Args:
        cluster: which, and on what.
        storage: a folder, or a location of an object store, that all nodes see; Ray keeps notes there meanwhile.

    Raises:
        EnvironmentProblem: where it cannot be reached or started.
    """
    with connected(cluster) as own:
        import ray

        yield Workers(cluster, storage, dict(ray.cluster_resources()), own)


def _work_on_rank(payload: dict[str, Any]) -> list[Any]:
    import ray.train.torch
    import torch
    import torch.distributed as dist

    torch.set_num_threads(payload["threads"])
    result = payload["work"](ray.train.torch.get_device(), *payload["arguments"])
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return results
