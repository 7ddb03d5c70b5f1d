"""Batches made with torch ops, on a CPU or a GPU: the whole data set lies on the device, and nothing else is loaded.

A batch is gathered from the uint8 images, warped, and normalised last; `plan` says which images and how. On a GPU every
op is queued without waiting for it, and a whole epoch's order, labels and warps go up in three copies at its start. On
a CPU one background thread works ahead of the consumer.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_dist.data.datasets import Split
from densenet_dist.data.plan import BatchPlan, Padding, draw_affine, epoch_order, rank_slice
from densenet_dist.errors import ConfigError


class Batch(NamedTuple):
    """What one rank gets of one global batch.

    Attributes:
        images: (n, 3, H, W) float32 in channels_last memory, normalised.
        labels: (n,) int64.
        global_size: images of the global batch, over all ranks.
    """

    images: Tensor
    labels: Tensor
    global_size: int


class TrainLoader:
    """The training batches of one rank; the global batches are the same for every world size.

    Args:
        split: the data set's whole training split; augmentation is drawn by an image's place in it.
        indices: (n,) int64, the images to train on.
        global_batch_size: images a step over all ranks.
        augmentation: one of `plan.AUGMENTATIONS`.
        mean: of each channel, for images in [0, 1].
        std: likewise.
        device: where the data set lies and batches are made.
        prefetch: batches made ahead by a thread on a CPU; 0 for no thread. A GPU needs none.

    Raises:
        ConfigError: some global batch has too few images to give each rank one.
    """

    def __init__(
        self,
        split: Split,
        indices: npt.NDArray[np.int64],
        *,
        global_batch_size: int,
        augmentation: str,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        self._plan = BatchPlan(len(indices), global_batch_size)
        if self._plan.smallest < world_size:
            raise ConfigError(
                f"{len(indices)} training images in global batches of {global_batch_size} leave a batch of "
                f"{self._plan.smallest} for {world_size} ranks: choose a batch size of at least {8 * world_size}, "
                "or use fewer ranks"
            )
        self._images = _DeviceImages(split.images, mean, std, torch.device(device))
        self._labels = split.labels
        self._indices = indices
        self._augmentation = augmentation
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._prefetch = prefetch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same on every rank."""
        return self._plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from global step `start_step` on; the same ones as after skipping so many.

        Raises:
            IndexError: the epoch has fewer steps.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise IndexError(f"step {start_step} of an epoch of {self.steps_per_epoch} steps")
        images = self._images
        order = epoch_order(self._indices, self._seed, epoch)
        affine = draw_affine(self._augmentation, self._seed, epoch, len(self._labels), images.size)
        theta = None if affine is None else images.upload(affine.torch_theta(images.size)[order])
        padding: Padding = "border" if affine is None else affine.padding
        rows, labels = images.upload(order), images.upload(self._labels[order])

        def mine(batch: Tensor) -> Tensor:
            return rank_slice(batch, self._rank, self._world_size)

        def make(step: int) -> Batch:
            start, stop = self._plan.bounds(step)
            pixels = images.batch(mine(rows[start:stop]), None if theta is None else mine(theta[start:stop]), padding)
            return Batch(pixels, mine(labels[start:stop]), stop - start)

        return _made_ahead(make, range(start_step, self.steps_per_epoch), images.depth(self._prefetch))


class EvalLoader:
    """Batches of one rank for evaluation: over all ranks every image once, in order, none warped.

    Rank r of w takes `[r::w]` of each stretch of `batch_size * w` images. At the end there may be nothing left for a
    rank, which then has one batch fewer than others: no batch is empty.

    Args:
        split: the split to read from.
        indices: (n,) int64, the images to evaluate, in this order.
        batch_size: images a step on this rank.
        mean: of each channel, for images in [0, 1].
        std: likewise.
        device: where the data set lies and batches are made.
        prefetch: batches made ahead by a thread on a CPU; 0 for no thread. A GPU needs none.
    """

    def __init__(
        self,
        split: Split,
        indices: npt.NDArray[np.int64],
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        self._images = _DeviceImages(split.images, mean, std, torch.device(device))
        self._indices = indices
        self._labels = split.labels[indices]
        self._stride = batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._prefetch = prefetch

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-(len(self._indices) - self._rank) // self._stride)

    def __iter__(self) -> Iterator[Batch]:
        images, count = self._images, len(self._indices)
        rows, labels = images.upload(self._indices), images.upload(self._labels)

        def make(step: int) -> Batch:
            start, stop = step * self._stride, min((step + 1) * self._stride, count)
            pixels = images.batch(rank_slice(rows[start:stop], self._rank, self._world_size))
            return Batch(pixels, rank_slice(labels[start:stop], self._rank, self._world_size), stop - start)

        return _made_ahead(make, range(len(self)), images.depth(self._prefetch))


class _DeviceImages:
    """The images of one split on one device, and the ops that turn rows of them into a normalised batch.

    Args:
        images: (n, H, W, 3) uint8, H = W; on a CPU the memory is shared, not copied.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        self.device = device
        self.size: int = images.shape[1]
        self._pixels = _tensor(images).to(device)
        levels = 255.0 * np.asarray(std, dtype=np.float64)
        self._scale = self._row(1.0 / levels)
        self._shift = self._row(-255.0 * np.asarray(mean, dtype=np.float64) / levels)
        self._centres = (2.0 * torch.arange(self.size, dtype=torch.float32, device=device) + 1.0) / self.size - 1.0

    def _row(self, channels: npt.NDArray[np.float64]) -> Tensor:
        """(3,) values repeated for every pixel of a row, (W * 3,) float32 on the device."""
        return _tensor(np.tile(channels, self.size).astype(np.float32)).to(self.device)

    def depth(self, prefetch: int) -> int:
        """How many batches a thread should make ahead: none on a GPU, whose queue of kernels already runs ahead."""
        return prefetch if self.device.type == "cpu" else 0

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """`array` on the device, without waiting for the copy."""
        tensor = _tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def batch(self, rows: Tensor, theta: Tensor | None = None, padding: Padding = "border") -> Tensor:
        """Rows (n,) int64 as (n, 3, H, W) float32, channels_last, warped by theta (n, 2, 3) if given, normalised."""
        # index_select copies whole images; indexing by [rows] goes byte by byte and is 15 times slower on a CPU.
        images = self._pixels.index_select(0, rows).permute(0, 3, 1, 2).float()
        if theta is not None:
            images = warp(images, theta, self._centres, padding)
        images = images.contiguous(memory_format=torch.channels_last)
        # By whole rows: broadcasting three channels in the innermost place is 10 times slower on a CPU. And with two
        # roundings, never a fused one: the bits stay the same for every device, thread count and batch size.
        rows_of_channels = images.permute(0, 2, 3, 1).view(-1, self.size, 3 * self.size)
        rows_of_channels.mul_(self._scale).add_(self._shift)
        return images


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """`array` as a tensor on the CPU, which shares its memory where it can."""
    # torch takes no negative strides and warns of memory that cannot be written: such an array is copied.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def warp(images: Tensor, theta: Tensor, centres: Tensor, padding: Padding) -> Tensor:
    """Warps each image bilinearly by its own affine map, in float32 even under autocast.

    The grid is that of `affine_grid(align_corners=False)`, but sums two broadcast products instead of multiplying
    matrices: 20 times faster on a CPU, exact for whole-pixel shifts, and out of reach of TF32 and autocast, which would
    move pixels by whole grey levels.

    Args:
        images: (n, 3, H, W) float32, H = W.
        theta: (n, 2, 3) float32, `plan.Affine.torch_theta`.
        centres: (W,) float32, the pixel centres in [-1, 1].
        padding: "border" repeats the border, "zeros" is black.

    Returns:
        (n, 3, H, W) float32.
    """
    across = (theta[:, :, 0:1] * centres).transpose(1, 2)[:, None, :, :]  # (n, 1, W, 2)
    down = (theta[:, :, 1:2] * centres + theta[:, :, 2:3]).transpose(1, 2)[:, :, None, :]  # (n, H, 1, 2)
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(images, across + down, mode="bilinear", padding_mode=padding, align_corners=False)


def _made_ahead(make: Callable[[int], Batch], steps: range, depth: int) -> Iterator[Batch]:
    """`make(step)` for each step; with `depth` > 0 a thread keeps so many batches ready ahead of the consumer.

    An error in the thread is raised where its batch is asked for. A consumer that stops early ends the thread: it
    finishes at most the batch in hand.
    """
    if depth == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="densenet-dist-data")
    ahead: deque[Future[Batch]] = deque()
    try:
        for step in steps:
            ahead.append(pool.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
