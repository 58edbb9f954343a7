"""Raw text files as documents: JSON lines or plain text, plain or compressed with gzip or zstd.

The one idea: a file is read as blocks of a few megabytes that never cut a document, so that blocks
can be parsed anywhere, in any number of processes, and put back in order. Nothing unreadable is
dropped silently: each bad line is a `Rejected` with its number.

The trap: lines end at b"\\n" only. Python's splitlines also breaks at U+2028, form feeds and
others, which occur inside JSON strings and would shift every line number.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

from pretrain.config import UserError

Unit: TypeAlias = Literal["json", "line", "blank-line", "file"]
"""What ends a document: in .jsonl files a line, in .txt files one of the other three."""

TXT_UNITS: tuple[Unit, ...] = ("blank-line", "line", "file")

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Consecutive whole documents of one file."""

    path: str
    first_line: int
    """Number of its first line, from 1."""
    unit: Unit
    data: bytes
    read_bytes: int
    """Bytes of the file on disk that were read for it (progress)."""


class Document(NamedTuple):
    """One text."""

    text: str
    utf8: bytes
    source: str | None
    """The `source` field of a JSON line, where it has one."""


class Rejected(NamedTuple):
    """A line or document that cannot be used."""

    path: str
    line: int
    reason: str
    content: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files named or matched by `patterns`, in the order given, matches of one pattern sorted."""
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) or [pattern]
        files += [Path(match) for match in matches]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; --input takes files, patterns and @lists of them")
        file_unit(file, "line")
    repeated = {str(file) for file in files if files.count(file) > 1}
    if repeated:
        raise UserError(f"{min(repeated)}: named twice as an input")
    return files


def file_unit(path: Path, txt_unit: Unit) -> Unit:
    """How the file is cut into documents, from its name."""
    name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    if name.suffix in _JSON_SUFFIXES:
        return "json"
    if name.suffix == ".txt":
        return txt_unit
    raise UserError(f"{path}: unknown kind of file; name it .jsonl or .txt (then .gz or .zst)")


def read_blocks(path: Path, txt_unit: Unit) -> Iterator[Block]:
    """The file as blocks of whole documents; UserError where it is damaged."""
    unit, line = file_unit(path, txt_unit), 1
    with path.open("rb") as raw, _decompressed(path, raw) as file:
        before = 0
        while data := _read_block(file, unit):
            position = raw.tell()
            body = data.removeprefix(_BOM) if line == 1 else data
            yield Block(str(path), line, unit, body, position - before)
            line, before = line + data.count(b"\n"), position


def parse(block: Block, text_key: str) -> Iterator[Document | Rejected]:
    """The documents of a block in order, and what could not be read as one."""
    if block.unit == "json":
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if line.strip():
                yield _parse_json(block.path, number, line, text_key)
        return
    for number, chunk in _chunks(block):
        yield _decode(block.path, number, chunk)


def _read_block(file: BinaryIO, unit: Unit) -> bytes:
    """Some megabytes up to the end of a document; empty at the end of the file."""
    pieces = [file.read(_BLOCK_BYTES)]
    if unit == "file":
        pieces.append(file.read())
    elif pieces[0]:
        pieces.append(file.readline())  # the rest of a line, which may be its "\n" alone
        blank = unit != "blank-line"
        while not blank:
            pieces.append(file.readline())
            blank = not pieces[-1].strip()
    return b"".join(pieces)


@contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """The file's content, whatever its compression; damage found while reading is a UserError."""
    try:
        if path.suffix == ".gz":
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdFile(raw))
        else:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from error


class _ZstdFile(io.RawIOBase):
    """Decompressed zstd, frame after frame. The package's own reader ends quietly in a cut
    frame."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(".zst files need the zstandard package: pip install zstandard") from error
        self._raw, self._error = raw, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._raw.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._output = memoryview(self._decompress())
        taken = self._output[: len(buffer)]
        buffer[: len(taken)] = taken
        self._output = self._output[len(taken) :]
        return len(taken)

    def _decompress(self) -> bytes:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            data = self._frame.decompress(self._input)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return data


def _chunks(block: Block) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of each document of a plain text block."""
    if block.unit == "file":
        yield block.first_line, block.data
        return
    start = block.first_line
    lines: list[bytes] = []
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        blank = not line.strip()
        if not blank:
            start = start if lines else number
            lines.append(line)
        if lines and (blank or block.unit == "line"):
            yield start, b"\n".join(lines)
            lines = []
    if lines:
        yield start, b"\n".join(lines)


def _parse_json(path: str, number: int, line: bytes, text_key: str) -> Document | Rejected:
    def rejected(reason: str) -> Rejected:
        return Rejected(path, number, reason, line.decode(errors="backslashreplace"))

    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            return rejected("not a JSON object")
        text = record[text_key]
        if not isinstance(text, str):
            return rejected(f"{text_key!r} is not a string but {type(text).__name__}")
        source = record.get("source")
        return Document(text, text.encode(), source if isinstance(source, str) else None)
    except UnicodeDecodeError as error:
        return rejected(f"not UTF-8 (byte {error.start} of the line)")
    except UnicodeEncodeError:
        return rejected("half of a surrogate pair in the text")
    except (json.JSONDecodeError, RecursionError) as error:
        return rejected(f"not JSON ({error})")
    except KeyError:
        return rejected(f"no key {text_key!r} (it has {', '.join(sorted(record))})")


def _decode(path: str, number: int, chunk: bytes) -> Document | Rejected:
    data = chunk.replace(b"\r\n", b"\n").removesuffix(b"\r")
    try:
        return Document(data.decode(), data, None)
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        return Rejected(path, line, "not UTF-8", chunk.decode(errors="backslashreplace"))
