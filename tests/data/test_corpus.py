"""The corpus files against megatron-core's own reader and writer, and against damage."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pretrain.data import indexed, manifest, writer
from pretrain.data import verify as verification
from pretrain.data.indexed import IndexedReader, token_dtype
from pretrain.data.manifest import Manifest, Origin, Tally, TokenizerRecord, load_manifest
from pretrain.data.verify import adopt, verify
from pretrain.data.writer import CorpusWriter, _HashedFile, merge, write_manifest
from pretrain.errors import UserError
from tools.verify_corpus import __main__ as verify_corpus

# Sequences of each document: several, none at all, an empty one at either end.
DOCUMENTS = [[], [3], [2, 5, 1], [], [], [4], [7, 7], [1], []]


def resize(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """Gives a constant another size in every module that has it."""
    for module in (indexed, manifest, writer, verification):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, size)


def numbers(dtype: type[np.integer], seed: int = 0) -> np.ndarray:
    total = sum(sum(lengths) for lengths in DOCUMENTS)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, total).astype(dtype)


def record(digest: str = "a" * 64, vocab_size: int = 2**31) -> TokenizerRecord:
    return TokenizerRecord(path="/t", kind="unigram", hash=digest, vocab_size=vocab_size)


def write(prefix: Path, tokens: np.ndarray, origin: Origin | None = None) -> Manifest:
    lengths = [length for document in DOCUMENTS for length in document]
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    with CorpusWriter(prefix, tokens.dtype) as writer:
        writer.append(tokens, lengths, ends)
        return writer.finish(origin)


def write_with_megatron(prefix: Path, tokens: np.ndarray) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=tokens.dtype.type)
    at = 0
    for document in DOCUMENTS:
        for length in document:
            builder.add_item(torch.from_numpy(tokens[at : at + length].astype(np.int64)))
            at += length
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_files_are_megatrons_to_the_byte(dtype: type[np.integer], tmp_path: Path) -> None:
    tokens = numbers(dtype)
    write(tmp_path / "ours", tokens)
    write_with_megatron(tmp_path / "theirs", tokens)
    for extension in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{extension}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(dtype: type[np.integer], tmp_path: Path) -> None:
    tokens = numbers(dtype)
    write(tmp_path / "c", tokens)
    theirs = IndexedDataset(str(tmp_path / "c"))
    lengths = [length for document in DOCUMENTS for length in document]
    assert theirs.sequence_lengths.tolist() == lengths
    assert theirs.document_indices.tolist() == [0, *np.cumsum([len(d) for d in DOCUMENTS])]
    for i, expected in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        assert theirs[i].dtype == dtype
        assert np.array_equal(theirs[i], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(dtype: type[np.integer], tmp_path: Path) -> None:
    tokens = numbers(dtype)
    write_with_megatron(tmp_path / "c", tokens)
    reader = IndexedReader(tmp_path / "c")
    assert type(reader.tokens) is np.ndarray and reader.dtype == dtype
    assert np.array_equal(reader.tokens, tokens)
    lengths = np.array([sum(document) for document in DOCUMENTS])
    assert reader.document_lengths.dtype == reader.document_offsets.dtype == np.int64
    assert np.array_equal(reader.document_lengths, lengths)
    assert np.array_equal(reader.document_offsets, np.cumsum(lengths) - lengths)
    assert np.array_equal(reader.document(2), tokens[3:11])
    counts = (reader.num_documents, reader.num_sequences, reader.num_tokens)
    assert counts == (len(DOCUMENTS), sum(map(len, DOCUMENTS)), len(tokens))


def test_streaming_equals_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, "CHUNK", 3)  # the index is put together three entries at a time
    resize(monkeypatch, "BLOCK_BYTES", 10)
    lengths = np.array([3, 0, 5, 2, 0, 0, 9, 1, 4, 0])
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    for name, cuts in (("whole", [10]), ("pieces", [1, 2, 5, 6, 10])):
        with CorpusWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            first = 0
            for last in cuts:
                part = slice(lengths[:first].sum(), lengths[:last].sum())
                writer.append_documents(tokens[part], lengths[first:last])
                first = last
            writer.finish()
    whole, pieces = load_manifest(tmp_path / "whole"), load_manifest(tmp_path / "pieces")
    assert whole == pieces and whole.empty_documents == 4 and len(whole.bin_blocks) == 5
    assert np.array_equal(IndexedReader(tmp_path / "pieces").document_lengths, lengths)
    assert verify(tmp_path / "pieces") == whole


def test_empty_corpus(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.append_documents(np.empty(0, np.uint16), [0, 0])
        writer.finish()
    reader = IndexedReader(tmp_path / "c")
    assert (reader.num_documents, reader.num_tokens) == (2, 0)
    assert verify(tmp_path / "c").empty_documents == 2


def test_megatrons_dtype_rule() -> None:
    assert [token_dtype(n) for n in (65_499, 65_500)] == [np.uint16, np.int32]


def test_nothing_is_left_of_an_unfinished_corpus(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.append_documents(np.arange(3), [3])
        assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_corpus_is_not_overwritten_unasked(tmp_path: Path) -> None:
    first = write(tmp_path / "c", numbers(np.uint16))
    with pytest.raises(UserError, match="c.json: exists already; .* --overwrite"):
        CorpusWriter(tmp_path / "c", np.dtype(np.uint16))
    with CorpusWriter(tmp_path / "c", np.dtype(np.uint16), overwrite=True) as writer:
        writer.append_documents(np.arange(3), [3])
        assert load_manifest(tmp_path / "c") == first  # untouched until the new one is whole
        writer.finish()
    assert load_manifest(tmp_path / "c").tokens == 3


# Damage: (file, what is done to its bytes, what the message says).
HEADER = struct.Struct("<9sQBQQ")
SEQUENCES, ENTRIES = sum(map(len, DOCUMENTS)), len(DOCUMENTS) + 1


def altered_header(**changes: int) -> bytes:
    values = {"version": 1, "code": 8, "sequences": SEQUENCES, "entries": ENTRIES} | changes
    return HEADER.pack(b"MMIDIDX\x00\x00", *values.values())


def at(offset: int, new: bytes):
    return lambda data: data[:offset] + new + data[offset + len(new) :]


TABLE_AT = HEADER.size + 12 * SEQUENCES
DAMAGE = {
    "bin truncated": ("bin", lambda data: data[:-1], "c.bin: truncated: 59 bytes where .* 60"),
    "bin too long": ("bin", lambda data: data + b"\0\0", "c.bin: too long: 62 bytes where .* 60"),
    "bin empty": ("bin", lambda data: b"", "c.bin: truncated: 0 bytes"),
    "idx truncated": ("idx", lambda data: data[:-8], "c.idx: truncated"),
    "idx too long": ("idx", lambda data: data + b"\0", "c.idx: too long"),
    "idx cut in the header": ("idx", lambda data: data[:20], "c.idx: truncated: 20 bytes"),
    "idx empty": ("idx", lambda data: b"", "c.idx: truncated: 0 bytes"),
    "magic": ("idx", at(0, b"X"), "c.idx: not a Megatron index"),
    "old format": ("idx", at(0, b"TNTIDX\0\0\0"), "c.idx: TNTIDX, the old cached format"),
    "version": ("idx", at(0, altered_header(version=2)), "c.idx: index version 2"),
    "float": ("idx", at(0, altered_header(code=7)), "c.idx: dtype code 7"),
    "no such dtype": ("idx", at(0, altered_header(code=77)), "c.idx: dtype code 77"),
    "other dtype": ("idx", at(0, altered_header(code=4)), "c.idx: damaged: byte offsets"),
    "huge count": ("idx", at(0, altered_header(sequences=1 << 60)), "c.idx: truncated"),
    "no table": ("idx", at(0, altered_header(entries=0)), "c.idx: too long"),
    "length": ("idx", at(34, b"\4"), "c.idx: damaged: byte offsets .* sequences 0 to"),
    "negative length": ("idx", at(34, b"\xff\xff\xff\xff"), "c.idx: damaged: negative sequence length"),
    "offset": ("idx", at(34 + 4 * SEQUENCES + 8, b"\x07"), "c.idx: damaged: byte offsets"),
    "table start": ("idx", at(TABLE_AT, b"\1"), "c.idx: damaged: the document table"),
    "table order": ("idx", at(TABLE_AT + 16, b"\7"), "c.idx: damaged: the document table"),
    "table end": ("idx", at(TABLE_AT + 8 * ENTRIES - 8, b"\7"), "c.idx: damaged: the document table"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / "c", numbers(np.uint16))
    extension, change, message = DAMAGE[name]
    path = tmp_path / f"c.{extension}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "c")


@pytest.mark.parametrize("extension", ["bin", "idx"])
def test_missing_files_are_named(extension: str, tmp_path: Path) -> None:
    write(tmp_path / "c", numbers(np.uint16))
    (tmp_path / f"c.{extension}").unlink()
    with pytest.raises(UserError, match=f"c.{extension}: no such file; give the prefix"):
        IndexedReader(tmp_path / "c")


def test_fairseqs_index_is_told_apart(tmp_path: Path) -> None:
    sizes, offsets = np.array([3, 4], np.int32), np.array([0, 12], np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 4, 2)
    (tmp_path / "c.idx").write_bytes(head + sizes.tobytes() + offsets.tobytes())
    (tmp_path / "c.bin").write_bytes(bytes(28))
    for read in (IndexedReader, load_manifest, verify, lambda prefix: adopt(prefix, Origin())):
        advice = f"c.idx: fairseq's mmap format, .*: python -m tools.import_fairseq {tmp_path}/c --tok"
        with pytest.raises(UserError, match=advice):
            read(tmp_path / "c")


def test_multimodal_modes_are_skipped(tmp_path: Path) -> None:
    tokens = numbers(np.uint16)
    write(tmp_path / "c", tokens)
    with (tmp_path / "c.idx").open("ab") as index:
        index.write(bytes(SEQUENCES))
    assert np.array_equal(IndexedReader(tmp_path / "c").tokens, tokens)


def test_verify_names_the_first_bad_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, "BLOCK_BYTES", 16)
    write(tmp_path / "c", numbers(np.uint16))
    done: list[int] = []
    verify(tmp_path / "c", done.append)
    assert sum(done) == sum((tmp_path / f"c.{end}").stat().st_size for end in ("bin", "idx"))
    path = tmp_path / "c.bin"
    data = bytearray(path.read_bytes())
    for i, span in ((57, "48 to 59"), (20, "16 to 31")):
        data[i] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"c.bin: bytes {span} differ from the manifest"):
            verify(tmp_path / "c")


def test_verify_notices_another_corpus(tmp_path: Path) -> None:
    write(tmp_path / "c", numbers(np.uint16))
    with CorpusWriter(tmp_path / "d", np.dtype(np.uint16)) as writer:
        writer.append_documents(np.arange(3), [3])
        writer.finish()
    for extension in ("bin", "idx"):
        shutil.copy(tmp_path / f"d.{extension}", tmp_path / f"c.{extension}")
    with pytest.raises(UserError, match="another corpus was copied over this one"):
        verify(tmp_path / "c")


def test_ids_outside_the_vocabulary_are_found(tmp_path: Path) -> None:
    tokens = np.arange(30, dtype=np.uint16)
    write(tmp_path / "c", tokens, Origin(tokenizer=record(vocab_size=30)))
    verify(tmp_path / "c")
    write(tmp_path / "d", tokens, Origin(tokenizer=record(vocab_size=29)))
    with pytest.raises(UserError, match="token 29 has id 29, outside the 29 ids"):
        verify(tmp_path / "d")


def test_manifest_tells_content(tmp_path: Path) -> None:
    tokens = numbers(np.uint16)
    origin = Origin(tokenizer=record(), text_bytes=99, history={"holdout": 0.1})
    first = write(tmp_path / "a", tokens, origin)
    assert load_manifest(tmp_path / "a") == first
    counts = (first.documents, first.sequences, first.tokens, first.empty_documents, first.dtype)
    assert counts == (len(DOCUMENTS), SEQUENCES, len(tokens), 4, "uint16")
    elsewhere = origin.model_copy(update={"history": {}, "inputs": []})
    assert write(tmp_path / "b", tokens, elsewhere).fingerprint == first.fingerprint
    others = [
        write(tmp_path / "c", tokens[::-1].copy(), origin),
        write(tmp_path / "d", tokens, Origin(tokenizer=record("b" * 64))),
        write(tmp_path / "e", tokens.astype(np.int32), origin),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 31}, "does not match its own fingerprint"),
        ({"format": 2}, "manifest format 2, this version reads 1"),
        ({"tokens": "many"}, "not a corpus manifest: tokens: "),
        ({"colour": 1}, "not a corpus manifest: colour: "),
    ],
)
def test_edited_manifests_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path / "c", numbers(np.uint16))
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"c.json: {message}"):
        load_manifest(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(UserError, match="c.json: not a corpus manifest"):
        load_manifest(tmp_path / "c")
    path.unlink()
    with pytest.raises(UserError, match="c.json: no manifest"):
        load_manifest(tmp_path / "c")


def described(prefix: Path) -> None:
    """Documents of two sources: 3 and 0 tokens of one, 4 of the other."""
    sources = {
        "books": Tally(documents=2, tokens=3, text_bytes=20),
        "web": Tally(documents=1, tokens=4, text_bytes=30),
    }
    with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
        codes = [writer.source(name) for name in ("books", "web", "books")]
        writer.append_documents(np.arange(7), [3, 4, 0], codes)
        writer.finish(Origin(tokenizer=record(), text_bytes=50, sources=sources))


def edit(prefix: Path, change: Callable[[dict[str, Any]], None], sealed: bool) -> None:
    """Change a manifest, or one from before there were seals."""
    path = indexed.corpus_file(prefix, "json")
    content = json.loads(path.read_text())
    change(content)
    if not sealed:
        del content["seal"]
    path.write_text(json.dumps(content))


def renamed(content: dict[str, Any]) -> None:
    content["sources"]["news"] = content["sources"].pop("web")


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "text": (lambda content: content.update(text_bytes=49), "text_bytes = 49, but its sources have 50"),
    "more text": (lambda content: content.update(text_bytes=51), "text_bytes = 51, but its sources have 50"),
    "renamed": (renamed, "says 0 documents and 0 tokens of source 'web', PREFIX.src has 1 and 4"),
    "renamed code": (
        lambda content: content.update(source_names=["books", "sport"]),
        "0 documents and 0 tokens of source 'sport'",
    ),
    "added": (
        lambda content: content["sources"].update(news={"documents": 0, "tokens": 0, "text_bytes": 0}),
        "PREFIX.src has no source news",
    ),
    "documents": (
        lambda content: content["sources"]["web"].update(documents=2),
        "says 2 documents and 4 tokens of source 'web'",
    ),
    "tokens": (
        lambda content: content["sources"]["books"].update(tokens=4),
        "says 2 documents and 4 tokens of source 'books'",
    ),
    "empty": (lambda content: content.update(empty_documents=2), "says 2 empty documents, the index has 1"),
    "no hashes": (
        lambda content: content.update(src_blocks=[]),
        "c.src: has 1 blocks of 16777216 bytes, the manifest has hashes of 0",
    ),
    "other blocks": (lambda content: content.update(block_bytes=8), "c.bin: has 2 blocks of 8 bytes"),
    "no blocks": (lambda content: content.update(block_bytes=0), "not a corpus manifest: block_bytes"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("sealed", [True, False])
def test_what_else_a_manifest_says_is_verified(name: str, sealed: bool, tmp_path: Path) -> None:
    described(tmp_path / "c")
    verify(tmp_path / "c")
    change, message = EDITS[name]
    edit(tmp_path / "c", change, sealed)
    message = "does not match its own seal" if sealed and name != "no blocks" else message
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "c")


def test_only_the_seal_protects_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described(tmp_path / "c")
    before = load_manifest(tmp_path / "c")
    edit(tmp_path / "c", lambda content: content.update(history={"holdout": 0.5}), sealed=True)
    assert load_manifest(tmp_path / "c").fingerprint == before.fingerprint  # a run goes on
    for refused in (verify, lambda prefix: merge([prefix], tmp_path / "m")):
        with pytest.raises(UserError, match="c.json: does not match its own seal"):
            refused(tmp_path / "c")
    described(tmp_path / "d")
    verify_corpus.main([str(tmp_path / "d")])
    assert "no seal" not in capsys.readouterr().out
    edit(tmp_path / "d", lambda content: None, sealed=False)
    verify_corpus.main([str(tmp_path / "d")])
    assert "its manifest has no seal" in capsys.readouterr().out


def test_adopt_a_foreign_corpus(tmp_path: Path) -> None:
    tokens, origin = numbers(np.uint16), Origin(tokenizer=record())
    write_with_megatron(tmp_path / "theirs", tokens)
    adopted = adopt(tmp_path / "theirs", origin)
    assert adopted == write(tmp_path / "ours", tokens, origin) == verify(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_merge_equals_megatrons(
    dtype: type[np.integer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize(monkeypatch, "BLOCK_BYTES", 6)  # a few documents at a time
    prefixes = [tmp_path / name for name in "abc"]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for i, prefix in enumerate(prefixes):
        tally = Tally(documents=1, tokens=2, text_bytes=i)
        sources = {"novels": tally, prefix.name: tally}
        write(prefix, numbers(dtype, i), Origin(tokenizer=record(), text_bytes=2 * i, sources=sources))
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    manifest = merge(prefixes, tmp_path / "ours")
    for extension in ("bin", "idx"):
        assert (tmp_path / f"ours.{extension}").read_bytes() == (
            tmp_path / f"theirs.{extension}"
        ).read_bytes()
    assert verify(tmp_path / "ours") == manifest
    assert (manifest.documents, manifest.empty_documents, manifest.text_bytes) == (27, 12, 6)
    assert manifest.sources["novels"] == Tally(documents=3, tokens=6, text_bytes=3)
    assert set(manifest.sources) == {"novels", "a", "b", "c"}
    assert [entry["fingerprint"] for entry in manifest.history["merged"]] == [
        load_manifest(prefix).fingerprint for prefix in prefixes
    ]


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    tokens = numbers(np.uint16)
    write(tmp_path / "a", tokens, Origin(tokenizer=record()))
    write(tmp_path / "b", tokens, Origin(tokenizer=record("b" * 64)))
    write(tmp_path / "c", tokens.astype(np.int32), Origin(tokenizer=record()))
    write_with_megatron(tmp_path / "d", tokens)
    for other in "bc":
        with pytest.raises(UserError, match=f"{other}: its tokenizer or dtype is not that of"):
            merge([tmp_path / "a", tmp_path / other], tmp_path / "out")
    with pytest.raises(UserError, match="d.json: no manifest"):
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "out")
    with pytest.raises(UserError, match="is also an input"):
        merge([tmp_path / "a"], tmp_path / "a", overwrite=True)
    assert load_manifest(tmp_path / "a").tokens == len(tokens)
    assert not list(tmp_path.glob("out*"))


# ---- sizes that overflow 32 bits -----------------------------------------------------------------


def sparse_corpus(prefix: Path, length: int, sequences: int, tokenizer: TokenizerRecord) -> None:
    """A corpus of `sequences` x `length` tokens that are all 0 but the last: holes, not bytes."""
    dtype = np.dtype(np.int32)
    lengths = np.full(sequences, length, "<i4")
    pointers = np.arange(sequences, dtype="<i8") * length * dtype.itemsize
    head = indexed.HEADER.pack(indexed.MAGIC, 1, 4, sequences, sequences + 1)
    table = np.arange(sequences + 1, dtype="<i8")
    index = head + lengths.tobytes() + pointers.tobytes() + table.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(sequences * length * dtype.itemsize)
        file.seek(-dtype.itemsize, 2)
        file.write(dtype.type(1234).tobytes())
    counts = (sequences, sequences, sequences * length, 0)
    blocks = {"bin": ["not read"], "idx": ["not read"]}
    write_manifest(prefix, dtype, counts, blocks, Origin(tokenizer=tokenizer), [])


def test_past_2_31_tokens_and_2_40_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length, sequences = 2**31 - 1, 129  # 1.1 TB of holes
    sparse_corpus(tmp_path / "a", length, sequences, record())
    reader = IndexedReader(tmp_path / "a")
    assert reader.num_tokens == length * sequences > 2**38
    assert indexed.corpus_file(tmp_path / "a", "bin").stat().st_size > 2**40
    assert reader.document_lengths.sum() == reader.num_tokens
    assert reader.tokens[-1] == reader.document(sequences - 1)[-1] == 1234
    assert IndexedDataset(str(tmp_path / "a")).get(sequences - 1, length - 1, 1).tolist() == [1234]

    def copy_holes(self: Any, path: Path, start: int, size: int, progress: Any) -> None:
        self.file.truncate(self.file.seek(0, 2) + size)  # the bytes themselves: test_merge_equals_megatrons

    monkeypatch.setattr(_HashedFile, "copy", copy_holes)
    write(tmp_path / "b", np.arange(30, dtype=np.int32), Origin(tokenizer=record()))
    manifest = merge([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "out")
    assert manifest.tokens == 2 * reader.num_tokens + 30
    out = IndexedReader(tmp_path / "out")  # its check: byte offsets follow from the lengths
    assert out.token_offsets(out.document_table[[0, 129, -2, -1]]).tolist() == [
        0,
        reader.num_tokens,
        manifest.tokens - length,
        manifest.tokens,
    ]
    theirs = IndexedDataset(str(tmp_path / "out"))
    assert theirs.sequence_lengths.astype(np.int64).sum() == manifest.tokens
    assert theirs.index.sequence_pointers[-1] == (manifest.tokens - length) * 4 > 2**41


def test_a_sequence_beyond_the_format_is_refused(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.uint16(0), 2**31)
    with (
        CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as writer,
        pytest.raises(UserError, match=r"sequence of 2147483648 tokens; the format ends at 2\*\*31-1"),
    ):
        writer.append_documents(huge, [2**31])


@pytest.mark.parametrize("failing", [False, True])
def test_documents_can_be_left_out_of_a_copy(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel cannot copy: another file system, an old kernel."""
    resize(monkeypatch, "CHUNK", 2)
    resize(monkeypatch, "_COPY_BYTES", 5)
    if failing:

        def refuse(*arguments: Any, **named: Any) -> int:
            raise OSError(errno.EXDEV, "other file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    tokens = numbers(np.uint16)
    write(tmp_path / "a", tokens, Origin(tokenizer=record()))
    reader = IndexedReader(tmp_path / "a")
    for dropped in ([], [0], [2, 3, 8], list(range(9))):
        kept = [reader.document(i) for i in range(9) if i not in dropped]
        with CorpusWriter(tmp_path / "c", np.dtype(np.uint16), overwrite=True) as writer:
            writer.append_corpus(tmp_path / "a", dropped)
            writer.finish()
        assert verify(tmp_path / "c").empty_documents == sum(not len(document) for document in kept)
        copy = IndexedReader(tmp_path / "c")
        assert [copy.document(i).tolist() for i in range(copy.num_documents)] == [k.tolist() for k in kept]
