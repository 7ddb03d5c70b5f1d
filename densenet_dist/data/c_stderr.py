"""Capture what C libraries print on standard error, per thread: libjpeg reports damage in no other way.

glibc documents both parts: `stderr` is a variable that may be set, and `fopencookie` creates a stream of callbacks.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_thread = threading.local()
_lock = threading.Lock()
_users = 0


class _Functions(ctypes.Structure):
    _fields_ = (("read", ctypes.c_void_p), ("write", _WRITE), ("seek", ctypes.c_void_p), ("close", ctypes.c_void_p))


def _write(cookie: object, data: int, size: int) -> int:
    text = ctypes.string_at(data, size)
    if hasattr(_thread, "lines"):
        _thread.lines.append(text.decode(errors="replace").strip())
    else:
        os.write(2, text)
    return size


_callback = _WRITE(_write)  # must outlive the stream


@cache
def _streams() -> tuple[Any, int | None, int | None]:
    """Return the C variable `stderr`, its original value, and a stream that calls `_write`."""
    libc = ctypes.CDLL(None)
    libc.fopencookie.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopencookie(None, b"w", _Functions(None, _callback, None, None)))
    libc.setbuf(stream, None)
    variable = ctypes.c_void_p.in_dll(libc, "stderr")
    return variable, variable.value, stream.value


@contextmanager
def capture_c_stderr() -> Iterator[list[str]]:
    """Yield a list that collects what C code prints on standard error in this thread; others are not affected."""
    global _users
    with _lock:
        variable, own, ours = _streams()
        variable.value = ours
        _users += 1
    _thread.lines = []
    try:
        yield _thread.lines
    finally:
        del _thread.lines
        with _lock:
            _users -= 1
            if not _users:
                variable.value = own
