"""Corrections to Ray Train and its torch backend; imports Ray, so it is imported only by what launches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

from densenet_dist.cluster.signals import NUMBERS, handle

_SAVE_WITHIN_S = 30.0


class InterruptibleTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's classes are untyped
    """A TorchTrainer whose `fit` raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, the workers stopped.

    Ray's own handler knows SIGINT only, and leaves by ``sys.exit(0)`` or an actor error, which tells nobody why.
    """

    alone: bool = False
    """Whether the cluster is this machine and ours: then neither an autoscaler nor who takes nodes away is asked for
    anything. Each has an actor, a process more to start before the first step."""
    stopped_by: int | None = None
    save: Callable[[], None] | None = None
    """Called on the first signal, to have the run saved before the workers are stopped; a second one cuts it short."""

    def run(self) -> tuple[BaseException | None, Any]:
        """Run to the end.

        Returns:
            What made it fail, if anything did, and what the training function returned on rank 0.

        Raises:
            KeyboardInterrupt: with the signal, once the workers are stopped.
        """
        unwatched = self.alone and ENABLE_PREEMPTION_WATCHER_ENV_VAR not in os.environ
        if unwatched:
            os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        failure, returned = None, None
        try:
            returned = self.fit().return_value
        except (KeyboardInterrupt, Exception) as error:
            failure = error
        finally:
            if unwatched:  # a notebook's process may join another cluster next
                del os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR]
        if self.stopped_by is not None:  # whatever became of the exception on its way through Ray
            raise KeyboardInterrupt(self.stopped_by)
        if isinstance(failure, KeyboardInterrupt):
            raise failure
        return failure, returned

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner is a detached actor that outlives a killed driver, for ever where there is no dashboard. What a
        # driver leaves is given back when its job ends, and what a lost trial leaves by the sweep (`SweepState`).
        # Its data sets, of which there are none, would have an actor too, which workers wait for.
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self.alone and type(given["scaling_policy"]) is FixedScalingPolicy:
            given["scaling_policy"] = _OnThisMachine(self.scaling_config)
        return super()._initialize_and_run_controller(**given)

    def _register_sigint_handler(self, controller: Any) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped_by = number
            save, self.save = self.save, None
            if save is not None:
                handle(signal.default_int_handler)  # a second one cuts the saving short
                with suppress(KeyboardInterrupt, ray.exceptions.RayError):
                    save()
            for handled in NUMBERS:
                signal.signal(handled, signal.SIG_IGN)  # one is enough: another would cut the cleaning short
            with suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=10)
            raise KeyboardInterrupt

        handle(stop)


class _OnThisMachine(FixedScalingPolicy):  # type: ignore[misc]
    """Asks no autoscaler for the workers' room."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller."""

    def _maybe_send_resource_request(self) -> None:
        """Likewise."""


class ControllerNotice(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Tells a mailbox which actor controls a run: in a thread, as in a trial, `fit` has no other way of being ended.

    And tells a sweep's driver, through an actor of its own, what room the workers have: if the trial's process is lost,
    nobody else gives it back.
    """

    def __init__(self, mailbox: Any, placements: Any, owner: str) -> None:
        self._mailbox, self._placements, self._owner = mailbox, placements, owner

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Runs in the controller."""
        placed = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self._placements.add.remote(self._owner, placed))

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller."""
        ray.get(self._mailbox.controlled_by.remote(ray.get_runtime_context().current_actor))


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Has a run saved before its workers are replaced by more or fewer of them, so that no step is taken twice."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._trains = mailbox, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Runs in the controller, as all of these."""
        self._trains = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Workers are lost: there is nobody left to ask."""
        self._trains = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Also before the first start of workers, and after a loss."""
        if self._trains:
            self._trains = False
            with suppress(ray.exceptions.RayError):
                ray.get(self._mailbox.save.remote(), timeout=_SAVE_WITHIN_S)


class _NodeAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_node_interface)
        super().on_start(worker_group, backend_config)


class NodeAddressTorchConfig(TorchConfig):  # type: ignore[misc]
    """Has gloo listen on the interface that Ray knows the node by.

    Gloo looks its own host name up; where /etc/hosts says 127.0.1.1 for it, as on Debian, other hosts cannot connect.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Ray's torch backend with that one step before it."""
        return _NodeAddressBackend


def _use_node_interface() -> None:
    import psutil  # comes with Ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
