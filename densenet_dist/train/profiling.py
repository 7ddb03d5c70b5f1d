"""What some steps spend their time on: a trace for Perfetto, and a table of the operations that take longest.

Rank 0 alone records. ``train.profile: [100, 105]`` covers the steps from when 100 are taken until 105 are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from densenet_dist.run_folder import RunFolder

PROFILE_FOLDER: Final = "profile"
_TOP: Final = 40


class StepProfiler:
    """Records the steps of a range; where they are cut, by the end of an epoch or of the process, each part is a file.

    Args:
        run: the run's folder; ``profile/steps-START-STOP.trace.json.gz`` and ``.txt`` go there.
        steps: of the range, the first one and the one after the last, counted from 0.
        device: what the steps run on.
        tell: is told where what is written lies.
    """

    def __init__(
        self, run: RunFolder, steps: tuple[int, int], device: torch.device, tell: Callable[[str], None]
    ) -> None:
        self._run, self._device, self._tell = run, device, tell
        self._start, self._stop = steps
        self._profile: profile | None = None
        self._first = self._last = 0

    def between_steps(self, taken: int) -> None:
        """Begin or end recording, where `taken` steps are taken and another one follows."""
        if self._profile is not None and taken >= self._stop:
            self.finish(taken)
        if self._profile is None and self._start <= taken < self._stop:
            gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True, acc_events=True)
            self._first = taken
            self._profile.start()

    def step(self, number: int) -> AbstractContextManager[object]:
        """Names a step in the trace."""
        return nullcontext() if self._profile is None else record_function(f"step {number}")

    def finish(self, taken: int) -> None:
        """Write what has been recorded by now, if anything."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was launched belongs to the steps
        recorded.stop()
        if taken > self._first:
            self._write(recorded, f"steps-{self._first}-{taken}", taken - self._first)

    def _write(self, recorded: profile, name: str, count: int) -> None:
        folder = self._run.path / PROFILE_FOLDER
        folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
        unit = "cuda" if self._device.type == "cuda" else "cpu"
        table = recorded.key_averages().table(
            sort_by=f"self_{unit}_time_total", row_limit=_TOP, max_name_column_width=60
        )
        head = f"{count} steps on {self._device.type}, the {_TOP} operations that took longest themselves\n"
        (folder / f"{name}.txt").write_text(head + table + "\n", encoding="utf-8")
        self._run.publish(PROFILE_FOLDER)
        where = f"{self._run.uri}/{PROFILE_FOLDER}/{name}"
        self._tell(
            f"{count} steps are profiled: {where}.trace.json.gz (open it at https://ui.perfetto.dev) and {where}.txt"
        )
