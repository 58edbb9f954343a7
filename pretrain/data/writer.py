"""Writes an indexed corpus and its manifest, and merges corpora."""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from pretrain.data.indexed import (
    CHUNK,
    DTYPES,
    HEADER,
    MAGIC,
    NO_SOURCE,
    IndexedReader,
    Int64Array,
    Progress,
    TokenArray,
    corpus_file,
    map_file,
    read_header,
)
from pretrain.data.manifest import (
    APPENDED_END,
    BLOCK_BYTES,
    Manifest,
    Origin,
    add_tallies,
    check_seal,
    fingerprint_of,
    load_manifest,
    read_sources,
    seal_of,
)
from pretrain.errors import UserError
from pretrain.files import parse_json, write_whole

_COPY_BYTES = 4 << 20

MAX_SOURCES = 1024
"""Sources told apart; the rest are "other", or a corpus of addresses instead of kinds would make a
manifest as long as itself."""


class CorpusWriter:
    """Writes a corpus as it comes, in constant memory, and names it only when it is whole.

    ::

        with CorpusWriter("out/train", token_dtype(tokenizer.vocab_size)) as writer:
            writer.append_documents(tokens, lengths)
            writer.finish(Origin(tokenizer=record))

    Leaving the block without `finish`, by an error or not, removes what was written. Not `durable`:
    nothing waits for the disk, so a machine that goes down may leave a manifest of lost bytes.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype[Any],
        overwrite: bool = False,
        durable: bool = True,
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = self.sequences = self.tokens = self.empty_documents = 0
        self._source_codes: dict[str, int] = {}
        if durable:  # else a part, which may be damaged
            (refuse_foreign if overwrite else refuse_existing)(prefix)
        corpus_file(prefix, "bin").parent.mkdir(parents=True, exist_ok=True)
        self._durable = durable
        self._bin = _HashedFile(self._partial("bin"), durable)
        self._sources = _HashedFile(self._partial("src"), durable)
        # One int32 a sequence, one int64 a document; the index is put together from them at the end.
        self._lengths = self._partial("lengths").open("w+b")
        self._table = self._partial("table").open("w+b")
        self._table.write(np.zeros(1, dtype="<i8").tobytes())

    def source(self, name: str) -> int:
        """Return the code of a source; that of "other" for a new one where there are too many already."""
        codes = self._source_codes
        if name not in codes and len(codes) >= MAX_SOURCES:
            name = "other"
        return codes.setdefault(name, len(codes))

    @property
    def source_names(self) -> list[str]:
        """Names of the codes given out so far."""
        return list(self._source_codes)

    def append_documents(
        self, tokens: TokenArray, lengths: npt.ArrayLike, sources: npt.ArrayLike | None = None
    ) -> None:
        """Add documents of one sequence each: their tokens end to end, tokens per document [n] and
        codes of their sources [n].

        A length of 0 is an empty document: an entry of the table and no sequence.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        self.append(tokens, sizes[sizes > 0], np.cumsum(sizes > 0), sources)

    def append(
        self,
        tokens: TokenArray,
        lengths: npt.ArrayLike,
        document_ends: npt.ArrayLike,
        sources: npt.ArrayLike | None = None,
    ) -> None:
        """Add sequences (lengths [s]) and documents (ends [d], counted in these sequences)."""
        sizes = np.asarray(lengths, dtype=np.int64)
        ends = np.asarray(document_ends, dtype=np.int64)
        assert sizes.sum() == len(tokens), "lengths and tokens disagree"
        assert (ends[-1] if len(ends) else 0) == len(sizes), "a sequence outside the documents"
        if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
            raise UserError(f"{self.prefix}: a sequence of {sizes.max()} tokens; the format ends at 2**31-1")
        bounds = np.concatenate(([0], np.cumsum(sizes)))[np.concatenate(([0], ends))]
        self._bin.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.write(sizes.astype("<i4").tobytes())
        self.tokens += len(tokens)
        self._append_table(ends, np.diff(bounds) == 0, sources)

    def append_corpus(
        self,
        prefix: str | Path,
        dropped: Sequence[int] | Int64Array = (),
        progress: Progress = lambda done: None,
    ) -> None:
        """Add the documents of a corpus of the same tokenizer, but for those `dropped` (ascending)."""
        reader = IndexedReader(prefix)
        names, codes = read_sources(prefix)
        ours = np.array([self.source(name) for name in names] + [NO_SOURCE], dtype=np.uint16)
        first = 0
        for gap in [*np.asarray(dropped, dtype=np.int64).tolist(), reader.num_documents]:
            for start in range(first, gap, CHUNK):
                stop = min(start + CHUNK, gap)
                sources = ours[np.minimum(codes[start:stop], len(names))]
                self._append_run(reader, start, stop, sources, progress)
            first = gap + 1

    def _append_run(
        self, reader: IndexedReader, first: int, last: int, sources: npt.ArrayLike, progress: Progress
    ) -> None:
        """Add documents `first` to `last` - 1 as they are."""
        ends = np.asarray(reader.document_table[first : last + 1])
        bounds = reader.token_offsets(ends)
        start, size = int(bounds[0]) * self.dtype.itemsize, int(bounds[-1] - bounds[0])
        self._bin.copy(corpus_file(reader.prefix, "bin"), start, size * self.dtype.itemsize, progress)
        for at in range(int(ends[0]), int(ends[-1]), CHUNK):
            self._lengths.write(reader.sequence_lengths[at : min(at + CHUNK, int(ends[-1]))].tobytes())
        self.tokens += size
        self._append_table(ends[1:] - ends[0], np.diff(bounds) == 0, sources)

    def _append_table(
        self, ends: Int64Array, empty: npt.NDArray[np.bool_], sources: npt.ArrayLike | None
    ) -> None:
        """Note documents (ends counted in the sequences just written) with their sources."""
        codes = np.full(len(ends), NO_SOURCE) if sources is None else np.asarray(sources)
        assert len(codes) == len(ends), "sources and documents disagree"
        self._sources.write(codes.astype("<u2").tobytes())
        self._table.write((self.sequences + ends).astype("<i8").tobytes())
        self.sequences += int(ends[-1]) if len(ends) else 0
        self.documents += len(ends)
        self.empty_documents += int(np.count_nonzero(empty))

    def finish(self, origin: Origin | None = None) -> Manifest:
        """Write index and manifest and give the corpus its name; the manifest appears last."""
        blocks = {"idx": self._write_index(), "bin": self._bin.finish(), "src": self._sources.finish()}
        if not self._source_codes:
            blocks.pop("src")
        corpus_file(self.prefix, "json").unlink(missing_ok=True)
        corpus_file(self.prefix, "src").unlink(missing_ok=True)  # of a corpus that is overwritten
        for extension in blocks:
            self._partial(extension).replace(corpus_file(self.prefix, extension))
        counts = (self.documents, self.sequences, self.tokens, self.empty_documents)
        return write_manifest(self.prefix, self.dtype, counts, blocks, origin or Origin(), self.source_names)

    def _write_index(self) -> list[str]:
        index = _HashedFile(self._partial("idx"), self._durable)
        code = next(code for code, kind in DTYPES.items() if kind == self.dtype)
        index.write(HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1))
        for lengths in read_chunks(self._lengths, "<i4"):
            index.write(lengths.tobytes())
        total = 0
        for lengths in read_chunks(self._lengths, "<i4"):
            ends = total + np.cumsum(lengths, dtype=np.int64)
            index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
            total = int(ends[-1])
        for entries in read_chunks(self._table, "<i8"):
            index.write(entries.tobytes())
        return index.finish()

    def _partial(self, extension: str) -> Path:
        return corpus_file(self.prefix, f"{extension}.partial")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._bin.file, self._sources.file, self._lengths, self._table):
            with suppress(OSError):  # what is left in its buffer fails again on a full disk
                file.close()
        for extension in ("bin", "idx", "src", "lengths", "table"):
            self._partial(extension).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(corpus_file(self.prefix, "bin"))


EXTENSIONS = ("json", "idx", "bin", "src")
"""Of the files of a corpus."""


def refuse_existing(prefix: str | Path) -> None:
    """Raise UserError where any file of a corpus has this name already."""
    refuse_foreign(prefix)
    for extension in EXTENSIONS:
        path = corpus_file(prefix, extension)
        if path.exists():
            raise UserError(f"{path}: exists already; choose another --output or add --overwrite")


def refuse_foreign(prefix: str | Path) -> None:
    """Raise UserError where a file of this name is not demonstrably one of a corpus, to be replaced."""
    path = corpus_file(prefix, "json")
    has_manifest = _looks_like_manifest(path)
    if path.exists() and not has_manifest:
        raise UserError(f"{path}: exists and is no manifest of a corpus; choose another --output")
    has_index = _looks_like_index(corpus_file(prefix, "idx"))
    for extension in ("idx", "bin", "src"):
        path = corpus_file(prefix, extension)
        if path.exists() and not has_manifest and not has_index:
            raise UserError(f"{path}: exists and belongs to no corpus; choose another --output")


def _looks_like_index(path: Path) -> bool:
    """Return whether this is an index of Megatron's; fairseq's begins alike."""
    try:
        read_header(path, map_file(path))
    except (UserError, OSError):
        return False
    return True


def _looks_like_manifest(path: Path) -> bool:
    try:
        said = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.keys() >= {"format", "dtype", "bin_blocks", "idx_blocks"}


def refuse_inputs(outputs: Sequence[str | Path], inputs: Sequence[str | Path]) -> None:
    """Raise UserError where an output is an input, by name, link or inode."""
    taken = {os.path.realpath(path): path for path in inputs}
    inodes = {
        (about.st_dev, about.st_ino) for about in (os.stat(path) for path in inputs if os.path.exists(path))
    }
    for path in outputs:
        same = os.path.exists(path) and (os.stat(path).st_dev, os.stat(path).st_ino) in inodes
        if same or os.path.realpath(path) in taken:
            raise UserError(f"{path}: is also an input; choose another --output")


class _HashedFile:
    """A file that is hashed, block by block, as it is written."""

    def __init__(self, path: Path, durable: bool) -> None:
        self.file, self._durable = path.open("wb"), durable
        self._digests: list[str] = []
        self._hash, self._room = hashlib.sha256(), BLOCK_BYTES

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._update(memoryview(data))

    def copy(self, path: Path, start: int, size: int, progress: Progress) -> None:
        """Add `size` bytes of a file, moved by the kernel and read once for the hash."""
        self.file.flush()
        with path.open("rb") as source:
            while size:
                data = os.pread(source.fileno(), min(size, _COPY_BYTES), start)
                if not data:
                    raise UserError(f"{path}: truncated while it was copied; copy or encode it again")
                _copy_range(source.fileno(), self.file.fileno(), start, data)
                self._update(memoryview(data))
                start, size = start + len(data), size - len(data)
                progress(len(data))

    def _update(self, view: memoryview) -> None:
        while len(view):
            self._hash.update(view[: self._room])
            taken = min(self._room, len(view))
            view, self._room = view[taken:], self._room - taken
            if self._room == 0:
                self._digests.append(self._hash.hexdigest())
                self._hash, self._room = hashlib.sha256(), BLOCK_BYTES

    def finish(self) -> list[str]:
        """Force it to the disk if it is durable, and close it; digests of all blocks."""
        self.file.flush()
        if self._durable:
            os.fsync(self.file.fileno())
        self.file.close()
        last = [self._hash.hexdigest()] if self._room < BLOCK_BYTES else []
        return self._digests + last


def _copy_range(source: int, target: int, start: int, data: bytes) -> None:
    """Append the bytes `data` that stand at `start` in file `source` to file `target`."""
    left = len(data)
    try:
        while left:
            done = os.copy_file_range(source, target, left, offset_src=start + len(data) - left)
            if not done:
                break
            left -= done
    except OSError as error:  # another or an old file system
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
            raise
    while left:
        left -= os.write(target, memoryview(data)[len(data) - left :])


def read_chunks(file: BinaryIO, dtype: str) -> Iterator[npt.NDArray[Any]]:
    file.seek(0)
    while data := file.read(CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype=dtype)


def write_manifest(
    prefix: str | Path,
    dtype: np.dtype[Any],
    counts: tuple[int, int, int, int],
    blocks: Mapping[str, list[str]],
    origin: Origin,
    source_names: list[str],
) -> Manifest:
    """Write PREFIX.json: `counts` are documents, sequences, tokens, empty documents; `blocks` the
    digests of each file."""
    documents, sequences, tokens, empty_documents = counts
    manifest = Manifest(
        dtype=dtype.name,
        documents=documents,
        sequences=sequences,
        tokens=tokens,
        empty_documents=empty_documents,
        block_bytes=BLOCK_BYTES,
        bin_blocks=blocks["bin"],
        idx_blocks=blocks["idx"],
        src_blocks=blocks.get("src", []),
        source_names=source_names,
        **dict(origin),
    )
    manifest = manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)})
    manifest = manifest.model_copy(update={"seal": seal_of(manifest)})
    write_whole(corpus_file(prefix, "json"), (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def merge(
    prefixes: Sequence[str | Path],
    output: str | Path,
    overwrite: bool = False,
    progress: Progress = lambda done: None,
) -> Manifest:
    """Join finished corpora of one tokenizer, in the order given, in constant memory."""
    first, origin = load_manifest(prefixes[0]), Origin(text_bytes=0, history={"merged": []})
    end = first.history.get(APPENDED_END)
    origin.history.update({APPENDED_END: end} if end else {})
    for prefix in prefixes:
        manifest = load_manifest(prefix)
        check_seal(prefix, manifest)
        if manifest.dtype != first.dtype or _hash_of(manifest) != _hash_of(first):
            raise UserError(
                f"{prefix}: its tokenizer or dtype is not that of {prefixes[0]}; "
                "only corpora of one tokenizer can be merged"
            )
        if manifest.history.get(APPENDED_END) != end:
            raise UserError(
                f"{prefix}: differs from {prefixes[0]} in the piece after each document (--append-eod); "
                "encode both alike"
            )
        origin = _joined(origin, prefix, manifest)
    origin.history.update(_joined_counts([load_manifest(prefix) for prefix in prefixes]))
    inputs = [corpus_file(prefix, extension) for prefix in prefixes for extension in EXTENSIONS]
    refuse_inputs([corpus_file(output, extension) for extension in EXTENSIONS], inputs)
    with CorpusWriter(output, np.dtype(first.dtype), overwrite) as writer:
        for prefix in prefixes:
            writer.append_corpus(prefix, progress=progress)
        return writer.finish(origin)


def _joined_counts(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What the histories of all say of what was read and left out, together; only what all of them say.

    Of literals nothing where they were treated in different ways.
    """
    histories = [manifest.history for manifest in manifests]

    def all_have(name: str) -> bool:
        return all(name in history for history in histories)

    def total(name: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for history in histories:
            counts.update(history.get(name, {}))
        return dict(sorted(counts.items()))

    joined: dict[str, Any] = {}
    if all_have("coverage") and all_have("kept"):
        joined["coverage"] = [entry for history in histories for entry in history["coverage"]]
        joined["kept"] = {"here": 0, "elsewhere": 0} | total("kept")
        for name in ("rejected", "duplicates"):
            joined[name] = sum(history.get(name, 0) for history in histories)
    mapped = [history.get("map_literal", []) for history in histories]
    if any("literals" in history for history in histories) and all(each == mapped[0] for each in mapped):
        joined |= {"literals": total("literals"), "map_literal": mapped[0]}
    return joined


def _hash_of(manifest: Manifest) -> str | None:
    return manifest.tokenizer.hash if manifest.tokenizer else None


def _joined(origin: Origin, prefix: str | Path, manifest: Manifest) -> Origin:
    """The origin of what is merged so far and one more; of thousands only this sum is kept."""
    sizes = (origin.text_bytes, manifest.text_bytes)
    origin.history["merged"].append({"prefix": str(prefix), "fingerprint": manifest.fingerprint})
    return Origin(
        tokenizer=manifest.tokenizer,
        text_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        sources=add_tallies(origin.sources, manifest.sources),
        inputs=origin.inputs + manifest.inputs,
        history=origin.history,
    )
