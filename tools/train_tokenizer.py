"""Train a SentencePiece vocabulary with the specials <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last.

The trainer holds its text in memory, so of a larger input a sample is used: the documents whose
hash is smallest, which depends on the texts alone and not on their order or on the files.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pretrain import __version__
from pretrain.config import UserError
from pretrain.tokenizer import MODEL_FILE, train_sentencepiece
from tools import console
from tools.text_files import Document, Rejected, Unit, find_files, open_reader


def sample(documents: Iterable[Document], max_bytes: int) -> tuple[list[str], int]:
    """Texts of at most `max_bytes` UTF-8 bytes, in order of hash, and the bytes of all documents.

    A heap keeps the documents of the smallest hashes seen so far, so memory is bounded as well.
    """
    heap: list[tuple[int, bytes]] = []
    kept = total = 0
    for document in documents:
        digest = hashlib.blake2b(document.utf8, digest_size=8).digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "little"), document.utf8))
        kept += len(document.utf8)
        total += len(document.utf8)
        while kept > max_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[1])
    return [utf8.decode() for _, utf8 in sorted(heap, reverse=True)], total


def read_documents(files: Sequence[Path], text_key: str, txt_document: Unit) -> Iterator[Document]:
    """All documents; UserError at the first that cannot be read."""
    with console.progress("read", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            with open_reader(file, txt_document, text_key) as reader:
                for batch in reader.read(None):
                    for item in batch.items:
                        if isinstance(item, Rejected):
                            raise UserError(f"{item}; correct or remove the line")
                        yield item
                    advance(batch.disk_bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("train_tokenizer", "Train a SentencePiece vocabulary", True)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl or .txt [.gz, .zst] files or patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="(%(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, help="all ids, specials included (%(default)s)"
    )
    parser.add_argument("--text-key", default="text", help="JSON key of the text (%(default)s)")
    parser.add_argument(
        "--txt-document",
        choices=TXT_UNITS,
        default="blank-line",
        help="what ends a document in .txt files (%(default)s)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=200.0,
        help="train on a sample of this much text where there is more (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer there")
    args = parser.parse_args(arguments)
    model = Path(args.output) / MODEL_FILE
    if model.exists() and not args.overwrite:
        raise UserError(f"{model}: exists already; choose another --output or add --overwrite")
    documents = read_documents(find_files(args.input), args.text_key, args.txt_document)
    texts, total = sample(documents, int(args.max_megabytes * 1e6))
    used = sum(len(text.encode()) for text in texts)
    about = {"version": __version__, "documents": len(texts), "bytes_used": used, "bytes": total}
    tokenizer = train_sentencepiece(texts, args.output, args.kind, args.vocab_size, about)
    report = {
        "path": args.output,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
        **about,
    }
    if args.json:
        console.print_json(report)
    else:
        print(
            f"{model}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, "
            f"from {used / 1e6:,.1f} of {total / 1e6:,.1f} MB of text"
        )
    return 0


if __name__ == "__main__":
    console.run(main)
