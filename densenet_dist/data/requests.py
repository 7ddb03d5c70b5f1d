"""What a loader asks an engine for: some rows of an epoch, with everything that is to be done to each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data import augment
from densenet_dist.data.augment import Parameters
from densenet_dist.data.substitutes import Substitutes


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


class Stream(Protocol):
    """What makes the pixels of one loader's requests."""

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """(m, 3, H, W) float32 in channels_last memory for each request from `first` up to `last`, not included.

        Raises:
            UnreadableFiles: pictures in files that have become unreadable; nothing after the last batch given is lost.
        """


class Engine(Protocol):
    """What makes pixels of the images of one split; several loaders may share it."""

    @property
    def device(self) -> torch.device:
        """Where the pixels are made."""

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""

    @property
    def substitutes(self) -> Substitutes | None:
        """For pictures in files that become unreadable; None for images in memory."""

    def recipe(self, request: Request) -> Recipe | None:
        """The request's pixels, to be made later; None where the host has a part in it."""

    def stream(self, request: Callable[[int], Request], largest: int) -> Stream:
        """A stream that asks `request(number)` what to make; at most `largest` images each."""


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`array` as a tensor on `device`, without waiting for the copy; on a CPU it shares the memory where it can."""
    # torch takes no negative strides and warns of memory that cannot be written: such an array is copied.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
