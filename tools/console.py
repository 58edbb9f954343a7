"""What the programs share: exit codes, one line for a user's mistake, a progress bar, --version and
--json.

Standard output carries the result and nothing else; progress and errors go to standard error.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pretrain import __version__
from pretrain.config import UserError

USER_ERROR = 2
INTERRUPTED = 130


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns; 2 and one line where the user must change something.

    A Ctrl-C or SIGTERM unwinds the stack, so that half-written files are removed on the way out.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = fail(str(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a missing permission
        code = fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def fail(message: str) -> int:
    """Print the one line of a user's error; its exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def parser(name: str, description: str, reports: bool = False) -> argparse.ArgumentParser:
    """An argument parser for ``python -m tools.NAME``; ``--json`` where it `reports`.

    An argument ``@FILE`` stands for the lines of FILE.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m tools.{name}",
        description=description,
        fromfile_prefix_chars="@",
    )
    result.add_argument("--version", action="version", version=f"LateMask {__version__}")
    if reports:
        result.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return result


def add_input(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of programs that read raw text."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=required,
        metavar="F",
        help=".jsonl or .txt [.gz .zst .bz2 .xz], .parquet, .arrow; files, folders, patterns, @lists or -",
    )
    parser.add_argument("--text-key", default="text", help="JSON key or column of the text (%(default)s)")
    parser.add_argument(
        "--txt-document",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="what ends a document in .txt files (%(default)s)",
    )
    parser.add_argument(
        "--stdin", choices=("jsonl", "txt"), default="jsonl", help="what - (standard input) is (%(default)s)"
    )


def available_cores() -> int:
    """Cores this process may run on: a job's share of a node, not the node."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def print_json(document: Any) -> None:
    """The one JSON document of a ``--json`` run."""
    print(json.dumps(document, indent=1))


@contextmanager
def progress(title: str, total_bytes: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error; yields the function that takes bytes
    done."""
    if quiet:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda done: bar.advance(task, done)


@contextmanager
def counter(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that counts things, with their rate and the time left, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
