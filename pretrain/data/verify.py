"""Compares every byte of a corpus with what its manifest says."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.data.indexed import CHUNK, NO_SOURCE, IndexedReader, Int64Array, Progress, corpus_file
from pretrain.data.manifest import (
    BLOCK_BYTES,
    Manifest,
    Origin,
    Tally,
    TokenizerRecord,
    add_tallies,
    check_seal,
    load_manifest,
    read_sources,
)
from pretrain.data.writer import write_manifest
from pretrain.errors import UserError


def adopt(prefix: str | Path, origin: Origin, progress: Progress = lambda done: None) -> Manifest:
    """Write the manifest of a corpus that another program made, after checking every id."""
    reader = IndexedReader(prefix)
    check_ids(reader, origin.tokenizer)
    empty_documents = int(np.count_nonzero(reader.document_lengths == 0))
    counts = (reader.num_documents, reader.num_sequences, reader.num_tokens, empty_documents)
    blocks = {
        extension: list(block_digests(corpus_file(prefix, extension), BLOCK_BYTES, progress))
        for extension in ("bin", "idx")
    }
    return write_manifest(prefix, reader.dtype, counts, blocks, origin, [])


def verify(prefix: str | Path, progress: Progress = lambda done: None) -> Manifest:
    """Check every byte against the manifest; UserError names the first range that differs.

    Of a manifest without a seal, the bytes of text, inputs and history are taken as they are.
    """
    manifest = load_manifest(prefix)
    check_seal(prefix, manifest)
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
        digests = block_digests(path, manifest.block_bytes, progress)
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
    for start in range(0, reader.num_documents, CHUNK):
        some = codes[start : start + CHUNK]
        lengths = np.diff(reader.token_offsets(reader.document_table[start : start + len(some) + 1]))
        empty += int(np.count_nonzero(lengths == 0))
        documents += np.bincount(some, minlength=NO_SOURCE + 1)
        np.add.at(tokens, some, lengths)  # in whole numbers, which bincount would not
    return empty, documents, tokens


def check_ids(reader: IndexedReader, tokenizer: TokenizerRecord | None) -> None:
    """Raise UserError unless every id is one of the tokenizer's (of a foreign corpus above all)."""
    limit = tokenizer.vocab_size if tokenizer else np.iinfo(reader.dtype).max + 1
    for start in range(0, reader.num_tokens, CHUNK):
        chunk = reader.tokens[start : start + CHUNK]
        wrong = np.flatnonzero((chunk < 0) | (chunk >= limit))
        if len(wrong):
            raise UserError(
                f"{reader.prefix}.bin: token {start + wrong[0]} has id {chunk[wrong[0]]}, outside "
                f"the {limit} ids of the vocabulary; it was encoded with another tokenizer"
            )


def block_digests(path: Path, block_bytes: int, progress: Progress) -> Iterator[str]:
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            yield hashlib.sha256(block).hexdigest()
            progress(len(block))
