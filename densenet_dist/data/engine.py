"""The interface between loaders and engines: a loader requests images of an epoch, an engine produces their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data.augment import Parameters
from densenet_dist.data.image_files import ImageFiles, Split

ENGINES: Final = ("torch", "dali")


class Epoch:
    """The images of one epoch in order, with everything an engine needs to know about each of them.

    Attributes:
        indices: (n,) int64, indices into the split.
        labels: (n,) int64.
        parameters: augmentation parameters, in the same order.
    """

    def __init__(
        self, indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], parameters: Parameters, image_size: int
    ) -> None:
        self.indices, self.labels, self.parameters = indices, labels, parameters
        self._image_size = image_size
        self._tensors: dict[str, Tensor] = {}

    @cached_property
    def theta(self) -> npt.NDArray[np.float32]:
        """The warps for `torch.nn.functional.affine_grid(align_corners=False)`, (n, 2, 3) float32.

        torch's coordinates are in [-1, 1]: theta = [S A S^-1 | S b] with S = diag(2 / W, 2 / H); S A S^-1 = A as W = H.
        """
        affine = self.parameters.affine
        return np.concatenate([affine[:, :, :2], affine[:, :, 2:] * np.float32(2 / self._image_size)], axis=2)

    @cached_property
    def matrix(self) -> npt.NDArray[np.float32]:
        """The warps for `nvidia.dali.fn.warp_affine`, (n, 2, 3) float32.

        DALI's coordinates are in pixels from the corner, with pixel centers at +0.5:
        M = [A | b + c - A c] with c = (W / 2, H / 2).
        """
        matrix = self.parameters.affine[:, :, :2].astype(np.float64)
        center = np.full(2, self._image_size / 2)
        shift = self.parameters.affine[:, :, 2] + center - matrix @ center
        return np.concatenate([matrix, shift[:, :, None]], axis=2).astype(np.float32)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return the attribute `name` of this object or of its parameters."""
        found: npt.NDArray[Any] = getattr(self if hasattr(self, name) else self.parameters, name)
        return found

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Return `array(name)` on the engine's device; it is copied once per epoch, without waiting."""
        if name not in self._tensors:
            self._tensors[name] = upload(self.array(name), device)
        return self._tensors[name]


class Request(NamedTuple):
    """Some images of an epoch, as concatenated ranges of positions. A single range is read without a copy."""

    epoch: Epoch
    parts: tuple[range, ...]

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(map(len, self.parts))

    def pieces(self, size: int) -> list[Request]:
        """Split into requests of at most `size` images."""
        pieces = [part[start : start + size] for part in self.parts for start in range(0, len(part), size)]
        return [Request(self.epoch, (piece,)) for piece in pieces]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return the rows of `Epoch.array` that belong to this request."""
        whole = self.epoch.array(name)
        parts = [whole[part.start : part.stop : part.step] for part in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Return the rows of `Epoch.tensor` that belong to this request."""
        whole = self.epoch.tensor(name, device)
        parts = [whole[part.start : part.stop : part.step] for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


Recipe: TypeAlias = tuple[tuple[Tensor, ...], Callable[..., Tensor]]
"""See `Engine.recipe`."""

BatchProducer: TypeAlias = Callable[[int, int], Iterator[Tensor]]
"""Yields the pixels of requests `first` to `last`, exclusive: (m, 3, H, W) float32 in channels_last memory for each.

Raises DataError for an image file that has become unreadable.
"""


class Engine:
    """Produces the pixels of the images of one split; several loaders may share it.

    Args:
        mean, std: of each channel, for images in [0, 1].
        prefetch: number of batches produced ahead.
        threads: threads that decode files, or all CPU threads of DALI.

    Attributes:
        files: the split's images if they are files, else None.
        resident: images in memory (n, H, W, 3) uint8, kept on the device, else None.
        image_size: side of the square images in pixels.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        threads: int = 1,
    ) -> None:
        self.split, self.mean, self.std = split, mean, std
        self.device, self.prefetch, self.threads = torch.device(device), prefetch, threads
        self.files: ImageFiles | None = None
        self.resident: Tensor | None = None
        if isinstance(split.images, ImageFiles):
            self.files = split.images
        else:  # on a CPU the memory is shared, not copied
            self.resident = torch.from_numpy(np.require(split.images, requirements=["C", "W"])).to(self.device)
        self.image_size = split.image_size

    def recipe(self, request: Request) -> Recipe | None:
        """Return tensors on the device, and the function that computes a request's pixels from such tensors.

        The function is pure and runs on the device alone, so a CUDA graph can contain it; it also accepts tensors of
        any other request of the same size. Returns None if the host takes part in producing the pixels.
        """
        return None

    def batches(self, request: Callable[[int], Request], largest: int) -> BatchProducer:
        """Return a function that produces one loader's batches, `request(number)` each, of at most `largest` images."""
        raise NotImplementedError


def engine_class(name: str) -> type[Engine]:
    """Return the engine called `name`, one of `ENGINES`.

    Its constructor raises EnvironmentProblem if DALI is not installed or cannot run on the device.
    """
    if name == "dali":
        from densenet_dist.data.dali_loader import DaliEngine

        return DaliEngine
    from densenet_dist.data.torch_loader import TorchEngine

    return TorchEngine


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return `array` as a tensor on `device`, without waiting for the copy; on a CPU it shares the memory if it can."""
    # torch refuses negative strides, and warns about read-only memory: such arrays are copied.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
