"""The batches of one rank, whichever engine makes their pixels: torch (`torch_loader`) or DALI (`dali_loader`).

A loader turns the plan into requests, numbered without end: `epoch * steps + step`. An engine turns requests into
pixels. So no engine has a state worth saving, and a run goes on from any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data import augment, torch_ops
from densenet_dist.data.augment import NO_AUGMENTATION, Augmentation
from densenet_dist.data.datasets import Split
from densenet_dist.data.engine import Batches, Engine, Epoch, Request, upload
from densenet_dist.data.plan import BatchPlan, epoch_order
from densenet_dist.data.substitutes import Substitutes, UnreadableFiles


class Batch(NamedTuple):
    """What one rank gets of one global batch.

    Attributes:
        images: (n, 3, H, W) float32 in channels_last memory, normalised.
        labels: (n,) int64.
        global_size: images of the global batch, over all ranks.
        targets: (n, classes) float32 probabilities where images are mixed, else None: the labels are the targets.
    """

    images: Tensor
    labels: Tensor
    global_size: int
    targets: Tensor | None = None

    @property
    def aims(self) -> Tensor:
        """What the loss is taken against: the targets where there are any, else the labels."""
        return self.labels if self.targets is None else self.targets


class BatchRecipe(NamedTuple):
    """A batch not made yet: a pure function, on the device alone, that a CUDA graph can hold.

    Attributes:
        inputs: tensors on the device.
        make: of those, or of others in their places, the batch. It depends on shapes only, so that with one rank one
            serves all batches of one size.
        global_size: of the batch.
    """

    inputs: tuple[Tensor, ...]
    make: Callable[..., Batch]
    global_size: int

    @classmethod
    def of(cls, batch: Batch) -> BatchRecipe:
        """Of a batch that has been made: nothing is left to do."""
        size = batch.global_size
        return cls((batch.images, batch.aims), lambda images, aims: Batch(images, aims, size), size)

    def batch(self) -> Batch:
        """Make it."""
        return self.make(*self.inputs)


class TrainLoader:
    """The training batches of one rank; the global batches are the same for every world size.

    Args:
        split: the data set's whole training split; augmentation is drawn by an image's place in it.
        indices: (n,) int64, the images to train on.
        engine: of that split.
        global_batch_size: images a step over all ranks.
        num_classes: of the data set; needed only where images are mixed.
        world_size: at most as many ranks as the smallest global batch has images.
    """

    def __init__(
        self,
        split: Split,
        indices: npt.NDArray[np.int64],
        *,
        engine: Engine,
        global_batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
        seed: int = 0,
        num_classes: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._plan = BatchPlan(len(indices), global_batch_size)
        self._split, self._indices, self._engine = split, indices, engine
        self._augmentation, self._seed, self._num_classes = augmentation, seed, num_classes
        self._rank, self._world_size = rank, world_size
        self._epochs = lru_cache(maxsize=2)(self._make_epoch)  # an engine may work ahead, into the next epoch
        share = -(-(global_batch_size + -(-global_batch_size // 8)) // world_size)
        self._pixels = engine.batches(self._request, share * (2 if augmentation.mixes else 1))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same on every rank."""
        return self._plan.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from global step `start_step` on; the same ones as after skipping so many.

        Raises:
            IndexError: the epoch has fewer steps.
            DataError: a picture in a file has become unreadable, and is not to be skipped.
        """
        numbers = self._numbers(epoch, start_step)
        pixels = _whatever_files_do(self._pixels, numbers, self._engine.substitutes, self._epochs.cache_clear)
        return (self._batch(number, images) for number, images in zip(numbers, pixels, strict=True))

    def recipes(self, epoch: int, start_step: int = 0) -> Iterator[BatchRecipe] | None:
        """The same batches, to be made later; None where the host has a part in making them.

        Raises:
            IndexError: the epoch has fewer steps.
        """
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
        order = epoch_order(self._indices, self._seed, epoch)
        files = self._engine.substitutes
        if files is not None:
            order = files.resolve(order)
        parameters = augment.draw(
            self._augmentation,
            self._seed,
            epoch,
            len(self._split.labels),
            self._engine.image_size,
            None if files is None else files.sizes,
        )
        return Epoch(
            order, self._split.labels[order], parameters.map(lambda array: array[order]), self._engine.image_size
        )

    def _request(self, number: int) -> Request:
        epoch, step = divmod(number, self.steps_per_epoch)
        start, stop = self._plan.bounds(step)
        parts: tuple[slice, ...] = (slice(start + self._rank, stop, self._world_size),)
        if self._augmentation.mixes and self._partner_shift(stop - start) is None:
            parts += self._partners(start, stop)
        return Request(self._epochs(epoch), parts)

    def _partner_shift(self, size: int) -> int | None:
        """How far this rank's images are from their partners, both being its own; None where some are not.

        The partner of the image at place p of a global batch of n is the one at (p + n // 2) % n: the order is random
        already, so any fixed pairing is, and half a batch away it is mostly one of the same rank's.
        """
        half, uneven = divmod(size // 2, self._world_size)
        return None if uneven or size % self._world_size else half

    def _partners(self, start: int, stop: int) -> tuple[slice, slice]:
        """The places of the partners of this rank's images, in their order."""
        size, step, half = stop - start, self._world_size, (stop - start) // 2
        wrapped = self._rank + -(-max(0, size - half - self._rank) // step) * step  # the first image past the end
        return slice(start + self._rank + half, stop, step), slice(start + wrapped + half - size, start + half, step)

    def _batch(self, number: int, images: Tensor) -> Batch:
        return self._mixed(self._global_size(number), images, *self._beside(number))

    def _recipe(self, number: int) -> BatchRecipe:
        pixels, beside = self._engine.recipe(self._request(number)), self._beside(number)
        assert pixels is not None  # as of the epoch's first batch
        make, count, size = pixels.make, len(pixels.inputs), self._global_size(number)
        return BatchRecipe(
            (*pixels.inputs, *beside), lambda *inputs: self._mixed(size, make(*inputs[:count]), *inputs[count:]), size
        )

    def _global_size(self, number: int) -> int:
        start, stop = self._plan.bounds(number % self.steps_per_epoch)
        return stop - start

    def _beside(self, number: int) -> tuple[Tensor, ...]:
        """What a batch needs besides pixels: labels, and where images are mixed how, of this rank's own."""
        request, device = self._request(number), self._engine.device
        labels = request.tensor("labels", device)
        if not self._augmentation.mixes:
            return (labels,)
        own = Request(request.epoch, request.parts[:1])
        return labels, *(own.tensor(name, device) for name in ("blend", "box", "own"))

    def _mixed(self, global_size: int, images: Tensor, labels: Tensor, *how: Tensor) -> Batch:
        if not how:
            return Batch(images, labels, global_size)
        blend, box, share = how
        shift = self._partner_shift(global_size)
        if shift is not None:
            partners, others = images.roll(-shift, 0), labels.roll(-shift, 0)
        else:
            count = len(blend)
            (images, partners), (labels, others) = ((both[:count], both[count:]) for both in (images, labels))
        targets = torch_ops.mixed_targets(labels, others, share, self._num_classes)
        return Batch(torch_ops.mix(images, partners, blend, box), labels, global_size, targets)


class EvalLoader:
    """Batches of one rank for evaluation: over all ranks every image once, in order, none augmented.

    Rank r of w takes `[r::w]` of each stretch of `batch_size * w` images. At the end there may be nothing left for a
    rank, which then has one batch fewer than others: no batch is empty.

    Args:
        split: the split to read from.
        indices: (n,) int64, the images to evaluate, in this order.
        engine: of that split.
        batch_size: images a step on this rank.
        geometry: that of training, see `augment.evaluation_parameters`.

    Attributes:
        places: (n,) int64, the places in the split of the images of the batch given last.
    """

    def __init__(
        self,
        split: Split,
        indices: npt.NDArray[np.int64],
        *,
        engine: Engine,
        batch_size: int,
        geometry: str = "none",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._split, self._indices, self._engine, self._geometry = split, indices, engine, geometry
        self._stride = batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._epochs = lru_cache(maxsize=2)(self._make_epoch)  # an engine may work ahead, into the next epoch
        self._pixels = engine.batches(self._request, batch_size)
        self._passes = 0
        self.places = indices[:0]

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-(len(self._indices) - self._rank) // self._stride)

    def __iter__(self) -> Iterator[Batch]:
        first = self._passes * len(self)
        self._passes += 1
        numbers = range(first, first + len(self))
        files = self._engine.substitutes
        pixels = _whatever_files_do(self._pixels, numbers, files, self._epochs.cache_clear)
        for number, images in zip(numbers, pixels, strict=True):
            start, stop = self._bounds(number)
            batch = Batch(images, self._request(number).tensor("labels", self._engine.device), stop - start)
            self.places = self._indices[start + self._rank : stop : self._world_size]
            if files is not None and len(files.unreadable):
                batch = self._readable(batch, files)
            if len(batch.labels):
                yield batch

    def _make_epoch(self, epoch: int) -> Epoch:
        files, rows = self._engine.substitutes, self._indices
        sizes = None
        if files is not None:
            rows = files.resolve(rows)
            sizes = files.sizes[rows]
        parameters = augment.evaluation_parameters(self._geometry, sizes)
        return Epoch(rows, self._split.labels[self._indices], parameters, self._engine.image_size)

    def _bounds(self, number: int) -> tuple[int, int]:
        start = number % len(self) * self._stride
        return start, min(start + self._stride, len(self._indices))

    def _request(self, number: int) -> Request:
        start, stop = self._bounds(number)
        return Request(self._epochs(0), (slice(start + self._rank, stop, self._world_size),))

    def _readable(self, batch: Batch, files: Substitutes) -> Batch:
        """The batch without what stands in for unreadable pictures: they are not counted, nor is another instead."""
        kept = np.flatnonzero([place not in files.unreadable for place in self.places.tolist()])
        if len(kept) == len(self.places):
            return batch
        self.places = self.places[kept]
        rows = upload(kept, self._engine.device)
        images = batch.images.index_select(0, rows).contiguous(memory_format=torch.channels_last)
        return Batch(images, batch.labels.index_select(0, rows), batch.global_size)


def _whatever_files_do(
    make: Batches, numbers: range, files: Substitutes | None, replan: Callable[[], None]
) -> Iterator[Tensor]:
    """The pixels of requests `numbers`; where files turn out to be unreadable, others stand in for them, if allowed."""
    done = numbers.start
    while done < numbers.stop:
        try:
            for images in make(done, numbers.stop):
                done += 1
                yield images
        except UnreadableFiles as error:
            assert files is not None
            files.exclude(error.reasons)
            replan()
