"""Tables of plain dicts: CSV and JSON files that appear whole, and columns for a terminal."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.shared import console


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """NAME.csv and NAME.json of rows with equal keys; a nested value is JSON in its cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {key: json.dumps(value) for key, value in row.items() if isinstance(value, dict | list)}
        writer.writerow({**row, **nested})
    console.write(folder / f"{name}.csv", table.getvalue())
    console.write(folder / f"{name}.json", json.dumps(list(rows), indent=1) + "\n")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as columns: the first to the left, the others to the right; the first row heads them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.rjust(width) if i else word.ljust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
