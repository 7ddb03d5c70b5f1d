"""Train a configuration: `fit` prepares the run folder, trains on Ray or in this process, and writes the report."""

from __future__ import annotations

import gc
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from densenet_dist.cluster.connection import address_of, require_cluster
from densenet_dist.cluster.result import Result
from densenet_dist.cluster.resuming import check_changes, extend_config, is_finished
from densenet_dist.cluster.signals import handled_by
from densenet_dist.config import load_config, to_yaml
from densenet_dist.custom import PARTS, Function, is_custom, trust_option
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
from densenet_dist.trackers import require_trackers
from densenet_dist.train.context import Event, Stopped, StopRequest, WorkerStatus, torchrun_context, torchrun_rank
from densenet_dist.train.preflight import check_run


def fit(
    config: Config,
    *,
    model: Function | None = None,
    dataset: Function | None = None,
    augmentation: Function | None = None,
    loss: Function | None = None,
    optimizer: Function | None = None,
    schedule: Function | None = None,
    callbacks: Sequence[Function] | None = None,
    resume: bool = False,
    listener: Callable[[Event], None] | None = None,
) -> Result:
    """Train a model and evaluate the best checkpoint on the test set.

    Args:
        config: from `densenet_dist.load_config`.
        model: your own model, a function (docs/extending.md); ``functools.partial(function, width=64)`` sets options.
        dataset: your own data set, likewise.
        augmentation: your own augmentation.
        loss: your own training loss.
        optimizer: your own optimizer.
        schedule: your own learning-rate schedule.
        callbacks: classes of your own callbacks.
        resume: resume the run of that name from its last checkpoint. A finished run is left unchanged, and a new run
            starts if there is none, so that a notebook's cell can be run again. If False, the run must not exist.
            Settings that determine the result cannot change (docs/restarts.md).
        listener: called with every event; by default, events are shown on the console or in the notebook.

    Returns:
        The run folder and the final results.

    Raises:
        ConfigError, EnvironmentProblem, DataError, StorageError, CheckpointError: before any work is lost.
        TrainingError: training failed.
        KeyboardInterrupt: on SIGINT (a notebook's stop button), SIGTERM or SIGHUP, once the run is saved.

    Examples:
        >>> from densenet_dist import fit, load_config
        >>> config = load_config("configs/quickstart.yaml", "train.epochs=3")
        >>> result = fit(config, resume=True)  # doctest: +SKIP
    """
    parts = (model, dataset, augmentation, loss, optimizer, schedule, callbacks)
    given = {part.key: value for part, value in zip(PARTS.values(), parts, strict=True) if value is not None}
    config = load_config(config, given) if given else config
    if listener is None:
        from densenet_dist.display.console import console

        with console() as shown:
            return fit(config, resume=resume, listener=shown)
    config = absolute(config)
    run = RunFolder(config.storage, config.name)
    resume = resume and run.exists() and _has_begun(run)
    changes = check_changes(run, config) if resume else []
    if resume and is_finished(run, config):
        listener({"kind": "note", "text": f"the run {config.name} is finished already"})
        # The process may have been killed after training, before the report was complete.
        if is_writer(config) and (run.exists(LEASE_FILE) or not run.exists(PAGE_FILE)):
            with hold(run, listener):
                _write_page(run, listener)
        return Result(run.location, run.read_summary())
    if changes and is_writer(config):
        listener({"kind": "note", "text": "\n  ".join(["settings changed since the run began:", *changes])})
    check_run(config)
    require_trackers(config)
    if config.cluster.engine == "ray":
        require_cluster(config.cluster)
    with handled_by():  # restores the handlers, since a notebook's process continues
        return Result(run.location, _train(config, run, resume, listener))


def _write_page(run: RunFolder, listener: Callable[[Event], None]) -> None:
    from densenet_dist.report.page import write_report

    try:
        write_report([run])
    except Exception as error:
        text = f"the run is complete, but its report could not be written: {error}"
        listener({"kind": "note", "text": text, "warning": True})


def _train(config: Config, run: RunFolder, resume: bool, listener: Callable[[Event], None]) -> dict[str, Any]:
    if not is_writer(config):
        return _fit_here(config, run, listener, None)
    if not resume:
        _refuse_used_name(run)
    run.create()
    with hold(run, listener) as lease:
        prepare_data(config)
        write_run(run, config, resume)
        try:
            if config.cluster.engine == "ray":
                from densenet_dist.cluster.ray_train import fit_on_ray

                summary = fit_on_ray(config, run, listener, lease)
            else:
                summary = _fit_here(config, run, listener, lease)
            listener({"kind": "phase", "text": "writing the report"})
            _write_page(run, listener)  # before the release: `fit` takes a left-over lease as a missing report
            return summary
        except (KeyboardInterrupt, TrainingError):
            lease.check()
            raise


def absolute(config: Config) -> Config:
    """Return the configuration with absolute paths: Ray's workers have other working directories.

    Raises:
        ConfigError: the run folder would be in the temporary folder of a submitted job.
    """
    if "runtime_resources" in Path.cwd().parts:
        require_permanent(config.storage)
    storage, root = config.storage, config.data.root
    storage = storage if "://" in storage else str(Path(storage).absolute())
    root = root if is_uri(root) else str(Path(root).absolute())
    model = config.model
    if model.weights and not is_uri(model.weights):
        places = Path(model.weights).absolute(), Path("runs", model.weights).absolute()  # or the name of a run
        model = replace(model, weights=str(places[not places[0].exists() and places[1].exists()]))
    return replace(config, storage=storage, model=model, data=replace(config.data, root=root))


def require_permanent(storage: str) -> None:
    """Check that the storage of a submitted job outlives the job.

    Raises:
        ConfigError: it is relative, and so inside the temporary folder of the job.
    """
    if "://" not in storage and not Path(storage).is_absolute():
        raise ConfigError(
            f"storage: {storage} is relative, but the working directory of a submitted job is a temporary one: "
            "the run would be deleted with it\n  use a folder that all nodes share, or s3://bucket/path"
        )


def is_writer(config: Config) -> bool:
    """Return whether this process writes the run folder and the output: under ``torchrun``, only rank 0 does.

    Raises:
        EnvironmentProblem: the variables of torchrun are inconsistent.
    """
    return config.cluster.engine == "ray" or torchrun_rank()[0] == 0


def _has_begun(run: RunFolder) -> bool:
    # A run that failed before its first step (no data, no GPU) has written nothing worth keeping.
    return any(map(run.exists, (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, SUMMARY_FILE)))


def _refuse_used_name(run: RunFolder) -> None:
    if _has_begun(run):
        again = f"densenet-dist train --resume {shlex.quote(run.location)}{trust_option()}"
        raise StorageError(
            f"the run {run.uri} exists already\n"
            f"  resume it: {again}   (in Python: fit(config, resume=True))\n"
            "  or use another name: name=NEW"
        )


def write_run(run: RunFolder, config: Config, resume: bool) -> None:
    """Prepare a run folder: write env.json and, for a new run, config.yaml and the initial weights; delete results.

    In the config.yaml of a resumed run, only ``train.epochs`` and ``train.max_minutes`` may be raised.
    """
    if not resume:
        run.remove(ENV_FILE)
    run.remove(SUMMARY_FILE)  # before config.yaml changes: with a summary, an extended run would count as finished
    run.remove(TEST_RESULTS_FILE)
    run.remove(PAGE_FILE)
    if resume:
        extend_config(run, config)
    else:
        if config.model.pretrained or config.model.weights:
            from densenet_dist.train.initial_weights import write_initial_weights

            write_initial_weights(run, config)
        run.write(CONFIG_FILE, to_yaml(config))
    run.update_json(ENV_FILE, **describe_environment())  # keeps measured choices, such as the loader


def prepare_data(config: Config) -> None:
    """Download and verify the data set on this machine, with a progress bar, before any worker starts.

    On a cluster that this process joins, every node prepares its own data, and problems on this machine are ignored. A
    data set on an object store is completed here, since workers only read it.
    """
    from densenet_dist.data.datasets import prepare_dataset, publish_dataset

    data = config.data
    joined = config.cluster.engine == "ray" and address_of(config.cluster)[0] is not None
    if is_custom(data.name):
        from densenet_dist.train.inputs import load_dataset_of

        if not joined:
            load_dataset_of(config)
        return
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
        lease.when_lost(lambda: context.status.request(StopRequest.ABANDON))
    try:
        if context.world_size > 1:
            dist.barrier()  # wait until rank 0 has prepared folder and data
        with _stopped_by_signals(context.status):
            return train(config, context)
    finally:
        if dist.is_initialized():
            # DDP's reference cycles keep the process group and gloo's threads alive; a thread that frees a tensor while
            # the interpreter shuts down crashes the process.
            gc.collect()
            dist.destroy_process_group()


@contextmanager
def _stopped_by_signals(status: WorkerStatus) -> Iterator[None]:
    """Save and stop the run on a signal; a second signal, or one before the first step, ends it at once.

    Raises:
        KeyboardInterrupt: with the number of the signal.
    """
    received: list[int] = []

    def request_stop(number: int, frame: FrameType | None) -> None:
        if received or not status.progress:
            raise KeyboardInterrupt(number)
        received.append(number)
        status.request(StopRequest.STOP)

    with handled_by(request_stop):
        try:
            yield
        except Stopped:  # another rank of torchrun may have received the signal
            raise KeyboardInterrupt(*received or (signal.SIGTERM,)) from None
