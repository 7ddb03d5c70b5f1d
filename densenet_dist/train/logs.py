"""What a run leaves to read: metrics.jsonl (the record), TensorBoard, and lines on the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from densenet_dist.schema import Config
from densenet_dist.train.board import Board, Results
from densenet_dist.train.context import Event
from densenet_dist.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, RunFolder
from densenet_dist.train.trackers import Tracker, open_trackers


class RunLog:
    """metrics.jsonl and TensorBoard of one run; rank 0's alone.

    Args:
        run: the run's folder.
        global_step: steps already taken; records of later ones, left by a process that died, are dropped.
        monitor: what makes an epoch the best, see `densenet_dist.schema.CheckpointConfig`.

    Attributes:
        board: its TensorBoard.
    """

    def __init__(self, run: RunFolder, global_step: int = 0, monitor: str = "val/top1") -> None:
        self.run, self._results = run, Results(monitor)
        self._trackers: list[Tracker] = []
        self._tell: Callable[[str], None] = lambda text: None
        if run.is_remote and run.exists(METRICS_FILE):
            run.fetch(METRICS_FILE)
        self._kept = self._keep_until(global_step)
        if global_step == 0:
            run.remove(TENSORBOARD_FOLDER)  # of a process that saved nothing: all of it comes again
        again = run.exists(TENSORBOARD_FOLDER)
        self.board = Board(run.path / TENSORBOARD_FOLDER, global_step + 1 if again else None)
        self.publish()  # from here on the run's name is taken

    def track(self, config: Config, tell: Callable[[str], None]) -> None:
        """Send the records to the configured services too; `tell` hears of them, in the thread that records.

        Raises:
            EnvironmentProblem: the package of one is missing here.
        """
        self._trackers, self._tell = open_trackers(config, self.run, self._kept), tell

    def record(self, values: dict[str, Any], global_step: int) -> None:
        """Append one line to metrics.jsonl and each number to TensorBoard under its own tag."""
        line = {"time": round(time.time(), 3), "global_step": global_step, **values}
        with open(self.run.path / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.board.scalars(values | self._results.add(values), global_step)
        for tracker in self._trackers:
            tracker.add(line)

    def publish(self) -> None:
        """Flush, and bring both up to date on an object store."""
        self.board.flush()
        self.run.publish(METRICS_FILE, TENSORBOARD_FOLDER)
        self._tell_news()

    def close(self) -> None:
        """Write out and close everything."""
        self.board.close()
        self.run.publish(METRICS_FILE, TENSORBOARD_FOLDER)

    def end_tracking(self, summary: dict[str, Any]) -> None:
        """Tell the services that the run is finished, last of all: they may be slow."""
        for tracker in self._trackers:
            tracker.finish("finished", summary)
        self._tell_news()

    def abandon(self, *, failed: bool = True, leaves: bool = False) -> None:
        """Let go of the files after an error, or where the run was stopped; what was recorded by then is in them.

        `leaves`: the run goes on elsewhere, so that no service is told of an end.
        """
        with suppress(OSError):
            self.board.close()
        for tracker in self._trackers:
            tracker.leave() if leaves else tracker.finish("failed" if failed else "stopped", {})

    def _tell_news(self) -> None:
        for tracker in self._trackers:
            for text in tracker.news():
                self._tell(text)

    def _keep_until(self, global_step: int) -> list[dict[str, Any]]:
        path = self.run.path / METRICS_FILE
        if not path.exists():
            return []
        kept = [line for line in read_records(path) if line["global_step"] <= global_step and "test/loss" not in line]
        self.run.write(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            self._results.add(line)
        return kept


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
        self._console = RichConsole(highlight=False, quiet=quiet, soft_wrap=True)
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
            self._header(event)
        on = f", on {workers} x {event['device']}" if self._workers not in (None, workers) else ""
        self._workers = workers
        if event["global_step"]:
            self._console.print(f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}{on}")

    def _header(self, event: Event) -> None:
        self._console.print(
            f"{event['model']}, {event['parameters']:,} parameters; {event['data']}, "
            f"{event['train_images']:,} training and {event['val_images']:,} validation images"
        )
        self._console.print(
            f"{event['epochs']} epochs of {event['steps_per_epoch']} steps, {event['global_batch_size']} images a step;"
            f" {event['world_size']} x {event['device']}, {event['precision']}, batches by {event['loader']}"
        )

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
