"""``python -m tests.faults --count N --seed S``: inject faults into real runs, judge how they end.

Each fault is a line of JSON in `--output`; a campaign that was stopped goes on there with its next run.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=30, help="faults to inject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these")
    parser.add_argument(
        "--mtbf", nargs="+", type=float, metavar="SECONDS", help="measure ETTR instead, by a scaled clock"
    )
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    if args.mtbf:
        from tests.faults.ettr import compare

        compare(args.mtbf, args.seed, args.output)
        return 0

    from tests.faults.campaign import campaign
    from tests.faults.kinds import KINDS

    kinds = args.kinds or KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; take of: {', '.join(KINDS)}")
    records = campaign(args.count, args.seed, args.output, kinds)
    told, bad = Counter(r.kind for r in records), [r for r in records if r.broken or not r.equal]
    for kind in KINDS:
        wrong = sum(record.kind == kind for record in bad)
        print(f"{kind:24} {told[kind]:6} {wrong or '':>6}")
    print(f"{len(records)} faults, {len(bad)} not as promised")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
