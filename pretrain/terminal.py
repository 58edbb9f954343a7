"""How much fits on a line of a terminal, and text that keeps to it.

Where a stream is no terminal (a pipe, a job's log), nothing is cut and nothing is wrapped.
"""

import os
import shutil
import sys
from textwrap import fill
from typing import IO


def columns(stream: IO[str] | None = None) -> int | None:
    """Return the characters of a line of the terminal that `stream`, or else standard output, is; else None.

    COLUMNS, where it is set, has the last word, as for other programs.
    """
    stream = stream or sys.stdout
    try:
        if not stream.isatty():
            return None
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns or None
    except (ValueError, OSError):  # closed, or a terminal that knows no size
        return shutil.get_terminal_size().columns


def wrapped(text: str, stream: IO[str] | None = None, indent: int = 0) -> str:
    """Return `text` with its lines broken between words where they exceed a terminal's width.

    What a line goes on with is set in by `indent`.
    """
    width = columns(stream)
    if width is None:
        return text
    return "\n".join(
        line
        if len(line) <= width
        else fill(
            line,
            max(width, indent + 1),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
            replace_whitespace=False,
        )
        for line in text.splitlines()
    )
