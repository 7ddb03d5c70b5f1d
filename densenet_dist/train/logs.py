"""What a run leaves to read: metrics.jsonl (the record), TensorBoard, and lines on the console."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from densenet_dist.config import to_dict
from densenet_dist.schema import Config
from densenet_dist.train.context import Event
from densenet_dist.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, RunFolder
from densenet_dist.yaml_settings import flatten

_HYPERPARAMETERS = ("model.", "train.", "data.name", "data.augment", "data.normalize", "data.limit", "seed")
"""What decides a result; where and how it is computed or kept would only crowd TensorBoard's table."""


class RunLog:
    """metrics.jsonl and TensorBoard of one run; rank 0's alone.

    Args:
        run: the run's folder.
        global_step: steps already taken; records of later ones, left by a process that died, are dropped.
    """

    def __init__(self, run: RunFolder, global_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only rank 0 pays it

        self.run = run
        if run.is_remote and run.exists(METRICS_FILE):
            run.fetch(METRICS_FILE)
        self._keep_until(global_step)
        # TensorBoard hides what an earlier process wrote from purge_step on.
        purge = global_step + 1 if run.exists(TENSORBOARD_FOLDER) else None
        (run.path / TENSORBOARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(run.path / TENSORBOARD_FOLDER), purge_step=purge, flush_secs=10)
        self.publish()  # from here on the run's name is taken

    def record(self, values: dict[str, Any], global_step: int) -> None:
        """Append one line to metrics.jsonl and each number to TensorBoard under its own tag."""
        line = {"time": round(time.time(), 3), "global_step": global_step, **values}
        with open(self.run.path / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for tag, value in values.items():
            if "/" in tag or tag == "lr":
                self._writer.add_scalar(tag, value, global_step)

    def images(self, tag: str, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], step: int) -> None:
        """Show up to 64 normalised images, (n, 3, H, W) float, as one grid."""
        shown = images[:64].detach().float().cpu()
        scale, shift = (shown.new_tensor(values).view(1, 3, 1, 1) for values in (std, mean))
        self._writer.add_images(tag, (shown * scale + shift).clamp(0, 1), step)

    def hparams(self, config: Config) -> None:
        """Fill TensorBoard's HPARAMS tab, in this same run (`SummaryWriter.add_hparams` would start another).

        Before the first step, so that a run that is stopped or lost is in it too. The settings alone: told what an
        experiment consists of, the tab would believe it, and not put first what differs between its runs.
        """
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(to_dict(config)).items()
            if value is not None and key.startswith(_HYPERPARAMETERS)
        }
        writer = self._writer._get_file_writer()
        _, start, _ = hparams(settings, {})
        writer.add_summary(start)

    def finished(self) -> None:
        """Tell the HPARAMS tab that the run came to its end."""
        from torch.utils.tensorboard.summary import hparams

        self._writer._get_file_writer().add_summary(hparams({}, {})[2])

    def publish(self) -> None:
        """Flush, and bring both up to date on an object store."""
        self._writer.flush()
        self.run.publish(METRICS_FILE, TENSORBOARD_FOLDER)

    def close(self) -> None:
        """Write out and close everything."""
        self._writer.close()
        self.run.publish(METRICS_FILE, TENSORBOARD_FOLDER)

    def abandon(self) -> None:
        """Let go of the files after an error; what was recorded by then is in them."""
        with suppress(OSError):
            self._writer.close()

    def _keep_until(self, global_step: int) -> None:
        path = self.run.path / METRICS_FILE
        if path.exists():
            kept = [
                line for line in read_records(path) if line["global_step"] <= global_step and "test/loss" not in line
            ]
            self.run.write(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line torn by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Console:
    """Shows a run's events to a person: a live line on a terminal, one line an epoch everywhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = RichConsole(highlight=False, quiet=quiet, soft_wrap=True, force_jupyter=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._workers: int | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "progress":
            self._show_progress(event)
            return
        self._clear()
        if kind == "start":
            self._start(event)
        elif kind == "epoch":
            self._console.print(epoch_line(event), markup=False)
        elif kind == "note":
            self._console.print(event["text"], markup=False)

    def summary(self, title: str, rows: dict[str, str]) -> None:
        """Names and values at the end, each on one line however long, so that paths can be copied whole."""
        self._clear()
        width = max(map(len, rows))
        self._console.print(f"\n[bold]{escape(title)}[/]")
        for name, value in rows.items():
            self._console.print(f"  [dim]{name:<{width}}[/]  {escape(value)}")

    def _start(self, event: Event) -> None:
        workers = event["world_size"]
        if self._workers is None:
            for line in start_lines(event):
                self._console.print(line)
        on = f", on {workers} x {event['device']}" if self._workers not in (None, workers) else ""
        self._workers = workers
        if event["global_step"]:
            self._console.print(f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}{on}")

    def _show_progress(self, event: Event) -> None:
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
                TextColumn("{task.fields[rate]:,.0f} images/s"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=1, epoch=0, epochs=0, loss=0.0, rate=0.0)
            self._progress.start()
        assert self._task is not None
        fields = {key: event[key] for key in ("epoch", "epochs", "loss", "rate")}
        self._progress.update(self._task, completed=event["step"], total=event["steps"], **fields)

    def _clear(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def start_lines(event: Event) -> list[str]:
    """What is about to be trained, on what."""
    return [
        f"{event['model']}, {event['parameters']:,} parameters; {event['data']}, "
        f"{event['train_images']:,} training and {event['val_images']:,} validation images",
        f"{event['epochs']} epochs of {event['steps_per_epoch']} steps, {event['global_batch_size']} images a step;"
        f" {event['world_size']} x {event['device']}, {event['precision']}, batches by {event['loader']}",
    ]


def epoch_line(event: Event) -> str:
    """One epoch in one line."""
    parts = [f"epoch {event['epoch']:>3}/{event['epochs']}"]
    for name in ("train", "val"):
        if f"{name}/loss" in event:
            loss, top1, top5 = (event[f"{name}/{key}"] for key in ("loss", "top1", "top5"))
            shown = f"{name} loss {loss:.4f} top-1 {top1:6.2%}"
            parts.append(f"{shown} top-5 {top5:6.2%}" if event.get("many_classes") else shown)
    parts.append(f"lr {event['lr']:.2e}")
    parts.append(f"{event['perf/images_per_s']:,.0f} images/s")
    parts.append(f"{event['seconds']:.1f} s")
    return "  ".join(parts) + ("  *" if event.get("is_best") else "")
