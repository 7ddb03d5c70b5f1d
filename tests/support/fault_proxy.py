"""A proxy for plain HTTP whose faults a test sets: a share of requests fails, or the server behind it is gone."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


class FaultProxy:
    """Listens on a port of its own and passes requests on to ``127.0.0.1:port``.

    Args:
        port: of the server behind it.
        seed: of the lot that decides which requests fail.

    Attributes:
        port: its own.
        failing: share of requests that fail: half of them with status 503, half by a connection that is reset, after
            the server has done what was asked for every other time.
        down: while this is set, no connection gets an answer: each is reset.
        requests: how many have come.
        failed: how many of those have failed.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.failing, self.down = 0.0, False
        self.requests = self.failed = 0
        self._behind, self._lot, self._lock = port, random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that has gone away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = self._body(handler)
        with self._lock:
            self.requests += 1
            lot = self._lot.random() if self.failing else 1.0
            fault = self.down or lot < self.failing
            self.failed += fault
        if fault and (self.down or lot < self.failing / 2):
            if not self.down and lot < self.failing / 4:
                self._ask(handler, body)  # done, but the answer is lost
            _reset(handler)
        elif fault:
            handler.send_response_only(503, "Slow Down")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        else:
            self._pass_on(handler, *self._ask(handler, body))

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {key: value for key, value in handler.headers.items() if key.lower() not in HOP_BY_HOP | {"expect"}}
        connection = http.client.HTTPConnection("127.0.0.1", self._behind, timeout=60)
        try:
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    @staticmethod
    def _body(handler: BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(handler.rfile.readline().split(b";")[0], 16):
                pieces.append(handler.rfile.read(size))
                handler.rfile.readline()
            while handler.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))

    @staticmethod
    def _pass_on(handler: BaseHTTPRequestHandler, response: http.client.HTTPResponse, content: bytes) -> None:
        handler.send_response_only(response.status, response.reason)
        for key, value in response.getheaders():
            if key.lower() not in HOP_BY_HOP | {"content-length"}:
                handler.send_header(key, value)
        length = response.getheader("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", length or str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    # With SO_LINGER at zero, closing sends RST instead of FIN.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RD)
