"""Runs programs on a pseudo-terminal of a fixed width and says what stays on its screen."""

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Screen(NamedTuple):
    """What a program has written."""

    raw: str
    """All of it, what was wiped out again included."""
    lines: list[str]
    """What is there to be read in the end, without blank lines."""
    code: int


def on_terminal(command: Sequence[str], width: int, env: Mapping[str, str] | None = None) -> Screen:
    """Return what `command` leaves on a terminal of `width` columns, both streams on it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
    environment = {**inherited, "TERM": "xterm", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **(env or {})}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT
    ) as process:
        os.close(theirs)
        raw = _read(ours)
    os.close(ours)
    return Screen(raw, [line for line in _screen(raw) if line], process.returncode)


def _read(terminal: int) -> str:
    data = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        data += more
    return data.decode()


def _screen(raw: str) -> list[str]:
    """Return the lines that a terminal without an end below would show after `raw`."""
    lines, row, column = [""], 0, 0
    for escape, letter in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z])|([^\x1b])", raw, re.DOTALL):
        if escape:
            count = int(re.sub(r"\D", "", escape) or 1)
            if escape.endswith("A"):
                row = max(0, row - count)
            elif escape.endswith("K"):
                lines[row] = "" if "2K" in escape else lines[row][:column]
        elif letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
