"""Opens compressed files, member after member."""

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.errors import UserError


def decompressed(path: Path, raw: BinaryIO) -> Any:
    """Return the file's content, whatever its compression."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".bz2":
        return bz2.open(raw)
    if path.suffix == ".xz":
        return lzma.open(raw)
    return io.BufferedReader(ZstdFile(raw)) if path.suffix == ".zst" else raw


_INPUT = 1 << 10
"""Bytes that are decompressed at a time: of a block of one letter four bytes become 128 KiB."""


class ZstdFile(io.RawIOBase):
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
            self._input = self._input or self._raw.read(_INPUT)
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
