"""The image operations of the torch engine, on a CPU or a GPU (`resize`: CPU only), without host synchronization."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_dist.data.augment import Padding
from densenet_dist.data.trivial_augment import Tone

GRAY = (0.299, 0.587, 0.114)  # luma of red, green, blue: ITU-R BT.601


def warp(images: Tensor, theta: Tensor, centers: Tensor, padding: Padding) -> Tensor:
    """Warp each image (n, 3, H, W) bilinearly by its own affine map, in float32 even under autocast.

    The grid is that of `affine_grid(align_corners=False)`, but is the sum of two broadcast products instead of a matrix
    product: 20 times faster on a CPU, exact for whole-pixel shifts, and not affected by TF32 and autocast, which would
    change pixels by whole levels.

    Args:
        theta: (n, 2, 3) float32, `Epoch.theta`.
        centers: (W,) float32, the pixel centers in [-1, 1]; H = W.
    """
    across = (theta[:, :, 0:1] * centers).transpose(1, 2)[:, None, :, :]  # (n, 1, W, 2)
    down = (theta[:, :, 1:2] * centers + theta[:, :, 2:3]).transpose(1, 2)[:, :, None, :]  # (n, H, 1, 2)
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(images, across + down, mode="bilinear", padding_mode=padding, align_corners=False)


def change_tones(
    images: Tensor, tone: npt.NDArray[np.int64], strength: Tensor, upload: Callable[[npt.NDArray[np.int64]], Tensor]
) -> None:
    """Apply each image's tone operation in place to (n, 3, H, W) float32 pixel values in [0, 255].

    Args:
        tone: (n,) int64, each a `Tone`; on the host, so that the images can be grouped without waiting for the device.
        strength: (n,) float32.
        upload: copies an array to the images' device.
    """
    for kind, change in _TONES.items():
        rows = np.flatnonzero(tone == kind)
        if len(rows):
            chosen = upload(rows)
            changed = change(images.index_select(0, chosen), strength.index_select(0, chosen).view(-1, 1, 1, 1))
            images.index_copy_(0, chosen, changed.clamp_(0.0, 255.0))


def mix(images: Tensor, partners: Tensor, blend: Tensor, box: Tensor) -> Tensor:
    """Mix each image with its partner: `box` is the partner's, elsewhere `blend` is the image's share.

    The result is in channels_last memory. `blend` is (n,) float32; for `box` see `box_mask`.
    """
    share = blend.view(-1, 1, 1, 1) * ~box_mask(box, images.shape[-1])
    return torch.lerp(partners, images, share).contiguous(memory_format=torch.channels_last)


def mixed_targets(labels: Tensor, partners: Tensor, label_share: Tensor, num_classes: int) -> Tensor:
    """Return probabilities (n, classes): `label_share` (n,) for `labels`, the rest for `partners`, both (n,) int64."""
    label_targets, partner_targets = (F.one_hot(each, num_classes).float() for each in (labels, partners))
    return torch.lerp(partner_targets, label_targets, label_share[:, None])


def resize(image: Tensor, size: int) -> Tensor:
    """Resize an image (3, H, W) uint8 to (3, size, size) float32, antialiased and not rounded.

    Like Pillow's and torch's bilinear resampling, a triangle filter as wide as the scale requires, except at the
    border: pixels beyond it repeat the border, as in DALI, while torch leaves them out of the mean.
    """
    height, width = image.shape[1:]
    pixels = image[None].float()
    if (height, width) == (size, size):
        return pixels[0]
    rows = F.interpolate(pixels, size=(height, size), mode="bilinear", antialias=True)
    if width > size:  # torch drops the filter's share outside the image: give it to the border
        inside, before, beyond = _filter_mass(width, size)
        rows = rows * inside + pixels[..., :1] * before + pixels[..., -1:] * beyond
    square = F.interpolate(rows, size=(size, size), mode="bilinear", antialias=True)
    if height > size:
        inside, before, beyond = (mass[:, None] for mass in _filter_mass(height, size))
        square = square * inside + rows[..., :1, :] * before + rows[..., -1:, :] * beyond
    return square[0]


@lru_cache(maxsize=4096)
def _filter_mass(length: int, size: int) -> tuple[Tensor, ...]:
    """Return each output pixel's filter shares inside, before and beyond the image, (size,) each; `length > size`."""
    scale = length / size
    reach = math.ceil(scale) + 1
    taps = np.arange(-reach, length + reach) + 0.5
    middles = (np.arange(size) + 0.5) * scale
    outside = np.concatenate([taps[:reach], taps[-reach:]])
    total = np.empty(size)
    for index, middle in enumerate(middles):
        near = taps[max(0, math.floor(middle - scale) + reach) : math.ceil(middle + scale) + reach]
        total[index] = np.maximum(0.0, 1.0 - np.abs(near - middle) / scale).sum()
    weights = np.maximum(0.0, 1.0 - np.abs(outside - middles[:, None]) / scale) / total[:, None]
    before, beyond = weights[:, :reach].sum(axis=1), weights[:, reach:].sum(axis=1)
    inside = 1.0 - before - beyond
    return tuple(torch.from_numpy(mass.astype(np.float32)) for mass in (inside, before, beyond))


def box_mask(box: Tensor, size: int) -> Tensor:
    """Return which pixels lie in `box` (n, 4) left, top, right, bottom: (n, 1, H, W) bool."""
    pixels = torch.arange(size, device=box.device)
    across = (pixels >= box[:, 0:1]) & (pixels < box[:, 2:3])
    down = (pixels >= box[:, 1:2]) & (pixels < box[:, 3:4])
    return (down[:, :, None] & across[:, None, :])[:, None]


def _gray(images: Tensor) -> Tensor:
    red, green, blue = (images[:, channel : channel + 1] * GRAY[channel] for channel in range(3))
    return red + green + blue


def _color(images: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(images)
    return gray + (images - gray) * factor


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # In two steps: threads would split the sum over one large image, and round it differently than in a batch.
    mean = _gray(images).mean(dim=3, keepdim=True).mean(dim=(1, 2), keepdim=True)
    return mean + (images - mean) * factor


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    smooth, inner = images.clone(), images[:, :, 1:-1, 1:-1]  # border pixels stay
    smooth[:, :, 1:-1, 1:-1] = (9.0 * F.avg_pool2d(images, 3, stride=1) + 4.0 * inner) / 13.0
    return smooth + (images - smooth) * factor


def _posterize(images: Tensor, mask: Tensor) -> Tensor:
    return (_levels(images).int() & mask.int()).float()


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= threshold, 255.0 - images, images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    stretched = (images - low) * _divide_255_by(high - low)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Equalize as OpenCV's equalizeHist and DALI do: Pillow's integer steps are too coarse for small images."""
    levels = _levels(images).flatten(2).int()
    pixels = levels.shape[2]
    values = torch.arange(256, dtype=torch.int32, device=images.device).expand(*levels.shape[:2], 256)
    # By sorting instead of counting: deterministic on every device, without atomics.
    up_to = torch.searchsorted(levels.sort(dim=2).values.contiguous(), values.contiguous(), right=True)
    lowest = up_to.gather(2, levels.amin(dim=2, keepdim=True).long())
    table = ((up_to - lowest) * _divide_255_by((pixels - lowest).clamp(min=1).float())).round()
    table = torch.where(lowest == pixels, values.float(), table)
    return table.gather(2, levels.long()).view_as(images)


def _divide_255_by(span: Tensor) -> Tensor:
    """Return 255 / span, rounded once: torch computes `255.0 / span` as 255 * (1 / span), DALI does not."""
    return torch.full_like(span, 255.0) / span


def _levels(images: Tensor) -> Tensor:
    """Round pixel values to integers, halves up."""
    return (images + 0.5).floor_()


_TONES: dict[Tone, Callable[[Tensor, Tensor], Tensor]] = {
    Tone.BRIGHTNESS: lambda images, factor: images * factor,
    Tone.COLOR: _color,
    Tone.CONTRAST: _contrast,
    Tone.SHARPNESS: _sharpness,
    Tone.POSTERIZE: _posterize,
    Tone.SOLARIZE: _solarize,
    Tone.AUTOCONTRAST: _autocontrast,
    Tone.EQUALIZE: _equalize,
}
