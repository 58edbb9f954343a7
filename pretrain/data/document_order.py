"""Where the documents of a corpus lie, and their order in an epoch, in little memory.

An order is two numbers a document: where it begins in the stream, and where in the file. Of many documents
(5.8 GB for C4's 365 million) no rank has them for itself: the first on a node writes them to a file, the
others wait, and all of them map it. Such files outlive the process, perhaps half-written. So one
begins with a seal, written last: a digest of the content, keyed with what it is the order of.
"""

import hashlib
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from pretrain.data import rng
from pretrain.data.indexed import CHUNK, IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.files import locked, named, own_folder

Int64 = npt.NDArray[np.int64]
Parts = Iterator[tuple[int, Int64]]
"""Stretches of a table, each with the number of its first element."""

MANY = 1_000_000
"""Documents from which on an order is in a file."""
_SEAL = hashlib.blake2b().digest_size
_ATTEMPTS = 2

log = logging.getLogger(__name__)


def scratch(copies: str | None) -> Path:
    """Return the folder of a node's orders: that of its copies of corpora, else one of the user's own."""
    return Path(copies) if copies else Path(tempfile.gettempdir()) / f"latemask-{os.getuid()}"


def order_bytes(documents: int) -> int:
    """Return the size of the file of an epoch's order; 0 where there are too few documents for one."""
    return _SEAL + 8 * (2 * documents + 1) if documents >= MANY else 0


class Documents:
    """The documents of a corpus that are not empty; their places stay in the mapped index."""

    def __init__(self, corpus: IndexedReader) -> None:
        self.corpus = corpus
        empty = _empty(corpus)
        self.count = corpus.num_documents - len(empty)
        # Before document number n of these there are as many empty ones as this has numbers up to n.
        self._empty = empty - np.arange(len(empty))

    def numbers(self, documents: Int64) -> Int64:
        """Return the numbers of these among all documents of the corpus."""
        if len(self._empty) == 0:
            return documents
        return documents + np.searchsorted(self._empty, documents, side="right")

    def places(self, documents: Int64) -> tuple[Int64, Int64]:
        """Return the first token in the file, and the length, of each of these."""
        numbers = self.numbers(documents)
        table, offsets = self.corpus.document_table, self.corpus.token_offsets
        firsts = offsets(table[numbers])
        return firsts, offsets(table[numbers + 1]) - firsts


def _empty(corpus: IndexedReader) -> Int64:
    """Return the numbers of the documents without a token."""
    found = [np.empty(0, np.int64)]
    for start in range(0, corpus.num_documents, CHUNK):
        bounds = corpus.token_offsets(corpus.document_table[start : start + CHUNK + 1])
        found.append(start + np.flatnonzero(np.diff(bounds) == 0))
    return np.concatenate(found)


class DocumentOrder:
    """The documents in the order of an epoch: the stream is that of their tokens, a </s> after each.

    keys: of the order, the last one the epoch's number. folder: of the file of many documents; where it
    cannot be used, a warning says so, and the process has the order for itself.
    """

    def __init__(self, documents: Documents, keys: tuple[int, ...], rules: rng.Rules, folder: Path) -> None:
        self._documents, self._keys, self._rules = documents, keys, rules
        table = self._mapped(folder) if documents.count >= MANY else self._computed()
        self._begins, self._firsts = np.split(table, [documents.count + 1])

    def documents(self, ranks: Int64) -> Int64:
        """Return the documents that are number `ranks` in the stream."""
        return rng.permute(ranks, self._documents.count, self._keys, self._rules)

    def locate(self, tokens: Int64) -> Int64:
        """Return the ranks of the documents at these places in the stream."""
        return np.searchsorted(self._begins, tokens, side="right") - 1

    def places(self, ranks: Int64) -> tuple[Int64, Int64, Int64]:
        """Return where the documents begin in the stream, where in the file, and their lengths."""
        begins = self._begins[ranks]
        return begins, self._firsts[ranks], self._begins[ranks + 1] - begins - 1

    def _parts(self) -> Parts:
        """Yield where documents begin in the stream, and where it ends; then where they begin in the file."""
        count, total = self._documents.count, 0
        yield 0, np.zeros(1, np.int64)
        for start in range(0, count, CHUNK):
            ranks = np.arange(start, min(start + CHUNK, count))
            firsts, lengths = self._documents.places(self.documents(ranks))
            ends = total + np.cumsum(lengths + 1)
            total = int(ends[-1])
            yield start + 1, ends
            yield count + 1 + start, firsts

    def _computed(self) -> Int64:
        table = np.empty(2 * self._documents.count + 1, np.int64)
        for first, part in self._parts():
            table[first : first + len(part)] = part
        return table

    def _mapped(self, folder: Path) -> Int64:
        size = order_bytes(self._documents.count)
        try:
            fingerprint = load_manifest(self._documents.corpus.prefix).fingerprint
            key = hashlib.blake2b(f"{fingerprint} {self._keys} {self._rules}".encode()).digest()
            *kind, epoch = self._keys
            stem = "-".join(map(str, (fingerprint[:16], self._rules, *kind)))
            table = _map_table(own_folder(folder) / f"{stem}-{epoch}.order", size, key, self._parts)
            _remove_before(folder, stem, epoch - 1)
            return table
        except (UserError, OSError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            log.warning(
                "warning: %s; so each process has the order of %s documents for itself, %.2g GB; set"
                " corpus.copies to a folder of your own with room",
                reason,
                f"{self._documents.count:,}",
                size / 1e9,
            )
            return self._computed()


def _map_table(path: Path, size: int, key: bytes, parts: Callable[[], Parts]) -> Int64:
    """Return the table in the file, which is written where it is not there whole; an error names the file."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        written = False
        with os.fdopen(descriptor, "r+b") as file, named(path), locked(file, path):
            if file.read(_SEAL).strip(b"\0") == b"" or os.fstat(file.fileno()).st_size != size:
                try:
                    _write_table(file, size, key, parts())
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
                written = True
                log.info("order       of the documents of an epoch: %s, %.1f GB", path, size / 1e9)
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        # After the lock: all ranks look at once, but for the one that has just sealed it.
        if written or content[:_SEAL] == _seal(content, key):
            return np.frombuffer(content, np.int64, offset=_SEAL)
        path.unlink(missing_ok=True)  # who has mapped it keeps it
    raise UserError(f"{path}: not read as it was written")


def _write_table(file: IO[bytes], size: int, key: bytes, parts: Parts) -> None:
    """Write the parts, and when they are on disk, the seal.

    Who writes the same at the same time, where there are no locks, does no harm.
    """
    file.truncate(size)
    for first, part in parts:
        file.seek(_SEAL + part.itemsize * first)
        file.write(part.data)
    file.flush()
    os.fsync(file.fileno())
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
        seal = _seal(content, key)
    file.seek(0)
    file.write(seal)
    file.flush()
    os.fsync(file.fileno())


def _seal(content: mmap.mmap, key: bytes) -> bytes:
    return hashlib.blake2b(memoryview(content)[_SEAL:], key=key).digest()


def _remove_before(folder: Path, stem: str, epoch: int) -> None:
    """Remove the orders of epochs that are over."""
    for path in folder.glob(f"{stem}-*.order"):
        number = re.fullmatch(rf"{stem}-(\d+)\.order", path.name)
        if number and int(number[1]) < epoch:
            path.unlink(missing_ok=True)
