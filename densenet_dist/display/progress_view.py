"""Where a run stands and when it will be over, drawn on a terminal by `rich.progress`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from densenet_dist.train.context import Event

_ROOM_FOR_BARS: Final = 60
"""Columns of a terminal; in a narrower one only the numbers are shown."""


class RunProgress(Progress):
    """Two bars, for the epoch and for the whole run, with the time left, and below them the figures of the moment.

    Args:
        console: where it is drawn.
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._batch = 0
        self._figures: list[str] = []
        self._best = ""
        bar = [BarColumn()] if console.width >= _ROOM_FOR_BARS else []
        texts = [TextColumn("{task.fields[amount]}", justify="right"), TextColumn("{task.fields[left]}", style="cyan")]
        super().__init__(
            TextColumn("{task.description}"),
            *(*bar, *texts),
            console=console,
            transient=True,
            refresh_per_second=4,
            # The speed of all that rich remembers (1,000 updates): validation and checkpoints are to be in it.
            speed_estimate_period=math.inf,
            get_time=clock,
        )
        self._epoch = self.add_task("", amount="", left="")
        self._run = self.add_task("run", amount="", left="", visible=False)

    def begin(self, event: Event) -> None:
        """Workers start, for the first time or again: a ``start`` event. What they did before tells no speed."""
        self._batch = event["global_batch_size"]
        total, done = event["epochs"] * event["steps_per_epoch"], event["global_step"]
        self.reset(self._run, total=total, completed=done, visible=False, amount="", left="")
        best = event.get("best") or {}
        self._best = f"best {best['val/top1']:.2%} (epoch {best['epoch']})" if "val/top1" in best else ""

    def moved(self, event: Event) -> None:
        """A ``progress`` event."""
        step, steps, rate = event["step"], event["steps"], event["rate"]
        self.update(
            self._epoch,
            description=f"epoch {event['epoch']}/{event['epochs']}",
            total=steps,
            completed=step,
            amount=f"{step}/{steps}",
            left=_left((steps - step) * self._batch / rate if rate else None),
        )
        self._advance(event)
        self._figures = [f"{rate:,.0f} images/s", f"loss {event['loss']:.3f}"]
        if "top1" in event:
            self._figures.append(f"top-1 {event['top1']:.2%}")

    def ended(self, event: Event) -> None:
        """An ``epoch`` event."""
        if event.get("is_best") and "val/top1" in event:
            self._best = f"best {event['val/top1']:.2%} (epoch {event['epoch']})"
        self._advance(event)

    def run_left(self) -> float | None:
        """Seconds until the last epoch's end; None where that is not known yet."""
        return self.tasks[self._run].time_remaining

    def _advance(self, event: Event) -> None:
        if "global_step" in event:
            self.update(self._run, completed=event["global_step"], visible=True)
            run = self.tasks[self._run]  # tasks are numbered from 0
            self.update(self._run, amount=f"{int(run.percentage)} %", left=_left(run.time_remaining))

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars and the figures."""
        yield self.make_tasks_table(self.tasks)
        if self._figures:
            for line in packed([*self._figures, *filter(None, [self._best])], self.console.width):
                yield Text(line, no_wrap=True, overflow="crop")


def packed(parts: Sequence[str], width: int, indent: str = "") -> list[str]:
    """Parts in as few lines as a width allows; every line but the first begins with `indent`."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"{indent}{part}" if lines else part)
    return lines


def clock_time(seconds: float) -> str:
    """A time as clocks show it: 0:07, 12:34, 1:02:03, 2 d 3:04:05."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    shown = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {shown}" if days else shown


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{clock_time(seconds)} left"
