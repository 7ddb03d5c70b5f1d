"""An S3 server in this process, whose faults a test sets: requests fail or are refused, or the server is gone."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterable
from typing import Any

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class FaultyServer:
    """Listens on a port of its own; all servers of this process have the same buckets.

    Args:
        seed: of the lot that decides which requests fail.

    Attributes:
        port: its own.
        failing: share of requests that fail: half of them with status 503, half by a connection that is reset, after
            the server has done what was asked for every other time.
        down: while this is set, no connection gets an answer: each is reset.
        refuses_writing: while this is set, it answers as a store does whose credentials do not allow to write.
        refuses_names: likewise for objects whose key ends so.
        seen: method and path of every request so far.
        failed: how many of those have failed.
    """

    def __init__(self, seed: int = 0) -> None:
        from moto.moto_server import werkzeug_app as moto  # here, because it takes a second
        from werkzeug.serving import make_server

        self.failing, self.down, self.failed = 0.0, False, 0
        self.refuses_writing, self.refuses_names = False, ()
        self.seen: list[tuple[str, str]] = []
        self._lot, self._lock = random.Random(seed), threading.Lock()
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        handler = moto.MotoRequestHandler
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=handler)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, name: str) -> int:
        """Requests for the objects whose key ends so."""
        return sum(command == method and path.endswith(name) for command, path in self.seen)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.seen.append((method, path))
            lot = self._lot.random() if self.failing else 1.0
            fault = self.down or lot < self.failing
            self.failed += fault
        if fault and (self.down or lot < self.failing / 2):
            if not self.down and lot < self.failing / 4:
                list(self._app(environ, lambda *_: None))  # done, but the answer is lost
            reset(environ["werkzeug.socket"])
        if fault:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        if path.endswith(self.refuses_names) or (self.refuses_writing and method not in ("GET", "HEAD")):
            start_response("403 Forbidden", [("Content-Length", str(len(DENIED)))])
            return [] if method == "HEAD" else [DENIED]
        return self._app(environ, start_response)


def reset(connection: socket.socket) -> None:
    """End a connection as a server does that was killed: with SO_LINGER at zero, closing sends RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)
    raise ConnectionResetError
