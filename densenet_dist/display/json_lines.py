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
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Self

from densenet_dist.credentials import without_credentials
from densenet_dist.errors import DenseNetDistError
from densenet_dist.run_folder import PAGE_FILE
from densenet_dist.trackers import links

if TYPE_CHECKING:
    from densenet_dist.run_folder import RunFolder
    from densenet_dist.train.context import Event

_PROGRESS_EVERY_S: Final = 5.0


def redirect_to_null(file: Any) -> None:
    """Discard buffered output to a closed pipe, so that the process can exit normally."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)


class JsonLines:
    """Writes events as lines; within its context, all other output goes to standard error."""

    def __init__(self) -> None:
        self._muted = False
        self._lock = threading.Lock()  # with Ray, events arrive in other threads

    def __enter__(self) -> Self:
        self._stdout = self._out = sys.stdout
        if self._stdout is sys.__stdout__:
            # C libraries print too, so the file descriptor itself is redirected.
            sys.stdout.flush()
            self._out = os.fdopen(os.dup(1), "w", encoding="ascii")
            os.dup2(2, 1)
        sys.stdout = sys.stderr
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        if isinstance(value, Exception):
            ours = isinstance(value, DenseNetDistError)
            message = str(value) if ours else without_credentials(f"{type(value).__name__}: {value}")
            self.emit("error", type=type(value).__name__, message=message, exit_code=getattr(value, "exit_code", 1))
        sys.stdout = self._stdout
        if self._out is not self._stdout:
            os.dup2(self._out.fileno(), 1)
            self._out.close()

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
            if time.monotonic() - self._shown < _PROGRESS_EVERY_S:
                return
            self._shown = time.monotonic()
        if kind == "note":
            self.note(event)
        elif kind in ("run", "start", "progress", "epoch"):
            self.emit(kind, **{key: value for key, value in event.items() if key not in ("kind", "many_classes")})

    def finish(self, run: RunFolder, summary: Mapping[str, Any]) -> None:
        """Write the last line of a finished run: summary.json, with speed and goodput from the run's records."""
        records = run.read_records()
        rates = [record["perf/images_per_s"] for record in records if "perf/images_per_s" in record]
        shares = [record["goodput/ratio"] for record in records if "goodput/ratio" in record]
        self.emit(
            "end",
            name=run.name,
            **summary,
            images_per_s=median(rates) if rates else None,
            goodput=shares[-1] if shares else None,
            files={"run_folder": run.uri, "page": f"{run.uri}/{PAGE_FILE}" if run.exists(PAGE_FILE) else None},
            links=links(run),
        )


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None in nested values."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
