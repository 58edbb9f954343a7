"""When this process began, what time it is, and how much memory it has held.

Imports no torch.
"""

import os
import resource
import sys
import time
from pathlib import Path

_EPOCH = time.time() - time.monotonic()


def now() -> float:
    """Return the Unix time in seconds that never steps back, whatever is done to the system's clock."""
    return _EPOCH + time.monotonic()


_IMPORTED = now()


def process_start() -> float:
    """Return the Unix time at which this process started; without /proc, at which this module was
    imported."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")  # the name is any bytes
        fields = text.rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5): clock ticks after boot
        return now() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return _IMPORTED


def peak_resident() -> int:
    """Return the bytes of the host's memory that this process has held at its fullest.

    Not by `getrusage`, where /proc exists: a process's own count begins there with its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # a /proc without it is no full Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
