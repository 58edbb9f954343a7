"""How a speed is measured: in turn with its peer, several times, in CPU seconds of this process.

A busy machine slows both sides of a round alike, so the ratio is taken within each round; the row shows
the median and the extremes of the rounds.

A young process gives freed memory back to the system at once, so that arrays of a megabyte are
paid for in page faults. One that has freed a large block, as any training process has, keeps it; both
sides are measured in that state.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain import provenance

_LARGE_BLOCK = 31 << 20
"""Bytes; glibc keeps what is smaller than the largest block freed so far, up to 32 MiB."""

SAME = "documents equal / compared"
"""Unit of a row that compares results, not speeds: `ours` of `peer` documents are equal."""

Done = Callable[[int], None]
"""Takes how many more measurements are made, of those that a subject's `count` announces."""

Side = Callable[[], Any]
"""Makes ready and returns the function that is timed: preparation, such as loading, is not."""


@dataclass(frozen=True)
class BenchmarkRow:
    """One speed beside its peer's."""

    name: str
    ours: float
    """Median."""
    peer: float | None
    """Median; None where the peer is not installed."""
    unit: str
    ratio: float | None
    """Median over rounds of ours / peer: above 1 we are faster (of memory and time: below 1 we need less)."""
    spread: list[float]
    """Smallest and largest ratio of a round."""
    runs: int
    device: str
    dtype: str
    versions: dict[str, str]
    commit: str | None
    flop_ratio: float | None = None
    """What `ratio` would be if time followed FLOPs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Shapes, threads and the like."""
    command: str = ""
    """That measured it."""


def compare(
    name: str,
    unit: str,
    amount: float,
    ours: Side,
    peer: Side,
    runs: int,
    packages: Sequence[str],
    dtype: str = "uint16",
) -> BenchmarkRow:
    """Return `amount` units done by each side, in turn, `runs` times: units a CPU second."""
    np.ones(_LARGE_BLOCK, np.uint8)
    speeds: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            speeds[i].append(amount / cpu_seconds((ours, peer)[i]))
    return row(name, unit, *speeds, packages, dtype)


def no_progress(count: int) -> None:
    """Watch nothing: a `Done` that nobody looks at."""


def cpu_seconds(side: Side) -> float:
    """Return the CPU time of the function that `side` returns."""
    work = side()
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def row(
    name: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    packages: Sequence[str],
    dtype: str = "uint16",
    device_name: str | None = None,
    flop_ratio: float | None = None,
    settings: dict[str, Any] | None = None,
) -> BenchmarkRow:
    """Return a row of measured rounds; `peer` may be empty. device_name: default: the processor."""
    ratios = [a / b for a, b in zip(ours, peer, strict=False)]
    return BenchmarkRow(
        name=name,
        ours=statistics.median(ours),
        peer=statistics.median(peer) if peer else None,
        unit=unit,
        ratio=statistics.median(ratios) if ratios else None,
        spread=[min(ratios), max(ratios)] if ratios else [],
        runs=len(ours),
        device=device_name or provenance.processor(),
        dtype=dtype,
        versions={"python": platform.python_version()} | {package: version(package) for package in packages},
        commit=provenance.code_revision(),
        flop_ratio=flop_ratio,
        settings=settings or {},
    )


def version(package: str) -> str:
    """Return the version of an installed distribution, "absent" otherwise."""
    return provenance.version(package) or "absent"
