"""One trial of a sweep as a Trainable of Ray Tune: an ordinary run that waits after each epoch for Tune's decision.

With one worker the training loop runs in the trial's own process; with several, the trial starts them with Ray Train.
A resumed trial continues from the last checkpoint of its run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import sys
import threading
from contextlib import suppress
from typing import Any, Final, TypeAlias

import ray
from ray import tune

from densenet_dist import custom
from densenet_dist.cluster.connection import DRIVER_ENV, WORKER_ENV
from densenet_dist.cluster.coordinator import EpochBarrier
from densenet_dist.cluster.launch import write_run
from densenet_dist.cluster.ray_train import fit_on_ray
from densenet_dist.cluster.telemetry import Telemetry
from densenet_dist.errors import ConfigError, DenseNetDistError
from densenet_dist.lease import fence
from densenet_dist.object_store import delete_temporary_folders
from densenet_dist.run_folder import ENV_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import ERROR, TrialFile
from densenet_dist.sweep.space import decode
from densenet_dist.train.autotune import CHOICES
from densenet_dist.train.context import Event, RunContext, Stopped, choose_device

_STOP_S: Final = 5.0
_POLL_S: Final = 0.5

Figures: TypeAlias = dict[str, Any]
_choices: dict[str, Any] = {}
"""Choices that earlier trials measured in this process."""


class TrialRunner(tune.Trainable):  # type: ignore[misc]  # Ray's classes are untyped
    """Train one trial at a time; Tune reuses the process for the next trial.

    Results contain an epoch's figures; the last one also has `ERROR`.
    """

    def setup(self, config: dict[str, Any], parts: dict[str, Any], **parameters: Any) -> None:
        """Prepare a trial; training starts with the first step.

        Args:
            config: values of the searched keys, encoded.
            parts: custom parts of the trials, see `custom.import_parts`.
            parameters: those of all trials, for `_Training`.
        """
        for key, value in (DRIVER_ENV | WORKER_ENV).items():
            os.environ.setdefault(key, value)
        custom.import_parts(parts)
        self._parameters = parameters
        self._prepare(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare another trial in this process."""
        self.cleanup()
        self._prepare(new_config)
        return True

    def _prepare(self, config: dict[str, Any]) -> None:
        self._training = _Training(self.trial_name, decode(config), **self._parameters)
        self._last: Figures = {}

    def step(self) -> Figures:
        """Train until the end of the next epoch."""
        self._last |= self._training.next_figures()
        return dict(self._last)

    def cleanup(self) -> None:
        """Stop training and release memory, GPU memory and temporary files."""
        self._training.stop()
        delete_temporary_folders()
        # This process runs other trials next: models have reference cycles, and glibc keeps memory freed by a thread
        # for that thread alone.
        gc.collect()
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()


class _Training:
    """The training of one trial, in a thread that waits after each epoch until the next figures are requested.

    Args:
        name: of the trial.
        overrides: its values of the searched keys.
        sweep: the sweep; its base has the resources of a trial.
        state: the sweep's actor (`SweepState`).
        held: the sweep's lease, see `densenet_dist.lease.fence`.
    """

    def __init__(self, name: str, overrides: dict[str, Any], sweep: Sweep, state: Any, held: tuple[str, str]) -> None:
        self._name, self._overrides, self._sweep, self._state, self._held = name, overrides, sweep, state, held
        self._output: queue.SimpleQueue[Figures | BaseException] = queue.SimpleQueue()
        self._next = threading.Semaphore(0)
        self._stopping = threading.Event()
        self._barrier = EpochBarrier(self._on_event, state, name, held)
        self._telemetry = Telemetry(sweep.settings.name, name)
        self._parameters: int | None = None
        self._last_epoch: Figures = {}
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)

    def next_figures(self) -> Figures:
        """Train until the end of the next epoch; return its figures, or none if the sweep stops before."""
        if self._thread.ident is None:
            self._thread.start()
        self._next.release()
        while not self._stopping.is_set():
            found = None
            with suppress(queue.Empty):
                found = self._output.get(timeout=_POLL_S)
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                return found
            with suppress(ray.exceptions.RayActorError):  # the actor alone is lost: training goes on
                if ray.get(self._state.stopping.remote()):
                    self.stop()
        return {}

    def stop(self) -> None:
        """Stop training, during an epoch too, and wait until its thread and workers have ended."""
        self._stopping.set()
        self._next.release()
        if not self._thread.is_alive():
            return
        has_workers = self._sweep.settings.workers > 1
        self._thread.join(1.0 if has_workers else _STOP_S)
        if has_workers and self._thread.is_alive():
            self._barrier.abort(_STOP_S)
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            self._next.acquire()
            summary = self._train(RunFolder(self._sweep.folder, self._name))
            # The figures that metrics.jsonl has, too, from which a resumed sweep reads them.
            test = {key: value for key, value in summary.items() if key.startswith("test/") and key != "test/images"}
            self._output.put({"done": True, ERROR: None, **self._last_epoch, **test})
        except Stopped:
            pass
        except DenseNetDistError as error:  # another attempt would end the same way
            self._fail(error)
        except BaseException as error:
            self._output.put(error)

    def _fail(self, error: DenseNetDistError) -> None:
        # A copy, since the traceback would keep the model in memory.
        self._output.put({"done": True, ERROR: type(error)(str(error))})

    def _train(self, run: RunFolder) -> dict[str, Any]:
        """Train from the last checkpoint, if any; return the summary of the run."""
        config = self._sweep.config(run.name, self._overrides)
        run.create()
        fence(run, self._held)
        TrialFile(self._overrides).write(run)
        write_run(run, config, resume=run.exists())
        self._share_choices(run)
        if self._stopping.is_set():
            raise Stopped
        try:
            if config.cluster.workers == 1:
                return self._train_here(run, config)
            return fit_on_ray(config, run, self._barrier, None)
        finally:
            self._share_choices(run)

    def _train_here(self, run: RunFolder, config: Config) -> dict[str, Any]:
        import torch

        from densenet_dist.train.loop import fit

        os.environ |= config.cluster.variables
        torch.set_num_threads(int(config.cluster.cpus_per_worker))  # never auto: see plan_trials
        device = choose_device(config.cluster.device)
        # The same in another attempt of this sweep, and another when the sweep is resumed: see `Goodput`.
        launch_id = self._held[1]
        listener = self._stop_or_handle
        return fit(config, RunContext(run, device, sync_each_epoch=True, listener=listener, launch_id=launch_id))

    def _share_choices(self, run: RunFolder) -> None:
        """Reuse measured choices of the process's earlier trials if they do not depend on searched settings."""
        environment = run.read_json(ENV_FILE)
        for key, settings in CHOICES.items():
            if not any(name.startswith(settings) for name in self._overrides):
                if key in environment:
                    _choices[key] = environment[key]
                elif key in _choices:
                    run.update_json(ENV_FILE, **{key: _choices[key]})

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
            metric = self._sweep.settings.metric
            if metric == "val/top5" and event["classes"] < 6:
                self._fail(ConfigError(f"metric: val/top5 needs 6 classes or more, not {event['classes']}"))
                return False
            if metric.startswith("val/") and not event["val_images"]:
                problem = f"metric: {metric} needs validation images: set data.val_fraction, or add a folder val"
                self._fail(ConfigError(problem))
                return False
        if event["kind"] == "epoch":
            figures = {key: value for key, value in event.items() if key not in ("kind", "checkpoint", "is_best")}
            figures["parameters"] = self._parameters
            if event["global_step"] >= event["total_steps"]:  # the last one: stopping here would only skip the test
                self._last_epoch = figures
            else:
                self._output.put(figures)
                self._next.acquire()
        return not self._stopping.is_set()
