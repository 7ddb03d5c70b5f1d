"""The content of one checkpoint: reading and writing its files, and checking that it fits a run.

``step-00001234/`` holds::

    model.safetensors
    ema.safetensors   with a weight average only
    state.pt          optimizer, loss scaler, learning rate, sums: tensors and plain values only
    checkpoint.json   position, validation figures, SHA-256 of the files above

Loading never unpickles objects: safetensors for weights, ``torch.load(weights_only=True)`` for the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from densenet_dist.config import to_dict
from densenet_dist.data.datasets import Dataset
from densenet_dist.environment import unique_suffix
from densenet_dist.errors import CheckpointError, StorageError, first_lines
from densenet_dist.run_folder import sync
from densenet_dist.schema import Config

WEIGHTS, AVERAGE, STATE, META = "model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"
FILES: Final = (WEIGHTS, AVERAGE, STATE, META)
"""In the order of upload: checkpoint.json is last and marks a complete upload."""
UNREADABLE: Final = (
    *(OSError, StorageError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError),  # torch.load
    *(ValueError, KeyError, TypeError, AttributeError),  # safetensors; JSON that is not what was written
)
"""The errors that reading damaged files can raise."""

_Count: TypeAlias = Annotated[int, Field(ge=0, le=sys.maxsize, strict=True)]
TensorSpec: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


@dataclass(frozen=True)
class Position:
    """The progress of a run: epochs completed, steps of the current epoch completed, and all steps completed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    epoch: _Count = 0
    step: _Count = 0
    global_step: _Count = 0

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return self.epoch + (self.step > 0)


@dataclass
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        model, average: the state dicts of the plain model, and of the averaged one if there is one.
        state: nested plain values and tensors: optimizer, scaler, learning rate, sums.
        position: where training resumes.
        metrics: validation figures, at the end of an epoch.
        validated: False for the state at the end of an epoch before its validation, which is stored under another name.
    """

    model: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    state: dict[str, Any]
    position: Position
    metrics: dict[str, float]
    validated: bool = True

    def copy(self) -> Snapshot:
        """Copy it to the CPU, so that training can continue while the copy is written."""

        def to_cpu(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)

        content = {"model": dict(self.model), "average": self.average and dict(self.average), "state": self.state}
        return replace(self, **tree_map_only(Tensor, to_cpu, content))


def read_snapshot(folder: Path, position: Position, metrics: dict[str, float]) -> Snapshot:
    """Verify and read the files of a checkpoint onto the CPU.

    Raises:
        CheckpointError: a file is not what was written; or one of `UNREADABLE` is raised.
    """
    meta = json.loads((folder / META).read_text())
    if (meta["position"], meta["metrics"]) != (asdict(position), metrics):
        raise CheckpointError(f"{META} is damaged")
    for name in {WEIGHTS, STATE, *meta["sha256"]}:
        # Other names could be paths to a device or a pipe, which would be read forever.
        if name not in (WEIGHTS, AVERAGE, STATE) or _sha256(folder / name) != meta["sha256"][name]:
            raise CheckpointError(f"{name} is damaged")
    average = _load(folder / AVERAGE) if AVERAGE in meta["sha256"] else None
    with zipfile.ZipFile(folder / STATE) as archive:  # `torch.save` does not compress
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > (folder / STATE).stat().st_size:
        raise CheckpointError(f"{STATE} is compressed, and could unpack to any size")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return Snapshot(_load(folder / WEIGHTS), average, state, position, metrics)


# Imported where needed, so that a GPU machine without safetensors can run the tests of the training step.
def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint. The rename at the end makes `folder` either complete or absent."""
    temporary = folder.with_name(f".{folder.name}.{unique_suffix()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _save(snapshot.model, temporary / WEIGHTS)
        if snapshot.average is not None:
            _save(snapshot.average, temporary / AVERAGE)
        torch.save(snapshot.state, temporary / STATE)
        digests = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        meta = {"format": 1, "position": asdict(snapshot.position), "metrics": snapshot.metrics, "sha256": digests}
        (temporary / META).write_text(json.dumps(meta, indent=1) + "\n")
        mode = (temporary / META).stat().st_mode
        for file in temporary.iterdir():
            with open(file, "rb+") as handle:
                os.fchmod(handle.fileno(), mode)  # safetensors creates files that only their owner can read
                os.fsync(handle.fileno())
        sync(temporary)
        if folder.exists():  # left by a process that died before it updated the manifest
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_CHANGEABLE: Final = ("block", "drop_rate", "weights", "pretrained")
"""Model settings that may differ between a checkpoint and the run: the weights fit all the same."""


def identity_of(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return the values that must be equal in a checkpoint and the run.

    Those under ``within an epoch`` are compared only for a checkpoint within an epoch: they set the order of images.
    """
    model = {f"model.{key}": value for key, value in to_dict(config)["model"].items() if key not in _CHANGEABLE}
    model |= {f"options.model.{key}": value for key, value in config.options.model.items()}
    images = {"data set": dataset.name, "class names": list(dataset.class_names), "image side": dataset.image_size}
    order = {
        "seed": config.seed,
        "data.limit": config.data.limit,
        "data.sampler": config.data.sampler,
        "data.val_fraction": config.data.val_fraction,
        "train.global_batch_size": config.train.global_batch_size,
    }
    name = config.train.optimizer.name
    train: dict[str, Any] = {
        "train.freeze": to_dict(config)["train"]["freeze"],
        "train.head_lr": config.train.head_lr is not None,
        "optimizer": "adam" if name == "adamw" else name,  # they have the same state
    }
    return {"always": model | images | train, "within an epoch": order}


def require_same(snapshot: Snapshot, here: dict[str, dict[str, Any]], origin: str) -> None:
    """Raise a CheckpointError with every difference, unless a checkpoint fits this run, whose identity is `here`."""
    there = snapshot.state["identity"]
    kinds = ("always", "within an epoch") if snapshot.position.step else ("always",)
    # Keys that an older version did not write are not compared.
    pairs = [(key, there[kind].get(key, value), value) for kind in kinds for key, value in here.get(kind, {}).items()]
    different = [f"  {key}: {_shown(one)} there, {_shown(other)} here" for key, one, other in pairs if one != other]
    if different:
        raise CheckpointError(
            "\n".join([f"{origin} does not fit this run:", *different])
            + "\n  restore the config.yaml of that run, or start a new run with name=NEW"
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape or dtype.
    """
    own = model.state_dict()
    require_same_tensors(tensor_specs(weights), tensor_specs(own), f"{origin} does not fit this model")
    model.load_state_dict(dict(weights))


def tensor_specs(weights: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the dtype and shape of each tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


def require_same_tensors(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], problem: str) -> None:
    """Raise a CheckpointError with `problem` and every difference, unless a file has exactly the tensors of a model."""
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in this model: {ascii(name)[1:-1][:200]}" for name in found if name not in wanted]
    lines += [
        f"{name}: {_describe(found[name])} there, {_describe(kind)} in this model"
        for name, kind in wanted.items()
        if name in found and found[name] != kind
    ]
    if lines:
        raise CheckpointError("\n  ".join([f"{problem}:", *first_lines(lines, 8)]))


def _describe(kind: TensorSpec) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} {list(kind[1])}"
