"""The parts become the corpus, on rank 0, once every input is covered just once."""

import itertools
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from pretrain.data.writer import CorpusWriter
from pretrain.errors import UserError
from pretrain.files import write_whole
from tools.encode_corpus.duplicates import find_duplicates
from tools.encode_corpus.parts import (
    HASH,
    EncodeJob,
    EncodeTask,
    Part,
    check_extras,
    file_state,
    finished,
    input_name,
    job_tokenizer,
    part_name,
    refuse_changed,
    tally,
    tokenizer_record,
)
from tools.encode_corpus.rejected import collect_rejected, publish_rejected, said_rejected
from tools.shared import console
from tools.shared.corpus import summary
from tools.text.files import STDIN
from tools.text.readers import suspicions

JOINING = "joining"
"""The file in PREFIX.parts that says which command has begun to write the corpus."""


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


def assemble(
    tasks: Sequence[EncodeTask], job: EncodeJob, args: Namespace, files: Sequence[Path]
) -> dict[str, Any]:
    """Join the parts into corpora; return the report."""
    parts = list_parts(tasks, job)
    sides = job.sides[::-1]  # held out first: of two copies of a text the held-out one stays
    prefixes = [part.prefix + side for side in sides for part in parts]
    replace = args.overwrite or was_joining(args, Path(job.folder))
    rejected = collect_rejected(parts, args.output, replace)
    if not any(load_manifest(prefix).documents for prefix in prefixes):
        publish_rejected(args.output, rejected)
        for prefix in prefixes:
            corpus_file(prefix, "json").unlink()  # nothing to go on with
        told = f" but {said_rejected(rejected, args.output)}" if rejected else ""
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

    write_whole(Path(job.folder, JOINING), _command(args).encode())  # from here on files may be ours
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


def was_joining(args: Namespace, folder: Path) -> bool:
    """Tell whether this command has begun to write the corpus before."""
    note = folder / JOINING
    return note.is_file() and note.read_text(encoding="utf-8") == _command(args)


def _command(args: Namespace) -> str:
    """What was asked for, but for how: the same text for a command that may go on."""
    how = ("workers", "overwrite", "json")
    return json.dumps({name: value for name, value in vars(args).items() if name not in how})


def coverage(parts: Sequence[Part], files: Sequence[Path]) -> list[dict[str, int]]:
    """Return what was read of each input."""
    found = [{"modified_ns": file_state(file)[1], "end": 0, "read": 0, "rejected": 0} for file in files]
    for part in parts:
        entry = found[part.file]
        entry["end"] = part.end
        entry["read"] += part.read
        entry["rejected"] += part.rejected
    return found


def refuse_lost(output: str, kept: int, duplicates: int, rejected: int, read: int) -> None:
    """Raise UserError unless all that was read is kept, or counted as left out."""
    if kept + duplicates + rejected != read:
        raise UserError(
            f"{output}: {kept} documents, {duplicates} duplicates and {rejected} rejected lines are not "
            f"the {read} that were read; encode again"
        )


def count_literals(parts: Sequence[Part]) -> dict[str, int]:
    """Return how often the letters of each special piece stand in the text that was read."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(load_manifest(part.prefix).history["literals"])
    return dict(sorted(total.items()))


def find_suspicions(parts: Sequence[Part], names: Sequence[str]) -> list[str]:
    """Return what inputs may be instead of what they were read as, one line for each."""
    seen = [Counter[str]() for _ in names]
    for part in parts:
        seen[part.file].update(load_manifest(part.prefix).history.get("seen", {}))
    return [f"{name}: {text}" for name, each in zip(names, seen, strict=True) for text in suspicions(each)]


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
