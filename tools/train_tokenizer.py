"""Train a SentencePiece vocabulary with the specials <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.

The trainer holds its text in memory, so of a larger input a sample is used: the documents whose
salted hash is smallest, which depends on the texts alone and not on their order or on the files. One document
in a hundred is not trained on: on these the vocabulary is measured.

``--import DIR`` makes a tokenizer folder from the files of an existing byte-level vocabulary instead
(RoBERTa's, or GPT-2's with fairseq's dict.txt).
"""

import hashlib
import heapq
import json
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.data.tokenizer import (
    JSON_FILE,
    MODEL_FILE,
    PROVENANCE_FILE,
    SMALLEST,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from pretrain.errors import UserError
from pretrain.files import parse_json, write_whole
from tools.encode_corpus.parts import file_state, held_out, refuse_changed
from tools.shared import console, outputs
from tools.text.files import find_files, missing_parts, spool_stdin
from tools.text.readers import MAX_DOCUMENT_BYTES, Document, Rejected, open_reader, suspicions

_HELD_OUT = 0.01
"""Share of the documents that measure; those of `encode_corpus --holdout 0.01` too."""

_MEASURED_BYTES = 10_000_000

_SALT = b"tokenizer sample"
"""Of the hash that draws the sample. Without it the documents of the smallest hashes would be those that
`encode_corpus --holdout` holds out, and the vocabulary fitted to the text that a model is measured on."""


def sample(documents: Iterable[Document], max_bytes: int) -> tuple[list[str], int]:
    """Return the texts of at most `max_bytes` UTF-8 bytes, in order of hash, and the bytes of all documents.

    A heap keeps the documents of the smallest hashes seen so far, so memory is bounded as well.
    """
    heap: list[tuple[int, bytes]] = []
    kept = total = 0
    for document in documents:
        digest = hashlib.blake2b(document.utf8, digest_size=8, salt=_SALT).digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "little"), document.utf8))
        kept += len(document.utf8)
        total += len(document.utf8)
        while kept > max_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[1])
    return [utf8.decode() for _, utf8 in sorted(heap, reverse=True)], total


class Text:
    """All documents of some files; UserError at the first that cannot be read, unless told to keep going."""

    def __init__(self, files: Sequence[Path], args: Namespace) -> None:
        self.files, self.args = files, args
        self.rejected = 0
        """Passed over so far."""

    def __iter__(self) -> Iterator[Document]:
        args = self.args
        with console.progress("read", sum(file.stat().st_size for file in self.files)) as advance:
            for file in self.files:
                state = file_state(file)
                with open_reader(file, args.txt_document, args.text_key, args.max_document_bytes) as reader:
                    for batch in reader.read(None):
                        yield from filter(None, map(self._checked, batch.items))
                        advance(batch.disk_bytes)
                    for text in suspicions(reader.seen):
                        print(f"warning: {file}: {text}", file=sys.stderr)
                refuse_changed(file, state)

    def _checked(self, item: Document | Rejected) -> Document | None:
        if isinstance(item, Document):
            return item
        if not self.args.keep_going:
            raise UserError(f"{item}; correct it, or add --keep-going to pass over such lines")
        self.rejected += 1
        return None


class Statistic:
    """Fertility of a vocabulary on texts it was not trained on; keeps at most `_MEASURED_BYTES`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.bytes = 0

    def split(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield those to train on; some of the others stay here."""
        for document in documents:
            if not held_out(document.utf8, _HELD_OUT):
                yield document
            elif self.bytes + len(document.utf8) <= _MEASURED_BYTES:
                self.texts.append(document.text)
                self.bytes += len(document.utf8)

    def report(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Return what people compare vocabularies by; None without text."""
        words = sum(len(text.split()) for text in self.texts)
        tokens, _ = tokenizer.encode_flat(self.texts)
        if not words or not len(tokens):
            return None
        byte_ids = [i for i in range(tokenizer.vocab_size) if _is_byte(tokenizer.piece(i))]
        return {
            "documents": len(self.texts),
            "bytes": self.bytes,
            "tokens_per_word": len(tokens) / words,
            "bytes_per_token": self.bytes / len(tokens),
            "unknown_rate": float(np.mean(tokens == tokenizer.unk)),
            "byte_rate": float(np.mean(np.isin(tokens, byte_ids))),
        }


def _is_byte(piece: str) -> bool:
    """Whether this is SentencePiece's spelling of a single byte, <0x41>."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("train_tokenizer", "Train a SentencePiece vocabulary", True)
    console.add_input(parser, required=False)
    parser.add_argument(
        "--import",
        dest="source",
        metavar="DIR",
        help="instead of training, take over vocab.json + merges.txt, encoder.json + vocab.bpe + dict.txt, or"
        " tokenizer.json",
    )
    console.add_document_limit(parser, MAX_DOCUMENT_BYTES)
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="pass over unreadable lines instead of stopping at the first",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument(
        "--kind", choices=("unigram", "bpe"), default="unigram", help="of model (%(default)s)"
    )
    parser.add_argument(
        "--vocab-size",
        type=console.whole(SMALLEST),
        default=32_000,
        help="all ids, specials included (%(default)s)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=console.positive,
        default=200.0,
        help="train on a sample of this much text where there is more (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer there")
    args = parser.parse_args(arguments)
    if bool(args.source) == bool(args.input):
        raise UserError("give either --input to train on, or --import of an existing vocabulary")
    _refuse_existing(Path(args.output), args)
    report = _import(args) if args.source else _train(args)
    if args.json:
        console.print_json(report)
    else:
        _show(report)
    return 0


def _refuse_existing(output: Path, args: Namespace) -> None:
    """Raise UserError where a tokenizer is there and is not to be replaced, or is none that was made here."""
    there = [output / name for name in (MODEL_FILE, JSON_FILE) if (output / name).exists()]
    if args.source and (output.resolve() == Path(args.source).resolve() or _same(args.source, there)):
        raise UserError(f"{output}: is also what --import reads; choose another --output")
    outputs.check([output / PROVENANCE_FILE], fields=PROVENANCE)
    if there and not args.overwrite:
        raise UserError(f"{there[0]}: exists already; choose another --output or add --overwrite")
    if there and not _is_ours(output):
        raise UserError(
            f"{there[0]}: not made by this program, or changed since (see {PROVENANCE_FILE} beside it); move"
            " it away, or choose another --output"
        )


PROVENANCE = dict.fromkeys(("kind", "vocab_size", "sha256"), "")
"""By which the provenance of a tokenizer is known: a run's file has the same name."""


def _same(source: str, files: Sequence[Path]) -> bool:
    return Path(source).exists() and any(file.samefile(source) for file in files)


def _is_ours(folder: Path) -> bool:
    """Return whether the provenance beside a tokenizer is of this very one."""
    try:
        told = parse_json((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        return bool(told["sha256"] == load_tokenizer(folder, need_specials=False).hash)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False


def _train(args: Namespace) -> dict[str, Any]:
    measure = Statistic()
    with tempfile.TemporaryDirectory() as spool:
        files = find_files(spool_stdin(args.input, args.stdin, Path(spool)))
        for line in missing_parts(files):
            print(f"warning: {line}", file=sys.stderr)
        text = Text(files, args)
        texts, total = sample(measure.split(text), int(args.max_megabytes * 1e6))
    if not any(text.strip() for text in texts):
        told = f", but {_passed_over(text.rejected)}" if text.rejected else ""
        raise UserError(f"{' '.join(args.input)}: no text to train on{told}; give some")
    used = sum(len(text.encode()) for text in texts)
    about = {"version": __version__, "documents": len(texts), "bytes_used": used, "bytes": total}
    with console.signals_kill():
        print(f"training on {len(texts):,} documents, {used / 1e6:,.1f} MB of text", file=sys.stderr)
        reserved: Counter[str] = Counter()
        tokenizer = train_sentencepiece(texts, args.output, args.kind, args.vocab_size, about, reserved)
    report = _about(args.output, tokenizer) | about | {"reserved": dict(reserved)}
    return report | {"rejected": text.rejected, "held_out": measure.report(tokenizer)}


def _import(args: Namespace) -> dict[str, Any]:
    from tools.text.byte_level import convert

    text = convert(Path(args.source))
    with tempfile.TemporaryDirectory() as trial:
        write_whole(Path(trial, JSON_FILE), text.encode())
        try:
            load_tokenizer(trial, need_specials=False)
        except UserError as error:
            raise UserError(str(error).replace(f"{trial}/{JSON_FILE}", args.source)) from error
    text, switched_off = without_state(text)
    write_whole(Path(args.output, JSON_FILE), text.encode())
    Path(args.output, MODEL_FILE).unlink(missing_ok=True)  # it would come first; --overwrite was given
    tokenizer = load_tokenizer(args.output, need_specials=False)
    about = {"missing": tokenizer.missing, "switched_off": switched_off}
    made = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.hash}
    made |= {"version": __version__, "imported": str(Path(args.source).resolve())}
    outputs.write(Path(args.output, PROVENANCE_FILE), json.dumps(made, indent=1) + "\n", PROVENANCE)
    return _about(args.output, tokenizer) | about


def without_state(text: str) -> tuple[str, list[str]]:
    """Return a tokenizer.json without what makes ids depend on chance or on a length, and what that was."""
    spec = parse_json(text)
    places = {"truncation": spec, "padding": spec, "dropout": spec["model"]}
    found = [name for name, place in places.items() if place.get(name) is not None]
    for name in found:
        places[name][name] = None
    return (json.dumps(spec, ensure_ascii=False) if found else text), found


def _about(path: str, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "path": path,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
    }


def _show(report: dict[str, Any]) -> None:
    print(f"{report['path']}: {report['kind']}, {report['vocab_size']:,} ids")
    if report.get("switched_off"):
        print(f"switched off, which its file had on: {', '.join(report['switched_off'])}")
    if report.get("missing"):
        print(f"no piece {' '.join(report['missing'])}: good for datasets, not for pretrain")
    if "bytes" in report:
        print(f"trained on {report['bytes_used'] / 1e6:,.1f} of {report['bytes'] / 1e6:,.1f} MB of text")
    if report.get("reserved"):
        found = ", ".join(f"{name} {count:,}" for name, count in sorted(report["reserved"].items()))
        print(f"the text holds what SentencePiece reserves ({found} times): lines were cut there")
    if report.get("rejected"):
        print(_passed_over(report["rejected"]))
    if held := report.get("held_out"):
        print(
            f"on {held['bytes'] / 1e6:,.2f} MB of held-out text: {held['tokens_per_word']:.3f} tokens a word,"
            f" {held['bytes_per_token']:.2f} bytes a token, {held['unknown_rate']:.4%} unknown, "
            f"{held['byte_rate']:.4%} spelt in bytes"
        )


def _passed_over(lines: int) -> str:
    return f"{lines:,} rejected {'line' if lines == 1 else 'lines'} passed over"


if __name__ == "__main__":
    console.run(main)
