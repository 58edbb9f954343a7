"""What a time limit or a choice looks like: types for the command line, and for cluster.env.

Each raises ArgumentTypeError, which says what was expected instead, as those of tools.shared.console.
"""

import math
import re
from argparse import ArgumentTypeError


def yes_or_no(text: str) -> str:
    if text in ("yes", "no"):
        return text
    raise ArgumentTypeError(f"{text!r} is neither yes nor no")


def time_limit(text: str) -> str:
    """Return a time limit that Slurm understands, as it is."""
    seconds(text)
    return text


def seconds(limit: str) -> float:
    """Return those of a time limit; as for Slurm, UNLIMITED and 0 are infinite."""
    if limit.upper() == "UNLIMITED":
        return math.inf
    found = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+(?::[0-9]+){0,2})", limit)
    if not found:
        raise ArgumentTypeError(
            f"{limit!r} is not a time limit: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"
        )
    days, parts = found[1], [int(part) for part in found[2].split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    total = 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))
    return total or math.inf
