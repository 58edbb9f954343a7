"""Files from strangers that lie outside of a run's folder: what is learnt, fine-tuned on, imported, compared
and told of the jobs of a site."""

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import yaml
import zstandard
from pyarrow import parquet

from pretrain.data.indexed import MAGIC
from slurm import attempts, cluster
from tests.hostile.readers import Reader
from tools import import_fairseq, minimal_pairs
from tools.finetune import cells
from tools.finetune.tasks import find_task
from tools.shared import downstream, journal
from tools.study.plan import open_study
from tools.study.results import read_results
from tools.text import byte_level
from tools.text.files import find_files
from tools.text.readers import open_reader

TEXTS = [f"text number {number} of a stranger" for number in range(30)]
ROOT = Path(__file__).parents[2]


def make(folder: Path) -> None:
    """Fill a folder, in which there is a tokenizer, with one good file of each kind."""
    _make_texts(folder / "texts")
    _make_tasks(folder / "tasks")
    _make_fairseq(folder / "fairseq")
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "<mask>"]
    _write(folder / "bytes" / "vocab.json", json.dumps({name: i for i, name in enumerate(vocabulary)}))
    _write(folder / "bytes" / "merges.txt", "#version: 0.2\na b\n")
    pair = {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "agreement", "field": "syntax"}
    _write(folder / "pairs.jsonl", f"{json.dumps(pair)}\n" * 3)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress((folder / "pairs.jsonl").read_bytes()))
    _write(folder / "study.yaml", (ROOT / "configs" / "study" / "cpu.yaml").read_text(encoding="utf-8"))
    lines = (ROOT / "tools" / "finetune" / "results" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    _write(folder / "runs.jsonl", "\n".join(lines[:3]) + "\n")
    lines = _results()
    _write(folder / "results.jsonl", "\n".join(lines[:3]) + "\n")
    score = downstream.DownstreamScore(3, "RTE", "accuracy", 0.5, 1, 100)
    _write(folder / "downstream.jsonl", f"{json.dumps(asdict(score))}\n" * 2)
    (folder / "run" / "slurm").mkdir(parents=True, exist_ok=True)
    for event in ("submit", "begin", "end"):
        journal.note(folder / "run", event, "train", "12", nodes=["n1"], step=3, code=75)
    _write(folder / "cluster.env", cluster.EXAMPLE.read_text(encoding="utf-8"))


def _results() -> list[str]:
    found = sorted((ROOT / "tools" / "study" / "results").glob("*.jsonl"))
    return found[0].read_text(encoding="utf-8").splitlines()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _make_texts(folder: Path) -> None:
    lines = "".join(f"{json.dumps({'text': text, 'source': 'web'})}\n" for text in TEXTS)
    _write(folder / "a.jsonl", lines)
    for suffix, pack in (
        ("gz", gzip.compress),
        ("xz", lzma.compress),
        ("zst", zstandard.ZstdCompressor().compress),
    ):
        (folder / f"a.jsonl.{suffix}").write_bytes(pack(lines.encode()))
    table = pyarrow.table({"text": TEXTS, "source": ["web"] * len(TEXTS)})
    parquet.write_table(table, folder / "a.parquet")
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(str(folder / "b.arrow"), table.schema) as file:
        file.write_table(table)
    (folder / "saved").mkdir()
    (folder / "saved" / "data.arrow").write_bytes((folder / "a.arrow").read_bytes())
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None, "_split": "train"}
    _write(folder / "saved" / "state.json", json.dumps(state))


def _make_tasks(folder: Path) -> None:
    for split in ("train", "dev"):
        rows = "".join(f"{number % 2}\t{text}\n" for number, text in enumerate(TEXTS))
        _write(folder / "SST-2" / f"{split}.tsv", "label\tsentence\n" + rows)
        own = [json.dumps({"question": text, "good": number % 2}) for number, text in enumerate(TEXTS)]
        _write(folder / "own" / f"{split}.jsonl", "\n".join(own) + "\n")
        answer = {"text": "text", "answer_start": 0}
        questions = [{"id": "1", "question": "what?", "answers": [answer], "is_impossible": False}]
        paragraphs = [{"context": TEXTS[0], "qas": questions}]
        _write(folder / "squad" / f"{split}.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
        words = "".join(f"{word} {'B-LOC' if word == 'stranger' else 'O'}\n" for word in TEXTS[0].split())
        _write(folder / "names" / f"{split}.conll", f"{words}\n{words}\n")
    _write(folder / "own" / "task.yaml", yaml.safe_dump({"texts": ["question"], "label": "good"}))


def _make_fairseq(folder: Path) -> None:
    """Two items of pieces that every tokenizer here has: the specials."""
    _write(folder / "dict.txt", "<mask> 1\n")
    tokens, sizes = np.array([3, 3, 2, 3, 2], "<u2"), np.array([3, 2], "<i4")
    tokens.tofile(folder / "train.bin")
    pointers = np.array([0, 6], "<i8")
    head = MAGIC + struct.pack("<QBQ", 1, 8, 2)
    (folder / "train.idx").write_bytes(head + sizes.tobytes() + pointers.tobytes())


def _read_text(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        for path in find_files([str(folder / "texts" / name)]):
            with open_reader(path) as reader:
                if reader.seek(0):
                    return [item for batch in reader.read(None) for item in batch.items]
        return None

    return read


def _task(name: str) -> Callable[[Path], Any]:
    return lambda folder: find_task(folder / "tasks", name, None)


def _fairseq(folder: Path) -> Any:
    prefix = str(folder / "fairseq" / "train")
    dictionary = folder / "fairseq" / "dict.txt"
    return import_fairseq.convert(prefix, dictionary, str(folder / "tokenizer"), str(folder / "made"), True)


def _journal(folder: Path) -> Any:
    return attempts.failed_attempts(journal.read(folder / "run"), "train", 0)


OUTSIDE = {
    **{name: Reader((f"texts/{name}",), _read_text(name)) for name in ("a.jsonl", "a.jsonl.gz")},
    **{name: Reader((f"texts/{name}",), _read_text(name)) for name in ("a.jsonl.xz", "a.jsonl.zst")},
    **{name: Reader((f"texts/{name}",), _read_text(name)) for name in ("a.parquet", "a.arrow", "b.arrow")},
    "saved dataset": Reader(("texts/saved/state.json", "texts/saved/data.arrow"), _read_text("saved")),
    "GLUE": Reader(("tasks/SST-2/train.tsv", "tasks/SST-2/dev.tsv"), _task("SST-2")),
    "own task": Reader(("tasks/own/train.jsonl", "tasks/own/task.yaml"), _task("own")),
    "SQuAD": Reader(("tasks/squad/train.json",), _task("squad")),
    "CoNLL": Reader(("tasks/names/train.conll",), _task("names")),
    "fairseq": Reader(("fairseq/train.idx", "fairseq/train.bin", "fairseq/dict.txt"), _fairseq),
    "byte level": Reader(
        ("bytes/vocab.json", "bytes/merges.txt"), lambda folder: byte_level.convert(folder / "bytes")
    ),
    "pairs": Reader(("pairs.jsonl",), lambda folder: minimal_pairs.read_all([str(folder / "pairs.jsonl")])),
    "packed pairs": Reader(
        ("pairs.jsonl.gz",), lambda folder: minimal_pairs.read_all([str(folder / "pairs.jsonl.gz")])
    ),
    "study": Reader(("study.yaml",), lambda folder: open_study(folder / "study.yaml", folder / "work")),
    "fine-tuning": Reader(("runs.jsonl",), lambda folder: cells.read_runs(folder / "runs.jsonl")),
    "results": Reader(("results.jsonl",), lambda folder: read_results(folder / "results.jsonl")),
    "downstream": Reader(("downstream.jsonl",), downstream.read),
    "journal": Reader(("run/slurm/journal.jsonl",), _journal),
    "cluster": Reader(("cluster.env",), lambda folder: cluster.read(folder / "cluster.env")),
}
