"""Which image comes when, and how it is warped: pure functions of (seed, epoch, dataset index).

Nothing here keeps state. A split, the order of an epoch and the augmentation of every image are computed anew from the
seed wherever they are needed, so every rank agrees without talking, any number of ranks sees the same global batches,
and a run resumes from two integers, the epoch and the step.

All of it is drawn from Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one stream
a purpose and epoch, keyed by

    word 0 = seed                                 0 <= seed < 2**63
    word 1 = purpose * 2**48 + epoch              purposes: see `Stream`; 0 <= epoch < 2**48

Only the generator's raw 64-bit words are used. NumPy keeps those fixed for ever, but not what `Generator.permutation`
or `Generator.random` make of them (NEP 19); so a run can be repeated under a later NumPy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from densenet_dist.errors import ConfigError

AUGMENTATIONS = ("none", "notebook", "crop_flip")

Padding = Literal["border", "zeros"]

ROTATION_DEGREES = 20.0  # Keras: rotation_range=20
SHIFT_FRACTION = 0.125  # Keras: width_shift_range=height_shift_range=0.125
ZOOM_FRACTION = 0.1  # Keras: zoom_range=0.10, so factors in [0.9, 1.1]
CROP_PADDING = 4  # pixels on each side, He et al. 2016, section 4.2

_DRAWS_PER_IMAGE = 6


class _Sliceable(Protocol):
    """What arrays and tensors have in common here."""

    def __getitem__(self, key: slice, /) -> Self: ...


Rows = TypeVar("Rows", bound=_Sliceable)


class Stream(IntEnum):
    """What a random stream is for. The numbers are part of every result: append, never renumber."""

    SPLIT = 1
    ORDER = 2
    AUGMENTATION = 3
    SHAPES = 4


def random_words(count: int, *, seed: int, stream: Stream, epoch: int = 0) -> npt.NDArray[np.uint64]:
    """The first `count` 64-bit words of one stream, shape (count,), uint64. A longer draw begins with the shorter."""
    key = np.array([seed, (int(stream) << 48) + epoch], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count).astype(np.uint64, copy=False)


def unit_floats(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """64-bit words as float64 in [0, 1), uniform: the upper 53 bits over 2**53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(indices: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which `indices`, shape (n,), are seen in `epoch`: a uniform permutation of them, (n,) int64."""
    keys = random_words(len(indices), seed=seed, stream=Stream.ORDER, epoch=epoch)
    return np.asarray(indices, dtype=np.int64)[np.argsort(keys, kind="stable")]


def split_indices(
    labels: npt.NDArray[np.int64], val_fraction: float, seed: int, *, stratified: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Dataset indices of the training and of the validation part, each sorted, int64.

    The validation part has `round(val_fraction * n)` images; stratified, each class gives its share of them, rounded
    so that the total stays the same (largest remainders first).

    Args:
        labels: (n,) integer class labels.
        val_fraction: in [0, 1); 0 gives an empty validation part.

    Raises:
        ConfigError: the fraction is out of range, or rounds to no validation or no training image.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ConfigError(f"val_fraction={val_fraction} must be at least 0 and less than 1")
    count = len(labels)
    num_val = round(val_fraction * count)
    if num_val == count or (val_fraction > 0.0 and num_val == 0):
        part = "validation" if num_val == 0 else "training"
        raise ConfigError(f"val_fraction={val_fraction} of {count} images leaves no {part} image")
    # The images with the smallest keys are the validation part: of all of them, or class by class.
    order = np.argsort(random_words(count, seed=seed, stream=Stream.SPLIT), kind="stable")
    in_val = np.zeros(count, dtype=np.bool_)
    if stratified:
        classes, sizes = np.unique(labels, return_counts=True)
        for label, quota in zip(classes, _quotas(sizes, num_val), strict=True):
            in_val[order[labels[order] == label][:quota]] = True
    else:
        in_val[order[:num_val]] = True
    return np.flatnonzero(~in_val).astype(np.int64), np.flatnonzero(in_val).astype(np.int64)


def _quotas(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """`total` seats shared among classes of these sizes, (c,) int64: largest remainders, ties to the lower class."""
    # In integers: a float share such as 0.1 * 50 may fall on either side of a whole number.
    whole, remainder = np.divmod(sizes.astype(np.int64) * total, int(sizes.sum()))
    whole[np.argsort(-remainder, kind="stable")[: total - int(whole.sum())]] += 1
    return whole


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch of `num_images` is cut into global batches, the same for every world size.

    Global step t takes `order[t * B : (t + 1) * B]`. The images left over make a batch of their own if they are at
    least ceil(B / 8), and join the batch before them otherwise; so every image is seen once an epoch, no rank of up to
    B / 8 goes without images, and BatchNorm never sees a handful of them. Fewer than B images make one batch.

    Raises:
        ConfigError: a number is less than 1.
    """

    num_images: int
    global_batch_size: int

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.global_batch_size < 1:
            raise ConfigError(f"cannot make batches of {self.global_batch_size} from {self.num_images} images")

    @property
    def steps(self) -> int:
        """Global batches in an epoch, at least 1."""
        full, tail = divmod(self.num_images, self.global_batch_size)
        return max(1, full + (tail >= -(-self.global_batch_size // 8)))

    def bounds(self, step: int) -> tuple[int, int]:
        """The slice (start, stop) of the epoch's order that global step `step` takes.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        start = step * self.global_batch_size
        return start, self.num_images if step == self.steps - 1 else start + self.global_batch_size

    @property
    def smallest(self) -> int:
        """Images in the smallest global batch of the epoch."""
        return min(stop - start for start, stop in (self.bounds(0), self.bounds(self.steps - 1)))


def rank_slice(batch: Rows, rank: int, world_size: int) -> Rows:
    """What `rank` takes of a global batch: every `world_size`-th element, from its own place on. A view.

    Args:
        batch: the indices of a global batch, or anything else that has a row for each of its images.
    """
    return batch[rank::world_size]


@dataclass(frozen=True, eq=False)
class Affine:
    """One warp an image: the map from an output pixel to the place in the input that it shows.

    In pixel coordinates (x, y) measured from the centre of the image: `input = matrix @ output + offset`.

    Attributes:
        matrix: (n, 2, 2) float32.
        offset: (n, 2) float32, pixels.
        padding: what lies outside of the image: its border repeated, or zeros (black).
    """

    matrix: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]
    padding: Padding

    def torch_theta(self, image_size: int) -> npt.NDArray[np.float32]:
        """The maps for `torch.nn.functional.affine_grid(align_corners=False)`, (n, 2, 3) float32.

        torch measures in half sides, [-1, 1]: theta = [S A S^-1 | S b] with S = diag(2 / W, 2 / H), W = H.
        """
        return np.concatenate([self.matrix, self.offset[:, :, None] * np.float32(2 / image_size)], axis=2)

    def dali_matrix(self, image_size: int) -> npt.NDArray[np.float32]:
        """The maps for `nvidia.dali.fn.warp_affine`, (n, 2, 3) float32.

        DALI measures in pixels from the corner, pixel centres at +0.5: M = [A | b + c - A c] with c = (W / 2, H / 2).
        """
        matrix = self.matrix.astype(np.float64)
        centre = np.full(2, image_size / 2)
        shift = self.offset + centre - matrix @ centre
        return np.concatenate([matrix, shift[:, :, None]], axis=2).astype(np.float32)


def draw_affine(augmentation: str, seed: int, epoch: int, num_images: int, image_size: int) -> Affine | None:
    """The warps of images 0 .. num_images - 1 of the data set in `epoch`; None for "none".

    Image i has the six draws 6 i .. 6 i + 5 of the stream, so its warp depends on (seed, epoch, i) alone: not on how
    many images there are, nor on the order or batch in which it is seen.

    Args:
        augmentation: one of `AUGMENTATIONS`.
        num_images: images of the whole data set, not of a part of it.
        image_size: side of the square images in pixels.

    Raises:
        ConfigError: there is no such augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ConfigError(f"augmentation={augmentation!r} must be one of {', '.join(AUGMENTATIONS)}")
    if augmentation == "none":
        return None
    words = random_words(num_images * _DRAWS_PER_IMAGE, seed=seed, stream=Stream.AUGMENTATION, epoch=epoch)
    return _WARPS[augmentation](unit_floats(words).reshape(num_images, _DRAWS_PER_IMAGE), image_size)


def _notebook(draws: npt.NDArray[np.float64], image_size: int) -> Affine:
    """Keras' `ImageDataGenerator` as the notebook sets it, from draws (n, 6) in [0, 1).

    A = R(theta) diag(zx, zy) diag(+-1, 1) and b = R(theta) (tx, ty), with R = [[cos, -sin], [sin, cos]]: Keras warps
    by rotation @ shift @ zoom about the centre (`apply_affine_transform`) and flips last.
    """
    signed = 2.0 * draws[:, :5] - 1.0
    angle = np.deg2rad(ROTATION_DEGREES * signed[:, 0])
    shift = SHIFT_FRACTION * image_size * signed[:, 1:3]
    zoom = 1.0 + ZOOM_FRACTION * signed[:, 3:5]
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
    matrix = rotation * zoom[:, None, :]
    matrix[:, :, 0] *= _flip_sign(draws)[:, None]
    offset = np.einsum("nij,nj->ni", rotation, shift)
    return Affine(matrix.astype(np.float32), offset.astype(np.float32), "border")


def _crop_flip(draws: npt.NDArray[np.float64], image_size: int) -> Affine:
    """A random crop of the original size from the image with 4 black pixels around it, then a flip, from (n, 6) draws.

    A crop at (left, top) of the padded image is a shift by a whole number of pixels, left - 4 and top - 4.
    """
    matrix = np.zeros((len(draws), 2, 2), dtype=np.float32)
    matrix[:, 0, 0] = _flip_sign(draws)
    matrix[:, 1, 1] = 1.0
    corner = np.floor(draws[:, 1:3] * (2 * CROP_PADDING + 1))
    return Affine(matrix, (corner - CROP_PADDING).astype(np.float32), "zeros")


def _flip_sign(draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """-1 for the images that are mirrored left to right, 1 for the others, half each, (n,) float64."""
    return np.where(draws[:, 5] < 0.5, -1.0, 1.0)


_WARPS: dict[str, Callable[[npt.NDArray[np.float64], int], Affine]] = {
    "notebook": _notebook,
    "crop_flip": _crop_flip,
}
