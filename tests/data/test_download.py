"""Downloads from a real server on this machine: whole, tried again where that helps, or an error with a remedy."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from s3_server import reset
from toy_cifar import Toy, visible

from densenet_dist.data import cifar_source
from densenet_dist.data.cifar_source import fetch
from densenet_dist.data.datasets import load_dataset, prepare_dataset
from densenet_dist.errors import DataError

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers the first requests as the test has planned them, all others with the whole file."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked += 1
        (self.server.plan.pop(0) if self.server.plan else whole())(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked = content, 0
        self.plan: list[Answer] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


def whole(*, cut: int = 0, length: bool = True) -> Answer:
    """The file, but for its last `cut` bytes, which its length does not tell."""

    def answer(handler: Handler) -> None:
        content = handler.server.content
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) - cut])

    return answer


def status(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


def broken(handler: Handler) -> None:
    with suppress(ConnectionResetError):
        reset(handler.connection)


@pytest.fixture
def server(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has the archive of the small set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(toy.write_archive(tmp_path / "served.tar.gz").read_bytes()) as listening:
        thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between tries, which no test waits for."""
    made: list[float] = []
    monkeypatch.setattr(cifar_source.time, "sleep", made.append)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "root"


@pytest.mark.parametrize("length", [True, False])
def test_downloads_extracts_and_keeps_the_archive(
    toy: Toy, server: Server, root: Path, length: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    server.plan = [whole(length=length)]
    prepare_dataset("cifar10", root, url=server.url)
    said = capfd.readouterr()
    assert said.out == ""
    assert "downloading CIFAR-10" in said.err
    assert len(load_dataset("cifar10", root, url=server.url).train.labels) == 100
    assert visible(root) == [toy.spec.folder, toy.spec.archive]
    assert (root / toy.spec.archive).read_bytes() == server.content
    assert server.asked == 1


@pytest.mark.parametrize("fault", [status(503), broken, whole(cut=1000)])
def test_tries_again_where_that_may_help(server: Server, root: Path, waits: list[float], fault: Answer) -> None:
    server.plan = [fault, fault]
    assert len(load_dataset("cifar10", root, url=server.url).train.labels) == 100
    assert server.asked == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_a_refusal_is_final(server: Server, root: Path, waits: list[float]) -> None:
    server.plan = [status(404)]
    expected = r"cannot download CIFAR-10 from http://127.*/file .*: HTTP Error 404.*into .*root, or name a folder"
    with pytest.raises(DataError, match=expected):
        load_dataset("cifar10", root, url=server.url)
    assert (server.asked, waits, visible(root)) == (1, [], [])


def test_a_signature_is_not_shown(server: Server, root: Path) -> None:
    server.content = b"no archive"
    for plan, said in (([], "damaged"), ([status(404)], "404")):
        server.plan = list(plan)
        with pytest.raises(DataError, match=said) as caught:
            load_dataset("cifar10", root, url=f"{server.url}?sig=MARKER")
        assert "MARKER" not in str(caught.value)


def test_gives_up_after_six_tries(server: Server, root: Path, waits: list[float]) -> None:
    server.plan = [whole(cut=1000)] * 6
    with pytest.raises(
        DataError, match=r"\(attempt 6 of 6\): the transfer broke off after \d+ of \d+ bytes; .*data\.root="
    ):
        load_dataset("cifar10", root, url=server.url)
    assert (server.asked, len(waits), visible(root)) == (6, 5, [])


def test_a_file_that_is_too_large_and_a_full_disk(tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "mirror").write_bytes(bytes(1000))
    options: dict[str, Any] = {"title": "x", "remedy": ""}
    with pytest.raises(DataError, match="more than 999 bytes"):
        fetch((tmp_path / "mirror").as_uri(), tmp_path / "x", limit=999, **options)
    with pytest.raises(OSError, match="No space left"):
        fetch((tmp_path / "mirror").as_uri(), Path("/dev/full"), limit=1000, **options)
    assert waits == []
