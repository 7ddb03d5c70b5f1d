"""Show a run in a notebook: one output with a table of epochs and a progress bar below."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final

from densenet_dist.display.console import Console, epoch_line, start_lines
from densenet_dist.pages.render import escape
from densenet_dist.train.context import Event

_COLUMNS: Final = ("epoch", "train loss", "train top-1", "val loss", "val top-1", "lr", "images/s", "time", "")


def console() -> Console | NotebookConsole:
    """Return the console for this process: in a notebook (Jupyter, Colab, VS Code) its output."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return Console() if getattr(shell, "kernel", None) is None else NotebookConsole()


class NotebookConsole:
    """Shows a run's events in the cell that started it, as `Console` does on a terminal."""

    def __init__(self) -> None:
        self._head: list[str] = []
        self._lines: list[Event] = []  # epochs and notes
        self._progress: Event | None = None
        self._handle: Any = None

    def __enter__(self) -> NotebookConsole:
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        if isinstance(value, KeyboardInterrupt):
            text = "interrupted; fit(config, resume=True) resumes from the last checkpoint"
            self._lines.append({"kind": "note", "text": text})
            # IPython shows this instead of the traceback through all of training.
            vars(value)["_render_traceback_"] = lambda: ["KeyboardInterrupt: interrupted; see above how to resume"]
        self._progress = None
        self._show()

    def __call__(self, event: Event) -> None:
        """Show one event; with Ray it is called from another thread."""
        kind = event["kind"]
        if kind == "start":
            self._start(event)
        elif kind in ("epoch", "note"):
            self._lines.append(event)
        self._progress = event if kind in ("progress", "phase") else None
        self._show()

    def _start(self, event: Event) -> None:
        self._head = self._head or start_lines(event)
        if event["global_step"]:
            text = f"resumed after step {event['global_step']}, in epoch {event['epoch'] + 1}"
            self._lines.append({"kind": "note", "text": text})

    def _show(self) -> None:
        if not (self._head or self._lines):
            return
        lines = [event["text"] if event["kind"] == "note" else epoch_line(event) for event in self._lines]
        shown = {"text/html": self._html(), "text/plain": "\n".join([*self._head, *lines])}
        if self._handle is None:
            display = import_module("IPython.display").display  # IPython is no dependency: a notebook brings it
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def _html(self) -> str:
        parts = [f"<div>{'<br>'.join(map(escape, self._head))}</div>"]
        if self._lines:
            heads = "".join(f"<th>{name}</th>" for name in _COLUMNS)
            parts.append(
                f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(map(_row, self._lines))}</tbody></table>"
            )
        if self._progress is not None:
            parts.append(_bar(self._progress))
        return "".join(parts)


def _row(event: Event) -> str:
    if event["kind"] == "note":
        text = escape(event["text"]).replace("\n", "<br>")
        return f'<tr><td colspan="{len(_COLUMNS)}" style="text-align:left">{text}</td></tr>'
    cells = [f"{event['epoch']}/{event['epochs']}"]
    for split in ("train", "val"):
        known = f"{split}/loss" in event
        cells += [f"{event[f'{split}/loss']:.4f}", f"{event[f'{split}/top1']:.2%}"] if known else ["", ""]
    cells += [f"{event['lr']:.2e}", f"{event['perf/images_per_s']:,.0f}", f"{event['seconds']:.1f} s"]
    cells.append("best" if event.get("is_best") else "")
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _bar(event: Event) -> str:
    if event["kind"] == "phase":
        return f"<div>{escape(event['text'])} ...</div>"
    step, steps = event["step"], event["steps"]
    text = f"epoch {event['epoch']}/{event['epochs']}, step {step}/{steps}, loss {event['loss']:.3f}"
    return f'<div><progress value="{step}" max="{steps}"></progress> {text}, {event["rate"]:,.0f} images/s</div>'
