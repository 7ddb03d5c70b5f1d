"""What a run records and reports: metrics.jsonl, TensorBoard and trackers (`RunLog`), and events for the console."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from densenet_dist.config import to_yaml
from densenet_dist.data.image_folder import few
from densenet_dist.pages.figures import MAX_CLASSES, PRINTED, confusion_figure, drawing, new_figure, shortened
from densenet_dist.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers import Tracker, flat_settings, open_trackers
from densenet_dist.train.checkpoint import best_record
from densenet_dist.train.context import Event
from densenet_dist.train.results import TOP5_CLASSES, Mistake, TestResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from densenet_dist.train.trainer import Trainer

_HYPERPARAMETERS = ("model.", "train.", "data.name", "data.augment", "data.normalize", "data.limit", "seed")
"""Settings that affect results. Others would only crowd the table of the HPARAMS tab."""
_CELL_INCHES: Final = 0.3
"""Cell size of the confusion matrix. TensorBoard shows all images 320 pixels wide, so the text must be large."""
_LAYOUT: Final = {
    "training and validation": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "top-1": ["Multiline", ["train/top1", "val/top1"]],
        "top-5": ["Multiline", ["train/top5", "val/top5"]],
        "learning rate": ["Multiline", ["^lr$"]],
    },
    "speed": {
        "images per second": ["Multiline", ["perf/images_per_s"]],
        "forward/backward time per step (ms)": ["Multiline", ["perf/step_ms_.*"]],
        "goodput, and waiting for data": ["Multiline", ["goodput/ratio", "perf/data_wait"]],
        "lost time by cause": ["Multiline", ["goodput/lost_to_.*"]],
    },
}
"""Layout of the Custom Scalars tab, the only one where a chart can have several tags."""


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
        self._board: TensorBoardWriter | None = None
        self._problems: dict[str, bool] = {}  # of TensorBoard, and whether they were shown
        self._lines = self._keep_until(global_step, epochs)
        self._records = [line for line in self._lines if "epoch" in line]
        if global_step == 0:
            run.remove(TENSORBOARD_FOLDER)  # left by a process that stopped before its first checkpoint
        self._earlier = run.names(TENSORBOARD_FOLDER)
        # Earlier events of this step are hidden: the test's, if it was interrupted, but also those that are to stay.
        for line in self._lines if self._earlier else ():
            if line["global_step"] == global_step:
                self._write_scalars(line)
        self.publish()  # metrics.jsonl marks the run as started

    def write_tensorboard(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of `TensorBoardWriter`. An error does not end the run: it becomes a warning, shown once."""
        try:
            if self._board is None:
                self._board = TensorBoardWriter(self.run.path / TENSORBOARD_FOLDER, self._first_step, self._earlier)
            method(self._board, *arguments)
        except Exception as error:
            self._problems.setdefault(f"TensorBoard is incomplete: {type(error).__name__}: {error}", False)

    def track(self, config: Config, notify: Callable[[str, bool], None]) -> None:
        """Also send the records to the configured services.

        `notify` is called with each message (of TensorBoard too) and whether it is a warning, in the logging thread.

        Raises:
            EnvironmentProblem: the package of a service is missing.
        """
        self._trackers, self._notify = open_trackers(config, self.run, list(self._lines)), notify

    def record(self, values: dict[str, Any], global_step: int) -> None:
        """Append one line to metrics.jsonl, and write each number to TensorBoard under its own tag."""
        self.run.guard()
        line = {"time": round(time.time(), 3), "global_step": global_step, **values}
        self.run.append(METRICS_FILE, json.dumps(line) + "\n")
        if "epoch" in line:
            self._records.append(line)
        self._write_scalars(line)
        for tracker in self._trackers:
            tracker.add(line)

    def publish(self, *, last: bool = False) -> None:
        """Flush the files (or close them, if it is the `last` time), and upload them to an object store."""
        self.write_tensorboard(TensorBoardWriter.close if last else TensorBoardWriter.flush)
        self.write_tensorboard(lambda board: self.run.publish(TENSORBOARD_FOLDER))
        self.run.publish(METRICS_FILE)
        self._report_messages()

    def end_tracking(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished at the services. They may be slow, so call this last."""
        for tracker in self._trackers:
            tracker.finish("finished", summary)
        self._report_messages()

    def close_after_error(self, *, failed: bool = True, leaves: bool = False) -> None:
        """Close the files after an error or a stop.

        With `leaves` the run continues in another process, so it is not marked as ended at the services.
        """
        self.write_tensorboard(TensorBoardWriter.close)
        for tracker in self._trackers:
            tracker.detach() if leaves else tracker.finish("failed" if failed else "stopped", {})

    def _write_scalars(self, record: dict[str, Any]) -> None:
        best = best_scalars(self._records, self._monitor) if "epoch" in record else {}
        self.write_tensorboard(TensorBoardWriter.scalars, record | best, record["global_step"])

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
        records = self.run.read_records(steps=True)
        done = [line for line in records if line["global_step"] <= global_step and line.get("epoch", 0) <= epochs]
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


class TensorBoardWriter:
    """The TensorBoard events of one run: curves, images, hyperparameters and test results, in one folder.

    Args:
        folder: folder of the event files.
        hides_from: events of earlier processes from this step on are hidden. Every process must set it: without its
            data server, TensorBoard ignores it in the first file that it reads.
        earlier: names of the event files of earlier processes.
    """

    def __init__(self, folder: Path, hides_from: int = 0, earlier: Iterable[str] = ()) -> None:
        from tensorboard.summary.writer import event_file_writer
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only rank 0 pays it

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of the times in their names, but clocks of machines differ.
        times = [int(found[1]) + 1 for name in earlier if (found := re.match(r"events\.out\.tfevents\.(\d+)\.", name))]
        named = max([int(time.time()), *times])
        event_file_writer.time = SimpleNamespace(time=lambda: named)
        try:
            self._writer = SummaryWriter(str(folder), purge_step=hides_from, flush_secs=10)
        finally:
            event_file_writer.time = time
        # Write in this thread, where errors can be handled; in TensorBoard's own thread they print a traceback.
        events = self._writer._get_file_writer().event_writer
        events._async_writer._worker.stop()
        events._async_writer = events._async_writer._writer

    def scalars(self, values: dict[str, Any], step: int) -> None:
        """Write each number under its own tag."""
        for tag, value in values.items():
            if "/" in tag or tag == "lr":
                self._writer.add_scalar(tag, value, step)

    def write_hparams(self, config: Config, num_classes: int) -> None:
        """Write the settings, and which curves belong together, before the first step.

        `SummaryWriter.add_hparams` would start another run in TensorBoard. Stopped and lost runs are in the HPARAMS tab
        too, since it is not written at the end. Without a description of the experiment, the tab lists settings that
        differ between runs first, and all scalars as metrics, by name: ``best/...`` come first.
        """
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flat_settings(config).items()
            if key.startswith(_HYPERPARAMETERS)
        }
        layout = copy.deepcopy(_LAYOUT)
        if num_classes < TOP5_CLASSES:
            del layout["training and validation"]["top-5"]
        self._writer._get_file_writer().add_summary(hparams(settings, {})[1])
        self._writer.add_custom_scalars(layout)
        self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def images(self, tag: str, images: Tensor, mean: Sequence[float], std: Sequence[float], step: int) -> None:
        """Write up to 64 normalized images, (n, 3, H, W) float, as one grid."""
        shown = images[:64].detach().float().cpu()
        scale, shift = (shown.new_tensor(values).view(1, 3, 1, 1) for values in (std, mean))
        self._writer.add_images(tag, (shown * scale + shift).clamp(0, 1), step)

    def test_results(self, results: TestResults, step: int) -> None:
        """Write the confusion matrix and the worst mistakes; `step` is the last of the run."""
        names = results.class_names
        with drawing(PRINTED):
            if len(names) <= MAX_CLASSES:
                self._figure("test/confusion", confusion_figure(results.confusion, names, cell=_CELL_INCHES), step)
            if shown := [mistake for mistake in results.mistakes if mistake.png is not None]:
                self._figure("test/worst_mistakes", _mistakes_figure(shown, names), step)

    def finished(self, step: int) -> None:
        """Mark the run as finished in the HPARAMS tab; `step` is its last."""
        from torch.utils.tensorboard.summary import hparams

        self._writer._get_file_writer().add_summary(hparams({}, {})[2], step)

    def flush(self) -> None:
        """Flush the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _figure(self, tag: str, figure: Figure, step: int) -> None:
        figure.set_dpi(150)
        self._writer.add_figure(tag, figure, step)


def _mistakes_figure(mistakes: Sequence[Mistake], names: Sequence[str]) -> Figure:
    """Draw the images in rows, each with the predicted class, its probability, and the true class."""
    from PIL import Image

    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = new_figure(1.6 * columns, 1.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for tile in axes:
        tile.set_axis_off()
    for tile, mistake in zip(axes, mistakes, strict=False):
        tile.imshow(Image.open(io.BytesIO(mistake.png or b""), formats=["PNG"]))
        predicted, label = (shortened(names[found]) for found in (mistake.predicted, mistake.label))
        tile.set_title(f"{predicted} {mistake.confidence:.0%}\nis {label}", fontsize=8)
    return figure


def start_event(trainer: Trainer) -> Event:
    """Describe the model, the data and the device at the start of training."""
    device = torch.cuda.get_device_name(trainer.context.device) if trainer.context.device.type == "cuda" else "CPU"
    best = next((entry for entry in trainer.store.entries if entry.name == trainer.store.best and entry.metrics), None)
    return {
        "kind": "start",
        "model": trainer.config.model.variant,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "data": trainer.config.data.name,
        "classes": trainer.dataset.num_classes,
        "class_names": few(trainer.dataset.class_names),
        "train_images": trainer.num_images[0],
        "val_images": trainer.num_images[1],
        "epochs": trainer.config.train.epochs,
        "steps_per_epoch": trainer.steps_per_epoch,
        "total_steps": trainer.total_steps,
        "max_minutes": trainer.config.train.max_minutes,
        "global_batch_size": trainer.config.train.global_batch_size,
        "precision": trainer.config.train.precision,
        "loader": trainer.loader_name,
        "world_size": trainer.context.world_size,
        "device": device,
        "epoch": trainer.position.epoch,
        "global_step": trainer.position.global_step,
        "best": None if best is None else {"epoch": best.position.last_epoch, **best.metrics},
    }


def progress_event(trainer: Trainer) -> Event:
    """Describe the progress of the epoch, with the metrics so far. Waits for the device."""
    loss, top1, _, images = trainer.metrics.sums.tolist()
    trained, _ = trainer.epoch_time()
    return {
        "kind": "progress",
        "epoch": trainer.position.epoch + 1,
        "epochs": trainer.config.train.epochs,
        "step": trainer.position.step,
        "steps": trainer.position.step + int(trainer.steps_left),
        "global_step": trainer.position.global_step,
        "total_steps": trainer.total_steps,
        "loss": loss / max(images, 1.0),
        "top1": top1 / max(images, 1.0),
        "rate": trainer.position.step * trainer.config.train.global_batch_size / trained,
        "goodput": trainer.goodput.metrics()["goodput/ratio"],
    }


def epoch_event(trainer: Trainer, record: dict[str, Any]) -> Event:
    """Return the record of a completed epoch, with its checkpoint."""
    latest, position = trainer.store.latest(), trainer.position
    return {
        "kind": "epoch",
        **record,
        "epochs": trainer.config.train.epochs,
        "global_step": position.global_step,
        "total_steps": trainer.total_steps,
        "many_classes": trainer.dataset.num_classes > 10,
        "checkpoint": latest.name if latest else None,
        "is_best": latest is not None
        and (trainer.store.best, position.global_step) == (latest.name, latest.position.global_step),
    }
