"""What an unfinished command has computed, so that the same command goes on after a kill.

A result lies under a hash of all that determines it. So nothing has to be compared: with other
weights, texts or options there is nothing under the hash.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.files import append_line, parse_json, remove


def key_of(*parts: object) -> str:
    """Return the hash of what determines a result: values whose text is the same in every process."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Unfinished:
    """Results by `key_of`: in a hidden file of a folder until the command is finished, or in memory."""

    def __init__(self, folder: str | Path | None, program: str) -> None:
        self._path = Path(folder) / f".{program}.unfinished" if folder else None
        self._known = dict[str, Any]()
        if self._path and self._path.exists():
            for line in self._path.read_bytes().splitlines():
                with suppress(ValueError, TypeError):  # torn by a kill
                    name, value = parse_json(line)
                    self._known[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._known[name] = value
        if self._path:
            append_line(self._path, json.dumps([name, value], allow_nan=False))

    def finish(self) -> None:
        """Remove the file, once what was made of the results is written."""
        if self._path:
            remove(self._path)
