"""Which run a checkpoint belongs to: another model's, another data set's or another batch size's is refused.

Images of a folder are numbered by their names: all ranks, and a resumed run, must see the same ones.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final

import torch.distributed as dist

from densenet_dist.config import to_dict
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.errors import CheckpointError, DataError
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.snapshot import Snapshot

_CHANGEABLE: Final = ("block", "drop_rate")
"""Settings of the model that its weights do not depend on."""


def identity_of(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What must be the same: ``always``, and ``within an epoch``, where the order of the images matters too."""
    model = {f"model.{key}": value for key, value in to_dict(config)["model"].items() if key not in _CHANGEABLE}
    images = {"data set": dataset.name, "class names": list(dataset.class_names), "image side": dataset.image_size}
    order = {
        "seed": config.seed,
        "data.limit": config.data.limit,
        "data.val_fraction": config.data.val_fraction,
        "train.global_batch_size": config.train.global_batch_size,
    }
    return {"always": model | images, "within an epoch": order}


def require_same(snapshot: Snapshot, here: dict[str, dict[str, Any]], origin: str) -> None:
    """Whether a checkpoint is of a run like this one.

    Args:
        snapshot: the checkpoint.
        here: `identity_of` this run.
        origin: what to call it in the error.

    Raises:
        CheckpointError: with every difference.
    """
    there = snapshot.state.get("identity")
    if there is None:
        return  # written before there was one
    kinds = ("always", "within an epoch") if snapshot.position.step else ("always",)
    # What an older version did not write is not compared.
    pairs = [(key, there[kind].get(key, value), value) for kind in kinds for key, value in here.get(kind, {}).items()]
    different = [f"  {key}: {_shown(one)} there, {_shown(other)} here" for key, one, other in pairs if one != other]
    if different:
        raise CheckpointError(
            "\n".join([f"{origin} does not fit this run:", *different])
            + "\n  give the run back its own config.yaml, or start a new one with name=NEW"
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def digest_of_files(dataset: Dataset) -> str | None:
    """Identify the images of a folder by their names; None for images in memory."""
    train, test = dataset.train.images, dataset.test.images
    if not (isinstance(train, ImageFiles) and isinstance(test, ImageFiles)):
        return None
    names = "\n".join([*train.names, "", *test.names])
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def require_same_files(dataset: Dataset, context: RunContext) -> None:
    """Pictures are numbered by their names: ranks that see other files would train on other images than agreed."""
    digest = digest_of_files(dataset)
    if digest is None or not dist.is_initialized():
        return
    found: list[Any] = [None] * context.world_size
    dist.all_gather_object(found, (os.uname().nodename, digest))
    if len({other for _, other in found}) > 1:
        raise DataError(
            "the nodes do not see the same pictures in data.root: "
            + ", ".join(f"rank {rank} on {node}" for rank, (node, _) in enumerate(found))
            + "\n  give data.root a folder that all nodes share, or copy the same files to each"
        )
