"""The torch engine: pixels computed with torch ops, on a CPU or a GPU.

Images in memory are kept on the device, and a batch is gathered from them; image files are read, decoded and resized by
threads on the CPU. Then tones are changed, the images warped and normalized, and holes cut, as drawn by `augment`.
On a GPU every op is queued without waiting, and the parameters of an epoch are copied once, at its start. On a CPU, or
with image files, one background thread works ahead of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densenet_dist.data import torch_ops
from densenet_dist.data.augment import Padding
from densenet_dist.data.background import map_ahead
from densenet_dist.data.engine import BatchProducer, Engine, Recipe, Request, upload
from densenet_dist.data.image_files import Split

_CPU_PIECE = 64
"""Images that a CPU processes at a time: few enough for its cache, whatever the batch size (docs/log.md)."""


class TorchEngine(Engine):
    """Engine of PyTorch operations; on a GPU, images in memory need no background thread."""

    def __init__(self, split: Split, **options: Any) -> None:
        super().__init__(split, **options)
        if self.resident is not None and self.device.type == "cuda":
            self.prefetch = 0
        size, levels = self.image_size, 255.0 * np.asarray(self.std, dtype=np.float64)
        factors = (1.0 / levels, -255.0 * np.asarray(self.mean, dtype=np.float64) / levels)
        # Repeated for every pixel of a row: (W * 3,) float32.
        self._scale, self._shift = (upload(np.tile(each, size).astype(np.float32), self.device) for each in factors)
        self._centers = (2.0 * torch.arange(size, dtype=torch.float32, device=self.device) + 1.0) / size - 1.0

    def batches(self, request: Callable[[int], Request], largest: int) -> BatchProducer:
        """See `Engine.batches`."""

        def make(number: int) -> Tensor:
            return self._pixels(request(number))

        return lambda first, last: map_ahead(make, range(first, last), self.prefetch)

    def recipe(self, request: Request) -> Recipe | None:
        """See `Engine.recipe`. None for image files and for tones, which need the host."""
        resident, parameters = self.resident, request.epoch.parameters
        if resident is None or parameters.tone is not None:
            return None
        operands = self._operands(request)
        names = tuple(operands)

        def make(indices: Tensor, *rest: Tensor) -> Tensor:
            named = dict(zip(names, rest, strict=True))
            return self._transformed(_gather(resident, indices), parameters.padding, **named)

        return (request.tensor("indices", self.device), *operands.values()), make

    def _pixels(self, request: Request) -> Tensor:
        """Compute the pixels of a request, (m, 3, H, W) float32, channels_last, normalized."""
        pieces = request.pieces(_CPU_PIECE) if self.device.type == "cpu" else [request]
        if len(pieces) == 1:
            return self._piece(request)
        images = torch.empty(request.size, self.image_size, self.image_size, 3).permute(0, 3, 1, 2)
        for rows, piece in zip(images.split([piece.size for piece in pieces]), pieces, strict=True):
            rows.copy_(self._piece(piece))
        return images

    def _piece(self, request: Request) -> Tensor:
        parameters = request.epoch.parameters
        if self.resident is not None:
            images = _gather(self.resident, request.tensor("indices", self.device))
        else:
            images = self._decode(request)
        if parameters.tone is not None:
            strength = request.tensor("strength", self.device)
            torch_ops.change_tones(images, request.array("tone"), strength, lambda array: upload(array, self.device))
        return self._transformed(images, parameters.padding, **self._operands(request))

    def _operands(self, request: Request) -> dict[str, Tensor]:
        """Return the tensors that `_transformed` needs for a request, by name."""
        parameters = request.epoch.parameters
        used = {"theta": parameters.affine is not None, "hole": parameters.hole is not None}
        return {name: request.tensor(name, self.device) for name, is_used in used.items() if is_used}

    def _decode(self, request: Request) -> Tensor:
        """Decode image files to the same form as `_gather`."""
        files, size = self.files, self.image_size
        assert files is not None
        indices, windows = request.array("indices").tolist(), request.array("window").tolist()
        pinned = self.device.type == "cuda"
        images = torch.empty(len(indices), size, size, 3, pin_memory=pinned).permute(0, 3, 1, 2)

        def load(position: int, index: int) -> None:
            left, top, width, height = windows[position]
            image = files.decode(index)
            images[position] = torch_ops.resize(image[:, top : top + height, left : left + width], size)

        with ThreadPoolExecutor(self.threads, "densenet-dist-decode") as pool:
            list(pool.map(load, range(len(indices)), indices))  # raises what a thread raised
        return images.to(self.device, non_blocking=True)

    def _transformed(
        self, images: Tensor, padding: Padding, theta: Tensor | None = None, hole: Tensor | None = None
    ) -> Tensor:
        """Warp and normalize images, and cut holes."""
        if theta is not None:
            images = torch_ops.warp(images, theta, self._centers, padding)
        images = images.contiguous(memory_format=torch.channels_last)
        # By whole rows: broadcasting three channels in the innermost dimension is 10 times slower on a CPU. Separate
        # mul_ and add_ (no fused multiply-add) give the same bits for every device, thread count and batch size.
        rows_of_channels = images.permute(0, 2, 3, 1).view(-1, self.image_size, 3 * self.image_size)
        rows_of_channels.mul_(self._scale).add_(self._shift)
        if hole is not None:
            images.masked_fill_(torch_ops.box_mask(hole, self.image_size), 0.0)
        return images


def _gather(images: Tensor, indices: Tensor) -> Tensor:
    """Copy images (n, H, W, 3) uint8 at `indices` (m,) int64 to (m, 3, H, W) float32 pixel values in [0, 255]."""
    # index_select copies whole images; indexing by [indices] goes byte by byte and is 15 times slower on a CPU.
    return images.index_select(0, indices).permute(0, 3, 1, 2).float()
