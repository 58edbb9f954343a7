"""What the papers argue with, measured on checkpoints: effective rank and gradient variance.

rank      of each layer's representations: MAE-LM's case for an encoder that never sees [MASK].
variance  of the gradient over masks of a text and over texts: the case for fully-explored masking.

Several runs come out as one table (CSV, JSON) and one figure (PNG) in the output folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config import method_of
from tools.analyze import rank as analyze_rank
from tools.analyze import variance as analyze_variance
from tools.shared import console, outputs
from tools.shared.run_model import default_device, held_out_corpus, load_model
from tools.shared.tables import table_files, write_table

FIELDS = dict.fromkeys(("run", "method", "checkpoint", "corpus"), "")
"""By which a table of this program is known."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("analyze", "Effective rank or gradient variance of checkpoints", reports=True)
    parser.add_argument("what", choices=("rank", "variance"))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; one table and figure for all")
    parser.add_argument(
        "--output",
        default="analysis",
        metavar="DIR",
        help="folder for the table and the figure (%(default)s)",
    )
    parser.add_argument("--corpus", metavar="PREFIX", help="encoded corpus (each run's corpus.valid)")
    console.add_checkpoint(parser)
    parser.add_argument(
        "--measure",
        choices=analyze_rank.MEASURES,
        metavar="NAME",
        default=analyze_rank.MEASURES[0],
        help=f"rank: what the figure shows, of {', '.join(analyze_rank.MEASURES)} (%(default)s); the table"
        " has all",
    )
    parser.add_argument(
        "--tokens",
        type=console.whole(1),
        default=5_000_000,
        metavar="N",
        help="rank: tokens read, at most (%(default)s)",
    )
    parser.add_argument(
        "--texts",
        type=console.whole(2),
        default=200,
        metavar="N",
        help="variance: texts read, at most (%(default)s)",
    )
    parser.add_argument(
        "--rate", type=console.share, help="variance: share of a text that is masked (each run's)"
    )
    parser.add_argument(
        "--views", type=console.whole(2), metavar="K", help="variance: masks of a text (1 / rate)"
    )
    args = parser.parse_args(arguments)
    console.refuse_twice(args.runs)
    picture = Path(args.output) / f"{args.what}.png"
    outputs.check([*table_files(Path(args.output), args.what), picture], fields=FIELDS)
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        rows += _measured(run, args)
    figure = analyze_rank.figure(rows, args.measure) if args.what == "rank" else analyze_variance.figure(rows)
    write_table(Path(args.output), args.what, rows, FIELDS)
    outputs.write(picture, figure)
    if args.json:
        console.print_json(rows)
    else:
        print(analyze_rank.text(rows, args.measure) if args.what == "rank" else analyze_variance.text(rows))
        print(f"{args.output}: {args.what}.csv, {args.what}.json, {args.what}.png")
    return 0


def _measured(run: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one run."""
    loaded = load_model(run, args.checkpoint)
    corpus = held_out_corpus(run, loaded.config, args.corpus)
    device = default_device()
    loaded.model.to(device)
    about = {
        "run": Path(run).absolute().name,
        "method": method_of(loaded.config),
        "checkpoint": loaded.state.step,
        "corpus": corpus,
    }
    if args.what == "rank":
        found = analyze_rank.measure(loaded, corpus, args.tokens, device)
    else:
        found = analyze_variance.measure(loaded, corpus, args.texts, args.rate, args.views, device)
    return [about | row for row in found]


if __name__ == "__main__":
    console.run(main)
