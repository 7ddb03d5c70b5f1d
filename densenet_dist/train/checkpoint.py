"""Checkpoints that are whole or not there: written beside, checksummed, fsynced, renamed, then listed.

Layout, under the run's ``checkpoints/``::

    manifest.json                   which checkpoints are complete, which is the best; rewritten last, atomically
    step-00001234/model.safetensors
                  ema.safetensors   with a weight average only
                  state.pt          optimizer, loss scaler, schedule, sums: tensors and plain values only
                  checkpoint.json   position, validation figures, SHA-256 of the files above

Loading never unpickles objects: safetensors for weights, ``torch.load(weights_only=True)`` for the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from densenet_dist.errors import CheckpointError, StorageError
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, RunFolder, sync

_MANIFEST = f"{CHECKPOINTS_FOLDER}/manifest.json"
_WEIGHTS, _AVERAGE, _STATE, _META = "model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"
_FILES = (_WEIGHTS, _AVERAGE, _STATE)
_UNREADABLE = (
    *(OSError, StorageError, SafetensorError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError),  # torch.load
    *(ValueError, KeyError, TypeError, AttributeError),  # JSON that is not what was written
)

Kind: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


@dataclass(frozen=True)
class Position:
    """How far a run has come: the next step to take.

    Attributes:
        epoch: epochs completed.
        step: steps of the current epoch completed.
        global_step: all steps completed.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint in the manifest.

    Attributes:
        name: its folder.
        position: where training goes on from it.
        metrics: validation figures, for checkpoints at an epoch's end.
    """

    name: str
    position: Position
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        model: the state dict of the plain model.
        average: that of the averaged model, if there is one.
        state: nested plain values and tensors: optimizer, scaler, course, sums.
        position: where training goes on.
        metrics: validation figures, at an epoch's end.
        validated: whether that is known; a state from before a validation must not replace the one after it.
    """

    model: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    state: dict[str, Any]
    position: Position
    metrics: dict[str, float]
    validated: bool = True


class CheckpointStore:
    """The checkpoints of one run. One rank saves; every rank may load."""

    def __init__(self, run: RunFolder, *, keep: int = 1, monitor: str = "val/top1") -> None:
        self.run, self.keep, self.monitor = run, keep, monitor
        self.entries: list[Entry] = []
        self.best: str | None = None
        self.damaged: list[str] = []
        self.rebuilt: str | None = None
        """Why the list of checkpoints was rebuilt from their folders, if it was."""
        if run.exists(_MANIFEST):
            self._read_manifest(run.fetch(_MANIFEST))
        else:
            self._rebuild(f"the list of checkpoints {run.uri}/{_MANIFEST} is missing")

    def plan(self, snapshot: Snapshot) -> Entry:
        """Decide which checkpoints there are once this one is written; `entries` and `best` say so at once."""
        # Names are used once: a folder is never replaced by another while the manifest lists it.
        name = f"step-{snapshot.position.global_step:08d}" + ("" if snapshot.validated else "-trained")
        entry = Entry(name, snapshot.position, snapshot.metrics)
        self.entries = [other for other in self.entries if other.name != entry.name] + [entry]
        self.best = self._judge()
        self.entries = [e for e in self.entries if e in self.entries[-self.keep :] or e.name == self.best]
        return entry

    def write(self, snapshot: Snapshot, planned: Entry) -> None:
        """Write a checkpoint and the list as planned; until that is done, nothing else may be planned.

        Raises:
            StorageError: where it cannot be written, or the folder is another job's by now; the checkpoints before it
                stay whole.
        """
        folder = f"{CHECKPOINTS_FOLDER}/{planned.name}"
        self.run.guard()
        try:
            _write_folder(self.run.path / folder, snapshot)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise StorageError(
                f"the checkpoint {self.run.uri}/{folder} cannot be written: {error}\n"
                "  the checkpoints before it are whole: make room, then go on with --resume"
            ) from error
        # The description comes last: on an object store it says that the upload is complete.
        self.run.publish(*(f"{folder}/{name}" for name in (*_FILES, _META)))
        self.write_list()
        self._sweep()

    def write_list(self) -> None:
        """Write manifest.json.

        Raises:
            StorageError: it cannot be written, or another job has taken over the folder.
        """
        self.run.guard()  # writing a checkpoint may have taken long
        content = {"format": 1, "best": self.best, "checkpoints": [asdict(entry) for entry in self.entries]}
        self.run.write(_MANIFEST, json.dumps(content, indent=1) + "\n")

    def latest(self) -> Entry | None:
        """The newest complete checkpoint."""
        return self.entries[-1] if self.entries else None

    def best_or_latest(self) -> Entry | None:
        """The best checkpoint; the newest one if none has validation figures."""
        return next((entry for entry in self.entries if entry.name == self.best), self.latest())

    def load_latest(self) -> Snapshot | None:
        """Load the newest checkpoint that is intact.

        Damaged ones are removed from `entries`, the best one too, and described in `damaged`.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        newest = self._load_first_intact(self.latest)
        for entry in [other for other in self.entries[:-1] if other.name == self.best]:
            self._load_or_strike(entry)
        return newest

    def load_best(self) -> Snapshot | None:
        """Load the best checkpoint that is intact, or the newest one if none has validation figures.

        Damaged ones are removed from `entries` and described in `damaged`.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        return self._load_first_intact(self.best_or_latest)

    def load(self, entry: Entry) -> Snapshot:
        """Verify and read one checkpoint onto the CPU.

        Raises:
            CheckpointError: where a file is missing or is not what was written.
        """
        relative = f"{CHECKPOINTS_FOLDER}/{entry.name}"
        try:
            folder = self.run.fetch(relative)
            meta = json.loads((folder / _META).read_text())
            if (meta["position"], meta["metrics"]) != (asdict(entry.position), entry.metrics):
                raise CheckpointError(f"the checkpoint file {self.run.uri}/{relative}/{_META} is damaged")
            for name in {_WEIGHTS, _STATE, *meta["sha256"]}:
                # Of other names one may lead to a device, or a pipe, that is read without end.
                if name not in _FILES or _sha256(folder / name) != meta["sha256"][name]:
                    raise CheckpointError(f"the checkpoint file {self.run.uri}/{relative}/{name} is damaged")
            average = load_file(folder / _AVERAGE) if _AVERAGE in meta["sha256"] else None
            if _unpacked_size(folder / _STATE) > (folder / _STATE).stat().st_size:
                raise ValueError(f"{_STATE} is compressed, and could unpack to any size")
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            return Snapshot(load_file(folder / _WEIGHTS), average, state, entry.position, entry.metrics)
        except _UNREADABLE as error:
            raise CheckpointError(f"the checkpoint {self.run.uri}/{relative} cannot be read: {error}") from error

    def _load_first_intact(self, choose: Callable[[], Entry | None]) -> Snapshot | None:
        self.damaged.clear()
        found = None
        while found is None and (entry := choose()) is not None:
            found = self._load_or_strike(entry)
        if self.damaged and found is None:
            raise CheckpointError("no checkpoint of this run is whole:\n  " + "\n  ".join(self.damaged))
        return found

    def _load_or_strike(self, entry: Entry) -> Snapshot | None:
        try:
            return self.load(entry)
        except CheckpointError as error:
            self.damaged.append(str(error))
            self.entries.remove(entry)
            self.best = self._judge()
            return None

    def _judge(self) -> str | None:
        """The name of the best checkpoint in the list; the older of two that are equally good."""
        best = best_record([{**entry.metrics, "name": entry.name} for entry in self.entries], self.monitor)
        return None if best is None else best["name"]

    def _sweep(self) -> None:
        """Delete the checkpoints that are not in the list, those that a killed process left as well."""
        for name in self.run.names(CHECKPOINTS_FOLDER) - {entry.name for entry in self.entries}:
            if name.startswith(("step-", ".step-")):
                self.run.remove(f"{CHECKPOINTS_FOLDER}/{name}")

    def _read_manifest(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            self.best = content["best"]
            self.entries = [_entry(item["name"], item) for item in content["checkpoints"]]
            if self.best not in {None, *(entry.name for entry in self.entries)}:
                raise ValueError(f"the best, {self.best}, is not among them")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"the list of checkpoints {self.run.uri}/{_MANIFEST} is damaged: {error}"
            self._rebuild(problem)
            if not self.entries:
                raise CheckpointError(problem) from error

    def _rebuild(self, problem: str) -> None:
        """List the checkpoints that have a readable description, the oldest first."""
        found = []
        for name in self.run.names(CHECKPOINTS_FOLDER):
            with suppress(*_UNREADABLE):
                meta = json.loads(self.run.fetch(f"{CHECKPOINTS_FOLDER}/{name}/{_META}").read_text())
                found.append(_entry(name, meta))
        self.entries = sorted(found, key=lambda entry: (entry.position.global_step, entry.position.epoch))
        self.best = self._judge()
        self.rebuilt = problem if self.entries else None


def best_record(records: Sequence[dict[str, Any]], monitor: str) -> dict[str, Any] | None:
    """The first record with the best ``val/top1`` or ``val/loss``; None if none has a finite one."""
    validated = [record for record in records if -math.inf < record.get(monitor, math.nan) < math.inf]
    pick = max if monitor.endswith("top1") else min
    return pick(validated, key=lambda record: record[monitor]) if validated else None


def _entry(name: str, said: dict[str, Any]) -> Entry:
    """What the list, or a checkpoint itself, says of it. Anybody may have written that, and the name becomes a path."""
    entry = Entry(name, Position(**said["position"]), said["metrics"])
    if not re.fullmatch(r"step-[0-9a-z-]+", name):
        raise ValueError(f"{name[:80]!r} is no name of a checkpoint")
    if not all(type(value) is int and 0 <= value <= sys.maxsize for value in asdict(entry.position).values()):
        raise ValueError(f"the position of {name} is not three counts of epochs and steps")
    if not all(type(value) in (int, float) for value in entry.metrics.values()):
        raise ValueError(f"the metrics of {name} are no numbers")
    return entry


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict, or say exactly how it does not fit.

    Raises:
        CheckpointError: naming the tensors that are missing, unexpected, of another shape or dtype, or negative.
    """
    own = model.state_dict()
    require_same_tensors(kinds_of(weights), kinds_of(own), f"{origin} does not fit this model")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and (tensor < 0).any():
            raise CheckpointError(f"{origin} is damaged: {name} is negative")
    model.load_state_dict(dict(weights))


def kinds_of(weights: Mapping[str, Tensor]) -> dict[str, Kind]:
    """The dtype and shape of each tensor, as `require_same_tensors` compares them."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


def require_same_tensors(found: Mapping[str, Kind], wanted: Mapping[str, Kind], problem: str) -> None:
    """Check that a file holds exactly the tensors of a model.

    Raises:
        CheckpointError: `problem`, and the tensors that are missing, unexpected, or of another shape or dtype.
    """
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in this model: {ascii(name)[1:-1][:200]}" for name in found if name not in wanted]
    lines += [
        f"{name}: {_said(found[name])} there, {_said(kind)} in this model"
        for name, kind in wanted.items()
        if name in found and found[name] != kind
    ]
    if lines:
        shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise CheckpointError(f"{problem}:\n  " + "\n  ".join(shown))


def _said(kind: Kind) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} {list(kind[1])}"


def _write_folder(folder: Path, snapshot: Snapshot) -> None:
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(_contiguous(snapshot.model), beside / _WEIGHTS)
        if snapshot.average is not None:
            save_file(_contiguous(snapshot.average), beside / _AVERAGE)
        torch.save(snapshot.state, beside / _STATE)
        digests = {file.name: _sha256(file) for file in sorted(beside.iterdir())}
        meta = {"format": 1, "position": asdict(snapshot.position), "metrics": snapshot.metrics, "sha256": digests}
        (beside / _META).write_text(json.dumps(meta, indent=1) + "\n")
        mode = (beside / _META).stat().st_mode
        for file in beside.iterdir():
            with open(file, "rb+") as handle:
                os.fchmod(handle.fileno(), mode)  # safetensors makes files that their owner alone may read
                os.fsync(handle.fileno())
        sync(beside)
        if folder.exists():  # left by an attempt that died between its rename and the manifest
            shutil.rmtree(folder)
        os.replace(beside, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _unpacked_size(path: Path) -> int:
    """The bytes in the records of a file of `torch.save`, which does not compress them."""
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
