"""Pixels made with torch ops, on a CPU or a GPU.

Images in memory lie on the device as a whole, and a batch is gathered from them; pictures in files are read, decoded
and resized by threads on the CPU. Then tones are changed, the images warped, normalised, and holes cut; `augment` says
how. On a GPU every op is queued without waiting for it, and a whole epoch's parameters go up in a few copies at its
start. On a CPU, or where files are read, one background thread works ahead of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data import torch_ops
from densenet_dist.data.augment import Padding
from densenet_dist.data.background import map_ahead
from densenet_dist.data.engine import Batches, Engine, Recipe, Request, upload
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.substitutes import read_all

_CPU_PIECE = 64
"""Images that a CPU works on at a time: few enough for its cache, whatever the batch's size (docs/log.md)."""


class TorchEngine(Engine):
    """Makes pixels with torch ops. Images that lie on a GPU need no thread that works ahead."""

    def __post_init__(self) -> None:
        if isinstance(self.images, ImageFiles):
            self._source: _Files | _Resident = _Files(self.images, self.device, self.threads)
        else:
            self._source = _Resident(self.images, self.device)
            if self.device.type == "cuda":
                self.prefetch = 0
        levels = 255.0 * np.asarray(self.std, dtype=np.float64)
        self._scale = self._row(1.0 / levels)
        self._shift = self._row(-255.0 * np.asarray(self.mean, dtype=np.float64) / levels)
        size = self.image_size
        self._centres = (2.0 * torch.arange(size, dtype=torch.float32, device=self.device) + 1.0) / size - 1.0

    def batches(self, request: Callable[[int], Request], largest: int) -> Batches:
        """As `engine.Engine.batches`, without any state."""

        def make(number: int) -> Tensor:
            return self._pixels(request(number))

        return lambda first, last: map_ahead(make, range(first, last), self.prefetch)

    def _row(self, channels: npt.NDArray[np.float64]) -> Tensor:
        """(3,) values repeated for every pixel of a row, (W * 3,) float32 on the device."""
        return upload(np.tile(channels, self.image_size).astype(np.float32), self.device)

    def _pixels(self, request: Request) -> Tensor:
        """(m, 3, H, W) float32, channels_last, normalised."""
        pieces = request.pieces(_CPU_PIECE) if self.device.type == "cpu" else [request]
        if len(pieces) == 1:
            return self._piece(request)
        images = torch.empty(request.size, self.image_size, self.image_size, 3).permute(0, 3, 1, 2)
        start = 0
        for piece in pieces:
            stop = start + piece.size
            images[start:stop] = self._piece(piece)
            start = stop
        return images

    def recipe(self, request: Request) -> Recipe | None:
        """As `engine.Engine.recipe`, of images that lie on the device; tones are sorted on the host."""
        source, todo = self._source, request.parameters
        if not isinstance(source, _Resident) or todo.tone is not None:
            return None
        warped, cut = todo.affine is not None, todo.hole is not None
        names = ["rows"] + ["theta"] * warped + ["hole"] * cut

        def make(rows: Tensor, *rest: Tensor) -> Tensor:
            theta, hole = rest[0] if warped else None, rest[-1] if cut else None
            return self._transformed(source.pick(rows), theta, todo.padding, hole)

        return Recipe(tuple(request.tensor(name, self.device) for name in names), make)

    def _piece(self, request: Request) -> Tensor:
        images, todo = self._source.read(request), request.parameters
        if todo.tone is not None:
            strength = request.tensor("strength", self.device)
            torch_ops.change_tones(images, request.array("tone"), strength, lambda rows: upload(rows, self.device))
        theta = None if todo.affine is None else request.tensor("theta", self.device)
        hole = None if todo.hole is None else request.tensor("hole", self.device)
        return self._transformed(images, theta, todo.padding, hole)

    def _transformed(self, images: Tensor, theta: Tensor | None, padding: Padding, hole: Tensor | None) -> Tensor:
        """Warped, normalised, and with holes cut."""
        if theta is not None:
            images = torch_ops.warp(images, theta, self._centres, padding)
        images = images.contiguous(memory_format=torch.channels_last)
        # By whole rows: broadcasting three channels in the innermost place is 10 times slower on a CPU. And with two
        # roundings, never a fused one: the bits stay the same for every device, thread count and batch size.
        rows_of_channels = images.permute(0, 2, 3, 1).view(-1, self.image_size, 3 * self.image_size)
        rows_of_channels.mul_(self._scale).add_(self._shift)
        if hole is not None:
            torch_ops.cut_holes(images, hole)
        return images


class _Resident:
    """Images that lie on the device as a whole, (n, H, W, 3) uint8; on a CPU the memory is shared, not copied."""

    def __init__(self, images: npt.NDArray[np.uint8], device: torch.device) -> None:
        self._device = device
        self._images = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(device)

    def read(self, request: Request) -> Tensor:
        """(m, 3, H, W) float32 in grey levels on the device, in memory of its own."""
        return self.pick(request.tensor("rows", self._device))

    def pick(self, rows: Tensor) -> Tensor:
        """`read`, by places in the split, (m,) int64."""
        # index_select copies whole images; indexing by [rows] goes byte by byte and is 15 times slower on a CPU.
        return self._images.index_select(0, rows).permute(0, 3, 1, 2).float()


class _Files:
    """Pictures in files, read and decoded on the CPU by a pool of threads."""

    def __init__(self, files: ImageFiles, device: torch.device, threads: int) -> None:
        self._files, self._device, self._threads = files, device, threads

    def read(self, request: Request) -> Tensor:
        """As `_Resident.read`."""
        rows, windows = request.array("rows").tolist(), request.array("window").tolist()
        size = self._files.image_size
        pinned = self._device.type == "cuda"
        images = torch.empty(len(rows), size, size, 3, pin_memory=pinned).permute(0, 3, 1, 2)

        def load(place: int, row: int) -> None:
            left, top, width, height = windows[place]
            picture = self._files.decode(row)
            images[place] = torch_ops.resize(picture[:, top : top + height, left : left + width], size)

        with ThreadPoolExecutor(self._threads, "densenet-dist-decode") as pool:
            read_all(rows, load, pool.map)
        return images.to(self._device, non_blocking=True)
