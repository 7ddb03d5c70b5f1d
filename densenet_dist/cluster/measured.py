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
from densenet_dist.cluster.failures import explain
from densenet_dist.cluster.resources import plan_resources
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem
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
            EnvironmentProblem: there are fewer GPUs than workers, or a worker was lost.
            DenseNetDistError: what a worker raised on purpose.
        """
        import ray

        if self.on_gpus and workers > self.room:
            raise EnvironmentProblem(
                f"{workers} workers need {workers} GPUs, the cluster has {self.room}\n"
                "  ask for fewer, or join a larger cluster with cluster.address"
            )
        box = ray.remote(num_cpus=0)(_Box).remote()
        failure = self._fit(workers, {"work": work, "arguments": arguments, "box": box, "threads": self._cores})
        error, results = ray.get(box.contents.remote())
        if error is not None:
            raise error
        if failure is not None or len(results) < workers:
            problem = f"the measurement on {workers} workers did not finish: {_reason(failure)}"
            raise EnvironmentProblem(problem) from failure
        return [results[rank] for rank in range(workers)]

    def _fit(self, workers: int, payload: dict[str, Any]) -> BaseException | None:
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
        try:
            failure: BaseException | None = trainer.failure()
            return failure
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


class _Box:
    """An actor that holds what ranks returned."""

    def __init__(self) -> None:
        self._results: dict[int, Any] = {}
        self._error: DenseNetDistError | None = None

    def put(self, rank: int, result: Any) -> None:
        self._results[rank] = result

    def fail(self, error: DenseNetDistError) -> None:
        self._error = self._error or error

    def contents(self) -> tuple[DenseNetDistError | None, dict[int, Any]]:
        return self._error, self._results


def _work_on_rank(payload: dict[str, Any]) -> None:
    import ray
    import ray.train.torch
    import torch

    torch.set_num_threads(payload["threads"])
    try:
        result = payload["work"](ray.train.torch.get_device(), *payload["arguments"])
    except DenseNetDistError as error:
        ray.get(payload["box"].fail.remote(error))
        raise
    ray.get(payload["box"].put.remote(ray.train.get_context().get_world_rank(), result))


def _reason(failure: BaseException | None) -> str:
    workers = getattr(failure, "worker_failures", None)
    return explain(min(workers.items())[1] if workers else failure, "a worker")
