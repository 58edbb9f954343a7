"""Files from strangers, spoilt in every way: a reader that refuses one says so in a line, and takes nothing
that the file has not."""

import contextlib
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from pretrain import checkpoint
from pretrain.errors import UserError
from tests.hostile import outside
from tests.hostile.readers import READERS, make

STRANGE: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e308, 10**30, "x", "", "nan", "../../../etc/passwd", "\ud800"),
    *([], {}, [[[]]], [1, 2, 3], {"a": {}}),
]
ODD_BYTES = [b"", b"{", b"[" * 5_000, b'{"a":' * 5_000, b"9" * 6000, b"\xff\xfe\0", b"\n\n\n", bytes(40)]
NUMBERS = [(1 << 64) - 1, 0, 10**9, 1 << 40, (1 << 63) - 1]
MOST = 300 << 20
"""Bytes by which a program may grow over a bomb; making one costs some of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hostile")
    make(made)
    outside.make(made)
    return made


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places of a document, itself first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place; `...` takes it out."""
    if not place:
        return value
    node = document
    for key in place[:-1]:
        node = node[key]
    if value is ...:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return document


def spoilt_document(name: str, good: bytes, draw: some.DataObject) -> bytes:
    """One value of a JSON or YAML document, or of a line of them, is another, or gone."""
    lines = good.splitlines() if name.endswith(".jsonl") else [good]
    number = draw.draw(some.integers(0, len(lines) - 1))
    document = (yaml.safe_load if name.endswith(".yaml") else json.loads)(lines[number])
    place = draw.draw(some.sampled_from(places(document)))
    value = draw.draw(some.sampled_from([*STRANGE, ...] if place else STRANGE))
    lines[number] = json.dumps(put(document, place, value)).encode()
    return b"\n".join(lines) + b"\n"


def spoilt_bytes(good: bytes, draw: some.DataObject) -> bytes:
    """Cut, flipped, put in, replaced."""
    at = draw.draw(some.integers(0, max(0, len(good) - 1)))
    near = min(at, 64)
    number = struct.pack("<Q", draw.draw(some.sampled_from(NUMBERS)))
    return draw.draw(
        some.sampled_from(
            [
                good[:at],
                good[:at] + bytes([good[at] ^ 4] if good else []) + good[at + 1 :],
                good[:near] + number + good[near + 8 :],
                good[:at] + number + good[at:],
                *ODD_BYTES,
            ]
        )
    )


ALL = READERS | outside.OUTSIDE


@pytest.mark.parametrize("name", ALL)
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(draw=some.data())
def test_a_reader_refuses_in_a_line(name: str, folder: Path, draw: some.DataObject) -> None:
    reader = ALL[name]
    path = folder / draw.draw(some.sampled_from(reader.files))
    good = path.read_bytes()
    documents = path.suffix in (".json", ".jsonl", ".yaml") and draw.draw(some.integers(0, 2))
    spoilt = spoilt_document(path.name, good, draw) if documents else spoilt_bytes(good, draw)
    logging.disable()
    try:
        path.write_bytes(spoilt)
        with contextlib.suppress(UserError):
            reader.read(folder)
    finally:
        path.write_bytes(good)
        logging.disable(logging.NOTSET)


def test_bombs_do_not_burst(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.bombs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (text, growth) in json.loads(done.stdout.splitlines()[-1]).items():
        assert text and "\n" not in text, (name, text)
        assert growth < MOST, (name, growth)


def test_a_pointer_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("../../etc", "/etc/step-00000003", "step-00000003/..", "step-3"):
        (tmp_path / "checkpoints" / "latest").write_text(name, encoding="utf-8")
        assert checkpoint.pointed(tmp_path, "latest") is None
