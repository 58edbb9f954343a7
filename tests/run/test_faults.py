"""The short form of ``python -m tests.faults``, and faults that it, or the long one, has found."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder
from pretrain.signals import Signals
from tests.faults.campaign import campaign, read
from tests.faults.ettr import Costs, foreseen, measure
from tests.faults.kinds import Fault, Plan, free
from tests.faults.workshop import workshop
from tests.support.runs import Outcome, attempt, finish

SEED = 2156
"""Of runs on one rank, of both engines, and one on two ranks with tensor parallelism."""
Words = Callable[..., list[str]]


def test_thirty_faults(tmp_path: Path) -> None:
    """Each is as promised, and no run is the worse for any."""
    output = tmp_path / "faults.jsonl"
    records = campaign(30, SEED, output)
    assert len(records) >= 30
    assert [record for record in records if record.broken or not record.equal] == []
    assert read(output) == records
    assert campaign(30, SEED, output) == records  # there is nothing left to do


def struck(words: list[str], fault: Fault, folder: Path, ranks: int = 1) -> Outcome:
    plan = Plan({0: fault}, folder, folder)
    outcome = attempt(words, ranks, plan)
    assert plan.struck(0)
    return outcome


def test_a_loss_that_is_no_number_on_one_rank_of_a_tensor_group(words: Words, tmp_path: Path) -> None:
    """Its mean is over the data ranks: the others of the group do not see it."""
    fault = Fault("not a number", "backward", 2, rank=1)
    outcome = struck(words("a", "parallel.tensor=2"), fault, tmp_path, ranks=2)
    assert outcome.codes == [2, 2]
    assert re.search("^error: step 8: the gradients of the last 7 updates", outcome.text, re.MULTILINE)


def test_a_copy_that_fails_on_another_rank_ends_all_before_the_next_save(
    words: Words, tmp_path: Path
) -> None:
    """Rank 0 waits for what it would send, and training goes on meanwhile."""
    options = ("parallel.tensor=2", "checkpoint.background=true", "checkpoint.every_steps=6")
    fault = Fault("raise", "copying", 1, rank=1)
    outcome = struck(words("a", *options, "budget.steps=24"), fault, tmp_path, ranks=2)
    assert outcome.codes == [1, 1]
    assert "rank 1 on" in outcome.text and "ended: RuntimeError: injected" in outcome.text
    assert max(line["step"] for line in read_metrics(tmp_path / "a")) < 12
    assert RunFolder(tmp_path / "a").status()["exit_code"] == 1
    finish(words("a", *options, "budget.steps=8"), 2)


@pytest.mark.parametrize("place", ["ledger", "metrics", "status", "save", "save in the background"])
def test_a_disk_that_is_full_is_told_once_with_the_file(place: str, tiny: Path) -> None:
    with workshop() as shop:
        if not shop.own_disk:
            pytest.skip("a file system to fill takes root")
        background = str("background" in place).lower()
        words = [str(tiny / "tiny.yaml"), f"run.dir={shop.disk / 'a'}", "checkpoint.every_steps=2"]
        words += [f"checkpoint.background={background}"]
        outcome = struck(words, Fault("disk full", place.split()[0], 3), shop.disk)
        assert outcome.codes == [2]
        (line,) = re.findall("^error: .*", outcome.text, re.MULTILINE)
        assert re.match(rf"error: {shop.disk / 'a'}/\S+: .*free space", line), line
        free(shop.disk)
        finish(words)


@pytest.mark.parametrize("name", ["provenance.json", "status.json", "tokenizer/tokenizer.model"])
@pytest.mark.parametrize("content", ["", "7", '["'])
def test_a_file_that_cannot_be_read_is_written_anew(
    name: str, content: str, words: Words, tmp_path: Path
) -> None:
    """What provenance.json held is kept."""
    finish(words("a", "budget.steps=1"))
    path = tmp_path / "a" / name
    before = path.read_bytes()
    path.write_text(content)
    finish(words("a", "budget.steps=2"))
    if name == "provenance.json":
        assert (tmp_path / "a" / "provenance-damaged-1.json").read_text() == content
        assert len(json.loads(path.read_text())) == 1
    elif name == "status.json":
        assert json.loads(path.read_text())["state"] == "finished"
    else:
        assert path.read_bytes() == before


def test_what_is_foreseen_of_failures() -> None:
    """Young's and Daly's interval is the best where failures are rare, and what is measured is near to it."""
    costs, mtbf = Costs(start=20, stop=2, write=5), 3600.0
    best = costs.best_interval(mtbf)
    assert foreseen(best, mtbf, costs) > max(foreseen(times * best, mtbf, costs) for times in (0.8, 1.25))
    measured = measure(300.0, "auto", 3, Costs(start=2, stop=0.5, write=9), length=3, updates=120)
    assert measured.failures >= 1 and abs(measured.ettr - measured.foreseen) < 0.1
    assert measured.ettr < measured.ettr_by_ledger < 1  # which is not told of the last seconds


def test_only_a_second_ctrl_c_interrupts_at_once() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        signals = Signals()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
