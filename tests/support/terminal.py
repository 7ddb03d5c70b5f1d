"""Commands on a real pseudo-terminal, and what somebody who sits before it sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence

_PIECES = re.compile(r"(\x1b\[[?\d;]*[A-Za-z]|\x1b\]\d+;[^\x1b\x07]*(?:\x1b\\|\x07)|\r|\n)")
_LINK = re.compile(r"\x1b\]8;[^;]*;([^\x1b\x07]*)")


def on_terminal(command: Sequence[str], columns: int, env: Mapping[str, str]) -> tuple[int, str]:
    """Run a command on a terminal so wide; its exit code and all it wrote there, escape sequences included."""
    # These would win over the terminal's own size, and some tool may have left them in this process.
    env = {key: value for key, value in env.items() if key not in ("COLUMNS", "LINES")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:
        pass  # Linux' way to say that nobody holds the other end any more
    except BaseException:  # the test's time is over
        process.kill()
        raise
    finally:
        os.close(ours)
    return process.wait(), written.decode()


class Screen:
    """What is on a terminal after rich has written a text: it goes up by lines, and erases a line before it writes.

    Attributes:
        lines: what is on it, its history included; those that are too long are not broken.
        links: the texts that can be clicked, with their addresses.
        hidden: whether the cursor is.
    """

    def __init__(self, text: str) -> None:
        self.lines, self.hidden = [""], False
        self.links: dict[str, str] = {}
        row, address = 0, ""
        for piece in _PIECES.split(text):
            if piece == "\n":
                row += 1
                self.lines += [""] * (row == len(self.lines))
            elif piece == "\x1b[1A":
                row -= 1
            elif piece == "\x1b[2K":
                self.lines[row] = ""
            elif piece.startswith("\x1b[?25"):
                self.hidden = piece.endswith("l")
            elif link := _LINK.match(piece):
                address = link[1]
            elif not piece.startswith(("\x1b", "\r")):
                assert piece.isprintable(), f"{piece!r} would do who knows what"
                self.lines[row] += piece
                if address:
                    self.links[piece] = address
