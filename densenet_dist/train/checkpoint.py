"""The checkpoints of a run: saving in the background, the list of complete checkpoints, and which is the best.

A checkpoint is complete or absent: its folder (see `densenet_dist.train.snapshot`) is written under a temporary name,
checksummed, fsynced and renamed, then listed in ``checkpoints/manifest.json``, which is replaced atomically.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter

from densenet_dist.errors import CheckpointError, DamagedRecord, StorageError
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, RunFolder
from densenet_dist.train.context import WorkerStatus
from densenet_dist.train.snapshot import FILES, META, UNREADABLE, Position, Snapshot, read_snapshot, write_snapshot

_MANIFEST = f"{CHECKPOINTS_FOLDER}/manifest.json"
MIN_INTERVAL_S: Final = 30.0
MAX_COST: Final = 0.01
"""Limits of ``every_steps: auto``: least time between two checkpoints, and the share of the time that they may cost."""


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint in the manifest: the name of its folder, and what its `Snapshot` has."""

    name: Annotated[str, Field(pattern=r"^step-[0-9a-z-]+$")]  # it becomes part of a path
    position: Position
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Manifest:
    best: str | None
    checkpoints: list[Entry]

    def __post_init__(self) -> None:
        if self.best not in {None, *(entry.name for entry in self.checkpoints)}:
            raise ValueError(f"the best, {self.best}, is not among them")


class CheckpointStore:
    """The checkpoints of one run. One rank saves; every rank may load.

    Training pauses while the state is copied; a thread writes the files. An error there is raised by the next call of
    `save` or `wait`.

    Args:
        keep: number of newest checkpoints to keep beside the best.
        monitor: the metric of the best checkpoint, such as ``val/top1``.
        status: status of this rank, if it saves.

    Attributes:
        entries: the complete checkpoints and the one that is being written, oldest first.
        best: the name of the best one.
        damaged: descriptions of the checkpoints that could not be loaded.
        rebuilt: why the list of checkpoints was rebuilt from their folders, if it was.
        total_cost_s: seconds spent on saving: pauses of training and writing.
    """

    def __init__(
        self, run: RunFolder, *, keep: int = 1, monitor: str = "val/top1", status: WorkerStatus | None = None
    ) -> None:
        self.run, self.keep, self.monitor = run, keep, monitor
        self.entries: list[Entry] = []
        self.best: str | None = None
        self.damaged: list[str] = []
        self.rebuilt: str | None = None
        self.total_cost_s = self._last_cost_s = 0.0
        self._status = status or WorkerStatus()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_at = time.perf_counter()
        try:
            manifest = run.read(_MANIFEST, _Manifest)
        except DamagedRecord as error:
            problem = f"the list of checkpoints {error}".partition("\n")[0]
            self._rebuild(problem)
            if not self.entries:
                raise CheckpointError(problem) from error
        else:
            if manifest is not None:
                self.entries, self.best = manifest.checkpoints, manifest.best
            else:
                self._rebuild(f"the list of checkpoints {run.uri}/{_MANIFEST} is missing")
        self._names_at_start = {entry.name for entry in self.entries}

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot and write it in the background; `entries` and `best` include it at once."""
        self.wait()
        if _name(snapshot) in self._names_at_start & {entry.name for entry in self.entries}:
            # On disk already: the run reached its time limit within this epoch, and is resumed without being extended.
            return
        started = time.perf_counter()
        with self._status.during("save"):
            copy = snapshot.copy()
        self._saved_at = time.perf_counter()
        pause = self._saved_at - started
        entry = self._plan(copy)

        def write() -> None:
            began = time.perf_counter()
            try:
                self._write(copy, entry)
                self._status.saved += 1
            finally:
                self._last_cost_s = pause + time.perf_counter() - began
                self.total_cost_s += self._last_cost_s

        self._writing = self._executor.submit(write)

    def save_is_due(self) -> bool:
        """Return whether ``every_steps: auto`` calls for a checkpoint now."""
        writing = self._writing is not None and not self._writing.done()
        interval = max(MIN_INTERVAL_S, self._last_cost_s / MAX_COST)
        return not writing and time.perf_counter() - self._saved_at > interval

    def wait(self) -> None:
        """Wait until the last checkpoint is written, however long the storage takes.

        Raises:
            StorageError: it cannot be written, or the folder belongs to another job now. Earlier ones stay intact.
        """
        if self._writing is not None:
            with self._status.during("save"):
                wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait without raising errors, for cleaning up after another error. Nothing can be saved afterwards."""
        with suppress(Exception):
            self.wait()
        self._executor.shutdown()

    def _plan(self, snapshot: Snapshot) -> Entry:
        """Add a checkpoint to `entries`, and remove those that will be deleted once it is written."""
        entry = Entry(_name(snapshot), snapshot.position, snapshot.metrics)
        self.entries = [other for other in self.entries if other.name != entry.name] + [entry]
        self.best = self._find_best()
        # If the run is extended, a best checkpoint within an epoch no longer counts: keep the best other one too.
        kept = {self.best, self._find_best(complete=True)}
        self.entries = [e for e in self.entries if e in self.entries[-self.keep :] or e.name in kept]
        return entry

    def _write(self, snapshot: Snapshot, entry: Entry) -> None:
        folder = f"{CHECKPOINTS_FOLDER}/{entry.name}"
        self.run.guard()
        try:
            write_snapshot(self.run.path / folder, snapshot)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise StorageError(
                f"the checkpoint {self.run.uri}/{folder} cannot be written: {error}\n"
                "  earlier checkpoints are intact: free some space, then resume with --resume"
            ) from error
        self.run.publish(*(f"{folder}/{name}" for name in FILES))
        self.write_list()
        self._delete_unlisted()

    def write_list(self) -> None:
        """Write manifest.json."""
        self.run.guard()  # again: writing the files may have taken long enough for another job to take over
        content = {"format": 1, "best": self.best, "checkpoints": [asdict(entry) for entry in self.entries]}
        self.run.write(_MANIFEST, json.dumps(content, indent=1) + "\n")

    def latest(self) -> Entry | None:
        """Return the newest checkpoint."""
        return self.entries[-1] if self.entries else None

    def best_or_latest(self) -> Entry | None:
        """Return the best checkpoint, or the newest one if none has validation metrics."""
        return next((entry for entry in self.entries if entry.name == self.best), self.latest())

    def load_latest(self) -> Snapshot | None:
        """Load the newest checkpoint that is intact.

        Damaged ones, the best too, are removed from `entries` and described in `damaged`.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        newest = self._load_first_intact(self.latest)
        for entry in [other for other in self.entries[:-1] if other.name == self.best]:
            self._load_or_drop(entry)
        return newest

    def load_best(self) -> Snapshot | None:
        """Load the best checkpoint that is intact, like `load_latest`; the newest if none has validation metrics."""
        return self._load_first_intact(self.best_or_latest)

    def load(self, entry: Entry) -> Snapshot:
        """Verify and read one checkpoint onto the CPU.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        folder = f"{CHECKPOINTS_FOLDER}/{entry.name}"
        try:
            return read_snapshot(self.run.fetch(folder), entry.position, entry.metrics)
        except (CheckpointError, *UNREADABLE) as error:
            # A store that cannot be read says nothing about the checkpoint, which would be deleted as damaged.
            if type(error) is StorageError and self.run.exists(f"{folder}/{META}"):
                raise
            raise CheckpointError(f"the checkpoint {self.run.uri}/{folder} cannot be read: {error}") from error

    def _load_first_intact(self, choose: Callable[[], Entry | None]) -> Snapshot | None:
        self.damaged.clear()
        found = None
        while found is None and (entry := choose()) is not None:
            found = self._load_or_drop(entry)
        if self.damaged and found is None:
            raise CheckpointError("all checkpoints of this run are damaged:\n  " + "\n  ".join(self.damaged))
        return found

    def _load_or_drop(self, entry: Entry) -> Snapshot | None:
        try:
            return self.load(entry)
        except CheckpointError as error:
            self.damaged.append(str(error))
            self.entries.remove(entry)
            self.best = self._find_best()
            return None

    def _find_best(self, *, complete: bool = False) -> str | None:
        """Return the name of the best checkpoint in the list; of equally good ones the oldest.

        A checkpoint within an epoch (of a run that reached its time limit) counts only while it is the newest, since an
        extended run completes that epoch. With `complete`, it never counts.
        """
        newest = None if complete or not self.entries else self.entries[-1]
        counts = [entry for entry in self.entries if entry.position.step == 0 or entry is newest]
        best = best_record([{**entry.metrics, "name": entry.name} for entry in counts], self.monitor)
        return None if best is None else best["name"]

    def _delete_unlisted(self) -> None:
        """Delete checkpoints that are not in the list, including those that a killed process left."""
        for name in self.run.names(CHECKPOINTS_FOLDER) - {entry.name for entry in self.entries}:
            if name.startswith(("step-", ".step-")):
                with suppress(StorageError):  # tried again after the next checkpoint
                    self.run.remove(f"{CHECKPOINTS_FOLDER}/{name}")

    def _rebuild(self, problem: str) -> None:
        """Rebuild the list from the checkpoints whose checkpoint.json can be read, oldest first."""
        found = []
        for name in self.run.names(CHECKPOINTS_FOLDER):
            try:
                meta = self.run.read_json(f"{CHECKPOINTS_FOLDER}/{name}/{META}")
                found.append(TypeAdapter(Entry).validate_python(meta | {"name": name}))
            except (*UNREADABLE, OverflowError) as error:
                if type(error) is StorageError:
                    raise  # as in `load`: a checkpoint that cannot be read now would be deleted after the next save
        self.entries = sorted(found, key=lambda entry: (entry.position.global_step, entry.position.epoch))
        self.best = self._find_best()
        self.rebuilt = problem if self.entries else None


def _name(snapshot: Snapshot) -> str:
    """Return the name of a checkpoint's folder. Each is used once: a folder in the manifest is never replaced."""
    return f"step-{snapshot.position.global_step:08d}" + ("" if snapshot.validated else "-trained")


def best_record(records: Sequence[dict[str, Any]], monitor: str) -> dict[str, Any] | None:
    """Return the first record with the best value of `monitor`, or None if no record has a finite one."""
    validated = [record for record in records if -math.inf < record.get(monitor, math.nan) < math.inf]
    pick = min if monitor.endswith("loss") else max
    return pick(validated, key=lambda record: record[monitor]) if validated else None
