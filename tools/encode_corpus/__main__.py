"""Encode raw text into a Megatron indexed dataset, on any number of processes.

Reads .jsonl, .txt, .parquet and .arrow files, plain or compressed, and writes PREFIX.bin, PREFIX.idx and
the manifest PREFIX.json. The result depends on the text and the tokenizer only, not on the number of
workers or ranks::

    python -m tools.encode_corpus --input text/ --tokenizer T --output data/train --workers 16
    mpirun -n 64 python -m tools.encode_corpus --input text/ --tokenizer T --output data/train

The one idea: files are cut into pieces, each piece becomes a part in PREFIX.parts (`parts.py`),
and rank 0 joins the parts. A job that was killed, at any time and in any way, finds its parts again: the
same command goes on where it was. Memory does not grow with the corpus; the parts need as much disk as
the result.
"""

import hashlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.writer import EXTENSIONS, refuse_existing, refuse_foreign, refuse_inputs
from pretrain.errors import UserError
from pretrain.files import try_lock
from tools.encode_corpus.join import JOINING, assemble, was_joining
from tools.encode_corpus.parts import (
    LOCK,
    EncodeJob,
    EncodeTask,
    file_state,
    refuse_foreign_parts,
    remove_parts,
    stop_file,
)
from tools.encode_corpus.ranks import Ranks
from tools.encode_corpus.rejected import refuse_foreign_rejected, said_rejected
from tools.encode_corpus.workers import run_tasks
from tools.shared import console
from tools.text.files import find_files, is_compressed, missing_parts, spool_stdin
from tools.text.readers import MAX_DOCUMENT_BYTES, cut
from tools.text.special import literal_ids

_PIECES = 256
"""Pieces that the whole input is cut into, within the bounds below: enough to keep workers even."""
_PIECE_BYTES = (1 << 20, 64 << 20)
THREADS = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS")
"""Of a process: the work is divided between processes, and each thread would keep a cache of its own."""
_EXPANSION = 3
"""Guessed size of compressed text, decompressed."""


# ---- who does what -------------------------------------------------------------------------------


def plan(files: Sequence[Path], txt_document: Any, workers: int) -> list[EncodeTask]:
    """Return all tasks, in an order in which they can be dealt out to `workers` processes in turn.

    Pieces depend on the input only. A compressed file is one task, or where there are fewer of them
    than workers several tasks that read it side by side.
    """
    text = sum(file.stat().st_size * (_EXPANSION if is_compressed(file) else 1) for file in files)
    low, high = _PIECE_BYTES
    piece_bytes = min(high, max(low, 1 << (text // _PIECES).bit_length()))
    compressed = sum(map(is_compressed, files))
    tasks = []
    for i, file in enumerate(files):
        state = file_state(file)
        step, pieces = cut(file, txt_document, piece_bytes)
        pieces = pieces if pieces is None else max(1, pieces)  # of an empty file too there is a part
        shares = -(-workers // compressed) if pieces is None else pieces
        tasks += [EncodeTask(i, str(file), step, pieces, first, shares, state) for first in range(shares)]
    return tasks


# ---- the program ---------------------------------------------------------------------------------


def encode(args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """Do the work of the command line; the report (on rank 0)."""
    started = time.monotonic()
    workers = args.workers or (1 if ranks.size > 1 else console.available_cores())
    folder = Path(f"{args.output}.parts")
    with _workplace(folder, args, ranks):
        files, job, tasks = ranks.on_first(lambda: _prepare(args, folder, workers * ranks.size))
        mine = tasks[ranks.rank :: ranks.size]
        total = sum(file.stat().st_size for file in files)

        def work() -> None:
            share = total * len(mine) // max(1, len(tasks))
            with console.progress("encode", share, quiet=ranks.rank > 0) as advance:
                run_tasks(mine, job, workers, advance)

        ranks.raise_on_all_ranks(work)
        report = ranks.on_first(lambda: assemble(tasks, job, args, files))
    seconds = time.monotonic() - started
    text_bytes = sum(corpus["text_bytes"] for corpus in report["corpora"])
    if ranks.rank > 0:
        return {}
    return report | {"seconds": seconds, "megabytes_per_second": text_bytes / 1e6 / seconds}


@contextmanager
def _workplace(folder: Path, args: Namespace, ranks: Ranks) -> Iterator[None]:
    """The folder of the parts, for one job at a time; gone when all is done, kept to go on later."""
    held: list[TextIO] = []
    ranks.on_first(lambda: held.append(_claim(folder, args)))
    if ranks.rank > 0:
        yield
        return
    try:
        yield
        done = _done_folder(folder)  # from here on the job is over
        folder.rename(done)
        remove_parts(done)
    finally:
        if folder.exists() and not any(folder.glob("*.json")):
            remove_parts(folder)
        held[0].close()


def _claim(folder: Path, args: Namespace) -> TextIO:
    """Make the folder and lock it for as long as this process lives; the open lock."""
    _refuse_existing(args, folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w", encoding="utf-8")
    if not try_lock(lock, folder):
        raise UserError(f"{folder}: another encode_corpus is at work there; wait for it")
    if not was_joining(args, folder):
        (folder / JOINING).unlink(missing_ok=True)  # what another command began is this one's now
    return lock


def _refuse_existing(args: Namespace, folder: Path) -> None:
    """The command that was joining its parts may finish that; nothing else is overwritten unasked."""
    refuse_foreign_parts(folder)
    refuse_foreign_rejected(args.output)
    remove_parts(_done_folder(folder))
    if not was_joining(args, folder):
        for side in ("", "-valid") if args.holdout else ("",):
            (refuse_foreign if args.overwrite else refuse_existing)(args.output + side)


def _done_folder(folder: Path) -> Path:
    """Name of the folder of the parts while it is removed."""
    return folder.with_name(f"{folder.name}.done")


def _prepare(args: Namespace, folder: Path, workers: int) -> tuple[list[Path], EncodeJob, list[EncodeTask]]:
    files = find_files(spool_stdin(args.input, args.stdin, folder))
    for line in missing_parts(files):
        print(f"warning: {line}", file=sys.stderr)
    outputs = [Path(f"{args.output}{side}.{end}") for side in ("", "-valid") for end in EXTENSIONS]
    refuse_inputs([*outputs, Path(f"{args.output}.rejected.jsonl")], files)
    tokenizer = load_tokenizer(args.tokenizer, need_specials=False)
    literal_ids(tokenizer, args.map_literal)  # before the work
    job = EncodeJob(
        folder=str(folder),
        tokenizer=args.tokenizer,
        tokenizer_hash=tokenizer.hash,
        text_key=args.text_key,
        txt_document=args.txt_document,
        max_bytes=args.max_document_bytes,
        holdout=args.holdout,
        dedup=args.dedup,
        keep_going=args.keep_going,
        stdin_hash="".join(_digest(file) for file in files if file.parent == folder),
        map_literal=args.map_literal,
        end=None if args.append_eod is None else tokenizer.end_of_document(args.append_eod)[1],
    )
    stop_file(job).unlink(missing_ok=True)
    return files, job, plan(files, args.txt_document, workers)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def arguments(words: Sequence[str] | None = None) -> Namespace:
    """Return the command line, checked."""
    parser = console.parser("encode_corpus", "Encode raw text into PREFIX.bin, .idx, .json", True)
    console.add_input(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="folder with a tokenizer.model or tokenizer.json, or such a file",
    )
    console.add_output_prefix(parser)
    parser.add_argument(
        "--workers",
        type=console.whole(1),
        help="processes (default: the cores this job may use; under mpirun or srun 1 a rank)",
    )
    console.add_document_limit(parser, MAX_DOCUMENT_BYTES)
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the documents that goes to PREFIX-valid instead (by a hash of the text)",
    )
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="keep one of several documents that differ in white space and letter case at most",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="set unreadable lines aside in PREFIX.rejected.jsonl instead of stopping at the first",
    )
    parser.add_argument(
        "--map-literal",
        action="append",
        default=[],
        metavar="TEXT[=PIECE]",
        help="these letters in a text become the special piece of this spelling (or PIECE) instead of text; "
        "may be given again",
    )
    parser.add_argument(
        "--append-eod",
        nargs="?",
        const="",
        metavar="PIECE",
        help="put the end-of-document piece (</s>, <|endoftext|>, ... or PIECE) after each document, for "
        "Megatron's own training; pretrain refuses such a corpus",
    )
    args = parser.parse_args(words)
    if not 0 <= args.holdout < 1:
        raise UserError(f"--holdout {args.holdout}: a share of the documents, from 0 to below 1")
    return args


def main(words: Sequence[str] | None = None) -> int:
    ranks = Ranks()
    args = ranks.raise_on_all_ranks(lambda: arguments(words))[ranks.rank]
    report = encode(args, ranks)
    if report and args.json:
        console.print_json(report)
    elif report:
        _show(report, args.output)
    return 0


def _show(report: dict[str, Any], output: str) -> None:
    for corpus in report["corpora"]:
        print(
            f"{corpus['prefix']}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens "
            f"({corpus['dtype']}) from {corpus['text_bytes'] / 1e6:,.2f} MB of text"
        )
    if report["duplicates"]:
        print(f"{report['duplicates']:,} duplicates left out")
    if report["rejected"]:
        print(said_rejected(report["rejected"], output))
    for line in describe_literals(report["literals"], report["map_literal"]):
        print(line)
    print(f"{report['seconds']:.1f} s, {report['megabytes_per_second']:.1f} MB of text a second")


def describe_literals(literals: dict[str, int], mapped: Sequence[str]) -> list[str]:
    """Return the lines that say what became of text that looks like a special piece; none where there was
    none."""
    known = {
        argument if argument in literals else argument.rpartition("=")[0] or argument for argument in mapped
    }
    made = {name: literals.get(name, 0) for name in sorted(known)}
    kept = {name: count for name, count in literals.items() if name not in known}
    lines = []
    if kept:
        told = ", ".join(f"{name} {count:,}" for name, count in list(kept.items())[:8])
        lines.append(f"letters of special pieces, encoded as text: {told} times (see --map-literal)")
    if made:
        told = ", ".join(f"{name} {count:,}" for name, count in made.items())
        lines.append(f"letters of special pieces, mapped to their ids: {told} times")
    return lines


if __name__ == "__main__":
    for name in THREADS:  # not what a user has set
        os.environ.setdefault(name, "1")
    console.run(main)
