"""Profile some steps: a trace for Perfetto, and a table of the operations that take longest.

Only rank 0 records. ``train.profile: [100, 105]`` records the five steps after step 100.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from densenet_dist.errors import ConfigError
from densenet_dist.train.context import RunContext

PROFILE_FOLDER: Final = "profile"
_TOP: Final = 40


class StepProfiler:
    """Records a range of steps. Each part, up to the end of an epoch or of the process, is a file of its own.

    A profile must not fail the run: an error becomes a note.

    Args:
        context: of this rank; ``profile/steps-START-STOP.trace.json.gz`` and ``.txt`` are written to its run folder.
        steps: the first step of the range and the one after its last, counted from 0; None for no profile.
        total: steps of the whole run.

    Raises:
        ConfigError: the run ends before the range begins.
    """

    def __init__(self, context: RunContext, steps: tuple[int, int] | None, total: int) -> None:
        self._context = context
        self._start, self._stop = (0, 0) if steps is None else steps
        if steps is not None and self._start >= total:
            raise ConfigError(
                f"train.profile: starts after step {self._start:,}, but the whole run has {total:,} steps\n"
                "  use earlier steps"
            )
        self._profile: profile | None = None
        self._first = self._next = 0

    @contextmanager
    def step(self, number: int, *, ends_epoch: bool) -> Iterator[None]:
        """Record step `number`, if it is in the range."""
        if self._context.rank != 0 or not self._start <= number < self._stop:
            yield
            return
        if self._profile is None:
            self._first = number
            with self._optional():
                gpu = [ProfilerActivity.CUDA] if self._context.device.type == "cuda" else []
                self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True, acc_events=True)
                self._profile.start()
        with record_function(f"step {number}"):
            yield
        self._next = number + 1
        if ends_epoch or self._next == self._stop:
            self.finish()

    def finish(self) -> None:
        """Write what has been recorded so far, if anything."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        run, device, count = self._context.run, self._context.device, self._next - self._first
        with self._optional():
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels that were launched belong to the steps
            recorded.stop()
            if count <= 0:
                return
            name = f"steps-{self._first}-{self._next}"
            folder = run.path / PROFILE_FOLDER
            folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
            table = recorded.key_averages().table(
                sort_by=f"self_{device.type}_time_total", row_limit=_TOP, max_name_column_width=60
            )
            head = f"{count} steps on {device.type}, the {_TOP} operations with the longest self time\n"
            (folder / f"{name}.txt").write_text(head + table + "\n", encoding="utf-8")
            run.publish(PROFILE_FOLDER)
            path = f"{run.uri}/{PROFILE_FOLDER}/{name}"
            self._context.note(
                f"profile of {count} steps: {path}.trace.json.gz (open it at https://ui.perfetto.dev) and {path}.txt"
            )

    @contextmanager
    def _optional(self) -> Iterator[None]:
        with self._context.status.during("save"):
            try:
                yield
            except Exception as error:
                self._context.warn(f"there is no profile of these steps: {type(error).__name__}: {error}")
