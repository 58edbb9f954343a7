"""``python -m tests.faults --count N --seed S``: inject faults into real runs, judge how they end.

Each fault is a line of JSON in `--output`; a campaign that was stopped goes on there with its next run.
"""

import argparse
import os
import sys
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
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the counts there")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    if args.mtbf:
        from tests.faults.ettr import compare

        compare(args.mtbf, args.seed, args.output)
        return 0

    from pretrain.errors import UserError
    from pretrain.files import json_text
    from tests.faults import kinds, queued
    from tests.faults.campaign import campaign, summary

    known = (*kinds.KINDS, *queued.KINDS)
    if unknown := set(args.kinds or ()) - set(known):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; take of: {', '.join(known)}")
    try:
        records = campaign(args.count, args.seed, args.output, args.kinds or known)
    except UserError as error:
        parser.error(str(error))
    bad = [record for record in records if record.broken or not record.equal]
    for record in bad:
        print(record)
    if args.summary:
        args.summary.write_text(json_text(summary(records)), encoding="utf-8")
    print(f"{len(records)} faults, {len(bad)} not as promised or of a run that did not end equal")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
