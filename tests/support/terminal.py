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

_SEQUENCE = re.compile(
    r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\](\d+);([^\x1b\x07]*)(?:\x1b\\|\x07)|\x1b[()][A-Z0-9]|\x1b[=>78]"
)


def on_terminal(
    command: Sequence[str], columns: int = 80, rows: int = 40, env: Mapping[str, str] | None = None, cwd: object = None
) -> tuple[int, str]:
    """Run a command on a terminal of that size; its exit code and all it wrote there, escape sequences included."""
    # These would win over the terminal's own size, and some tool may have left them in this process.
    env = {key: value for key, value in (env or os.environ).items() if key not in ("COLUMNS", "LINES")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd, start_new_session=True
    )
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
    """A terminal that knows as much as rich asks of it: lines, the cursor's way up, erasing, links.

    Attributes:
        lines: what is on it, its history included.
        links: the texts that can be clicked, with their addresses.
        hidden: whether the cursor is.
    """

    def __init__(self, columns: int = 80) -> None:
        self.columns, self.lines, self.hidden = columns, [""], False
        self.links: dict[str, str] = {}
        self._row = self._column = 0
        self._address = ""

    def write(self, text: str) -> Screen:
        """Show a text."""
        position = 0
        for found in _SEQUENCE.finditer(text):
            self._plain(text[position : found.start()])
            self._obey(found)
            position = found.end()
        self._plain(text[position:])
        return self

    def _plain(self, text: str) -> None:
        if self._address:
            self.links[text] = self._address
        for letter in text:
            if letter == "\r":
                self._column = 0
            elif letter == "\n":
                self._down()
            else:
                assert letter.isprintable(), f"{letter!r} would do who knows what"
                if self._column == self.columns:
                    self._down()
                    self._column = 0
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
                self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    def _obey(self, found: re.Match[str]) -> None:
        parameters, letter, command, value = found.groups()
        if command == "8":
            self._address = value.partition(";")[2]
        elif letter == "A":
            self._row = max(0, self._row - int(parameters or 1))
        elif letter == "K":
            self.lines[self._row] = "" if parameters == "2" else self.lines[self._row][: self._column]
        elif letter in ("h", "l") and parameters == "?25":
            self.hidden = letter == "l"
        else:
            assert letter == "m" or command is not None, f"{found.group()!r} is not known here"
