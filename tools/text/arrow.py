"""Reads rows of Parquet and Arrow tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: .parquet and .arrow files need pyarrow: pip install pyarrow") from error
    return pyarrow


class ParquetTable:
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


class ArrowTable:
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
