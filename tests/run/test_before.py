"""What an earlier version wrote still loads, and a run of it goes on as it would have gone on there.

Version 0.1.0 wrote tests/fixtures/before: a tokenizer, a corpus, and a run of four updates that ended
with its budget (spans, two views, a late decoder). The figures are those of 0.1.0 going on to update 8.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.verify import verify

BEFORE = Path(__file__).parents[1] / "fixtures" / "before"
LOSSES = {5: 5.78277587890625, 6: 5.69994592666626, 7: 5.64475679397583, 8: 5.618957996368408}
HELD_OUT = 5.503161748250325


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_corpus_and_its_tokenizer_are_whole(here: Path) -> None:
    manifest = verify("train")
    assert manifest.tokenizer and manifest.tokenizer.hash == load_tokenizer("tokenizer").hash


def test_a_run_goes_on_as_it_began(here: Path) -> None:
    state = checkpoint.read_state(checkpoint.find_verified("run")[0])
    assert (state.step, state.rules) == (4, 1)
    lines = ledger.check("run")
    command = [sys.executable, "-m", "pretrain", "config.yaml", "budget.steps=8"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    made = [
        json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = {
        line["step"]: line["loss"] for line in made if line.get("loss") is not None and line["step"] > 4
    }
    assert losses == {step: pytest.approx(loss, rel=1e-5) for step, loss in LOSSES.items()}
    assert made[-1]["held_out_loss"] == pytest.approx(HELD_OUT, rel=1e-5)
    assert ledger.check("run") > lines and ledger.total(["run"]).steps == 8
    assert checkpoint.read_state(checkpoint.find_verified("run")[0]).rules == 1
