"""Look into a corpus: counts, lengths, frequent tokens, some documents, a window as the model sees it.

Works on any Megatron indexed dataset; text is shown where a tokenizer is known, from the manifest or
from ``--tokenizer``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import Masking, UserError
from pretrain.corpus import IndexedReader, Manifest, corpus_file, load_manifest
from pretrain.masking import Masker
from pretrain.sampler import Sampler
from pretrain.tokenizer import Tokenizer, load_tokenizer
from tools import console

_CHUNK = 1 << 22
_EXCERPT = 48
"""Tokens of a document that are shown."""
_WINDOW = 96
"""Length of the masked window that is shown."""


def lengths(reader: IndexedReader) -> dict[str, float]:
    """Statistics of the documents' lengths in tokens."""
    sizes = reader.document_lengths
    if not len(sizes):
        return {}
    low, median, high, top = np.percentile(sizes, (10, 50, 90, 99)).tolist()
    return {
        "mean": float(sizes.mean()),
        "min": int(sizes.min()),
        "p10": low,
        "median": median,
        "p90": high,
        "p99": top,
        "max": int(sizes.max()),
    }


def frequencies(reader: IndexedReader, vocab_size: int) -> np.ndarray:
    """Occurrences of each id: int64 [W]; UserError where an id is outside the vocabulary."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, reader.num_tokens, _CHUNK):
        chunk = np.bincount(reader.tokens[start : start + _CHUNK], minlength=vocab_size)
        if len(chunk) > vocab_size:
            raise UserError(
                f"{reader.prefix}.bin: id {len(chunk) - 1} is outside the {vocab_size} of the "
                "tokenizer; it was encoded with another"
            )
        counts += chunk
    return counts


def frequent(counts: np.ndarray, tokenizer: Tokenizer | None, top: int) -> list[dict[str, Any]]:
    """The most frequent ids with their share of all tokens."""
    order = np.argsort(-counts, kind="stable")[:top]
    return [
        {
            "id": int(i),
            "piece": tokenizer.piece(i) if tokenizer else None,
            "count": int(counts[i]),
            "share": float(counts[i] / counts.sum()),
        }
        for i in order
        if counts[i]
    ]


def documents(reader: IndexedReader, tokenizer: Tokenizer | None, number: int) -> list[dict[str, Any]]:
    """The beginnings of `number` documents, evenly spread over those with text."""
    filled = np.flatnonzero(reader.document_lengths)
    chosen = filled[np.linspace(0, len(filled) - 1, min(number, len(filled)), dtype=np.int64)]
    return [
        {
            "document": int(i),
            "tokens": int(reader.document_lengths[i]),
            "ids": (ids := reader.document(i)[:_EXCERPT].tolist()),
            "text": tokenizer.decode(ids) if tokenizer else None,
        }
        for i in chosen
    ]


def masked_window(reader: IndexedReader, tokenizer: Tokenizer, rate: float, length: int) -> str:
    """One training window, {piece} where it is masked, {right>wrong} where replaced, {=piece} kept."""
    masking = Masking(rate=rate)
    special = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.random_ids)
    masker = Masker(masking, length, tokenizer.mask, tokenizer.random_ids, special)
    window = Sampler(reader, masking, length, 0, tokenizer.bos, tokenizer.eos).read(np.zeros(1, np.int64))
    masked = masker(window.tokens, window.keys, window.views)
    seen, predicted = np.empty(length, np.int64), np.zeros(length, dtype=bool)
    seen[masked.positions[0]] = masked.ids[0]
    predicted[masked.positions[0, length - masker.counts.predicted :]] = True
    words = (
        _mark(tokenizer, int(true), int(shown)) if chosen else tokenizer.piece(int(true))
        for true, shown, chosen in zip(window.tokens[0], seen, predicted, strict=True)
    )
    return "".join(words).replace("\u2581", " ").replace("\u0120", " ").strip()


def _mark(tokenizer: Tokenizer, true: int, shown: int) -> str:
    if shown == tokenizer.mask:
        return f"{{{tokenizer.piece(true)}}}"
    if shown == true:
        return f"{{={tokenizer.piece(true)}}}"
    return f"{{{tokenizer.piece(true)}>{tokenizer.piece(shown)}}}"


def find_tokenizer(manifest: Manifest | None, directory: str | None) -> Tokenizer | None:
    """The tokenizer given, else the one the manifest names if it is still there and the same."""
    record = manifest.tokenizer if manifest else None
    if directory is None and record and Path(record.path).is_dir():
        directory = record.path
    if directory is None:
        return None
    tokenizer = load_tokenizer(directory)
    if record and tokenizer.hash != record.hash:
        raise UserError(
            f"{directory}: not the tokenizer of this corpus (another hash); "
            "give the right one with --tokenizer"
        )
    return tokenizer


def inspect(prefix: str, directory: str | None, top: int, samples: int, rate: float) -> dict[str, Any]:
    """The report."""
    reader = IndexedReader(prefix)
    manifest = load_manifest(prefix) if corpus_file(prefix, "json").exists() else None
    tokenizer = find_tokenizer(manifest, directory)
    vocab_size = tokenizer.vocab_size if tokenizer else int(np.iinfo(reader.dtype).max) + 1
    report: dict[str, Any] = {
        "prefix": prefix,
        "documents": reader.num_documents,
        "empty_documents": int(np.count_nonzero(reader.document_lengths == 0)),
        "sequences": reader.num_sequences,
        "tokens": reader.num_tokens,
        "dtype": reader.dtype.name,
        "lengths": lengths(reader),
        "samples": documents(reader, tokenizer, samples),
    }
    if manifest:
        report["manifest"] = manifest.model_dump(exclude={"bin_blocks", "idx_blocks"})
    if reader.dtype.itemsize <= 2 or tokenizer:
        counts = frequencies(reader, vocab_size)
        report["frequent"] = frequent(counts, tokenizer, top)
    if tokenizer:
        report["unknown"] = int(counts[tokenizer.unk])
        specials = [tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.mask]
        report["specials_inside"] = int(counts[specials].sum())
    if tokenizer and reader.num_tokens >= _WINDOW:
        report["masked_window"] = masked_window(reader, tokenizer, rate, _WINDOW)
    return report


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    print(
        f"{report['prefix']}: {report['documents']:,} documents ({report['empty_documents']:,} empty), "
        f"{report['sequences']:,} sequences, {report['tokens']:,} tokens ({report['dtype']})"
    )
    stats = (f"{name} {value:,.0f}" for name, value in report["lengths"].items())
    print("tokens a document: " + ", ".join(stats))
    manifest = report.get("manifest")
    if manifest is None:
        print("no manifest: written by another program, or unfinished")
    elif manifest["text_bytes"]:
        print(
            f"{manifest['text_bytes'] / 1e6:,.2f} MB of text, "
            f"{manifest['text_bytes'] / max(1, report['tokens']):.2f} bytes a token"
        )
        for name, tally in manifest["sources"].items():
            print(
                f"  {name}: {tally['documents']:,} documents, {tally['tokens']:,} tokens, "
                f"{tally['text_bytes'] / 1e6:,.2f} MB"
            )
    for item in report.get("frequent", []):
        print(f"  {item['share']:7.2%}  {item['id']:>6}  {item['piece'] or ''}")
    if "unknown" in report:
        print(f"unknown pieces: {report['unknown']:,}; special ids inside: {report['specials_inside']:,}")
    if report.get("specials_inside"):
        print("  documents that end in </s> get a second one between them: encode without --append-eod")
    for item in report["samples"]:
        text = item["text"] if item["text"] is not None else item["ids"]
        print(f"\ndocument {item['document']} ({item['tokens']:,} tokens): {text}")
    if "masked_window" in report:
        print("\na window as the model sees it ({masked}, {right>wrong}, {=kept}):")
        print(report["masked_window"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("inspect_corpus", "Look into a corpus", True)
    parser.add_argument("prefix", metavar="PREFIX", help="prefix of the corpus")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the one in the manifest")
    parser.add_argument("--top", type=int, default=20, help="frequent tokens to show (%(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="documents to show (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.15, help="mask rate to show (%(default)s)")
    args = parser.parse_args(arguments)
    if not 0 < args.rate < 1:
        raise UserError(f"--rate {args.rate}: a share of the tokens, between 0 and 1")
    report = inspect(args.prefix, args.tokenizer, args.top, args.samples, args.rate)
    if args.json:
        console.print_json(report)
    else:
        show(report)
    return 0


if __name__ == "__main__":
    console.run(main)
