"""Standard streams that never end the work, and the one way out of a program.

A reader that has seen enough (``| head``), a terminal that is gone or a stream that was closed (``>&-``) ends
what is shown and not what is done: a finished job exits with 0. A character that a terminal's encoding lacks
is escaped. A result that was meant for a file on a full disk is an error, a message is not.
"""

import errno
import io
import os
import sys
from typing import TextIO

_READERLESS = (errno.EPIPE, errno.EIO)
_STDOUT = 1
_NAMES = ("stdin", "stdout", "stderr")


class _Output(io.FileIO):
    """A descriptor that leads nowhere once nobody reads it, or messages cannot be written."""

    def write(self, data: "memoryview | bytes", /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READERLESS and self.fileno() == _STDOUT:
                raise
            _lead_nowhere(self.fileno())
            return len(data)


def prepare() -> None:
    """Make the standard streams what this module promises; first of all in a program."""
    for descriptor, name in enumerate(_NAMES):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by who started this program
            _open_descriptor(descriptor)
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "w" if descriptor else "r", encoding="utf-8"))
        elif descriptor and type(stream) is io.TextIOWrapper:  # not what a test puts in its place
            setattr(sys, name, _robust(stream))


def finish(code: int) -> int:
    """Flush both streams; return `code`, or 2 where the result of a good end could not be written.

    What cannot be written then leads nowhere, for Python tries once more when it ends.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and not code:
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
                code = 2
            _lead_nowhere(stream.fileno())
    return code


def _robust(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream to the same descriptor, buffered alike."""
    stream.flush()
    raw = _Output(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_descriptor(descriptor: int) -> None:
    """Take the number of a closed stream, or the next file that is opened would be given it."""
    try:
        os.fstat(descriptor)
    except OSError:
        _lead_nowhere(descriptor)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
