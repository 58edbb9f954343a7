"""Real runs of `python -m pretrain` for so many seconds each: what an update costs where batches are read,
masked and copied, metrics are logged and a checkpoint is written.

The text is the sample corpus, over and over; the word table is padded to as many rows as RoBERTa's, for the
head to cost what it costs there. Speeds are medians over the second half of the log.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.account import ledger
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.monitor import Metrics, read_metrics
from tools.benchmark.task import VOCAB
from tools.shared import console, measure
from tools.shared.measure import BenchmarkRow, Done

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tools" / "sample"
PARTS = ("train", "valid")
PLAIN = ("train.engine=torch", "parallel.zero=0", "monitor.tensorboard=false", "monitor.log_every=20")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configs", nargs="+", default=["mlm-base", "3ml-query-base"], metavar="NAME", help="of configs/"
    )
    parser.add_argument(
        "--seconds", type=console.positive, default=90.0, help="of a run, start to exit (%(default)s)"
    )
    parser.add_argument("--vocab-size", type=console.whole(300), default=8000, help="pieces (%(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="section.key=value", help="for all runs, after our own"
    )


def count(args: argparse.Namespace) -> int:
    return len(args.configs)


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    with tempfile.TemporaryDirectory(prefix="latemask-training-") as name:
        folder = Path(name)
        words = [*(f"corpus.{part}={folder / part}" for part in PARTS), *PLAIN]
        words += [f"model.vocab_multiple={VOCAB}", "budget.steps=null", "budget.flops=null"]
        words += [f"budget.device_hours={args.seconds / 3600}", *args.set]
        runs = {folder / config: ROOT / "configs" / f"{config}.yaml" for config in args.configs}
        for run, path in runs.items():
            load_config(path, [*words, f"run.dir={run}"])  # a mistake is told before the work
        _make_corpus(folder, args.vocab_size)
        for run, path in runs.items():
            _program("pretrain", str(path), *words, f"run.dir={run}")
            done(1)
            yield from _rows(run.name, read_metrics(run), ledger.read(run)[-1].device)


def _rows(config: str, metrics: list[Metrics], device: str) -> Iterator[BenchmarkRow]:
    """What the log of a run says."""
    logged = [line for line in metrics if "slots_per_second" in line]
    late = logged[len(logged) // 2 :]
    speeds = {"slots_per_second": "slots/s", "step_seconds": "s an update", "mfu": "of the peak"}
    for key, unit in (speeds | {"data_wait": "of the time"}).items():
        values = [line[key] for line in late if line.get(key) is not None]
        if values:
            about = {"updates": metrics[-1]["step"], "extremes": [min(values), max(values)]}
            found = [statistics.median(values)]
            title = f"training {config}: {key}"
            yield measure.row(title, unit, found, [], ["torch"], "", device, settings=about)
    losses = [line["held_out_loss"] for line in metrics if line.get("held_out_loss") is not None]
    if losses:
        yield measure.row(f"training {config}: held_out_loss", "nats", losses[-1:], [], ["torch"], "", device)


def _make_corpus(folder: Path, pieces: int) -> None:
    """Encode the sample text."""
    tokenizer, text = folder / "tokenizer", str(SAMPLE / "train.jsonl.gz")
    _program(
        "tools.train_tokenizer", "--input", text, "--output", str(tokenizer), "--vocab-size", str(pieces)
    )
    for part in PARTS:
        source, prefix = str(SAMPLE / f"{part}.jsonl.gz"), str(folder / part)
        _program("tools.encode_corpus", "--input", source, "--tokenizer", str(tokenizer), "--output", prefix)


def _program(*words: str) -> None:
    """Run one of our programs; UserError with what it said last where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [""]
        raise UserError(f"python -m {words[0]} failed (exit code {done.returncode}): {said[-1]}")
