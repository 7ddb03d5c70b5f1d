"""Pictures in files: what is taken, how one is decoded, and what is wrong with those that are not taken."""

import io
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
REFUSED_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pgm", ".ppm"),
    *(".psd", ".svg", ".tif", ".tiff", ".raw", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf"),
    *(".rw2", ".srw"),
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # as Pillow calls them; MPO is a JPEG with more pictures behind the first
_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = (b"\xff\xd8\xff", _PNG, b"RIFF")
_HEIF = (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")
UNREADABLE = "cannot be read"  # how a reason begins that may pass though the file stays the same

Verdict = tuple[int, int, int] | str
"""Width and height in pixels of a picture and the CRC-32 of its file, or why it is a bad one."""


class BadImage(Exception):
    """A file that cannot be used as a picture; says why in plain words."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Pictures in files, each verified once.

    Attributes:
        root: the folder that `names` are relative to.
        names: relative POSIX paths, in byte order; those of a validation folder come after all others.
        sizes: (n, 2) int64, width and height in pixels, after the EXIF orientation.
        checksums: (n,) int64, CRC-32 of each file when it was verified.
        image_size: side in pixels of the square images made of them.
    """

    root: Path
    names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.int64]
    image_size: int

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> Path:
        """Where the picture of a row is."""
        return self.root / self.names[row]

    def subset(self, rows: npt.NDArray[np.int64]) -> "ImageFiles":
        """The pictures of some rows, (m,) int64, in that order."""
        names = tuple(self.names[row] for row in rows)
        return ImageFiles(self.root, names, self.sizes[rows], self.checksums[rows], self.image_size)

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        """The bytes of one file, (n,) uint8, made sure to be a picture of the size it had when it was verified.

        Bytes that are the same are trusted; others are decoded first: a decoder that is to work on many at a time must
        never meet a broken file (DALI's can take the whole process down).

        Raises:
            BadImage: it cannot be read any more, or is another picture; with the reason.
        """
        data = _read(self.path(row))
        if zlib.crc32(data.data) != self.checksums[row]:
            _check_header(data)
            if list(_pixels(data).shape[:0:-1]) != self.sizes[row].tolist():
                raise BadImage("another picture than when it was verified")
        return data

    def decode(self, row: int) -> "Tensor":
        """One picture as (3, H, W) uint8 on the CPU, RGB, upright.

        Raises:
            BadImage: as `read`, or it cannot be decoded.
        """
        return _pixels(self.read(row))


def decode_any(path: Path) -> "Tensor":
    """One picture as `ImageFiles.decode`, also of kinds that training refuses, as far as Pillow reads them.

    Raises:
        BadImage: it cannot be read or decoded, or is an animation; with the reason.
    """
    from PIL import Image

    data = _read(path)
    kind = _check_header(data, any_kind=True)
    if kind in _FORMATS:
        return _pixels(data)
    try:
        with Image.open(io.BytesIO(data.data)) as picture:
            return pixels_of(picture)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("cut short or damaged") from error


def pixels_of(picture: Any) -> "Tensor":
    """A picture that Pillow has opened as (3, H, W) uint8 on the CPU, RGB, upright; what is transparent is left out.

    Raises:
        BadImage: how bright its numbers are meant to be is not known.
    """
    import torch
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        levels = torch.from_numpy(np.asarray(picture).astype(np.int32))
        return ((levels + 128) // 257).to(torch.uint8).expand(3, -1, -1)
    if picture.mode in ("I", "F"):
        raise BadImage("grey levels of 32 bits, whose range is not known: convert it to 8 or 16 bits")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def suffix(name: str) -> str:
    """The end of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def examine(path: Path) -> Verdict:
    """Opens and decodes one file."""
    try:
        data = _read(path)
        _check_header(data)
        _, height, width = _pixels(data).shape
    except BadImage as error:
        return str(error)
    return width, height, zlib.crc32(data.data)


def _read(path: Path) -> npt.NDArray[np.uint8]:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BadImage(unreadable(error)) from error
    if not len(data):
        raise BadImage("empty file")
    return data


def _check_header(data: npt.NDArray[np.uint8], *, any_kind: bool = False) -> str:
    """Makes sure that a file's bytes are one picture of a kind that is taken, whatever its name says; the kind."""
    from PIL import Image

    Image.init()  # all its formats, so that no thread looks through them while another still loads some
    try:
        with Image.open(io.BytesIO(data.data)) as picture:
            kind = picture.format or "this format"
            frames = 1 if kind in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels to be decoded safely: scale it down") from error
    except Exception as error:
        raise BadImage(_damage(data)) from error
    if kind not in _FORMATS and not any_kind:
        raise BadImage(not_supported(kind))
    if frames > 1:
        raise BadImage(f"a file of {frames} pages" if kind == "TIFF" else f"an animation of {frames} frames")
    return kind


def _pixels(data: npt.NDArray[np.uint8]) -> "Tensor":
    """The picture in a file's bytes, as `ImageFiles.decode` gives it."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    if data[:8].tobytes() == _PNG and data.tobytes().rfind(b"IEND\xaeB`\x82") < 0:
        raise BadImage(_damage(data))  # torchvision would show what there is of it, DALI would not
    try:
        pixels: Tensor = decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    except Exception as error:
        raise BadImage(_damage(data)) from error
    if pixels.ndim != 3:
        raise BadImage(f"an animation of {len(pixels)} frames")
    if pixels.dtype == torch.uint16:
        pixels = ((pixels.to(torch.int32) + 128) // 257).to(torch.uint8)
    orientation = _webp_orientation(data)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    if flips:
        pixels = pixels.flip(flips)
    return pixels.expand(3, -1, -1)


def _webp_orientation(data: npt.NDArray[np.uint8]) -> int:
    """The EXIF orientation, 1 to 8, of a WebP, which torchvision does not apply; 1, upright, of everything else."""
    if data[:4].tobytes() == b"RIFF" and data[12:16].tobytes() == b"VP8X" and data[20] & 8:
        from PIL import Image

        with suppress(Exception), Image.open(io.BytesIO(data.data)) as picture:
            return int(picture.getexif().get(0x0112, 1))
    return 1


def unreadable(error: OSError) -> str:
    """Why a file could not be read, in plain words."""
    missing = isinstance(error, FileNotFoundError)
    return f"{UNREADABLE}: {'it is not there, or is a link to nothing' if missing else error.strerror or error}"


def _damage(data: npt.NDArray[np.uint8]) -> str:
    """Why bytes could not be decoded, as far as their beginning tells."""
    start = data[:16].tobytes()
    if start[4:].startswith(_HEIF):
        return not_supported("HEIC")
    return "cut short or damaged" if start.startswith(_MAGIC) else "not a picture"


def not_supported(kind: str) -> str:
    """What is said of a format that is not taken."""
    return f"{kind.upper()} is not supported: convert it to PNG or JPEG"
