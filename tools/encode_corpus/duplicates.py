"""Which documents of a corpus repeat an earlier one, found in bounded memory.

Hashes are dealt into buckets by their first bits, a file each, so that all copies of a text meet in one
bucket, and one bucket at a time is sorted in memory: `BUCKET_BYTES` and a few times that for sorting,
however many documents there are (up to 700 million; then buckets grow). The verdicts, a byte for each
document, are in a mapped file.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

BUCKET_BYTES = 32 << 20
_MOST_BUCKETS = 512
_CHUNK = 1 << 18
_ENTRY = np.dtype([("key", "<u8", 2), ("number", "<i8")])


def find_duplicates(
    files: Sequence[Path], record: np.dtype[np.void], folder: Path
) -> tuple[int, Iterator[npt.NDArray[np.int64]]]:
    """How many records repeat the 128-bit `key` of an earlier one; and for each file which, ascending.

    Earlier in the order of the files. `folder` holds the buckets meanwhile.
    """
    counts = [file.stat().st_size // record.itemsize for file in files]
    total = sum(counts)
    buckets = [folder / f"bucket-{i:03d}" for i in range(_number_of_buckets(total))]
    verdicts = np.memmap(folder / "duplicates", np.uint8, "w+", shape=max(1, total))
    _deal(files, record, buckets)
    for bucket in buckets:
        verdicts[_repeated(np.fromfile(bucket, _ENTRY))] = 1
        bucket.unlink()
    bounds = np.cumsum([0, *counts]).tolist()
    repeated = (np.flatnonzero(verdicts[a:b]) for a, b in itertools.pairwise(bounds))
    return int(verdicts.sum(dtype=np.int64)), repeated


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
                        entries[home == i].tofile(target)


def _repeated(entries: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Numbers of the entries that are not the first of their key."""
    keys = entries["key"]
    order = np.lexsort((entries["number"], keys[:, 1], keys[:, 0]))
    same = np.all(keys[order][1:] == keys[order][:-1], axis=1)
    numbers: npt.NDArray[np.int64] = entries["number"][order][1:][same]
    return numbers
