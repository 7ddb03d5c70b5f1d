"""Whether everybody means the same pictures: those of a folder are numbered by their names."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch.distributed as dist

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.errors import DataError
from densenet_dist.train.context import RunContext


def digest_of_files(dataset: Dataset) -> str | None:
    """What tells the pictures of a set of files from other ones, by their names; None for images in memory."""
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
