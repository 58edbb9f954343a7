"""Tensors in groups of a size that is worth a call."""

from collections.abc import Iterable, Iterator

from torch import Tensor

BUCKET = 25_000_000
"""Elements reduced at once (100 MB): enough for the full bandwidth, little for a buffer."""


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Runs of neighbours that reach `size` elements, the last one excepted."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
