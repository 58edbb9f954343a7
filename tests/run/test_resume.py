"""Stopped or killed anywhere and started again, a run ends as if nothing had happened."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, Signals
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.files import TEMPORARY
from pretrain.run_folder import RunFolder
from tests.conftest import encode
from tests.support.runs import DISK, NEVER, Attempt, Strike, attempt, finish, losses, result

ROOT = Path(__file__).parents[2]
Words = Callable[..., list[str]]
Whole = Callable[..., dict[str, Any]]

QUERY = ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query")
VARIANTS = {
    "mlm": (),
    "bf16-query": ("train.precision=bf16", *QUERY),
    "modern": (
        "train.precision=bf16",
        "model.block=modern",
        "train.recompute=block",
        "corpus.documents=bounded",
    ),
    "dropout": ("model.dropout=0.1", "train.micro_batch_size=4", *QUERY),
    "views-over-epochs": ("masking.views=2", "masking.rate=0.3"),
    "views-by-counts": ("masking.views=3", "masking.views_partition=counts"),
    "views-in-a-batch": ("masking.views=2", "masking.views_mode=batch"),
    "deepspeed": ("train.engine=deepspeed", "parallel.zero=1"),
    "stable-adamw": ("optimizer.kind=stable-adamw",),
    "muon": ("optimizer.kind=muon", "model.block=modern", *QUERY),
}


def status(run: Path) -> dict[str, Any]:
    return RunFolder(run).status()


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """``whole(ranks)``: the result of the run of tiny.yaml that nobody disturbed."""

    @cache
    def undisturbed(ranks: int = 1) -> dict[str, Any]:
        run = tmp_path_factory.mktemp("whole")
        finish([str(tiny / "tiny.yaml"), f"run.dir={run}"], ranks)
        return result(run)

    return undisturbed


def check_ledger(run: Path) -> None:
    command = [sys.executable, "-m", "tools.ledger", "check", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- kill -9 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_between_checkpoints(variant: str, words: Words, tiny: Path, tmp_path: Path) -> None:
    """Twelve updates are one and a half epochs; each attempt but the last is killed in its fifth."""
    options = (f"corpus.train={tiny}/short", "budget.steps=12", *VARIANTS[variant])
    finish(words("whole", *options))
    for code in (-SIGKILL, -SIGKILL, -SIGKILL, 0):
        cut = attempt(words("cut", "checkpoint.every_steps=3", *options), strike=Strike(SIGKILL, 5))
        assert cut.codes == [code], cut.text
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    check_ledger(tmp_path / "cut")


@pytest.mark.parametrize(
    ("victim", "layout"),
    [(0, ("parallel.tensor=2",)), (1, ("train.engine=deepspeed", "parallel.zero=1"))],
)
def test_killed_while_ranks_join_their_pieces(
    victim: int, layout: tuple[str, ...], words: Words, tmp_path: Path
) -> None:
    """In the second save beside training: the first is gone on from, and in the end all bytes are those of
    saves that training waits for."""
    options = (*layout, "budget.steps=6", "checkpoint.every_steps=2", "evaluate.every_steps=2")
    options = (*options, "schedule.warmup=0", "schedule.floor=1")
    finish(words("whole", *options), 2)
    options = (*options, "checkpoint.background=true")
    finish(words("cut", *options, "budget.steps=2"), 2)
    strike = Strike(SIGKILL, 3, ("torch.distributed:recv", "torch.distributed:send"), victim)
    cut = attempt(words("cut", *options), 2, strike)
    assert cut.codes[victim] == -SIGKILL, cut.text
    assert checkpoint.steps(tmp_path / "cut") == [2]
    finish(words("cut", *options), 2)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    check_ledger(tmp_path / "cut")


@pytest.mark.parametrize("background", ["false", "true"])
def test_killed_before_every_write(background: str, words: Words, tmp_path: Path) -> None:
    """The n-th attempt dies just before its n-th fsync or rename, wherever that is."""
    options = ("budget.steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    options = (*options, f"checkpoint.background={background}")
    finish(words("whole", *options))
    for at in count(1):
        cut = attempt(words("cut", *options), strike=Strike(SIGKILL, at, DISK))
        if cut.codes == [0]:
            break
        assert cut.codes == [-SIGKILL], cut.text
    assert at > 20
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob(TEMPORARY + "*"))
    check_ledger(tmp_path / "cut")


def test_killed_at_any_time(words: Words, tmp_path: Path) -> None:
    options = ("budget.steps=80", "checkpoint.every_steps=2", "monitor.tensorboard=true")
    finish(words("whole", *options))
    instants = random.Random(1)
    for _ in range(6):
        started = Attempt(words("cut", *options))
        time.sleep(instants.uniform(0.05, 0.8))
        started.processes[0].kill()
        assert set(started.wait().codes) <= {-SIGKILL, 0}
    finish(words("cut", *options))
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    check_ledger(tmp_path / "cut")


def test_killed_while_it_wrote_a_line(words: Words, tmp_path: Path, whole: Whole) -> None:
    attempt(words("cut", "checkpoint.every_steps=3"), strike=Strike(SIGKILL, 5))
    for name in ("ledger.jsonl", "metrics.jsonl"):
        with open(tmp_path / "cut" / name, "ab") as file:
            file.write(b'{"previous": "12')
    finish(words("cut"))
    assert result(tmp_path / "cut") == whole()
    check_ledger(tmp_path / "cut")


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_others(victim: int, words: Words, tmp_path: Path, whole: Whole) -> None:
    cut = attempt(words("cut", "checkpoint.every_steps=3"), 2, Strike(SIGKILL, 5, rank=victim))
    assert cut.codes[victim] == -SIGKILL
    assert cut.codes[1 - victim] == 1
    finish(words("cut"), ranks=2)
    assert result(tmp_path / "cut") == whole(2)


# ---- asked to stop -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1, SIGINT])
def test_signal_saves_and_exits_75(number: Signals, words: Words, tmp_path: Path, whole: Whole) -> None:
    stopped = attempt(words("cut"), strike=Strike(number, 5))
    assert stopped.codes == [75], stopped.text
    assert "Traceback" not in stopped.text
    assert f"cut: stopped by {number.name}; the same command goes on with it" in stopped.text
    expected = {"state": "stopped", "exit_code": 75, "step": 5, "reason": f"stopped by {number.name}"}
    assert status(tmp_path / "cut").items() >= expected.items()
    assert checkpoint.find_verified(tmp_path / "cut")[0].name == "step-00000005"
    finish(words("cut"))
    assert result(tmp_path / "cut") == whole()
    assert ledger.total([tmp_path / "cut"]).lost_flops == 0


def test_signal_to_one_rank_stops_all(words: Words, tmp_path: Path, whole: Whole) -> None:
    stopped = attempt(words("cut"), 2, Strike(SIGUSR1, 5, rank=1))
    assert stopped.codes == [75, 75], stopped.text
    assert status(tmp_path / "cut")["step"] == 5
    finish(words("cut"), ranks=2)
    assert result(tmp_path / "cut") == whole(2)


def test_signal_in_the_last_update(words: Words, tmp_path: Path, whole: Whole) -> None:
    """What is left for the next start is the evaluation that belongs to the end."""
    assert attempt(words("cut"), strike=Strike(SIGTERM, 8)).codes == [75]
    finish(words("cut"))
    assert losses(tmp_path / "cut") == whole()["losses"]
    assert attempt(words("bare", "corpus.valid="), strike=Strike(SIGTERM, 8)).codes == [0]


# ---- started again -------------------------------------------------------------------------------


def files(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


def test_finished_run_stays_as_it_is(words: Words, tmp_path: Path) -> None:
    finish(words("a"))
    before, saved, lines = result(tmp_path / "a"), files(tmp_path / "a"), len(ledger.read(tmp_path / "a"))
    finish(words("a"))
    assert (result(tmp_path / "a"), files(tmp_path / "a")) == (before, saved)
    events = [line.event for line in ledger.read(tmp_path / "a")[lines:]]
    assert [event for event in events if event != "heartbeat"] == ["resume", "finish"]


def test_finished_run_goes_on_with_a_larger_budget(words: Words, tmp_path: Path) -> None:
    finish(words("a"))
    finish(words("a", "budget.steps=10"))
    assert [line[0] for line in losses(tmp_path / "a")] == list(range(1, 11))
    assert ledger.total([tmp_path / "a"]).lost_flops == 0
    assert (status(tmp_path / "a")["state"], status(tmp_path / "a")["step"]) == ("finished", 10)


def test_run_goes_on_recomputing(words: Words, tmp_path: Path, whole: Whole) -> None:
    """As the plan may propose when the memory is less; counted by its own cost from there on."""
    options = ("model.dropout=0.1", "train.batch_size=8")
    assert attempt(words("cut", *options), strike=Strike(SIGTERM, 5)).codes == [75]
    more = ("train.recompute=block", "train.deterministic=false", "train.micro_batch_size=4")
    said = finish(words("cut", *options, *more))
    assert "dropout     other elements are dropped from here on" in said.text
    assert "micro_batch 8 -> 4" in said.text
    (change,) = [line for line in ledger.read(tmp_path / "cut") if line.event == "layout-change"]
    before, now = change.details["before"], change.details["now"]
    assert (before["recompute"], now["recompute"]) == ("none", "block")
    assert (before["deterministic"], now["deterministic"]) == (True, False)
    check_ledger(tmp_path / "cut")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("exp_avg_sq.safetensors", halve),
        ("state.json", flip),
        ("manifest.json", halve),
    ],
)
def test_corrupt_checkpoint_is_named_and_passed_over(
    name: str, damage: Callable[[Path], None], words: Words, tmp_path: Path, whole: Whole
) -> None:
    attempt(words("cut", "checkpoint.every_steps=3"), strike=Strike(SIGTERM, 5))
    bad = tmp_path / "cut" / "checkpoints" / "step-00000005" / name
    damage(bad)
    outcome = finish(words("cut"))
    (warning,) = [line for line in outcome.text.splitlines() if "refused" in line]
    assert str(bad.parent) in warning and name in warning
    assert result(tmp_path / "cut") == whole()
    totals = ledger.total([tmp_path / "cut"])
    assert totals.lost_flops == totals.flops["total"] // 4  # updates 4 and 5 of 8


# ---- refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a tokenizer of its own."""
    from pretrain.data.tokenizer import train_sentencepiece

    folder = tmp_path_factory.mktemp("other")
    texts = [f"{i} {i * i} a text about the number {i}" for i in range(300)]
    train_sentencepiece(texts, folder / "tokenizer", "bpe", 330)
    encode(texts, folder / "tokenizer", folder / "train")
    return folder


def test_changed_config_is_refused(words: Words, tiny: Path, other: Path, tmp_path: Path) -> None:
    attempt(words("a"), strike=Strike(SIGTERM, 5))
    kept = {path: path.read_bytes() for path in (tmp_path / "a").glob("*.yaml")}
    changes = {
        ("optimizer.lr=1e-3", "masking.rate=0.3"): (
            "optimizer.lr: 0.003 -> 0.001",
            "masking.rate: 0.5 -> 0.3",
        ),
        (f"corpus.train={tiny}/short",): ("corpus: train has other content",),
        (f"corpus.train={other}/train", "corpus.valid="): (
            "corpus: train has other content",
            "corpus: tokenizer has other content",
            "model.vocab_size: 400 -> 330",
        ),
    }
    for overrides, expected in changes.items():
        outcome = attempt(words("a", *overrides))
        said = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
        assert outcome.codes == [2] and "Traceback" not in outcome.text
        assert len(said) == len(expected)
        for change in expected:
            assert any(f"error: {change}" in line for line in said), (change, said)
        assert {path: path.read_bytes() for path in kept} == kept
    finish(words("a", "train.micro_batch_size=4", "checkpoint.every_steps=2", "monitor.log_every=2"))


def test_checkpoints_that_are_gone_are_no_new_start(words: Words, tmp_path: Path) -> None:
    """Taken away by a cleaner, which leaves the small pointer; a dry run says so too."""
    finish(words("a", "budget.steps=2"))
    for path in (tmp_path / "a" / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    for more in ([], ["--dry-run"]):
        outcome = attempt([*words("a", "budget.steps=4"), *more])
        assert outcome.codes == [2] and "step-00000002: is gone, and no other is there" in outcome.text
    assert RunFolder(tmp_path / "a").status()["state"] == "finished"


def test_folder_in_use_is_refused(words: Words, tmp_path: Path) -> None:
    first = Attempt(words("a", "budget.steps=100000"))
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert first.processes[0].is_alive()
        time.sleep(0.01)
    for ranks in (1, 2):
        second = attempt(words("a"), ranks)
        assert second.codes == [2] * ranks
        assert f"in use by process {first.processes[0].pid}" in second.text
    assert status(tmp_path / "a")["state"] == "running"
    first.processes[0].terminate()
    assert first.wait().codes == [75]
    assert status(tmp_path / "a")["state"] == "stopped"


class Restarted(Strike):
    """A rank of a job that Slurm has started again."""

    def arm(self) -> None:
        os.environ["SLURM_RESTART_COUNT"] = "1"


def test_a_job_that_slurm_started_again_waits_for_what_is_left_of_it(words: Words, tmp_path: Path) -> None:
    """On a node that Slurm has lost a rank may go on for a while."""
    first = Attempt(words("a", "budget.steps=100000"))
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert first.processes[0].is_alive()
        time.sleep(0.01)
    second = Attempt(words("a", "budget.steps=100000"), strike=Restarted(SIGTERM, NEVER))
    while f"in use by process {first.processes[0].pid}" not in second.said():
        assert second.processes[0].is_alive(), second.said()
        time.sleep(0.05)
    for started in (first, second):
        started.processes[0].terminate()
        assert started.wait().codes == [75]


def test_copy_of_a_run_goes_on_elsewhere(words: Words, tmp_path: Path, whole: Whole) -> None:
    attempt(words("cut"), strike=Strike(SIGTERM, 5))
    shutil.copytree(tmp_path / "cut", tmp_path / "copy")
    finish(words("copy"))
    assert result(tmp_path / "copy") == whole()
    assert json.loads((tmp_path / "copy" / "provenance.json").read_text())[-1]["launcher"] == "python"
