"""The work of `tools.encode_corpus` that any process can do: pieces of input files in, parts out.

A part is a small corpus of its own, PREFIX.parts/FFFFF-PPPPPP, of piece P of file F. Its manifest, written
last, says which piece of which version of which file it holds and how it was encoded, so that an
interrupted job finds out by itself what is done. Put end to end the parts are the corpus, whoever wrote
them.

Memory: a block of 4 MiB of text with its documents and ids at a time, or one document of at most
`max_bytes`, and the bounded caches of the tokenizer.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from pretrain import __version__
from pretrain.data.indexed import NO_SOURCE, corpus_file, token_dtype
from pretrain.data.manifest import Manifest, Origin, Tally, TokenizerRecord, add_tallies, load_manifest
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.data.verify import verify
from pretrain.data.writer import CorpusWriter
from pretrain.errors import UserError
from pretrain.files import named
from tools.text.files import STDIN, Unit
from tools.text.readers import Document, Reader, Rejected, open_reader
from tools.text.special import SpecialText, literal_ids

HASH = np.dtype([("key", "<u8", 2), ("bytes", "<u4")])
"""What is kept of each document when duplicates are looked for, in PART.hash."""


@dataclass(frozen=True)
class EncodeJob:
    """What a process needs to know; everything but the folder shapes the output."""

    folder: str
    tokenizer: str
    tokenizer_hash: str
    text_key: str
    txt_document: Unit
    max_bytes: int
    holdout: float
    dedup: bool
    keep_going: bool
    stdin_hash: str = ""
    """Of the standard input, where that is an input."""
    map_literal: list[str] = field(default_factory=list)
    """What --map-literal was given."""
    end: int | None = None
    """Id put after each document."""

    @property
    def sides(self) -> tuple[str, ...]:
        """What is added to the name of a part or corpus: nothing for training, and "-valid"."""
        return ("", "-valid") if self.holdout else ("",)


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


class EncodeTask(NamedTuple):
    """Pieces first, first + stride, ... of a file."""

    file: int
    """Its place among the inputs."""
    path: str
    step: int
    """Offsets that a piece spans."""
    pieces: int | None
    """Of the file; None: until it ends."""
    first: int
    stride: int
    state: tuple[int, int]
    """Size and time stamp of the file when the work was dealt out."""


def part_name(folder: str, file: int, piece: int) -> str:
    """Return the prefix of the training part of a piece."""
    return f"{folder}/{file:05d}-{piece:06d}"


LOCK = "lock"
"""The file that is made first in a folder of parts, and removed last: without it the folder is not ours."""
_NAMES = re.compile(
    rf"\.?({LOCK}|joining|stop|duplicates|bucket-[0-9]+|stdin\.(jsonl|txt)"
    r"|[0-9]{5,}-[0-9]{6,}(-valid)?\.(rejected|hash|json|idx|bin|src|lengths|table))(\.partial)?"
)


def refuse_foreign_parts(folder: Path) -> None:
    """Raise UserError where a folder of this name has anything that no job writes into its parts."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(
            f"{folder}: exists and is no folder of parts; move it away, or choose another --output"
        )
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not _NAMES.fullmatch(name) or not (folder / name).is_file()]
    if foreign or (names and LOCK not in names):
        what = (
            f"has {foreign[0]}, which is no part" if foreign else f"has no {LOCK}: it is no folder of parts"
        )
        raise UserError(f"{folder}: {what}; move it away, or choose another --output")


def remove_parts(folder: Path) -> None:
    """Remove a folder of parts, the lock last; UserError, and nothing removed, where it is not ours."""
    refuse_foreign_parts(folder)
    if folder.exists():
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            path.unlink()
        folder.rmdir()


def input_name(job: EncodeJob, file: Path) -> str:
    """Return what the user calls an input: the copy of the standard input goes with the folder of the
    parts."""
    return STDIN if file.parent == Path(job.folder) else str(file)


def identity(job: EncodeJob, task: EncodeTask, piece: int) -> dict[str, Any]:
    """Return what a part must have been made from."""
    size, modified = task.state
    place = ("folder", "tokenizer", "stdin_hash")
    options = {key: value for key, value in asdict(job).items() if key not in place}
    name = input_name(job, Path(task.path))
    return {
        "file": [name, size, job.stdin_hash if name == STDIN else modified],
        "piece": [piece, task.step],
        "options": options,
        "version": __version__,
    }


def file_state(path: str | Path) -> tuple[int, int]:
    """Return size and time stamp."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def refuse_changed(path: str | Path, state: tuple[int, int]) -> None:
    """Raise UserError where an input is no longer the file that the work was dealt out for."""
    if not os.path.exists(path) or file_state(path) != state:
        raise UserError(
            f"{path}: was changed or removed while it was read; give the same command again when it rests"
        )


def finished(job: EncodeJob, task: EncodeTask, piece: int) -> Manifest | None:
    """Return the manifest of a part, if it is there and of this piece as it is now."""
    try:
        manifest = load_manifest(part_name(job.folder, task.file, piece))
    except UserError:
        return None
    noted = manifest.history
    return manifest if noted.get("identity") == identity(job, task, piece) and "span" in noted else None


def stop_file(job: EncodeJob) -> Path:
    """Return the file whose presence tells all processes that one of them has failed."""
    return Path(job.folder, "stop")


def job_tokenizer(job: EncodeJob) -> Tokenizer:
    """Return the tokenizer that the job began with; UserError if another one has taken its place."""
    tokenizer = load_tokenizer(job.tokenizer, need_specials=False)
    if tokenizer.hash != job.tokenizer_hash:
        raise UserError(f"{job.tokenizer}: was changed while it was used; start again")
    return tokenizer


class PartEncoder:
    """Task -> parts; one in each process."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.tokenizer = job_tokenizer(job)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.record = tokenizer_record(job.tokenizer, self.tokenizer)
        self.text = SpecialText(self.tokenizer, literal_ids(self.tokenizer, job.map_literal), job.end)

    def __call__(self, task: EncodeTask, advance: Callable[[int], None]) -> None:
        """Write the parts that are not there yet; `advance` is told the bytes read from the disk."""
        job = self.job
        numbers = itertools.count() if task.pieces is None else range(task.pieces)
        with open_reader(Path(task.path), job.txt_document, job.text_key, job.max_bytes) as reader:
            for piece in itertools.islice(numbers, task.first, None, task.stride):
                if stop_file(job).exists():
                    return
                done = finished(job, task, piece)
                if done and self._is_good(part_name(job.folder, task.file, piece)):
                    advance(done.history["disk_bytes"])
                elif reader.seek(piece * task.step) or piece == 0:
                    self._write(task, piece, reader, advance)
                else:
                    return

    def _is_good(self, part: str) -> bool:
        """A part of an earlier attempt may have lost bytes if the machine went down."""
        try:
            for side in self.job.sides:
                verify(part + side)
            check_extras(self.job, part)
        except UserError:
            return False
        return True

    def _write(self, task: EncodeTask, piece: int, reader: Reader, advance: Callable[[int], None]) -> None:
        part = part_name(self.job.folder, task.file, piece)
        try:
            with named(part):
                self._write_part(part, task, piece, reader, advance)
        finally:
            if not corpus_file(part, "json").exists():  # it failed, or another process did
                for path in Path(self.job.folder).glob(f"{Path(part).name}*"):
                    path.unlink()

    def _write_part(
        self, part: str, task: EncodeTask, piece: int, reader: Reader, advance: Callable[[int], None]
    ) -> None:
        corpus_file(part, "json").unlink(missing_ok=True)  # of what is damaged, or of another text
        counts = {"lines": 0, "read": 0, "rejected": 0, "disk_bytes": 0}
        began = reader.at
        self.text.counts.clear()
        reader.seen.clear()
        with ExitStack() as stack:
            sides = [_Side(part + side, self, stack) for side in self.job.sides]
            lines = Path(f"{part}.rejected")
            rejected = stack.enter_context(lines.open("w", encoding="utf-8", errors="backslashreplace"))
            for batch in reader.read((piece + 1) * task.step):
                groups: list[list[Document]] = [[] for _ in sides]
                for item in batch.items:
                    if isinstance(item, Document):
                        groups[held_out(item.utf8, self.job.holdout)].append(item)
                    else:
                        self._reject(item, reader, rejected)
                        counts["rejected"] += 1
                for side, documents in zip(sides, groups, strict=True):
                    side.append(documents)
                if stop_file(self.job).exists():
                    return
                counts["lines"] += batch.lines
                counts["read"] += len(batch.items)
                counts["disk_bytes"] += batch.disk_bytes
                advance(batch.disk_bytes)
            rejected.close()
            span = {"span": [began, reader.at], "last": not reader.seek(reader.at)}
            refuse_changed(task.path, task.state)
            for side in reversed(sides):  # the training part last: it says that all is there
                about = {"identity": identity(self.job, task, piece), "literals": dict(self.text.counts)}
                side.finish(about | counts | span | {"seen": dict(reader.seen)})

    def _reject(self, item: Rejected, reader: Reader, file: TextIO) -> None:
        item = item._replace(path=input_name(self.job, reader.path))
        if not self.job.keep_going:
            here = item._replace(line=reader.lines_before() + item.line)
            raise UserError(f"{here}; correct it, or add --keep-going to set such lines aside")
        file.write(json.dumps(item._asdict(), ensure_ascii=False) + "\n")


_AGAIN = "it was removed or damaged; give the same command again, which makes it anew"


def check_extras(job: EncodeJob, part: str) -> None:
    """Raise UserError unless what lies beside a part has all of its rejected lines and hashes."""
    expected, path = load_manifest(part).history["rejected"], Path(f"{part}.rejected")
    if not path.is_file() or path.read_bytes().count(b"\n") != expected:
        raise UserError(f"{part}.rejected: {expected} lines are not there; {_AGAIN}")
    for side in job.sides if job.dedup else ():
        path, documents = Path(f"{part}{side}.hash"), load_manifest(part + side).documents
        if not path.is_file() or path.stat().st_size != documents * HASH.itemsize:
            raise UserError(f"{path}: hashes of {documents} documents are not there; {_AGAIN}")


class _Side:
    """The training or the held-out part of a piece, while it is written."""

    def __init__(self, prefix: str, encoder: PartEncoder, stack: ExitStack) -> None:
        self.encoder = encoder
        self.writer = stack.enter_context(CorpusWriter(prefix, encoder.dtype, overwrite=True, durable=False))
        hashes = Path(f"{prefix}.hash")
        self.hashes = stack.enter_context(hashes.open("wb")) if encoder.job.dedup else None
        self.text_bytes = 0
        self.tallies: dict[str, Tally] = {}

    def append(self, documents: list[Document]) -> None:
        if not documents:
            return
        tokens, lengths = self.encoder.text.encode_flat([document.text for document in documents])
        sizes = np.array([len(document.utf8) for document in documents])
        names = [document.source and document.source.partition("/")[0] for document in documents]
        codes = np.array([NO_SOURCE if name is None else self.writer.source(name) for name in names])
        self.writer.append_documents(tokens, lengths, codes)
        self.text_bytes += int(sizes.sum())
        self.tallies = add_tallies(self.tallies, tally(self.writer.source_names, codes, lengths, sizes))
        if self.hashes:
            hashes = np.array([(text_hash(d.text), len(d.utf8)) for d in documents], HASH)
            self.hashes.write(hashes.tobytes())

    def finish(self, history: dict[str, Any]) -> None:
        if self.hashes:
            self.hashes.close()
        self.writer.finish(
            Origin(
                tokenizer=self.encoder.record,
                text_bytes=self.text_bytes,
                sources=self.tallies,
                history=history,
            )
        )


def held_out(utf8: bytes, share: float) -> bool:
    """Return whether a document belongs to the held-out corpus: a hash of its text falls below `share`.

    So the split survives any reordering of the input, and copies of a text stay on one side.
    """
    if not share:
        return False
    key = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")
    return key < share * 2**64


def text_hash(text: str) -> tuple[int, int]:
    """Return a hash that is equal for texts that differ in white space and letter case only (128 bits).

    No Unicode form is applied: NFKC would make x2 of x with a raised 2.
    """
    normal = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normal.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def tally(
    names: Sequence[str],
    codes: npt.NDArray[np.integer[Any]],
    lengths: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.integer[Any]],
) -> dict[str, Tally]:
    """Return what each source contributed: codes, tokens and bytes per document [n]."""
    return {
        names[code]: Tally(
            documents=int(np.count_nonzero(mine := codes == code)),
            tokens=int(lengths[mine].sum()),
            text_bytes=int(sizes[mine].sum()),
        )
        for code in np.unique(codes[codes != NO_SOURCE]).tolist()
    }


def tokenizer_record(directory: str, tokenizer: Tokenizer) -> TokenizerRecord:
    """Return what a manifest says about a tokenizer folder."""
    return TokenizerRecord(
        path=str(Path(directory).resolve()),
        kind=tokenizer.kind,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
    )
