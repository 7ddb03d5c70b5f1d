"""An S3 server in this process that a test can make fail or refuse requests."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class FaultyServer:
    """Listens on a port of its own and notes what was asked; all servers in this process share their buckets.

    Of the share of requests that is `failing`, half are answered with status 503, and the others' connections are
    reset, every second one after it was carried out. `refuses_names` denies access where an object's key ends so.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        from moto.moto_server import werkzeug_app as moto  # here, because it takes a second
        from werkzeug.serving import make_server

        self.failing, self.down, self.failed = 0.0, False, 0
        self.refuses_writing, self.refuses_names = False, ()
        self.seen: list[tuple[str, str]] = []
        self._random, self._lock = random.Random(0), threading.Lock()
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        handler = moto.MotoRequestHandler
        self._server = make_server(host, 0, self._answer, threaded=True, request_handler=handler)
        self.query = f"scheme=http&endpoint_override={host}:{self._server.port}&region=us-east-1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, name: str) -> int:
        """Count the requests for objects whose key ends with `name`."""
        return sum(command == method and path.endswith(name) for command, path in self.seen)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.seen.append((method, path))
            drawn = self._random.random() if self.failing else 1.0
            fault = self.down or drawn < self.failing
            self.failed += fault
        if fault and (self.down or drawn < self.failing / 2):
            if not self.down and drawn < self.failing / 4:
                list(self._app(environ, lambda *_: None))  # carried out, but the answer is lost
            reset(environ["werkzeug.socket"])
        if fault:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        if path.endswith(self.refuses_names) or (self.refuses_writing and method not in ("GET", "HEAD")):
            start_response("403 Forbidden", [("Content-Length", str(len(DENIED)))])
            return [] if method == "HEAD" else [DENIED]
        return self._app(environ, start_response)


@contextmanager
def bucket(host: str = "127.0.0.1") -> Iterator[str]:
    """Serve one bucket; yields ``s3://bucket%s?...`` and sets its credentials in the environment."""
    from pyarrow import fs

    server = FaultyServer(host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket?{server.query}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield f"s3://bucket%s?{server.query}"
    server.close()


def reset(connection: socket.socket) -> None:
    """Break a connection: with SO_LINGER at zero, closing sends RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)
    raise ConnectionResetError
