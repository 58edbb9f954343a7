"""``python -m tests.layouts``: resume from every layout in every other, and keep how far losses differ."""

import argparse
import os
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "layouts.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.layouts", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a layout (16: all of them)")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from tests.layouts import matrix

    layouts, found = matrix.allowed(args.ranks), []
    for difference in matrix.compare(layouts):
        found.append(difference)
        if len(found) % len(layouts) == 0:
            worst = max(max(each.first, each.second) for each in found[-len(layouts) :])
            print(f"{difference.target.name:32} from {len(layouts)}: {worst:.1e}", flush=True)
    matrix.write(args.output, matrix.document(args.ranks, found))
    bad = [each for each in found if max(each.first, each.second) > matrix.TOLERANCE]
    print(f"{len(found)} pairs, {len(bad)} above {matrix.TOLERANCE:g}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
