"""Pictures in files: what is taken, how one is decoded, and what is wrong with those that are not taken."""

import io
import os
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from densenet_dist.data.c_stderr import printed_by_c

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
REFUSED_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pgm", ".ppm"),
    *(".psd", ".svg", ".tif", ".tiff", ".raw", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf"),
    *(".rw2", ".srw"),
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # as Pillow calls them; MPO is a JPEG with more pictures behind the first
# What Pillow decodes itself: it would hand EPS files, for example, to Ghostscript.
_READABLE = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "ICO", "JPEG2000", "PPM", "PSD", "TIFF")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = (b"\xff\xd8\xff", _PNG, b"RIFF")
_HEIF = (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")
_DAMAGED = "cut short or damaged"
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
        known = zlib.crc32(data.data) == self.checksums[row]
        if not known and list(_checked_pixels(data).shape[:0:-1]) != self.sizes[row].tolist():
            raise BadImage("another picture than when it was verified")
        return data

    def encoded(self, row: int) -> npt.NDArray[np.uint8]:
        """Bytes for another decoder: as `read`, or of a picture with transparency a PNG of what `decode` gives."""
        from PIL import Image

        data = self.read(row)
        if not _is_transparent(data):
            return data
        png = io.BytesIO()
        Image.fromarray(_pixels(data).permute(1, 2, 0).numpy()).save(png, "PNG", compress_level=0)
        return np.frombuffer(png.getvalue(), np.uint8)

    def decode(self, row: int) -> "Tensor":
        """One picture as (3, H, W) uint8 on the CPU, RGB, upright.

        Raises:
            BadImage: as `read`, or it cannot be decoded.
        """
        return _pixels(self.read(row))


def decode_any(path: Path) -> "Tensor":
    """Decode one picture as `ImageFiles.decode` does, also of the other formats in `_READABLE`.

    Raises:
        BadImage: it cannot be read or decoded, is damaged, or is an animation; with the reason.
    """
    return _checked_pixels(_read(path), any_kind=True)


def pixels_of(picture: Any) -> "Tensor":
    """A picture that Pillow has opened as (3, H, W) uint8 on the CPU, RGB, upright, on white where it is transparent.

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
    if picture.has_transparency_data:
        return on_white(torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def on_white(pixels: "Tensor") -> "Tensor":
    """A picture with alpha, (4, H, W) uint8, on a white background, (3, H, W) uint8."""
    colour, alpha = pixels[:3].int(), pixels[3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).byte()


def suffix(name: str) -> str:
    """The end of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def named_as_picture(name: str) -> bool:
    """Whether a file's name ends like that of a picture, of a kind that is taken or not."""
    return suffix(name) in (*IMAGE_SUFFIXES, *REFUSED_SUFFIXES)


def examine(path: Path) -> Verdict:
    """Opens and decodes one file."""
    try:
        data = _read(path)
        _, height, width = _checked_pixels(data).shape
    except BadImage as error:
        return str(error)
    return width, height, zlib.crc32(data.data)


def _read(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a file")  # a pipe would be waited for without end
        data = np.fromfile(path, dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise BadImage(unreadable(error)) from error
    if not len(data):
        raise BadImage("empty file")
    return data


def _check_header(data: npt.NDArray[np.uint8], *, any_kind: bool = False) -> str:
    """Makes sure that a file's bytes are one picture of a kind that is taken, whatever its name says; the kind."""
    from PIL import Image

    Image.init()  # all its formats, so that no thread looks through them while another still loads some
    try:
        with Image.open(io.BytesIO(data.data), formats=_READABLE) as picture:
            kind = picture.format or "this format"
            frames = 1 if kind in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
            if kind == "PNG":
                picture.verify()  # its checksums, which Pillow does not look at when it decodes
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels to be decoded safely: scale it down") from error
    except Exception as error:
        raise BadImage(_damage(data)) from error
    if kind not in _FORMATS and not any_kind:
        raise BadImage(not_supported(kind))
    if frames > 1:
        raise BadImage(f"a file of {frames} pages" if kind == "TIFF" else f"an animation of {frames} frames")
    return kind


def _checked_pixels(data: npt.NDArray[np.uint8], *, any_kind: bool = False) -> "Tensor":
    """The picture in a file's bytes, made sure to be of a kind that is taken, and not damaged."""
    kind = _check_header(data, any_kind=any_kind)
    with printed_by_c() as lines:
        pixels = _pixels(data)
    if lines and kind in ("JPEG", "MPO"):  # libpng prints warnings of colour profiles; damage is an error there
        raise BadImage(f"damaged: {lines[0]}")
    return pixels


def _is_transparent(data: npt.NDArray[np.uint8]) -> bool:
    """Whether a PNG or WebP may have transparent pixels, by its header."""
    start = data[:32].tobytes()
    if start.startswith(_PNG):  # a colour type with alpha, or transparent colours, which are named before the pixels
        return bool(start[25] & 4) or b"tRNS" in data.tobytes().partition(b"IDAT")[0]
    flags = {b"WEBPVP8X": 20, b"WEBPVP8L": 24}.get(start[8:16])
    return flags is not None and bool(start[flags] & 16)


def _pixels(data: npt.NDArray[np.uint8]) -> "Tensor":
    """The picture in a file's bytes, as `ImageFiles.decode` gives it."""
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image

    if data[:8].tobytes() == _PNG and data.tobytes().rfind(b"IEND\xaeB`\x82") < 0:
        raise BadImage(_DAMAGED)  # torchvision would show what there is of it, DALI would not
    try:
        if not data[:16].tobytes().startswith(_MAGIC) or _is_transparent(data):
            with Image.open(io.BytesIO(data.data), formats=_READABLE) as picture:
                return pixels_of(picture)
        pixels: Tensor = decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_DAMAGED) from error
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

        with suppress(Exception), Image.open(io.BytesIO(data.data), formats=["WEBP"]) as picture:
            return int(picture.getexif().get(0x0112, 1))
    return 1


def unreadable(error: Exception) -> str:
    """Why a file could not be read, in plain words."""
    if isinstance(error, FileNotFoundError):
        return f"{UNREADABLE}: it is not there, or is a link to nothing"
    return f"{UNREADABLE}: {getattr(error, 'strerror', None) or error}"


def _damage(data: npt.NDArray[np.uint8]) -> str:
    """Why bytes could not be opened, as far as their beginning tells."""
    start = data[:16].tobytes()
    if start[4:].startswith(_HEIF):
        return not_supported("HEIC")
    return _DAMAGED if start.startswith(_MAGIC) else "not a picture"


def not_supported(kind: str) -> str:
    """What is said of a format that is not taken."""
    return f"{kind.upper()} is not supported: convert it to PNG or JPEG"
