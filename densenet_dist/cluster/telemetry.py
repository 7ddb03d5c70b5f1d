"""Metrics of runs on Ray for Prometheus and Ray's dashboard.

The process that receives a run's events (the driver, or a sweep's trial) sets gauges of Ray's metrics, so that training
is not slowed down, and a loss of workers does not reset them. Every ten seconds Ray passes them to the node's agent,
where Prometheus reads them as ``ray_densenet_...``, with the labels ``run`` and ``trial``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from densenet_dist.train.context import Event

GAUGES: Final = {
    "densenet_images_per_second": ("perf/images_per_s", "Images per second of all ranks in the current epoch."),
    "densenet_train_loss": ("train/loss", "Mean training loss of the current epoch."),
    "densenet_train_top1_ratio": ("train/top1", "Top-1 training accuracy of the last epoch, 0 to 1."),
    "densenet_val_loss": ("val/loss", "Mean validation loss after the last epoch."),
    "densenet_val_top1_ratio": ("val/top1", "Top-1 validation accuracy after the last epoch, 0 to 1."),
    "densenet_learning_rate": ("lr", "Learning rate at the start of the last epoch."),
    "densenet_epochs": ("epoch", "Epochs trained, the current one as a fraction."),
    "densenet_steps": ("global_step", "Optimizer steps since the start of the run, over all resumes."),
    "densenet_data_wait_ratio": (
        "perf/data_wait",
        "Share of the last epoch's training time that rank 0 waited for batches, 0 to 1.",
    ),
    "densenet_goodput_ratio": (
        "goodput/ratio",
        "Share of the run's time spent in steps that count, without waiting, 0 to 1.",
    ),
    "densenet_restarts": ("", "How often the workers were restarted since the command started."),
}
"""Keys of the events of epochs, and descriptions, by name, to which Ray adds ``ray_``.

Restarts are a gauge: Ray does not export a counter at 0."""
_logger = logging.getLogger(__name__)


class Telemetry:
    """Sets the gauges of a run, or of a sweep's trial, from its events, which it passes on to the listener.

    An error is logged once and ends the export, never the run.
    """

    def __init__(self, run: str, trial: str = "", listener: Callable[[Event], None] = lambda event: None) -> None:
        self._listener = listener
        self._labels = {"run": run, "trial": trial}
        self._starts = 0
        self._current: dict[str, float] = {}
        self._gauges: dict[str, Any] = {}
        self._works = True

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        try:
            if self._works and (figures := self._figures(event)):
                self._current |= figures
                self._export()
        except Exception as error:
            self._works = False
            _logger.warning("metrics for Prometheus are no longer exported: %s: %s", type(error).__name__, error)
        self._listener(event)

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
            return {name: event[key] for name, (key, _) in GAUGES.items() if key in event}
        return {}

    def _export(self) -> None:
        from ray.util.metrics import Gauge

        if not self._gauges:
            self._gauges = {name: Gauge(name, text, ("run", "trial")) for name, (_, text) in GAUGES.items()}
        for name, value in self._current.items():  # all, since Ray forgets gauges that are not set for a while
            self._gauges[name].set(value, tags=self._labels)


def show_in_dashboard() -> None:
    """Show the runs of this process in the Train view of the dashboard, if the cluster has a dashboard.

    Ray reads the variable when a trainer starts, and then starts an actor that outlives the run.
    """
    with suppress(Exception):  # a private interface, not worth failing for
        from ray._private.worker import get_dashboard_url

        if get_dashboard_url():
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
