"""Which documents of a corpus repeat an earlier one, found in bounded memory.

Hashes are dealt into buckets by their first bits, a file each, so that all copies of a text meet in one
bucket, and one bucket at a time is sorted in memory: `BUCKET_BYTES` and a few times that for sorting,
however many documents there are (up to 700 million; then buckets grow). The verdicts, a byte for each
document, are in a mapped file.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.files import named

BUCKET_BYTES = 32 << 20
_MOST_BUCKETS = 512
_CHUNK = 1 << 18
_ENTRY = np.dtype([("key", "<u8", 2), ("number", "<i8")])


def find_duplicates(
    files: Sequence[Path], record: np.dtype[np.void], folder: Path
) -> tuple[list[int], Iterator[npt.NDArray[np.int64]]]:
    """Return for each file how many records repeat the 128-bit `key` of an earlier one, and which, ascending.

    Earlier in the order of the files. `folder` holds the buckets meanwhile.
    """
    counts = [file.stat().st_size // record.itemsize for file in files]
    total = sum(counts)
    buckets = [folder / f"bucket-{i:03d}" for i in range(_number_of_buckets(total))]
    with named(folder / "duplicates"):
        verdicts = _mapped(folder / "duplicates", max(1, total))
        _deal(files, record, buckets)
    for bucket in buckets:
        verdicts[_repeated(np.fromfile(bucket, _ENTRY))] = 1
        bucket.unlink()
    bounds = list(itertools.pairwise(np.cumsum([0, *counts]).tolist()))
    repeated = (np.flatnonzero(verdicts[a:b]) for a, b in bounds)
    return [int(verdicts[a:b].sum(dtype=np.int64)) for a, b in bounds], repeated


def _mapped(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Return a file of zeros in memory, its place on the disk taken: a full disk would kill later."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, np.uint8, "r+", shape=size)


def _number_of_buckets(total: int) -> int:
    wanted = max(1, -(-total * _ENTRY.itemsize // BUCKET_BYTES))
    return min(_MOST_BUCKETS, 1 << (wanted - 1).bit_length())


def _deal(files: Sequence[Path], record: np.dtype[np.void], buckets: Sequence[Path]) -> None:
    """Append (key, number of the document) to the bucket of the key."""
    number = 0
    for bucket in buckets:
        bucket.write_bytes(b"")
    for file in files:
        with file.open("rb") as source:
            while len(records := np.fromfile(source, record, _CHUNK)):
                entries = np.empty(len(records), _ENTRY)
                entries["key"] = records["key"]
                entries["number"] = number + np.arange(len(records))
                number += len(records)
                home = entries["key"][:, 0] % np.uint64(len(buckets))
                for i in np.unique(home).tolist():
                    with buckets[i].open("ab") as target:
                        target.write(entries[home == i].tobytes())


def _repeated(entries: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Numbers of the entries that are not the first of their key."""
    keys = entries["key"]
    order = np.lexsort((entries["number"], keys[:, 1], keys[:, 0]))
    same = np.all(keys[order][1:] == keys[order][:-1], axis=1)
    numbers: npt.NDArray[np.int64] = entries["number"][order][1:][same]
    return numbers
