"""CIFAR on an object store: put there once, taken once a node, kept, verified, mended. A real S3 server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_store import Store, four_at_once
from toy_cifar import Toy

from densenet_dist import doctor
from densenet_dist.config import load_config, to_dict
from densenet_dist.data import cifar
from densenet_dist.data.datasets import load_dataset, prepare_dataset, publish_dataset
from densenet_dist.data.store import cache_of
from densenet_dist.errors import DataError, StorageError

SUPPORT = Path(__file__).parents[1] / "support"
LOAD = """
import hashlib, sys
sys.path.insert(0, sys.argv[2])
from toy_cifar import make_toy
from densenet_dist.data import cifar
from densenet_dist.data.datasets import load_dataset
cifar.SPECS["cifar10"] = make_toy(cifar.CIFAR10).spec
print("ready", flush=True)
sys.stdin.readline()
dataset = load_dataset("cifar10", sys.argv[1])
print(hashlib.sha256(dataset.train.images).hexdigest())
"""


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def origin(packed: bytes, tmp_path: Path) -> Path:
    """A mirror of the archive. Where it has been deleted and nothing fails, nobody asked it."""
    return tmp_path / "packed.tar.gz"


@pytest.fixture
def packed(toy: Toy, tmp_path: Path) -> bytes:
    """The archive of the small set."""
    return toy.write_archive(tmp_path / "packed.tar.gz").read_bytes()


def train_images(toy: Toy) -> np.ndarray[Any, Any]:
    data = b"".join(toy.files[name] for name in toy.spec.train)
    return cifar.parse_records(toy.spec, data).images


class TestPublish:
    def test_once_from_the_origin(
        self, toy: Toy, store: Store, origin: Path, packed: bytes, command: Callable[..., Any]
    ) -> None:
        for told in ("has been put into", "is in"):
            code, out, _ = command("data", "prepare", "cifar10", "--root", store.uri, "--url", origin.as_uri())
            first, second = out.splitlines()
            assert code == 0
            assert first == f"cifar10: {toy.spec.archive} {told} s3://{store.prefix}"
            assert second.startswith(f"cifar10: verified in {cache_of(store.uri) / toy.spec.folder}: 10 classes: ")
            assert store.names() == {toy.spec.archive}
            assert store.read(toy.spec.archive) == packed
            origin.unlink(missing_ok=True)
        assert store.server.count("GET", toy.spec.archive) == 0

    def test_nothing_damaged_is_put_there(self, toy: Toy, store: Store, tmp_path: Path) -> None:
        files = {**toy.files, "test_batch.bin": bytes(len(toy.files["test_batch.bin"]))}
        url = toy.write_archive(tmp_path / "bad.tar.gz", files=files).as_uri()
        said = r"test_batch\.bin in .* is damaged.*put cifar-10-binary.*into s3://bucket/"
        with pytest.raises(DataError, match=said):
            publish_dataset("cifar10", store.uri, url=url)
        assert store.names() == set()


class TestTake:
    def test_the_archive_lies_there(self, toy: Toy, store: Store, packed: bytes) -> None:
        """The next time the node's cache is used, without asking."""
        store.write(toy.spec.archive, packed)
        np.testing.assert_array_equal(load_dataset("cifar10", store.uri).train.images, train_images(toy))
        asked = len(store.server.seen)
        np.testing.assert_array_equal(load_dataset("cifar10", store.uri).train.images, train_images(toy))
        assert len(store.server.seen) == asked

    @pytest.mark.slow
    def test_once_a_node(self, toy: Toy, store: Store, packed: bytes) -> None:
        store.write(toy.spec.archive, packed)
        assert len(set(four_at_once(LOAD, store.uri, str(SUPPORT)))) == 1
        assert store.server.count("GET", toy.spec.archive) == 1

    def test_workers_never_go_to_the_origin(self, toy: Toy, store: Store, origin: Path) -> None:
        with pytest.raises(DataError, match=r"run|put it there.*densenet-dist data prepare cifar10 --root"):
            load_dataset("cifar10", store.uri, download=True, url=origin.as_uri())

    @pytest.mark.parametrize("damage", ["flipped", "missing"])
    def test_a_damaged_cache_is_mended(self, toy: Toy, store: Store, packed: bytes, damage: str) -> None:
        store.write(toy.spec.archive, packed)
        file = prepare_dataset("cifar10", store.uri)[0] / "data_batch_2.bin"
        data = bytearray(file.read_bytes())
        data[777] ^= 1
        file.unlink()
        if damage != "missing":
            file.write_bytes(data)
        np.testing.assert_array_equal(load_dataset("cifar10", store.uri).train.images, train_images(toy))
        assert file.read_bytes() == toy.files["data_batch_2.bin"]
        assert store.server.count("GET", toy.spec.archive) == 2

    def test_a_damaged_origin_is_refused(self, toy: Toy, store: Store, packed: bytes) -> None:
        store.write(toy.spec.archive, packed[: len(packed) // 2])
        with pytest.raises(DataError, match=r"gz in s3://bucket/\d+/data is damaged or truncated.*delete it there"):
            load_dataset("cifar10", store.uri)
        assert [path.name for path in cache_of(store.uri).iterdir()] == [".lock"]

    def test_a_file_uri(self, toy: Toy, tmp_path: Path, cache: Path, origin: Path) -> None:
        """A shared file system as a store: a node reads it once."""
        uri = (tmp_path / "shared" / "data").as_uri()
        publish_dataset("cifar10", uri, url=origin.as_uri())
        assert [path.name for path in (tmp_path / "shared" / "data").iterdir()] == [toy.spec.archive]
        (cache / "data").rename(cache / "gone")
        np.testing.assert_array_equal(load_dataset("cifar10", uri).train.images, train_images(toy))


class TestErrors:
    def test_no_such_bucket(self, toy: Toy, s3: str) -> None:
        uri = (s3 % "/x").replace("bucket/x", "nobucket/x")
        for name in ("cifar10", "folder"):
            with pytest.raises(DataError, match=r"data\.root=s3://nobucket/x: .*there is no such bucket: create it"):
                load_dataset(name, uri)

    def test_an_upload_that_is_refused(self, toy: Toy, store: Store, origin: Path) -> None:
        store.server.refuses_writing = True
        said = r"cannot write cifar-10-binary\.tar\.gz to s3://.*ACCESS_DENIED.*come from the environment \(AWS_ACC"
        with pytest.raises(StorageError, match=said):
            publish_dataset("cifar10", store.uri, url=origin.as_uri())
        store.server.refuses_writing = False
        origin.unlink()  # the node has it by now
        publish_dataset("cifar10", store.uri, url=origin.as_uri())
        assert store.names() == {toy.spec.archive}


class TestCommands:
    @pytest.mark.slow
    def test_train_and_evaluate(
        self, toy: Toy, store: Store, origin: Path, tmp_path: Path, command: Callable[..., Any]
    ) -> None:
        settings = ["model.growth_rate=4", "model.num_layers=1", "train.epochs=1", "cluster.engine=local"]
        data = ["data.name=cifar10", f"data.root={store.uri}", f"data.url={origin.as_uri()}", "data.loader=torch"]
        place = [f"storage={tmp_path / 'runs'}", "name=run", "train.global_batch_size=32"]
        code, _, err = command("train", *settings, *data, *place)
        assert code == 0, err
        assert store.names() == {toy.spec.archive}
        asked = len(store.server.seen)
        assert "(20 images)" in command("evaluate", tmp_path / "runs/run")[1]
        assert len(store.server.seen) == asked

    def test_doctor(self, toy: Toy, store: Store, packed: bytes) -> None:
        config, where = load_config({"data": {"name": "cifar10", "root": store.uri}}), f"s3://{store.prefix}"
        found = doctor._data(config)
        assert found.state == "note"
        assert found.text == f"cifar10 is not in {where}; it will be downloaded once and uploaded there"
        mistakes = {"data.download=false": "data prepare cifar10 --root", "data.name=folder": "no images"}
        for change, said in mistakes.items():
            with pytest.raises(DataError, match=said):
                doctor._data(load_config(to_dict(config), change))
        store.write(toy.spec.archive, packed)
        found = doctor._data(config)
        assert found.state == "ok"
        assert found.text == f"{toy.spec.archive} is in {where}; this node copies it to {cache_of(store.uri)}"
        assert store.server.count("GET", toy.spec.archive) == 0
