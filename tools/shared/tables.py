"""Tables of plain dicts: CSV and JSON files that appear whole, and columns for a terminal."""

import csv
import io
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import terminal
from tools.shared import outputs


def table_files(folder: Path, name: str) -> list[Path]:
    """Return the files of a table."""
    return [folder / f"{name}.csv", folder / f"{name}.json"]


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], fields: outputs.Fields) -> None:
    """Write NAME.csv and NAME.json of rows with equal keys, which have `fields` (see `outputs.write`).

    A nested value is JSON in its cell.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {key: json.dumps(value) for key, value in row.items() if isinstance(value, dict | list)}
        writer.writerow({**row, **nested})
    contents = (table.getvalue(), json.dumps(list(rows), indent=1) + "\n")
    for path, content in zip(table_files(folder, name), contents, strict=True):
        outputs.write(path, content, fields)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of words as a table of a page; the first heads the others."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(rows[0]) - 1)}", *lines[1:]])


def aligned(
    rows: Sequence[Sequence[str]], names: int = 1, bound: Container[int] = (), width: int | None = None
) -> str:
    """Return rows of words as columns: the first to the left, the others to the right; the first row heads
    them.

    Columns that exceed `width`, which is the terminal's where standard output is one, go into further parts
    below, each with the first `names` columns; a `bound` column goes where the one before it goes.
    """
    width = width or terminal.columns()
    columns = [list(column) for column in zip(*rows, strict=True)]
    heads = [_shortened(column, width) for column in columns[:names]]
    groups: list[list[list[str]]] = []
    for number, column in enumerate(columns[names:], names):
        if number in bound:
            groups[-1].append(column)
        else:
            groups.append([column])
    parts = [heads]
    for group in groups:
        if width and len(parts[-1]) > names and _width([*parts[-1], *group]) > width:
            parts.append(heads)
        parts[-1] = [*parts[-1], *group]
    return "\n\n".join(map(_lines, parts))


def _shortened(names: list[str], width: int | None) -> list[str]:
    """Return names of half a terminal at most: of a path, the end tells it from others."""
    most = max(16, (width or 0) // 2)
    return [name if width is None or len(name) <= most else f"...{name[3 - most :]}" for name in names]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in columns) - 2


def _lines(columns: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            word.rjust(width) if i else word.ljust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    )
