"""Every speed we claim, side by side with its peer in one run: ``python -m tools.benchmark corpus``.

A subject is a module of its own (`tools.benchmark_corpus`) with `add_arguments(parser)` and
`rows(args)`; how a row is measured is in `tools.measure`.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict

from pretrain.config import UserError
from tools import console
from tools.measure import Row

SUBJECTS = ("corpus",)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = console.parser("benchmark", "Measure our speeds beside our peers'", True)
    parser.add_argument("subject", choices=SUBJECTS, help="what to measure")
    parser.add_argument("--runs", type=int, default=5, help="rounds; each measures both once (%(default)s)")
    subject = next((word for word in words if word in SUBJECTS), None)
    if subject:
        importlib.import_module(f"tools.benchmark_{subject}").add_arguments(parser)
    args = parser.parse_args(words)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: at least 1")
    rows: list[Row] = []
    for row in importlib.import_module(f"tools.benchmark_{args.subject}").rows(args):
        rows.append(row)
        print(_line(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        console.print_json([asdict(row) for row in rows])
    return 0


def _line(row: Row) -> str:
    peer = "absent" if row.peer is None else f"{row.peer:,.4g}"
    ratio = (
        "" if row.ratio is None else f"  ratio {row.ratio:.3g} ({row.spread[0]:.3g} to {row.spread[1]:.3g})"
    )
    return f"{row.name}: {row.ours:,.4g} against {peer} {row.unit}{ratio}"


if __name__ == "__main__":
    console.run(main)
