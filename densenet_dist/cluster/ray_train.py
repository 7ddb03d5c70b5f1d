"""The only door to Ray Train: a `RayContext` for the training loop, and the TorchTrainer that launches it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from densenet_dist.cluster.connection import WORKER_ENV, connected
from densenet_dist.cluster.failures import explain
from densenet_dist.cluster.heartbeat import beating
from densenet_dist.cluster.mailbox import Mailbox, Pace, announcing_restarts, drained
from densenet_dist.cluster.resources import Resources, plan_resources, share_of_cores
from densenet_dist.cluster.telemetry import Telemetry, show_in_dashboard
from densenet_dist.cluster.watchdog import watched
from densenet_dist.config import to_dict, validate
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, StorageError, TrainingError
from densenet_dist.run_folder import CONFIG_FILE, RunFolder, join_location
from densenet_dist.schema import Config
from densenet_dist.train.context import Event, RunContext, Stopped
from densenet_dist.train.lease import Guard, Lease
from densenet_dist.train.pulse import Wish

_RESIZE_EVERY_S: Final = 20.0
"""A resize costs a start of the workers."""


@dataclass(frozen=True)
class RayContext(RunContext):
    """What one Ray Train worker tells the training loop of its world.

    Attributes:
        mailbox: to the driver, which paces the run where it is of a sweep: `hands_over` says so.
    """

    mailbox: Any = None

    def report(self, event: Event) -> None:
        """Send the event to the driver.

        Raises:
            Stopped: on every rank, where the driver paces the run and has heard enough.
        """
        import ray

        if self.rank == 0:
            sent = self.mailbox.put.remote(event)
            if event["kind"] == "end":
                ray.get(sent)  # this process may be gone in a moment
        waits = event["kind"] == "epoch" and self.hands_over
        if waits and not ray.get(self.mailbox.may_go_on.remote(event["global_step"])):
            raise Stopped


def fit_on_ray(
    config: Config, run: RunFolder, listener: Callable[[Event], None] | Pace, lease: Lease | None
) -> dict[str, Any]:
    """Train on Ray: on the cluster that is named or joined already, else on one of this process' own.

    Args:
        config: the configuration, its paths absolute.
        run: the run's folder, with its config.yaml written.
        listener: called with every event, in a thread of its own; a `Pace` also says when to go on.
        lease: on the run's folder; where it is lost, the workers end and write nothing more. None where another
            process holds the folder for this one.

    Returns:
        The summary of the run.

    Raises:
        EnvironmentProblem: where the cluster has not what is asked for.
        TrainingError: where workers failed more often than ``cluster.max_failures``.
        DenseNetDistError: what a worker raised on purpose.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once the workers are stopped.
    """
    with connected(config.cluster) as own_cluster:
        import ray

        resources = plan_resources(config.cluster, ray.cluster_resources(), fixed=own_cluster)
        if resources.lacking:
            listener({"kind": "note", "text": f"waiting for the cluster: {resources.lacking}"})
        # Beside the driver: a node that is lost must not take it along.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        mailbox = ray.remote(num_cpus=0, label_selector=here)(Mailbox).remote()
        if lease is not None:
            lease.when_lost(lambda: mailbox.ask.remote(Wish.LEAVE))
        show_in_dashboard()
        if isinstance(listener, Pace):  # its trial hears for itself
            listener.open(mailbox)
        else:
            listener = Telemetry(config.name, listener=listener)
        announce = announcing_restarts(listener, config.cluster.max_failures)
        with drained(mailbox, announce), watched(mailbox, config.fault.hang_timeout_s, announce):
            pace = listener if isinstance(listener, Pace) else None
            failure, summary = _run_trainer(config, run, resources, mailbox, own_cluster, pace, lease)
        error = ray.get(mailbox.error.remote())
    if error is not None:
        raise error
    if failure is not None:
        raise _explain(failure) from failure
    if summary is None:
        raise TrainingError("the workers ended without a result; run again with --debug to see their output")
    return dict(summary)


def _train_worker(payload: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray Train worker runs; returns the summary of a run that came to its end."""
    import ray
    import ray.train.torch

    mailbox = payload["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return None  # restarted after an error that a restart cannot mend
    import torch

    from densenet_dist.train.engine import fit

    context = ray.train.get_context()
    torch.set_num_threads(payload["threads"] or share_of_cores(context.get_local_world_size()))
    config = validate(payload["config"])
    run = RunFolder(config.storage, config.name)
    launch, launched = payload["launch"]
    run.guard = Guard(run, payload["lease"])
    try:
        _require_shared(run)
        worker = RayContext(
            run=run,
            device=ray.train.torch.get_device(),
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            hands_over=payload["paced"],
            launch=launch,
            launched=launched,
            mailbox=mailbox,
        )
        with beating(worker, mailbox):
            return fit(config, worker)
    except Stopped:
        if context.get_world_rank() == 0:
            ray.get(mailbox.leave.remote())
    except DenseNetDistError as error:
        ray.get(mailbox.fail.remote(error))
        if not isinstance(error, TrainingError):  # one rank's alone: raise, so that Ray stops the others
            raise
    return None


def _require_shared(run: RunFolder) -> None:
    if not run.exists(CONFIG_FILE):
        raise StorageError(
            f"the run folder {run.uri} is not visible on node {os.uname().nodename}\n"
            "  give storage a path that all nodes share (NFS) or an object store (s3://bucket/path)"
        )


def _run_trainer(
    config: Config,
    run: RunFolder,
    resources: Resources,
    mailbox: Any,
    own_cluster: bool,
    pace: Pace | None,
    lease: Lease | None,
) -> tuple[BaseException | None, dict[str, Any] | None]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig

    from densenet_dist.cluster.ray_backend import (
        ControllerNotice,
        InterruptibleTrainer,
        NodeAddressTorchConfig,
        SaveBeforeResize,
    )

    elastic = resources.fewest < resources.workers
    callbacks: list[Any] = [SaveBeforeResize(mailbox)] if elastic else []
    if pace is not None:
        callbacks.append(ControllerNotice(mailbox, pace.placements, pace.owner))
    payload = {
        "config": to_dict(config),
        "mailbox": mailbox,
        "threads": resources.threads,
        "paced": pace is not None,
        "lease": None if lease is None else lease.guard.key,
        "launch": (uuid4().hex, time.time()),
    }
    trainer = InterruptibleTrainer(
        _train_worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=(resources.fewest, resources.workers) if elastic else resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
        ),
        torch_config=NodeAddressTorchConfig(timeout_s=int(config.cluster.timeout_s)),
        run_config=RunConfig(
            # A name of its own for every start: Ray would silently take up its own torn or finished state again.
            name=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=join_location(run.location, "ray"),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures,
                controller_failure_limit=max(1, round(config.cluster.timeout_s / 60)),
            ),
            callbacks=callbacks,
            # A cluster of our own has inherited it; there, asking for it would only start further processes.
            worker_runtime_env=None if own_cluster else {"env_vars": WORKER_ENV},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.alone = own_cluster
    trainer.save = lambda: _have_saved(mailbox, config.fault.grace_s)
    return trainer.run()


def _have_saved(mailbox: Any, within_s: float) -> None:
    """Ask the run to save and end, and wait until it has, if it trains at all."""
    import ray

    if ray.get(mailbox.ask.remote(Wish.STOP), timeout=5):
        ray.get(mailbox.left.remote(), timeout=within_s)


def _explain(failure: BaseException) -> DenseNetDistError:
    """Ray's failure in one message: the first worker's own error, not the wrapping around it."""
    workers = getattr(failure, "worker_failures", None)
    if workers:
        rank, cause = min(workers.items())
        return TrainingError(
            f"training failed on rank {rank}: {explain(cause, 'the worker')}\n"
            "  see the traceback with --debug; go on from the last checkpoint with --resume"
        )
    controller = getattr(failure, "controller_failure", None)
    if controller is not None:
        return EnvironmentProblem(
            f"the cluster could not start the workers: {controller}\n"
            "  check cluster.workers and cluster.device against 'ray status', or raise cluster.timeout_s"
        )
    return TrainingError(f"training failed: {failure}")
