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

import bz2
import glob
import gzip
import io
import json
import lzma
import shutil
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self, TypeAlias

from pretrain.config import UserError
from tools import console

Unit: TypeAlias = Literal["json", "line", "blank-line", "file", "row"]
"""What ends a document: in .jsonl files a line, in tables a row, in .txt files one of the others."""

TXT_UNITS: tuple[Unit, ...] = ("blank-line", "line", "file")

MAX_DOCUMENT_BYTES = 16 << 20
"""Of one document, JSON escapes included: the largest that is read unless asked otherwise."""

STDIN = "-"
"""The name of the standard input among the inputs."""

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_BLOCK_BYTES = 4 << 20
_BLANK_LINE = 4096
"""A blank line of more bytes is not looked for."""
_EXCERPT = 1000
"""Bytes of an over-long document that are kept to show."""
_BOM = b"\xef\xbb\xbf"
_DATASET_STATE = "state.json"
_DATASET_SPLITS = "dataset_dict.json"


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


class Batch(NamedTuple):
    """Consecutive documents of one piece."""

    items: list[Document | Rejected]
    """Line numbers count from the beginning of the piece."""
    lines: int
    """Lines (of tables: rows) that it spans."""
    disk_bytes: int
    """Bytes of the file on disk that were read for it (progress)."""


# ---- which files ---------------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files named by `patterns`: files, folders (all they hold), Hugging Face datasets, globs.

    In the order given; what one of them names is sorted. Files of other kinds in a folder are left
    out, named directly they are an error. Left out too: hidden files, .json, and what a job writes.
    """
    files: list[Path] = []
    for pattern in patterns:
        if not pattern.strip():
            raise UserError("--input: an empty name; it takes files, folders, patterns and @lists")
        for match in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
            path = Path(match)
            files += _folder_files(path) if path.is_dir() else [path]
    for file in files:
        if not file.exists() or file.is_dir():
            raise UserError(f"{file}: no such file; --input takes files, folders, patterns and @lists")
        file_unit(file, "line")
    console.refuse_twice(map(str, files), "file")
    return files


def spool_stdin(patterns: Sequence[str], kind: str, folder: Path) -> list[str]:
    """`patterns` with STDIN replaced by a file in `folder` that holds the standard input.

    So it can be cut into pieces like any other.
    """
    if STDIN not in patterns:
        return list(patterns)
    spool = folder / f"stdin.{kind}"
    with spool.open("wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target, 1 << 20)
    return [str(spool) if pattern == STDIN else pattern for pattern in patterns]


def _folder_files(folder: Path) -> list[Path]:
    if (folder / _DATASET_STATE).is_file():
        return _dataset_files(folder)
    if splits := next(folder.rglob(_DATASET_SPLITS), None):
        raise UserError(f"{splits.parent}: a dataset of several splits; name one: {_splits(splits)}")
    files = sorted(path for path in folder.rglob("*") if _is_searched(path.relative_to(folder)))
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(
            f"{folder}: no .jsonl, .txt, .parquet or .arrow files in this folder (.json: by name or pattern)"
        )
    return files


def _splits(listed: Path) -> str:
    """The folders that Hugging Face's `DatasetDict.save_to_disk` names in a file beside them."""
    names = json.loads(listed.read_text(encoding="utf-8"))["splits"]
    return ", ".join(str(listed.with_name(name)) for name in names)


def _is_searched(path: Path) -> bool:
    """Whether a path within a folder is of text.

    A .json beside text is rarely that: corpora and tokenizers have one, and so have datasets. Compressed
    it is text, for nobody packs those.
    """
    *folders, name = path.parts
    hidden = any(part.startswith(".") for part in path.parts)
    ours = name.endswith(".rejected.jsonl") or any(
        part.endswith((".parts", ".parts.done")) for part in folders
    )
    return bool(_kind(path)) and path.suffix != ".json" and not hidden and not ours


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset written by Hugging Face's `save_to_disk`, in its order."""
    state = json.loads((folder / _DATASET_STATE).read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: rows are selected by an index; call flatten_indices() and save it again")
    return [folder / file["filename"] for file in state["_data_files"]]


def _kind(path: Path) -> str:
    """ "json", "txt", "table" or "" for others, from the name."""
    compressed = path.suffix in _COMPRESSED
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    if suffix in _JSON_SUFFIXES:
        return "json"
    if suffix in _TABLE_SUFFIXES and not compressed:
        return "table"
    return "txt" if suffix == ".txt" else ""


def file_unit(path: Path, txt_unit: Unit) -> Unit:
    """How the file is cut into documents, from its name."""
    units: dict[str, Unit] = {"json": "json", "table": "row", "txt": txt_unit}
    if not (kind := _kind(path)):
        raise UserError(
            f"{path}: unknown kind of file; name it .jsonl or .txt (then .gz, .zst, .bz2 or .xz), .parquet"
            " or .arrow"
        )
    return units[kind]


def is_compressed(path: Path) -> bool:
    """Whether the file can only be read from its beginning."""
    return path.suffix in _COMPRESSED


# ---- pieces --------------------------------------------------------------------------------------


class Reader(ABC):
    """The documents of one file, piece by piece; pieces must be asked for in ascending order."""

    def __init__(self, path: Path, text_key: str, max_bytes: int) -> None:
        self.path, self.text_key, self.max_bytes = path, text_key, max_bytes
        self._at = 0

    @property
    def at(self) -> int:
        """The offset behind what was read so far."""
        return self._at

    @abstractmethod
    def seek(self, start: int) -> bool:
        """Go to the first document that starts at offset `start` or later; False if there is none."""

    @abstractmethod
    def read(self, stop: int | None) -> Iterator[Batch]:
        """The documents from here to the last that starts before offset `stop` (None: the end)."""

    @abstractmethod
    def lines_before(self) -> int:
        """Lines of the file before the place where `seek` went."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _document(self, line: int, text: Any, source: Any) -> Document | Rejected:
        """A text of a JSON line or of a row."""
        if not isinstance(text, str):
            reason = f"{self.text_key!r} is not a string but {type(text).__name__}"
            return Rejected(str(self.path), line, reason, str(text)[:_EXCERPT])
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            return Rejected(str(self.path), line, "half of a surrogate pair in the text", ascii(text))
        if len(utf8) > self.max_bytes:
            return self._too_long(line, utf8)
        return Document(text, utf8, source if isinstance(source, str) else None)

    def _too_long(self, line: int, data: bytes) -> Rejected:
        content = data[:_EXCERPT].decode(errors="backslashreplace")
        reason = f"longer than {self.max_bytes:,} bytes; cut it, or raise --max-document-bytes"
        return Rejected(str(self.path), line, reason, content)


def open_reader(
    path: Path, txt_unit: Unit = "line", text_key: str = "text", max_bytes: int = MAX_DOCUMENT_BYTES
) -> Reader:
    """The reader of a file, by its name."""
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
        self._file = _decompressed(path, self._raw)
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

    def read(self, stop: int | None) -> Iterator[Batch]:
        number = 1
        while stop is None or self._at < stop:
            size = _BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - self._at)
            first, disk = self._at == 0, self._raw.tell()
            data, lines, cut = self._block(size)
            if not data:
                return
            items = list(self._parse(data.removeprefix(_BOM) if first else data, number, cut))
            yield Batch(items, lines, self._raw.tell() - disk)
            number += lines

    def lines_before(self) -> int:
        with _TextReader(self.path, self.unit, self.text_key, self.max_bytes) as other:
            return other._skip(self._began)

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
            record = json.loads(line.decode())
            if not isinstance(record, dict):
                return rejected("not a JSON object")
            item = self._document(number, record[self.text_key], record.get("source"))
            return item if isinstance(item, Document) else rejected(item.reason)
        except UnicodeDecodeError as error:
            return rejected(f"not UTF-8 (byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
            return rejected(f"not JSON ({error})")
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
                raise
            raise UserError(f"{self.path}: damaged or truncated ({error}); copy it again") from error


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    """The file's content, whatever its compression."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".bz2":
        return bz2.open(raw)
    if path.suffix == ".xz":
        return lzma.open(raw)
    return io.BufferedReader(_ZstdFile(raw)) if path.suffix == ".zst" else raw


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


class _TableReader(Reader):
    """Parquet and Arrow files through pyarrow; offsets count row groups or record batches."""

    def __init__(self, path: Path, text_key: str, max_bytes: int) -> None:
        super().__init__(path, text_key, max_bytes)
        self._at = self._began = 0
        self._table = _ParquetTable(path) if path.suffix == ".parquet" else _ArrowTable(path)
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

    def read(self, stop: int | None) -> Iterator[Batch]:
        number = 1
        for group in range(self._at, min(self.groups, self.groups if stop is None else stop)):
            for rows in self._table.read(group, self._columns):
                texts = rows.column(self.text_key).to_pylist()
                sources = (
                    rows.column("source").to_pylist() if "source" in self._columns else [None] * len(texts)
                )
                pairs = zip(texts, sources, strict=True)
                items = [self._document(number + i, *pair) for i, pair in enumerate(pairs)]
                yield Batch(items, len(items), 0)
                number += len(items)
            self._at = group + 1
            yield Batch([], 0, self._disk_bytes)

    def lines_before(self) -> int:
        return sum(self._table.rows[: self._began])


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: .parquet and .arrow files need pyarrow: pip install pyarrow") from error
    return pyarrow


class _ParquetTable:
    """columns: names; rows: of each row group."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow(path)
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from error
        metadata = self._file.metadata
        self.columns: list[str] = self._file.schema_arrow.names
        self.rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, group: int, columns: list[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(64, row_groups=[group], columns=columns, use_threads=False)

    def close(self) -> None:
        self._file.close()


class _ArrowTable:
    """Stream or file format, mapped. columns: names; rows: of each record batch."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow(path)
        self._map = pyarrow.memory_map(str(path))
        try:
            try:
                stream = pyarrow.ipc.open_stream(self._map)
                self._batches = list(stream)
            except pyarrow.ArrowInvalid:
                stream = pyarrow.ipc.open_file(self._map)
                self._batches = [stream.get_batch(i) for i in range(stream.num_record_batches)]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from error
        self.columns: list[str] = stream.schema.names
        self.rows = [len(batch) for batch in self._batches]

    def read(self, group: int, columns: list[str]) -> Iterator[Any]:
        batch = self._batches[group].select(columns)
        for start in range(0, len(batch), 64):
            yield batch.slice(start, 64)

    def close(self) -> None:
        self._batches = []
        self._map.close()


# ---- a file cut into pieces ----------------------------------------------------------------------


class Cut(NamedTuple):
    """Piece k of a file is what starts at offsets k * step to (k + 1) * step - 1."""

    step: int
    pieces: int | None
    """How many; None where only reading can tell."""


def cut(path: Path, txt_unit: Unit, piece_bytes: int) -> Cut:
    """Pieces of about `piece_bytes` of a file."""
    unit = file_unit(path, txt_unit)
    if unit == "file":
        return Cut(1 << 62, 1)
    if unit == "row":
        table = _ParquetTable(path) if path.suffix == ".parquet" else _ArrowTable(path)
        table.close()
        return Cut(1, len(table.rows))
    return Cut(piece_bytes, None if is_compressed(path) else -(-path.stat().st_size // piece_bytes))
