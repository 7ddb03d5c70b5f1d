"""CIFAR on an object store: put there once, taken once a node, kept, verified, mended. A real S3 server."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_store import Store, four_at_once
from toy_cifar import Toy

from densenet_dist import doctor
from densenet_dist.cli import main
from densenet_dist.config import load_config
from densenet_dist.data import cifar
from densenet_dist.data.datasets import load_dataset, prepare_dataset, publish_dataset
from densenet_dist.data.store import cache_of
from densenet_dist.errors import ConfigError, DataError, StorageError

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


class Origin:
    """A server with the archive, as the official one is; it counts."""

    def __init__(self, content: bytes) -> None:
        origin = self
        self.asked = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                origin.asked += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/archive"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def packed(toy: Toy, tmp_path: Path) -> bytes:
    """The archive of the small set."""
    return toy.write_archive(tmp_path / "packed.tar.gz").read_bytes()


@pytest.fixture
def origin(packed: bytes) -> Iterator[Origin]:
    origin = Origin(packed)
    yield origin
    origin.server.shutdown()
    origin.server.server_close()


def train_images(toy: Toy) -> np.ndarray[Any, Any]:
    data = b"".join(toy.files[name] for name in toy.spec.train)
    return cifar.parse_records(toy.spec, data)[0]


class TestPublish:
    def test_once_from_the_origin(self, toy: Toy, store: Store, origin: Origin, packed: bytes, cache: Path) -> None:
        told = publish_dataset("cifar10", store.uri, url=origin.url, progress=False)
        assert told == f"{toy.spec.archive} has been put into s3://{store.prefix}"
        assert store.names() == {toy.spec.archive}
        assert store.read(toy.spec.archive) == packed
        # Another node starts a run.
        (cache / "data").rename(cache / "gone")
        told = publish_dataset("cifar10", store.uri, url=origin.url, progress=False)
        assert told == f"{toy.spec.archive} is in s3://{store.prefix}"
        assert origin.asked == 1

    def test_prepare_leaves_the_set_in_the_cache_too(self, toy: Toy, store: Store, origin: Origin) -> None:
        folder = prepare_dataset("cifar10", store.uri, url=origin.url, progress=False)
        assert {path.name for path in folder.iterdir()} == set(toy.files)
        assert {path.name for path in folder.parent.iterdir()} == {".lock", toy.spec.folder}
        assert store.counter.count("GET", toy.spec.archive) == 0

    def test_from_the_cache_where_the_store_lost_it(
        self, toy: Toy, store: Store, origin: Origin, packed: bytes
    ) -> None:
        store.write(toy.spec.archive, packed)
        load_dataset("cifar10", store.uri)
        store.delete(toy.spec.archive)
        told = publish_dataset("cifar10", store.uri, url=origin.url, progress=False)
        assert told == f"{toy.spec.folder} has been put into s3://{store.prefix}"
        assert store.names() == {f"{toy.spec.folder}/{name}" for name in toy.files}
        assert origin.asked == 0

    def test_nothing_damaged_is_put_there(self, toy: Toy, store: Store, tmp_path: Path) -> None:
        files = {**toy.files, "test_batch.bin": bytes(len(toy.files["test_batch.bin"]))}
        url = toy.write_archive(tmp_path / "bad.tar.gz", files=files).as_uri()
        with pytest.raises(
            DataError, match=r"test_batch\.bin in .* is damaged.*put cifar-10-binary.*into s3://bucket/"
        ):
            publish_dataset("cifar10", store.uri, url=url, progress=False)
        assert store.names() == set()


class TestTake:
    @pytest.mark.parametrize("layout", ["archive", "folder", "files"])
    def test_whatever_lies_there(self, toy: Toy, store: Store, packed: bytes, layout: str) -> None:
        if layout == "archive":
            store.write(toy.spec.archive, packed)
        else:
            for name, data in toy.files.items():
                store.write(f"{toy.spec.folder}/{name}" if layout == "folder" else name, data)
        dataset = load_dataset("cifar10", store.uri)
        np.testing.assert_array_equal(dataset.train.images, train_images(toy))

    def test_the_cache_is_used_again_without_asking(self, toy: Toy, store: Store, packed: bytes) -> None:
        store.write(toy.spec.archive, packed)
        load_dataset("cifar10", store.uri)
        assert store.counter.count("GET", toy.spec.archive) == 1
        asked = store.counter.requests
        np.testing.assert_array_equal(load_dataset("cifar10", store.uri).train.images, train_images(toy))
        assert store.counter.requests == asked

    @pytest.mark.slow
    def test_once_a_node(self, toy: Toy, store: Store, packed: bytes) -> None:
        store.write(toy.spec.archive, packed)
        assert len(set(four_at_once(LOAD, store.uri, str(SUPPORT)))) == 1
        assert store.counter.count("GET", toy.spec.archive) == 1

    def test_workers_never_go_to_the_origin(self, toy: Toy, store: Store, origin: Origin) -> None:
        with pytest.raises(DataError) as caught:
            load_dataset("cifar10", store.uri, download=True, url=origin.url)
        assert f"densenet-dist data prepare cifar10 --root '{store.uri}'" in str(caught.value)
        assert origin.asked == 0

    @pytest.mark.parametrize("damage", ["flipped", "missing"])
    def test_a_damaged_cache_is_mended(self, toy: Toy, store: Store, packed: bytes, damage: str) -> None:
        store.write(toy.spec.archive, packed)
        file = prepare_dataset("cifar10", store.uri, progress=False) / "data_batch_2.bin"
        data = bytearray(file.read_bytes())
        data[777] ^= 1
        file.unlink()
        if damage != "missing":
            file.write_bytes(data)
        np.testing.assert_array_equal(load_dataset("cifar10", store.uri).train.images, train_images(toy))
        assert file.read_bytes() == toy.files["data_batch_2.bin"]
        assert store.counter.count("GET", toy.spec.archive) == 2

    @pytest.mark.parametrize("layout", ["archive", "folder"])
    def test_a_damaged_origin_is_refused(self, toy: Toy, store: Store, packed: bytes, layout: str) -> None:
        name = toy.spec.archive if layout == "archive" else f"{toy.spec.folder}/test_batch.bin"
        if layout == "archive":
            store.write(name, packed[: len(packed) // 2])
        else:
            for member, data in toy.files.items():
                store.write(f"{toy.spec.folder}/{member}", data)
            store.write(name, bytes(len(toy.files["test_batch.bin"])))
        with pytest.raises(DataError, match=rf"{name} in s3://bucket/\d+/data is (damaged|truncated).*delete it there"):
            load_dataset("cifar10", store.uri)
        assert [path.name for path in cache_of(store.uri).iterdir()] == [".lock"]

    def test_where_the_cache_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        parents = []
        for name in ("DENSENET_DIST_CACHE", "XDG_CACHE_HOME", "HOME"):
            parents.append(cache_of("s3://bucket/a").parent)
            monkeypatch.delenv(name)
        expected = ["node/data", "xdg/densenet_dist/data", "home/.cache/densenet_dist/data"]
        assert parents == [tmp_path / place for place in expected]

    def test_a_file_uri(self, toy: Toy, tmp_path: Path, cache: Path, origin: Origin) -> None:
        """A shared file system as a store: a node reads it once."""
        uri = (tmp_path / "shared" / "data").as_uri()
        publish_dataset("cifar10", uri, url=origin.url, progress=False)
        assert [path.name for path in (tmp_path / "shared" / "data").iterdir()] == [toy.spec.archive]
        (cache / "data").rename(cache / "gone")
        np.testing.assert_array_equal(load_dataset("cifar10", uri).train.images, train_images(toy))


class TestErrors:
    def test_no_such_bucket(self, toy: Toy, s3: str) -> None:
        uri = (s3 % "/x").replace("bucket/x", "nobucket/x")
        for name in ("cifar10", "folder"):
            with pytest.raises(DataError, match=r"data\.root=s3://nobucket/x: .*there is no such bucket: make it"):
                load_dataset(name, uri)

    def test_no_permission(self, toy: Toy, store: Store) -> None:
        store.counter.refuses_reading = True
        with pytest.raises(DataError, match=r"ACCESS_DENIED.*come from the environment \(AWS_ACCESS_KEY_ID"):
            load_dataset("cifar10", store.uri)

    def test_an_upload_that_is_refused(self, toy: Toy, store: Store, origin: Origin) -> None:
        store.counter.refuses_writing = True
        with pytest.raises(
            StorageError, match=r"cannot write cifar-10-binary\.tar\.gz to s3://.*ACCESS_DENIED.*AWS_ACC"
        ):
            publish_dataset("cifar10", store.uri, url=origin.url, progress=False)
        store.counter.refuses_writing = False
        publish_dataset("cifar10", store.uri, url=origin.url, progress=False)
        assert (origin.asked, store.names()) == (1, {toy.spec.archive})

    def test_an_address_with_credentials(self, toy: Toy) -> None:
        with pytest.raises(ConfigError, match=r"s3://\.\.\.@bucket/x: .*must not hold credentials") as caught:
            load_dataset("cifar10", "s3://key:secret@bucket/x")
        assert "secret" not in str(caught.value)

    def test_the_cache_cannot_be_written(self, toy: Toy, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DENSENET_DIST_CACHE", "/proc/nowhere")
        with pytest.raises(
            StorageError, match=r"cannot keep the data set in /proc/nowhere/.*DENSENET_DIST_CACHE=FOLDER"
        ):
            load_dataset("cifar10", store.uri)


class TestCommands:
    def run(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert isinstance(stop.value.code, int)
        return stop.value.code

    def test_prepare_says_what_it_did(
        self, toy: Toy, store: Store, origin: Origin, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for told in ("has been put into", "is in"):
            assert self.run("data", "prepare", "cifar10", "--root", store.uri, "--url", origin.url) == 0
            first, second = capsys.readouterr().out.splitlines()
            assert first == f"cifar10: {toy.spec.archive} {told} s3://{store.prefix}"
            assert second == f"cifar10: verified in {cache_of(store.uri) / toy.spec.folder}"
        assert (origin.asked, store.counter.count("GET", toy.spec.archive)) == (1, 0)

    @pytest.mark.slow
    def test_train_and_evaluate(
        self, toy: Toy, store: Store, origin: Origin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = ["model.growth_rate=4", "model.num_layers=1", "train.epochs=1", "cluster.engine=local"]
        data = ["data.name=cifar10", f"data.root={store.uri}", f"data.url={origin.url}", "data.loader=torch"]
        place = [f"storage={tmp_path / 'runs'}", "name=run", "train.global_batch_size=32"]
        assert self.run("train", *settings, *data, *place) == 0, capsys.readouterr().err
        assert (origin.asked, store.names()) == (1, {toy.spec.archive})
        asked = store.counter.requests
        assert self.run("evaluate", str(tmp_path / "runs/run")) == 0
        assert "of 20 images" in capsys.readouterr().out
        assert store.counter.requests == asked

    def test_doctor(self, toy: Toy, store: Store, packed: bytes, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def look(**settings: object) -> tuple[str, str]:
            data = {"name": "cifar10", "root": store.uri} | settings
            finding = doctor._data(load_config({"data": data}))
            return finding.state, finding.text

        state, text = look()
        assert (state, text) == (
            "note",
            f"cifar10 is not in s3://{store.prefix}; it will be downloaded, once, and put there",
        )
        state, text = look(download=False)
        assert state == "bad"
        assert "densenet-dist data prepare cifar10 --root" in text
        state, text = look(name="folder")
        assert state == "bad"
        assert "there are no pictures in" in text
        store.write(toy.spec.archive, packed)
        entry = cache_of(store.uri)
        expected = f"{toy.spec.archive} is in s3://{store.prefix}; this node takes it into {entry}"
        assert look() == ("ok", expected)
        assert store.counter.count("GET", toy.spec.archive) == 0
        state, text = look(root=(s3 % "").replace("//bucket", "//nobucket"))
        assert state == "bad"
        assert "there is no such bucket" in text
        monkeypatch.setenv("DENSENET_DIST_CACHE", "/proc/nowhere")
        state, text = look()
        assert state == "bad"
        assert "DENSENET_DIST_CACHE=FOLDER" in text
