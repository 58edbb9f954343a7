"""Whatever happens to a rank: the others name it, and the job ends so that a queue starts it again."""

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any

import pytest

from pretrain.errors import UserError
from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder
from tests.support import runs
from tests.support.ranks import PATIENCE
from tests.support.runs import NEVER, UPDATE, Attempt, Outcome, Paced, Strike, finish, result

Words = Callable[..., list[str]]
STALL = "monitor.stall_seconds=6"


@dataclass(frozen=True)
class Blow(Strike):
    """What befalls a rank just before its call number `at`."""

    kind: str = ""

    def hit(self, *args: Any) -> None:
        BLOWS[self.kind]()


def fail() -> None:
    raise RuntimeError("only here")


def refuse() -> None:
    raise UserError("only here; free space")


def slow() -> None:
    """As a disk may be, by what a launcher needs to see that another rank has left."""
    time.sleep(2.0)


def pause() -> None:
    """For longer than a rank may stand still elsewhere, and until both ranks have said that this one does."""
    time.sleep(8.0)
    logs = list(Path(os.readlink("/proc/self/fd/2")).parent.iterdir())
    while not all(" stands still, in save (" in log.read_text(encoding="utf-8") for log in logs):
        time.sleep(0.05)


BLOWS: dict[str, Callable[[], Any]] = {
    "sleeps": lambda: time.sleep(PATIENCE),
    "holds Python's lock": lambda: ctypes.PyDLL(None).sleep(int(PATIENCE)),
    "stopped": lambda: os.kill(os.getpid(), SIGSTOP),
    "pauses": pause,
    "killed": lambda: os.kill(os.getpid(), SIGKILL),
    "raises": fail,
    "refuses": refuse,
    "slow": slow,
}
ENDS_ITSELF = ("sleeps", "raises", "pauses")
SAVE = ("pretrain.checkpoint:save",)
WRITE = ("pretrain.checkpoint:_write",)
"""On a thread, to which the other rank's sends what it has."""
CASES: dict[str, tuple[int, str, int, tuple[str, ...]]] = {
    "one of two sleeps": (2, "sleeps", 1, UPDATE),
    "the only one sleeps": (1, "sleeps", 0, UPDATE),
    "one holds Python's lock": (2, "holds Python's lock", 1, UPDATE),
    "one is stopped": (3, "stopped", 1, UPDATE),
    "the first is stopped": (2, "stopped", 0, UPDATE),
    "one is killed": (3, "killed", 2, UPDATE),
    "the first is killed": (2, "killed", 0, UPDATE),
    "one raises": (2, "raises", 1, UPDATE),
    "one raises in a save": (2, "raises", 0, SAVE),
    "one pauses in a save": (2, "pauses", 0, SAVE),
    "one pauses in a write": (2, "pauses", 0, WRITE),
}


@pytest.fixture(scope="module")
def ended(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Name -> (run folder, outcome) of all cases, which wait side by side."""
    attempts = {}
    for name, (ranks, kind, victim, targets) in CASES.items():
        run = tmp_path_factory.mktemp("run")
        words = [
            str(tiny / "tiny.yaml"),
            f"run.dir={run}",
            STALL,
            "budget.steps=1000",
            "train.batch_size=6",
            "evaluate.every_steps=null",
        ]
        at = 5 if targets == UPDATE else 1
        options = [] if targets == UPDATE else ["checkpoint.every_steps=3"]
        options += ["checkpoint.background=true", "parallel.tensor=2"] if targets == WRITE else []
        options += ["budget.steps=4"] if kind == "pauses" else []
        blow = Blow(SIGKILL, at, targets, victim, kind)
        attempts[name] = run, victim, Attempt([*words, *options], ranks, blow), kind in ENDS_ITSELF
    yield {name: (run, outcome(*others)) for name, (run, *others) in attempts.items()}


def outcome(victim: int, started: Attempt, itself: bool) -> Outcome:
    """How it ended; a victim that does not end by itself is killed when the others are gone."""
    for rank, process in enumerate(started.processes):
        if rank != victim or itself:
            process.join(PATIENCE)
    started.processes[victim].kill()
    return started.wait()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("one of two sleeps", 75, "rank 1 on HOST stands still, in data (train.py"),
        ("the only one sleeps", 75, "rank 0 on HOST stands still, in data (train.py"),
        ("one holds Python's lock", 75, "rank 1 on HOST gives no sign of life, last seen in "),
        ("one is stopped", 75, "rank 1 on HOST is stopped (SIGSTOP), last seen in "),
        ("the first is stopped", 75, "rank 0 on HOST is stopped (SIGSTOP), last seen in "),
        ("one is killed", 1, "rank 2 on HOST is dead, last seen in "),
        ("the first is killed", 1, "rank 0 on HOST is dead, last seen in "),
        ("one raises", 1, "rank 1 on HOST ended: RuntimeError: only here"),
        ("one raises in a save", 1, "rank 0 on HOST ended: RuntimeError: only here"),
    ],
)
def test_a_rank_is_named(name: str, code: int, said: str, ended: dict[str, tuple[Path, Outcome]]) -> None:
    run, (codes, text) = ended[name]
    ranks, kind, victim, _ = CASES[name]
    said = said.replace("HOST", os.uname().nodename)
    living = [each for rank, each in enumerate(codes) if rank != victim or kind in ENDS_ITSELF]
    assert living == [code] * len(living), text
    errors = [line for line in text.splitlines() if line.startswith(f"error: {said}")]
    assert len(errors) == len(living) - (kind == "raises"), text
    status = RunFolder(run).status()
    assert (status["state"], status["exit_code"]) == ("stopped" if code == 75 else "failed", code)
    if kind != "raises":
        assert status["reason"].startswith(said) and status["stalled"]["ranks"] == [victim]
        assert status["stalled"]["hosts"] == [os.uname().nodename]


@pytest.mark.parametrize("name", ["one pauses in a save", "one pauses in a write"])
def test_what_takes_long_is_named_and_goes_on(name: str, ended: dict[str, tuple[Path, Outcome]]) -> None:
    run, (codes, text) = ended[name]
    assert codes == [0, 0], text
    said = f"warning: rank 0 on {os.uname().nodename} stands still, in save ("
    assert sum(line.startswith(said) for line in text.splitlines()) == 2, text
    assert "stalled" not in RunFolder(run).status()


def by_srun(words: list[str], blow: Blow) -> Outcome:
    """Two ranks as srun has them: with --kill-on-bad-exit it tells the others to stop when one has failed."""
    started = Attempt(words, 2, blow)
    wait([process.sentinel for process in started.processes])
    for process in started.processes:
        process.terminate()
    return started.wait()


def test_what_one_rank_refuses_is_said_under_srun(words: Words, tmp_path: Path) -> None:
    """And stays: the job is not started again as one that was preempted."""
    options = (STALL, "budget.steps=1000")
    outcome = by_srun(words("a", *options), Blow(SIGKILL, 5, UPDATE, 1, "refuses"))
    assert outcome.codes == [2, 2], outcome.text
    (line,) = re.findall("^error: .*", outcome.text, re.MULTILINE)
    assert re.search("rank 1 on .* ended: only here; free space", line)
    status = RunFolder(tmp_path / "a").status()
    assert (status["state"], status["exit_code"]) == ("failed", 2) and "only here" in status["reason"]


def test_who_ends_a_job_is_named_under_srun(words: Words, tmp_path: Path) -> None:
    options = (STALL, "budget.steps=1000")
    outcome = by_srun(words("a", *options), Blow(SIGKILL, 5, UPDATE, 1, "raises"))
    assert outcome.codes == [1, 1], outcome.text
    status = RunFolder(tmp_path / "a").status()
    assert status["state"] == "failed" and "ended: RuntimeError: only here" in status["reason"]
    assert status["stalled"]["ranks"] == [1]


def test_ranks_stay_until_it_is_written_why_they_end(words: Words, tmp_path: Path) -> None:
    blow = Blow(SIGKILL, 1, ("pretrain.run_folder:RunFolder.write_failure",), 0, "slow")
    outcome = by_srun(words("a", STALL, "optimizer.lr=1e30", "train.max_skipped=1"), blow)
    assert outcome.codes == [2, 2], outcome.text
    status = RunFolder(tmp_path / "a").status()
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert len(re.findall("^error: ", outcome.text, re.MULTILINE)) == 1


def test_the_same_command_goes_on(ended: dict[str, tuple[Path, Outcome]], tiny: Path, tmp_path: Path) -> None:
    run, _ = ended["one raises in a save"]
    words = [str(tiny / "tiny.yaml"), "budget.steps=4", "train.batch_size=6", "evaluate.every_steps=null"]
    finish([*words, f"run.dir={run}"], 2)
    finish([*words, f"run.dir={tmp_path}"], 2)
    assert result(run) == result(tmp_path)


def test_a_job_that_is_suspended_goes_on(words: Words, tmp_path: Path) -> None:
    """For longer than a rank may be silent; it has no end of its own that could come first."""
    options = ("monitor.stall_seconds=3", "budget.steps=1000000", "evaluate.every_steps=null")
    job = Attempt(words("a", *options), 2)

    def send(number: Signals) -> None:
        for process in job.processes:
            os.kill(process.pid, number)

    def updates() -> int:
        assert all(process.is_alive() for process in job.processes), job.wait().text
        return len(read_metrics(tmp_path / "a")) if (tmp_path / "a" / "metrics.jsonl").exists() else 0

    while not updates():
        time.sleep(0.01)
    send(SIGSTOP)
    time.sleep(4.0)
    before = updates()
    send(SIGCONT)
    while updates() <= before:
        time.sleep(0.01)
    os.kill(job.processes[1].pid or 0, SIGTERM)
    ended = job.wait()
    assert ended.codes == [75, 75], ended.text
    assert RunFolder(tmp_path / "a").status()["reason"] == "stopped by another rank"


class Slow(Paced):
    """A rank by whose clock only what it does takes time, and very long."""

    def arm(self) -> None:
        runs.PACE["pretrain.feed:Feed.take"] = 1000.0
        super().arm()


def test_the_log_names_the_slowest_rank(words: Words, tmp_path: Path) -> None:
    job = Attempt(words("a", "monitor.stall_seconds=0"), 2, Slow(SIGKILL, NEVER, rank=1))
    ended = job.wait()
    assert ended.codes == [0, 0], ended.text
    lines = [line for line in read_metrics(tmp_path / "a") if "slowest_rank" in line]
    assert {line["slowest_rank"] for line in lines} == {1}
    assert "slowest rank 1 +" in ended.text
