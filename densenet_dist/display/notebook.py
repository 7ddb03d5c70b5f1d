"""Show a run in a notebook: one output with a table of epochs and a progress bar below."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from densenet_dist.display.console import Console, epoch_parts, start_lines
from densenet_dist.pages.render import render
from densenet_dist.train.context import Event


def console() -> Console | NotebookConsole:
    """Return the console for this process: in a notebook (Jupyter, Colab, VS Code) its output."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return Console() if getattr(shell, "kernel", None) is None else NotebookConsole()


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
