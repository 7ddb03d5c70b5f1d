"""Images in memory and in files, and loaders of them, for the tests of tests/data."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from photos import write_photos
from PIL import Image

from densenet_dist.data.augment import Augmentation, Parameters
from densenet_dist.data.engine import Engine, Epoch, Request, engine_class
from densenet_dist.data.image_files import Split
from densenet_dist.data.image_folder import read_folder
from densenet_dist.data.loader import Batch, EvalLoader, TrainLoader

NOTEBOOK = Augmentation("notebook")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
GRAY_LEVELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # what makes an engine give [0, 255]


def smooth(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Random images that look a little like photographs: coarse colors enlarged, with some noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    images = np.stack([Image.fromarray(of).resize((size, size), Image.Resampling.BICUBIC) for of in coarse])
    return (images + rng.normal(0, 4, images.shape)).clip(0, 255).astype(np.uint8)


def noise(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Every pixel random; the first images have one color, one channel, and two colors alone."""
    images = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[:1] = 77
    images[1:2, :, :, 1:] = 0
    images[2:3] = images[2:3] // 128 * 255
    return images


def numbered(count: int) -> Split:
    """Random images whose label is their number."""
    images = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Split(images, np.arange(count))


def write_pictures(root: Path, classes: int, of_each: int, image_size: int) -> Split:
    """Pictures of several sizes and kinds in class folders: those of class c are rows from `c * of_each` on."""
    write_photos(root, map(str, range(classes)), of_each)
    return read_folder(root, image_size=image_size).train


def picture_kinds(image: Image.Image) -> dict[str, bytes]:
    """The same picture in many ways of writing it: the file's bytes by its name."""

    def saved(of: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        of.save(file, kind, **options)
        return file.getvalue()

    gray, see_through = image.convert("L"), image.copy()
    see_through.putalpha(gray.rotate(180))
    kinds = {
        "gray.jpg": saved(gray, "JPEG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "gray-16.png": saved(Image.fromarray(np.asarray(gray).astype(np.uint16) * 251 + 17), "PNG"),
        "rgb-16.png": _png_16(np.asarray(image).astype(np.uint16) * 251 + 17),
        "rgba-16.png": _png_16(np.asarray(see_through).astype(np.uint16) * 251 + 17),
        "palette-transparent.png": saved(image.convert("P"), "PNG", transparency=3),
        "palette-alpha.png": saved(image.convert("P"), "PNG", transparency=bytes(range(256))),
        "key.png": saved(gray, "PNG", transparency=gray.getpixel((0, 0))),
        "profile.png": saved(image, "PNG", icc_profile=bytes(200)),  # libpng has something to say of it
        "lossless.webp": saved(image, "WEBP", lossless=True),
        "alpha.webp": saved(see_through, "WEBP", lossless=True),
        "alpha-lossy.webp": saved(see_through, "WEBP"),
    }
    for mode in ("RGB", "L", "P", "1"):
        kinds[f"{mode}.png"] = saved(image.convert(mode), "PNG")
    for mode in ("RGBA", "LA"):
        kinds[f"{mode}.png"] = saved(see_through.convert(mode), "PNG")
    for subsampling in range(3):  # 4:4:4, 4:2:2, 4:2:0
        for progressive in (False, True):
            data = saved(image, "JPEG", subsampling=subsampling, progressive=progressive, quality=85)
            kinds[f"{subsampling}-{progressive}.jpg"] = data
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        for kind in ("jpeg", "png", "webp"):
            kinds[f"exif-{orientation}.{kind}"] = saved(image, kind, exif=tags)
    for kind in ("png", "webp"):
        kinds[f"exif-alpha.{kind}"] = saved(see_through, kind, exif=tags)
    return kinds


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _png_16(levels: npt.NDArray[np.uint16]) -> bytes:
    """Pillow cannot write colors of 16 bits."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2 if channels == 3 else 6, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*one) for one in chunks)


def by_torch(images: npt.NDArray[np.uint8], parameters: Parameters) -> Any:
    """What the torch engine makes of images, (n, H, W, 3), with these parameters, in gray levels."""
    count, size = images.shape[:2]
    labels = np.arange(count)
    engine = engine_class("torch")(Split(images, labels), **GRAY_LEVELS, prefetch=0)
    epoch = Epoch(np.arange(count), labels, parameters, size)
    batches = engine.batches(lambda number: Request(epoch, (range(count),)), count)
    return next(batches(0, 1)).permute(0, 2, 3, 1).double().numpy()


SPLIT = numbered(203)


def engine_of(kind: str, split: Split = SPLIT, **options: Any) -> Engine:
    return engine_class(kind)(split, **{"mean": MEAN, "std": STD} | options)


def train_loader(
    engine: str | Engine,
    split: Split = SPLIT,
    augmentation: Augmentation = NOTEBOOK,
    *,
    batch: int = 32,
    seed: int = 3,
    balanced: bool = False,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> TrainLoader:
    """A loader of an engine, or of a new one by its name and options; of `SPLIT` unless told otherwise."""
    engine = engine_of(engine, split, **options) if isinstance(engine, str) else engine
    options = {"augmentation": augmentation, "balanced": balanced, "seed": seed, "rank": rank, "world_size": world_size}
    num_classes, indices = int(split.labels.max()) + 1, np.arange(len(split.labels))
    return TrainLoader(engine, indices, global_batch_size=batch, num_classes=num_classes, **options)


def eval_loader(
    engine: str | Engine,
    split: Split = SPLIT,
    indices: npt.NDArray[np.int64] | None = None,
    *,
    batch: int = 32,
    geometry: str = "none",
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> EvalLoader:
    """The same for evaluation."""
    engine = engine_of(engine, split, **options) if isinstance(engine, str) else engine
    return EvalLoader(engine, indices, batch_size=batch, geometry=geometry, rank=rank, world_size=world_size)


def assert_same(found: Iterable[Batch], expected: Iterable[Batch]) -> None:
    """Equal to the bit."""
    for one, other in zip(found, expected, strict=True):
        assert one.global_size == other.global_size
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
