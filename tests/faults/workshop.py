"""Where a campaign works: layouts, inputs and folders of its runs, what is written down, how runs compare."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from tests.conftest import encode, sample_texts
from tests.support.runs import Attempt, kept
from tools.ledger import __main__ as ledger_program

HANG = 120.0
"""Seconds after which an attempt that has not ended counts as one that hangs."""
TOKENIZER = "tokenizer.model"


class Layout(NamedTuple):
    """How a run is spread, and how often it is drawn."""

    ranks: int
    words: tuple[str, ...]
    weight: float

    @property
    def name(self) -> str:
        """Return it in words."""
        words = [word.split(".")[-1] for word in self.words]
        return " ".join([f"{self.ranks} rank{'s' * (self.ranks > 1)}", *words])


_ZERO = {stage: ("train.engine=deepspeed", f"parallel.zero={stage}") for stage in range(4)}
_TENSOR = "parallel.tensor=2"
LAYOUTS = (
    Layout(1, (), 40),
    Layout(1, _ZERO[0], 18),
    Layout(1, _ZERO[1], 17),
    Layout(2, (), 6),
    Layout(2, (_TENSOR,), 5),
    Layout(2, _ZERO[1], 4),
    Layout(2, _ZERO[2], 2),
    Layout(2, _ZERO[3], 2),
    Layout(2, (*_ZERO[0], _TENSOR), 3),
    Layout(4, (), 1),
    Layout(4, (_TENSOR,), 1),
    Layout(4, _ZERO[1], 1),
)
_CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_positions": 40},
    "masking": {"rate": 0.5},
    "train": {"seq_length": 24, "batch_size": 8, "precision": "fp32"},
    "optimizer": {"lr": 3e-3},
    "budget": {"steps": 14},
    "checkpoint": {"every_steps": 2},
    "evaluate": {"every_steps": 4, "samples": 16},
    "monitor": {"log_every": 1, "tensorboard": False, "stall_seconds": 24},
}


@dataclass
class Record:
    """A line of the campaign's file."""

    run: int
    layout: str
    kind: str
    place: str
    at: int
    rank: int
    plain: bool
    """The attempt was a plain command."""
    codes: list[int] = field(default_factory=list)
    line: str = ""
    """What rank 0 said last of how it ended."""
    broken: str = ""
    """What was not as promised; empty if all was."""
    equal: bool = False
    """The run ended as if nobody had disturbed it."""


@dataclass
class Workshop:
    """Where a campaign works."""

    folder: Path
    """On the machine's disk: corpora, marks of attempts, undisturbed runs."""
    disk: Path
    """The disturbed runs."""
    own_disk: bool
    """It is a file system of its own, which can be filled."""
    undisturbed: dict[Layout, dict[str, Any]] = field(default_factory=dict)

    def words(self, layout: Layout, run: Path, inputs: Path) -> list[str]:
        """Return the command line of a run."""
        # The manifest would name the tokenizer of the inputs of which these are a copy.
        corpora = [f"corpus.{name}={inputs}/{name}" for name in ("train", "valid", "tokenizer")]
        return [f"{self.folder}/toy.yaml", f"run.dir={run}", *corpora, *layout.words]

    def expected(self, layout: Layout) -> dict[str, Any]:
        """Return the result of the undisturbed run of a layout."""
        if layout not in self.undisturbed:
            run = self.folder / "undisturbed"
            shutil.rmtree(run, ignore_errors=True)
            outcome = Attempt(self.words(layout, run, self.folder / "inputs"), layout.ranks).wait(HANG)
            assert outcome.codes == [0] * layout.ranks, outcome.text
            self.undisturbed[layout] = kept(run)
        return self.undisturbed[layout]


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Make the inputs, and a file system for the runs where this process may; all is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="latemask-faults-") as name:
        folder = Path(name)
        _make_inputs(folder)
        disk = folder / "disk"
        disk.mkdir()
        own = _mount(disk)
        try:
            yield Workshop(folder, disk, own)
        finally:
            if own:
                subprocess.run(["umount", "--lazy", str(disk)], check=False)


def _make_inputs(folder: Path) -> None:
    from pretrain.data.tokenizer import train_sentencepiece

    texts, inputs = sample_texts(), folder / "inputs"
    train_sentencepiece(texts, inputs / "tokenizer", "unigram", 400)
    for name, part in {"train": texts[:28], "valid": texts[28:], "other": texts[5:30]}.items():
        encode(part, inputs / "tokenizer", inputs / name)
    config = {"run": {"dir": "run"}, "corpus": {"train": "train"}, **_CONFIG}
    (folder / "toy.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "latemask-faults", str(disk)]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


# ---- how a run ended ----------------------------------------------------------------------------


def last_word(text: str) -> str:
    """Return the line with which an attempt explained its end."""
    how = r"error: |\S+: (stopped|inter|the budget)|\w+Error"
    lines = [line for line in text.splitlines() if re.match(how, line)]
    return re.sub(r"/\S*/", "", lines[-1])[:200] if lines else ""


def differs(run: Path, inputs: Path, expected: dict[str, Any]) -> str:
    """Return how a run that is over is not like the undisturbed one; "" if it is.

    A checkpoint that was damaged and is not the newest stays as it is, and `tools.ledger check` says so: then
    it is moved away, as that says.
    """
    try:
        found = kept(run)
    except UserError as error:
        return str(error)
    for step in checkpoint.steps(run):
        path = run / "checkpoints" / f"step-{step:08d}"
        if not checkpoint.is_whole(path):
            shutil.rmtree(path)
    status = RunFolder(run).status()
    if status.get("state") != "finished" or status.get("exit_code") != 0:
        return f"its status says {status}"
    if found != expected:
        return f"{found} is not {expected}"
    if (run / "tokenizer" / TOKENIZER).read_bytes() != (inputs / "tokenizer" / TOKENIZER).read_bytes():
        return "its tokenizer is another"
    try:
        ledger_program.check([str(run)])
    except UserError as error:
        return f"tools.ledger check: {error}"
    return ""
