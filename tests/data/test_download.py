"""Downloads from a real server on this machine: whole, or an error that says what to do."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from toy_cifar import Toy

from densenet_dist.data import archive, download
from densenet_dist.data.datasets import load_dataset, prepare_dataset
from densenet_dist.data.download import fetch
from densenet_dist.errors import ConfigError, DataError


class Handler(BaseHTTPRequestHandler):
    """Serves the bytes of `/whole`, and misbehaves at other addresses."""

    content = b""
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        data = self.content[: len(self.content) // 2] if self.path == "/broken-off" else self.content
        self.send_response(200)
        if self.path != "/no-length":
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(data[:-100] if self.path == "/cut" else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has the archive of the small set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.content = toy.write_archive(tmp_path / "served.tar.gz").read_bytes()
    Handler.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again without waiting; `test_download_again` is about the waiting."""
    monkeypatch.setattr(download, "_FIRST_WAIT_S", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "root"


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("path", ["/whole", "/no-length"])
def test_whole(toy: Toy, server: str, root: Path, path: str) -> None:
    dataset = load_dataset("cifar10", root, url=server + path)
    assert len(dataset.train.labels) == 100
    assert visible(root) == [toy.spec.folder, toy.spec.archive]
    assert (root / toy.spec.archive).read_bytes() == Handler.content


def test_only_once(server: str, root: Path) -> None:
    for _ in range(2):
        load_dataset("cifar10", root, url=server + "/whole")
    assert Handler.requests == ["/whole"]


def test_archive_in_the_root_is_not_downloaded(toy: Toy, server: str, root: Path) -> None:
    toy.write_archive(root / toy.spec.archive)
    load_dataset("cifar10", root, url=server + "/whole")
    assert Handler.requests == []


def test_from_a_file(toy: Toy, root: Path, tmp_path: Path) -> None:
    mirror = toy.write_archive(tmp_path / "mirror.tar.gz")
    load_dataset("cifar10", root, url=mirror.as_uri())
    with pytest.raises(DataError, match=r"cannot download CIFAR-10 from file://.*No such file"):
        load_dataset("cifar10", tmp_path / "other", url=(tmp_path / "missing.tar.gz").as_uri())


def test_broken_off(server: str, root: Path) -> None:
    with pytest.raises(DataError, match=r"/broken-off: the transfer broke off after \d+ of \d+ bytes; tried 6 times;"):
        load_dataset("cifar10", root, url=server + "/broken-off")
    assert visible(root) == []


def test_cut_without_a_length(toy: Toy, server: str, root: Path) -> None:
    """The server does not say how much there is: the archive itself tells."""
    Handler.content = Handler.content[:-1000]
    with pytest.raises(DataError, match=r"/no-length is damaged or truncated.*put cifar-10-binary\.tar\.gz"):
        load_dataset("cifar10", root, url=server + "/no-length")
    assert visible(root) == []


def test_not_found(server: str, root: Path) -> None:
    with pytest.raises(DataError, match=r"from http://127.*/missing: HTTP Error 404.*into .*root, or name a folder"):
        load_dataset("cifar10", root, url=server + "/missing")
    assert visible(root) == []


def test_nobody_listens(root: Path) -> None:
    with pytest.raises(DataError, match=r"cannot download CIFAR-10 from http://127\.0\.0\.1:9/x.*refused"):
        load_dataset("cifar10", root, url="http://127.0.0.1:9/x")


def test_too_much(server: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(DataError, match="more than 1000 bytes"):
        load_dataset("cifar10", root, url=server + "/whole")
    assert visible(root) == []


def test_disk_is_full(tmp_path: Path) -> None:
    """An error of writing is not taken for one of the server."""
    (tmp_path / "mirror").write_bytes(bytes(1000))
    with pytest.raises(OSError, match="No space left"):
        fetch((tmp_path / "mirror").as_uri(), Path("/dev/full"), title="x", limit=2000, mend="", progress=False)


@pytest.mark.parametrize("url", ["ftp://example.org/x", "cifar.tar.gz", "/data/x.tar.gz"])
def test_address_of_another_kind(root: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.url must begin with https://"):
        load_dataset("cifar10", root, url=url)


def test_progress_goes_to_standard_error(server: str, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare_dataset("cifar10", root, url=server + "/whole")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "downloading CIFAR-10" in captured.err
