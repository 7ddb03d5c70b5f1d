"""A trainer of Ray Train with this package's restarts, timeouts and signal handling; imports Ray."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from densenet_dist.cluster.connection import WORKER_ENV
from densenet_dist.cluster.controller import (
    NodeAddressTorchConfig,
    RegisterWithSweep,
    RestartPolicy,
    WorkerCount,
    first_failure,
    raised_error,
)
from densenet_dist.cluster.coordinator import EpochBarrier, explain_crash
from densenet_dist.cluster.resources import Resources
from densenet_dist.cluster.signals import HANDLED_SIGNALS, handle
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, TrainingError
from densenet_dist.schema import Config

_START_ATTEMPT_S = 60.0
"""Longest wait for the resources of a worker group before Ray tries again."""
_ELASTIC_INTERVAL_S = 20.0
"""How often a run with a range of workers checks whether it can use more; using them costs a restart."""


def poll_interval(workers: int) -> float:
    """Return the seconds between the controller's polls of its workers, which take about 0.7 ms per worker.

    The controller notices a dead worker at its next poll.
    """
    return max(0.2, 0.003 * workers)


class InterruptibleTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's classes are untyped
    """A TorchTrainer whose `run` stops the workers and raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP.

    Ray's own handler knows only SIGINT, and ends with ``sys.exit(0)`` or an actor error without the reason.

    Args:
        function: called on each worker with the payload, which is pickled.
        config: ``cluster`` and ``fault`` are used.
        storage: where Ray keeps its own files, in a folder that starts with the given name.
        is_private: whether the cluster is a private one, whose processes have inherited this one's environment.
        coordinator: of the run.
        barrier: for a trial of a sweep. A trial waits for resources without limit: the sweep has checked that the
            cluster is large enough.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], Any],
        payload: dict[str, Any],
        config: Config,
        resources: Resources,
        *,
        name: str,
        storage: str,
        is_private: bool,
        coordinator: Any,
        barrier: EpochBarrier | None = None,
    ) -> None:
        elastic, variables = resources.fewest < resources.workers, config.cluster.variables
        super().__init__(
            function,
            train_loop_config=payload,
            scaling_config=ScalingConfig(
                num_workers=(resources.fewest, resources.workers) if elastic else resources.workers,
                use_gpu=resources.use_gpu,
                resources_per_worker=resources.per_worker,
                placement_strategy=config.cluster.placement.upper(),
                elastic_resize_monitor_interval_s=_ELASTIC_INTERVAL_S,
            ),
            torch_config=NodeAddressTorchConfig(timeout_s=int(config.cluster.timeout_s)),
            run_config=RunConfig(
                # A new name for every start: Ray would silently continue from its own state, incomplete or finished.
                name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=config.cluster.max_failures, controller_failure_limit=-1),
                callbacks=[RegisterWithSweep(coordinator, barrier.placements, barrier.owner)] if barrier else [],
                # A private cluster has inherited WORKER_ENV, and starts faster without a runtime environment.
                worker_runtime_env={"env_vars": WORKER_ENV | variables} if variables or not is_private else None,
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        # A private cluster of fixed size has no autoscaler and loses no nodes. Ray's actors for these are not started:
        # each is another process to start before the first step.
        self._static_cluster = is_private and not elastic
        self._coordinator, self._fault = coordinator, config.fault
        self._wait_s = math.inf if barrier is not None else config.cluster.timeout_s
        self._stopped_by: int | None = None
        self._ended = False

    def run(self) -> Any:
        """Train to the end, and return the value that the training function returned on rank 0.

        Raises:
            DenseNetDistError: raised by a worker, or an error that describes how the workers failed.
            KeyboardInterrupt: with the number of the signal, once the workers are stopped.
        """
        settings = {
            WORKER_GROUP_START_TIMEOUT_S_ENV_VAR: str(min(_START_ATTEMPT_S, self._wait_s)),
            WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR: str(self._fault.hang_timeout_s),
            HEALTH_CHECK_INTERVAL_S_ENV_VAR: str(poll_interval(self.scaling_config.max_workers)),
        }
        if self._static_cluster:
            settings[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        settings = {name: value for name, value in settings.items() if name not in os.environ}
        os.environ |= settings
        try:
            returned = self.fit().return_value
        except (KeyboardInterrupt, Exception) as error:
            if self._stopped_by is not None:  # Ray may have replaced the exception
                raise KeyboardInterrupt(self._stopped_by) from None
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _problem_of(error) from error
        finally:
            self._ended = True
            for name in settings:  # a notebook's process may start other runs next
                del os.environ[name]
        if self._stopped_by is not None:
            raise KeyboardInterrupt(self._stopped_by)
        return returned

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner is a detached actor that outlives a killed driver, forever if there is no dashboard. It is not
        # needed: Ray releases the placement groups when the job ends, and the sweep those of lost trials.
        # The actor for Ray data sets, which are not used here, would delay the workers.
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["scaling_policy"] = WorkerCount(
            self.scaling_config, self._wait_s, self._static_cluster, self._coordinator
        )
        given["failure_policy"] = RestartPolicy(self.run_config.failure_config, self._coordinator)
        return super()._initialize_and_run_controller(**given)

    def _register_sigint_handler(self, controller: Any) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            first, self._stopped_by = self._stopped_by is None, number
            if self._ended:  # calling an actor after Ray's shutdown would start a new cluster
                raise KeyboardInterrupt(number)
            if first:
                handle(signal.default_int_handler)  # a second signal interrupts the wait for a checkpoint
                with suppress(KeyboardInterrupt, ray.exceptions.RayError):
                    ray.get(self._coordinator.stop.remote(), timeout=self._fault.grace_s)
            for handled in HANDLED_SIGNALS:
                signal.signal(handled, signal.SIG_IGN)  # nothing may interrupt the abort
            with suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=10)
            raise KeyboardInterrupt

        handle(stop)


def _problem_of(failure: Any) -> DenseNetDistError:
    """Return Ray's failure as an error with one message: what a worker raised, without Ray's wrapping."""
    if (raised := raised_error(failure)) is not None:
        return raised
    if isinstance(failure, ControllerError):
        if isinstance(failure.controller_failure, WorkerGroupStartupFailedError):
            reason = explain_crash(failure.controller_failure, "a worker")
            return TrainingError(f"the workers could not start: {reason}\n  see Ray's log of that worker")
        return EnvironmentProblem(
            f"the cluster could not start the workers: {failure.controller_failure}\n"
            "  check cluster.workers and cluster.device against 'ray status', or raise cluster.timeout_s"
        )
    if isinstance(failure, WorkerGroupError):
        rank, cause = first_failure(failure)
        return TrainingError(
            f"training failed on rank {rank}: {explain_crash(cause, 'the worker')}\n"
            "  see the traceback with --debug; resume from the last checkpoint with --resume"
        )
    return TrainingError(f"training failed: {failure}")
