"""Where a run stands and when it will be over, and how that looks on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from densenet_dist.train.context import Event

_WIDEST_BAR: Final = 40
_NARROWEST_BAR: Final = 8


class ProgressView:
    """A run's progress, drawn by rich: the epoch, the whole run, and the figures of the moment.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: Event = {}
        self._now: Event = {}
        self._best: tuple[float, int] | None = None
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    def begin(self, start: Event) -> None:
        """Workers start, for the first time or again."""
        self._start, self._now = start, {}
        self._first = self._last = None
        best = start.get("best") or {}
        self._best = (best["val/top1"], best["epoch"]) if "val/top1" in best else None

    def moved(self, event: Event) -> None:
        """A ``progress`` event."""
        self._now = event
        self._look(event.get("global_step"))

    def ended(self, event: Event) -> None:
        """An ``epoch`` event."""
        if event.get("is_best") and "val/top1" in event:
            self._best = (event["val/top1"], event["epoch"])
        self._look(event.get("global_step"))

    def epoch_left(self) -> float | None:
        """Seconds until this epoch's last step, at the speed of its steps so far; None where that is not known yet."""
        rate, batch = self._now.get("rate"), self._start.get("global_batch_size")
        if not rate or not batch:
            return None
        return float((self._now["steps"] - self._now["step"]) * batch / rate)

    def run_left(self) -> float | None:
        """Seconds until the last epoch's end; None where that is not known yet.

        At the speed since these workers' first steps, validation and checkpoints included: whatever else an epoch takes
        is in it after the first one. Not the first steps themselves, which compile and warm up.
        """
        total = self._total
        if self._first is None or self._last is None or total is None or self._last[1] <= self._first[1]:
            return None
        (began, first), (now, step) = self._first, self._last
        return (now - began) / (step - first) * max(total - step, 0)

    @property
    def _total(self) -> int | None:
        epochs, steps = self._start.get("epochs"), self._start.get("steps_per_epoch")
        return epochs * steps if epochs and steps else None

    def _look(self, global_step: int | None) -> None:
        if global_step is not None:
            self._last = (self._clock(), global_step)
            self._first = self._first or self._last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Two bars with their numbers, and a line or two of figures; no bars where there is no room for them."""
        if not self._now:
            return
        width = options.max_width
        rows = list(self._rows())
        bar = min(_WIDEST_BAR, width - max(sum(map(len, row[2:])) + len(row[0]) for row in rows) - 6)
        if bar >= _NARROWEST_BAR:
            grid = Table.grid(padding=(0, 2, 0, 0))
            for label, share, done, left in rows:
                shown = ProgressBar(total=1.0, completed=share, width=bar)
                grid.add_row(label, shown, Text(done, justify="right"), Text(left, style="cyan"))
            yield grid
        else:
            for label, _, done, left in rows:
                yield Text(f"{label}  {done}  {left}".rstrip(), no_wrap=True, overflow="ellipsis")
        for line in packed(list(self._figures()), width):
            yield Text(line, no_wrap=True, overflow="ellipsis")

    def _rows(self) -> Iterator[tuple[str, float, str, str]]:
        """Label, share, amount and time left: of the epoch, and of the run."""
        now = self._now
        yield (
            *(f"epoch {now['epoch']}/{now['epochs']}", now["step"] / max(now["steps"], 1)),
            *(f"{now['step']}/{now['steps']}", _left(self.epoch_left())),
        )
        total = self._total
        if total and now.get("global_step") is not None:
            share = now["global_step"] / total
            yield "run", share, f"{int(100 * share)} %", _left(self.run_left())

    def _figures(self) -> Iterator[str]:
        now = self._now
        yield f"{now['rate']:,.0f} images/s"
        yield f"loss {now['loss']:.3f}"
        if "top1" in now:
            yield f"top-1 {now['top1']:.2%}"
        if self._best is not None:
            yield f"best {self._best[0]:.2%} (epoch {self._best[1]})"


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
