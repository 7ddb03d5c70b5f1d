"""Ray Train with this package's restarts, timeouts and signal handling; imports Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from densenet_dist.cluster.connection import WORKER_ENV
from densenet_dist.cluster.failures import explain_crash
from densenet_dist.cluster.resources import Resources, count_fitting, shortage
from densenet_dist.cluster.signals import NUMBERS, handle
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, TrainingError
from densenet_dist.schema import Config

_SAVE_TIMEOUT_S = 30.0
_START_ATTEMPT_S = 60.0
"""Longest wait for the resources of a worker group before Ray tries again."""
_MOST_FAILED_STARTS = 3
_RETRY_S = 0.5


def poll_interval(workers: int) -> float:
    """Return the seconds between the controller's polls of its workers, which take about 0.7 ms per worker.

    The controller notices a dead worker at its next poll.
    """
    return max(0.2, 0.003 * workers)


class InterruptibleTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's classes are untyped
    """A TorchTrainer whose `run` stops the workers and raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP.

    Ray's own handler knows only SIGINT, and ends with ``sys.exit(0)`` or an actor error without the reason.

    Args:
        function: called on each worker with the payload.
        payload: picklable.
        config: ``cluster`` and ``fault`` are used.
        resources: from `plan_resources`.
        storage: where Ray keeps its own files, in a folder that starts with the given name.
        own_cluster: whether the cluster is a private one, whose processes have inherited this one's environment.
        coordinator: the `Coordinator` that receives notes about restarts and waits.
        max_failures: how often lost workers are restarted.
        callbacks: of Ray Train.
    """

    stopped_by: int | None = None
    save: Callable[[], None] | None = None
    """Called on the first signal to save the run before the workers are stopped; a second signal interrupts it."""

    def __init__(
        self,
        function: Callable[[dict[str, Any]], Any],
        payload: dict[str, Any],
        config: Config,
        resources: Resources,
        *,
        name: str,
        storage: str,
        own_cluster: bool,
        coordinator: Any = None,
        max_failures: int = 0,
        callbacks: Sequence[Any] = (),
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
                elastic_resize_monitor_interval_s=config.cluster.elastic_interval_s,
            ),
            torch_config=NodeAddressTorchConfig(timeout_s=int(config.cluster.timeout_s)),
            run_config=RunConfig(
                # A new name for every start: Ray would silently continue from its own state, incomplete or finished.
                name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=-1),
                callbacks=[*callbacks, *([SaveBeforeResize(coordinator)] if elastic else [])],
                # A private cluster has inherited WORKER_ENV, and starts faster without a runtime environment.
                worker_runtime_env={"env_vars": WORKER_ENV | variables} if variables or not own_cluster else None,
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        # A private cluster of fixed size has no autoscaler and loses no nodes. Ray's actors for these are not started:
        # each is another process to start before the first step.
        self._static_cluster = own_cluster and not elastic
        self._ended = False
        self._coordinator, self._hang_timeout_s = coordinator, config.fault.hang_timeout_s
        self._poll_s = poll_interval(resources.workers)
        self.wait_s = config.cluster.timeout_s
        """Longest wait for the resources of the workers, at the start and after each loss."""

    def run(self) -> Any:
        """Train to the end.

        Returns:
            The value that the training function returned on rank 0.

        Raises:
            DenseNetDistError: raised by a worker, or an error that describes how the workers failed.
            KeyboardInterrupt: with the number of the signal, once the workers are stopped.
        """
        settings = {
            WORKER_GROUP_START_TIMEOUT_S_ENV_VAR: str(min(_START_ATTEMPT_S, self.wait_s)),
            WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR: str(self._hang_timeout_s),
            HEALTH_CHECK_INTERVAL_S_ENV_VAR: str(self._poll_s),
        }
        if self._static_cluster:
            settings[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        settings = {name: value for name, value in settings.items() if name not in os.environ}
        os.environ |= settings
        try:
            returned = self.fit().return_value
        except (KeyboardInterrupt, Exception) as error:
            if self.stopped_by is not None:  # Ray may have replaced the exception
                raise KeyboardInterrupt(self.stopped_by) from None
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _problem_of(error) from error
        finally:
            self._ended = True
            for name in settings:  # a notebook's process may start other runs next
                del os.environ[name]
        if self.stopped_by is not None:
            raise KeyboardInterrupt(self.stopped_by)
        return returned

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner is a detached actor that outlives a killed driver, forever if there is no dashboard. It is not
        # needed: Ray releases the placement groups when the job ends, and the sweep those of lost trials.
        # The actor for Ray data sets, which are not used here, would delay the workers.
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        policy = _Elastic if isinstance(given["scaling_policy"], ElasticScalingPolicy) else _Fixed
        given["scaling_policy"] = policy(self.scaling_config, self.wait_s, self._static_cluster, self._coordinator)
        given["failure_policy"] = RestartPolicy(self.run_config.failure_config, self._coordinator)
        return super()._initialize_and_run_controller(**given)

    def _register_sigint_handler(self, controller: Any) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped_by = number
            if self._ended:  # calling an actor after Ray's shutdown would start a new cluster
                raise KeyboardInterrupt(number)
            save, self.save = self.save, None
            if save is not None:
                handle(signal.default_int_handler)  # a second signal interrupts `save`
                with suppress(KeyboardInterrupt, ray.exceptions.RayError):
                    save()
            for handled in NUMBERS:
                signal.signal(handled, signal.SIG_IGN)  # nothing may interrupt the abort
            with suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=10)
            raise KeyboardInterrupt

        handle(stop)


def _raised(failure: Any) -> DenseNetDistError | None:
    """Return the error of this package that the worker of lowest rank, or the controller, raised."""
    causes = [cause for _, cause in sorted(getattr(failure, "worker_failures", {}).items())]
    causes.append(getattr(failure, "controller_failure", None))
    return next((cause for cause in causes if isinstance(cause, DenseNetDistError)), None)


def _first_failure(failure: WorkerGroupError) -> tuple[int, Exception]:
    """Return rank and error of the first failed worker, preferring one whose process was lost.

    A loss makes the others' collective operations fail.
    """
    lost = {rank: cause for rank, cause in failure.worker_failures.items() if isinstance(cause, RayTrainError)}
    return min((lost or failure.worker_failures).items())


def _problem_of(failure: Any) -> DenseNetDistError:
    """Return Ray's failure as an error with one message: what a worker raised, without Ray's wrapping."""
    if (raised := _raised(failure)) is not None:
        return raised
    if isinstance(failure, ControllerError):
        return EnvironmentProblem(
            f"the cluster could not start the workers: {failure.controller_failure}\n"
            "  check cluster.workers and cluster.device against 'ray status', or raise cluster.timeout_s"
        )
    if isinstance(failure, WorkerGroupError):
        rank, cause = _first_failure(failure)
        return TrainingError(
            f"training failed on rank {rank}: {explain_crash(cause, 'the worker')}\n"
            "  see the traceback with --debug; resume from the last checkpoint with --resume"
        )
    return TrainingError(f"training failed: {failure}")


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Restarts lost workers and reports it; an error that this package raises ends the run at once.

    Workers that are lost during their start are restarted twice. Waiting for resources is repeated without limit: the
    scaling policy ends a wait that takes too long.
    """

    def __init__(self, failure_config: Any, coordinator: Any) -> None:
        super().__init__(failure_config)
        self._coordinator = coordinator
        self._failed_starts = 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Runs in the controller."""
        if _raised(training_failed_error) is not None:
            return FailureDecision.RAISE
        if isinstance(training_failed_error, WorkerGroupError):
            self._failed_starts = 0
        problem = getattr(training_failed_error, "controller_failure", None)
        if isinstance(problem, WorkerGroupStartupFailedError):
            self._failed_starts += 1
            if self._failed_starts == _MOST_FAILED_STARTS:
                return FailureDecision.RAISE
            _note(self._coordinator, f"{explain_crash(problem, 'a worker')}; starting the workers again", warning=True)
        losses, preemptions = self._worker_group_failures, self._preemption_failures
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RAISE or self._coordinator is None:
            return decision
        if self._worker_group_failures > losses:
            rank, cause = _first_failure(training_failed_error)
            restarts = f"{self._worker_group_failures} of at most {self.failure_config.max_failures} times"
            self._coordinator.report_loss.remote(rank, explain_crash(cause, "the worker"), restarts)
        elif self._preemption_failures > preemptions:
            text = "a node was preempted: all workers are restarted; this does not count as a failure"
            _note(self._coordinator, text, warning=True)
        return decision


def _note(coordinator: Any, text: str, *, warning: bool = False) -> None:
    if coordinator is not None:
        coordinator.put.remote({"kind": "note", "text": text, "warning": warning})


class _WithDeadline(ScalingPolicy):  # type: ignore[misc]
    """Limits the wait for resources at the start and after each loss.

    Args:
        scaling_config: of the run.
        wait_s: the longest wait.
        alone: whether there is no autoscaler.
        coordinator: receives a note about what the run waits for.
    """

    def __init__(self, scaling_config: Any, wait_s: float, alone: bool, coordinator: Any) -> None:
        super().__init__(scaling_config)
        self._wait_s, self._static_cluster, self._coordinator = wait_s, alone, coordinator
        self._waiting_since: float | None = None
        self._reported = True  # the driver reports the first wait

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Runs in the controller before every attempt to start workers.

        Raises:
            EnvironmentProblem: the resources were not available in time.
        """
        waited_s = time.monotonic() - self._waiting_since if self._waiting_since else 0.0
        needed = self.scaling_config.min_workers, self.scaling_config._resources_per_worker_not_none
        if waited_s > self._wait_s:
            raise EnvironmentProblem(
                f"the workers could not start within {self._wait_s:g} s: {shortage(*needed) or 'see the log of Ray'}\n"
                "  ask for less with cluster.workers or cluster.cpus_per_worker, or wait longer with cluster.timeout_s"
            )
        # Right after a loss the resources of the lost workers are not free yet: report from the second attempt on.
        if waited_s and not self._reported and (problem := shortage(*needed)):
            _note(self._coordinator, f"waiting up to {self._wait_s:g} s for resources: {problem}")
            self._reported = True
        self._waiting_since = self._waiting_since or time.monotonic()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Runs in the controller about once per poll while the workers run."""
        self._waiting_since, self._reported = None, False
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register with the autoscaler."""
        if not self._static_cluster:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self._static_cluster:
            super()._maybe_send_resource_request()


class _Fixed(_WithDeadline, FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers."""


class _Elastic(_WithDeadline, ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as there is room for beside other jobs, whose resources Ray's policy counts as well."""

    _placement: Any = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Runs in the controller before every attempt to start workers."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_RETRY_S)  # the controller asks again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Runs in the controller about once per poll while the workers run."""
        self._placement = worker_group_state.placement_group_handle.placement_group
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        free = state.available_resources_per_node()
        per_worker = self.scaling_config._resources_per_worker_not_none
        room = sum(count_fitting(node, per_worker) for node in free.values())
        if self._placement is not None:  # after a loss, the other workers still have their places
            placed = ray.util.placement_group_table(self._placement)
            if placed.get("state") != "REMOVED":
                room += sum(node in free for node in placed.get("bundles_to_node_id", {}).values())
        return min(room, super()._count_possible_workers(reserved_resources))


class RegisterWithSweep(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Passes Ray Train's controller to the coordinator, and the workers' placement group to the sweep.

    Only the controller can end a `fit` that runs in a thread, as in a trial. If the trial's process is lost, only the
    sweep can remove the placement group.
    """

    def __init__(self, coordinator: Any, placements: Any, owner: str) -> None:
        self._coordinator, self._placements, self._owner = coordinator, placements, owner

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """Runs in the controller as soon as the workers exist: their start may take long, or fail."""
        placed = ray.get(workers[0].execute_async(ray.util.get_current_placement_group))
        ray.get(self._placements.add.remote(self._owner, placed))
        return {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller."""
        ray.get(self._coordinator.set_controller.remote(ray.get_runtime_context().current_actor))


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Saves a run before its number of workers changes, so that no step is repeated."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator, self._trains = coordinator, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Runs in the controller."""
        self._trains = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Runs in the controller; lost workers cannot save."""
        self._trains = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Runs in the controller, also before the first start of workers and after a loss."""
        if self._trains:
            self._trains = False
            text = f"the cluster has changed: all workers are restarted, now {resize_decision.num_workers}"
            _note(self._coordinator, text)
            with suppress(ray.exceptions.RayError):
                ray.get(self._coordinator.save.remote(), timeout=_SAVE_TIMEOUT_S)


class _NodeAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            worker_group.execute(_use_node_interface)
            super().on_start(worker_group, backend_config)
        except (RayActorError, RayTaskError) as error:
            # Ray would keep the placement group, whose resources the next attempt needs.
            worker_group.get_worker_group_state().shutdown()
            cause = explain_crash(error, "a worker")
            raise WorkerGroupStartupFailedError(f"the process group could not be set up: {cause}") from error


class NodeAddressTorchConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig with which gloo listens on the network interface of Ray's address for the node.

    Gloo resolves the host's own name; if /etc/hosts maps it to 127.0.1.1, as on Debian, other hosts cannot connect.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Ray's torch backend, which selects the interface first."""
        return _NodeAddressBackend


def _use_node_interface() -> None:
    import psutil  # comes with Ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
