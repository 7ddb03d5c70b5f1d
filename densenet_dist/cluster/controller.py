"""Policies and callbacks that run in Ray Train's controller: restarts, the number of workers, and their start."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayActorError, RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from densenet_dist.cluster.coordinator import explain_crash
from densenet_dist.cluster.resources import count_fitting, shortage
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, SmallerMicroBatches

_SAVE_TIMEOUT_S = 30.0
_RETRY_S = 0.5
_MAX_FAILED_STARTS = 3


def raised_error(failure: Any) -> DenseNetDistError | None:
    """Return the error of this package that the worker of lowest rank, or the controller, raised."""
    causes = [cause for _, cause in sorted(getattr(failure, "worker_failures", {}).items())]
    causes.append(getattr(failure, "controller_failure", None))
    return next((cause for cause in causes if isinstance(cause, DenseNetDistError)), None)


def first_failure(failure: WorkerGroupError) -> tuple[int, Exception]:
    """Return rank and error of the first failed worker, preferring one whose process was lost.

    A loss makes the others' collective operations fail.
    """
    lost = {rank: cause for rank, cause in failure.worker_failures.items() if isinstance(cause, RayTrainError)}
    return min((lost or failure.worker_failures).items())


def _note(coordinator: Any, text: str, *, warning: bool = False) -> None:
    coordinator.put.remote({"kind": "note", "text": text, "warning": warning})


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]  # Ray's classes are untyped
    """Restarts all workers after a failure, at most ``cluster.max_failures`` times, and reports each restart.

    An error of this package ends the run at once, except `SmallerMicroBatches`, which does not count as a failure.

    Workers that are lost while they start are restarted twice. Waiting for resources is retried without limit, since
    `WorkerCount` ends a wait that takes too long.
    """

    def __init__(self, failure_config: Any, coordinator: Any) -> None:
        super().__init__(failure_config)
        self._coordinator, self._failed_starts = coordinator, 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Decide after a failure."""
        if (error := raised_error(training_failed_error)) is not None:
            if not isinstance(error, SmallerMicroBatches):
                return FailureDecision.RAISE
            text = f"{str(error).splitlines()[0]}; all workers are restarted, which does not count as a failure"
            _note(self._coordinator, text, warning=True)
            return FailureDecision.RETRY
        problem = getattr(training_failed_error, "controller_failure", None)
        if problem is None:
            self._failed_starts = 0
        elif isinstance(problem, WorkerGroupStartupFailedError):
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                return FailureDecision.RAISE
            _note(self._coordinator, f"{explain_crash(problem, 'a worker')}; starting the workers again", warning=True)
        losses, preemptions = self._worker_group_failures, self._preemption_failures
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RAISE:
            return decision
        if self._worker_group_failures > losses:
            rank, cause = first_failure(training_failed_error)
            restarts = f"{self._worker_group_failures} of at most {self.failure_config.max_failures} times"
            text = f"failed: {explain_crash(cause, 'the worker')}; all workers are restarted ({restarts})"
            self._coordinator.warn.remote(rank, text)
        elif self._preemption_failures > preemptions:
            text = "a node was preempted: all workers are restarted; this does not count as a failure"
            _note(self._coordinator, text, warning=True)
        return decision


class WorkerCount(ElasticScalingPolicy):  # type: ignore[misc]
    """Chooses the number of workers, and limits the wait for their resources at the start and after each loss.

    An elastic run uses all resources that other jobs leave free, and is saved before its number of workers changes.
    A static cluster has no autoscaler to request resources from.
    """

    def __init__(self, scaling_config: Any, wait_s: float, static_cluster: bool, coordinator: Any) -> None:
        super().__init__(scaling_config)
        self._wait_s, self._static_cluster, self._coordinator = wait_s, static_cluster, coordinator
        self._waiting_since: float | None = None
        self._reported = True  # the driver reports the first wait
        self._trains = False
        self._placement: Any = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Decide before an attempt to start workers.

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
        if not self.scaling_config.elasticity_enabled:
            self._maybe_send_resource_request()
            return self._get_resize_decision(self.scaling_config.num_workers)
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_RETRY_S)  # Ray asks again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Decide about once per poll while the workers run."""
        self._waiting_since, self._reported, self._trains = None, False, True
        self._placement = worker_group_state.placement_group_handle.placement_group
        if not self.scaling_config.elasticity_enabled:
            self._maybe_send_resource_request()
            return NoopDecision()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        free = state.available_resources_per_node()  # Ray's own count includes resources that other jobs use
        per_worker = self.scaling_config._resources_per_worker_not_none
        room = sum(count_fitting(node, per_worker) for node in free.values())
        if self._placement is not None:  # after a loss, the other workers still hold their bundles
            placed = ray.util.placement_group_table(self._placement)
            if placed.get("state") != "REMOVED":
                room += sum(node in free for node in placed.get("bundles_to_node_id", {}).values())
        return min(room, int(super()._count_possible_workers(reserved_resources)))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Record that no workers are training, so that a resize has nothing to save."""
        self._trains = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Save the run, so that no step is repeated, unless its workers have not started or were lost."""
        if self._trains:
            self._trains = False
            text = f"the cluster has changed: all workers are restarted, now {resize_decision.num_workers}"
            _note(self._coordinator, text)
            with suppress(ray.exceptions.RayError):
                ray.get(self._coordinator.save.remote(), timeout=_SAVE_TIMEOUT_S)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register with the autoscaler."""
        if not self._static_cluster:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self._static_cluster:
            super()._maybe_send_resource_request()


class RegisterWithSweep(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Passes Ray Train's controller to the coordinator, and the workers' placement group to the sweep.

    Only the controller can end a `fit` that runs in a thread, as in a trial. If the trial's process is lost, only the
    sweep can remove the placement group.
    """

    def __init__(self, coordinator: Any, placements: Any, owner: str) -> None:
        self._coordinator, self._placements, self._owner = coordinator, placements, owner

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """Register the workers as soon as they exist: their start may take long, or fail."""
        placed = ray.get(workers[0].execute_async(ray.util.get_current_placement_group))
        ray.get(self._placements.add.remote(self._owner, placed))
        return {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register the controller."""
        ray.get(self._coordinator.set_controller.remote(ray.get_runtime_context().current_actor))


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
