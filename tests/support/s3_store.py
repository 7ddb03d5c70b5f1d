"""A folder on an S3 server, reached by a proxy that knows what has been asked."""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from typing import Any

from fault_proxy import FaultProxy
from pyarrow import fs


def deny(handler: BaseHTTPRequestHandler) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    handler.send_response_only(403)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(b"" if handler.command == "HEAD" else body)


class Counter(FaultProxy):
    """Knows which requests have come; and refuses some, as a store does whose credentials do not allow them."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen: list[tuple[str, str]] = []
        self.refuses_reading = self.refuses_writing = False
        self.refuses_names: str | None = None  # and all objects whose key ends so

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.partition("?")[0]
        self.seen.append((handler.command, name))
        refuses = self.refuses_reading if handler.command in ("GET", "HEAD") else self.refuses_writing
        if refuses or (self.refuses_names and name.endswith(self.refuses_names)):
            self._body(handler)
            deny(handler)
        else:
            super().answer(handler)

    def count(self, method: str, name: str) -> int:
        """Requests for the objects whose key ends so."""
        return sum(command == method and path.endswith(name) for command, path in self.seen)


class Store:
    """A folder of its own on the S3 server, with what has been asked of it."""

    def __init__(self, s3: str, counter: Counter, name: str) -> None:
        self.prefix = f"bucket/{name}"
        self.direct, _ = fs.FileSystem.from_uri(s3 % "")
        self.counter = counter
        query = f"scheme=http&endpoint_override=127.0.0.1:{counter.port}&region=us-east-1"
        self.uri = f"s3://{self.prefix}?{query}"

    def write(self, name: str, data: bytes) -> None:
        with self.direct.open_output_stream(f"{self.prefix}/{name}", compression=None) as stream:
            stream.write(data)

    def read(self, name: str) -> bytes:
        with self.direct.open_input_stream(f"{self.prefix}/{name}", compression=None) as stream:
            return bytes(stream.read())

    def delete(self, name: str) -> None:
        self.direct.delete_file(f"{self.prefix}/{name}")

    def names(self) -> set[str]:
        infos = self.direct.get_file_info(fs.FileSelector(self.prefix, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{self.prefix}/") for info in infos if info.type == fs.FileType.File}


def four_at_once(code: str, *arguments: str) -> list[str]:
    """What four processes print that run `code` together: each says ``ready``, and waits for a line."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    return said
