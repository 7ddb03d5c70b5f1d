"""From a configuration to a trained run: `fit` prepares the folder, trains on Ray or here, and writes the page."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from densenet_dist.cluster.connection import address_of, require_cluster
from densenet_dist.cluster.result import Result
from densenet_dist.cluster.resuming import is_finished, tell_of_changes
from densenet_dist.cluster.signals import handled_by
from densenet_dist.config import to_yaml
from densenet_dist.environment import describe_environment
from densenet_dist.errors import ConfigError, DataError, StorageError, TrainingError
from densenet_dist.lease import LEASE_FILE, Lease, hold
from densenet_dist.object_store import is_uri
from densenet_dist.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENV_FILE,
    PAGE_FILE,
    SUMMARY_FILE,
    TENSORBOARD_FOLDER,
    TEST_RESULTS_FILE,
    RunFolder,
)
from densenet_dist.schema import Config
from densenet_dist.trackers.tracker import require_trackers
from densenet_dist.train.checks import check_run
from densenet_dist.train.choices import CHOICES
from densenet_dist.train.context import Event, Stopped, torchrun_context, torchrun_rank
from densenet_dist.train.control import StopRequest, WorkerStatus


def fit(config: Config, *, resume: bool = False, listener: Callable[[Event], None] | None = None) -> Result:
    """Train as configured and test the best model once.

    Args:
        config: from `densenet_dist.load_config`.
        resume: go on with the run of that name from its last checkpoint, instead of refusing to touch it; one that is
            finished is left as it is, and where there is none it is begun. So a notebook's cell can be run again.
        listener: called with every event; by default they are shown on the console, or in the notebook.

    Returns:
        Where the run lies and its final figures.

    Raises:
        ConfigError, EnvironmentProblem, DataError, StorageError, CheckpointError: before any work is lost.
        TrainingError: when training itself fails.
        KeyboardInterrupt: on SIGINT (a notebook's stop button), SIGTERM or SIGHUP, once the run is saved.

    Examples:
        >>> from densenet_dist import fit, load_config
        >>> config = load_config("configs/quickstart.yaml", "train.epochs=3")
        >>> result = fit(config, resume=True)  # doctest: +SKIP
    """
    if listener is None:
        from densenet_dist.display.notebook import console

        with console() as shown:
            return fit(config, resume=resume, listener=shown)
    config = absolute(config)
    run = RunFolder(config.storage, config.name)
    resume = resume and run.exists()
    if resume and is_finished(run, config):
        listener({"kind": "note", "text": f"the run {config.name} is finished already"})
        if is_writer(config) and (
            run.exists(LEASE_FILE) or not run.exists(PAGE_FILE)
        ):  # its process was killed before that
            with hold(run, listener):
                _write_page(run, listener)
        return Result(run.location, run.read_summary())
    check_run(config)
    require_trackers(config)
    if config.cluster.engine == "ray":
        require_cluster(config.cluster)
    with handled_by():  # a notebook's process lives on
        return Result(run.location, _train(config, run, resume, listener))


def _write_page(run: RunFolder, listener: Callable[[Event], None]) -> None:
    from densenet_dist.report.page import report_at_end

    problem = report_at_end(run)
    if problem is not None:
        listener({"kind": "note", "text": problem, "warning": True})


def _train(config: Config, run: RunFolder, resume: bool, listener: Callable[[Event], None]) -> dict[str, Any]:
    held: AbstractContextManager[Lease | None] = nullcontext()
    if is_writer(config):
        if not resume:
            _refuse_used_name(run)
        run.create()
        held = hold(run, listener)
    with held as lease:
        if is_writer(config):
            prepare_data(config)
            if resume:
                tell_of_changes(run, config, listener)
            write_run(run, config, resume)
        try:
            if config.cluster.engine == "ray":
                from densenet_dist.cluster.ray_train import fit_on_ray

                summary = fit_on_ray(config, run, listener, lease)
            else:
                summary = _fit_here(config, run, listener, lease)
            if is_writer(config):
                listener({"kind": "phase", "text": "writing the report"})
                _write_page(run, listener)  # before the lease is given back: while it is there, the page may be missing
            return summary
        except (KeyboardInterrupt, TrainingError):
            if lease is not None:
                lease.check()
            raise


def absolute(config: Config) -> Config:
    """The same configuration with paths that hold in any working directory: Ray's workers have their own.

    Raises:
        ConfigError: where the run's folder would lie in the temporary folder of a submitted job.
    """
    if "runtime_resources" in Path.cwd().parts:
        require_lasting(config.storage)
    storage, root = config.storage, config.data.root
    storage = storage if "://" in storage else str(Path(storage).absolute())
    root = root if is_uri(root) else str(Path(root).absolute())
    return replace(config, storage=storage, data=replace(config.data, root=root))


def require_lasting(storage: str) -> None:
    """Whether what a submitted job writes stays.

    Raises:
        ConfigError: where its folder would lie in the job's own.
    """
    if "://" not in storage and not Path(storage).is_absolute():
        raise ConfigError(
            f"storage: {storage} is relative, but the working directory of a submitted job is a temporary one: "
            "the run would be deleted with it\n  give a folder that all nodes share, or s3://bucket/path"
        )


def is_writer(config: Config) -> bool:
    """Return whether this process prepares the run's folder and speaks: under ``torchrun``, one of them does.

    Raises:
        EnvironmentProblem: the variables of torchrun do not fit together.
    """
    return config.cluster.engine == "ray" or torchrun_rank()[0] == 0


def _refuse_used_name(run: RunFolder) -> None:
    # What failed before its first step (no data, no GPU) has left nothing worth keeping, and may be started again.
    if run.exists(TENSORBOARD_FOLDER) or run.exists(CHECKPOINTS_FOLDER):
        again = f"densenet-dist train --resume {shlex.quote(run.location)}"
        raise StorageError(
            f"the run {run.uri} exists already\n"
            f"  go on with it: {again}   (in Python: fit(config, resume=True))\n"
            "  or choose another name: name=NEW"
        )


def write_run(run: RunFolder, config: Config, resume: bool) -> None:
    """Write what a run's folder says before the first step: config.yaml, unless it is resumed, and env.json."""
    environment = describe_environment()
    if not resume:
        run.write(CONFIG_FILE, to_yaml(config))
    else:
        before = run.read_json(ENV_FILE)
        environment |= {key: before[key] for key in CHOICES if key in before}
    run.write(ENV_FILE, json.dumps(environment, indent=1) + "\n")
    run.remove(SUMMARY_FILE)
    run.remove(TEST_RESULTS_FILE)


def prepare_data(config: Config) -> None:
    """Download and verify here, with a progress bar, what the workers will read; elsewhere each node does it itself.

    On an object store the data set is made sure of before any worker starts: workers take it from there only.
    """
    from densenet_dist.data.datasets import prepare_dataset, publish_dataset

    data = config.data
    joined = config.cluster.engine == "ray" and address_of(config.cluster)[0] is not None
    if is_uri(data.root):
        publish_dataset(data.name, data.root, download=data.download, url=data.url)
        if joined:
            return
    try:
        prepare_dataset(data.name, data.root, download=data.download, url=data.url, on_bad_image=data.on_bad_image)
    except (DataError, StorageError):
        if not joined:
            raise


def _fit_here(config: Config, run: RunFolder, listener: Callable[[Event], None], lease: Lease | None) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from densenet_dist.cluster.resources import local_threads
    from densenet_dist.train.loop import fit as train

    torch.set_num_threads(local_threads(config.cluster, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    context = torchrun_context(run, config.cluster.device, listener, config.cluster.timeout_s)
    if lease is not None:
        lease.when_lost(lambda: context.status.request(StopRequest.LEAVE))
    try:
        if context.world_size > 1:
            dist.barrier()  # rank 0 has prepared folder and data
        with _stopped_by_signals(context.status):
            return train(config, context)
    finally:
        if dist.is_initialized():
            # DDP's reference cycles keep the group alive until they are collected, and gloo's threads with it: one that
            # drops a tensor while the interpreter ends takes the process down.
            gc.collect()
            dist.destroy_process_group()


@contextmanager
def _stopped_by_signals(status: WorkerStatus) -> Iterator[None]:
    """Have the run saved and ended on a signal; a second one ends it at once, as does one before it trains.

    Raises:
        KeyboardInterrupt: with the signal.
    """
    heard: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if heard or not status.progress:
            raise KeyboardInterrupt(number)
        heard.append(number)
        status.request(StopRequest.STOP)

    with handled_by(ask):
        try:
            yield
        except Stopped:
            raise KeyboardInterrupt(*heard or (signal.SIGTERM,)) from None  # another rank of torchrun may have heard it
