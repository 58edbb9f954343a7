"""JSON of frozen dataclasses, whose fields are the keys: what programs write, and read again."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pretrain.errors import UserError
from pretrain.files import parse_json

T = TypeVar("T")


def to_json(document: Any) -> str:
    """Return the text of a document, of several, or of plain values that hold some."""
    return json.dumps(document, default=asdict, indent=1)


def read_lines(path: Path, begin: str, problem: str) -> Iterator[tuple[str, Any]]:
    """Yield `path:number` and the value of each line of a file, if there is one; a line that begins with
    `begin` and was torn by a kill is passed over.

    UserError, which tells the problem, where a line is another's.
    """
    text = path.read_text(encoding="utf-8", errors="backslashreplace") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            value = parse_json(line)
        except ValueError:
            if not line.startswith(begin) and not begin.startswith(line):
                raise UserError(f"{path}:{number}: {problem}") from None
        else:
            yield f"{path}:{number}", value


def read(kind: type[T], path: Path) -> T:
    """Return the document of a file; a key that is not known here is passed over.

    UserError names the file and what in it is wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where or 'content'}: {first['msg']}; restore the file") from None
