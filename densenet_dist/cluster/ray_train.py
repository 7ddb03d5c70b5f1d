"""Train with Ray Train: `fit_on_ray` starts the workers, which run the training loop with a `RayContext`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
import torch

from densenet_dist import custom
from densenet_dist.cluster.connection import connected
from densenet_dist.cluster.coordinator import Coordinator, EpochBarrier, forwarded_events, on_this_node
from densenet_dist.cluster.heartbeat import heartbeats
from densenet_dist.cluster.resources import plan_resources, share_of_cores, shortage
from densenet_dist.cluster.telemetry import Telemetry, show_in_dashboard
from densenet_dist.config import to_dict, validate
from densenet_dist.errors import StorageError, TrainingError
from densenet_dist.lease import Lease, fence
from densenet_dist.object_store import delete_temporary_folders
from densenet_dist.run_folder import CONFIG_FILE, RunFolder, join_location
from densenet_dist.schema import Config
from densenet_dist.train.context import Event, RunContext, Stopped, StopRequest


@dataclass(frozen=True)
class RayContext(RunContext):
    """The context of a Ray Train worker, with the `Coordinator` of its run."""

    coordinator: Any = None

    def report(self, event: Event) -> None:
        """Send the event to the driver; after an epoch of a trial, wait for its decision, or raise Stopped."""
        if event["kind"] == "epoch" and self.sync_each_epoch:
            reported = event if self.rank == 0 else None
            if not ray.get(self.coordinator.report_epoch.remote(event["global_step"], reported)):
                raise Stopped
        elif self.rank == 0:
            sent = self.coordinator.put.remote(event)
            if event["kind"] == "end":
                ray.get(sent)  # this process may end before it is sent


def fit_on_ray(
    config: Config, run: RunFolder, listener: Callable[[Event], None] | EpochBarrier, lease: Lease | None
) -> dict[str, Any]:
    """Train on the configured or connected Ray cluster, or else on a private one on this machine.

    Args:
        config: the configuration, its paths absolute.
        run: the run's folder, with its config.yaml written.
        listener: called with every event, in a thread; an `EpochBarrier` also decides after each epoch.
        lease: on the run's folder; if it is lost, the workers stop and write nothing more. None for a trial, whose
            sweep holds the folder.

    Returns:
        The summary of the run.

    Raises:
        EnvironmentProblem: the cluster lacks the requested resources.
        TrainingError: workers failed more often than ``cluster.max_failures``.
        DenseNetDistError: raised by a worker.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once the workers are stopped.
    """
    names = [name for _, name in custom.names_in(config)]
    with connected(config.cluster, ships_code=bool(names)) as is_private:
        from densenet_dist.cluster.ray_backend import InterruptibleTrainer

        resources = plan_resources(config.cluster, ray.cluster_resources(), fixed=is_private)
        if not is_private and (problem := shortage(resources.fewest, resources.per_worker)):
            listener({"kind": "note", "text": f"waiting up to {config.cluster.timeout_s:g} s for resources: {problem}"})
        coordinator = on_this_node(Coordinator).remote(config.fault.hang_timeout_s)
        if lease is not None:
            lease.when_lost(lambda: coordinator.request.remote(StopRequest.ABANDON))
        show_in_dashboard()
        barrier = listener if isinstance(listener, EpochBarrier) else None
        trainer = InterruptibleTrainer(
            _train_worker,
            {
                "config": to_dict(config),
                "parts": custom.export_parts(names),
                "coordinator": coordinator,
                "threads": resources.threads,
                "sync_each_epoch": barrier is not None,
                "held": barrier.held if barrier else lease.held if lease else None,
                "launch_id": barrier.held[1] if barrier else uuid4().hex,
            },
            config,
            resources,
            name=config.name,
            storage=join_location(run.location, "ray"),
            is_private=is_private,
            coordinator=coordinator,
            barrier=barrier,
        )
        if barrier is not None:
            barrier.coordinator = coordinator
        else:  # a trial exports its own telemetry
            listener = Telemetry(config.name, listener=listener)
        try:
            with forwarded_events(coordinator, listener):
                summary = trainer.run()
        finally:
            if lease is not None:  # a call to the coordinator after the end would start a new cluster
                lease.when_lost(lambda: None)
    if summary is None:
        raise TrainingError("the workers ended without a result; run again with --debug to see their output")
    return dict(summary)


def _train_worker(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Train on a Ray Train worker; return the summary of the run if it finished."""
    import ray.train.torch

    from densenet_dist.train.loop import fit

    context = ray.train.get_context()
    torch.set_num_threads(payload["threads"] or share_of_cores(context.get_local_world_size()))
    custom.import_parts(payload["parts"])
    config = validate(payload["config"])
    run = RunFolder(config.storage, config.name)
    fence(run, payload["held"])
    if not run.exists(CONFIG_FILE):
        raise StorageError(
            f"the run folder {run.uri} is not visible on node {os.uname().nodename}\n"
            "  give storage a path that all nodes share (NFS) or an object store (s3://bucket/path)"
        )
    worker = RayContext(
        run=run,
        device=ray.train.torch.get_device(),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        sync_each_epoch=payload["sync_each_epoch"],
        launch_id=payload["launch_id"],
        coordinator=payload["coordinator"],
    )
    try:
        with heartbeats(worker):
            return fit(config, worker)
    except Stopped:
        if worker.rank == 0:
            ray.get(worker.coordinator.set_ended.remote())
    finally:
        delete_temporary_folders()  # Ray kills this process, so atexit functions do not run
    return None
