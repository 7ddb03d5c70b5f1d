"""Pictures on an object store are kept the same on a node, and only what changed is taken again. A real S3 server."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray_runs import bytes_of
from s3_store import Store

from densenet_dist.data.datasets import load_dataset, prepare_dataset, publish_dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.store import cache_of, sync_images
from densenet_dist.errors import DataError

pytestmark = pytest.mark.usefixtures("cache")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photos(store: Store) -> dict[str, bytes]:
    """Pictures on the store: two classes of three."""
    files = {f"{name}/{number}.png": picture(ord(name[0]) + number) for name in ("cat", "dog") for number in range(3)}
    for name, data in files.items():
        store.write(name, data)
    return files


def sync(store: Store) -> dict[str, bytes]:
    """The node's pictures, brought up to date."""
    return bytes_of(sync_images(store.uri))


def taken(store: Store) -> list[str]:
    """Pictures that have been asked for since the last call."""
    names = [path.removeprefix(f"/{store.prefix}/") for method, path in store.server.seen if method == "GET"]
    store.server.seen.clear()
    return sorted(name for name in names if name.endswith(".png"))


def test_loads_as_from_a_folder(store: Store, photos: dict[str, bytes], tmp_path: Path) -> None:
    for name in photos:
        store.delete(name)
    photos = {f"{part}/{name}": data for part in ("Training", "Testing") for name, data in photos.items()}
    for name, data in photos.items():
        store.write(name, data)
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    remote, local = (load_dataset("folder", root, image_size=16) for root in (store.uri, tmp_path / "local"))
    assert isinstance(remote.train.images, ImageFiles)
    assert isinstance(local.train.images, ImageFiles)
    assert remote.class_names == local.class_names == ("cat", "dog")
    assert remote.train.images.names == local.train.images.names
    assert all(name.startswith("Training/") for name in remote.train.images.names)
    np.testing.assert_array_equal(remote.train.images.checksums, local.train.images.checksums)
    np.testing.assert_array_equal(remote.test.labels, local.test.labels)


class TestSync:
    def test_only_what_changed_is_taken_again(self, store: Store, photos: dict[str, bytes]) -> None:
        assert sync(store) == photos
        assert taken(store) == sorted(photos)
        assert sync(store) == photos
        assert taken(store) == []
        store.write("cat/1.png", changed := picture(100) + b"more")
        store.write("dog/new.png", new := picture(101))
        store.delete("cat/2.png")
        expected = photos | {"cat/1.png": changed, "dog/new.png": new}
        del expected["cat/2.png"]
        assert sync(store) == expected
        assert taken(store) == ["cat/1.png", "dog/new.png"]

    @pytest.mark.parametrize("damage", ["missing", "rewritten", "added"])
    def test_a_damaged_copy_is_mended(self, store: Store, photos: dict[str, bytes], damage: str) -> None:
        folder = sync_images(store.uri)
        taken(store)
        copy = folder / ("dog/1.png" if damage != "added" else "dog/other.png")
        copy.unlink(missing_ok=True)
        if damage != "missing":
            copy.write_bytes(bytes(len(photos["dog/1.png"]) if damage == "rewritten" else 5))
        assert sync(store) == photos
        assert taken(store) == ([] if damage == "added" else ["dog/1.png"])

    def test_only_pictures_are_taken(self, store: Store, photos: dict[str, bytes]) -> None:
        for name in ("labels.csv", "cat/notes.txt", ".git/x.png", "cat/.1.png", "__MACOSX/cat/1.png", "cat/a.tar"):
            store.write(name, b"1")
        store.write("cat/raw.NEF", b"refused later, by name")
        assert set(sync(store)) == {*photos, "cat/raw.NEF"}
        with pytest.raises(DataError, match=r"cat/raw\.NEF: NEF is not supported"):
            prepare_dataset("folder", store.uri)


class TestErrors:
    def test_no_pictures(self, store: Store) -> None:
        store.write("readme.txt", b"nothing here")
        for function in (load_dataset, publish_dataset):
            with pytest.raises(DataError, match=r"no images in data\.root=s3://bucket/\d+/data: they are looked"):
                function("folder", store.uri)

    def test_the_store_goes_away_in_the_middle(self, store: Store, photos: dict[str, bytes]) -> None:
        """What came is kept; the next try takes the rest."""
        store.server.refuses_names = "dog/2.png"
        with pytest.raises(DataError, match=r"cannot read dog/2\.png in data\.root=s3://.*ACCESS_DENIED"):
            sync(store)
        store.server.refuses_names = ()
        before = set(bytes_of(cache_of(store.uri) / "files"))
        assert "dog/2.png" not in before
        taken(store)
        assert sync(store) == photos
        assert taken(store) == sorted(photos.keys() - before)
