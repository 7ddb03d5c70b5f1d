"""Checkpoints beside the training: it stands still while its state is copied, and files are written by a thread."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from densenet_dist.train.checkpoint import CheckpointStore, Snapshot
from densenet_dist.train.control import WorkerStatus

LEAST_S: Final = 30.0
SHARE: Final = 0.01


class Saver:
    """Saves snapshots one after the other; what goes wrong is raised at the next occasion.

    Attributes:
        store: where to.
        cost: seconds that the last one took, the pause and the writing.
        spent: those of all of them.
    """

    def __init__(self, store: CheckpointStore, status: WorkerStatus) -> None:
        self.store, self._status = store, status
        self.cost = self.spent = 0.0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None
        self._saved = time.perf_counter()

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot, and have it written.

        Raises:
            StorageError: where the one before could not be.
        """
        self.wait()
        started = time.perf_counter()
        with self._status.during("save"):
            copy = _copied(snapshot)
        self._saved = time.perf_counter()
        planned = self.store.plan(copy)
        pause = self._saved - started

        def write() -> None:
            began = time.perf_counter()
            self.store.write(copy, planned)
            self._status.saved += 1
            self.cost = pause + time.perf_counter() - began
            self.spent += self.cost

        self._last = self._writer.submit(write)

    def due(self) -> bool:
        """Whether saving now would cost less than a hundredth of the time since the last time, and not be soon."""
        since = time.perf_counter() - self._saved
        return since > max(LEAST_S, self.cost / SHARE) and (self._last is None or self._last.done())

    def wait(self) -> None:
        """Wait until the last checkpoint is written; for as long as the storage takes.

        Raises:
            StorageError: where it could not be.
        """
        last, self._last = self._last, None
        if last is not None:
            with self._status.during("save"):
                last.result()

    def close(self) -> None:
        """Finish what is being written, after an error of another kind."""
        with suppress(Exception):
            self.wait()
        self._writer.shutdown()


def _copied(snapshot: Snapshot) -> Snapshot:
    """On the CPU, so that training can go on changing the original."""
    return replace(
        snapshot,
        model=_copy(dict(snapshot.model)),
        average=None if snapshot.average is None else _copy(dict(snapshot.average)),
        state=_copy(snapshot.state),
    )


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value))
    return value
