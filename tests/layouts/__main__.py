"""``python -m tests.layouts``: resume from every layout in every other, and keep how far losses differ."""

import argparse
import os
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "pairs.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.layouts", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a layout (16: all of them)")
    help_ = "a line for each layout that loads; goes on where it was (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE", help=help_)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from tests.layouts import matrix

    found = matrix.compare(matrix.allowed(args.ranks), args.output)
    bad = [each for each in found if max(each.first, each.second) > matrix.TOLERANCE]
    print(f"{len(found)} pairs, {len(bad)} above {matrix.TOLERANCE:g}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
