"""Plan splits, orders and batches: pure functions of (seed, epoch, dataset index).

Nothing here has state. A split, the order of an epoch and the augmentation of every image (`augment`) are computed
from the seed wherever they are needed. So all ranks agree without communication, any number of ranks sees the same
global batches, and a run resumes from two integers, the epoch and the step.

Random numbers are drawn from Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one
stream per purpose and epoch, keyed by

    word 0 = seed                                 0 <= seed < 2**63
    word 1 = purpose * 2**48 + epoch              purposes: see `Stream`; 0 <= epoch < 2**48

Only the generator's raw 64-bit words are used: NumPy guarantees those for all versions, but not the results of
`Generator.permutation` or `Generator.random` (NEP 19). So a run can be repeated with a later NumPy.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from densenet_dist.errors import ConfigError


class Stream(IntEnum):
    """The purpose of a random stream. All results depend on the numbers: append, never renumber."""

    SPLIT = 1
    ORDER = 2
    AUGMENTATION = 3
    SHAPES = 4
    TEST_SPLIT = 5
    TRIVIAL_AUGMENT = 6
    CUTOUT = 7
    MIX = 8
    RESIZED_CROP = 9
    BALANCE = 10


def random_words(count: int, *, seed: int, stream: Stream, epoch: int = 0) -> npt.NDArray[np.uint64]:
    """Return the first `count` 64-bit words of one stream, (count,) uint64."""
    key = np.array([seed, (int(stream) << 48) + epoch], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count).astype(np.uint64, copy=False)


def unit_floats(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Convert 64-bit words to uniform float64 in [0, 1): the upper 53 bits over 2**53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(indices: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of `indices` (n,) in `epoch`: a uniform permutation of them, (n,) int64."""
    keys = random_words(len(indices), seed=seed, stream=Stream.ORDER, epoch=epoch)
    return np.asarray(indices, dtype=np.int64)[np.argsort(keys, kind="stable")]


def balanced_order(
    indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Draw n of the `indices` (n,), equally many of each class, in random order: (n,) int64.

    `labels` (n,) are the classes of `indices`. In each epoch, small classes repeat their images (counts differ by at
    most one) and large classes take a random part. If n is not a multiple of the number of classes, some classes have
    one image more; which ones changes from epoch to epoch.
    """
    shuffled = np.argsort(random_words(len(indices), seed=seed, stream=Stream.ORDER, epoch=epoch), kind="stable")
    classes, counts = np.unique(labels, return_counts=True)
    each, extra = divmod(len(indices), len(classes))
    first = epoch * extra  # of the classes that have one more
    by_class = np.split(shuffled[np.argsort(labels[shuffled], kind="stable")], np.cumsum(counts)[:-1])
    chosen = [np.resize(part, each + ((number - first) % len(classes) < extra)) for number, part in enumerate(by_class)]
    keys = random_words(len(indices), seed=seed, stream=Stream.BALANCE, epoch=epoch)
    positions = np.concatenate(chosen)[np.argsort(keys, kind="stable")]
    return np.asarray(np.asarray(indices, dtype=np.int64)[positions])


def split_indices(
    labels: npt.NDArray[np.int64],
    val_fraction: float,
    seed: int,
    *,
    stratified: bool = False,
    stream: Stream = Stream.SPLIT,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the dataset indices of the training and the validation part, each sorted, int64.

    The validation part has `round(val_fraction * n)` images, or fewer, so that at least one of every class is left to
    train on. If stratified, they are distributed over the classes in proportion to their sizes (largest remainders
    first).

    Args:
        labels: (n,) integer class labels.
        stream: `TEST_SPLIT` holds out a test part instead.

    Raises:
        ConfigError: the fraction is out of range, or rounds to no validation or no training image.
    """
    name, part = ("test_fraction", "test") if stream is Stream.TEST_SPLIT else ("val_fraction", "validation")
    if not 0.0 <= val_fraction < 1.0:
        raise ConfigError(f"{name}={val_fraction} must be at least 0 and less than 1")
    count = len(labels)
    num_val = round(val_fraction * count)
    if num_val == count:
        raise ConfigError(f"{name}={val_fraction} of {count} images leaves no training image")
    # The images with the smallest keys are the validation part: of all images, or of each class.
    order = np.argsort(random_words(count, seed=seed, stream=stream), kind="stable")
    # The image with the largest key of each class stays in the training part.
    _, last = np.unique(labels[order][::-1], return_index=True)
    order = np.delete(order, count - 1 - last)
    in_val = np.zeros(count, dtype=np.bool_)
    if stratified:
        classes, sizes = np.unique(labels, return_counts=True)
        by_class = order[np.argsort(labels[order], kind="stable")]  # within a class, by the key
        positions = np.searchsorted(classes, labels[by_class])
        ranks = np.arange(len(by_class)) - np.searchsorted(positions, np.arange(len(classes)))[positions]
        in_val[by_class[ranks < _quotas(sizes, num_val)[positions]]] = True
    else:
        in_val[order[:num_val]] = True
    if val_fraction > 0.0 and not in_val.any():
        raise ConfigError(f"{name}={val_fraction} of {count} images leaves no {part} image")
    return np.flatnonzero(~in_val).astype(np.int64), np.flatnonzero(in_val).astype(np.int64)


def _quotas(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Distribute `total` over classes of these sizes, (c,) int64: largest remainders, ties to the lower class."""
    # In integers: a float product such as 0.1 * 50 may fall on either side of an integer.
    whole, remainder = np.divmod(sizes.astype(np.int64) * total, int(sizes.sum()))
    whole[np.argsort(-remainder, kind="stable")[: total - int(whole.sum())]] += 1
    return whole


@dataclass(frozen=True)
class BatchPlan:
    """The division of an epoch of `num_images` into global batches, the same for every world size.

    Global step t takes `order[t * B : (t + 1) * B]`. The remaining images are a batch of their own if they are at least
    ceil(B / 8), else they join the previous batch. So every image is seen once per epoch, up to B / 8 ranks always have
    images, and BatchNorm never sees very few of them. Fewer than B images are one batch.
    """

    num_images: int
    global_batch_size: int

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.global_batch_size < 1:
            raise ConfigError(f"cannot make batches of {self.global_batch_size} from {self.num_images} images")

    @property
    def steps(self) -> int:
        """Global batches per epoch, at least 1."""
        full, tail = divmod(self.num_images, self.global_batch_size)
        return max(1, full + (tail >= -(-self.global_batch_size // 8)))

    def bounds(self, step: int) -> tuple[int, int]:
        """Return the slice (start, stop) of the epoch's order that global step `step` takes."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        start = step * self.global_batch_size
        return start, self.num_images if step == self.steps - 1 else start + self.global_batch_size

    @property
    def smallest(self) -> int:
        """Number of images in the smallest global batch."""
        return min(stop - start for start, stop in (self.bounds(0), self.bounds(self.steps - 1)))

    def smallest_micro_batch(self, world_size: int, grad_accum_steps: int) -> int:
        """Return the smallest number of images of a rank in one forward pass of training."""
        share = self.smallest // world_size
        return share // max(1, min(grad_accum_steps, share))
