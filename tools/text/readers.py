"""Raw text as documents: JSON lines, plain text, tables; plain or compressed; files, folders, patterns.

The one idea: a file is cut into pieces at fixed offsets, and a document belongs to the piece in which it
starts. So pieces can be read anywhere, in any number of processes, and put end to end they are the
file. Offsets count decompressed bytes (of tables: rows); a plain file is entered in the middle, a
compressed one is read from its beginning.

Nothing unreadable is dropped silently: each bad line is a `Rejected` with its number, and so is a
document of more than `max_bytes`, which is never held in memory.

The trap: lines end at b"\\n" only. Python's splitlines also breaks at U+2028, form feeds and
others, which occur inside JSON strings and would shift every line number.
"""

import lzma
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from pretrain.errors import UserError
from pretrain.files import parse_json
from tools.text.arrow import ArrowTable, ParquetTable, Unreadable, values
from tools.text.compression import decompressed
from tools.text.files import Unit, file_unit, is_compressed

MAX_DOCUMENT_BYTES = 16 << 20
"""Of one document, JSON escapes included: the largest that is read unless asked otherwise."""
_BLOCK_BYTES = 4 << 20
_BLANK_LINE = 4096
"""A blank line of more bytes is not looked for."""
_EXCERPT = 1000
"""Bytes of an over-long document that are kept to show."""
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text."""

    text: str
    utf8: bytes
    source: str | None
    """The `source` field of a JSON line or row, where it has one."""


class Rejected(NamedTuple):
    """A line or document that cannot be used."""

    path: str
    line: int
    reason: str
    content: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def suspicions(seen: Mapping[str, int]) -> list[str]:
    """Return what a file's text may be instead, from `Reader.seen` of all of it."""
    found = []
    if seen.get("nul", 0) * 50 > seen.get("bytes", 0):
        found.append(
            f"{seen['nul'] / seen['bytes']:.0%} of its bytes are NUL: UTF-16 without a byte order mark?"
        )
    if seen.get("cr", 0) > seen.get("lf", 0):
        found.append(f"{seen['cr']:,} carriage returns without a line feed, which end no line: old Mac text?")
    return found


def _of_utf16(line: bytes) -> str:
    """Return a hint for a bad line that is likely of another encoding: every second byte of Latin is NUL."""
    return "; UTF-16? save it as UTF-8" if 4 * line.count(0) > len(line) else ""


def to_utf8(text: str) -> bytes | None:
    """Return the bytes of a text; None of one with half of a surrogate pair, which JSON can spell."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


class TextBatch(NamedTuple):
    """Consecutive documents of one piece."""

    items: list[Document | Rejected]
    """Line numbers count from the beginning of the piece."""
    lines: int
    """Lines (of tables: rows) that it spans."""
    disk_bytes: int
    """Bytes of the file on disk that were read for it (progress)."""


# ---- pieces --------------------------------------------------------------------------------------


class Reader(ABC):
    """The documents of one file, piece by piece; pieces must be asked for in ascending order."""

    def __init__(self, path: Path, text_key: str, max_bytes: int) -> None:
        self.path, self.text_key, self.max_bytes = path, text_key, max_bytes
        self._at = 0
        self.seen: Counter[str] = Counter()
        """Of the text read so far: its bytes, and those that make one suspicious."""

    @property
    def at(self) -> int:
        """The offset behind what was read so far."""
        return self._at

    @abstractmethod
    def seek(self, start: int) -> bool:
        """Go to the first document that starts at offset `start` or later; False if there is none."""

    @abstractmethod
    def read(self, stop: int | None) -> Iterator[TextBatch]:
        """Return the documents from here to the last that starts before offset `stop` (None: the end)."""

    @abstractmethod
    def lines_before(self) -> int:
        """Return the lines of the file before the place where `seek` went."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _document(self, line: int, text: Any, source: Any) -> Document | Rejected:
        """A text of a JSON line or of a row."""
        for key, value in ((self.text_key, text), ("source", source)):
            if isinstance(value, Unreadable):
                content = value.content if value is text else str(text)
                return Rejected(str(self.path), line, f"{key!r} is {value.reason}", content[:_EXCERPT])
        if not isinstance(text, str):
            reason = f"{self.text_key!r} is not a string but {type(text).__name__}"
            return Rejected(str(self.path), line, reason, str(text)[:_EXCERPT])
        utf8, source = to_utf8(text), source if isinstance(source, str) else None
        if utf8 is None or to_utf8(source or "") is None:
            place = "the text" if utf8 is None else "'source'"
            return Rejected(str(self.path), line, f"half of a surrogate pair in {place}", ascii(text))
        if len(utf8) > self.max_bytes:
            return self._too_long(line, utf8)
        return Document(text, utf8, source)

    def _too_long(self, line: int, data: bytes) -> Rejected:
        content = data[:_EXCERPT].decode(errors="backslashreplace")
        reason = f"longer than {self.max_bytes:,} bytes; cut it, or raise --max-document-bytes"
        return Rejected(str(self.path), line, reason, content)


def open_reader(
    path: Path, txt_unit: Unit = "line", text_key: str = "text", max_bytes: int = MAX_DOCUMENT_BYTES
) -> Reader:
    """Return the reader of a file, by its name."""
    unit = file_unit(path, txt_unit)
    if unit == "row":
        return _TableReader(path, text_key, max_bytes)
    return _TextReader(path, unit, text_key, max_bytes)


class _TextReader(Reader):
    """Lines of bytes. A cut falls only behind a line that ends a document."""

    def __init__(self, path: Path, unit: Unit, text_key: str, max_bytes: int) -> None:
        super().__init__(path, text_key, max_bytes)
        self.unit = unit
        self._raw = path.open("rb")
        self._file = decompressed(path, self._raw)
        self._at = self._began = 0  # _at: 0, behind such a line, or the end

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def _ends_document(self, line: bytes) -> bool:
        if self.unit == "file" or not line.endswith(b"\n"):
            return False
        return self.unit != "blank-line" or (len(line) < _BLANK_LINE and not line.strip())

    def seek(self, start: int) -> bool:
        if start > self._at:
            # Far enough before `start` to see a blank line that ends there from its beginning.
            enter = max(self._at, start - _BLANK_LINE)
            whole = enter == self._at or self.unit != "blank-line"
            self._go_to(enter)
            while line := self._readline():
                if self._at >= start and whole and self._ends_document(line):
                    break
                whole = line.endswith(b"\n") or self.unit != "blank-line"
        self._began = self._at
        return bool(self._guarded(self._file.peek, 1))

    def read(self, stop: int | None) -> Iterator[TextBatch]:
        number = 1
        while stop is None or self._at < stop:
            size = _BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - self._at)
            first, disk = self._at == 0, self._raw.tell()
            data, lines, cut = self._block(size)
            if not data:
                return
            self._look_at(data)
            items = list(self._parse(data.removeprefix(_BOM) if first else data, number, cut))
            yield TextBatch(items, lines, self._raw.tell() - disk)
            number += lines

    def lines_before(self) -> int:
        with _TextReader(self.path, self.unit, self.text_key, self.max_bytes) as other:
            return other._skip(self._began)

    def _look_at(self, data: bytes) -> None:
        alone = data.count(b"\r") - data.count(b"\r\n")
        self.seen.update(bytes=len(data), nul=data.count(0), cr=alone, lf=data.count(b"\n"))

    def _block(self, size: int) -> tuple[bytes, int, bool]:
        """`size` bytes and what is missing to the end of a document, at most max_bytes of it; lines
        read; whether more was missing."""
        pieces = [self._bytes(size)]
        lines, room = pieces[0].count(b"\n"), self.max_bytes
        line = pieces[0][pieces[0].rfind(b"\n", 0, -1) + 1 :]
        while not self._ends_document(line) and (more := self._readline()):
            line = more if line.endswith(b"\n") else line[:_BLANK_LINE] + more
            lines += more.endswith(b"\n")
            room -= len(more)
            if room >= 0:
                pieces.append(more)
        return b"".join(pieces), lines, room < 0

    def _parse(self, data: bytes, first_line: int, cut: bool) -> Iterator[Document | Rejected]:
        chunks = list(self._chunks(data, first_line))
        for i, (number, chunk) in enumerate(chunks, 1):
            if len(chunk) > self.max_bytes or (cut and i == len(chunks)):
                yield self._too_long(number, chunk)
            else:
                yield self._json(number, chunk) if self.unit == "json" else self._plain(number, chunk)

    def _chunks(self, data: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
        """Line number and bytes of each document."""
        if self.unit == "file":
            yield first_line, data
            return
        start, lines = first_line, list[bytes]()
        for number, line in enumerate(data.split(b"\n"), first_line):
            blank = not line.strip()
            if not blank:
                start = start if lines else number
                lines.append(line)
            if lines and (blank or self.unit != "blank-line"):
                yield start, b"\n".join(lines)
                lines = []
        if lines:
            yield start, b"\n".join(lines)

    def _json(self, number: int, line: bytes) -> Document | Rejected:
        def rejected(reason: str) -> Rejected:
            return Rejected(str(self.path), number, reason, line.decode(errors="backslashreplace"))

        try:
            record = parse_json(line.decode())
            if not isinstance(record, dict):
                return rejected("not a JSON object")
            item = self._document(number, record[self.text_key], record.get("source"))
            return item if isinstance(item, Document) else rejected(item.reason)
        except UnicodeDecodeError as error:
            return rejected(f"not UTF-8 (byte {error.start} of the line){_of_utf16(line)}")
        except ValueError as error:
            return rejected(f"not JSON ({error}){_of_utf16(line)}")
        except KeyError:
            return rejected(f"no key {self.text_key!r} (it has {', '.join(sorted(record))})")

    def _plain(self, number: int, chunk: bytes) -> Document | Rejected:
        data = chunk.replace(b"\r\n", b"\n").removesuffix(b"\r")
        try:
            return Document(data.decode(), data, None)
        except UnicodeDecodeError as error:
            line = number + data.count(b"\n", 0, error.start)
            return Rejected(str(self.path), line, "not UTF-8", chunk.decode(errors="backslashreplace"))

    def _go_to(self, offset: int) -> None:
        if is_compressed(self.path):
            self._skip(offset - self._at)
        else:
            self._file.seek(offset)
            self._at = offset

    def _skip(self, size: int) -> int:
        """Pass over bytes; the lines that end in them."""
        lines = 0
        target = self._at + size
        while self._at < target and (data := self._bytes(min(_BLOCK_BYTES, target - self._at))):
            lines += data.count(b"\n")
        return lines

    def _bytes(self, size: int) -> bytes:
        data = self._guarded(self._file.read, size)
        self._at += len(data)
        return data

    def _readline(self) -> bytes:
        """A line, or some of it."""
        line = self._guarded(self._file.readline, 1 << 16)
        self._at += len(line)
        return line

    def _guarded(self, read: Any, size: int) -> bytes:
        """`read(size)`; damage of a compressed file is the user's error."""
        try:
            data: bytes = read(size)
            return data
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and not is_compressed(self.path):
                error.filename = str(self.path)
                raise
            raise UserError(f"{self.path}: damaged or truncated ({error}); copy it again") from error


class _TableReader(Reader):
    """Parquet and Arrow files through pyarrow; offsets count row groups or record batches."""

    def __init__(self, path: Path, text_key: str, max_bytes: int) -> None:
        super().__init__(path, text_key, max_bytes)
        self._at = self._began = 0
        self._table = ParquetTable(path) if path.suffix == ".parquet" else ArrowTable(path)
        self._disk_bytes = path.stat().st_size // max(1, self.groups)
        if text_key not in self._table.columns:
            raise UserError(f"{path}: no column {text_key!r} (it has {', '.join(self._table.columns)})")
        self._columns = [name for name in (text_key, "source") if name in self._table.columns]

    @property
    def groups(self) -> int:
        """Row groups or record batches."""
        return len(self._table.rows)

    def close(self) -> None:
        self._table.close()

    def seek(self, start: int) -> bool:
        self._began = self._at = max(self._at, start)
        return self._at < self.groups

    def read(self, stop: int | None) -> Iterator[TextBatch]:
        number = 1
        for group in range(self._at, min(self.groups, self.groups if stop is None else stop)):
            for rows in self._table.read(group, self._columns):
                texts = values(rows.column(self.text_key))
                sources = values(rows.column("source")) if "source" in self._columns else [None] * len(texts)
                pairs = zip(texts, sources, strict=True)
                items = [self._document(number + i, *pair) for i, pair in enumerate(pairs)]
                yield TextBatch(items, len(items), 0)
                number += len(items)
            self._at = group + 1
            yield TextBatch([], 0, self._disk_bytes)

    def lines_before(self) -> int:
        return sum(self._table.rows[: self._began])


# ---- a file cut into pieces ----------------------------------------------------------------------


class TextCut(NamedTuple):
    """Piece k of a file is what starts at offsets k * step to (k + 1) * step - 1."""

    step: int
    pieces: int | None
    """How many; None where only reading can tell."""


def cut(path: Path, txt_unit: Unit, piece_bytes: int) -> TextCut:
    """Return the pieces of about `piece_bytes` of a file."""
    unit = file_unit(path, txt_unit)
    if unit == "file":
        return TextCut(1 << 62, 1)
    if unit == "row":
        table = ParquetTable(path) if path.suffix == ".parquet" else ArrowTable(path)
        table.close()
        return TextCut(1, len(table.rows))
    return TextCut(piece_bytes, None if is_compressed(path) else -(-path.stat().st_size // piece_bytes))
