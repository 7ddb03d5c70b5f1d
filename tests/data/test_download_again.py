"""Servers that are busy, break off or change their mind: asked again, politely, for no more than is missing."""

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeAlias

import pytest
from toy_cifar import Toy

from densenet_dist.data import download
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError

CONTENT = random.Random(0).randbytes(1 << 20)
HALF = len(CONTENT) // 2
OTHER = CONTENT[::-1]


class Handler(BaseHTTPRequestHandler):
    """Answers the first requests as the test has planned them, all others well."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append({key: self.headers[key] for key in ("Range", "If-Range") if key in self.headers})
        planned = self.server.plan.pop(0) if self.server.plan else part()
        planned(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Answer] = []
        self.asked: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


Answer: TypeAlias = Callable[[Handler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()

    return answer


def part(content: bytes = CONTENT, *, cut: int = 0, tag: str = '"one"', shift: int = 0) -> Answer:
    """A server that knows ranges: it gives the rest if the tag is right, else all; but for the last `cut` bytes."""

    def answer(handler: Handler) -> None:
        asked = handler.headers.get("Range") if handler.headers.get("If-Range") in (None, tag) else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) + shift if asked else 0
        handler.send_response(206 if asked else 200)
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", tag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : len(content) - cut])

    return answer


def whole(content: bytes = CONTENT, *, cut: int = 0) -> Answer:
    """What a server that knows no ranges answers."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) - cut])

    return answer


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile = open("/dev/null", "w+b")  # noqa: SIM115  # what the handler closes at its end


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every wait, none of which is made."""
    made: list[float] = []
    monkeypatch.setattr(download.time, "sleep", made.append)
    return made


def fetch(server: Server, target: Path, limit: int = 2 << 20) -> bytes:
    download.fetch(server.url, target, title="it", limit=limit, mend="do without", progress=False)
    return target.read_bytes()


class TestAgain:
    @pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
    def test_a_busy_server(self, server: Server, tmp_path: Path, waits: list[float], code: int) -> None:
        server.plan = [status(code), status(code)]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert len(server.asked) == 3
        assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2

    def test_a_lost_connection(self, server: Server, tmp_path: Path) -> None:
        server.plan = [reset]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert len(server.asked) == 2

    @pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 416, 501])
    def test_a_refusal_is_final(self, server: Server, tmp_path: Path, waits: list[float], code: int) -> None:
        server.plan = [status(code)]
        with pytest.raises(DataError, match=rf"cannot download it from http.*: HTTP Error {code}.*; do without"):
            fetch(server, tmp_path / "file")
        assert (len(server.asked), waits) == (1, [])

    def test_ends(self, server: Server, tmp_path: Path, waits: list[float]) -> None:
        server.plan = [status(503)] * 100
        with pytest.raises(DataError, match=r"HTTP Error 503: Service Unavailable; tried 6 times; do without"):
            fetch(server, tmp_path / "file")
        assert len(server.asked) == 6
        assert [2**number / 2 <= wait <= 2**number for number, wait in enumerate(waits)] == [True] * 5

    def test_nobody_listens(self, tmp_path: Path, waits: list[float]) -> None:
        with pytest.raises(DataError, match=r"refused.*; tried 6 times"):
            download.fetch("http://127.0.0.1:9/x", tmp_path / "x", title="it", limit=1, mend="", progress=False)
        assert len(waits) == 5

    def test_a_name_that_does_not_exist_is_final(self, tmp_path: Path, waits: list[float]) -> None:
        url = "https://densenet-dist.invalid/x"
        try:
            socket.getaddrinfo("densenet-dist.invalid", 443)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                pytest.skip("there is no name server to say so")
        with pytest.raises(DataError, match="cannot download it"):
            download.fetch(url, tmp_path / "x", title="it", limit=1, mend="", progress=False)
        assert waits == []


class TestRetryAfter:
    def test_seconds(self, server: Server, tmp_path: Path, waits: list[float]) -> None:
        server.plan = [status(429, Retry_After="7"), status(503, Retry_After="0")]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert waits == [7, 0]

    def test_date(self, server: Server, tmp_path: Path, waits: list[float]) -> None:
        server.plan = [
            status(503, Retry_After=format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)),
            status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        ]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert 30 < waits[0] <= 90
        assert waits[1] == 0

    @pytest.mark.parametrize("said", ["soon", "-3", "", "Wed, 21 Oct 2015 07:28:00 -0000"])
    def test_nonsense(self, server: Server, tmp_path: Path, waits: list[float], said: str) -> None:
        server.plan = [status(503, Retry_After=said)]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert 0.5 <= waits[0] <= 1

    def test_too_long_to_wait(self, server: Server, tmp_path: Path, waits: list[float]) -> None:
        server.plan = [status(429, Retry_After="3600")]
        with pytest.raises(DataError, match=r"429.*; the server is busy for 3600 s more; do without"):
            fetch(server, tmp_path / "file")
        assert (len(server.asked), waits) == (1, [])


class TestResume:
    def test_goes_on_where_it_broke_off(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF), part(cut=100)]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert server.asked == [
            {},
            {"Range": f"bytes={HALF}-", "If-Range": '"one"'},
            {"Range": f"bytes={len(CONTENT) - 100}-", "If-Range": '"one"'},
        ]

    def test_another_file_by_then(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF), part(OTHER, tag='"two"')]
        assert fetch(server, tmp_path / "file") == OTHER

    def test_another_and_shorter_file_by_then(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF), part(OTHER[:1000], tag='"two"')]
        assert fetch(server, tmp_path / "file") == OTHER[:1000]

    def test_a_server_without_ranges(self, server: Server, tmp_path: Path) -> None:
        server.plan = [whole(cut=HALF), whole()]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert server.asked == [{}, {"Range": f"bytes={HALF}-"}]

    def test_a_part_that_is_not_there(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF), status(416)]
        assert fetch(server, tmp_path / "file") == CONTENT
        assert server.asked[2] == {}

    def test_the_wrong_part(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF), part(shift=-7)]
        with pytest.raises(DataError, match="another part than it was asked for"):
            fetch(server, tmp_path / "file")

    def test_the_limit_is_that_of_all_parts(self, server: Server, tmp_path: Path) -> None:
        server.plan = [part(cut=HALF)]
        with pytest.raises(DataError, match="more than 800000 bytes"):
            fetch(server, tmp_path / "file", limit=800_000)
        assert len(server.asked) == 2


class TestSpread:
    @pytest.mark.parametrize(("world_size", "local", "longest"), [(2, 1, 1), (16, 8, 1), (64, 8, 4), (9, 8, 1)])
    def test_many_nodes(
        self, waits: list[float], monkeypatch: pytest.MonkeyPatch, world_size: int, local: int, longest: float
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        for _ in range(200):
            random.seed(0)  # as every node of a run does
            download.spread_over_nodes()
        assert len(set(waits)) > 190
        assert 0 <= min(waits) < longest / 4 < longest * 3 / 4 < max(waits) <= longest

    def test_is_bounded(self, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "100000")
        for _ in range(200):
            download.spread_over_nodes()
        assert 20 < max(waits) <= 30

    @pytest.mark.parametrize("world_size", [None, "1", "8"])
    def test_one_node(self, waits: list[float], monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
        if world_size is not None:
            monkeypatch.setenv("WORLD_SIZE", world_size)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", world_size)
        download.spread_over_nodes()
        assert waits == []

    def test_only_who_downloads_waits(
        self, toy: Toy, server: Server, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        content = toy.write_archive(tmp_path / "served.tar.gz").read_bytes()
        server.plan = [part(content, cut=1000), part(content)]
        for _ in range(2):
            assert len(load_dataset("cifar10", tmp_path / "root", url=server.url).train.labels) == 100
        assert len(server.asked) == 2
        assert len(waits) == 2  # before the first try, and before the second
