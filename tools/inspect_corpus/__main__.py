"""Look into a corpus: counts, lengths, frequent tokens, some documents, a window as each method sees it.

Works on any Megatron indexed dataset; text is shown where a tokenizer is known, from the manifest or
from ``--tokenizer``. ``--html FILE`` writes the same as a page.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import MaskingOptions
from pretrain.data.indexed import IndexedReader, corpus_file
from pretrain.data.manifest import APPENDED_END, Manifest, load_manifest
from pretrain.data.masking import masker as masker_of
from pretrain.data.sampler import Sampler
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import UserError
from tools.encode_corpus.__main__ import describe_literals
from tools.inspect_corpus.page import one_line, page
from tools.shared import console, outputs

_CHUNK = 1 << 22
_EXCERPT = 48
"""Tokens of a document that are shown."""
_WINDOW = 96
"""Length of the masked window that is shown."""


def lengths(reader: IndexedReader) -> dict[str, float]:
    """Return the statistics of the documents' lengths in tokens."""
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
    """Return the occurrences of each id: int64 [W]; UserError where an id is outside the vocabulary."""
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


def specials_inside(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, int]:
    """Return how often each special piece stands in a corpus, of those that do."""
    return {name: int(counts[i]) for name, i in tokenizer.special_names().items() if counts[i]}


def frequent(counts: np.ndarray, tokenizer: Tokenizer | None, top: int) -> list[dict[str, Any]]:
    """Return the most frequent ids with their share of all tokens."""
    order = np.argsort(-counts, kind="stable")[:top]
    return [
        {
            "id": int(i),
            "piece": tokenizer.piece(i) if tokenizer else None,
            "text": tokenizer.readable(i) if tokenizer else None,
            "count": int(counts[i]),
            "share": float(counts[i] / counts.sum()),
        }
        for i in order
        if counts[i]
    ]


def documents(reader: IndexedReader, tokenizer: Tokenizer | None, number: int) -> list[dict[str, Any]]:
    """Return the beginnings of `number` documents, evenly spread over those with text."""
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


def histogram(reader: IndexedReader) -> list[dict[str, int]]:
    """Return the documents by length: 0, 1, 2-3, 4-7, ... tokens, without empty ends."""
    bits = np.bincount(np.frexp(reader.document_lengths.astype(np.float64))[1], minlength=1)
    filled = np.flatnonzero(bits)
    if not len(filled):
        return []
    return [
        {"from": (1 << i) >> 1, "to": (1 << i) - 1, "documents": int(bits[i])}
        for i in range(filled[0], filled[-1] + 1)
    ]


def methods(rate: float) -> dict[str, MaskingOptions]:
    """Return what is shown: the methods' usual ways to mask, and the mask rate asked for."""
    all_masks = (1.0, 0.0, 0.0)
    return {
        "mlm, 15 %, uniform": MaskingOptions(rate=0.15),
        "mlm, 15 %, whole words": MaskingOptions(rate=0.15, scheme="whole_word"),
        "mlm, 15 %, spans": MaskingOptions(rate=0.15, scheme="span"),
        "3ml, 50 %, uniform": MaskingOptions(rate=0.5),
        "mae-lm, 15 %, all [MASK]": MaskingOptions(rate=0.15, corruption=all_masks),
        **({f"mlm, {100 * rate:g} %, uniform": MaskingOptions(rate=rate)} if rate != 0.15 else {}),
    }


def windows(reader: IndexedReader, tokenizer: Tokenizer, rate: float, length: int) -> list[dict[str, Any]]:
    """Return one training window under each method: its pieces as [state, true piece, shown piece].

    States: context (seen, not predicted), masked, random, kept (the last three predicted). In the late
    methods the encoder sees all but the masked.
    """
    shown = []
    for name, masking in methods(rate).items():
        masker = masker_of(masking, length, tokenizer)
        sampler = Sampler(reader, masking, length, 0, tokenizer.bos, tokenizer.eos)
        window = sampler.read(np.zeros(1, np.int64))
        masked = masker(window.tokens, window.keys, window.views)
        seen, predicted = np.empty(length, np.int64), np.zeros(length, dtype=bool)
        seen[masked.positions[0]] = masked.ids[0]
        predicted[masked.positions[0, length - masker.counts.predicted :]] = True
        rows = zip(window.tokens[0].tolist(), seen.tolist(), predicted.tolist(), strict=True)
        pieces = [[_state(tokenizer, *row), *map(tokenizer.readable, row[:2])] for row in rows]
        shown.append({"method": name, "pieces": pieces})
    return shown


def _state(tokenizer: Tokenizer, true: int, shown: int, predicted: bool) -> str:
    if not predicted:
        return "context"
    if shown == tokenizer.mask:
        return "masked"
    return "kept" if shown == true else "random"


def mark(state: str, true: str, shown: str) -> str:
    """Return {piece} where it is masked, {right>wrong} where replaced, {=piece} where kept."""
    text = {"context": true, "masked": f"{{{true}}}", "kept": f"{{={true}}}", "random": f"{{{true}>{shown}}}"}
    return text[state].replace("\u2581", " ")


def find_tokenizer(manifest: Manifest | None, directory: str | None) -> Tokenizer | None:
    """Return the tokenizer given, else the one the manifest names if it is still there and the same."""
    record = manifest.tokenizer if manifest else None
    if directory is None and record and Path(record.path).exists():
        directory = record.path
    if directory is None:
        if record:
            print(
                f"no text is shown: its tokenizer is not at {record.path} any more; name it with --tokenizer",
                file=sys.stderr,
            )
        return None
    tokenizer = load_tokenizer(directory, need_specials=False)
    if record and tokenizer.hash != record.hash:
        raise UserError(
            f"{directory}: not the tokenizer of this corpus (another hash); "
            "give the right one with --tokenizer"
        )
    return tokenizer


def inspect(prefix: str, directory: str | None, top: int, samples: int, rate: float) -> dict[str, Any]:
    """Return the report."""
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
        "histogram": histogram(reader),
        "samples": documents(reader, tokenizer, samples),
    }
    if manifest:
        report["manifest"] = manifest.model_dump(exclude={"bin_blocks", "idx_blocks"})
    if reader.dtype.itemsize <= 2 or tokenizer:
        counts = frequencies(reader, vocab_size)
        report["frequent"] = frequent(counts, tokenizer, top)
    if tokenizer:
        inside = specials_inside(counts, tokenizer)
        report["unknown"] = inside.pop(tokenizer.piece(tokenizer.unk), 0) if tokenizer.unk >= 0 else 0
        report["specials_inside"] = sum(inside.values())
    if tokenizer and not tokenizer.missing and reader.num_tokens >= _WINDOW:
        report["windows"] = windows(reader, tokenizer, rate, _WINDOW)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    print(
        f"{report['prefix']}: {report['documents']:,} documents ({report['empty_documents']:,} empty), "
        f"{report['sequences']:,} sequences, {report['tokens']:,} tokens ({report['dtype']})"
    )
    stats = (f"{name} {value:,.0f}" for name, value in report["lengths"].items())
    print("tokens a document: " + ", ".join(stats))
    most = max((bin["documents"] for bin in report["histogram"]), default=1)
    for bin in report["histogram"]:
        bar = "#" * math.ceil(40 * bin["documents"] / most)
        print(f"  {bin['from']:>9,} to {bin['to']:>9,}: {bin['documents']:>9,} {bar}")
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
                f"  {console.printable(name)}: {tally['documents']:,} documents, {tally['tokens']:,} tokens, "
                f"{tally['text_bytes'] / 1e6:,.2f} MB"
            )
    for item in report.get("frequent", []):
        text = console.printable(one_line(item["text"] or ""))
        print(f"  {item['share']:7.2%}  {item['id']:>6}  {text}")
    if "unknown" in report:
        print(f"unknown pieces: {report['unknown']:,}; special ids inside: {report['specials_inside']:,}")
    history = manifest["history"] if manifest else {}
    for line in describe_literals(history.get("literals", {}), history.get("map_literal", [])):
        print(line)
    if end := history.get(APPENDED_END):
        print(f"{end['piece']} (id {end['id']}) stands after each document, for another program's training")
    elif report.get("specials_inside"):
        print("  documents that end in </s> get a second one between them: encode without --append-eod")
    for item in report["samples"]:
        text = item["text"] if item["text"] is not None else item["ids"]
        print(f"\ndocument {item['document']} ({item['tokens']:,} tokens): {console.printable(str(text))}")
    if "windows" in report:
        print("\na window as the model sees it ({masked}, {right>wrong}, {=kept}):")
        _show_windows(report["windows"])


def _show_windows(shown: list[dict[str, Any]]) -> None:
    """In colours on a terminal, with the marks alone elsewhere."""
    from rich.console import Console
    from rich.text import Text

    styles = {
        "context": "",
        "masked": "bold white on blue",
        "random": "white on red",
        "kept": "black on yellow",
    }
    console_out = Console(soft_wrap=True, highlight=False)
    for window in shown:
        text = Text()
        for state, true, piece in window["pieces"]:
            text.append(console.printable(mark(state, true, piece)), styles[state])
        console_out.print(Text(f"\n{window['method']}", "bold"))
        console_out.print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("inspect_corpus", "Look into a corpus", True)
    parser.add_argument("prefix", metavar="PREFIX", help="prefix of the corpus")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the one in the manifest")
    parser.add_argument(
        "--top", type=console.whole(0), default=20, help="frequent tokens to show (%(default)s)"
    )
    parser.add_argument("--samples", type=console.whole(0), default=3, help="documents to show (%(default)s)")
    parser.add_argument(
        "--rate", type=console.share, default=0.15, help="one more mask rate to show (%(default)s)"
    )
    parser.add_argument("--html", metavar="FILE", help="write the report as a page as well")
    args = parser.parse_args(arguments)
    if args.html:
        outputs.check([args.html])
    report = inspect(args.prefix, args.tokenizer, args.top, args.samples, args.rate)
    if args.html:
        outputs.write(args.html, page(report))
    if args.json:
        console.print_json(report)
    else:
        show(report)
    return 0


if __name__ == "__main__":
    console.run(main)
