"""Megatron indexed datasets: the tokens of all documents in one flat file, mapped, never loaded.

A corpus is three files. ``PREFIX.bin`` holds token ids and nothing else; ``PREFIX.idx`` (MMIDIDX
version 1, byte for byte what megatron-core's IndexedDataset writes and reads) cuts them into
sequences and documents; ``PREFIX.json`` is ours: the manifest with counts, provenance and one
sha256 per 16 MiB, so that damage is found and named. The manifest is written last: without one a
corpus is foreign or unfinished. Where the text came from several sources, ``PREFIX.src`` says which
for each document (uint16; the names are in the manifest, 65535 is none); Megatron ignores it.

Everything streams. The writer keeps lengths in a file beside the tokens, so its
memory does not grow with the corpus; the reader maps the files and answers with views; a merge lets
the kernel copy the tokens.

Fairseq's mmap index has the same magic and version and another layout. Only the size
tells them apart.

Layout of the index, little-endian: magic (9 bytes), version ``<Q``, dtype code ``<B``, sequences S
``<Q``, length of the document table D ``<Q``; then int32 [S] lengths in tokens, int64 [S] byte
offsets in the .bin, int64 [D] document table: 0, then the number of sequences at the end of each
document. An empty document repeats an entry.
"""

import mmap
import os
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pretrain.errors import UserError
from pretrain.files import seen_from

Int64Array: TypeAlias = npt.NDArray[np.int64]
TokenArray: TypeAlias = npt.NDArray[np.integer[Any]]
Progress: TypeAlias = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_FAIRSEQ_HEADER_BYTES = 26
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's codes of integer types; 6 and 7 are floats, which no token id is."""

_UINT16_LIMIT = 65_500
"""Megatron's rule: smaller vocabularies are uint16, all others int32."""

CHUNK = 1 << 18
"""Items of an index array handled at a time."""

NO_SOURCE = 0xFFFF
"""Code in PREFIX.src of a document whose source is not known."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids in the .bin, by Megatron's rule."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_LIMIT else np.int32)


def corpus_file(prefix: str | Path, extension: str) -> Path:
    """Return PREFIX.bin, PREFIX.idx or PREFIX.json; a prefix may contain dots."""
    return Path(f"{prefix}.{extension}")


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
        index = map_file(index_path)
        self.dtype, self.num_sequences, entries = read_header(index_path, index)
        self.num_documents = entries - 1
        at = HEADER.size
        self.sequence_lengths = index[at : at + 4 * self.num_sequences].view("<i4")
        at += 4 * self.num_sequences
        self._pointers = index[at : at + 8 * self.num_sequences].view("<i8")
        at += 8 * self.num_sequences
        self.document_table = index[at : at + 8 * entries].view("<i8")
        raw = map_file(tokens_path)
        self._check_index(index_path)
        expected = self.num_tokens * self.dtype.itemsize
        if raw.size != expected:
            raise _wrong_size(tokens_path, raw.size, expected, "its index")
        self.tokens: TokenArray = raw.view(self.dtype)

    def _check_index(self, path: Path) -> None:
        """Lengths, byte offsets and document table tell one story: sequences lie end to end."""
        total = 0
        for start in range(0, self.num_sequences, CHUNK):
            lengths = self.sequence_lengths[start : start + CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise UserError(f"{path}: damaged: negative sequence length; encode it again")
            ends = total + np.cumsum(lengths)
            pointers = self._pointers[start : start + CHUNK]
            if not np.array_equal(pointers, (ends - lengths) * self.dtype.itemsize):
                raise UserError(
                    f"{path}: damaged: byte offsets do not follow from the lengths "
                    f"in sequences {start} to {start + len(lengths) - 1}; encode it again"
                )
            total = int(ends[-1])
        table = self.document_table
        pieces = (table[start : start + CHUNK + 1] for start in range(0, len(table), CHUNK))
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
        """Return the first token of each of these sequences; T for S. Needs no table of its own."""
        if self.num_sequences == 0:
            return np.zeros(len(sequences), dtype=np.int64)
        # Not by `take`, which first copies a table that is not aligned.
        offsets: Int64Array = (
            self._pointers[np.minimum(sequences, self.num_sequences - 1)] // self.dtype.itemsize
        )
        offsets[sequences == self.num_sequences] = self.num_tokens
        return offsets

    def document(self, i: int) -> TokenArray:
        """Return the tokens of document i, a view."""
        start, end = self.token_offsets(self.document_table[[i, i + 1]]).tolist()
        return self.tokens[start:end]


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Return the file's bytes as a plain read-only array (slices of numpy.memmap itself are slow)."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                return np.empty(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file{seen_from(path)}; give the prefix of a corpus (without .bin or .idx), "
            "as written by python -m tools.encode_corpus"
        ) from error


def index_bytes(sequences: int, entries: int) -> int:
    """Return the size of an index of so many sequences and entries of the document table."""
    return HEADER.size + 12 * sequences + 8 * entries


def read_header(path: Path, index: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """Return the token type, sequences S, length of the document table D."""
    head = index[: HEADER.size].tobytes()
    if head.startswith(OLD_MAGIC):
        raise UserError(
            f"{path}: TNTIDX, the old cached format of fairseq and Megatron-DeepSpeed; encode the text again"
        )
    if not head.startswith(MAGIC) and len(head) >= len(MAGIC):
        raise UserError(f"{path}: not a Megatron index (it does not start with MMIDIDX)")
    if len(head) < HEADER.size:
        raise UserError(f"{path}: truncated: {index.size} bytes are less than a header")
    _, version, code, sequences, entries = HEADER.unpack(head)
    if index.size == _FAIRSEQ_HEADER_BYTES + 12 * sequences:
        raise UserError(
            f"{path}: fairseq's mmap format, which only looks like Megatron's: "
            f"python -m tools.import_fairseq {path.with_suffix('')} --tokenizer DIR --output OTHER"
        )
    if version != 1:
        raise UserError(f"{path}: index version {version}; only version 1 is known")
    if code not in DTYPES:
        raise UserError(f"{path}: dtype code {code} is not an integer type of Megatron's")
    expected = index_bytes(sequences, entries)
    if entries < 1 or index.size not in (expected, expected + sequences):  # + modes (multimodal)
        raise _wrong_size(path, index.size, expected, "its header")
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, entries


def _wrong_size(path: Path, size: int, expected: int, by: str) -> UserError:
    what = "truncated" if size < expected else "too long"
    return UserError(f"{path}: {what}: {size} bytes where {by} asks for {expected}; copy or encode it again")
