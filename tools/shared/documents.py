"""Documents: what programs write as JSON, frozen dataclasses whose fields are the keys."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pretrain.errors import UserError

T = TypeVar("T")


def to_json(document: Any) -> str:
    """Return the text of a document, of several, or of plain values that hold some."""
    return json.dumps(document, default=asdict, indent=1)


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
