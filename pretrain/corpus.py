"""Megatron indexed datasets: the tokens of all documents in one flat file, mapped, never loaded.

A corpus is three files. ``PREFIX.bin`` holds token ids and nothing else; ``PREFIX.idx`` (MMIDIDX
version 1, byte for byte what megatron-core's IndexedDataset writes and reads) cuts them into
sequences and documents; ``PREFIX.json`` is ours: the manifest with counts, provenance and one
sha256 per 16 MiB, so that damage is found and named. The manifest is written last: without one a
corpus is foreign or unfinished. Where the text came from several sources, ``PREFIX.src`` says which
for each document (uint16; the names are in the manifest, 65535 is none); Megatron ignores it.

The one idea: everything streams. The writer keeps lengths in a file beside the tokens, so its
memory does not grow with the corpus; the reader maps the files and answers with views; a merge lets
the kernel copy the tokens.

The trap: fairseq's mmap index has the same magic and version and another layout. Only the size
tells them apart.

Layout of the index, little-endian: magic (9 bytes), version ``<Q``, dtype code ``<B``, sequences S
``<Q``, length of the document table D ``<Q``; then int32 [S] lengths in tokens, int64 [S] byte
offsets in the .bin, int64 [D] document table: 0, then the number of sequences at the end of each
document. An empty document repeats an entry.
"""

import errno
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain import config
from pretrain.config import UserError

Int64Array: TypeAlias = npt.NDArray[np.int64]
TokenArray: TypeAlias = npt.NDArray[np.integer[Any]]
Progress: TypeAlias = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_FAIRSEQ_HEADER_BYTES = 26
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of integer types; 6 and 7 are floats, which no token id is."""

_UINT16_LIMIT = 65_500
"""Megatron's rule: smaller vocabularies are uint16, all others int32."""

BLOCK_BYTES = 16 << 20
"""Span of a file that one sha256 of the manifest covers."""

_CHUNK = 1 << 18
"""Items of an index array handled at a time."""

_COPY_BYTES = 4 << 20

NO_SOURCE = 0xFFFF
"""Code in PREFIX.src of a document whose source is not known."""

_MAX_SOURCES = 1024
"""Sources told apart; the rest are "other", or a corpus of addresses instead of kinds would make a
manifest as long as itself."""

FORMAT = 1

APPENDED_END = "append_eod"
"""Key of a manifest's history: piece and id that stand after each document, for other programs' training."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of the ids in the .bin, by Megatron's rule."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_LIMIT else np.int32)


def corpus_file(prefix: str | Path, extension: str) -> Path:
    """PREFIX.bin, PREFIX.idx or PREFIX.json; a prefix may contain dots."""
    return Path(f"{prefix}.{extension}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenizerRecord(_Record):
    """Which vocabulary the ids belong to."""

    path: str
    """Where it was when the corpus was written; the hash decides, not the path."""
    kind: str
    hash: str
    vocab_size: int


class Tally(_Record):
    """What one source of text contributed."""

    documents: int
    tokens: int
    text_bytes: int


class InputFile(_Record):
    """A file that was read, with its size on disk."""

    path: str
    bytes: int


class Origin(_Record):
    """Where the tokens of a corpus came from."""

    tokenizer: TokenizerRecord | None = None
    text_bytes: int | None = None
    """UTF-8 bytes of the text, for bits per byte; None where only tokens were seen."""
    sources: dict[str, Tally] = {}
    """By kind of text: the part of the `source` field before its first slash."""
    inputs: list[InputFile] = []
    history: dict[str, Any] = {}
    """How it was made, for people: holdout, rejected lines, merged prefixes, version."""


class Manifest(Origin):
    """PREFIX.json."""

    format: int = FORMAT
    dtype: str
    documents: int
    sequences: int
    tokens: int
    empty_documents: int
    block_bytes: int = Field(gt=0)
    bin_blocks: list[str]
    idx_blocks: list[str]
    src_blocks: list[str] = []
    source_names: list[str] = []
    """Names of the codes in PREFIX.src; empty where there is no such file."""
    fingerprint: str = ""
    """sha256 of everything that defines the content: the same tokens in the same documents."""
    seal: str = ""
    """sha256 of all else that the manifest says: bytes of text, sources, inputs, history. Empty in one that
    was written before there was any."""


def load_manifest(prefix: str | Path) -> Manifest:
    """The manifest of a finished corpus; UserError where there is none or it was edited."""
    path = corpus_file(prefix, "json")
    if not path.is_file() and not corpus_file(prefix, "bin").is_file():
        raise UserError(f"{prefix}: no such corpus (no {prefix}.bin); check the prefix, or encode it first")
    if not path.is_file():
        index = corpus_file(prefix, "idx")
        if index.is_file():  # one that cannot be read needs other advice
            _read_header(index, _map(index))
        raise UserError(
            f"{path}: no manifest; the corpus is unfinished, or another program wrote it: then run "
            f"python -m tools.verify_corpus {prefix} --write-manifest --tokenizer DIR"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: not a corpus manifest: {where}: {first['msg']}") from error
    if manifest.format != FORMAT:
        raise UserError(f"{path}: manifest format {manifest.format}, this version reads {FORMAT}")
    if manifest.fingerprint != _fingerprint(manifest):
        raise UserError(f"{path}: does not match its own fingerprint; it was edited or damaged")
    return manifest


def _fingerprint(manifest: Manifest) -> str:
    content = {
        "dtype": manifest.dtype,
        "counts": [manifest.documents, manifest.sequences, manifest.tokens],
        "blocks": [manifest.bin_blocks, manifest.idx_blocks],
        "tokenizer": manifest.tokenizer.hash if manifest.tokenizer else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _seal_of(manifest: Manifest) -> str:
    said = manifest.model_dump(mode="json", exclude={"seal"})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_seal(prefix: str | Path, manifest: Manifest) -> None:
    """Separate from loading: a run goes on with a manifest whose paths somebody has corrected by hand."""
    if manifest.seal and manifest.seal != _seal_of(manifest):
        raise UserError(
            f"{corpus_file(prefix, 'json')}: does not match its own seal: bytes of text, sources, inputs or "
            "history were edited or damaged; copy it again, or encode the text again"
        )


def refuse_appended_end(prefix: str | Path, manifest: Manifest) -> None:
    """UserError for a corpus whose documents end in a piece of their own: windows put one between them."""
    if end := manifest.history.get(APPENDED_END):
        raise UserError(
            f"{prefix}: made for another program's training, with {end['piece']} (id {end['id']}) after each "
            "document as if it were text; encode it again without --append-eod"
        )


def tokenizer_folder(options: config.Corpus) -> str:
    """The tokenizer of a config's corpus: the one it names, else the one that the manifest names."""
    if options.tokenizer:
        return options.tokenizer
    prefix = options.blend[0][1]
    record = load_manifest(prefix).tokenizer
    if record is None:
        raise UserError(f"{prefix}: its manifest names no tokenizer; set corpus.tokenizer")
    return record.path


def copy_of(prefix: str | Path, copies: str | Path) -> Path:
    """Prefix of a copy of a corpus in the folder `copies`, there or not: its name and fingerprint."""
    return Path(copies) / f"{Path(prefix).name}-{load_manifest(prefix).fingerprint[:16]}"


def open_nearest(prefix: str, copies: str | None) -> "IndexedReader":
    """The corpus, from its copy in the folder `copies` if that has a whole one (`slurm.stage`)."""
    copy = copy_of(prefix, copies) if copies else None
    return IndexedReader(prefix, copy if copy and is_copy(prefix, copy) else None)


def is_copy(prefix: str | Path, copy: str | Path) -> bool:
    """Return whether `copy` is the user's own and its manifest and file sizes are those of the corpus.

    Its bytes were compared when it was made; whoever stages it compares them again.
    """
    try:
        files = [(corpus_file(prefix, end), corpus_file(copy, end)) for end in ("bin", "idx")]
        own = all(theirs.stat().st_uid == os.getuid() for _, theirs in files)
        same = all(ours.stat().st_size == theirs.stat().st_size for ours, theirs in files)
        return own and same and load_manifest(copy).fingerprint == load_manifest(prefix).fingerprint
    except (UserError, OSError):
        return False


class IndexedReader:
    """A Megatron indexed dataset, ours or anybody's, mapped and checked for consistency.

    Attributes:
        dtype: type of the ids.
        sequence_lengths: int32 [S], tokens of each sequence.
        document_table: int64 [N + 1], number of sequences before each document, and S.
        tokens: flat view of the whole .bin [T].
        num_documents, num_sequences, num_tokens: N, S, T.

    Raises UserError that names the file and what is wrong with it.
    """

    def __init__(self, prefix: str | Path, copy: str | Path | None = None) -> None:
        """Opens PREFIX, or what is known to be a `copy` of it, under the name of PREFIX."""
        self.prefix = str(prefix)
        index_path, tokens_path = corpus_file(copy or prefix, "idx"), corpus_file(copy or prefix, "bin")
        index = _map(index_path)
        self.dtype, self.num_sequences, entries = _read_header(index_path, index)
        self.num_documents = entries - 1
        at = _HEADER.size
        self.sequence_lengths = index[at : at + 4 * self.num_sequences].view("<i4")
        at += 4 * self.num_sequences
        self._pointers = index[at : at + 8 * self.num_sequences].view("<i8")
        at += 8 * self.num_sequences
        self.document_table = index[at : at + 8 * entries].view("<i8")
        raw = _map(tokens_path)
        self._check_index(index_path)
        expected = self.num_tokens * self.dtype.itemsize
        if raw.size != expected:
            what = "truncated" if raw.size < expected else "too long"
            raise UserError(
                f"{tokens_path}: {what}: {raw.size} bytes where its index asks for {expected}; "
                "copy or encode it again"
            )
        self.tokens: TokenArray = raw.view(self.dtype)

    def _check_index(self, path: Path) -> None:
        """Lengths, byte offsets and document table tell one story: sequences lie end to end."""
        total = 0
        for start in range(0, self.num_sequences, _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise UserError(f"{path}: damaged: negative sequence length; encode it again")
            ends = total + np.cumsum(lengths)
            pointers = self._pointers[start : start + _CHUNK]
            if not np.array_equal(pointers, (ends - lengths) * self.dtype.itemsize):
                raise UserError(
                    f"{path}: damaged: byte offsets do not follow from the lengths "
                    f"in sequences {start} to {start + len(lengths) - 1}; encode it again"
                )
            total = int(ends[-1])
        table = self.document_table
        pieces = (table[start : start + _CHUNK + 1] for start in range(0, len(table), _CHUNK))
        falls = any(np.any(piece[1:] < piece[:-1]) for piece in pieces)
        if table[0] != 0 or table[-1] != self.num_sequences or falls:
            raise UserError(
                f"{path}: damaged: the document table does not run from 0 up to the "
                f"{self.num_sequences} sequences; encode it again"
            )
        self.num_tokens = total

    @cached_property
    def document_bounds(self) -> Int64Array:
        """First token of each document, then T: int64 [N + 1]."""
        starts = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(self.sequence_lengths, dtype=np.int64, out=starts[1:])
        bounds: Int64Array = starts[self.document_table]
        return bounds

    @property
    def document_offsets(self) -> Int64Array:
        """First token of each document: int64 [N]."""
        return self.document_bounds[:-1]

    @cached_property
    def document_lengths(self) -> Int64Array:
        """Tokens of each document: int64 [N]; empty documents have 0."""
        return np.diff(self.document_bounds)

    def token_offsets(self, sequences: Int64Array) -> Int64Array:
        """First token of each of these sequences; T for S. Needs no table of its own."""
        offsets = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        inside = sequences < self.num_sequences
        offsets[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return offsets

    def document(self, i: int) -> TokenArray:
        """Tokens of document i, a view."""
        return self.tokens[self.document_bounds[i] : self.document_bounds[i + 1]]


def read_sources(prefix: str | Path) -> tuple[list[str], npt.NDArray[np.uint16]]:
    """Names of the sources of text, and each document's code [N]: an index of them or NO_SOURCE.

    Nobody knows (no names, all NO_SOURCE) where there is no PREFIX.src.
    """
    manifest, path = load_manifest(prefix), corpus_file(prefix, "src")
    if not manifest.source_names:
        return [], np.full(manifest.documents, NO_SOURCE, dtype=np.uint16)
    codes = _map(path).view("<u2")
    if len(codes) != manifest.documents:
        raise UserError(f"{path}: {len(codes)} entries for {manifest.documents} documents; encode it again")
    return manifest.source_names, codes


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes as a plain read-only array (slices of numpy.memmap itself are slow)."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                return np.empty(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; give the prefix of a corpus (without .bin or .idx), "
            "as written by python -m tools.encode_corpus"
        ) from error


def _read_header(path: Path, index: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """Token type, sequences S, length of the document table D."""
    head = index[: _HEADER.size].tobytes()
    if head.startswith(_OLD_MAGIC):
        raise UserError(
            f"{path}: TNTIDX, the old cached format of fairseq and Megatron-DeepSpeed; encode the text again"
        )
    if not head.startswith(MAGIC) and len(head) >= len(MAGIC):
        raise UserError(f"{path}: not a Megatron index (it does not start with MMIDIDX)")
    if len(head) < _HEADER.size:
        raise UserError(f"{path}: truncated: {index.size} bytes are less than a header")
    _, version, code, sequences, entries = _HEADER.unpack(head)
    if index.size == _FAIRSEQ_HEADER_BYTES + 12 * sequences:
        raise UserError(
            f"{path}: fairseq's mmap format, which only looks like Megatron's: "
            f"python -m tools.import_fairseq {path.with_suffix('')} --tokenizer DIR --output OTHER"
        )
    if version != 1:
        raise UserError(f"{path}: index version {version}; only version 1 is known")
    if code not in _DTYPES:
        raise UserError(f"{path}: dtype code {code} is not an integer type of Megatron's")
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if entries < 1 or index.size not in (expected, expected + sequences):  # + modes (multimodal)
        what = "truncated" if index.size < expected else "too long"
        raise UserError(
            f"{path}: {what}: {index.size} bytes where its header asks for {expected}; "
            "copy or encode it again"
        )
    return np.dtype(_DTYPES[code]).newbyteorder("<"), sequences, entries


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
        """The code of a source; that of "other" for a new one where there are too many already."""
        codes = self._source_codes
        if name not in codes and len(codes) >= _MAX_SOURCES:
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
            for start in range(first, gap, _CHUNK):
                stop = min(start + _CHUNK, gap)
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
        for at in range(int(ends[0]), int(ends[-1]), _CHUNK):
            self._lengths.write(reader.sequence_lengths[at : min(at + _CHUNK, int(ends[-1]))].tobytes())
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
        return _write_manifest(self.prefix, self.dtype, counts, blocks, origin or Origin(), self.source_names)

    def _write_index(self) -> list[str]:
        index = _HashedFile(self._partial("idx"), self._durable)
        code = next(code for code, kind in _DTYPES.items() if kind == self.dtype)
        index.write(_HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1))
        for lengths in _read_chunks(self._lengths, "<i4"):
            index.write(lengths.tobytes())
        total = 0
        for lengths in _read_chunks(self._lengths, "<i4"):
            ends = total + np.cumsum(lengths, dtype=np.int64)
            index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
            total = int(ends[-1])
        for entries in _read_chunks(self._table, "<i8"):
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
            file.close()
        for extension in ("bin", "idx", "src", "lengths", "table", "json"):
            self._partial(extension).unlink(missing_ok=True)


EXTENSIONS = ("json", "idx", "bin", "src")
"""Of the files of a corpus."""


def refuse_existing(prefix: str | Path) -> None:
    """UserError where any file of a corpus has this name already."""
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
    path = corpus_file(prefix, "idx")
    has_index = path.is_file() and path.open("rb").read(len(MAGIC)).startswith((MAGIC, _OLD_MAGIC))
    for extension in ("idx", "bin", "src"):
        path = corpus_file(prefix, extension)
        if path.exists() and not has_manifest and not has_index:
            raise UserError(f"{path}: exists and belongs to no corpus; choose another --output")


def _looks_like_manifest(path: Path) -> bool:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
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


def _read_chunks(file: BinaryIO, dtype: str) -> Iterator[npt.NDArray[Any]]:
    file.seek(0)
    while data := file.read(_CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype=dtype)


def _write_manifest(
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
    manifest = manifest.model_copy(update={"fingerprint": _fingerprint(manifest)})
    manifest = manifest.model_copy(update={"seal": _seal_of(manifest)})
    partial = corpus_file(prefix, "json.partial")
    partial.write_text(manifest.model_dump_json(indent=1) + "\n")
    partial.replace(corpus_file(prefix, "json"))
    return manifest


def adopt(prefix: str | Path, origin: Origin, progress: Progress = lambda done: None) -> Manifest:
    """Write the manifest of a corpus that another program made, after checking every id."""
    reader = IndexedReader(prefix)
    check_ids(reader, origin.tokenizer)
    empty_documents = int(np.count_nonzero(reader.document_lengths == 0))
    counts = (reader.num_documents, reader.num_sequences, reader.num_tokens, empty_documents)
    blocks = {
        extension: list(_block_digests(corpus_file(prefix, extension), BLOCK_BYTES, progress))
        for extension in ("bin", "idx")
    }
    return _write_manifest(prefix, reader.dtype, counts, blocks, origin, [])


def verify(prefix: str | Path, progress: Progress = lambda done: None) -> Manifest:
    """Check every byte against the manifest; UserError names the first range that differs.

    Of a manifest without a seal, the bytes of text, inputs and history are taken as they are.
    """
    manifest = load_manifest(prefix)
    _check_seal(prefix, manifest)
    reader = IndexedReader(prefix)
    found = [reader.num_documents, reader.num_sequences, reader.num_tokens, reader.dtype.name]
    noted = [manifest.documents, manifest.sequences, manifest.tokens, manifest.dtype]
    if found != noted:
        raise UserError(
            f"{corpus_file(prefix, 'idx')}: documents, sequences, tokens, dtype are {found}, "
            f"the manifest says {noted}; another corpus was copied over this one"
        )
    names, codes = read_sources(prefix)
    blocks = {"bin": manifest.bin_blocks, "idx": manifest.idx_blocks}
    if manifest.source_names:
        blocks["src"] = manifest.src_blocks
    for extension, noted_blocks in blocks.items():
        path = corpus_file(prefix, extension)
        spans = -(-path.stat().st_size // manifest.block_bytes)
        if spans != len(noted_blocks):
            raise UserError(
                f"{path}: has {spans} blocks of {manifest.block_bytes} bytes, the manifest has hashes of "
                f"{len(noted_blocks)}; one of them was damaged or changed: copy or encode both again"
            )
        digests = _block_digests(path, manifest.block_bytes, progress)
        for i, (digest, expected) in enumerate(zip(digests, noted_blocks, strict=True)):
            if digest != expected:
                start = i * manifest.block_bytes
                end = min(start + manifest.block_bytes, path.stat().st_size)
                raise UserError(
                    f"{path}: bytes {start} to {end - 1} differ from the manifest; "
                    "the file was damaged or changed: copy or encode it again"
                )
    _check_counts(reader, manifest, names, codes)
    check_ids(reader, manifest.tokenizer)
    return manifest


def _check_counts(
    reader: IndexedReader, manifest: Manifest, names: Sequence[str], codes: npt.NDArray[np.uint16]
) -> None:
    """UserError unless empty documents and what each source gave are as counted anew."""
    empty, documents, tokens = _counted(reader, codes)
    path = corpus_file(reader.prefix, "json")
    if empty != manifest.empty_documents:
        raise UserError(f"{path}: says {manifest.empty_documents} empty documents, the index has {empty}")
    said: dict[str, Tally] = {}
    for name, entry in manifest.sources.items():  # a merge counts sources by name that share one code
        said = add_tallies(said, {name if name in names else "other": entry})
    for code, name in enumerate(names):
        entry = said.pop(name, Tally(documents=0, tokens=0, text_bytes=0))
        if (entry.documents, entry.tokens) != (documents[code], tokens[code]):
            raise UserError(
                f"{path}: says {entry.documents} documents and {entry.tokens} tokens of source {name!r}, "
                f"PREFIX.src has {documents[code]} and {tokens[code]}; encode the text again"
            )
    if names and said:
        lost = " or ".join(sorted(manifest.sources.keys() - set(names)))
        raise UserError(f"{path}: PREFIX.src has no source {lost}; encode the text again")
    text = sum(entry.text_bytes for entry in manifest.sources.values())
    whole = manifest.text_bytes
    if whole is not None and (text > whole or (text < whole and documents[NO_SOURCE] == 0)):
        raise UserError(f"{path}: text_bytes = {whole}, but its sources have {text}; encode the text again")


def _counted(reader: IndexedReader, codes: npt.NDArray[np.uint16]) -> tuple[int, Int64Array, Int64Array]:
    """Empty documents in all; documents and tokens of each code [NO_SOURCE + 1]."""
    empty, documents, tokens = 0, np.zeros(NO_SOURCE + 1, np.int64), np.zeros(NO_SOURCE + 1, np.int64)
    for start in range(0, reader.num_documents, _CHUNK):
        some = codes[start : start + _CHUNK]
        lengths = np.diff(reader.token_offsets(reader.document_table[start : start + len(some) + 1]))
        empty += int(np.count_nonzero(lengths == 0))
        documents += np.bincount(some, minlength=NO_SOURCE + 1)
        np.add.at(tokens, some, lengths)  # in whole numbers, which bincount would not
    return empty, documents, tokens


def check_ids(reader: IndexedReader, tokenizer: TokenizerRecord | None) -> None:
    """UserError unless every id is one of the tokenizer's (of a foreign corpus above all)."""
    limit = tokenizer.vocab_size if tokenizer else np.iinfo(reader.dtype).max + 1
    for start in range(0, reader.num_tokens, _CHUNK):
        chunk = reader.tokens[start : start + _CHUNK]
        wrong = np.flatnonzero((chunk < 0) | (chunk >= limit))
        if len(wrong):
            raise UserError(
                f"{reader.prefix}.bin: token {start + wrong[0]} has id {chunk[wrong[0]]}, outside "
                f"the {limit} ids of the vocabulary; it was encoded with another tokenizer"
            )


def _block_digests(path: Path, block_bytes: int, progress: Progress) -> Iterator[str]:
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            yield hashlib.sha256(block).hexdigest()
            progress(len(block))


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
        _check_seal(prefix, manifest)
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
    inputs = [corpus_file(prefix, extension) for prefix in prefixes for extension in EXTENSIONS]
    refuse_inputs([corpus_file(output, extension) for extension in EXTENSIONS], inputs)
    with CorpusWriter(output, np.dtype(first.dtype), overwrite) as writer:
        for prefix in prefixes:
            writer.append_corpus(prefix, progress=progress)
        return writer.finish(origin)


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


def add_tallies(left: Mapping[str, Tally], right: Mapping[str, Tally], sign: int = 1) -> dict[str, Tally]:
    """Sum (sign -1: difference) by source."""
    total = dict(left)
    for name, tally in right.items():
        old = total.get(name, Tally(documents=0, tokens=0, text_bytes=0))
        total[name] = Tally(
            documents=old.documents + sign * tally.documents,
            tokens=old.tokens + sign * tally.tokens,
            text_bytes=old.text_bytes + sign * tally.text_bytes,
        )
    return total
