"""A run's events for a program: one JSON object a line on standard output (docs/console.md)."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from densenet_dist.credentials import without_credentials
from densenet_dist.display.console import forget
from densenet_dist.errors import DenseNetDistError

if TYPE_CHECKING:
    from densenet_dist.display.ending import Ending
    from densenet_dist.train.context import Event

PROGRESS_EVERY_S: Final = 5.0


class JsonLines:
    """Writes events as lines; within its context, what anything else prints goes to standard error."""

    def __init__(self) -> None:
        self._muted = False
        self._lock = threading.Lock()  # events of a run on Ray come in threads of their own
        self._out: TextIO = sys.stdout
        self._kept: int | None = None

    def __enter__(self) -> Self:
        self._out = sys.stdout
        if _is_descriptor_1(self._out):
            # Libraries in C print too, so the descriptor itself changes hands.
            self._out.flush()
            self._kept = os.dup(1)
            self._out = os.fdopen(os.dup(1), "w", encoding="ascii")
            os.dup2(2, 1)
        self._before = sys.stdout
        sys.stdout = sys.stderr
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, Exception):
            ours = isinstance(value, DenseNetDistError)
            message = str(value) if ours else without_credentials(f"{type(value).__name__}: {value}")
            self.emit("error", type=type(value).__name__, message=message, exit_code=getattr(value, "exit_code", 1))
        sys.stdout = self._before
        if self._kept is not None:
            with suppress(OSError):
                self._out.close()
            os.dup2(self._kept, 1)
            os.close(self._kept)
            self._kept = None

    def mute(self) -> None:
        """Write nothing from now on: another rank speaks, or nobody reads."""
        self._muted = True

    def note(self, event: Event) -> None:
        """Write a ``note`` event."""
        self.emit("note", level="warning" if event.get("warning") else "info", text=event["text"])

    def emit(self, event: str, **values: Any) -> None:
        """Write one line and have it sent at once; where it cannot be written any more, the run goes on without."""
        if self._muted:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **_finite(values)})
        with self._lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except OSError:  # nobody reads it, or it is a file on a full disk
                self.mute()
                forget(self._out)


class RunJsonLines(JsonLines):
    """Writes a run's events."""

    _shown = -math.inf

    def __call__(self, event: Event) -> None:
        """Write one event, if it is one of those that are told."""
        kind = event["kind"]
        if kind == "progress":
            if time.monotonic() - self._shown < PROGRESS_EVERY_S:
                return
            self._shown = time.monotonic()
        if kind == "note":
            self.note(event)
        elif kind in ("run", "start", "progress", "epoch"):
            self.emit(kind, **{key: value for key, value in event.items() if key not in ("kind", "many_classes")})

    def finish(self, ending: Ending) -> None:
        """The last line of a run that came to its end."""
        self.emit(
            "end",
            name=ending.run.rpartition("/")[2],
            **ending.summary,
            images_per_s=ending.images_per_s,
            goodput=ending.goodput,
            files=by_key(ending.files()),
            links=dict(ending.links),
        )


def by_key(files: Mapping[str, str]) -> dict[str, str]:
    """Files by keys without spaces."""
    return {name.replace(" ", "_"): path for name, path in files.items()}


def _is_descriptor_1(file: TextIO) -> bool:
    try:
        return file.fileno() == 1
    except (OSError, ValueError):  # a test's, or a notebook's: in memory
        return False


def _finite(value: Any) -> Any:
    """The same without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
