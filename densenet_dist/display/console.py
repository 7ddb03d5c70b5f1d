"""Show a run's events.

On the console: one line per epoch, and on a terminal progress bars below them. In a notebook: one output with a table.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.text import Text

from densenet_dist.custom import trust_option
from densenet_dist.display.json_lines import redirect_to_null
from densenet_dist.display.progress import (
    RunProgress,
    format_duration,
    pluralize,
    test_details,
    trained_epochs,
    wrapped,
)
from densenet_dist.run_folder import PAGE_FILE
from densenet_dist.trackers import links

if TYPE_CHECKING:
    from densenet_dist.run_folder import RunFolder
    from densenet_dist.train.context import Event


class Console:
    """Shows one run's events.

    Args:
        quiet: show only warnings, on standard error.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._muted = False
        self._console = LastingConsole(quiet=quiet)
        self._progress = RunProgress(self._console)
        self._workers: int | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "run":
            self._console.say(f"{'resuming' if event['resumed'] else 'run folder'}: {event['run']}")
            self._progress.on_phase("starting")
        elif kind == "phase":
            self._progress.on_phase(event["text"])
        elif kind == "progress":
            self._progress.on_progress(event)
        elif kind == "start":
            self._start(event)
        elif kind == "epoch":
            self._progress.on_epoch(event)
            self._epoch(event)
        elif kind == "note":
            self._console.note(event, warns=not self._muted)
        if kind in ("run", "phase", "progress") and self._console.animates:
            self._progress.start()

    def mute(self) -> None:
        """Show nothing from now on: rank 0 shows the run."""
        self._muted = self._console.quiet = True

    def finish(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Show the results of summary.json, the files and commands for the next steps."""
        self._progress.live.stop()
        best, location = summary["best"], shlex.quote(run.location)
        figures = {}
        if "val/top1" in best:
            figures["validation top-1"] = f"{best['val/top1']:.2%}   (best, epoch {best['epoch']})"
        figures["test top-1"] = f"{summary['test/top1']:.2%}   ({test_details(summary)})"
        steps = pluralize(summary["global_step"], "step")
        figures["trained"] = f"{trained_epochs(summary)}, {steps} in {format_duration(summary['train_seconds'])}"
        commands = {
            "evaluate": f"{_program('densenet-dist')} evaluate {location}{trust_option()}",
            "rebuild report": f"{_program('densenet-dist')} report {location}{trust_option()}",
            "TensorBoard": f"{_program('tensorboard')} --logdir {shlex.quote(run.uri.rpartition('/')[0])}",
        }
        files = {"run folder": run.uri} | ({"report": f"{run.uri}/{PAGE_FILE}"} if run.exists(PAGE_FILE) else {})
        title = f"{summary['status']}: {run.name}"
        print_closing(self._console, title, figures, files | links(run), commands)

    def _start(self, event: Event) -> None:
        self._progress.live.stop()
        self._progress.on_start(event)
        workers = event["world_size"]
        if self._workers is None:
            for line in start_lines(event):
                self._console.say(line)
        on = f", on {workers} x {event['device']}" if self._workers not in (None, workers) else ""
        self._workers = workers
        if event["global_step"]:
            self._console.say(f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}{on}")

    def _epoch(self, event: Event) -> None:
        parts = epoch_parts(event, self._progress.remaining_s())
        text = Text("\n".join(wrapped(parts, self._console.line_width, indent="  ")))
        text.highlight_regex(r"\*$", "green")
        self._console.print(text)


class NotebookConsole:
    """Shows a run's events in the cell that started it, as `Console` does on a terminal."""

    def __init__(self) -> None:
        self._head: list[str] = []
        self._rows: list[Event] = []  # epochs and notes
        self._handle: Any = None

    def __enter__(self) -> NotebookConsole:
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        if isinstance(value, KeyboardInterrupt):
            self._note("interrupted; fit(config, resume=True) resumes from the last checkpoint")
            # IPython shows this instead of the traceback through all of training.
            vars(value)["_render_traceback_"] = lambda: ["KeyboardInterrupt: interrupted; see above how to resume"]
        self._show()

    def __call__(self, event: Event) -> None:
        """Show one event; with Ray it is called from another thread."""
        kind = event["kind"]
        if kind == "start":
            self._head = self._head or start_lines(event)
            if event["global_step"]:
                self._note(f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}")
        elif kind in ("epoch", "note"):
            self._rows.append(event)
        self._show(event if kind in ("progress", "phase") else None)

    def _note(self, text: str) -> None:
        self._rows.append({"kind": "note", "text": text})

    def _show(self, activity: Event | None = None) -> None:
        """Show the head, the rows, and below them a ``progress`` or ``phase`` event."""
        from densenet_dist.pages import render

        if not (self._head or self._rows):
            return
        lines = [row["text"] if row["kind"] == "note" else "  ".join(epoch_parts(row)) for row in self._rows]
        html = render("notebook.html", head=self._head, rows=self._rows, activity=activity)
        shown = {"text/html": html, "text/plain": "\n".join([*self._head, *lines])}
        if self._handle is None:
            display = import_module("IPython.display").display  # IPython is no dependency: a notebook brings it
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def console() -> Console | NotebookConsole:
    """Return the console for this process: in a notebook (Jupyter, Colab, VS Code) its output."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return Console() if getattr(shell, "kernel", None) is None else NotebookConsole()


def _program(name: str) -> str:
    """Return how to start a program of this environment: by its path if it is not on PATH."""
    installed = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not installed.exists() else shlex.quote(os.path.relpath(installed))


class LastingConsole(RichConsole):
    """A console that stops printing if a write fails: a closed pipe (``| head``) or full disk must not fail the run."""

    def __init__(self, **options: Any) -> None:
        # Neither numbers nor :names: of emoji in paths are styled.
        super().__init__(highlight=False, emoji=False, soft_wrap=True, force_jupyter=False, **options)

    @property
    def animates(self) -> bool:
        """Whether lines can be redrawn: FORCE_COLOR colors a pipe, but does not make it a terminal."""
        return not self.quiet and self.is_interactive and self.file.isatty()

    @property
    def line_width(self) -> int:
        """The width of a line, unlimited without a terminal."""
        return self.width if self.is_terminal else sys.maxsize

    def say(self, text: str, style: str | None = None) -> None:
        """Print plain text, on a terminal wrapped between words so that long paths stay in one piece."""
        if self.is_terminal:
            text = "\n".join(
                textwrap.fill(
                    line, self.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
                )
                for line in text.splitlines()
            )
        self.print(text, markup=False, style=style, soft_wrap=True)

    def note(self, event: Event, *, warns: bool = True) -> None:
        """Show a ``note`` event; a quiet console shows warnings on standard error."""
        warning = bool(event.get("warning"))
        if self.quiet and warning and warns:
            with suppress(OSError):
                print(f"warning: {event['text']}", file=sys.stderr, flush=True)
        self.say(event["text"], "yellow" if warning else None)

    def on_broken_pipe(self) -> None:
        """Continue without output."""
        self.quiet = True
        redirect_to_null(self.file)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # rich handles only closed pipes
            self.on_broken_pipe()


def print_closing(
    console: RichConsole, title: str, figures: Mapping[str, str], files: Mapping[str, str], commands: Mapping[str, str]
) -> None:
    """Print results, files and commands, each value on one line so that it can be copied."""
    width = max(map(len, [*figures, *files, *commands]))
    console.print(f"\n{title}", style="bold", markup=False)
    for group in (figures, files, commands):
        console.print()
        for name, value in group.items():
            console.print(Text.assemble("  ", (f"{name:<{width}}", "dim"), "  ", value))


def start_lines(event: Event) -> list[str]:
    """Describe the model, the data and the schedule of a run."""
    limit = f"{event['max_minutes']:g} minutes, at most " if event["max_minutes"] else ""
    return [
        f"{event['model']}, {event['parameters']:,} parameters; {event['data']}, "
        f"{event['train_images']:,} training and {event['val_images']:,} validation images",
        *([f"{event['classes']:,} classes: {event['class_names']}"] if event["data"] == "folder" else []),
        f"{limit}{pluralize(event['epochs'], 'epoch')} of {pluralize(event['steps_per_epoch'], 'step')}, "
        f"global batch size {event['global_batch_size']}; {event['world_size']} x {event['device']}, "
        f"{event['precision']}, loader {event['loader']}",
    ]


def epoch_parts(event: Event, left_s: float | None = None) -> list[str]:
    """Return the parts of an epoch's line; a star marks the best so far."""
    parts = [f"epoch {event['epoch']:>3}/{event['epochs']}"]
    for name in ("train", "val"):
        if f"{name}/loss" in event:
            shown = f"{name} loss {event[f'{name}/loss']:.4f} top-1 {event[f'{name}/top1']:6.2%}"
            parts.append(f"{shown} top-5 {event[f'{name}/top5']:6.2%}" if event["many_classes"] else shown)
    parts += [f"lr {event['lr']:.2e}", f"{event['perf/images_per_s']:,.0f} images/s", f"{event['seconds']:.1f} s"]
    if left_s:
        parts.append(f"{format_duration(left_s)} left")
    if event["is_best"]:
        parts[-1] += "  *"
    return parts
