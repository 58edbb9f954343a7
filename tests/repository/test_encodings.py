"""No text file and no pipe is read or written in the encoding of the locale."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("pretrain", "tools", "slurm") for path in (ROOT / package).rglob("*.py"))
OPENERS = (
    "open",
    "fdopen",
    "read_text",
    "write_text",
    "NamedTemporaryFile",
    "TemporaryFile",
    "TextIOWrapper",
)
OF_BYTES = ("os", "gzip", "bz2", "lzma", "Ledger", "image", "ipc", "tempfile")
"""Whose `open` is another function, or one that opens bytes unless told otherwise."""


def is_of_bytes(call: ast.Call, owner: str) -> bool:
    modes = [
        word.value
        for word in (*call.args, *(word.value for word in call.keywords))
        if isinstance(word, ast.Constant)
        and isinstance(word.value, str)
        and set(word.value) <= set("rwaxbt+")
    ]
    return any("b" in mode for mode in modes) or (
        owner in OF_BYTES
        and not any("t" in m for m in modes)
        and not any(m in ("r", "w", "a") for m in modes)
    )


def lacking(text: str) -> list[str]:
    """Calls in a program's text that leave the encoding to the locale."""
    found = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        owner, _, name = function.rpartition(".")
        given = {word.arg for word in call.keywords}
        if given & {"text", "universal_newlines"} and "encoding" not in given:
            found.append(f"{call.lineno}: {ast.unparse(call)}")
        if name in OPENERS and "encoding" not in given and not is_of_bytes(call, owner.rpartition(".")[2]):
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_text_has_an_encoding(path: Path):
    assert not lacking(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ("open(path)", False),
        ("open(path, 'w')", False),
        ("open(path, 'rb')", True),
        ("path.open('w+b')", True),
        ("path.read_text()", False),
        ("path.write_text(text, encoding='utf-8')", True),
        ("gzip.open(path)", True),
        ("gzip.open(path, 'rt')", False),
        ("os.open(path, os.O_RDONLY)", True),
        ("tempfile.NamedTemporaryFile('w')", False),
        ("tempfile.TemporaryFile(dir=there)", True),
        ("subprocess.run(command, text=True)", False),
        ("subprocess.run(command, text=True, encoding='utf-8')", True),
    ],
)
def test_what_is_found(line: str, is_right: bool):
    assert (not lacking(line)) == is_right
