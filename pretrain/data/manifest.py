"""PREFIX.json: what a corpus is made of, how much of it there is, and the hashes that prove it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.data.indexed import NO_SOURCE, corpus_file, map_file, read_header
from pretrain.errors import UserError
from pretrain.files import seen_from

BLOCK_BYTES = 16 << 20
"""Span of a file that one sha256 of the manifest covers."""

FORMAT = 1

APPENDED_END = "append_eod"
"""Key of a manifest's history: piece and id that stand after each document, for other programs' training."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenizerRecord(Record):
    """Which vocabulary the ids belong to."""

    path: str
    """Where it was when the corpus was written; the hash decides, not the path."""
    kind: str
    hash: str
    vocab_size: int


class Tally(Record):
    """What one source of text contributed."""

    documents: int
    tokens: int
    text_bytes: int


class InputFile(Record):
    """A file that was read, with its size on disk."""

    path: str
    bytes: int


class Origin(Record):
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
    """Return the manifest of a finished corpus; UserError where there is none or it was edited."""
    path = corpus_file(prefix, "json")
    if not path.is_file() and not corpus_file(prefix, "bin").is_file():
        raise UserError(
            f"{prefix}: no such corpus (no {prefix}.bin{seen_from(prefix)}); check the prefix, or encode it"
            " first"
        )
    if not path.is_file():
        index = corpus_file(prefix, "idx")
        if index.is_file():  # one that cannot be read needs other advice
            read_header(index, map_file(index))
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
    if manifest.fingerprint != fingerprint_of(manifest):
        raise UserError(f"{path}: does not match its own fingerprint; it was edited or damaged")
    return manifest


def fingerprint_of(manifest: Manifest) -> str:
    content = {
        "dtype": manifest.dtype,
        "counts": [manifest.documents, manifest.sequences, manifest.tokens],
        "blocks": [manifest.bin_blocks, manifest.idx_blocks],
        "tokenizer": manifest.tokenizer.hash if manifest.tokenizer else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal_of(manifest: Manifest) -> str:
    said = manifest.model_dump(mode="json", exclude={"seal"})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_seal(prefix: str | Path, manifest: Manifest) -> None:
    """Check apart from loading: a run goes on with a manifest whose paths somebody has corrected by hand."""
    if manifest.seal and manifest.seal != seal_of(manifest):
        raise UserError(
            f"{corpus_file(prefix, 'json')}: does not match its own seal: bytes of text, sources, inputs or "
            "history were edited or damaged; copy it again, or encode the text again"
        )


def refuse_appended_end(prefix: str | Path, manifest: Manifest) -> None:
    """Raise UserError for a corpus whose documents end in a piece of their own: windows put one between
    them."""
    if end := manifest.history.get(APPENDED_END):
        raise UserError(
            f"{prefix}: made for another program's training, with {end['piece']} (id {end['id']}) after each "
            "document as if it were text; encode it again without --append-eod"
        )


def read_sources(prefix: str | Path) -> tuple[list[str], npt.NDArray[np.uint16]]:
    """Names of the sources of text, and each document's code [N]: an index of them or NO_SOURCE.

    Nobody knows (no names, all NO_SOURCE) where there is no PREFIX.src.
    """
    manifest, path = load_manifest(prefix), corpus_file(prefix, "src")
    if not manifest.source_names:
        return [], np.full(manifest.documents, NO_SOURCE, dtype=np.uint16)
    codes = map_file(path).view("<u2")
    if len(codes) != manifest.documents:
        raise UserError(f"{path}: {len(codes)} entries for {manifest.documents} documents; encode it again")
    return manifest.source_names, codes


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
