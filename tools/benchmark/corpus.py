"""Speeds of the corpus path beside the tools that people use today.

Text: the shipped sample, or any ``--input``. Vocabularies are trained on it here; ``--gpt2 DIR`` takes a
real byte-level one (made by ``tools.train_tokenizer --import``). Encoding goes from texts in memory to a
finished .bin and .idx, with cold caches; loading a tokenizer is not timed.

Peers: Megatron's route is `encode_batch` of tokenizers (or `encode` of sentencepiece to lists) and
megatron-core's IndexedDatasetBuilder; masking is Hugging Face's collator and the logic of fairseq's
MaskTokensDataset (written out here, as fairseq no longer installs).

The rows `ids` are no speeds: they compare our ids with those of the library that defines the vocabulary, on
every document of the input (`--max-megabytes` is for training and for speeds), and one difference fails the
program.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import MaskingOptions
from pretrain.data.indexed import IndexedReader, corpus_file, token_dtype
from pretrain.data.masking import Masker
from pretrain.data.sampler import Sampler
from pretrain.data.tokenizer import SMALLEST, SPECIALS, Tokenizer, load_tokenizer, train_sentencepiece
from pretrain.data.writer import CorpusWriter
from pretrain.errors import UserError
from tools.shared import console
from tools.shared.measure import SAME, BenchmarkRow, Done, Side, compare, row
from tools.text.files import find_files
from tools.text.readers import MAX_DOCUMENT_BYTES, Document, open_reader

_SAMPLE = Path(__file__).parents[1] / "sample" / "train.jsonl.gz"
_SHARDS, _SHARD_DOCUMENTS = 1000, 2000
_BATCH, _LENGTH = 256, 512
_MANY_DOCUMENTS = 2_000_000
_FASTOKENS_IDS = "ids, byte-level BPE, fastokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", default=[str(_SAMPLE)], help="raw text (the shipped sample)")
    parser.add_argument(
        "--max-megabytes",
        type=console.positive,
        default=10.0,
        help="used of it, but for ids (%(default)s)",
    )
    parser.add_argument("--gpt2", metavar="DIR", help="a byte-level tokenizer folder; default: trained here")
    parser.add_argument(
        "--vocab-size", type=console.whole(SMALLEST), default=8000, help="of those trained here (%(default)s)"
    )
    parser.add_argument(
        "--wall-megabytes",
        type=console.positive,
        default=40.0,
        help="text for the row of two processes, by the clock: let the machine be idle (%(default)s)",
    )
    parser.add_argument(
        "--unseen-megabytes",
        type=console.positive,
        default=10.0,
        help="text of the rows of unseen words, whose memory must not depend on it (%(default)s)",
    )
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with WORD in their name")


def count(args: argparse.Namespace) -> int:
    return len(chosen(args))


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the rows that were asked for; ids can be compared only of an encoder that is there."""
    lost = set() if importlib.util.find_spec("fastokens") else {_FASTOKENS_IDS}
    return console.matching([name for name in MEASURED if name not in lost], [args.only])


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    """Yield every row, as it is measured."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # per core
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"
    texts = read_texts(args.input, int(args.max_megabytes * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), texts, args)
        for name in chosen(args):
            found = MEASURED[name](bench, name)
            done(1)
            yield found


def read_texts(patterns: list[str], max_bytes: int) -> list[str]:
    """Return the first documents of the input."""
    texts: list[str] = []
    size = 0
    for batch in batches(find_files(patterns)):
        for text in batch:
            if size >= max_bytes:
                return texts
            texts.append(text)
            size += len(text.encode())
    return texts


def batches(files: Sequence[Path]) -> Iterator[list[str]]:
    """Yield all documents, some at a time."""
    for file in files:
        with open_reader(file, "blank-line", max_bytes=MAX_DOCUMENT_BYTES) as reader:
            for batch in reader.read(None):
                yield [item.text for item in batch.items if isinstance(item, Document)]


def reference(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """Return the ids of texts by the library that defines the vocabulary, in its plainest way."""
    if tokenizer.kind == "json":
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        library.encode_special_tokens = True
        return lambda texts: [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return lambda texts: [processor.encode(text) for text in texts]


class Bench:
    """The rows over one text."""

    def __init__(self, folder: Path, texts: list[str], args: argparse.Namespace) -> None:
        self.folder, self.texts, self.input = folder, texts, args.input
        self.megabytes = sum(len(text.encode()) for text in texts) / 1e6
        self.runs, self.vocab_size, self.gpt2 = args.runs, args.vocab_size, args.gpt2
        self.wall_megabytes, self.unseen_megabytes = args.wall_megabytes, args.unseen_megabytes

    # ---- encoding --------------------------------------------------------------------------------

    def byte_level(self, name: str, use_fastokens: bool) -> BenchmarkRow:
        folder = self._byte_level()
        import tokenizers

        def peer() -> Callable[[], None]:
            library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
            library.encode_special_tokens = True
            return lambda: self._megatron(
                encoding.ids for encoding in library.encode_batch(self.texts, add_special_tokens=False)
            )

        ours = self._ours(lambda: load_tokenizer(folder, use_fastokens))
        packages = ["tokenizers", "megatron-core", *(["fastokens"] if use_fastokens else [])]
        return compare(name, "MB/s", self.megabytes, ours, peer, self.runs, packages)

    def sentencepiece(self, name: str, kind: Any) -> BenchmarkRow:
        folder = self._trained(kind)

        def peer() -> Callable[[], None]:
            processor = load_tokenizer(folder)._processor  # type: ignore[attr-defined]
            return lambda: self._megatron(processor.encode(text) for text in self.texts)

        ours = self._ours(lambda: load_tokenizer(folder))
        return compare(
            name, "MB/s", self.megabytes, ours, peer, self.runs, ["sentencepiece", "megatron-core"]
        )

    def ids(self, name: str, folder: str | Path, use_fastokens: bool = False) -> BenchmarkRow:
        """Count the documents of the whole input with the ids of the reference library, of all that were
        compared."""
        tokenizer = load_tokenizer(folder, use_fastokens)
        if use_fastokens and not getattr(tokenizer, "_fast", None):
            raise UserError(f"{folder}: fastokens does not encode this vocabulary; leave the row {name} out")
        expected, files = reference(tokenizer), find_files(self.input)
        equal = compared = 0
        for texts in batches(files):
            pairs = zip(tokenizer.encode_batch(texts), expected(texts), strict=True)
            equal += sum(ours.tolist() == theirs for ours, theirs in pairs)
            compared += len(texts)
        settings = {
            "inputs": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
            "vocab_size": tokenizer.vocab_size,
        }
        packages = ["tokenizers" if tokenizer.kind == "json" else "sentencepiece"]
        packages += ["fastokens"] if use_fastokens else []
        dtype = token_dtype(tokenizer.vocab_size).name
        return row(name, SAME, [equal], [compared], packages, dtype, settings=settings)

    def _ours(self, load: Callable[[], Tokenizer]) -> Side:
        def prepare() -> Callable[[], None]:
            tokenizer = load()
            return lambda: self._encode(tokenizer)

        return prepare

    def _encode(self, tokenizer: Tokenizer) -> None:
        with CorpusWriter(self.folder / "ours", token_dtype(tokenizer.vocab_size), overwrite=True) as writer:
            for start in range(0, len(self.texts), 1000):
                writer.append_documents(*tokenizer.encode_flat(self.texts[start : start + 1000]))
            writer.finish()

    def _megatron(self, documents: Any) -> None:
        """What preprocess_data.py does with the ids of each document."""
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(str(self.folder / "peer.bin"), dtype=np.uint16)
        for ids in documents:
            builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(str(self.folder / "peer.idx"))

    def _trained(self, kind: Any) -> Path:
        folder = self.folder / kind
        if not folder.exists():
            train_sentencepiece(self.texts, folder, kind, self.vocab_size)
        return folder

    def _byte_level(self) -> str:
        if self.gpt2:
            return self.gpt2
        import tokenizers

        from tools.text.byte_level import build

        folder = self.folder / "byte-level"
        if not folder.exists():
            bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
            bpe.train_from_iterator(self.texts, self.vocab_size - 1, 2, False, list(SPECIALS[:-1]))
            vocabulary = bpe.get_vocab() | {SPECIALS[-1]: bpe.get_vocab_size()}
            merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
            folder.mkdir()
            (folder / "tokenizer.json").write_text(build(vocabulary, merges, folder), encoding="utf-8")
        return str(folder)

    # ---- training data ---------------------------------------------------------------------------

    def masking(self, name: str, make_peer: Callable[[int, int, Any], Side], rounds: int) -> BenchmarkRow:
        """Measure windows of ids to a whole batch: ours with its rows in order and their positions as
        well."""
        words = 30_000
        tokens = np.random.default_rng(0).integers(5, words - 1, (_BATCH, _LENGTH)).astype(np.uint16)
        special, pool = np.array([0, 1, 2, 3, words - 1]), np.arange(5, words - 1)
        half = MaskingOptions(rate=0.5)

        def ours() -> Callable[[], None]:
            masker = Masker(half, _LENGTH, words - 1, pool, special)
            keys, views = np.arange(_BATCH, dtype=np.uint64), np.zeros(_BATCH, np.int64)
            masker(tokens, keys, views)
            return lambda: _exhaust(masker(tokens, keys, views) for _ in range(rounds))

        peer = make_peer(words, rounds, tokens)
        amount = rounds * tokens.size / 1e6
        return compare(name, "million tokens/s", amount, ours, peer, self.runs, ["numpy", "transformers"])

    def reading(self, name: str, batch: int, length: int) -> BenchmarkRow:
        """Measure windows of shuffled documents that are joined, with their mask keys, against items of
        that length as they lie."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        batches = (1 << 22) // (batch * length)
        folder = self._trained("unigram")
        self._encode(load_tokenizer(folder))
        reader = IndexedReader(self.folder / "ours")
        count = reader.num_tokens // length
        with CorpusWriter(self.folder / "items", reader.dtype, overwrite=True) as writer:
            writer.append_documents(reader.tokens[: count * length], np.full(count, length))
            writer.finish()

        def ours() -> Callable[[], None]:
            sampler = Sampler(reader, MaskingOptions(), length, 0, 0, 2)
            sampler.read(np.arange(batch))
            numbers = np.arange(batches * batch).reshape(batches, batch)
            return lambda: _exhaust(sampler.read(row) for row in numbers)

        def peer() -> Callable[[], None]:
            items = IndexedDataset(str(self.folder / "items"))
            order = np.random.default_rng(0).integers(0, count, (batches, batch)).tolist()
            return lambda: _exhaust(np.stack([items[i] for i in row]) for row in order)

        amount = batches * batch * length / 1e6
        return compare(name, "million tokens/s", amount, ours, peer, self.runs, ["numpy", "megatron-core"])

    def reading_many(self, name: str, batch: int, length: int) -> BenchmarkRow:
        """Measure windows of many documents, whose order is a mapped file, against those of an order in
        memory."""
        draw, batches = np.random.default_rng(0), (1 << 22) // (batch * length)
        if not corpus_file(prefix := self.folder / "many", "json").exists():
            with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
                for _ in range(0, _MANY_DOCUMENTS, _SHARD_DOCUMENTS):
                    lengths = draw.integers(1, 200, _SHARD_DOCUMENTS)
                    writer.append_documents(draw.integers(5, 30_000, lengths.sum(), np.uint16), lengths)
                writer.finish()
        reader, numbers = IndexedReader(prefix), np.arange(batches * batch).reshape(batches, batch)

        def side(folder: Path) -> Side:
            sampler = Sampler(reader, MaskingOptions(), length, 0, 0, 2, folder=folder)
            sampler.read(numbers[0])
            return lambda: lambda: _exhaust(sampler.read(row) for row in numbers)

        begin = time.process_time()
        ours = side(self.folder / "orders" / str(length))
        settings = {"documents": _MANY_DOCUMENTS, "order_seconds": time.process_time() - begin}
        # No folder can be made there, so the order stays in memory, with a warning.
        peer, amount = side(corpus_file(prefix, "bin")), batches * batch * length / 1e6
        found = compare(name, "million tokens/s", amount, ours, peer, self.runs, ["numpy"])
        return replace(found, settings=settings)

    # ---- whole programs --------------------------------------------------------------------------

    def merging(self, name: str) -> BenchmarkRow:
        """Measure the growth of the process over what it holds before the merge, in MB; once, for memory does
        not vary and the peer takes minutes."""
        lengths = np.full(_SHARD_DOCUMENTS, 16)
        tokens = np.zeros(lengths.sum(), np.uint16)
        shards = [self.folder / "shards" / f"{i:04d}" for i in range(_SHARDS)]
        for shard in shards:
            with CorpusWriter(shard, tokens.dtype, durable=False) as writer:
                writer.append_documents(tokens, lengths)
                writer.finish()
        grown: tuple[list[float], list[float]] = ([], [])
        for side, code in zip(grown, (_MERGE_OURS, _MERGE_MEGATRON), strict=True):
            done = self._python(code, str(self.folder / "merged"), *map(str, shards))
            side.append(float(done.stdout.split()[-1]))
        return row(name, "MB", *grown, ["megatron-core"])

    def two_processes(self, name: str) -> BenchmarkRow:
        """Measure the wall time of the whole program on one and on two processes."""
        source = self.folder / "text.jsonl"
        copies = max(1, round(self.wall_megabytes / self.megabytes))
        with source.open("w", encoding="utf-8") as file:
            for _ in range(copies):
                file.writelines(json.dumps({"text": text}) + "\n" for text in self.texts)
        folder = self._trained("unigram")
        speeds: dict[int, list[float]] = {2: [], 1: []}
        for _ in range(self.runs):
            for workers, found in speeds.items():
                command = ["tools.encode_corpus", "--input", source, "--tokenizer", folder, "--overwrite"]
                output = self.folder / "encoded"
                begin = time.monotonic()
                words = [str(w) for w in [*command, "--output", output, "--workers", workers]]
                subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
                found.append(copies * self.megabytes / (time.monotonic() - begin))
        return row(name, "MB/s", speeds[2], speeds[1], ["sentencepiece"])

    def start_up(self, name: str) -> BenchmarkRow:
        """Measure the CPU seconds from the start of the program to the first document encoded; no peer."""
        folder = self._trained("unigram")
        seconds = []
        for _ in range(self.runs):
            done = self._python(_START_UP, str(folder))
            seconds.append(float(done.stdout.split()[-1]))
        return row(name, "s", seconds, [], ["sentencepiece"])

    def unseen(self, name: str, folder: str | Path, plain: bool = False) -> BenchmarkRow:
        """Measure the largest process of two, over random words that no cache has met; once, for memory does
        not vary; no peer. plain: without fastokens."""
        source = self.folder / "unseen.jsonl"
        if not source.exists():
            write_unseen(source, int(self.unseen_megabytes * 1e6))
        words = ["--input", source, "--tokenizer", folder, "--output", self.folder / "unseen", "--overwrite"]
        environ = dict(os.environ)
        if plain:
            hidden = self.folder / "hidden"
            hidden.mkdir(exist_ok=True)
            (hidden / "fastokens.py").write_text(
                "raise ImportError('hidden, to measure without')\n", encoding="utf-8"
            )
            environ["PYTHONPATH"] = os.pathsep.join([str(hidden), *filter(None, [environ.get("PYTHONPATH")])])
        done = self._python(_LARGEST, *map(str, [*words, "--workers", 2]), environ=environ)
        packages = ["sentencepiece", "tokenizers", *([] if plain else ["fastokens"])]
        return row(name, "MB", [float(done.stdout.split()[-1])], [], packages)

    def _python(
        self, code: str, *arguments: str, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *arguments],
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environ,
        )


def write_unseen(path: Path, size: int) -> None:
    """Write documents of 4 kB of random words, of seven letters on the average."""
    draw = np.random.default_rng(1)
    with path.open("wb") as file:
        while file.tell() < size:
            letters = draw.integers(ord("a"), ord("z") + 1, (256, 4096), np.uint8)
            letters[draw.random(letters.shape, np.float32) < 1 / 8] = ord(" ")
            file.writelines(b'{"text": "' + document.tobytes() + b'"}\n' for document in letters)


MEASURED: dict[str, Callable[[Bench, str], BenchmarkRow]] = {
    "byte-level BPE, cached, text to .bin": lambda bench, name: bench.byte_level(name, False),
    "byte-level BPE, fastokens, text to .bin": lambda bench, name: bench.byte_level(name, True),
    "sentencepiece unigram, text to .bin": lambda bench, name: bench.sentencepiece(name, "unigram"),
    "sentencepiece bpe, text to .bin": lambda bench, name: bench.sentencepiece(name, "bpe"),
    "ids, byte-level BPE, plain Python": lambda bench, name: bench.ids(name, bench._byte_level()),
    _FASTOKENS_IDS: lambda bench, name: bench.ids(name, bench._byte_level(), True),
    "ids, sentencepiece unigram": lambda bench, name: bench.ids(name, bench._trained("unigram")),
    "ids, sentencepiece bpe": lambda bench, name: bench.ids(name, bench._trained("bpe")),
    "masking, against Hugging Face": lambda bench, name: bench.masking(name, hugging_face_masking, 256),
    "masking, against fairseq": lambda bench, name: bench.masking(name, fairseq_masking, 32),
    "reading a batch, 4,096 x 128": lambda bench, name: bench.reading(name, 4096, 128),
    "reading a batch, 256 x 512": lambda bench, name: bench.reading(name, 256, 512),
    "many documents, 4,096 x 128, mapped": lambda bench, name: bench.reading_many(name, 4096, 128),
    "many documents, 256 x 512, mapped": lambda bench, name: bench.reading_many(name, 256, 512),
    "merge of 1,000 shards, peak memory": Bench.merging,
    "two processes, against one": Bench.two_processes,
    "start-up to the first document": Bench.start_up,
    "unseen words, unigram, peak memory": lambda bench, name: bench.unseen(name, bench._trained("unigram")),
    "unseen words, bpe, peak memory": lambda bench, name: bench.unseen(name, bench._trained("bpe")),
    "unseen words, byte-level BPE, peak memory": lambda bench, name: bench.unseen(
        name, bench._byte_level(), True
    ),
    "unseen words, fastokens, peak memory": lambda bench, name: bench.unseen(name, bench._byte_level()),
}
"""Name of a row -> what measures it."""


def _exhaust(results: Iterator[Any]) -> None:
    """Make each of the results and drop it, as a training loop does."""
    for _ in results:
        pass


_MERGE_OURS = """
import sys
from pretrain.data.writer import merge
from pretrain.account.process import peak_resident
output, *shards = sys.argv[1:]
merge(shards[:1], output, overwrite=True)
before = peak_resident()
merge(shards, output, overwrite=True)
print((peak_resident() - before) / 1e6)
"""

_MERGE_MEGATRON = """
import sys
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pretrain.account.process import peak_resident
output, *shards = sys.argv[1:]
builder = IndexedDatasetBuilder(output + ".bin", dtype=np.uint16)
builder.add_index(shards[0])
builder.finalize(output + ".idx")
before = peak_resident()
builder = IndexedDatasetBuilder(output + ".bin", dtype=np.uint16)
for shard in shards:
    builder.add_index(shard)
builder.finalize(output + ".idx")
print((peak_resident() - before) / 1e6)
"""

_LARGEST = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "tools.encode_corpus", *sys.argv[1:]], check=True)
# Counted in kB. A child begins with its parent's peak: this process is small, and does nothing else.
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6)
"""

_START_UP = """
import sys, time
from tools.encode_corpus import __main__
from pretrain.data.tokenizer import load_tokenizer
load_tokenizer(sys.argv[1]).encode("The first document.")
print(time.process_time())
"""


def hugging_face_masking(words: int, rounds: int, tokens: Any) -> Side:
    """Return transformers' collator: `torch_mask_tokens` on a batch of ids."""

    def prepare() -> Callable[[], None]:
        import torch
        from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

        torch.set_num_threads(1)
        import tokenizers

        names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIALS, strict=True))
        vocabulary = {piece: i for i, piece in enumerate([*SPECIALS[:4], *map(str, range(4, words - 1))])}
        library = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(vocabulary | {"<mask>": words - 1}, "<unk>")
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=library, **{f"{key}_token": value for key, value in names.items()}
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
        special = torch.zeros(tokens.shape, dtype=torch.bool)
        special[:, [0, -1]] = True

        def work(times: int) -> None:
            for _ in range(times):
                ids = torch.from_numpy(tokens.astype(np.int64))
                collator.torch_mask_tokens(ids, special_tokens_mask=special.clone())

        work(1)
        return lambda: work(rounds)

    return prepare


def fairseq_masking(words: int, rounds: int, tokens: Any) -> Side:
    """Return the logic of fairseq's MaskTokensDataset, item by item (source and target are two datasets)."""
    weights = np.ones(words)
    weights[[0, 1, 2, 3, words - 1]] = 0
    weights /= weights.sum()

    def item(ids: Any, index: int) -> tuple[Any, Any]:
        draw = np.random.RandomState(hash((1, 0, index)) % (1 << 32))
        size = len(ids)
        mask = np.full(size, False)
        number = int(0.5 * size + draw.rand())
        mask[draw.choice(size, number, replace=False)] = True
        decide = draw.rand(size)
        kept = mask & (decide < 0.1)
        random = mask & (decide >= 0.9)
        source = ids.copy()
        source[mask ^ kept ^ random] = words - 1
        source[random] = draw.choice(words, random.sum(), p=weights)
        target = np.full(size, 1)
        target[mask] = ids[mask]
        return source, target

    def work() -> None:
        for n in range(rounds):
            for index, ids in enumerate(tokens.astype(np.int64)):
                item(ids, n * len(tokens) + index)

    return lambda: work


if __name__ == "__main__":
    sys.exit("run it as: python -m tools.benchmark corpus")
