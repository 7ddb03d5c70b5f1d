"""Write metrics.jsonl, TensorBoard and trackers (`RunLog`), and make the events for the console and programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from densenet_dist.data.image_folder import few
from densenet_dist.model import count_parameters
from densenet_dist.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers import Tracker, open_trackers
from densenet_dist.train.board import Board
from densenet_dist.train.checkpoint import best_record
from densenet_dist.train.context import Event

if TYPE_CHECKING:
    from densenet_dist.train.trainer import Trainer


class RunLog:
    """metrics.jsonl, TensorBoard and trackers of one run, on rank 0.

    Args:
        run: the run's folder.
        global_step: steps completed; records of later steps, left by a process that died, are dropped.
        monitor: the metric of the best epoch, see `densenet_dist.schema.CheckpointConfig`.
        epochs: epochs completed; the next one may be trained, but not validated.
    """

    def __init__(
        self, run: RunFolder, global_step: int = 0, monitor: str = "val/top1", epochs: float = math.inf
    ) -> None:
        self.run, self._first_step, self._monitor = run, global_step, monitor
        self._trackers: list[Tracker] = []
        self._notify: Callable[[str, bool], None] | None = None
        self._board: Board | None = None
        self._problems: dict[str, bool] = {}  # of TensorBoard, and whether they were shown
        self._records = self._keep_until(global_step, epochs)
        if global_step == 0:
            run.remove(TENSORBOARD_FOLDER)  # left by a process that stopped before its first checkpoint
        self._earlier = run.names(TENSORBOARD_FOLDER)
        # If the test was interrupted, its events have the step of the last epoch. Board hides both: log the epoch anew.
        if self._earlier and self._records and self._records[-1]["global_step"] == global_step:
            self.write_board(Board.scalars, self._records[-1] | best_scalars(self._records, monitor), global_step)
        self.publish()  # metrics.jsonl marks the run as started

    def missing_epochs(self, epochs: int) -> list[int]:
        """Return which of the first `epochs` epochs have no record because their lines were lost or damaged."""
        return sorted(set(range(1, epochs + 1)) - {record["epoch"] for record in self._records})

    def write_board(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of `Board`. An error does not end the run: it becomes a warning, shown once."""
        try:
            if self._board is None:
                self._board = Board(self.run.path / TENSORBOARD_FOLDER, self._first_step, self._earlier)
            method(self._board, *arguments)
        except Exception as error:
            self._problems.setdefault(f"TensorBoard is incomplete: {type(error).__name__}: {error}", False)

    def track(self, config: Config, notify: Callable[[str, bool], None]) -> None:
        """Also send the records to the configured services.

        `notify` is called with each message (of TensorBoard too) and whether it is a warning, in the logging thread.

        Raises:
            EnvironmentProblem: the package of a service is missing.
        """
        self._trackers, self._notify = open_trackers(config, self.run, list(self._records)), notify

    def record(self, values: dict[str, Any], global_step: int) -> None:
        """Append one line to metrics.jsonl, and write each number to TensorBoard under its own tag."""
        self.run.guard()
        line = {"time": round(time.time(), 3), "global_step": global_step, **values}
        self.run.append(METRICS_FILE, json.dumps(line) + "\n")
        self._records.append(line)
        self.write_board(Board.scalars, values | best_scalars(self._records, self._monitor), global_step)
        for tracker in self._trackers:
            tracker.add(line)

    def publish(self, *, last: bool = False) -> None:
        """Flush the files (or close them, if it is the `last` time), and upload them to an object store."""
        self.write_board(Board.close if last else Board.flush)
        self.write_board(lambda board: self.run.publish(TENSORBOARD_FOLDER))
        self.run.publish(METRICS_FILE)
        self._report_messages()

    def end_tracking(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished at the services. They may be slow, so call this last."""
        for tracker in self._trackers:
            tracker.finish("finished", summary)
        self._report_messages()

    def abandon(self, *, failed: bool = True, leaves: bool = False) -> None:
        """Close the files after an error or a stop.

        With `leaves` the run continues in another process, so it is not marked as ended at the services.
        """
        self.write_board(Board.close)
        for tracker in self._trackers:
            tracker.detach() if leaves else tracker.finish("failed" if failed else "stopped", {})

    def _report_messages(self) -> None:
        if self._notify is None:
            return  # `track` comes later
        for text in [text for text, shown in self._problems.items() if not shown]:
            self._notify(text, True)
            self._problems[text] = True
        for tracker in self._trackers:
            for text in tracker.messages():
                self._notify(text, False)

    def _keep_until(self, global_step: int, epochs: float) -> list[dict[str, Any]]:
        """Return the records up to a step, and drop later ones from metrics.jsonl."""
        records = self.run.read_records()
        done = [line for line in records if line["global_step"] <= global_step and line["epoch"] <= epochs]
        kept = [line for line in done if "test/loss" not in line]
        if (self.run.path / METRICS_FILE).exists():
            self.run.write(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
        return kept


def best_scalars(records: Sequence[dict[str, Any]], monitor: str) -> dict[str, float]:
    """Return the scalars for TensorBoard's HPARAMS tab: of the test after it, else of the best epoch so far."""
    if "test/top1" in records[-1]:
        return {f"best/test_{name}": records[-1][f"test/{name}"] for name in ("loss", "top1")}
    best = best_record(records, monitor)
    if best is None:
        return {}
    return {"best/epoch": best["epoch"], **{f"best/val_{name}": best[f"val/{name}"] for name in ("loss", "top1")}}


def start_event(trainer: Trainer) -> Event:
    """Describe the model, the data and the device at the start of training."""
    device = torch.cuda.get_device_name(trainer.context.device) if trainer.context.device.type == "cuda" else "CPU"
    best = next((entry for entry in trainer.store.entries if entry.name == trainer.store.best and entry.metrics), None)
    return {
        "kind": "start",
        "model": trainer.config.model.variant,
        "parameters": count_parameters(trainer.model).trainable,
        "data": trainer.config.data.name,
        "classes": trainer.dataset.num_classes,
        "class_names": few(trainer.dataset.class_names),
        "train_images": trainer.num_images[0],
        "val_images": trainer.num_images[1],
        "epochs": trainer.config.train.epochs,
        "steps_per_epoch": trainer.train_loader.steps_per_epoch,
        "global_batch_size": trainer.config.train.global_batch_size,
        "precision": trainer.config.train.precision,
        "loader": trainer.loader_name,
        "world_size": trainer.context.world_size,
        "device": device,
        "epoch": trainer.position.epoch,
        "global_step": trainer.position.global_step,
        "best": None if best is None else {"epoch": best.position.epoch, **best.metrics},
    }


def progress_event(trainer: Trainer) -> Event:
    """Describe the progress of the epoch, with the metrics so far. Waits for the device."""
    loss, top1, _, images = trainer.metrics.sums.tolist()
    trained, _ = trainer.count_time()
    return {
        "kind": "progress",
        "epoch": trainer.position.epoch + 1,
        "epochs": trainer.config.train.epochs,
        "step": trainer.position.step,
        "steps": trainer.train_loader.steps_per_epoch,
        "global_step": trainer.position.global_step,
        "loss": loss / max(images, 1.0),
        "top1": top1 / max(images, 1.0),
        "rate": trainer.position.step * trainer.config.train.global_batch_size / trained,
        "goodput": trainer.context.goodput.figures()["goodput/ratio"],
    }


def epoch_event(trainer: Trainer, record: dict[str, Any]) -> Event:
    """Return the record of a completed epoch, with its checkpoint."""
    latest, position = trainer.store.latest(), trainer.position
    return {
        "kind": "epoch",
        **record,
        "epochs": trainer.config.train.epochs,
        "global_step": position.global_step,
        "many_classes": trainer.dataset.num_classes > 10,
        "checkpoint": latest.name if latest else None,
        "is_best": latest is not None and trainer.store.best == latest.name and latest.position == position,
    }
