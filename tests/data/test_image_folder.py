"""Pictures in class folders are found, read as Pillow reads them, and refused with a reason where they are bad."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from densenet_dist.data import image_check, image_folder
from densenet_dist.data.image_files import Verdict
from densenet_dist.data.image_folder import Folder, read_folder
from densenet_dist.errors import DataError

WIDTH, HEIGHT = 24, 16


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept, away from the user's own."""
    base = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base / "densenet_dist" / "folders"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that have been opened to verify them."""
    names: list[str] = []
    check = image_check.examine

    def count(path: Path) -> Verdict:
        names.append(path.name)
        return check(path)

    monkeypatch.setattr(image_check, "examine", count)
    return names


def picture(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encode(picture(), "PNG")
JPEG = encode(picture(), "JPEG")
WEBP = encode(picture(), "WEBP")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def put(root: Path, *names: str, data: bytes = PNG) -> Path:
    """Writes files with the same bytes and gives the first one's path."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root / names[0]


def read(root: Path, **options: Any) -> Folder:
    return read_folder(root, image_size=32, **options)


class TestLayouts:
    def test_flat(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/b.png", "cat/deep/er/a.png", "dog/2.png", "dog/10.PNG", "ant/x.png")
        folder = read(tmp_path)
        assert folder.class_names == ("ant", "cat", "dog")
        assert folder.files.names == ("ant/x.png", "cat/b.png", "cat/deep/er/a.png", "dog/10.PNG", "dog/2.png")
        assert folder.labels.tolist() == [0, 1, 1, 2, 2]
        assert folder.labels.dtype == folder.files.sizes.dtype == np.int64
        assert folder.files.sizes.tolist() == [[WIDTH, HEIGHT]] * 5
        assert (folder.files.root, folder.files.image_size, len(folder.files)) == (tmp_path, 32, 5)
        assert folder.files.path(1) == tmp_path / "cat" / "b.png"
        assert (folder.val, folder.test_files, folder.test_labels) == (None, None, None)
        assert folder.skipped == ()

    @pytest.mark.parametrize("val", ["val", "valid", "validation"])
    def test_parts(self, tmp_path: Path, val: str) -> None:
        """A validation folder without a test folder is the test part."""
        put(tmp_path, "train/b/1.png", "train/a/1.png", f"{val}/b/1.png", "more/c/1.png")
        folder = read(tmp_path)
        assert folder.val is None
        assert folder.test_files is not None
        assert folder.test_files.names == (f"{val}/b/1.png",)
        put(tmp_path, "test/a/1.png", "test/b/1.png")
        folder = read(tmp_path)
        assert folder.files.names == ("train/a/1.png", "train/b/1.png", f"{val}/b/1.png")
        assert folder.labels.tolist() == [0, 1, 1]
        assert folder.val is not None
        assert folder.val.tolist() == [2]
        assert folder.test_files is not None
        assert folder.test_files.names == ("test/a/1.png", "test/b/1.png")
        assert folder.test_labels is not None
        assert folder.test_labels.tolist() == [0, 1]

    def test_parts_in_capitals(self, tmp_path: Path) -> None:
        put(tmp_path, "Train/a/1.png", "Train/b/1.png", "Test/b/1.png")
        folder = read(tmp_path)
        assert folder.class_names == ("a", "b")
        assert folder.test_files is not None

    def test_classes_called_train_and_test(self, tmp_path: Path) -> None:
        put(tmp_path, "train/1.png", "test/1.png")
        assert read(tmp_path).class_names == ("test", "train")

    def test_two_validation_folders(self, tmp_path: Path) -> None:
        put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png")
        with pytest.raises(DataError, match=r"2 validation folders, val, valid: keep one"):
            read(tmp_path)

    def test_stray_files_are_ignored(self, tmp_path: Path) -> None:
        put(tmp_path, "a/1.png", "b/1.png", "cover.png", ".git/x.png", "__MACOSX/a/1.png", "a/notes.txt", "a/Thumbs.db")
        put(tmp_path, "a/.hidden.png", "a/._1.png", "a/.trash/1.png", "b/labels.csv", "b/x.json", "b/README.md", "b/no")
        folder = read(tmp_path)
        assert folder.files.names == ("a/1.png", "b/1.png")
        assert folder.skipped == ()

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        put(tmp_path, os.fsdecode(b"caf\xe9/1.png"), "b/1.png")
        put(tmp_path, os.fsdecode(b"b/\xe9.png"), data=b"")
        folder = read(tmp_path, on_bad_image="skip")
        assert folder.class_names == ("b", "caf\\udce9")
        assert folder.skipped == ("b/\\udce9.png: empty file",)
        assert read(tmp_path, on_bad_image="skip").files.path(1).is_file()

    def test_links_are_followed_but_never_in_a_loop(self, tmp_path: Path) -> None:
        put(tmp_path, "set/a/1.png", "set/b/1.png", "elsewhere/2.png", "elsewhere/deep/3.png")
        (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "deep" / "again").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
        (tmp_path / "set" / "a" / "self").symlink_to(tmp_path / "set" / "a" / "self")
        (tmp_path / "set" / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "2.png")
        (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
        folder = read(tmp_path / "set")
        assert folder.files.names == (
            "a/1.png",
            "a/more/2.png",
            "a/more/deep/3.png",
            "b/1.png",
            "b/link.png",
            "c/2.png",
            "c/deep/3.png",
        )


class TestWrongFolders:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere does not exist; name the folder .*data\.root="):
            read(tmp_path / "nowhere")

    def test_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"set\.zip is not a folder \(an archive must be unpacked\); .*data\.root="):
            read(put(tmp_path, "set.zip"))

    def test_folder_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(folder: Path) -> None:
            raise PermissionError(13, "Permission denied", str(folder))

        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(DataError, match=r"cannot read /.*: Permission denied; give access"):
            read(tmp_path)

    @pytest.mark.parametrize("names", [["1.png", "2.png"], ["train/a/1.png", "test/a/1.png"]])
    def test_fewer_than_two_classes(self, tmp_path: Path, names: list[str]) -> None:
        put(tmp_path, *names)
        with pytest.raises(DataError, match=r"has [01] class folders, but at least 2 are needed: .*<class>"):
            read(tmp_path)

    def test_class_that_train_lacks(self, tmp_path: Path) -> None:
        put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "test/a/1.png", "val/zebra/1.png")
        with pytest.raises(DataError, match=r"/val has classes that .*/train lacks: zebra; rename"):
            read(tmp_path)

    def test_class_without_pictures(self, tmp_path: Path) -> None:
        put(tmp_path, "a/1.png", "b/1.png", "c/notes.txt", "d/e/notes.txt")
        with pytest.raises(DataError, match=r"has no picture that can be used in c, d: add some \(\.jpg"):
            read(tmp_path)


def by_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    """What Pillow makes of a file: (3, H, W) uint8, RGB, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)


KINDS: dict[str, bytes] = {
    **{f"{mode}.png": encode(picture().convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")},
    **{f"{mode}.jpg": encode(picture().convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    **{f"{mode}.webp": encode(picture().convert(mode), "WEBP") for mode in ("RGB", "L", "RGBA")},
    **{f"exif{number}.jpg": encode(picture(), "JPEG", exif=exif(number)) for number in range(1, 9)},
    **{f"exif{number}.webp": encode(picture(), "WEBP", exif=exif(number)) for number in range(1, 9)},
    **{f"exif{number}.png": encode(picture(), "PNG", exif=exif(number)) for number in (3, 6)},
    "four colours.png": encode(picture().quantize(4), "PNG", bits=2, transparency=1),
    "one transparent grey.png": encode(picture().convert("L"), "PNG", transparency=3),
    "lossless.webp": encode(picture(), "WEBP", lossless=True),
    "progressive.jpeg": encode(picture(), "JPEG", progressive=True),
    "two in one.jpg": encode(picture(), "MPO", save_all=True, append_images=[picture(1)]),
    "png.jpg": PNG,
    "jpeg.png": JPEG,
    "one pixel.png": encode(picture().resize((1, 1)), "PNG"),
}


class TestPictures:
    def test_as_pillow_reads_them(self, tmp_path: Path) -> None:
        for name, data in KINDS.items():
            put(tmp_path, f"a/{name}", data=data)
        put(tmp_path, "b/1.png")
        files = read(tmp_path).files
        assert len(files) == len(KINDS) + 1
        for row, name in enumerate(files.names[:-1]):
            expected = by_pillow(KINDS[name[2:]])
            pixels = files.decode(row)
            assert str(pixels.dtype) == "torch.uint8", name
            assert np.array_equal(pixels.numpy(), expected), name
            assert files.sizes[row].tolist() == [expected.shape[2], expected.shape[1]], name

    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_are_rounded(self, tmp_path: Path, channels: int) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)
        values[0, :4, 0] = 0, 65535, 128, 129
        put(tmp_path, "a/1.png", "b/1.png", data=png16(values))
        files = read(tmp_path).files
        assert files.sizes.tolist() == [[WIDTH, HEIGHT]] * 2
        pixels = files.decode(0).numpy()
        expected = np.round(values / 257).astype(np.uint8).transpose(2, 0, 1)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.broadcast_to(expected, (3, HEIGHT, WIDTH)))

    def test_importing_the_module_brings_no_library(self) -> None:
        code = "import sys, densenet_dist.data.image_folder; print([m for m in ('torch', 'PIL') if m in sys.modules])"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png16(values: npt.NDArray[np.uint16]) -> bytes:
    """A PNG with 16 bits a channel, from (H, W, 1 or 3); Pillow writes none with colours."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """The header of a PNG of 10^10 pixels, and nothing more."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return encode(picture(), kind, save_all=True, append_images=[picture(1), picture(2)])


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


DAMAGED, NO_PICTURE = "cut short or damaged", "not a picture"
GIF = "GIF is not supported: convert it to PNG or JPEG"
BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"this is no picture\n" * 9, NO_PICTURE),
    "zeros.png": (bytes(1000), NO_PICTURE),
    "half.jpg": (JPEG[: len(JPEG) // 2], DAMAGED),
    "almost.jpg": (JPEG[:-2], DAMAGED),
    "header only.jpg": (JPEG[:30], DAMAGED),
    "half.png": (PNG[: len(PNG) // 2], DAMAGED),
    "header only.png": (PNG[:30], DAMAGED),
    "half.webp": (WEBP[: len(WEBP) // 2], DAMAGED),
    "header only.webp": (WEBP[:14], DAMAGED),
    "corrupt.png": (flipped(PNG, len(PNG) // 2), DAMAGED),
    "corrupt header.png": (flipped(PNG, 20), DAMAGED),
    "gif.gif": (encode(picture(), "GIF"), GIF),
    "gif.jpg": (encode(picture(), "GIF"), GIF),
    "bmp.png": (encode(picture(), "BMP"), "BMP is not supported: convert it to PNG or JPEG"),
    "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC is not supported: convert it to PNG or JPEG"),
    "x.HEIC": (b"whatever", "HEIC is not supported: convert it to PNG or JPEG"),
    "x.tiff": (b"whatever", "TIFF is not supported: convert it to PNG or JPEG"),
    "x.svg": (b"whatever", "SVG is not supported: convert it to PNG or JPEG"),
    "x.nef": (b"whatever", "NEF is not supported: convert it to PNG or JPEG"),
    "moving.png": (animation("PNG"), "an animation of 3 frames"),
    "moving.webp": (animation("WEBP"), "an animation of 3 frames"),
    "bomb.png": (bomb(), "too many pixels to be decoded safely: scale it down"),
}


FOUND = {
    **{f"a/{name}": reason for name, (_, reason) in BAD.items()},
    "a/dangling.png": "cannot be read: it is not there, or is a link to nothing",
    "a/itself.png": "cannot be read: Too many levels of symbolic links",
    "a/pipe.png": "not a file",
}


class TestBadImages:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """A folder with good pictures and all kinds of bad ones."""
        put(tmp_path, "a/good.png", "b/good.png")
        for name, (data, _) in BAD.items():
            put(tmp_path, f"a/{name}", data=data)
        (tmp_path / "a" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "a" / "itself.png").symlink_to(tmp_path / "a" / "itself.png")
        os.mkfifo(tmp_path / "a" / "pipe.png")
        return tmp_path

    def test_skip_names_each_with_its_reason(self, root: Path) -> None:
        for _ in range(2):  # opened, and from the cache
            folder = read(root, on_bad_image="skip")
            assert folder.files.names == ("a/good.png", "b/good.png")
            assert dict(line.split(": ", 1) for line in folder.skipped) == FOUND
            assert list(folder.skipped) == sorted(folder.skipped, key=lambda line: line.split(": ")[0].encode())

    def test_one_error_for_all(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(2):
            with pytest.raises(DataError) as error:
                read(root)
            lines = str(error.value).splitlines()
            total = len(FOUND)
            assert lines[0] == f"{total} of {total + 2} pictures in {root} cannot be used:"
            assert len(lines) == 1 + 20 + 2
            assert all(FOUND[name] == reason for name, reason in (ln.strip().split(": ", 1) for ln in lines[1:21]))
            assert lines[21] == f"  ... and {total - 20} more"
            assert lines[22] == "  delete or convert them, or leave them out: data.on_bad_image=skip"
        monkeypatch.setattr(image_folder, "_SHOWN", 100)
        with pytest.raises(DataError) as error:
            read(root)
        lines = [line.strip() for line in str(error.value).splitlines()]
        assert dict(line.split(": ", 1) for line in lines[1:-1]) == FOUND

    def test_in_every_part(self, tmp_path: Path) -> None:
        put(tmp_path, *(f"{part}/{of}/1.png" for part in ("train", "val", "test") for of in "ab"))
        put(tmp_path, "train/a/0.png", "val/a/0.png", "test/a/0.png", data=b"")
        with pytest.raises(DataError, match=r"3 of 9 pictures"):
            read(tmp_path)
        folder = read(tmp_path, on_bad_image="skip")
        assert folder.skipped == tuple(f"{part}/a/0.png: empty file" for part in ("train", "val", "test"))
        assert folder.val is not None
        assert folder.val.tolist() == [2, 3]
        assert folder.labels.tolist() == [0, 1, 0, 1]


class TestCache:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        put(tmp_path, "a/1.png", "a/2.png", "b/3.png")
        put(tmp_path, "b/bad.png", data=b"")
        return tmp_path

    def skip(self, root: Path) -> Folder:
        return read(root, on_bad_image="skip")

    def test_nothing_is_opened_twice(self, root: Path, opened: list[str]) -> None:
        first = self.skip(root)
        assert sorted(opened) == ["1.png", "2.png", "3.png", "bad.png"]
        opened.clear()
        second = self.skip(root)
        assert opened == []
        assert second.files.names == first.files.names
        assert second.files.sizes.tolist() == first.files.sizes.tolist()
        assert second.files.sizes.dtype == np.int64
        assert second.skipped == first.skipped

    def test_only_what_changed_is_opened(self, root: Path, opened: list[str]) -> None:
        self.skip(root)
        opened.clear()
        put(root, "a/new.png", "b/bad.png")
        put(root, "a/1.png", data=encode(picture().resize((3, 5)), "PNG"))
        os.utime(root / "a" / "2.png", ns=(0, 12345))
        (root / "b" / "3.png").unlink()
        folder = self.skip(root)
        assert sorted(opened) == ["1.png", "2.png", "bad.png", "new.png"]
        assert folder.files.names == ("a/1.png", "a/2.png", "a/new.png", "b/bad.png")
        assert folder.files.sizes[0].tolist() == [3, 5]
        assert folder.skipped == ()

    def test_what_could_not_be_read_is_tried_again(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path, **options: Any) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(np, "fromfile", fail)
            with pytest.raises(DataError, match=r"a/1\.png: cannot be read: Input/output error"):
                read(root)
        assert len(self.skip(root).files) == 3

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "[" * 100_000,
            lambda text: json.dumps({**json.loads(text), "version": 0}),
            lambda text: json.dumps({**json.loads(text), "files": {"a/1.png": 1, "a/2.png": [1, 2], "b/3.png": None}}),
        ],
    )
    def test_damaged(self, root: Path, cache: Path, opened: list[str], damage: Callable[[str], str]) -> None:
        first = self.skip(root)
        (file,) = cache.iterdir()
        file.write_text(damage(file.read_text()))
        opened.clear()
        assert self.skip(root).files.names == first.files.names
        assert len(opened) == 4
        self.skip(root)
        assert len(opened) == 4  # it has been mended
        assert list(cache.iterdir()) == [file]

    def test_unwritable(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(put(tmp_path, "a file.txt")))
        for _ in range(2):
            assert len(self.skip(root).files) == 3
        assert len(opened) == 8

    def test_an_interrupt_keeps_what_was_found(self, root: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        check = image_check.examine

        def interrupt(path: Path) -> Verdict:
            if path.name == "3.png":
                raise KeyboardInterrupt
            return check(path)

        monkeypatch.setattr(image_check, "examine", interrupt)
        with pytest.raises(KeyboardInterrupt):
            self.skip(root)
        (file,) = cache.iterdir()
        assert set(json.loads(file.read_text())["files"]) == {"a/1.png", "a/2.png"}
