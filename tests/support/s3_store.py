"""A folder on an S3 server that knows what has been asked."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from pyarrow import fs
from s3_server import FaultyServer


class Store:
    """A folder of its own on the S3 server, with what has been asked of it."""

    def __init__(self, s3: str, server: FaultyServer, name: str) -> None:
        self.prefix = f"bucket/{name}"
        self.direct, _ = fs.FileSystem.from_uri(s3 % "")
        self.server = server
        self.uri = f"s3://{self.prefix}?{server.query}"

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
