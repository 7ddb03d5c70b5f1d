"""Pictures in class folders are found, read as Pillow reads them, and refused with a reason where they are bad."""

import errno
import io
import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from image_loaders import picture_kinds, png_chunk
from PIL import Image, ImageOps

from densenet_dist.data import image_files, image_folder
from densenet_dist.data.image_files import BadImage, Verdict, decode_any
from densenet_dist.data.image_folder import Folder, read_folder
from densenet_dist.errors import DataError

WIDTH, HEIGHT = 24, 16


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that have been opened to verify them."""
    names: list[str] = []
    check = image_folder.verify_image

    def count(path: Path) -> Verdict:
        names.append(path.name)
        return check(path)

    monkeypatch.setattr(image_folder, "verify_image", count)
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


def put(root: Path, *names: str, data: bytes = PNG) -> Path:
    """Writes files with the same bytes and gives the first one's path."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root / names[0]


def read(root: Path, **options: Any) -> Folder:
    return read_folder(root, image_size=32, **options)


CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
PUBLIC = (  # layouts of archives: * is a class, part= what the part is found to be, left= what is not used
    "train=Training/* test=Testing/*",  # brain tumor MRI
    "train=train/* val=val/* test=test/* left=other/* __MACOSX/train/*",  # chest X-ray
    "train=train/* test=valid/* left=test",  # Flowers 102
    "flat=*/images",
)
COPIES = {  # where all classes are found more than once
    "color/* grayscale/*": "color, grayscale",  # PlantVillage
    "* cell_images/*": "cell_images",  # malaria
    "*/images */masks": "glioma, meningioma, notumor, pituitary",  # COVID radiography
}


def files_of(pattern: str) -> list[str]:
    """The files that a pattern of a layout stands for."""
    return [pattern.replace("*", name) + "/1.png" * ("." not in pattern) for name in CLASSES]


class TestLayouts:
    def test_flat(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/b.png", "cat/deep/er/a.png", "dog/2.png", "dog/10.PNG", "ant/x.png")
        folder = read(tmp_path)
        assert folder.class_names == ("ant", "cat", "dog")
        assert folder.train.images.names == ("ant/x.png", "cat/b.png", "cat/deep/er/a.png", "dog/10.PNG", "dog/2.png")
        assert folder.train.labels.tolist() == [0, 1, 1, 2, 2]
        assert folder.train.labels.dtype == folder.train.images.sizes.dtype == np.int64
        assert folder.train.images.sizes.tolist() == [[WIDTH, HEIGHT]] * 5
        assert (folder.train.images.root, folder.train.images.image_size, len(folder.train.labels)) == (tmp_path, 32, 5)
        assert folder.train.images.path(1) == tmp_path / "cat" / "b.png"
        assert (folder.val, folder.test) == (None, None)
        assert folder.skipped == ()

    @pytest.mark.parametrize("layout", PUBLIC)
    def test_of_public_data_sets(self, tmp_path: Path, layout: str) -> None:
        tokens = [token.rpartition("=") for token in layout.split()]
        put(tmp_path, *(name for _, _, pattern in tokens for name in files_of(pattern)))
        folder = read(tmp_path)
        assert folder.class_names == CLASSES
        expected = {part: files_of(pattern) for part, _, pattern in tokens}
        val = [folder.train.images.names[row] for row in ([] if folder.val is None else folder.val)]
        assert list(folder.train.images.names) == expected.get("train", expected.get("flat")) + val
        assert val == expected.get("val", [])
        assert folder.train.labels.tolist() == [0, 1, 2, 3] * (1 + bool(val))
        assert list(folder.test.images.names if folder.test else []) == expected.get("test", [])
        assert folder.test is None or folder.test.labels.tolist() == [0, 1, 2, 3]
        left = [line for line in folder.skipped if line.endswith(": not used (no class folders, or no part)")]
        assert len(left) == len(folder.skipped) == layout.count("left=")

    def test_stray_files_are_ignored(self, tmp_path: Path) -> None:
        put(tmp_path, "a/1.png", "b/1.png", "cover.png", ".git/x.png", "__MACOSX/a/1.png", "a/notes.txt", "a/Thumbs.db")
        put(tmp_path, "a/.hidden.png", "a/._1.png", "a/.trash/1.png", "b/labels.csv", "b/x.json", "b/README.md", "b/no")
        folder = read(tmp_path)
        assert folder.train.images.names == ("a/1.png", "b/1.png")
        assert folder.skipped == ()

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        put(tmp_path, os.fsdecode(b"caf\xe9/1.png"), "b/1.png")
        put(tmp_path, os.fsdecode(b"b/\xe9.png"), data=b"")
        folder = read(tmp_path, on_bad_image="skip")
        assert folder.class_names == ("b", "caf\\udce9")
        assert folder.skipped == ("b/\\udce9.png: empty file",)
        assert read(tmp_path, on_bad_image="skip").train.images.path(1).is_file()

    def test_links_are_followed_but_never_in_a_loop(self, tmp_path: Path) -> None:
        put(tmp_path, "set/a/1.png", "set/b/1.png", "elsewhere/2.png", "elsewhere/deep/3.png")
        (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "deep" / "again").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
        (tmp_path / "set" / "a" / "self").symlink_to(tmp_path / "set" / "a" / "self")
        (tmp_path / "set" / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "2.png")
        (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
        folder = read(tmp_path / "set")
        linked = ("a/more/2.png", "a/more/deep/3.png", "b/1.png", "b/link.png", "c/2.png", "c/deep/3.png")
        assert folder.train.images.names == ("a/1.png", *linked)


class TestWrongFolders:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere does not exist; name the folder .*data\.root="):
            read(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"set\.zip is not a folder \(an archive must be unpacked\); .*data\.root="):
            read(put(tmp_path, "set.zip"))

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            ("1.png 2.png", r"has 0 class folders, but at least 2 are needed: .*<class>"),
            ("train/a/1.png test/a/1.png", r"has 1 class folders, but at least 2 are needed: .*<class>"),
            ("train/a/1.png train/b/1.png val/a/1.png valid/a/1.png", "more than one val folder: remove valid"),
            ("train/cat.1.png test1/1.png", "has test1, train, which are no classes and no parts: images are looked"),
            ("seg_train/a/1.png seg_train/b/1.png seg_test/a/1.png", "has seg_test, seg_train, which are no classes"),
            ("set/a/1.png set/b/1.png", r"has 1 class folders.*name the folder that holds your class folders"),
            ("train/a/1.png train/b/1.png val/z/1.png", r"/val has classes that .*/train lacks: z; rename"),
            ("a/1.png b/1.png c/x.txt d/e/x.txt", r"no image that can be used in c, d: add some \(\.jpg"),
        ],
    )
    def test_no_such_layout(self, tmp_path: Path, names: str, said: str) -> None:
        put(tmp_path, *names.split())
        with pytest.raises(DataError, match=said):
            read(tmp_path)

    @pytest.mark.parametrize("layout", COPIES)
    def test_copies_of_the_classes_are_not_classes(self, tmp_path: Path, layout: str) -> None:
        put(tmp_path, *(name for pattern in layout.split() for name in files_of(pattern)))
        said = rf"more than one folder of each of these names: .*; look into {COPIES[layout]}\n"
        with pytest.raises(DataError, match=said):
            read(tmp_path)


def by_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    """What Pillow makes of a file, on white: (3, H, W) uint8, RGB, upright."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(upright.convert("RGB" if image.mode == "CMYK" else "RGBA")).astype(float)
        alpha = pixels[..., 3:] / 255 if pixels.shape[2] == 4 else 1.0
        return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8).transpose(2, 0, 1)


def test_pictures_are_as_pillow_reads_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kinds = {name: data for name, data in picture_kinds(picture()).items() if "16" not in name}
    kinds |= {"png.jpg": PNG, "two.jpg": encode(picture(), "MPO", save_all=True, append_images=[picture(1)])}
    for name, data in kinds.items():
        put(tmp_path, f"a/{name}", data=data)
    put(tmp_path, "b/1.png")
    files = read(tmp_path).train.images
    assert len(files.names) == len(kinds) + 1
    for row, name in enumerate(files.names[:-1]):
        expected = by_pillow(kinds[name[2:]])
        pixels = files.decode(row)
        assert str(pixels.dtype) == "torch.uint8", name
        assert np.array_equal(pixels.numpy(), expected), name
        assert files.sizes[row].tolist() == [expected.shape[2], expected.shape[1]], name
    assert capfd.readouterr().err.replace("libpng warning: iCCP: too short\n", "") == ""


def bomb() -> bytes:
    """The header of a PNG of 10^10 pixels, and nothing more."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return PNG[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return encode(picture(), kind, save_all=True, append_images=[picture(1), picture(2)])


def flipped(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


DAMAGED, NO_PICTURE = "cut short or damaged", "not an image"
BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"this is no picture\n" * 9, NO_PICTURE),
    "zeros.png": (bytes(1000), NO_PICTURE),
    "almost.jpg": (JPEG[:-2], DAMAGED),
    "flipped.jpg": (flipped(JPEG, -82), "damaged: Corrupt JPEG data: 40 extraneous bytes before marker 0xd9"),
    "half.webp": (WEBP[: len(WEBP) // 2], DAMAGED),
    "corrupt.png": (flipped(PNG, len(PNG) // 2), DAMAGED),
    "gif.jpg": (encode(picture(), "GIF"), "GIF is not supported: convert it to PNG or JPEG"),
    "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC is not supported: convert it to PNG or JPEG"),
    "x.HEIC": (b"whatever", "HEIC is not supported: convert it to PNG or JPEG"),
    "moving.png": (animation("PNG"), "an animation of 3 frames"),
    "moving.webp": (animation("WEBP"), "an animation of 3 frames"),
    "bomb.png": (bomb(), "too many pixels to be decoded safely: scale it down"),
}


FOUND = {
    **{f"a/{name}": reason for name, (_, reason) in BAD.items()},
    "a/dangling.png": "cannot be read: it does not exist, or is a broken link",
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

    def test_skip_names_each_with_its_reason(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):  # opened, and from the cache
            folder = read(root, on_bad_image="skip")
            assert folder.train.images.names == ("a/good.png", "b/good.png")
            assert dict(line.split(": ", 1) for line in folder.skipped) == FOUND
        assert capfd.readouterr().err == "", "decoders are heard, and their lines do not go where no file is named"

    def test_one_error_names_the_first(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_folder, "_SHOWN", 10)
        with pytest.raises(DataError) as error:
            read(root)
        first, *shown, more, mend = str(error.value).splitlines()
        total = len(FOUND)
        assert first == f"{total} of {total + 2} images in {root} cannot be used:"
        assert all(FOUND[name] == reason for name, reason in (line.strip().split(": ", 1) for line in shown))
        assert more == f"  ... and {total - 10} more"
        assert mend == "  delete or convert them, or leave them out: data.on_bad_image=skip"


@pytest.mark.parametrize("faults", [2, 3])
def test_a_fault_of_a_network_disk_that_passes_is_not_an_error(tmp_path: Path, monkeypatch: Any, faults: int) -> None:
    put(tmp_path, "a.png")
    left, read = [OSError(errno.ESTALE, "Stale file handle"), None, None][:faults], np.fromfile

    def fromfile(*arguments: Any, **options: Any) -> Any:
        if left and (error := left.pop()):
            raise error
        return read(*arguments, **options)[: 9 if left else None]  # cut short, as NumPy does without an error

    monkeypatch.setattr(image_files, "_RETRY_S", 0)
    monkeypatch.setattr(np, "fromfile", fromfile)
    with pytest.raises(BadImage, match="Stale file handle") if faults == 3 else nullcontext():
        decode_any(tmp_path / "a.png")


class TestCache:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        put(tmp_path, "a/1.png", "a/2.png", "b/3.png")
        put(tmp_path, "b/bad.png", data=b"")
        return tmp_path

    def skip(self, root: Path) -> Folder:
        return read(root, on_bad_image="skip")

    def test_only_what_changed_is_opened(self, root: Path, opened: list[str]) -> None:
        first = self.skip(root)
        assert sorted(opened) == ["1.png", "2.png", "3.png", "bad.png"]
        opened.clear()
        again = self.skip(root)
        assert opened == []
        assert (again.train.images.names, again.skipped) == (first.train.images.names, first.skipped)
        assert again.train.images.sizes.tolist() == first.train.images.sizes.tolist()
        put(root, "a/new.png", "b/bad.png")
        put(root, "a/1.png", data=encode(picture().resize((3, 5)), "PNG"))
        os.utime(root / "a" / "2.png", ns=(0, 12345))
        (root / "b" / "3.png").unlink()
        folder = self.skip(root)
        assert sorted(opened) == ["1.png", "2.png", "bad.png", "new.png"]
        assert folder.train.images.names == ("a/1.png", "a/2.png", "a/new.png", "b/bad.png")
        assert folder.train.images.sizes[0].tolist() == [3, 5]
        assert folder.skipped == ()

    def test_damaged(self, root: Path, remembered: Path, opened: list[str]) -> None:
        first = self.skip(root)
        (file,) = remembered.iterdir()
        whole = file.read_text()
        wrong = {"a/1.png": 1, "a/2.png": [1, 2], "b/3.png": None}
        others = (json.dumps(json.loads(whole) | change) for change in ({"version": 0}, {"files": wrong}))
        for damaged in (whole[: len(whole) // 2], "[" * 100_000, *others):
            file.write_text(damaged)
            opened.clear()
            assert self.skip(root).train.images.names == first.train.images.names
            assert len(opened) == 4
            self.skip(root)
            assert len(opened) == 4  # it has been mended
            assert list(remembered.iterdir()) == [file]
