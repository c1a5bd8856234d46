"""A terminal to run commands on: a pseudo-terminal, and as much of a screen as tells what a person would see."""

import fcntl
import os
import pty
import re
import struct
import termios
import time

TOKENS = re.compile(r"\x1b\[(\??\d*)([A-Za-z])|\x1b.|[^\x1b]", re.DOTALL)


class Screen:
    """Lines as they stand, the cursor's place, and whether it is seen. Knows what `rich` writes, and asserts that."""

    def __init__(self, columns: int):
        self.columns, self.lines, self.row, self.column, self.cursor = columns, [""], 0, 0, True
        self.wrapped: list[str] = []  # what was cut by the edge

    def feed(self, text: str) -> "Screen":
        for match in TOKENS.finditer(text):
            number, code = match.groups()
            if code is None:
                self._put(match[0])
            elif code == "A":
                self.row -= int(number or 1)
            elif (number, code) == ("2", "K"):
                self.lines[self.row] = ""
            elif number.startswith("?25"):
                self.cursor = code == "h"
            else:
                assert code == "m", f"{match[0]!r} is not known here"
        return self

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
        else:
            if self.column == self.columns:
                self.wrapped.append(self.lines[self.row])
                self._put("\r"), self._put("\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


class Terminal:
    """path: what a process opens to be on it."""

    def __init__(self, columns: int):
        self.columns, self._text = columns, ""
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)

    def read(self) -> str:
        """All that was written so far."""
        try:
            while chunk := os.read(self._master, 65536):
                self._text += chunk.decode()
        except BlockingIOError:
            pass
        return self._text

    def wait_for(self, words: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while words not in self.read():
            assert time.monotonic() < end, self._text
            time.sleep(0.02)

    def screen(self) -> Screen:
        return Screen(self.columns).feed(self.read())

    def close(self) -> None:
        os.close(self._master), os.close(self._slave)
