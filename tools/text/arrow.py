"""Reads rows of Parquet and Arrow tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import UserError


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: .parquet and .arrow files need pyarrow: pip install pyarrow") from error
    return pyarrow


class Unreadable(NamedTuple):
    """What stands in the place of a value that Python cannot have."""

    reason: str
    content: str


def values(column: Any) -> list[Any]:
    """Return the values of a column; where one of them cannot be read, that one alone is `Unreadable`."""
    try:
        found: list[Any] = column.to_pylist()
        return found
    except _NO_VALUE:
        return [_value(cell) for cell in column]


_NO_VALUE = (ValueError, OverflowError, NotImplementedError)  # bytes that are no UTF-8; a date without a year


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte {error.start})", error.object.decode(errors="backslashreplace"))
    except _NO_VALUE as error:
        return Unreadable(f"no value of {cell.type} ({error})", "")


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: damaged or truncated ({reason}); copy it again")


class ParquetTable:
    """columns: names; rows: of each row group."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow(path)
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(path, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
                raise
            raise _damaged(path, error) from error
        self._path, self._errors = path, (pyarrow.ArrowException, OSError)
        metadata = self._file.metadata
        self.columns: list[str] = self._file.schema_arrow.names
        self.rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, group: int, columns: list[str]) -> Iterator[Any]:
        left = self.rows[group]
        try:
            for batch in self._file.iter_batches(64, row_groups=[group], columns=columns, use_threads=False):
                left -= len(batch)
                yield batch
        except self._errors as error:
            raise _damaged(self._path, error) from error
        if left:
            raise _damaged(self._path, f"{left} rows of row group {group} are not there")

    def close(self) -> None:
        self._file.close()


_MARK, _NO_MORE = b"\xff" * 4, bytes(4)
"""What a message of a stream begins with, but before version 0.15 not; its length, of none at the end."""


class ArrowTable:
    """Stream or file format, mapped. columns: names; rows: of each record batch."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow(path)
        self._path, self._pyarrow = path, pyarrow
        self._map = pyarrow.memory_map(str(path))
        try:
            try:
                stream = pyarrow.ipc.open_stream(self._map)
                self._batches = list(stream)
                self._check_end()
            except pyarrow.ArrowInvalid:
                stream = pyarrow.ipc.open_file(self._map)
                self._batches = [stream.get_batch(i) for i in range(stream.num_record_batches)]
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        self.columns: list[str] = stream.schema.names
        self.rows = [len(batch) for batch in self._batches]

    def read(self, group: int, columns: list[str]) -> Iterator[Any]:
        batch = self._batches[group].select(columns)
        for column in batch.columns:
            self._check_offsets(column)
        for start in range(0, len(batch), 64):
            yield batch.slice(start, 64)

    def _check_end(self) -> None:
        """A stream that was cut between two batches looks whole, and one behind another is not read."""
        size, at = self._map.size(), self._map.tell()
        if at != size:
            raise _damaged(self._path, f"another stream, or what is none, after {at:,} bytes")
        end = _MARK + _NO_MORE if self._map.read_at(4, 0) == _MARK else _NO_MORE
        if self._map.read_at(len(end), size - len(end)) != end:
            raise _damaged(self._path, "the stream has no end")

    def _check_offsets(self, column: Any) -> None:
        """Text is mapped and not read: offsets beyond its end would end the process."""
        types = self._pyarrow.types
        if types.is_string(column.type):  # as bytes, for which of them are text is asked row by row
            column = column.view(self._pyarrow.binary())
        elif types.is_large_string(column.type):
            column = column.view(self._pyarrow.large_binary())
        try:
            column.validate(full=True)
        except self._pyarrow.ArrowException as error:
            if types.is_binary(column.type) or types.is_large_binary(column.type):
                raise _damaged(self._path, error) from error

    def close(self) -> None:
        self._batches = []
        self._map.close()
