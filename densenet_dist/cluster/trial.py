"""One trial of a sweep, as Ray Tune runs it: an ordinary run that waits after each epoch to hear whether to go on.

With one worker the training loop runs in the trial's own process; with several, Ray Train's workers are started from
there. In a sweep that is resumed, a trial that had ended tells again what it was, from the run's own record, so that
schedulers and searchers know it; one that had not goes on from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import ray
from ray import tune

from densenet_dist.cluster.connection import DRIVER_ENV, WORKER_ENV
from densenet_dist.cluster.coordinator import EpochBarrier
from densenet_dist.cluster.launch import write_run
from densenet_dist.cluster.ray_train import fit_on_ray
from densenet_dist.cluster.telemetry import Telemetry
from densenet_dist.config import to_yaml
from densenet_dist.errors import (
    ConfigError,
    DamagedRecord,
    DataError,
    DenseNetDistError,
    EnvironmentProblem,
    StorageError,
)
from densenet_dist.object_store import delete_temporary_folders
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, ENV_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Note, read_note, write_note
from densenet_dist.sweep.space import decode
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.choices import CHOICES
from densenet_dist.train.context import Event, RunContext, Stopped, choose_device

OUTCOME: Final = "outcome"
"""Key of a trial's last result: finished, stopped or failed."""
CAUSE: Final = "cause"
FATAL: Final = "fatal"
"""Key of a failed trial's last result: the class of its error, where all other trials would fail as well."""
_FATAL: Final = (StorageError, DataError, EnvironmentProblem)
_POINTER: Final = "pointer.json"
_STOP_S: Final = 5.0
_POLL_S: Final = 0.5

Figures: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep share; travels to their processes.

    Attributes:
        sweep: the sweep.
        cluster: settings of every trial's configuration, by dotted key.
        threads: torch threads of a worker.
        replays: whether a trial first tells again what it did before.
        state: the sweep's actor (`SweepState`).
    """

    sweep: Sweep
    cluster: Mapping[str, Any]
    threads: int
    replays: bool
    state: Any


class TrialRunner(tune.Trainable):  # type: ignore[misc]  # Ray's classes are untyped
    """Trains one trial at a time; one process may serve several, one after the other.

    Results hold an epoch's figures; the last one has `OUTCOME`.
    """

    _choices: ClassVar[dict[str, Any]] = {}

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:
        """Take up a trial; training starts with the first step, after a hand-over if there is one."""
        for key, value in (DRIVER_ENV | WORKER_ENV).items():
            os.environ.setdefault(key, value)
        self._plan = plan
        self._take_up(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial in this process."""
        self.cleanup()
        self._take_up(new_config)
        return True

    def _take_up(self, config: dict[str, Any]) -> None:
        self._overrides = decode(config)
        self._work: _Work | None = None
        self._results = self._all_results()
        self._last: Figures = {}

    def step(self) -> Figures:
        """Train until the end of the next epoch."""
        self._last |= next(self._results)
        return dict(self._last)

    def cleanup(self) -> None:
        """Stop training, and give everything back."""
        if self._work is not None:
            self._work.stop()
            self._work = None
        self._results.close()
        delete_temporary_folders()
        # This process goes on to other trials: models have reference cycles, and glibc keeps what a thread has freed
        # for that thread alone.
        gc.collect()
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the run's newest checkpoint: a hand-over may want it when the run itself has long deleted it."""
        run = self._run()
        entry = CheckpointStore(run).latest()
        assert entry is not None  # every epoch of a trial saves
        shutil.copytree(run.fetch(f"{CHECKPOINTS_FOLDER}/{entry.name}"), Path(checkpoint_dir) / entry.name)
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps({"trial": run.name, "checkpoint": entry.name}))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Take over another trial's weights and state, with this trial's settings; its own are on its run's record."""
        pointer = json.loads((Path(checkpoint_dir) / _POINTER).read_text())
        run = self._run()
        if pointer["trial"] == run.name:
            return
        note = read_note(run)
        name = pointer["checkpoint"]
        taken = (pointer["trial"], name, self._overrides)
        if note.taken == taken:
            return  # a crash since then: this trial has its own checkpoints after the hand-over
        run.remove(CHECKPOINTS_FOLDER)
        shutil.copytree(Path(checkpoint_dir) / name, run.path / CHECKPOINTS_FOLDER / name)
        run.publish(f"{CHECKPOINTS_FOLDER}/{name}")
        CheckpointStore(run).write_list()  # of this one alone
        write_note(run, taken=taken)

    def _run(self) -> RunFolder:
        return RunFolder(self._plan.sweep.folder, self.trial_name)

    def _all_results(self) -> Generator[Figures]:
        run = self._run()
        try:
            note = read_note(run)
            if run.exists():
                yield from self._past(run, note)
            config = self._plan.sweep.config(run.name, self._overrides, **self._plan.cluster)
            self._prepare(run, config, note)
            self._work = _Work(config, run, self._plan)
            for figures in self._work.results():
                self._share_choices(run)
                yield figures
            yield from itertools.repeat({})  # the sweep ends, and no one listens
        except DenseNetDistError as error:  # another attempt would end the same
            damaged = isinstance(error, DamagedRecord)  # a file of this trial alone
            fatal = type(error).__name__ if isinstance(error, _FATAL) and not damaged else None
            yield {"done": True, OUTCOME: "failed", CAUSE: str(error), FATAL: fatal}

    def _past(self, run: RunFolder, note: Note) -> Iterator[Figures]:
        """What is on the run's record already."""
        epochs = [record for record in run.read_records() if "train/loss" in record]
        end: Figures | None = None
        if note.status in ("stopped", "failed"):
            end = {OUTCOME: note.status, CAUSE: note.cause}
        elif summary := run.read_summary():
            end = {OUTCOME: "finished", **_tested(summary)}
        if end is None:
            return  # it goes on; told of its past in another order, a scheduler might judge it anew and stop it
        last = epochs.pop() if epochs else {}
        if self._plan.replays:
            yield from epochs
        yield last | end | {"done": True}

    def _prepare(self, run: RunFolder, config: Config, note: Note) -> None:
        run.create()
        write_run(run, config, resume=run.exists())
        self._share_choices(run)
        if note.overrides != self._overrides:
            run.write(CONFIG_FILE, to_yaml(config))  # other than before after a hand-over
            write_note(run, overrides=self._overrides)

    def _share_choices(self, run: RunFolder) -> None:
        """Measure once per process, not once per trial, what does not depend on the trial's own settings."""
        environment = run.read_json(ENV_FILE)
        for key, settings in CHOICES.items():
            if not any(name.startswith(settings) for name in self._overrides):
                if key in environment:
                    self._choices[key] = environment[key]
                elif key in self._choices:
                    environment[key] = self._choices[key]
        run.write(ENV_FILE, json.dumps(environment, indent=1) + "\n")


class _Work:
    """The training of one trial, in a thread that waits after each epoch until it is asked for more."""

    def __init__(self, config: Config, run: RunFolder, plan: TrialPlan) -> None:
        self._config, self._run, self._plan = config, run, plan
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._turn = threading.Semaphore(0)
        self._ending = threading.Event()
        self._barrier = EpochBarrier(self._heard, plan.state, run.name)
        self._telemetry = Telemetry(plan.sweep.settings.name, run.name)
        self._parameters: int | None = None
        self._last_epoch: Figures = {}
        self._thread = threading.Thread(target=self._train, name="trial", daemon=True)

    def results(self) -> Iterator[Figures]:
        """The figures of each epoch, as they come; none any more when the sweep ends."""
        self._thread.start()
        while True:
            try:
                kind, content = self._news.get(timeout=_POLL_S)
            except queue.Empty:
                if self._sweep_ends():
                    self.stop()
                    return
                continue
            if kind == "error":
                raise content
            if kind == "end":
                yield {"done": True, OUTCOME: "finished", **self._last_epoch, **_tested(content)}
                return
            yield content
            if kind == "epoch":
                self._turn.release()

    def stop(self) -> None:
        """End the training, in the middle of an epoch too, and wait until nothing is left of it."""
        self._ending.set()
        self._turn.release()
        if not self._thread.is_alive():
            return
        self._thread.join(_STOP_S if self._alone else 1.0)
        if self._thread.is_alive() and not self._alone:
            self._barrier.abort(_STOP_S)
            self._thread.join(_STOP_S)

    def _sweep_ends(self) -> bool:
        try:
            return bool(ray.get(self._plan.state.ending.remote()))
        except ray.exceptions.RayActorError:
            return False  # lost alone: without the driver, this process would be gone too

    @property
    def _alone(self) -> bool:
        return self._config.cluster.workers == 1

    def _train(self) -> None:
        try:
            summary = self._train_here() if self._alone else fit_on_ray(self._config, self._run, self._barrier, None)
            self._news.put(("end", summary))
        except Stopped:
            pass
        except BaseException as error:
            if not self._ending.is_set():
                self._news.put(("error", error))

    def _train_here(self) -> dict[str, Any]:
        import torch

        from densenet_dist.train.loop import fit

        torch.set_num_threads(self._plan.threads)
        device = choose_device(self._config.cluster.device)
        context = RunContext(self._run, device, sync_each_epoch=True, listener=self._told)
        return fit(self._config, context)

    def _told(self, event: Event) -> None:
        if not self._heard(event):
            raise Stopped

    def _heard(self, event: Event) -> bool:
        """Pass an event on; after an epoch wait for the word to go on. Whether to."""
        if self._ending.is_set():
            return False
        self._telemetry(event)
        if event["kind"] == "start":
            self._parameters = event["parameters"]
            metric = self._plan.sweep.settings.metric
            if metric.startswith("val/") and not event["val_images"]:
                problem = f"metric: {metric} needs validation images: set data.val_fraction, or add a folder val"
                self._news.put(("error", ConfigError(problem)))
                return False
        if event["kind"] == "epoch":
            figures = {key: value for key, value in event.items() if not key.startswith(_NOT_OF_TRIALS)}
            figures["parameters"] = self._parameters
            if event["epoch"] == event["epochs"]:  # nothing is left that a scheduler could save, but the test
                self._last_epoch = figures
            else:
                self._news.put(("epoch", figures))
                self._turn.acquire()
        return not self._ending.is_set()


def _tested(summary: Mapping[str, Any]) -> Figures:
    return {key: value for key, value in summary.items() if key.startswith("test/")}


_NOT_OF_TRIALS: Final = ("kind", "checkpoint", "is_best", "goodput/")
