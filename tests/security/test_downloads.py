"""Downloads go to https, or to this machine; a server cannot send them elsewhere; what is signed is not shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from densenet_dist.data import download
from densenet_dist.data.cifar import SPECS
from densenet_dist.data.datasets import load_dataset
from densenet_dist.data.download import fetch
from densenet_dist.errors import ConfigError, DataError


class Handler(BaseHTTPRequestHandler):
    """Leads on to where it is told to; /file is there."""

    lead = ""
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        if self.path.startswith("/file"):
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")
            return
        self.send_response(302)
        self.send_header("Location", self.lead)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_FIRST_WAIT_S", 0.0)
    Handler.paths = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def get(url: str, target: Path) -> bytes:
    fetch(url, target, title="it", limit=100, mend="do it yourself", progress=False)
    return target.read_bytes()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x", "http://10.0.0.1/x", "http://127.0.0.1.example.org/x", "http://localhost.example.org/x",
        "ftp://example.org/x", "HTTP://example.org/x", "data:text/plain,x", "gopher://x", "http://[::1",
        "//example.org/x",
    ],
)  # fmt: skip
def test_what_is_never_asked(tmp_path: Path, url: str):
    with pytest.raises(ConfigError, match=r"data\.url"):
        get(url, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_official_addresses_are_pinned():
    assert all(spec.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-") for spec in SPECS.values())
    assert all(len(member.sha256) == 64 for spec in SPECS.values() for member in spec.members.values())


def test_to_another_page_of_the_same_server(server: str, tmp_path: Path):
    Handler.lead = "/file"
    assert get(f"{server}/moved", tmp_path / "x") == b"data"


@pytest.mark.parametrize(
    "lead",
    [
        "https://127.0.0.1:9/x", "https://localhost/x", "https://169.254.169.254/latest/meta-data/", "https://10.1.2.3/x",
        "https://192.168.0.1/x", "https://[::1]/x", "https://[::ffff:127.0.0.1]/x", "https://[fe80::1]/x", "https://0/x",
        "https://0x7f000001/x", "https://2130706433/x", "https://100.64.0.1/x", "https://user@127.0.0.1/x",
    ],
)  # fmt: skip
def test_to_addresses_inside_a_network(server: str, tmp_path: Path, lead: str):
    Handler.lead = lead
    with pytest.raises(DataError, match=r"leads on to .*an address inside a network; do it yourself"):
        get(f"{server}/moved", tmp_path / "x")
    assert Handler.paths == ["/moved"]


@pytest.mark.parametrize(
    "lead", ["http://example.org/x", "http://127.0.0.1:9/x", "ftp://example.org/x", "file:///etc/passwd"]
)
def test_to_something_that_is_not_https(server: str, tmp_path: Path, lead: str):
    Handler.lead = lead
    with pytest.raises(DataError, match=r"not https|not allowed"):
        get(f"{server}/moved", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b""


def test_in_circles(server: str, tmp_path: Path):
    Handler.lead = "/again"
    with pytest.raises(DataError, match="infinite loop"):
        get(f"{server}/again", tmp_path / "x")


def test_public_addresses_are_followed():
    assert download._private_address("8.8.8.8", 443) is None
    assert download._private_address("2001:4860:4860::8888", 443) is None


def test_a_signature_is_not_shown(server: str, tmp_path: Path):
    Handler.lead = "https://127.0.0.1/x?sig=MARKER"
    with pytest.raises(DataError) as caught:
        get(f"{server}/moved?sig=MARKER", tmp_path / "x")
    assert "MARKER" not in str(caught.value)
    with pytest.raises(DataError, match="damaged") as caught:  # what came is no archive
        load_dataset("cifar10", tmp_path / "root", url=f"{server}/file?sig=MARKER", progress=False)
    assert "MARKER" not in str(caught.value)
    assert Handler.paths[-1] == "/file?sig=MARKER"
