"""``python -m tests.layouts``: resume from every layout in every other, and keep how far losses differ."""

import argparse
import json
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.layouts", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a layout (16: all of them)")
    help_ = "a line for each layout that loads; goes on where it was (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=RESULTS / "pairs.jsonl", metavar="FILE", help=help_)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from tests.layouts import matrix

    reasons = json.dumps(matrix.refused(), indent=1) + "\n"
    args.output.with_name("refused.json").write_text(reasons, encoding="utf-8")
    found = matrix.compare(matrix.allowed(args.ranks), args.output)
    bad = [each for each in found if max(each.first, each.second) > matrix.TOLERANCE]
    print(f"{len(found)} pairs, {len(bad)} above {matrix.TOLERANCE:g}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
