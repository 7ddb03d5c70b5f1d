"""Shows a run's events to a person: two bars and the figures of the moment on a terminal, one line an epoch everywhere.

What a program reads instead is in `densenet_dist.display.json_lines`.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.style import Style
from rich.text import Text

from densenet_dist.display.progress_view import RunProgress, clock_time, packed

if TYPE_CHECKING:
    from densenet_dist.display.ending import Ending
    from densenet_dist.train.context import Event


class Console:
    """Shows one run's events.

    Args:
        quiet: show nothing but warnings, on standard error.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._muted = False
        self._console = LastingConsole(highlight=False, quiet=quiet, soft_wrap=True, force_jupyter=False)
        self._progress = RunProgress(self._console)
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
            self._progress.moved(event)
            if self._console.animates:
                self._progress.start()
        elif kind == "start":
            self._start(event)
        elif kind == "epoch":
            self._progress.ended(event)
            self._epoch(event)
        elif kind == "note":
            self._console.note(event, warns=not self._muted)

    def mute(self) -> None:
        """Show nothing from now on: another rank speaks."""
        self._muted = self._console.quiet = True

    def finish(self, ending: Ending) -> None:
        """Say how the run ended, where all of it lies, and what can be done with it."""
        self._clear()
        places = ending.files() | dict(ending.links)
        print_closing(self._console, ending.title, ending.figures(), places, ending.commands())

    def _start(self, event: Event) -> None:
        self._progress.begin(event)
        workers = event["world_size"]
        if self._workers is None:
            for line in start_lines(event):
                self._console.say(line)
        on = f", on {workers} x {event['device']}" if self._workers not in (None, workers) else ""
        self._workers = workers
        if event["global_step"]:
            self._console.say(f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}{on}")

    def _epoch(self, event: Event) -> None:
        left = self._progress.run_left()
        parts = [*epoch_parts(event), *([f"{clock_time(left)} left"] if left else [])]
        width = self._console.width if self._console.is_terminal else sys.maxsize
        lines = packed([*parts, "*"] if event.get("is_best") else parts, width, indent="  ")
        star = "green" if event.get("is_best") else ""
        self._console.print(Text("\n").join(_starred(line, star) for line in lines))

    def _clear(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()


class LastingConsole(RichConsole):
    """A console that outlives its reader: no run ends because ``| head`` has seen enough, or because its log's disk is
    full."""

    @property
    def animates(self) -> bool:
        """Whether lines can be drawn over each other: FORCE_COLOR colours what is piped, but cannot make it move."""
        return not self.quiet and self.is_interactive and not self.is_dumb_terminal and self.file.isatty()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a text as it is, on a terminal broken between words; a path that is too long stays in one piece."""
        if self.is_terminal:
            text = "\n".join(
                textwrap.fill(
                    line, self.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
                )
                for line in text.splitlines()
            )
        self.print(text, markup=False, style=style, soft_wrap=True)

    def note(self, event: Event, *, warns: bool = True) -> None:
        """Show a ``note`` event; where nothing else is shown, warnings still are, on standard error."""
        warning = bool(event.get("warning"))
        if self.quiet and warning and warns:
            with suppress(OSError):
                print(f"warning: {event['text']}", file=sys.stderr, flush=True)
        self.say(event["text"], "yellow" if warning else None)

    def on_broken_pipe(self) -> None:
        """Go on without a word."""
        self.quiet = True
        forget(self.file)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # rich itself handles closed pipes only
            self.on_broken_pipe()


def print_closing(
    console: RichConsole,
    title: str,
    figures: Mapping[str, str],
    files: Mapping[str, str],
    commands: Mapping[str, str],
) -> None:
    """The last words: figures, files and what to do next, each value on one line however long, to be copied whole."""
    width = max(map(len, [*figures, *files, *commands]))
    console.print(f"\n{title}", style="bold", markup=False)
    for group in (figures, files, commands):
        console.print()
        for name, value in group.items():
            style = _link(value) if group is files else Style()
            console.print(Text.assemble("  ", (f"{name:<{width}}", "dim"), "  ", (value, style)))


def _link(text: str) -> Style:
    """A link (OSC 8) for what lies here or on the web; addresses of object stores are no browser's."""
    if text.startswith(("http://", "https://")):
        return Style(link=text)
    path = Path(text)
    return Style(link=path.as_uri()) if path.is_absolute() else Style()


def forget(file: Any) -> None:
    """Have what is still to be written to a pipe that nobody reads go nowhere, so that the process can end well."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def start_lines(event: Event) -> list[str]:
    """What is about to be trained, on what."""
    return [
        f"{event['model']}, {event['parameters']:,} parameters; {event['data']}, "
        f"{event['train_images']:,} training and {event['val_images']:,} validation images",
        *([f"{event['classes']:,} classes: {event['class_names']}"] if event["data"] == "folder" else []),
        f"{event['epochs']} epochs of {event['steps_per_epoch']} steps, {event['global_batch_size']} images a step;"
        f" {event['world_size']} x {event['device']}, {event['precision']}, batches by {event['loader']}",
    ]


def epoch_parts(event: Event) -> Iterator[str]:
    """One epoch, a part for each thing to be said of it."""
    yield f"epoch {event['epoch']:>3}/{event['epochs']}"
    for name in ("train", "val"):
        if f"{name}/loss" in event:
            loss, top1, top5 = (event[f"{name}/{key}"] for key in ("loss", "top1", "top5"))
            shown = f"{name} loss {loss:.4f} top-1 {top1:6.2%}"
            yield f"{shown} top-5 {top5:6.2%}" if event.get("many_classes") else shown
    yield f"lr {event['lr']:.2e}"
    yield f"{event['perf/images_per_s']:,.0f} images/s"
    yield f"{event['seconds']:.1f} s"


def epoch_line(event: Event) -> str:
    """One epoch in one line; a star marks the best so far."""
    return "  ".join([*epoch_parts(event), *(["*"] if event.get("is_best") else [])])


def _starred(line: str, style: str) -> Text:
    text = Text(line)
    if style and line.endswith("*"):
        text.stylize(style, len(line) - 1)
    return text
