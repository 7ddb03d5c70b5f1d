"""Images with their labels, in memory or in files; decode image files, and say why others cannot be used.

libjpeg reports damage on C's standard error only, which is captured per thread. glibc documents both parts of that:
`stderr` is a variable that may be set, and `fopencookie` creates a stream of callbacks.
"""

import ctypes
import errno
import io
import os
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from densenet_dist.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
_REFUSED_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pgm", ".ppm"),
    *(".psd", ".svg", ".tif", ".tiff", ".raw", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf"),
    *(".rw2", ".srw"),
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # Pillow's names; MPO is a JPEG with more images behind the first
# What Pillow decodes itself: it would pass EPS files, for example, to Ghostscript.
_READABLE = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "ICO", "JPEG2000", "PPM", "PSD", "TIFF")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = (b"\xff\xd8\xff", _PNG, b"RIFF")
_HEIF = (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")
_MAX_BYTES = 2 << 30
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of network file systems
_RETRY_S = 1.0
_DAMAGED = "cut short or damaged"
UNREADABLE = "cannot be read"  # the start of reasons that may change although the file does not

Verdict = tuple[int, int, int] | str
"""Width and height of an image in pixels and the CRC-32 of its file; or why it cannot be used."""


class BadImage(Exception):
    """A file cannot be used as an image; the message is the reason."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that have been verified.

    Attributes:
        root: the folder that `names` are relative to.
        names: relative POSIX paths, in byte order; those of a validation folder come after all others.
        sizes: (n, 2) int64, width and height in pixels, after the EXIF orientation.
        checksums: (n,) int64, CRC-32 of each file when it was verified.
        image_size: side in pixels of the square images made from them.
    """

    root: Path
    names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.int64]
    image_size: int

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> "ImageFiles":
        names = tuple(self.names[index] for index in indices)
        return ImageFiles(self.root, names, self.sizes[indices], self.checksums[indices], self.image_size)

    def path(self, index: int) -> Path:
        """Return the path of one file."""
        return self.root / self.names[index]

    def encoded(self, index: int) -> npt.NDArray[np.uint8]:
        """Return bytes (n,) uint8 for another decoder: those of the file; of a transparent image, `decode` as PNG.

        Raises:
            DataError: the file is no longer an image of the verified size.
        """
        from torchvision.io import encode_png

        with self._read(index) as data:
            return encode_png(_pixels(data), compression_level=0).numpy() if _is_transparent(data) else data

    def decode(self, index: int) -> "Tensor":
        """Decode one image to (3, H, W) uint8 on the CPU, RGB, upright; errors as for `encoded`."""
        with self._read(index) as data:
            return _pixels(data)

    @contextmanager
    def _read(self, index: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of one file.

        Unchanged bytes are trusted; others are decoded first, because a broken file can crash DALI's decoder, and the
        process with it.
        """
        try:
            data = _read(self.path(index))
            unchanged = zlib.crc32(data.data) == self.checksums[index]
            if not unchanged and list(_verified_pixels(data).shape[:0:-1]) != self.sizes[index].tolist():
                raise BadImage("no longer the image that was verified")
            yield data
        except BadImage as error:
            raise DataError(
                f"{self.path(index)}: {error}\n  it was readable when the run started: restore it, and resume the run"
            ) from error


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in the data set's own order.

    Attributes:
        images: (n, H, W, 3) uint8, RGB, H = W; or image files.
        labels: (n,) int64, in [0, number of classes).
    """

    images: npt.NDArray[np.uint8] | ImageFiles
    labels: npt.NDArray[np.int64]

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> "Split":
        return Split(self.images[indices], self.labels[indices])

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.image_size if isinstance(self.images, ImageFiles) else int(self.images.shape[1])


def decode_any(path: Path) -> "Tensor":
    """Decode a file as `ImageFiles.decode` does, of any format that Pillow reads; raise BadImage for animations too."""
    return _verified_pixels(_read(path), any_format=True)


def pixels_of(image: Any) -> "Tensor":
    """Convert a Pillow image to (3, H, W) uint8 on the CPU, RGB, upright, transparent areas on white.

    Raises:
        BadImage: its range of values is unknown, or Pillow cannot decode it.
    """
    import torch
    from PIL import ImageOps

    is_pnm = getattr(image, "format", None) == "PPM"  # Pillow scales their levels to 16 bits, in mode I
    try:
        image = ImageOps.exif_transpose(image)  # decodes an image that was only opened
    except Exception as error:
        raise BadImage(_DAMAGED) from error
    if image.mode.startswith("I;16") or (image.mode == "I" and is_pnm):
        return _to_8_bits(torch.from_numpy(np.asarray(image).astype(np.int32))).expand(3, -1, -1)
    if image.mode in ("I", "F"):
        raise BadImage("gray levels of 32 bits, whose range is not known: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        return on_white(torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def on_white(pixels: "Tensor") -> "Tensor":
    """Blend an image with alpha, (4, H, W) uint8, with white: (3, H, W) uint8."""
    color, alpha = pixels[:3].int(), pixels[3:].int()
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).byte()


def has_image_suffix(name: str) -> bool:
    """Return whether a file's name has the suffix of an image format, supported or not."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *_REFUSED_SUFFIXES))


def verify_image(path: Path) -> Verdict:
    """Verify that a file is an image that can be used, by decoding it."""
    suffix = path.suffix.lower()
    if suffix in _REFUSED_SUFFIXES:
        return _not_supported(suffix[1:])
    try:
        data = _read(path)
        _, height, width = _verified_pixels(data).shape
    except BadImage as error:
        return str(error)
    return width, height, zlib.crc32(data.data)


def _read(path: Path, tries: int = 3) -> npt.NDArray[np.uint8]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")  # reading a pipe may never end
        if status.st_size > _MAX_BYTES:
            raise BadImage(f"a file of {status.st_size:,} bytes, too many for an image")
        data = np.fromfile(path, dtype=np.uint8)
        if len(data) < status.st_size:  # NumPy does not report errors of reading
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    except FileNotFoundError as error:
        raise BadImage(f"{UNREADABLE}: it does not exist, or is a broken link") from error
    except (OSError, ValueError) as error:
        if tries > 1 and getattr(error, "errno", None) in _TRANSIENT:
            time.sleep(_RETRY_S)
            return _read(path, tries - 1)
        raise BadImage(f"{UNREADABLE}: {getattr(error, 'strerror', None) or error}") from error
    if not len(data):
        raise BadImage("empty file")
    return data


def _verified_pixels(data: npt.NDArray[np.uint8], *, any_format: bool = False) -> "Tensor":
    """Decode a file's bytes, of a supported format and not damaged."""
    kind = _check_header(data, any_format=any_format)
    with _captured_c_stderr() as lines:
        pixels = _pixels(data)
    if lines and kind in ("JPEG", "MPO"):  # libpng prints warnings about color profiles; damage is an error there
        raise BadImage(f"damaged: {lines[0]}")
    return pixels


def _check_header(data: npt.NDArray[np.uint8], *, any_format: bool) -> str:
    """Check that a file's bytes are one image of a supported format, whatever its name; return the format."""
    from PIL import Image

    Image.init()  # load all formats now: threads must not read Pillow's registry while it is being filled
    try:
        with Image.open(io.BytesIO(data.data), formats=_READABLE) as image:
            kind = image.format or "this format"
            # The frames of a PSD are its layers; the first one is their composite.
            frames = 1 if kind in ("JPEG", "MPO", "PSD") else getattr(image, "n_frames", 1)
            if kind == "PNG":
                image.verify()  # its checksums, which Pillow does not check when it decodes
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels to be decoded safely: scale it down") from error
    except Exception as error:
        start = data[:16].tobytes()
        if start[4:].startswith(_HEIF):
            raise BadImage(_not_supported("HEIC")) from error
        raise BadImage(_DAMAGED if start.startswith(_MAGIC) else "not an image") from error
    if kind not in _FORMATS and not any_format:
        raise BadImage(_not_supported(kind))
    if frames > 1:
        raise BadImage(f"a file of {frames} pages" if kind == "TIFF" else f"an animation of {frames} frames")
    return kind


def _pixels(data: npt.NDArray[np.uint8]) -> "Tensor":
    """Decode a file's bytes, see `ImageFiles.decode`: by torchvision, which is faster, or by Pillow."""
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image

    start = data[:32].tobytes()
    if start.startswith(_PNG) and data.tobytes().rfind(b"IEND\xaeB`\x82") < 0:
        raise BadImage(_DAMAGED)  # torchvision would return a part of it, DALI would not
    webp_exif = start[8:16] == b"WEBPVP8X" and start[20] & 8  # torchvision does not apply its orientation
    try:
        if not start.startswith(_MAGIC) or webp_exif or _is_transparent(data):
            with Image.open(io.BytesIO(data.data), formats=_READABLE) as image:
                return pixels_of(image)
        pixels: Tensor = decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_DAMAGED) from error
    if pixels.dtype == torch.uint16:
        pixels = _to_8_bits(pixels.to(torch.int32))
    return pixels.expand(3, -1, -1)


def _to_8_bits(levels: "Tensor") -> "Tensor":
    return ((levels + 128) // 257).byte()


def _is_transparent(data: npt.NDArray[np.uint8]) -> bool:
    """Return whether a PNG or WebP may have transparent pixels, by its header."""
    start = data[:32].tobytes()
    if start.startswith(_PNG):  # a color type with alpha, or transparent colors, which are listed before the pixels
        return bool(start[25] & 4) or b"tRNS" in data.tobytes().partition(b"IDAT")[0]
    flags = {b"WEBPVP8X": 20, b"WEBPVP8L": 24}.get(start[8:16])
    return flags is not None and bool(start[flags] & 16)


def _not_supported(kind: str) -> str:
    return f"{kind.upper()} is not supported: convert it to PNG or JPEG"


_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_thread = threading.local()
_lock = threading.Lock()
_users = 0


class _Functions(ctypes.Structure):
    _fields_ = (("read", ctypes.c_void_p), ("write", _WRITE), ("seek", ctypes.c_void_p), ("close", ctypes.c_void_p))


def _write(cookie: object, data: int, size: int) -> int:
    text = ctypes.string_at(data, size)
    if hasattr(_thread, "lines"):
        _thread.lines.append(text.decode(errors="replace").strip())
    else:
        os.write(2, text)
    return size


_callback = _WRITE(_write)  # must outlive the stream


@cache
def _streams() -> tuple[Any, int | None, int | None]:
    """Return the C variable `stderr`, its original value, and a stream that calls `_write`."""
    libc = ctypes.CDLL(None)
    libc.fopencookie.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopencookie(None, b"w", _Functions(None, _callback, None, None)))
    libc.setbuf(stream, None)
    variable = ctypes.c_void_p.in_dll(libc, "stderr")
    return variable, variable.value, stream.value


@contextmanager
def _captured_c_stderr() -> Iterator[list[str]]:
    """Yield a list that collects what C code prints on standard error in this thread."""
    global _users
    with _lock:
        variable, own, ours = _streams()
        variable.value = ours
        _users += 1
    _thread.lines = []
    try:
        yield _thread.lines
    finally:
        del _thread.lines
        with _lock:
            _users -= 1
            if not _users:
                variable.value = own
