"""Every speed we claim, side by side with its peer in one run: ``python -m tools.benchmark step``.

A subject is a module of its own (`tools.benchmark.step`) with `add_arguments(parser)`, `count(args)`,
the number of its measurements, and `rows(args, done)`, which tells `done` about each; how a row is measured
is in `tools.shared.measure`.

    corpus      tokenizers, masking, reading, merging
    step        whole updates beside Hugging Face, fairseq's way and Megatron; late methods beside `mlm`
    head        the loss over the vocabulary: time and peak memory
    attention   one attention layer beside Hugging Face's
    memory      peak memory of an update, by method and recomputation
    optimizer   the update of the parameters, Muon's and StableAdamW's beside AdamW's
    scaling     ranks: tensor parallel, data parallel, ZeRO beside one rank or the plain engine
    training    real runs: speed, what is waited for data, held-out loss

``gpu`` measures all that a GPU must show in a few minutes (`gpu`); ``table`` measures nothing: it writes the
tables of the pages from what was measured (`tables`).
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tools.benchmark import attention, corpus, gpu, head, memory, optimizer, scaling, step, tables, training
from tools.shared import console, outputs, typed_json
from tools.shared.measure import SAME, BenchmarkRow
from tools.shared.tables import aligned

SUBJECTS = {
    "corpus": corpus,
    "step": step,
    "head": head,
    "attention": attention,
    "memory": memory,
    "optimizer": optimizer,
    "scaling": scaling,
    "training": training,
}
OTHERS = {"gpu": gpu.main, "table": tables.main}
"""What measures nothing itself, with arguments of its own."""

FIELDS = dict.fromkeys(("name", "ours", "peer", "unit", "ratio", "spread"), "")
"""By which a document of this program is known."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in OTHERS:
        return OTHERS[words[0]](words[1:])
    args = arguments_of(words)
    if args.output:
        outputs.check([f"{args.output}.json", f"{args.output}.png"], fields=FIELDS)
    command = shlex.join(["python", "-m", "tools.benchmark", *words])
    rows = [replace(row, command=command) for row in _measured(args)]
    if args.output:
        _write(rows, args.output)
    if args.json:
        console.print_json(rows)
    else:
        print(_table(rows))
    return int(any(row.unit == SAME and row.ours != row.peer for row in rows))


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a subject, `words[0]`; UserError names one that it has not."""
    parser = console.parser("benchmark", "Measure our speeds beside our peers'", True)
    parser.add_argument(
        "subject",
        choices=[*SUBJECTS, *OTHERS],
        metavar="SUBJECT",
        help=f"what to measure, of {', '.join([*SUBJECTS, *OTHERS])}; `SUBJECT --help` for its options",
    )
    parser.add_argument(
        "--runs", type=console.whole(1), default=5, help="rounds; each measures both once (%(default)s)"
    )
    parser.add_argument(
        "--output", type=console.prefix, metavar="PREFIX", help="also write PREFIX.json and PREFIX.png"
    )
    subject = next((word for word in words if word in SUBJECTS), None)
    if subject:
        SUBJECTS[subject].add_arguments(parser)
    return parser.parse_args(words)


def _measured(args: argparse.Namespace) -> Iterator[BenchmarkRow]:
    """The subject's rows; each is told on standard error as soon as it is known."""
    subject = SUBJECTS[args.subject]
    with console.counter(f"benchmark {args.subject}", subject.count(args), "measurements") as done:
        for row in subject.rows(args, done):
            print(_line(row), file=sys.stderr, flush=True)
            yield row


def _write(rows: Sequence[BenchmarkRow], prefix: str) -> None:
    from tools.shared import plots

    outputs.write(f"{prefix}.json", typed_json.to_json(rows) + "\n", FIELDS)
    compared = [
        plots.Ratio(row.name, row.ratio, row.spread, not row.unit.endswith("/s"), row.flop_ratio)
        for row in rows
        if row.ratio is not None and row.unit != SAME
    ]
    if compared:
        with plots.theme("light"):
            drawn = plots.ratios(compared)
            outputs.write(f"{prefix}.png", plots.encode(drawn, "png"))


def _table(rows: Sequence[BenchmarkRow]) -> str:
    """What was measured, as columns."""
    table = [("measure", "ours", "peer", "unit", "ours / peer", "rounds", "FLOPs' ratio")]
    for row in rows:
        peer, ratio, rounds, expected = "", "", "", ""
        if row.ratio is not None:
            peer, ratio = _number(row, row.peer), f"{row.ratio:.3f}"
            rounds = f"{row.spread[0]:.3f} to {row.spread[1]:.3f}" if row.runs > 1 else "1"
            expected = "" if row.flop_ratio is None else f"{row.flop_ratio:.3f}"
        table.append((row.name, _number(row, row.ours), peer, row.unit, ratio, rounds, expected))
    return aligned(table)


def _number(row: BenchmarkRow, value: float | None) -> str:
    """Counts in full: one document in a million matters."""
    return f"{value:,.0f}" if row.unit == SAME else f"{value:,.4g}"


def _line(row: BenchmarkRow) -> str:
    if row.ratio is None:
        return f"{row.name}: {row.ours:,.4g} {row.unit}"
    expected = "" if row.flop_ratio is None else f", FLOPs {row.flop_ratio:.3f}"
    spread = f"{row.spread[0]:.3g} to {row.spread[1]:.3g}"
    return (
        f"{row.name}: {_number(row, row.ours)} against {_number(row, row.peer)} {row.unit}"
        f"  ratio {row.ratio:.3g} ({spread}{expected})"
    )


if __name__ == "__main__":
    console.run(main)
