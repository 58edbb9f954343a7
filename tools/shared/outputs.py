"""Files that programs write where a user says: they appear whole, and take nobody else's place.

What is there already is replaced only if one of these programs wrote it. Pages and pictures
carry a mark; tables and documents, whose rows other programs read, are known by their keys.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.data.writer import refuse_inputs
from pretrain.errors import UserError
from pretrain.files import check_folder, parse_json, write_whole

GENERATOR = "LateMask"
HTML_MARK = f'<meta name="generator" content="{GENERATOR}">'
MARKDOWN_MARK = f"<!-- generator: {GENERATOR} -->"
YAML_MARK = f"# generator: {GENERATOR}"
PNG_MARK = {"Software": GENERATOR}
"""Metadata for matplotlib: a chunk before the picture's data."""
_MARKS = [mark.encode() for mark in (HTML_MARK, MARKDOWN_MARK, f"{YAML_MARK}\n", f"Software\0{GENERATOR}")]
_HEAD_BYTES = 1024
"""Of a file, in which its mark stands."""
_LINES_BYTES = 2**20
"""Of a file of JSON lines, that are looked at."""
_LARGEST = 2**27
"""Bytes of any other; no table of ours comes near."""

Fields = Mapping[str, str]
"""The keys of every row of a table or document, each with what its values begin with."""


def check(
    paths: Iterable[str | Path], inputs: Sequence[str | Path] = (), fields: Fields | None = None
) -> None:
    """Raise UserError, before the work, where a file could not be written, or is not ours, or is an input."""
    for path in map(Path, paths):
        check_folder(path.parent)
        refuse_inputs([path], inputs)
        _refuse_foreign(path, fields)


def write(path: str | Path, content: str | bytes, fields: Fields | None = None) -> None:
    """Make the file appear whole, its folder with it; what is there is replaced if it is ours. A link stays.

    UserError where another's file is there; an OSError names this one, not the temporary file.
    """
    _refuse_foreign(Path(path), fields)
    write_whole(Path(path).resolve(), content.encode() if isinstance(content, str) else content)


def _refuse_foreign(path: Path, fields: Fields | None) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: exists and is no file; choose another place")
    if path.exists() and not _has_mark(path) and not (fields and _has_fields(path, fields)):
        raise UserError(f"{path}: exists and is not of this program; move it away, or choose another place")


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return any(mark in head for mark in _MARKS)


def _has_fields(path: Path, fields: Fields) -> bool:
    """Return whether a file is JSON, JSON lines or CSV whose rows, one at least, all have these.

    Of JSON lines the first are looked at: there may be millions.
    """
    try:
        rows = _rows(path)
    except (ValueError, csv.Error):
        return False
    return bool(rows) and all(
        isinstance(row, dict)
        and all(key in row and str(row[key]).startswith(begin) for key, begin in fields.items())
        for row in rows
    )


def _rows(path: Path) -> list[Any]:
    with path.open("rb") as file:
        head = file.read(_LINES_BYTES)
    lines = head.split(b"\n") if len(head) < _LINES_BYTES else head.split(b"\n")[:-1]
    if head.startswith(b"{") and len(lines) > 1:
        with suppress(ValueError):
            return [parse_json(line) for line in lines if line]
    if path.stat().st_size >= _LARGEST:
        return []
    text = path.read_text(encoding="utf-8")
    if not text.startswith(("{", "[")):
        return list(csv.DictReader(io.StringIO(text)))
    document = parse_json(text)
    return document if isinstance(document, list) else [document]
