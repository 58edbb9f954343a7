"""What the programs share: one line for a user's mistake, types of arguments, a progress bar, --version and
--json.

Standard output carries the result and nothing else; progress and errors go to standard error.
"""

import argparse
import codecs
import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pretrain import __version__, streams
from pretrain.errors import INTERRUPTED, USER_ERROR, UserError
from pretrain.files import check_name
from tools.shared import typed_json

if TYPE_CHECKING:
    from rich.console import Console


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns; 2 and one line where the user must change something.

    A Ctrl-C or SIGTERM unwinds the stack, so that half-written files are removed on the way out.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    streams.prepare()
    try:
        code = main() or 0
    except SystemExit as end:  # --help, or SIGTERM
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        code = fail(str(error))
    except OSError as error:  # a full disk, a missing permission
        code = fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(streams.finish(code))


@contextmanager
def signals_kill() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once: foreign code that runs for minutes without returning to
    the interpreter would not see them. For work that leaves nothing half-written."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message: str) -> int:
    """Print a user's errors, each problem on a line of its own; their exit code."""
    for problem in message.splitlines():
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return USER_ERROR


class _Parser(argparse.ArgumentParser):
    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        """Return the words, with those of @FILEs; a file whose own name begins with an @ is no list.

        The bytes of a line are those that a command would have: argparse reads them by the locale.
        """
        words = list[str]()
        for word in map(at_home, arg_strings):
            check_name(word)
            if not word.startswith("@") or os.path.exists(word):
                words.append(word)
                continue
            try:
                text = os.fsdecode(Path(word[1:]).read_bytes().removeprefix(codecs.BOM_UTF8))
            except OSError as error:
                self.error(f"{word}: {error.strerror}")
            found = [self.convert_arg_line_to_args(line) for line in re.split("\r\n|\n|\r", text)]
            words += self._read_args_from_files(list(itertools.chain(*found)))
        return words

    def error(self, message: str) -> NoReturn:
        """Raise one line, as for any other mistake; argparse would print its usage before it."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Pass over a blank line of an @FILE."""
        return [arg_line] if arg_line.strip() else []


def at_home(word: str) -> str:
    """Return a word with its ~/ spelt out: a shell leaves it in --option=~/name, in quotes, in an @FILE."""
    found = re.fullmatch("(@|--[a-z-]+=)?(~/.*)", word, re.DOTALL)
    return (found[1] or "") + os.path.expanduser(found[2]) if found else word


def parser(
    name: str, description: str, reports: bool = False, package: str = "tools"
) -> argparse.ArgumentParser:
    """Return an argument parser for ``python -m PACKAGE.NAME``; ``--json`` where it `reports`.

    An argument ``@FILE`` stands for the lines of FILE.
    """
    result = _Parser(
        prog=f"python -m {package}.{name}",
        description=description,
        fromfile_prefix_chars="@",
    )
    result.add_argument("--version", action="version", version=f"LateMask {__version__}")
    if reports:
        result.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return result


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return the type of an argument: a whole number from `low` to `high`."""

    def number(text: str) -> int:
        if re.fullmatch("[0-9]+", text) and low <= int(text) <= (high or math.inf):
            return int(text)
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")

    return number


def _real(what: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Return the type of an argument: a number for which `holds` is true, which is `what`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if holds(value):
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return number


share = _real("a share between 0 and 1, such as 0.005", lambda value: 0 < value < 1)
part = _real("a number above 0 and up to 1, such as 0.4", lambda value: 0 < value <= 1)
positive = _real("a number above 0", lambda value: 0 < value < math.inf)


def prefix(text: str) -> str:
    """Return the type of an argument: what the names of files begin with; a folder alone would hide them."""
    if os.path.basename(text) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; add the name that its files begin with")
    return text


def refuse_twice(names: Iterable[str], what: str = "folder", suffix: str = "") -> None:
    """Raise UserError if two names, with `suffix` added, are of one file or folder: it would count twice."""
    seen: dict[str, str] = {}
    for name in names:
        place = os.path.realpath(name + suffix)
        if place in seen:
            raise UserError(f"{name}: the same {what} as {seen[place]}; name it once")
        seen[place] = name


def labels(paths: Sequence[str]) -> dict[str, str]:
    """Return a name for each path: that of its folder, or where several have that, the path."""
    short = {path: os.path.basename(os.path.abspath(path)) for path in paths}
    taken = list(short.values())
    return {path: name if taken.count(name) == 1 else path for path, name in short.items()}


def matching(names: Iterable[str], words: Sequence[str]) -> list[str]:
    """Return what --only chooses: the names that hold one of the words; UserError if none does."""
    known = list(names)
    found = [name for name in known if any(word in name for word in words)]
    if not found:
        raise UserError(f"--only {' '.join(words)}: in none of the names: {'; '.join(known)}")
    return found


def add_input(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of programs that read raw text."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=required,
        metavar="F",
        help=".jsonl or .txt [.gz .zst .bz2 .xz], .parquet, .arrow; files, folders, patterns, @lists or -",
    )
    add_text_options(parser)
    parser.add_argument(
        "--stdin", choices=("jsonl", "txt"), default="jsonl", help="what - (standard input) is (%(default)s)"
    )


def add_text_options(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the options that say where in a file the documents are."""
    parser.add_argument("--text-key", default="text", help="JSON key or column of the text (%(default)s)")
    parser.add_argument(
        "--txt-document",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="what ends a document in .txt files (%(default)s)",
    )


def add_document_limit(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the option that bounds what is held of one document."""
    parser.add_argument(
        "--max-document-bytes",
        type=whole(1),
        default=default,
        metavar="N",
        help="longer documents are errors, for they would have to be held in memory (%(default)s)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint latest|best|STEP|NAME``."""
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best, a step, or the name of kept weights: share-0.1, average (%(default)s)",
    )


def add_output_prefix(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that write a corpus."""
    parser.add_argument(
        "--output", required=True, type=prefix, metavar="PREFIX", help="prefix of the corpus written"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")


def available_cores() -> int:
    """Return the cores this process may run on: a job's share of a node, not the node."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_CONTROLS = [
    *range(0x9),
    *range(0xB, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_ESCAPES = {point: chr(point).encode("unicode_escape").decode() for point in _CONTROLS}


def shared_cores(jobs: int) -> dict[str, str]:
    """Return the environment of one of so many processes side by side, which share the cores."""
    threads = str(max(1, available_cores() // jobs))
    return {"OMP_NUM_THREADS": threads, **os.environ, "TOKENIZERS_PARALLELISM": "false"}


def printable(text: str) -> str:
    """Text of unknown origin for a terminal, with an escape for what would move, colour or turn what is
    around it. Tabs and line ends stay."""
    return text.translate(_ESCAPES)


def print_json(document: Any) -> None:
    """Print the one JSON document of a ``--json`` run; what is no number, which JSON cannot say, is null."""
    finite = json.loads(typed_json.to_json(document), parse_constant=lambda name: None)
    print(typed_json.to_json(finite))


def _below(console: "Console") -> dict[str, Any]:
    """Return how a bar behaves: below what is printed meanwhile, as wide as the terminal, gone when it ends.

    In a log, which no bar has moved in, its last state stays. What goes into a pipe goes there at once.
    """
    shared = {"transient": console.is_terminal, "expand": console.is_terminal}
    return {"console": console, **shared, "redirect_stdout": sys.stdout.isatty()}


@contextmanager
def progress(title: str, total_bytes: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a bar with rate and time left on standard error; yields the function that takes bytes done."""
    if quiet:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        Task,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Rate(TransferSpeedColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.finished_speed or task.speed else Text("")

    columns = (BarColumn(None), DownloadColumn(), Rate(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress("{task.description}", *columns, **_below(Console(stderr=True))) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda done: bar.advance(task, done)
        bar.update(task, completed=total_bytes)  # what readers ahead of themselves have not told


@contextmanager
def counter(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a bar that counts things, with their rate and the time left, on standard error."""
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
            if not task.speed:
                return Text("")
            return Text(
                f"{task.speed:.1f} {unit}/s" if task.speed >= 1 else f"{60 * task.speed:.1f} {unit}/min"
            )

    columns = (BarColumn(None), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    # Things may take minutes each: without a few of them in view there would be no time left to show.
    bar = Progress("{task.description}", *columns, **_below(Console(stderr=True)), speed_estimate_period=600)
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
