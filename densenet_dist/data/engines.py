"""The engines by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from densenet_dist.data.datasets import Split
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.requests import Engine
from densenet_dist.data.substitutes import Substitutes
from densenet_dist.data.torch_loader import TorchEngine

ENGINES = ("torch", "dali")


def make_engine(
    name: str,
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    prefetch: int = 2,
    threads: int = 1,
    on_bad_image: Literal["error", "skip"] = "error",
) -> Engine:
    """What makes the pixels of the images of `split`.

    Args:
        name: one of `ENGINES`. DALI is imported only when it is named.
        mean: of each channel, for images in [0, 1].
        std: likewise.
        device: where batches are made.
        prefetch: batches made ahead.
        threads: that decode files, or all of DALI's on the CPU.
        on_bad_image: what becomes of pictures in files that cannot be read any more.

    Raises:
        EnvironmentProblem: DALI is named, but is not installed or cannot work on the device.
    """
    make: type[Engine] = TorchEngine
    if name == "dali":
        from densenet_dist.data.dali_loader import DaliEngine

        make = DaliEngine
    substitutes = None
    if isinstance(split.images, ImageFiles):
        substitutes = Substitutes(split.images, split.labels, on_bad_image)
    return make(split.images, mean, std, torch.device(device), prefetch, threads, substitutes)
