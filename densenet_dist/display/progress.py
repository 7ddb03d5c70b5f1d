"""Progress bars and the time left, drawn on a terminal by `rich.progress`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

if TYPE_CHECKING:
    from densenet_dist.train.context import Event


class RunProgress(Progress):
    """A bar for the epoch and one for the run, with the time left, and the current metrics below; or the phase.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._phase: Spinner | None = None
        self._metrics = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # as wide as the terminal allows
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            # Use all updates that rich keeps (1,000), so that the speed includes validation and checkpoints.
            speed_estimate_period=math.inf,
        )
        self._epoch = self.add_task("", total=None)
        self._run = self.add_task("run", visible=False)

    def on_phase(self, text: str) -> None:
        """Show what the run is doing in place of the bars, until the next progress."""
        self._phase = Spinner("line", text, speed=0.5)

    def on_start(self, event: Event) -> None:
        """Handle a ``start`` event: workers start or restart, so the previous speed no longer applies."""
        self.reset(self._epoch)
        self.reset(self._run, total=event["total_steps"], completed=event["global_step"], visible=False)

    def on_progress(self, event: Event) -> None:
        """Handle a ``progress`` event."""
        self._phase = None
        self._metrics = f"{event['rate']:,.0f} images/s  loss {event['loss']:.3f}  top-1 {event['top1']:.2%}"
        self.tasks[self._epoch].total = event["steps"]
        self.update(self._epoch, description=f"epoch {event['epoch']}/{event['epochs']}", completed=event["step"])
        self._advance_run(event)

    def on_epoch(self, event: Event) -> None:
        """Handle an ``epoch`` event."""
        self.reset(self._epoch)
        self._advance_run(event)

    def _advance_run(self, event: Event) -> None:
        # Both totals change with a time limit. `update` would forget the speed; task ids count from 0.
        self.tasks[self._run].total = event["total_steps"]
        self.update(self._run, completed=event["global_step"], visible=True)

    def remaining_s(self) -> float | None:
        """Return the estimated seconds until the end of the last epoch; None if unknown."""
        return self.tasks[self._run].time_remaining

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the phase, or the bars and the metrics."""
        if self._phase is not None:
            yield self._phase
            return
        yield self.make_tasks_table(self.tasks)
        if self._metrics:
            yield Text(self._metrics, no_wrap=True, overflow="crop")


def wrapped(parts: Sequence[str], width: int, indent: str = "") -> list[str]:
    """Join parts to as few lines as a width allows; `indent` precedes every line but the first."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"{indent}{part}" if lines else part)
    return lines


def pluralize(count: int, noun: str) -> str:
    """Format a number with a regular noun in singular or plural: 1 epoch, 2 epochs."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def trained_epochs(summary: Mapping[str, Any]) -> str:
    """Return the passes over the data of a finished run, such as "7.4 epochs" if its time was over within one."""
    epochs = summary.get("trained_epochs") or summary["epochs"]
    return f"{epochs:.1f} epochs" if epochs % 1 else pluralize(int(epochs), "epoch")


def test_details(summary: Mapping[str, Any]) -> str:
    """Return the top-5 accuracy, loss and number of images of a test, as far as summary.json has them."""
    found = [f"top-5 {summary['test/top5']:.2%}"] if "test/top5" in summary else []
    found.append(f"loss {summary['test/loss']:.4f}")
    return ", ".join([*found, pluralize(summary["test/images"], "image")] if "test/images" in summary else found)


def format_duration(seconds: float) -> str:
    """Format a duration as 0:07, 12:34, 1:02:03 or 2 d 3:04:05."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    shown = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {shown}" if days else shown
