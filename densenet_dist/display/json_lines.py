"""Write a run's events for programs: one JSON object per line on standard output (docs/commands.md)."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from densenet_dist.credentials import without_credentials
from densenet_dist.display.console import redirect_to_null
from densenet_dist.errors import DenseNetDistError

if TYPE_CHECKING:
    from densenet_dist.display.console import RunSummary
    from densenet_dist.train.context import Event

PROGRESS_EVERY_S: Final = 5.0


class JsonLines:
    """Writes events as lines; within its context, all other output goes to standard error."""

    def __init__(self) -> None:
        self._muted = False
        self._lock = threading.Lock()  # with Ray, events arrive in other threads
        self._out: TextIO = sys.stdout
        self._saved: int | None = None

    def __enter__(self) -> Self:
        self._out = sys.stdout
        if _is_descriptor_1(self._out):
            # C libraries print too, so the file descriptor itself is redirected.
            self._out.flush()
            self._saved = os.dup(1)
            self._out = os.fdopen(os.dup(1), "w", encoding="ascii")
            os.dup2(2, 1)
        self._before = sys.stdout
        sys.stdout = sys.stderr
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        if isinstance(value, Exception):
            ours = isinstance(value, DenseNetDistError)
            message = str(value) if ours else without_credentials(f"{type(value).__name__}: {value}")
            self.emit("error", type=type(value).__name__, message=message, exit_code=getattr(value, "exit_code", 1))
        sys.stdout = self._before
        if self._saved is not None:
            with suppress(OSError):
                self._out.close()
            os.dup2(self._saved, 1)
            os.close(self._saved)
            self._saved = None

    def mute(self) -> None:
        """Write nothing from now on: another rank writes, or nobody reads."""
        self._muted = True

    def note(self, event: Event) -> None:
        """Write a ``note`` event."""
        self.emit("note", level="warning" if event.get("warning") else "info", text=event["text"])

    def emit(self, event: str, **values: Any) -> None:
        """Write one line and flush it; if that fails, the run continues without output."""
        if self._muted:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite(values)})
        with self._lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except OSError:  # the pipe is closed or the disk is full
                self.mute()
                redirect_to_null(self._out)


class RunJsonLines(JsonLines):
    """Writes a run's events."""

    _shown = -math.inf

    def __call__(self, event: Event) -> None:
        """Write one event, if it is part of the format."""
        kind = event["kind"]
        if kind == "progress":
            if time.monotonic() - self._shown < PROGRESS_EVERY_S:
                return
            self._shown = time.monotonic()
        if kind == "note":
            self.note(event)
        elif kind in ("run", "start", "progress", "epoch"):
            self.emit(kind, **{key: value for key, value in event.items() if key not in ("kind", "many_classes")})

    def finish(self, summary: RunSummary) -> None:
        """Write the last line of a finished run."""
        self.emit(
            "end",
            name=summary.run.rpartition("/")[2],
            **summary.summary,
            images_per_s=summary.images_per_s,
            goodput=summary.goodput,
            files={
                "page" if name == "report" else name: path for name, path in with_underscores(summary.files()).items()
            },
            links=dict(summary.links),
        )


def with_underscores(files: Mapping[str, str]) -> dict[str, str]:
    """Replace the spaces in the names of files."""
    return {name.replace(" ", "_"): path for name, path in files.items()}


def _is_descriptor_1(file: TextIO) -> bool:
    try:
        return file.fileno() == 1
    except (OSError, ValueError):  # an in-memory file of a test or notebook
        return False


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None in nested values."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
