"""The batches of one rank, for training and for evaluation.

A loader turns the plan into requests, numbered across epochs: `epoch * steps + step`. An engine, torch or DALI, turns
requests into pixels. So neither has state to save, and a run resumes from any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from densenet_dist.data import augment, torch_ops
from densenet_dist.data.augment import NO_AUGMENTATION, Augmentation
from densenet_dist.data.engine import Engine, Epoch, Request
from densenet_dist.data.plan import BatchPlan, balanced_order, epoch_order


class Batch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        images: (n, 3, H, W) float32 in channels_last memory, normalized.
        targets: the labels, (n,) int64; probabilities, (n, classes) float32, if images are mixed.
        global_size: number of images in the global batch, over all ranks.
    """

    images: Tensor
    targets: Tensor
    global_size: int


class BatchRecipe(NamedTuple):
    """A batch to compute later: a pure function that runs on the device alone, so that a CUDA graph can contain it.

    Attributes:
        make: computes the batch from `inputs`, or, with one rank, from those of any other recipe with the same shapes.
    """

    inputs: tuple[Tensor, ...]
    make: Callable[..., Batch]
    global_size: int

    @classmethod
    def of(cls, batch: Batch) -> BatchRecipe:
        """Wrap a batch that is already computed."""
        size = batch.global_size
        return cls((batch.images, batch.targets), lambda images, targets: Batch(images, targets, size), size)

    def compute(self) -> Batch:
        """Compute the batch."""
        return self.make(*self.inputs)


class TrainLoader:
    """The training batches of one rank; the global batches are the same for every world size.

    Args:
        engine: of the whole training split; augmentation depends on an image's index into it, or if `balanced` on its
            position in the epoch.
        indices: (n,) int64, the images to train on.
        global_batch_size: images per step over all ranks.
        balanced: whether every class has the same number of images in an epoch, see `plan.balanced_order`.
        num_classes: needed only if images are mixed.
        world_size: at most the number of images in the smallest global batch.
    """

    def __init__(
        self,
        engine: Engine,
        indices: npt.NDArray[np.int64],
        *,
        global_batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
        balanced: bool = False,
        seed: int = 0,
        num_classes: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._plan = BatchPlan(len(indices), global_batch_size)
        self._engine, self._indices = engine, indices
        self._augmentation, self._balanced = augmentation, balanced
        self._seed, self._num_classes = seed, num_classes
        self._rank, self._world_size = rank, world_size
        self._epochs = lru_cache(maxsize=2)(self._make_epoch)  # an engine may work ahead into the next epoch
        largest = global_batch_size + math.ceil(global_batch_size / 8)  # no global batch is larger, see `BatchPlan`
        share = math.ceil(largest / world_size)
        self._produce = engine.batches(self._request, share * (2 if augmentation.mixes else 1))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch, the same on every rank."""
        return self._plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from global step `start_step` on.

        Raises:
            IndexError: the epoch has fewer steps.
            DataError: an image file has become unreadable.
        """
        numbers = self._numbers(epoch, start_step)
        pixels = self._produce(numbers.start, numbers.stop)
        return (self._batch(number, images) for number, images in zip(numbers, pixels, strict=True))

    def recipes(self, epoch: int, start_step: int = 0) -> Iterator[BatchRecipe] | None:
        """Yield the same batches as recipes; None if the host takes part in producing them."""
        numbers = self._numbers(epoch, start_step)
        if numbers and self._engine.recipe(self._request(numbers[0])) is None:
            return None
        return map(self._recipe, numbers)

    def _numbers(self, epoch: int, start_step: int) -> range:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise IndexError(f"step {start_step} of an epoch of {self.steps_per_epoch} steps")
        first = epoch * self.steps_per_epoch
        return range(first + start_step, first + self.steps_per_epoch)

    def _make_epoch(self, epoch: int) -> Epoch:
        engine, labels = self._engine, self._engine.split.labels
        if self._balanced:
            order = balanced_order(self._indices, labels[self._indices], self._seed, epoch)
        else:
            order = epoch_order(self._indices, self._seed, epoch)
        sizes = None if engine.files is None else engine.files.sizes
        if self._balanced:  # drawn for positions in the epoch, since an image may occur several times
            sizes = None if sizes is None else sizes[order]
            parameters = augment.draw(self._augmentation, self._seed, epoch, len(order), engine.image_size, sizes)
        else:
            parameters = augment.draw(self._augmentation, self._seed, epoch, len(labels), engine.image_size, sizes)
            parameters = parameters.map(lambda array: array[order])
        return Epoch(order, labels[order], parameters, engine.image_size)

    def _request(self, number: int) -> Request:
        epoch, step = divmod(number, self.steps_per_epoch)
        start, stop = self._plan.bounds(step)
        parts: tuple[range, ...] = (range(start + self._rank, stop, self._world_size),)
        if self._augmentation.mixes and self._partner_shift(stop - start) is None:
            parts += self._partners(start, stop)
        return Request(self._epochs(epoch), parts)

    def _partner_shift(self, size: int) -> int | None:
        """Return the distance from this rank's images to their partners; None if some belong to other ranks.

        The partner of image p of a global batch of n is image (p + n // 2) % n. The order is random, so any fixed
        pairing is too; half a batch away, the partner mostly belongs to the same rank.
        """
        half, uneven = divmod(size // 2, self._world_size)
        return None if uneven or size % self._world_size else half

    def _partners(self, start: int, stop: int) -> tuple[range, range]:
        """Return the positions of the partners of this rank's images, in order."""
        size, step, half = stop - start, self._world_size, (stop - start) // 2
        wrapped = self._rank + -(-max(0, size - half - self._rank) // step) * step  # first whose partner wraps around
        return range(start + self._rank + half, stop, step), range(start + wrapped + half - size, start + half, step)

    def _batch(self, number: int, images: Tensor) -> Batch:
        return self._mixed(self._global_size(number), images, *self._labels_and_mixing(number))

    def _recipe(self, number: int) -> BatchRecipe:
        recipe = self._engine.recipe(self._request(number))
        assert recipe is not None  # the epoch's first batch has one
        pixel_inputs, make = recipe
        count, size = len(pixel_inputs), self._global_size(number)
        return BatchRecipe(
            (*pixel_inputs, *self._labels_and_mixing(number)),
            lambda *inputs: self._mixed(size, make(*inputs[:count]), *inputs[count:]),
            size,
        )

    def _global_size(self, number: int) -> int:
        start, stop = self._plan.bounds(number % self.steps_per_epoch)
        return stop - start

    def _labels_and_mixing(self, number: int) -> tuple[Tensor, ...]:
        """Return the labels, and if images are mixed, the mixing parameters of this rank's images."""
        request, device = self._request(number), self._engine.device
        labels = request.tensor("labels", device)
        if not self._augmentation.mixes:
            return (labels,)
        images = Request(request.epoch, request.parts[:1])  # without their partners
        return labels, *(images.tensor(name, device) for name in ("blend", "box", "label_share"))

    def _mixed(self, global_size: int, images: Tensor, labels: Tensor, *mixing: Tensor) -> Batch:
        if not mixing:
            return Batch(images, labels, global_size)
        blend, box, share = mixing
        shift = self._partner_shift(global_size)
        if shift is not None:
            partners, partner_labels = images.roll(-shift, 0), labels.roll(-shift, 0)
        else:
            count = len(blend)
            images, partners = images[:count], images[count:]
            labels, partner_labels = labels[:count], labels[count:]
        targets = torch_ops.mixed_targets(labels, partner_labels, share, self._num_classes)
        return Batch(torch_ops.mix(images, partners, blend, box), targets, global_size)


class EvalLoader:
    """The evaluation batches of one rank: over all ranks every image once, in order, without augmentation.

    Rank r of w takes `[r::w]` of each `batch_size * w` images. At the end a rank may have no image left: it then has
    one batch fewer than others, since no batch is empty.

    Args:
        engine: of the split to evaluate.
        indices: (n,) int64, the images to evaluate, in this order; by default all of them.
        batch_size: images per step on this rank.
        geometry: that of training, see `augment.evaluation_parameters`.

    Attributes:
        batch_indices: (n,) int64, indices into the split of the images of the batch yielded last.
    """

    def __init__(
        self,
        engine: Engine,
        indices: npt.NDArray[np.int64] | None = None,
        *,
        batch_size: int,
        geometry: str = "none",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._indices = np.arange(len(engine.split.labels)) if indices is None else indices
        self._engine, self._geometry = engine, geometry
        self._stride = batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)
        self._produce = engine.batches(self._request, batch_size)
        self._passes = 0
        self.batch_indices = self._indices[:0]

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return -(-(len(self._indices) - self._rank) // self._stride)

    def __iter__(self) -> Iterator[Batch]:
        first = self._passes * len(self)  # numbers continue across passes, as across epochs
        self._passes += 1
        numbers = range(first, first + len(self))
        for number, images in zip(numbers, self._produce(numbers.start, numbers.stop), strict=True):
            start, stop = self._bounds(number)
            labels = self._request(number).tensor("labels", self._engine.device)
            self.batch_indices = self._indices[start + self._rank : stop : self._world_size]
            yield Batch(images, labels, stop - start)

    def _make_epoch(self) -> Epoch:
        engine, indices = self._engine, self._indices
        sizes = None if engine.files is None else engine.files.sizes[indices]
        parameters = augment.evaluation_parameters(self._geometry, sizes)
        return Epoch(indices, engine.split.labels[indices], parameters, engine.image_size)

    def _bounds(self, number: int) -> tuple[int, int]:
        start = number % len(self) * self._stride
        return start, min(start + self._stride, len(self._indices))

    def _request(self, number: int) -> Request:
        start, stop = self._bounds(number)
        return Request(self._epoch(), (range(start + self._rank, stop, self._world_size),))
