"""Lines that could not be read: PREFIX.rejected.jsonl, beside the corpus."""

import filecmp
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pretrain.errors import UserError
from pretrain.files import named, parse_json
from tools.encode_corpus.parts import Part
from tools.text.readers import Rejected


def collect_rejected(parts: Sequence[Part], output: str, replace: bool) -> int:
    """Write the rejected lines of all parts beside PREFIX.rejected.jsonl, and return their number.

    UserError if there is another file of that name, unless it is such a file and to be replaced.
    """
    path, partial = _rejected_files(output)
    try:
        with named(path), partial.open("w", encoding="utf-8", errors="backslashreplace") as target:
            total = _copy_rejected(parts, target)
        refuse_foreign_rejected(output)
        if path.exists() and not replace and not filecmp.cmp(path, partial, shallow=False):
            raise UserError(f"{path}: exists already; choose another --output or add --overwrite")
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return total


def _copy_rejected(parts: Sequence[Part], target: TextIO) -> int:
    total, before, file = 0, 0, -1
    for part in parts:
        before = before if part.file == file else 0
        file = part.file
        if part.rejected:
            with open(f"{part.prefix}.rejected", encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    line["line"] += before
                    target.write(json.dumps(line, ensure_ascii=False) + "\n")
        before += part.lines
        total += part.rejected
    return total


def publish_rejected(output: str, total: int) -> None:
    """Give the rejected lines their name; where there are none there is no file."""
    path, partial = _rejected_files(output)
    path.unlink(missing_ok=True)  # of an earlier attempt
    partial.replace(path) if total else partial.unlink()


def _rejected_files(output: str) -> tuple[Path, Path]:
    return Path(f"{output}.rejected.jsonl"), Path(f"{output}.rejected.jsonl.partial")


def refuse_foreign_rejected(output: str) -> None:
    """Raise UserError where PREFIX.rejected.jsonl is not demonstrably a list of rejected lines."""
    path, _ = _rejected_files(output)
    if not os.path.lexists(path):
        return
    try:
        with path.open("rb") as file:
            first = parse_json(file.readline())
        ours = isinstance(first, dict) and tuple(first) == Rejected._fields
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{path}: exists and is no list of rejected lines; choose another --output")


def said_rejected(lines: int, output: str) -> str:
    """Return how many lines were rejected and where they are, in words."""
    return f"{lines:,} rejected {'line' if lines == 1 else 'lines'} in {output}.rejected.jsonl"
