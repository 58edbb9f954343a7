"""Sweeps: which runs there are, that each is run once, and that an interrupted one goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.monitor import read_metrics
from tests.support.ranks import PATIENCE
from tests.support.runs import Strike, attempt, finish, result
from tools import sweep

ROOT = Path(__file__).parents[2]
OVER = ["--over", "model.mask_from=0,1,2", "masking.rate=0.3,0.5"]
BASE = ["model.decoder_layers=1", "budget.steps=4", "evaluate.samples=8"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were started; they are forked, which is faster than a new python."""
    names: list[str] = []

    def start(command: list[str], strike: Strike | None = None) -> int:
        names.append(Path(command[-1]).stem)
        return attempt(command[3:], strike=strike).codes[0]

    monkeypatch.setattr(sweep, "start", start)
    return names


def words(tiny: Path, output: Path, *more: str) -> list[str]:
    return [str(tiny / "tiny.yaml"), *BASE, "--output", str(output), *OVER, *more]


NAMES = [f"mask_from-{layer}_rate-{rate}" for layer in (0, 1, 2) for rate in (0.3, 0.5)]


def test_every_combination_is_run_once(
    tiny: Path, tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(words(tiny, tmp_path, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert started == [row["name"] for row in rows] == NAMES
    assert [row["method"] for row in rows] == ["mlm"] * 2 + ["shared-depth"] * 2 + ["3ml-self"] * 2
    for row in rows:
        config = load_config(tmp_path / f"{row['name']}.yaml")
        assert config.model.mask_from == row["values"]["model.mask_from"]
        assert config.masking.rate == row["values"]["masking.rate"]
        assert config.model.decoder_layers == (row["values"]["model.mask_from"] == 2)
        assert row["state"] == "finished" and row["steps"] == 4
        assert row["held_out_loss"] == read_metrics(tmp_path / row["name"])[-1]["held_out_loss"]
        assert row["flops"] > 0 and row["device_hours"] > 0
    assert rows == json.loads((tmp_path / "sweep.json").read_text())
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES
    # What is done is not done again; more budget goes on where it ended.
    assert sweep.main(words(tiny, tmp_path)) == 0 and len(started) == 6
    more = [*words(tiny, tmp_path)[:3], "budget.steps=5", *words(tiny, tmp_path)[3:]]
    assert sweep.main(more) == 0 and len(started) == 12
    shown = capsys.readouterr().out.splitlines()
    assert shown[-6].split()[:4] == [NAMES[0], "mlm", "finished", "5"]


def test_an_interrupted_sweep_goes_on(
    tiny: Path, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gentle = sweep.start
    over = ["--over", "model.decoder_layers=1,2", "model.mask_from=2"]
    line = [str(tiny / "tiny.yaml"), *BASE[1:], "--output", str(tmp_path / "cut"), *over]

    def struck(command: list[str]) -> int:
        second = "layers-2" in command[-1]
        return gentle(command, Strike(signal.SIGTERM, 3) if second else None)  # type: ignore[call-arg]

    monkeypatch.setattr(sweep, "start", struck)
    assert sweep.main(line) == 75
    monkeypatch.setattr(sweep, "start", gentle)
    assert sweep.main(line) == 0
    first, second = "decoder_layers-1_mask_from-2", "decoder_layers-2_mask_from-2"
    assert started == [first, second, second]
    alone = tmp_path / "alone"
    finish([str(tmp_path / "cut" / f"{second}.yaml"), f"run.dir={alone}"])
    assert result(alone) == result(tmp_path / "cut" / second)


@pytest.mark.parametrize(
    ("code", "ended", "runs"), [(-15, 75, 1), (-10, 75, 1), (-2, 75, 1), (-9, sweep.KILLED, 2)]
)
def test_a_signal_before_a_run_was_ready_stops_the_sweep(
    code: int, ended: int, runs: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was killed, as for want of memory, was not asked to stop: the next run has its turn."""
    started: list[list[str]] = []
    monkeypatch.setattr(sweep, "start", lambda command: started.append(command) or code)
    over = ["--over", "model.decoder_layers=1,2", "model.mask_from=2"]
    assert sweep.main([str(tiny / "tiny.yaml"), *BASE[1:], "--output", str(tmp_path), *over]) == ended
    assert len(started) == runs


def test_impossible_combinations_are_named(
    tiny: Path, tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(tiny / "tiny.yaml"), "budget.steps=1", "--output", str(tmp_path), "--over"]
    assert sweep.main([*line, "model.mask_from=0,2", "model.decoder_layers=0,1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not started") == 2 and shown.count("was left out: model.mask_from = ") == 2
    assert not started and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no combination is possible; the first: unknown key model.depth"):
        sweep.main([*line, "model.depth=1,2"])
    for wrong in ("model.mask_from", "mask_from=1", "model.mask_from="):
        with pytest.raises(UserError, match="write section.key=value,value"):
            sweep.main([*line, wrong])
    with pytest.raises(UserError, match="given twice"):
        sweep.main([*line, "masking.rate=0.1", "masking.rate=0.2"])


def test_a_failed_run_does_not_end_the_sweep(
    tiny: Path, tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(tiny / "tiny.yaml"), "budget.steps=1", "--output", str(tmp_path), "--over"]
    assert sweep.main([*line, f"corpus.train={tmp_path}/none,{tiny}/train"]) == 2
    assert len(started) == 2
    states = [row["state"] for row in json.loads((tmp_path / "sweep.json").read_text())]
    assert states == ["failed", "finished"]


def test_absurd_budgets_are_told_once(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [word.replace("steps=4", "steps=900000") for word in words(tiny, tmp_path, "--dry-run")]
    sweep.main(many)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "times (epochs)" in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {NAMES[0]} and {len(NAMES) - 1} more: ")
    sweep.main(words(tiny, tmp_path, "--dry-run"))
    assert "epochs" not in capsys.readouterr().err


def test_values_with_commas_and_names() -> None:
    assert sweep._axis("masking.corruption=[0.8,0.1,0.1],[1,0,0]")[1] == ["[0.8,0.1,0.1]", "[1,0,0]"]
    assert sweep._axis("model.decoder=self, cross") == ("model.decoder", ["self", "cross"])
    blends = ["[[0.5, a], [0.5, b]]", "c"]
    assert sweep._axis(f"corpus.train={','.join(blends)}") == ("corpus.train", blends)
    assert sweep._slug("[0.8, 0.1, 0.1]") == "0.8-0.1-0.1" and sweep._slug("/a b/c") == "a-b-c"


@pytest.mark.parametrize("over", ["masking.rate=0.15,0.15", "corpus.train=a/b,a-b"])
def test_two_runs_of_one_name_are_refused(over: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="two runs would be named (rate-0.15|train-a-b); give each value once"
    ):
        sweep.main([str(tiny / "tiny.yaml"), "--output", str(tmp_path / "s"), "--over", over])
    assert not (tmp_path / "s").exists()


def test_two_ways_to_write_a_value_are_one_run(tiny: Path, tmp_path: Path) -> None:
    line = [str(tiny / "tiny.yaml"), "--output", str(tmp_path / "s"), "--over", "run.seed=010,10"]
    with pytest.raises(UserError, match="seed-010 and seed-10 are the same; give each value once"):
        sweep.main(line)


@pytest.mark.parametrize("text", ["1:30", "yes", "0x10"])
def test_a_swept_number_is_decimal(text: str, tiny: Path, tmp_path: Path) -> None:
    line = [str(tiny / "tiny.yaml"), "--output", str(tmp_path / "s"), "--over", f"train.batch_size={text}"]
    with pytest.raises(UserError, match="no combination is possible; the first: .*should be a number"):
        sweep.main(line)


def test_a_run_that_could_not_read_its_corpus_is_not_queued(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [str(tiny / "tiny.yaml"), "--output", str(tmp_path / "s"), "--slurm", "--over"]
    assert sweep.main([*line, f"corpus.train={tiny}/train,{tmp_path}/none"]) == 2
    assert f"error: {tmp_path}/none" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_as_a_program_that_is_stopped(tiny: Path, tmp_path: Path) -> None:
    """SIGTERM to the sweep reaches the run, which saves; both say 75."""
    command: list[Any] = [sys.executable, "-m", "tools.sweep", tiny / "tiny.yaml", "budget.steps=100000"]
    command += ["evaluate.every_steps=null", "--output", tmp_path, "--over", "run.seed=1,2"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "seed-1" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(PATIENCE) == 75
    status = json.loads((tmp_path / "seed-1" / "status.json").read_text())
    assert status["state"] == "stopped" and status["exit_code"] == 75 and status["step"] > 0
    assert not (tmp_path / "seed-2").exists()
