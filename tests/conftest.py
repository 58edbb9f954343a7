"""What the tests of whole runs start from: a tokenizer, three corpora and a config, all tiny."""

import gzip
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml

from pretrain.data.tokenizer import train_sentencepiece
from tests.support.slurm_cluster import cluster
from tools.encode_corpus import __main__ as encode_corpus

# A shell starts background jobs with Ctrl-C ignored, and programs started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tools" / "sample"
# Programs that are started in another folder find the packages as they do under make.
os.environ["PYTHONPATH"] = str(ROOT)
# Who runs the tests inside of a job is no rank of theirs.
for name in list(os.environ):
    if re.match("(SLURM|PMIX?|OMPI|MASTER)_|(RANK|LOCAL_RANK|WORLD_SIZE)$", name):
        del os.environ[name]


def encode(texts: list[str], tokenizer: Path, prefix: Path) -> None:
    """Writes texts as a corpus."""
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ["--input", source, "--tokenizer", tokenizer, "--output", prefix, "--workers", "1"]
    encode_corpus.main([str(word) for word in words])


def sample_texts() -> list[str]:
    """The first 2,000 letters of each of some documents."""
    with gzip.open(SAMPLE / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"][:2000] for line in file]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, `tiny.yaml`, and the corpora `train`, `valid` and `short`.

    `train` has about 1,700 windows of 24, `short` about 60: eight updates are an epoch of it.
    """
    folder = tmp_path_factory.mktemp("tiny")
    texts = sample_texts()
    train_sentencepiece(texts, folder / "tokenizer", "unigram", 400)
    encode(texts[:28], folder / "tokenizer", folder / "train")
    encode(texts[28:], folder / "tokenizer", folder / "valid")
    encode([text[:700] for text in texts[:3]], folder / "tokenizer", folder / "short")
    config = {
        "run": {"dir": str(folder / "run")},
        "corpus": {"train": str(folder / "train"), "valid": str(folder / "valid")},
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_positions": 40},
        "masking": {"rate": 0.5},
        "train": {"seq_length": 24, "batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "budget": {"steps": 8},
        "checkpoint": {"background": False},  # what is on disk at a kill must not depend on the time
        "evaluate": {"every_steps": 3, "samples": 20},
        "monitor": {"log_every": 1, "tensorboard": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``words("a", "budget.steps=9")``: a command line for the run `tmp_path / "a"`."""

    def command(name: str, *overrides: str) -> list[str]:
        return [str(tiny / "tiny.yaml"), f"run.dir={tmp_path / name}", *overrides]

    return command


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[None]:
    """A real Slurm on this machine, shared by all processes of the tests and gone after the last."""
    try:
        with cluster.used(), mock.patch.dict(os.environ, cluster.ENVIRON):
            yield
    except cluster.Unavailable as reason:
        pytest.skip(f"no Slurm here: {reason}")


@pytest.fixture
def slurm(slurm_cluster: None) -> Iterator[None]:
    """That cluster, for one test at a time."""
    with cluster.turn():
        yield
