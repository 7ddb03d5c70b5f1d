"""What a run on Ray tells Prometheus and Ray's dashboard.

The process that hears a run's events (the driver, or a sweep's trial) turns them into gauges of Ray's own metrics: what
trains is not touched, and figures go on counting when workers are lost. Every ten seconds Ray hands them to the node's
agent, where Prometheus finds them as ``ray_densenet_...``, with the labels ``run`` and ``trial``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np

from densenet_dist.train.context import Event

GAUGES: Final = {
    "densenet_images_per_second": "Images trained a second by all ranks, in the epoch under way.",
    "densenet_train_loss": "Mean loss of the training images of the epoch under way.",
    "densenet_train_top1_ratio": "Top-1 accuracy on the training images of the last epoch, 0 to 1.",
    "densenet_val_loss": "Mean loss of the validation images after the last epoch.",
    "densenet_val_top1_ratio": "Top-1 accuracy on the validation images after the last epoch, 0 to 1.",
    "densenet_learning_rate": "Learning rate at the beginning of the last epoch.",
    "densenet_epochs": "Epochs trained, the one under way as a fraction.",
    "densenet_steps": "Optimizer steps taken since the run's very beginning.",
    "densenet_data_wait_ratio": "Share of the last epoch's training time that rank 0 waited for batches, 0 to 1.",
    "densenet_goodput_ratio": "Share of the time since the start spent in steps that count, without waiting, 0 to 1.",
    "densenet_restarts": "How often the workers were started again since the start.",
}
"""Names, before Ray puts ``ray_`` in front, and meanings. Restarts are no counter: Ray's cannot say 0."""
_OF_EPOCHS: Final = {
    "perf/images_per_s": "densenet_images_per_second",
    "perf/data_wait": "densenet_data_wait_ratio",
    "lr": "densenet_learning_rate",
    "train/loss": "densenet_train_loss",
    "train/top1": "densenet_train_top1_ratio",
    "val/loss": "densenet_val_loss",
    "val/top1": "densenet_val_top1_ratio",
    "epoch": "densenet_epochs",
    "global_step": "densenet_steps",
}
_logger = logging.getLogger(__name__)


class Goodput:
    """How much of its time a run came forward.

    What counts is the time of steps whose work was kept, less what they waited for data. Starting, validating, saving
    and standing still do not count, nor do steps that were lost with a worker and are taken again.

    Args:
        clock: seconds from anywhere; the run starts now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._points: list[tuple[int, float]] = []  # global step, useful seconds until then; of rising steps
        self._base = 0.0
        self._start: Event = {}
        self._step = 0  # of the epoch, from which this process counts images
        self._wait = 0.0

    def started(self, event: Event) -> None:
        """Workers begin, or begin again, at a step: what came after it is lost."""
        step = event["global_step"]
        if self._points:
            steps, seconds = zip(*self._points, strict=True)
            self._base = float(np.interp(step, steps, seconds))
        self._points = [point for point in self._points if point[0] < step] + [(step, self._base)]
        self._start, self._step = event, step - event["epoch"] * event["steps_per_epoch"]

    def moved(self, event: Event) -> None:
        """Some way into an epoch; that its steps wait as long as the last epoch's is a guess until the epoch's end."""
        images = (event["step"] - self._step) * self._start["global_batch_size"]
        useful = images / event["rate"] * (1 - self._wait)
        self._points = [point for point in self._points if point[1] <= self._base]
        self._points.append((event["global_step"], self._base + useful))

    def ended(self, event: Event) -> None:
        """An epoch is over."""
        self._wait = event["perf/data_wait"]
        images = self._start["train_images"] - self._step * self._start["global_batch_size"]
        self._points = [point for point in self._points if point[1] <= self._base]
        self._base += images / event["perf/images_per_s"] * (1 - self._wait)
        self._points.append((event["global_step"], self._base))
        self._step = 0

    @property
    def ratio(self) -> float:
        """Useful time as a share of the time since the start, 0 to 1."""
        return self._points[-1][1] / max(self._clock() - self._began, 1e-9) if self._points else 0.0


class Telemetry:
    """Hears a run's events and sets its gauges. Never fails: what goes wrong is logged once, and no more is exported.

    Args:
        run: the run's name, or its sweep's.
        trial: a trial's name in its sweep.
    """

    def __init__(self, run: str, trial: str = "") -> None:
        self._labels = {"run": run, "trial": trial}
        self._goodput = Goodput()
        self._starts = 0
        self._gauges: dict[str, Any] | None = None
        self._works = True

    def __call__(self, event: Event) -> None:
        """Hear of something."""
        if not self._works:
            return
        try:
            self._set(self._figures(event))
        except Exception as error:
            self._works = False
            _logger.warning("figures for Prometheus are no longer exported: %s: %s", type(error).__name__, error)

    def _figures(self, event: Event) -> dict[str, float]:
        kind = event["kind"]
        if kind == "start":
            self._starts += 1
            self._goodput.started(event)
            figures = {"densenet_restarts": self._starts - 1, "densenet_steps": event["global_step"]}
        elif kind == "progress":
            self._goodput.moved(event)
            figures = {
                "densenet_images_per_second": event["rate"],
                "densenet_train_loss": event["loss"],
                "densenet_epochs": event["epoch"] - 1 + event["step"] / event["steps"],
                "densenet_steps": event["global_step"],
            }
        elif kind == "epoch":
            self._goodput.ended(event)
            figures = {name: event[key] for key, name in _OF_EPOCHS.items() if key in event}
        else:
            return {}
        return figures | {"densenet_goodput_ratio": self._goodput.ratio}

    def _set(self, figures: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        if self._gauges is None:
            self._gauges = {name: Gauge(name, text, ("run", "trial")) for name, text in GAUGES.items()}
        for name, value in figures.items():
            self._gauges[name].set(value, tags=self._labels)


def heard_by(listener: Callable[[Event], None], telemetry: Telemetry) -> Callable[[Event], None]:
    """A listener that also lets `telemetry` hear."""

    def listen(event: Event) -> None:
        telemetry(event)
        listener(event)

    return listen


def show_in_dashboard() -> None:
    """Let the dashboard's Train view show the runs of this process, where the cluster has a dashboard.

    Ray reads the variable when a trainer starts; it also starts an actor that outlives the run, so not without use.
    """
    with suppress(Exception):  # not public; no run fails for its looks
        from ray._private.worker import get_dashboard_url

        if get_dashboard_url():
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
