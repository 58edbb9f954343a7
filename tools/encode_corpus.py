"""Encode raw text into a Megatron indexed dataset.

Reads .jsonl and .txt files, plain, .gz or .zst, and writes PREFIX.bin, PREFIX.idx and the manifest
PREFIX.json. The result depends on the text and the tokenizer only, not on the number of workers.

The one idea: this process reads blocks of whole documents and writes token arrays; everything
between, parsing and encoding, is a function of a block, run in worker processes, a bounded number
of blocks at a time, and put back in order.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from pretrain import __version__
from pretrain.config import UserError
from pretrain.corpus import (
    CorpusWriter,
    InputFile,
    Manifest,
    Origin,
    Tally,
    TokenizerRecord,
    add_tallies,
    refuse_existing,
    token_dtype,
)
from pretrain.tokenizer import Tokenizer, load_tokenizer
from tools import console
from tools.text_files import (
    TXT_UNITS,
    Block,
    Document,
    Rejected,
    find_files,
    parse,
    read_blocks,
)

_MAX_SOURCES = 256
"""Kinds of text counted apart; the rest are counted as "other", or a corpus of addresses instead of
kinds would make a manifest as long as itself."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    tokenizer: str
    text_key: str
    holdout: float


class Part(NamedTuple):
    """Documents of one block that go to one corpus: training or held out."""

    tokens: npt.NDArray[Any]
    """Ids in the type of the .bin, all documents end to end."""
    lengths: npt.NDArray[np.int64]
    text_bytes: int
    sources: dict[str, Tally]


class Encoded(NamedTuple):
    """A block after encoding."""

    parts: list[Part]
    """Training, then held out if there is a holdout."""
    rejected: list[Rejected]
    read_bytes: int


class Encoder:
    """Block -> Encoded; lives in each worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, block: Block) -> Encoded:
        groups: list[list[Document]] = [[], []] if self.job.holdout else [[]]
        rejected = []
        for item in parse(block, self.job.text_key):
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                groups[held_out(item.utf8, self.job.holdout)].append(item)
        return Encoded([self._encode(group) for group in groups], rejected, block.read_bytes)

    def _encode(self, documents: list[Document]) -> Part:
        arrays = self.tokenizer.encode_batch([document.text for document in documents])
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, np.int32), *arrays]).astype(self.dtype)
        sizes = [len(document.utf8) for document in documents]
        return Part(tokens, lengths, sum(sizes), _tally(documents, lengths, sizes))


def held_out(utf8: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out corpus: a hash of its text falls below `share`.

    So the split survives any reordering of the input, and copies of a text stay on one side.
    """
    if not share:
        return False
    key = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")
    return key < share * 2**64


def _tally(documents: list[Document], lengths: npt.NDArray[np.int64], sizes: list[int]) -> dict[str, Tally]:
    counts: dict[str, list[int]] = {}
    for document, tokens, size in zip(documents, lengths.tolist(), sizes, strict=True):
        if document.source is not None:
            count = counts.setdefault(document.source.partition("/")[0], [0, 0, 0])
            count[0] += 1
            count[1] += tokens
            count[2] += size
    return {
        name: Tally(documents=count[0], tokens=count[1], text_bytes=count[2])
        for name, count in counts.items()
    }


def encode_blocks(blocks: Iterable[Block], job: Job, workers: int) -> Iterator[Encoded]:
    """Encode blocks in order; two a worker are in memory at most, and the one being written."""
    if workers == 1:
        yield from map(Encoder(job), blocks)
        return
    # spawn: the parent has threads (the progress bar), which fork would copy in an unknown state
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder


def _start_worker(job: Job) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent cleans up
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is one worker's share
    _encoder = Encoder(job)


def _encode_in_worker(block: Block) -> Encoded:
    return _encoder(block)


@dataclass
class _Output:
    """One corpus being written."""

    writer: CorpusWriter
    text_bytes: int = 0
    sources: dict[str, Tally] = field(default_factory=dict)

    def append(self, part: Part) -> None:
        self.writer.append_documents(part.tokens, part.lengths)
        self.text_bytes += part.text_bytes
        for name, tally in part.sources.items():
            known = name in self.sources or len(self.sources) < _MAX_SOURCES
            self.sources = add_tallies(self.sources, {name if known else "other": tally})

    def finish(self, origin: Origin) -> Manifest:
        counts = {"text_bytes": self.text_bytes, "sources": self.sources}
        return self.writer.finish(origin.model_copy(update=counts))


class _RejectedFile:
    """PREFIX.rejected.jsonl, opened at the first rejected line, or the error if none is allowed."""

    def __init__(self, prefix: str, keep_going: bool, stack: ExitStack) -> None:
        self.path, self.keep_going, self._stack = (
            Path(f"{prefix}.rejected.jsonl"),
            keep_going,
            stack,
        )
        self.count = 0
        self._file: TextIO | None = None

    def write(self, rejected: Sequence[Rejected]) -> None:
        if rejected and not self.keep_going:
            raise UserError(f"{rejected[0]}; correct it, or add --keep-going to set such lines aside")
        for item in rejected:
            if self._file is None:
                partial = Path(f"{self.path}.partial")
                self._stack.callback(partial.unlink, missing_ok=True)
                self._file = self._stack.enter_context(partial.open("w", encoding="utf-8"))
            self._file.write(json.dumps(item._asdict(), ensure_ascii=False) + "\n")
            self.count += 1

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)  # of an earlier attempt
        if self._file is not None:
            self._file.close()
            Path(self._file.name).replace(self.path)


def encode(args: Namespace) -> dict[str, Any]:
    """Do the work of the command line; the report."""
    started = time.monotonic()
    files = find_files(args.input)
    tokenizer = load_tokenizer(args.tokenizer)
    prefixes = [args.output, f"{args.output}-valid"] if args.holdout else [args.output]
    if not args.overwrite:
        for prefix in prefixes:
            refuse_existing(prefix)
    job = Job(args.tokenizer, args.text_key, args.holdout)
    sizes = [file.stat().st_size for file in files]
    blocks = (block for file in files for block in read_blocks(file, args.txt_document))
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        outputs = [
            _Output(stack.enter_context(CorpusWriter(prefix, dtype, args.overwrite))) for prefix in prefixes
        ]
        rejected = _RejectedFile(args.output, args.keep_going, stack)
        advance = stack.enter_context(console.progress("encode", sum(sizes)))
        for encoded in encode_blocks(blocks, job, args.workers):
            rejected.write(encoded.rejected)
            for output, part in zip(outputs, encoded.parts, strict=True):
                output.append(part)
            advance(encoded.read_bytes)
        if not outputs[0].writer.documents:
            raise UserError(f"no documents in {args.input[0]}; nothing to write")
        origin = Origin(
            tokenizer=tokenizer_record(args.tokenizer, tokenizer),
            inputs=[
                InputFile(path=str(file.resolve()), bytes=size)
                for file, size in zip(files, sizes, strict=True)
            ],
            history={
                "version": __version__,
                "holdout": args.holdout,
                "rejected": rejected.count,
            },
        )
        manifests = [output.finish(origin) for output in outputs]
        rejected.finish()
    seconds = time.monotonic() - started
    return {
        "corpora": [
            {"prefix": prefix} | summary(manifest)
            for prefix, manifest in zip(prefixes, manifests, strict=True)
        ],
        "rejected": rejected.count,
        "seconds": seconds,
        "megabytes_per_second": sum(output.text_bytes for output in outputs) / 1e6 / seconds,
    }


def tokenizer_record(directory: str, tokenizer: Tokenizer) -> TokenizerRecord:
    """What a manifest says about a tokenizer folder."""
    return TokenizerRecord(
        path=str(Path(directory).resolve()),
        kind=tokenizer.kind,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
    )


def summary(manifest: Manifest) -> dict[str, Any]:
    """The counts people ask for first."""
    return manifest.model_dump(
        include={"documents", "empty_documents", "tokens", "text_bytes", "dtype", "fingerprint"}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("encode_corpus", "Encode raw text into PREFIX.bin, .idx, .json", True)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl or .txt [.gz, .zst] files or patterns"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the corpus")
    parser.add_argument(
        "--workers",
        type=int,
        default=console.available_cores(),
        help="processes (default: the cores this job may use, %(default)s)",
    )
    parser.add_argument("--text-key", default="text", help="JSON key of the text (%(default)s)")
    parser.add_argument(
        "--txt-document",
        choices=TXT_UNITS,
        default="blank-line",
        help="what ends a document in .txt files (%(default)s)",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the documents that goes to PREFIX-valid instead (by a hash of the text)",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="set unreadable lines aside in PREFIX.rejected.jsonl instead of stopping at the first",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if not 0 <= args.holdout < 1:
        raise UserError(f"--holdout {args.holdout}: a share of the documents, from 0 to below 1")
    report = encode(args)
    if args.json:
        console.print_json(report)
        return 0
    for corpus in report["corpora"]:
        print(
            f"{corpus['prefix']}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens "
            f"({corpus['dtype']}) from {corpus['text_bytes'] / 1e6:,.2f} MB of text"
        )
    if report["rejected"]:
        print(f"{report['rejected']:,} rejected lines in {args.output}.rejected.jsonl")
    print(f"{report['seconds']:.1f} s, {report['megabytes_per_second']:.1f} MB of text a second")
    return 0


if __name__ == "__main__":
    console.run(main)
