"""The only door to Ray Train: a `RayContext` for the training loop, and the TorchTrainer that launches it."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densenet_dist.cluster.failures import explain
from densenet_dist.cluster.resources import Resources, plan_resources, share_of_cores
from densenet_dist.cluster.telemetry import Telemetry, heard_by, show_in_dashboard
from densenet_dist.config import validate
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, TrainingError
from densenet_dist.schema import ClusterConfig, Config
from densenet_dist.train.context import Event
from densenet_dist.train.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, RunFolder

# Spinning OpenMP threads of two workers on shared cores slow each other down thirtyfold.
WORKER_ENV = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
# report() waits for the controller's next poll, 2 s by default; a dead worker is noticed at the same pace.
# Ray would nice workers to 15.
DRIVER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_worker_niceness": "0",
    # Said in our own words when the workers start again.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",
}


@dataclass(frozen=True)
class RayContext:
    """What one Ray Train worker tells the training loop of its world."""

    rank: int
    world_size: int
    device: Any
    run: RunFolder
    mailbox: Any
    paced: bool = False

    def report(self, event: Event) -> None:
        """Send the event to the driver; at an epoch's end, tell Ray Train too, on every rank.

        Raises:
            _Stopped: on every rank, where the driver paces the run and has heard enough.
        """
        if self.rank == 0:
            import ray

            sent = self.mailbox.put.remote(event)
            if event["kind"] == "end":
                ray.get(sent)  # this process may be gone in a moment
        if event["kind"] == "epoch":
            self._report_to_ray(event)
            if self.paced:
                import ray

                if not ray.get(self.mailbox.may_go_on.remote(event["global_step"])):
                    raise _Stopped

    def _report_to_ray(self, event: Event) -> None:
        # Ray drops metrics that come without a checkpoint. Ours is already safe in the run's folder (its manifest is
        # the truth), so Ray gets a pointer to it: a few bytes to keep, and enough for Result.checkpoint and the UI.
        import ray.train

        metrics = {key: value for key, value in event.items() if key != "kind"}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0 and event["checkpoint"]:
                uri = f"{self.run.uri}/{CHECKPOINTS_FOLDER}/{event['checkpoint']}"
                (Path(folder) / "pointer.json").write_text(json.dumps({"uri": uri}))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            name = f"{event['global_step']:08d}-{os.getpid()}"
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)


class _Stopped(BaseException):
    """The driver has heard enough."""


class Pace:
    """A driver's hold on a run that waits for it at the end of every epoch.

    Args:
        heard: called with every event, in a thread of its own; what it returns of an epoch says whether to go on.
        placements: an actor that is told what room the workers have.
        owner: whose it is, for that actor.
    """

    def __init__(self, heard: Callable[[Event], bool], placements: Any, owner: str) -> None:
        self.heard, self.placements, self.owner = heard, placements, owner
        self._mailbox: Any = None

    def open(self, mailbox: Any) -> None:
        """From here on the run listens."""
        self._mailbox = mailbox

    def __call__(self, event: Event) -> None:
        """Hear an event, and answer."""
        go_on = self.heard(event)
        if event["kind"] == "epoch":
            self._mailbox.answer.remote(event["global_step"], go_on)

    def abort(self, timeout_s: float) -> None:
        """End the run wherever it is, and give back its workers."""
        import ray

        if self._mailbox is not None:
            with suppress(ray.exceptions.RayError):
                controller = ray.get(self._mailbox.controller.remote(), timeout=timeout_s)
                if controller is not None:
                    ray.get(controller.abort.remote(), timeout=timeout_s)


def fit_on_ray(config: Config, run: RunFolder, listener: Callable[[Event], None] | Pace) -> dict[str, Any]:
    """Train on Ray: on the cluster that is named or joined already, else on one of this process' own.

    Args:
        config: the configuration, its paths absolute.
        run: the run's folder, with its config.yaml written.
        listener: called with every event, in a thread of its own; a `Pace` also says when to go on.

    Returns:
        The summary of the run.

    Raises:
        EnvironmentProblem: where the cluster has not what is asked for.
        TrainingError: where workers failed more often than ``cluster.max_failures``.
        DenseNetDistError: what a worker raised on purpose.
        KeyboardInterrupt: on SIGINT or SIGTERM, once the workers are stopped.
    """
    with connected(config.cluster) as own_cluster:
        import ray

        resources = plan_resources(config.cluster, ray.cluster_resources(), fixed=own_cluster)
        if resources.lacking:
            listener({"kind": "note", "text": f"waiting for the cluster: {resources.lacking}"})
        mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
        show_in_dashboard()
        if isinstance(listener, Pace):  # its trial hears for itself
            listener.open(mailbox)
        else:
            listener = heard_by(listener, Telemetry(config.name))
        with _drained(mailbox, _announcing_restarts(listener, config.cluster.max_failures)):
            pace = listener if isinstance(listener, Pace) else None
            failure = _run_trainer(config, run, resources, mailbox, own_cluster, pace)
        outcome = ray.get(mailbox.outcome.remote())
    if outcome["error"] is not None:
        raise outcome["error"]
    if failure is not None:
        raise _explain(failure) from failure
    if outcome["summary"] is None:
        raise TrainingError("the workers ended without a result; run again with --debug to see their output")
    summary: dict[str, Any] = outcome["summary"]
    return summary


class _Mailbox:
    """An actor that carries events from rank 0 to the driver, and remembers how the run ended.

    Asynchronous, so that the driver can wait in it: on a machine whose every core trains, polling is felt.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._error: DenseNetDistError | None = None
        self._summary: Event | None = None
        self._controller: Any = None
        self._answers: dict[int, asyncio.Future[bool]] = {}

    async def put(self, event: Event) -> None:
        if event["kind"] == "progress" and self._events and self._events[-1]["kind"] == "progress":
            self._events.pop()  # nobody has looked at the last one yet: only the newest matters
        if event["kind"] == "end":
            self._summary = {key: value for key, value in event.items() if key != "kind"}
        self._events.append(event)
        self._news.set()

    async def fail(self, error: DenseNetDistError) -> None:
        self._error = self._error or error

    async def failed(self) -> bool:
        return self._error is not None

    async def drain(self) -> list[Event]:
        await self._news.wait()
        self._news.clear()
        events, self._events = self._events, []
        return events

    async def wake(self) -> None:
        self._news.set()

    async def answer(self, global_step: int, go_on: bool) -> None:
        waiting = self._answer_to(global_step)
        if not waiting.done():
            waiting.set_result(go_on)

    async def may_go_on(self, global_step: int) -> bool:
        return await asyncio.shield(self._answer_to(global_step))

    def _answer_to(self, global_step: int) -> asyncio.Future[bool]:
        return self._answers.setdefault(global_step, asyncio.get_running_loop().create_future())

    async def controlled_by(self, controller: Any) -> None:
        self._controller = controller

    async def controller(self) -> Any:
        return self._controller

    async def outcome(self) -> dict[str, Any]:
        return {"error": self._error, "summary": self._summary}


def _train_worker(payload: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train.torch

    mailbox = payload["mailbox"]
    if ray.get(mailbox.failed.remote()):
        return  # restarted after an error that a restart cannot mend
    import torch

    from densenet_dist.train.engine import fit

    context = ray.train.get_context()
    torch.set_num_threads(payload["threads"] or share_of_cores(context.get_local_world_size()))
    config = validate(payload["config"])
    run = RunFolder(config.storage, config.name)
    try:
        _require_shared(run)
        device = ray.train.torch.get_device()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        fit(config, RayContext(rank, world_size, device, run, mailbox, payload["paced"]))
    except _Stopped:
        return
    except DenseNetDistError as error:
        ray.get(mailbox.fail.remote(error))
        if not isinstance(error, TrainingError):  # one rank's alone: raise, so that Ray stops the others
            raise


def _require_shared(run: RunFolder) -> None:
    from densenet_dist.errors import StorageError

    if not run.exists(CONFIG_FILE):
        raise StorageError(
            f"the run folder {run.uri} is not visible on node {os.uname().nodename}\n"
            "  give storage a path that all nodes share (NFS) or an object store (s3://bucket/path)"
        )


def _run_trainer(
    config: Config, run: RunFolder, resources: Resources, mailbox: Any, own_cluster: bool, pace: Pace | None
) -> BaseException | None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig

    from densenet_dist.cluster.ray_backend import ControllerNotice, InterruptibleTrainer, NodeAddressTorchConfig
    from densenet_dist.config import to_dict

    payload = {"config": to_dict(config), "mailbox": mailbox, "threads": resources.threads, "paced": pace is not None}
    trainer = InterruptibleTrainer(
        _train_worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.use_gpu, resources_per_worker=resources.per_worker
        ),
        torch_config=NodeAddressTorchConfig(timeout_s=int(config.cluster.timeout_s)),
        run_config=RunConfig(
            # A name of its own for every start: Ray would silently take up its own torn or finished state again.
            name=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=_ray_storage(run),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures,
                controller_failure_limit=max(1, round(config.cluster.timeout_s / 60)),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=None if pace is None else [ControllerNotice(mailbox, pace.placements, pace.owner)],
            # A cluster of our own has inherited it; there, asking for it would only start further processes.
            worker_runtime_env=None if own_cluster else {"env_vars": WORKER_ENV},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(trainer.stopped_by) from None
    except Exception as error:
        return error
    return None


def _ray_storage(run: RunFolder) -> str:
    base, _, query = run.storage.partition("?")
    if not run.is_remote:
        return str(run.path / "ray")
    return f"{base.rstrip('/')}/{run.name}/ray" + (f"?{query}" if query else "")


@contextmanager
def connected(config: ClusterConfig) -> Iterator[bool]:
    """Connect to a cluster, or start one for as long as the context lasts; yields whether it is our own."""
    for key, value in (DRIVER_ENV | WORKER_ENV).items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield False
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    own = address in (None, "local")
    try:
        # A cluster left over on this machine must not be joined by accident: "local" always starts a new one.
        with _on_loopback() if own else nullcontext():
            ray.init(
                address="local" if own else address,
                include_dashboard=False if own else None,
                logging_level="ERROR",
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "start on this machine" if own else f"be reached at {address}"
        raise EnvironmentProblem(
            f"Ray cannot {where}: {error}\n  try cluster.engine=local to train without Ray, or set cluster.address"
        ) from error
    try:
        yield own
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster started meanwhile listens on 127.0.0.1 alone: its metrics ask nobody for a token.

    That is what Ray does on macOS. Elsewhere it takes the host's own address, even where told 127.0.0.1.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _drained(mailbox: Any, listener: Callable[[Event], None]) -> Iterator[None]:
    """Pass events on as they come; whatever is still there at the end is passed on before returning."""
    import ray

    stop = threading.Event()

    def pump() -> None:
        with suppress(ray.exceptions.RayError):
            while not stop.is_set():
                for event in ray.get(mailbox.drain.remote()):
                    listener(event)

    thread = threading.Thread(target=pump, name="events")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        mailbox.wake.remote()
        thread.join()  # before ray.shutdown(): its next ray.get would start a new cluster
        with suppress(ray.exceptions.RayError):
            ray.get(mailbox.wake.remote(), timeout=5)
            for event in ray.get(mailbox.drain.remote(), timeout=5):  # come since the thread last looked
                listener(event)


def _announcing_restarts(listener: Callable[[Event], None], limit: int) -> Callable[[Event], None]:
    starts = 0

    def listen(event: Event) -> None:
        nonlocal starts
        if event["kind"] == "start":
            starts += 1
            if starts > 1:
                text = f"a worker was lost: all were started again ({starts - 1} of at most {limit} times)"
                listener({"kind": "note", "text": text})
        listener(event)

    return listen


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


def survey(config: Config) -> tuple[dict[str, float], str]:
    """The resources of the cluster that a run would use, and which cluster that is.

    Raises:
        EnvironmentProblem: where it cannot be reached or started.
    """
    with connected(config.cluster) as own:
        import ray

        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        return dict(ray.cluster_resources()), "starts on this machine" if own else f"cluster at {address}"
