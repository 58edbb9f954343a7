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

import filecmp
import hashlib
import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from pretrain import __version__
from pretrain.data.indexed import IndexedReader, corpus_file
from pretrain.data.manifest import (
    APPENDED_END,
    InputFile,
    Manifest,
    Origin,
    Tally,
    add_tallies,
    load_manifest,
    read_sources,
)
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.writer import EXTENSIONS, CorpusWriter, refuse_existing, refuse_foreign, refuse_inputs
from pretrain.errors import UserError
from pretrain.files import named, parse_json, try_lock, write_whole
from tools.encode_corpus.duplicates import find_duplicates
from tools.encode_corpus.parts import (
    HASH,
    LOCK,
    EncodeJob,
    EncodeTask,
    check_extras,
    file_state,
    finished,
    input_name,
    job_tokenizer,
    part_name,
    refuse_changed,
    refuse_foreign_parts,
    remove_parts,
    stop_file,
    tally,
    tokenizer_record,
)
from tools.encode_corpus.workers import run_tasks
from tools.shared import console
from tools.shared.corpus import summary
from tools.text.files import STDIN, find_files, is_compressed, missing_parts, spool_stdin
from tools.text.readers import MAX_DOCUMENT_BYTES, Rejected, cut, suspicions
from tools.text.special import literal_ids

_PIECES = 256
"""Pieces that the whole input is cut into, within the bounds below: enough to keep workers even."""
_PIECE_BYTES = (1 << 20, 64 << 20)
_JOINING = "joining"
"""The file in PREFIX.parts that says which command has begun to write the corpus."""
THREADS = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS")
"""Of a process: the work is divided between processes, and each thread would keep a cache of its own."""
_EXPANSION = 3
"""Guessed size of compressed text, decompressed."""


# ---- who does what -------------------------------------------------------------------------------


class Ranks:
    """The processes that mpirun or srun started, or this one alone."""

    def __init__(self) -> None:
        names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        self.rank, self.size, self._world = 0, 1, None
        if tasks == 1 and not any(name in os.environ for name in names):
            return
        # MPICH over UCX publishes 4,096 bytes of a shorter address, the rest being what the heap held, and a
        # line of Slurm's PMI has room for 1,024 characters: where that is not mostly zeros, all ranks hang
        # (github.com/pmodels/mpich/issues/6924). What is sent here is short, so any network will do.
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        if tasks > 1 and self.size == 1:
            raise UserError(
                f"srun started {tasks} tasks that do not see each other; use srun --mpi=pmi2 (or pmix)"
            )

    def raise_on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Return every rank's result of `action`; its UserError, of the lowest rank that has one, everywhere.

        Only rank 0 has the words of it: all would print the same line. The others leave no sooner, for
        MPI_Finalize, when Python ends, waits for all.
        """
        result, message = None, None
        try:
            result = action()
        except UserError as error:
            message = str(error)
        except BaseException as error:
            if self._world and not _is_help(error):  # the others would wait for ever
                sys.excepthook(type(error), error, error.__traceback__)
                self._world.Abort(1)
            raise
        mine = (result, message)
        everyone = self._world.allgather(mine) if self._world else [mine]
        for _, problem in everyone:
            if problem is not None:
                raise UserError(problem if self.rank == 0 else "")
        return [answer for answer, _ in everyone]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result of `action`, on all ranks."""
        return self.raise_on_all_ranks(action if self.rank == 0 else lambda: None)[0]


def _is_help(error: BaseException) -> bool:
    """Whether this is the end after --help or --version, which every rank comes to."""
    return isinstance(error, SystemExit) and not error.code


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


# ---- the parts become the corpus -----------------------------------------------------------------


class Part(NamedTuple):
    """What there is of one piece."""

    prefix: str
    file: int
    lines: int
    read: int
    """Documents and rejected lines together."""
    rejected: int
    end: int
    """Offset in the file where the next part must begin."""


def list_parts(tasks: Sequence[EncodeTask], job: EncodeJob) -> list[Part]:
    """Return all parts in the order of their text; UserError unless they cover every input just once."""
    return [part for task in tasks if task.first == 0 for part in _parts_of_file(task, job)]


def _parts_of_file(task: EncodeTask, job: EncodeJob) -> Iterator[Part]:
    """Each part begins where the one before ended, and the last one saw the end of the file."""
    refuse_changed(task.path, task.state)
    at, last = 0, False
    for piece in itertools.count():
        if last:
            return
        name = part_name(job.folder, task.file, piece)
        manifest = finished(job, task, piece)
        if manifest is None or manifest.history["span"][0] != at:
            raise UserError(
                f"{name}: no part of {input_name(job, Path(task.path))} from offset {at} on; it was removed "
                "or damaged; give the same command again, which makes it anew"
            )
        check_extras(job, name)
        noted = manifest.history
        at, last = noted["span"][1], noted["last"]
        documents = sum(load_manifest(name + side).documents for side in job.sides)
        if documents + noted["rejected"] != noted["read"]:
            raise UserError(f"{name}: holds {documents} of {noted['read']} documents read; encode again")
        yield Part(name, task.file, noted["lines"], noted["read"], noted["rejected"], at)


def coverage(parts: Sequence[Part], files: Sequence[Path]) -> list[dict[str, int]]:
    """Return what was read of each input."""
    found = [{"modified_ns": file_state(file)[1], "end": 0, "read": 0, "rejected": 0} for file in files]
    for part in parts:
        entry = found[part.file]
        entry["end"] = part.end
        entry["read"] += part.read
        entry["rejected"] += part.rejected
    return found


def join_parts(
    parts: Sequence[Part], dropped: Iterator[Any], side: str, output: str, origin: Origin, advance: Any
) -> Manifest:
    """Return one corpus from the parts of its side, without the documents `dropped` of each part.

    UserError, and no manifest, where it has not as many documents as its history says.
    """
    text_bytes, sources = 0, dict[str, Tally]()
    dtype = np.dtype(load_manifest(parts[0].prefix).dtype)
    with CorpusWriter(output + side, dtype, overwrite=True) as writer:
        for part in parts:
            prefix, gone = part.prefix + side, next(dropped)
            manifest = load_manifest(prefix)
            writer.append_corpus(prefix, gone, advance)
            if len(gone):
                lost_tokens = int(IndexedReader(prefix).document_lengths[gone].sum())
                advance(lost_tokens * dtype.itemsize)  # passed over, not copied
            lost_bytes, lost = _lost(prefix, gone) if len(gone) else (0, {})
            text_bytes += (manifest.text_bytes or 0) - lost_bytes
            sources = add_tallies(sources, _renamed(writer, manifest.sources))
            sources = add_tallies(sources, _renamed(writer, lost), sign=-1)
        sources = {name: entry for name, entry in sources.items() if entry.documents}
        if writer.documents != (kept := origin.history["kept"]["here"]):
            raise UserError(
                f"{output}{side}: {writer.documents} documents, not the {kept} read; encode again"
            )
        return writer.finish(origin.model_copy(update={"text_bytes": text_bytes, "sources": sources}))


def _lost(prefix: str, gone: Any) -> tuple[int, dict[str, Tally]]:
    """Bytes of the dropped documents of a part, and what they were to their sources."""
    sizes = np.fromfile(f"{prefix}.hash", HASH)["bytes"][gone]
    names, codes = read_sources(prefix)
    return int(sizes.sum()), tally(names, codes[gone], IndexedReader(prefix).document_lengths[gone], sizes)


def _renamed(writer: CorpusWriter, sources: dict[str, Tally]) -> dict[str, Tally]:
    """By the names that the writer gives them: "other" for those beyond its limit."""
    total: dict[str, Tally] = {}
    for name, entry in sources.items():
        total = add_tallies(total, {writer.source_names[writer.source(name)]: entry})
    return total


def collect_rejected(parts: Sequence[Part], output: str, replace: bool) -> int:
    """Write the rejected lines of all parts beside PREFIX.rejected.jsonl, and return their number.

    UserError if there is another file of that name, unless it is such a file and to be replaced.
    """
    path, partial = _rejected_files(output)
    try:
        with named(path), partial.open("w", encoding="utf-8", errors="backslashreplace") as target:
            total = _copy_rejected(parts, target)
        refuse_foreign_rejected(output)
        if path.exists() and not replace and not filecmp.cmp(path, partial, shallow=False):
            raise UserError(f"{path}: exists already; choose another --output or add --overwrite")
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return total


def _copy_rejected(parts: Sequence[Part], target: TextIO) -> int:
    total, before, file = 0, 0, -1
    for part in parts:
        before = before if part.file == file else 0
        file = part.file
        if part.rejected:
            with open(f"{part.prefix}.rejected", encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    line["line"] += before
                    target.write(json.dumps(line, ensure_ascii=False) + "\n")
        before += part.lines
        total += part.rejected
    return total


def publish_rejected(output: str, total: int) -> None:
    """Give the rejected lines their name; where there are none there is no file."""
    path, partial = _rejected_files(output)
    path.unlink(missing_ok=True)  # of an earlier attempt
    partial.replace(path) if total else partial.unlink()


def _rejected_files(output: str) -> tuple[Path, Path]:
    return Path(f"{output}.rejected.jsonl"), Path(f"{output}.rejected.jsonl.partial")


def refuse_foreign_rejected(output: str) -> None:
    """Raise UserError where PREFIX.rejected.jsonl is not demonstrably a list of rejected lines."""
    path, _ = _rejected_files(output)
    if not os.path.lexists(path):
        return
    try:
        with path.open("rb") as file:
            first = parse_json(file.readline())
        ours = isinstance(first, dict) and tuple(first) == Rejected._fields
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{path}: exists and is no list of rejected lines; choose another --output")


def count_literals(parts: Sequence[Part]) -> dict[str, int]:
    """Return how often the letters of each special piece stand in the text that was read."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(load_manifest(part.prefix).history["literals"])
    return dict(sorted(total.items()))


def refuse_lost(output: str, kept: int, duplicates: int, rejected: int, read: int) -> None:
    """Raise UserError unless all that was read is kept, or counted as left out."""
    if kept + duplicates + rejected != read:
        raise UserError(
            f"{output}: {kept} documents, {duplicates} duplicates and {rejected} rejected lines are not "
            f"the {read} that were read; encode again"
        )


def find_suspicions(parts: Sequence[Part], names: Sequence[str]) -> list[str]:
    """Return what inputs may be instead of what they were read as, one line for each."""
    seen = [Counter[str]() for _ in names]
    for part in parts:
        seen[part.file].update(load_manifest(part.prefix).history.get("seen", {}))
    return [f"{name}: {text}" for name, each in zip(names, seen, strict=True) for text in suspicions(each)]


def assemble(
    tasks: Sequence[EncodeTask], job: EncodeJob, args: Namespace, files: Sequence[Path]
) -> dict[str, Any]:
    """Join the parts into corpora; return the report."""
    parts = list_parts(tasks, job)
    sides = job.sides[::-1]  # held out first: of two copies of a text the held-out one stays
    prefixes = [part.prefix + side for side in sides for part in parts]
    replace = args.overwrite or _was_joining(args, Path(job.folder))
    rejected = collect_rejected(parts, args.output, replace)
    if not any(load_manifest(prefix).documents for prefix in prefixes):
        publish_rejected(args.output, rejected)
        for prefix in prefixes:
            corpus_file(prefix, "json").unlink()  # nothing to go on with
        told = f" but {_rejected(rejected, args.output)}" if rejected else ""
        raise UserError(f"no documents in {args.input[0]}{told}; nothing to write")
    gone: list[int] = [0] * len(prefixes)
    dropped: Iterator[Any] = itertools.repeat(())
    if job.dedup:
        hashes = [Path(f"{prefix}.hash") for prefix in prefixes]
        gone, dropped = find_duplicates(hashes, HASH, Path(job.folder))
    duplicates = sum(gone)
    kept = dict.fromkeys(sides, 0)
    for (side, prefix), lost in zip(
        ((side, part.prefix + side) for side in sides for part in parts), gone, strict=True
    ):
        kept[side] += load_manifest(prefix).documents - lost
    refuse_lost(args.output, sum(kept.values()), duplicates, rejected, sum(part.read for part in parts))
    history = {"version": __version__, "holdout": args.holdout, "rejected": rejected}
    history |= {"duplicates": duplicates} if job.dedup else {}
    history["coverage"] = coverage(parts, files)
    literals = count_literals(parts)
    history |= {"literals": literals, "map_literal": job.map_literal} if literals or job.map_literal else {}
    names = [input_name(job, file) for file in files]
    if doubts := find_suspicions(parts, names):
        history["suspicions"] = doubts
        for text in doubts:
            print(f"warning: {text}", file=sys.stderr)
    inputs = [
        InputFile(path=name if name == STDIN else str(file.resolve()), bytes=file.stat().st_size)
        for name, file in zip(names, files, strict=True)
    ]
    tokenizer = job_tokenizer(job)
    record = tokenizer_record(job.tokenizer, tokenizer)
    if job.end is not None:
        history[APPENDED_END] = {"piece": tokenizer.piece(job.end), "id": job.end}

    def origin(side: str) -> Origin:
        about = {"kept": {"here": kept[side], "elsewhere": sum(kept.values()) - kept[side]}}
        return Origin(tokenizer=record, inputs=inputs, history=history | about)

    write_whole(Path(job.folder, _JOINING), _command(args).encode())  # from here on files may be ours
    publish_rejected(args.output, rejected)
    sizes = [corpus_file(prefix, "bin").stat().st_size for prefix in prefixes]
    with console.progress("join", sum(sizes)) as advance:
        manifests = {
            side: join_parts(parts, dropped, side, args.output, origin(side), advance) for side in sides
        }
    return {
        "corpora": [{"prefix": args.output + side} | summary(manifests[side]) for side in job.sides],
        "rejected": rejected,
        "duplicates": duplicates,
        "literals": literals,
        "map_literal": job.map_literal,
    }


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
    if not _was_joining(args, folder):
        (folder / _JOINING).unlink(missing_ok=True)  # what another command began is this one's now
    return lock


def _refuse_existing(args: Namespace, folder: Path) -> None:
    """The command that was joining its parts may finish that; nothing else is overwritten unasked."""
    refuse_foreign_parts(folder)
    refuse_foreign_rejected(args.output)
    remove_parts(_done_folder(folder))
    if not _was_joining(args, folder):
        for side in ("", "-valid") if args.holdout else ("",):
            (refuse_foreign if args.overwrite else refuse_existing)(args.output + side)


def _done_folder(folder: Path) -> Path:
    """Name of the folder of the parts while it is removed."""
    return folder.with_name(f"{folder.name}.done")


def _was_joining(args: Namespace, folder: Path) -> bool:
    """Whether this command has begun to write the corpus before."""
    note = folder / _JOINING
    return note.is_file() and note.read_text(encoding="utf-8") == _command(args)


def _command(args: Namespace) -> str:
    """What was asked for, but for how: the same text for a command that may go on."""
    how = ("workers", "overwrite", "json")
    return json.dumps({name: value for name, value in vars(args).items() if name not in how})


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
        print(_rejected(report["rejected"], output))
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


def _rejected(lines: int, output: str) -> str:
    return f"{lines:,} rejected {'line' if lines == 1 else 'lines'} in {output}.rejected.jsonl"


if __name__ == "__main__":
    for name in THREADS:  # not what a user has set
        os.environ.setdefault(name, "1")
    console.run(main)
