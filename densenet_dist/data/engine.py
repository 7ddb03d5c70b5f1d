"""What a loader asks an engine for: some rows of an epoch, with everything that is to be done to each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data import augment
from densenet_dist.data.augment import Parameters
from densenet_dist.data.datasets import Split
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.substitutes import Substitutes

ENGINES: Final = ("torch", "dali")


class Epoch:
    """One epoch's images in their order: everything an engine needs to know of each, on the host and on its device.

    Attributes:
        rows: (n,) int64, places in the split.
        labels: (n,) int64.
        parameters: a row an image, in the same order.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        parameters: Parameters,
        image_size: int,
    ) -> None:
        self.rows, self.labels, self.parameters = rows, labels, parameters
        self._image_size = image_size
        self._tensors: dict[str, Tensor] = {}

    @cached_property
    def theta(self) -> npt.NDArray[np.float32]:
        """The warps as torch wants them."""
        return augment.torch_theta(self.parameters.affine, self._image_size)

    @cached_property
    def matrix(self) -> npt.NDArray[np.float32]:
        """The warps as DALI wants them."""
        return augment.dali_matrix(self.parameters.affine, self._image_size)

    def array(self, name: str) -> npt.NDArray[Any]:
        """An array by its name: of this object, or of its parameters."""
        found = getattr(self, name) if hasattr(self, name) else getattr(self.parameters, name)
        assert isinstance(found, np.ndarray)
        return found

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """The same on the engine's device: one copy an epoch, not waited for."""
        if name not in self._tensors:
            self._tensors[name] = upload(self.array(name), device)
        return self._tensors[name]


class Request(NamedTuple):
    """Some rows of an epoch, in the order in which an engine shall make them.

    Attributes:
        parts: slices, one after the other; one alone is a view, which costs nothing.
    """

    epoch: Epoch
    parts: tuple[slice, ...]

    @property
    def size(self) -> int:
        """Images asked for."""
        return sum(len(whole) for whole in self._ranges())

    def pieces(self, size: int) -> list[Request]:
        """The same in requests of at most `size` images."""
        cut = [whole[start : start + size] for whole in self._ranges() for start in range(0, len(whole), size)]
        return [Request(self.epoch, (slice(few.start, few.stop, few.step),)) for few in cut]

    def _ranges(self) -> list[range]:
        return [range(*part.indices(len(self.epoch.rows))) for part in self.parts]

    @property
    def parameters(self) -> Parameters:
        """Those of the whole epoch: what there is of them says what is to be done."""
        return self.epoch.parameters

    def array(self, name: str) -> npt.NDArray[Any]:
        """The request's rows of one of the epoch's arrays."""
        whole = self.epoch.array(name)
        picked = [whole[part] for part in self.parts]
        return picked[0] if len(picked) == 1 else np.concatenate(picked)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """The same on a device."""
        whole = self.epoch.tensor(name, device)
        picked = [whole[part] for part in self.parts]
        return picked[0] if len(picked) == 1 else torch.cat(picked)


class Recipe(NamedTuple):
    """Pixels not made yet: a pure function, on the device alone, that a CUDA graph can hold.

    Attributes:
        inputs: tensors on the engine's device, whose first size is that of the request.
        make: of those, or of others in their places: (m, 3, H, W) float32 in channels_last memory. It depends on
            shapes only, so that one serves all requests of one size.
    """

    inputs: tuple[Tensor, ...]
    make: Callable[..., Tensor]


Batches: TypeAlias = Callable[[int, int], Iterator[Tensor]]
"""The pixels of requests `first` up to `last`, not included: (m, 3, H, W) float32 in channels_last memory for each.

Raises `UnreadableFiles` for pictures in files that have become unreadable; no batch before them is lost.
"""


@dataclass(eq=False)
class Engine:
    """What makes pixels of the images of one split; several loaders may share it.

    Attributes:
        images: (n, H, W, 3) uint8, H = W, or pictures in files.
        mean: of each channel, for images in [0, 1].
        std: likewise.
        device: where the pixels are made.
        prefetch: batches made ahead.
        threads: that decode files, or all of DALI's on the CPU.
        substitutes: for pictures in files that become unreadable; None for images in memory.
    """

    images: npt.NDArray[np.uint8] | ImageFiles
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    prefetch: int = 2
    threads: int = 1
    substitutes: Substitutes | None = None

    def __post_init__(self) -> None:
        """Bring the images to the device, or whatever else is done once."""

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.image_size if isinstance(self.images, ImageFiles) else int(self.images.shape[1])

    def recipe(self, request: Request) -> Recipe | None:
        """The request's pixels, to be made later; None where the host has a part in it."""
        return None

    def batches(self, request: Callable[[int], Request], largest: int) -> Batches:
        """What makes the pixels of one loader, which asks `request(number)` what to make; at most `largest` images."""
        raise NotImplementedError


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`array` as a tensor on `device`, without waiting for the copy; on a CPU it shares the memory where it can."""
    # torch takes no negative strides and warns of memory that cannot be written: such an array is copied.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
    """Create the engine called `name`, one of `ENGINES`, for the images of `split`.

    Args:
        mean, std, prefetch, threads: see `Engine`.
        device: where batches are made.
        on_bad_image: what to do with image files that can no longer be read.

    Raises:
        EnvironmentProblem: DALI is selected, but is not installed or cannot run on the device.
    """
    substitutes = None
    if isinstance(split.images, ImageFiles):
        substitutes = Substitutes(split.images, split.labels, on_bad_image)
    make: type[Engine]
    if name == "dali":  # imported only when it is selected
        from densenet_dist.data.dali_loader import DaliEngine as make
    else:
        from densenet_dist.data.torch_loader import TorchEngine as make
    return make(split.images, mean, std, torch.device(device), prefetch, threads, substitutes)
