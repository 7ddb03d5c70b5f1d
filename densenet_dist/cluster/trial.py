"""One trial of a sweep as a Trainable of Ray Tune: an ordinary run that waits after each epoch for Tune's decision.

With one worker the training loop runs in the trial's own process; with several, the trial starts them with Ray Train.
A resumed trial continues from the last checkpoint of its run.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Final, TypeAlias

import ray
from ray import tune

from densenet_dist.cluster.connection import DRIVER_ENV, WORKER_ENV
from densenet_dist.cluster.coordinator import EpochBarrier
from densenet_dist.cluster.launch import write_run
from densenet_dist.cluster.ray_train import fit_on_ray
from densenet_dist.cluster.telemetry import Telemetry
from densenet_dist.errors import (
    ConfigError,
    DamagedRecord,
    DataError,
    DenseNetDistError,
    EnvironmentProblem,
    StorageError,
)
from densenet_dist.lease import fence
from densenet_dist.object_store import delete_temporary_folders
from densenet_dist.run_folder import ENV_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Note
from densenet_dist.sweep.schema import SweepConfig
from densenet_dist.sweep.space import decode
from densenet_dist.train.choices import CHOICES
from densenet_dist.train.context import Event, RunContext, Stopped, choose_device

OUTCOME: Final = "outcome"
"""Key of a trial's last result: finished or failed."""
CAUSE: Final = "cause"
FATAL: Final = "fatal"
"""Key of a failed trial's last result: the class of its error if all other trials would fail as well."""
_FATAL: Final = (StorageError, DataError, EnvironmentProblem)
_STOP_S: Final = 5.0
_POLL_S: Final = 0.5

Figures: TypeAlias = dict[str, Any]


class TrialRunner(tune.Trainable):  # type: ignore[misc]  # Ray's classes are untyped
    """Train one trial at a time; Tune reuses the process for the next trial.

    Results contain an epoch's figures; the last one also has `OUTCOME`.
    """

    _choices: ClassVar[dict[str, Any]] = {}

    def setup(
        self, config: dict[str, Any], sweep: Sweep, cluster: Mapping[str, Any], state: Any, held: tuple[str, str]
    ) -> None:
        """Prepare a trial; training starts with the first step.

        Args:
            config: values of the searched keys, encoded.
            sweep: the sweep.
            cluster: settings of every trial's configuration, by dotted key.
            state: the sweep's actor (`SweepState`).
            held: the sweep's lease, see `densenet_dist.lease.fence`.
        """
        for key, value in (DRIVER_ENV | WORKER_ENV).items():
            os.environ.setdefault(key, value)
        self._sweep, self._cluster, self._state, self._held = sweep, cluster, state, held
        self._prepare(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare another trial in this process."""
        self.cleanup()
        self._prepare(new_config)
        return True

    def _prepare(self, config: dict[str, Any]) -> None:
        self._overrides = decode(config)
        self._training: _Training | None = None
        self._results = self._train()
        self._last: Figures = {}

    def step(self) -> Figures:
        """Train until the end of the next epoch."""
        self._last |= next(self._results)
        return dict(self._last)

    def cleanup(self) -> None:
        """Stop training and release memory, GPU memory and temporary files."""
        if self._training is not None:
            self._training.stop()
            self._training = None
        self._results.close()
        delete_temporary_folders()
        # This process runs other trials next: models have reference cycles, and glibc keeps memory freed by a thread
        # for that thread alone.
        gc.collect()
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()

    def _train(self) -> Generator[Figures]:
        """Yield the figures of each epoch, then those of the trial's end."""
        run = RunFolder(self._sweep.folder, self.trial_name)
        try:
            config = self._sweep.config(run.name, self._overrides, **self._cluster)
            run.create()
            fence(run, self._held)
            Note(self._overrides).write(run)
            write_run(run, config, resume=run.exists())
            self._share_choices(run)
            self._training = _Training(config, run, self._sweep.settings, self._state, self._held)
            for figures in self._training.results():
                self._share_choices(run)
                yield figures
            yield from itertools.repeat({})  # the sweep is stopping: these are ignored
        except DenseNetDistError as error:  # another attempt would end the same way
            is_fatal = isinstance(error, _FATAL) and not isinstance(error, DamagedRecord)
            fatal = type(error).__name__ if is_fatal else None
            yield {"done": True, OUTCOME: "failed", CAUSE: str(error), FATAL: fatal}

    def _share_choices(self, run: RunFolder) -> None:
        """Reuse measured choices of the process's earlier trials if they do not depend on searched settings."""
        environment = run.read_json(ENV_FILE)
        for key, settings in CHOICES.items():
            if not any(name.startswith(settings) for name in self._overrides):
                if key in environment:
                    self._choices[key] = environment[key]
                elif key in self._choices:
                    environment[key] = self._choices[key]
        run.write(ENV_FILE, json.dumps(environment, indent=1) + "\n")


class _Training:
    """The training of one trial, in a thread that waits after each epoch until the next result is requested."""

    def __init__(
        self, config: Config, run: RunFolder, settings: SweepConfig, state: Any, held: tuple[str, str]
    ) -> None:
        self._config, self._run, self._settings, self._state = config, run, settings, state
        self._single_worker = config.cluster.workers == 1
        self._output: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._next = threading.Semaphore(0)
        self._stopping = threading.Event()
        self._barrier = EpochBarrier(self._on_event, state, run.name, held)
        self._telemetry = Telemetry(settings.name, run.name)
        self._parameters: int | None = None
        self._last_epoch: Figures = {}
        self._thread = threading.Thread(target=self._train, name="trial", daemon=True)

    def results(self) -> Iterator[Figures]:
        """Yield the figures of each epoch as they come, until the trial ends or the sweep stops."""
        self._thread.start()
        while True:
            try:
                kind, content = self._output.get(timeout=_POLL_S)
            except queue.Empty:
                if self._sweep_is_stopping():
                    self.stop()
                    return
                continue
            if kind == "error":
                raise content
            if kind == "end":
                test = {key: value for key, value in content.items() if key.startswith("test/")}
                yield {"done": True, OUTCOME: "finished", **self._last_epoch, **test}
                return
            yield content
            if kind == "epoch":
                self._next.release()

    def stop(self) -> None:
        """Stop training, during an epoch too, and wait until its thread and workers have ended."""
        self._stopping.set()
        self._next.release()
        if not self._thread.is_alive():
            return
        self._thread.join(_STOP_S if self._single_worker else 1.0)
        if self._thread.is_alive() and not self._single_worker:
            self._barrier.abort(_STOP_S)
            self._thread.join(_STOP_S)

    def _sweep_is_stopping(self) -> bool:
        try:
            return bool(ray.get(self._state.stopping.remote()))
        except ray.exceptions.RayActorError:
            return False  # only the actor is lost: without the driver, this process would have been killed too

    def _train(self) -> None:
        try:
            summary = (
                self._train_here() if self._single_worker else fit_on_ray(self._config, self._run, self._barrier, None)
            )
            self._output.put(("end", summary))
        except Stopped:
            pass
        except BaseException as error:
            if not self._stopping.is_set():
                self._output.put(("error", error))

    def _train_here(self) -> dict[str, Any]:
        import torch

        from densenet_dist.train.loop import fit

        os.environ |= self._config.cluster.variables
        torch.set_num_threads(int(self._config.cluster.cpus_per_worker))  # never auto: see plan_trials
        device = choose_device(self._config.cluster.device)
        context = RunContext(self._run, device, sync_each_epoch=True, listener=self._stop_or_handle)
        return fit(self._config, context)

    def _stop_or_handle(self, event: Event) -> None:
        if not self._on_event(event):
            raise Stopped

    def _on_event(self, event: Event) -> bool:
        """Handle an event of the run, after an epoch by waiting for Tune's decision; return whether to continue."""
        if self._stopping.is_set():
            return False
        self._telemetry(event)
        if event["kind"] == "start":
            self._parameters = event["parameters"]
            metric = self._settings.metric
            if metric.startswith("val/") and not event["val_images"]:
                problem = f"metric: {metric} needs validation images: set data.val_fraction, or add a folder val"
                self._output.put(("error", ConfigError(problem)))
                return False
        if event["kind"] == "epoch":
            figures = {key: value for key, value in event.items() if key not in ("kind", "checkpoint", "is_best")}
            figures["parameters"] = self._parameters
            if event["epoch"] == event["epochs"]:  # the last one: stopping here would only skip the test
                self._last_epoch = figures
            else:
                self._output.put(("epoch", figures))
                self._next.acquire()
        return not self._stopping.is_set()
