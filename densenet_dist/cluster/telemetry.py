"""What a run on Ray tells Prometheus and Ray's dashboard.

The process that hears a run's events (the driver, or a sweep's trial) turns them into gauges of Ray's own metrics: what
trains is not touched, and figures go on counting when workers are lost. Every ten seconds Ray hands them to the node's
agent, where Prometheus finds them as ``ray_densenet_...``, with the labels ``run`` and ``trial``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

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
    "densenet_goodput_ratio": "Share of the run's time spent in steps that count, without waiting, 0 to 1.",
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
    "goodput/ratio": "densenet_goodput_ratio",
}
_logger = logging.getLogger(__name__)


class Telemetry:
    """Hears a run's events and sets its gauges. Never fails: what goes wrong is logged once, and no more is exported.

    Args:
        run: the run's name, or its sweep's.
        trial: a trial's name in its sweep.
        listener: hears every event after it.
    """

    def __init__(self, run: str, trial: str = "", listener: Callable[[Event], None] = lambda event: None) -> None:
        self._listener = listener
        self._labels = {"run": run, "trial": trial}
        self._starts = 0
        self._current: dict[str, float] = {}
        self._gauges: dict[str, Any] | None = None
        self._works = True

    def __call__(self, event: Event) -> None:
        """Hear of something."""
        if self._works:
            self._export(event)
        self._listener(event)

    def _export(self, event: Event) -> None:
        try:
            figures = self._figures(event)
            if figures:
                # All of them, not only what is new: Ray forgets a gauge that nobody sets for a while.
                self._current |= figures
                self._set(self._current)
        except Exception as error:
            self._works = False
            _logger.warning("figures for Prometheus are no longer exported: %s: %s", type(error).__name__, error)

    def _figures(self, event: Event) -> dict[str, float]:
        kind = event["kind"]
        if kind == "start":
            self._starts += 1
            return {"densenet_restarts": self._starts - 1, "densenet_steps": event["global_step"]}
        if kind == "progress":
            return {
                "densenet_images_per_second": event["rate"],
                "densenet_train_loss": event["loss"],
                "densenet_epochs": event["epoch"] - 1 + event["step"] / event["steps"],
                "densenet_steps": event["global_step"],
                "densenet_goodput_ratio": event["goodput"],
            }
        if kind == "epoch":
            return {name: event[key] for key, name in _OF_EPOCHS.items() if key in event}
        return {}

    def _set(self, figures: dict[str, float]) -> None:
        from ray.util.metrics import Gauge

        if self._gauges is None:
            self._gauges = {name: Gauge(name, text, ("run", "trial")) for name, text in GAUGES.items()}
        for name, value in figures.items():
            self._gauges[name].set(value, tags=self._labels)


def show_in_dashboard() -> None:
    """Let the dashboard's Train view show the runs of this process, where the cluster has a dashboard.

    Ray reads the variable when a trainer starts; it also starts an actor that outlives the run, so not without use.
    """
    with suppress(Exception):  # not public; no run fails for its looks
        from ray._private.worker import get_dashboard_url

        if get_dashboard_url():
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
