"""The ledger under a fake clock: every figure is exact."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from pretrain.account import ledger, ledger_writer
from pretrain.account.flops import Flops, StepCost
from pretrain.account.ledger_writer import Ledger
from pretrain.errors import UserError
from tests.support.ranks import PATIENCE
from tests.support.runs import Strike, attempt, finish
from tools.ledger import __main__ as program

COST = StepCost(
    samples=4,
    tokens_seen=512,
    tokens_real=504,
    tokens_predicted=76,
    flops=Flops(encoder=3000, decoder=600, head=90),
    hardware_flops=4890,
    token_layers=24.5,
)


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def work(self, account, steps, seconds=2.0):
        for _ in range(steps):
            self.now += seconds
            account.step(COST)

    def spend(self, account, category, seconds):
        with account.time(category):
            self.now += seconds


def opened(run, clock, ranks=2):
    return Ledger.open(run, ranks, "cpu", clock, started=clock.now)


def device_seconds(**given):
    parts = {**dict.fromkeys((*ledger.CATEGORIES, "lost"), 0.0), **given}
    return {**parts, "total": sum(parts.values())}


def test_every_figure_of_an_undisturbed_attempt(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    clock.now += 5
    account.begin()
    clock.work(account, 2)
    clock.now += 0.5  # nobody claims this
    clock.spend(account, "evaluate", 3)
    clock.work(account, 1)
    account.save()
    clock.spend(account, "checkpoint", 4)
    clock.now += 1.5  # nor this
    account.note("finish", reason="budget")
    expected = {
        "steps": 3,
        "samples": 12,
        "tokens_seen": 1536,
        "tokens_real": 1512,
        "tokens_predicted": 228,
        "flops": {"encoder": 9000, "decoder": 1800, "head": 270, "total": 11070},
        "hardware_flops": 14670,
        "token_layers": 73.5,
        "device_seconds": device_seconds(
            productive=12.0, evaluate=6.0, checkpoint=8.0, startup=10.0, idle=4.0
        ),
        "lost_flops": 0,
        "joules": None,
        "joules_by_part": {},
        "metered_device_seconds": 0.0,
        "peak_bytes": 0,
        "attempts": 1,
    }
    assert asdict(account.totals()) == expected
    assert asdict(ledger.total([tmp_path])) == expected


def test_each_line_is_a_full_statement(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    clock.work(account, 1)
    account.note("evaluate", loss=6.5)
    start, line = ledger.read(tmp_path)
    assert start.event == "start" and start.previous == "" and start.attempt == 1
    assert line.previous == ledger.line_hash(json.dumps(start.to_dict()).encode())
    assert {name: line.to_dict()[name] for name in ("event", "loss", "time", "device", "ranks", "step")} == {
        "event": "evaluate",
        "loss": 6.5,
        "time": 1002.0,
        "device": "cpu",
        "ranks": 2,
        "step": 1,
    }
    assert line.seconds == {
        "productive": 2.0, "evaluate": 0.0, "checkpoint": 0.0, "startup": 0.0, "idle": 0.0
    }  # fmt: skip


def test_what_a_killed_attempt_did_after_the_checkpoint_is_lost(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    clock.now += 5
    account.begin()
    clock.work(account, 3)
    head = account.save()
    clock.spend(account, "checkpoint", 1)
    clock.work(account, 4)
    clock.spend(account, "evaluate", 3)  # 12 s after the save's line: a heartbeat
    clock.work(account, 1)  # never written
    clock.now += 100  # killed; nothing runs

    again = opened(tmp_path, clock)
    clock.now += 7
    again.begin(3, head)
    clock.work(again, 2)
    totals = again.totals()
    assert totals.steps == 5 and totals.attempts == 2
    assert totals.flops["total"] == 5 * COST.flops.total
    assert totals.lost_flops == 4 * COST.flops.total
    assert totals.device_seconds == device_seconds(
        productive=2 * (6.0 + 4.0), checkpoint=2.0, startup=2 * (5.0 + 7.0), lost=2 * (8.0 + 3.0)
    )
    resumed = ledger.read(tmp_path)[-1]
    assert resumed.event == "resume" and resumed.details == {"head": head, "lost_steps": 4}
    assert ledger.check(tmp_path) == 5


def test_a_run_without_a_checkpoint_starts_over_and_keeps_the_bill(tmp_path, caplog):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    clock.work(account, 6)  # the heartbeat of step 5 is the last word
    again = opened(tmp_path, clock, ranks=4)
    assert not caplog.messages
    again.begin()
    assert caplog.messages == [f"{tmp_path}: begins anew, as there is no checkpoint; 5 updates are lost"]
    totals = again.totals()
    assert totals.steps == 0 and totals.samples == 0 and totals.flops["total"] == 0
    assert totals.lost_flops == 5 * COST.flops.total
    assert totals.device_seconds == device_seconds(lost=20.0)


def test_seconds_of_attempts_with_other_ranks_add_up(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock, ranks=2)
    account.begin()
    clock.work(account, 3)
    head = account.save()
    again = opened(tmp_path, clock, ranks=8)
    again.begin(3, head)
    clock.work(again, 1)
    assert again.totals().device_seconds == device_seconds(productive=2 * 6.0 + 8 * 2.0)


def test_falling_back_beyond_one_attempt_counts_nothing_twice(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock, ranks=1)
    account.begin()
    clock.work(account, 1)
    old = account.save()
    clock.work(account, 2)
    new = account.save()
    second = opened(tmp_path, clock, ranks=1)
    second.begin(3, new)
    clock.work(second, 5)  # 10 s: a heartbeat at step 8
    third = opened(tmp_path, clock, ranks=1)
    third.begin(1, old)  # the checkpoint of step 3 was found corrupt
    totals = third.totals()
    assert totals.lost_flops == 7 * COST.flops.total
    assert totals.device_seconds == device_seconds(productive=2.0, lost=14.0)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_vanishes_whatever_is_killed(tmp_path, seed):
    """Steps of 12 s, so that each has its line; saves, kills and fallbacks at random."""
    dice, clock = random.Random(seed), Clock()
    saves, taken, spent = [(0, "")], 0, 0.0
    for _ in range(6):
        step, head = dice.choice(saves)
        account = opened(tmp_path, clock, ranks=3)
        begun = clock.now
        clock.now += dice.randint(0, 9)
        account.begin(step, head)
        for _ in range(dice.randint(0, 8)):
            clock.work(account, 1, 12.0)
            taken += 1
            if dice.random() < 0.3:
                clock.spend(account, "checkpoint", 11)
                saves.append((account.totals().steps, account.save()))
        spent += 3 * (clock.now - begun)
        clock.now += 1000
    totals = ledger.total([tmp_path])
    assert totals.steps * COST.flops.total == totals.flops["total"]
    assert totals.flops["total"] + totals.lost_flops == taken * COST.flops.total
    assert totals.device_seconds["total"] == spent
    assert totals.device_seconds["productive"] == 36 * totals.steps
    assert totals.device_seconds["lost"] == 36 * (taken - totals.steps)
    ledger.check(tmp_path)


def test_heartbeats_come_every_ten_seconds_and_not_more(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    clock.work(account, 100, 3.0)
    beats = [line.time for line in ledger.read(tmp_path) if line.event == "heartbeat"]
    assert beats == [1012.0 + 12 * i for i in range(25)]


def test_a_line_is_on_disk_before_its_hash_is_given_away(tmp_path, monkeypatch):
    account = opened(tmp_path, Clock())
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    account.begin()
    account.save()
    file = (tmp_path / "ledger.jsonl").stat()
    assert [status.st_ino for status in synced] == [file.st_ino] * 2
    assert synced[-1].st_size == file.st_size


def test_stretches_of_time_must_not_overlap(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    with pytest.raises(AssertionError), account.time("checkpoint"):
        clock.now += 1
        clock.spend(account, "evaluate", 1)


def test_a_failing_block_is_still_charged(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock, ranks=1)
    account.begin()
    with pytest.raises(OSError), account.time("checkpoint"):
        clock.now += 2
        raise OSError
    assert account.totals().device_seconds == device_seconds(checkpoint=2.0)


def test_what_the_first_update_took_beyond_the_second_is_start_up(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock, ranks=1)
    account.begin()
    clock.now += 60
    account.step(COST, first=True)
    assert account.totals().device_seconds == device_seconds(startup=60.0)
    clock.work(account, 2)
    assert account.totals().device_seconds == device_seconds(startup=58.0, productive=6.0)
    clock.now += 1
    account.step(COST, first=True)  # of another shape, which needed nothing
    clock.work(account, 1)
    assert account.totals().device_seconds == device_seconds(startup=58.0, productive=9.0)
    assert account.step_hours == 2 / 3600  # compilation is not what the next one may take
    clock.work(account, 1, 5)
    assert account.step_hours == 5 / 3600
    clock.work(account, 10)
    assert account.step_hours == 2 / 3600  # the longest of the last ten
    account.note("stop")
    ledger.check(tmp_path)


def test_an_attempt_that_ended_without_a_word_is_noted(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    head = account.save()
    clock.work(account, 6)  # a heartbeat at step 5
    clock.now += 50
    again = opened(tmp_path, clock)
    again.begin(0, head)
    again.note("stop")
    opened(tmp_path, clock).begin(0, head)
    events = [line.event for line in ledger.read(tmp_path)]
    assert events == ["start", "save", "heartbeat", "crash-detected", "resume", "stop", "resume"]
    crash = ledger.read(tmp_path)[3]
    assert (crash.details["silent_since"], crash.details["lost_steps"], crash.step) == (1010.0, 5, 5)
    ledger.check(tmp_path)


def test_another_layout_is_noted(tmp_path):
    clock, heads = Clock(), [""]
    for ranks in (2, 2, 8):
        account = opened(tmp_path, clock, ranks)
        account.begin(0, heads[-1], layout={"ranks": ranks})
        heads.append(account.save())
        account.note("stop")
    (change,) = [line for line in ledger.read(tmp_path) if line.event == "layout-change"]
    assert (change.details["before"], change.details["now"], change.ranks) == ({"ranks": 2}, {"ranks": 8}, 8)


def test_joules_add_up_over_attempts_and_say_what_they_leave_out(tmp_path):
    """A killed attempt keeps what its last line had; an attempt without sensors has device-seconds only."""
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    account.meter({"gpu": 0.0, "cpu": 0.0})
    clock.now += 10
    account.meter({"gpu": 4000.0, "cpu": 500.0})
    head = account.save()
    clock.now += 3
    account.meter({"gpu": 5000.0, "cpu": 600.0})  # in no line
    again = opened(tmp_path, clock)
    again.begin(0, head)
    again.meter({})
    clock.now += 5
    again.note("stop")
    third = opened(tmp_path, clock)
    third.begin(0, head)
    third.meter({"gpu": 0.0})
    clock.now += 1
    third.meter({"gpu": 250.5})
    totals = third.totals()
    assert (totals.joules, totals.joules_by_part) == (4750.5, {"gpu": 4250.5, "cpu": 500.0})
    assert totals.metered_device_seconds == 2 * (10 + 1)
    assert totals.device_seconds["total"] == 2 * (10 + 5 + 1)
    third.note("stop")
    assert ledger.total([tmp_path, tmp_path]).joules == 4750.5  # the same work, once


def test_a_log_is_noted_every_ten_seconds(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    for loss in range(30):
        clock.work(account, 1, 1.0)
        account.log(loss=loss)
    logs = [line.details["loss"] for line in ledger.read(tmp_path) if line.event == "log"]
    assert logs == [9, 19, 29]


def test_a_long_block_beats_too_until_the_last_word(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_writer, "PULSE", 0.001)
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    account.start_heartbeat()
    with account.time("startup"):
        for beats in range(1, 4):
            clock.now += 10
            deadline = time.monotonic() + PATIENCE
            while len(ledger.read(tmp_path)) < 1 + beats and time.monotonic() < deadline:
                time.sleep(0.001)
    assert [line.event for line in ledger.read(tmp_path)] == ["start", *["heartbeat"] * 3]
    account.note("finish")
    clock.now += 100
    account.heartbeat()
    assert ledger.read(tmp_path)[-1].event == "finish"
    assert account.block_hours("startup") == 2 * 2 * 30 / 3600
    assert account.block_hours("evaluate") == 0
    ledger.check(tmp_path)


# ---- damage --------------------------------------------------------------------------------------


def written(run, now=1000.0):
    clock = Clock(now)
    account = opened(run, clock)
    account.begin()
    clock.work(account, 10)
    clock.now += 1
    head = account.save()
    return clock, head


def test_a_line_torn_at_any_byte_is_cut_off_and_recorded(tmp_path):
    clock, head = written(tmp_path)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    opened(tmp_path, clock).begin(10, head)
    extra = path.read_bytes()[len(whole) :].splitlines(keepends=True)[0]
    for cut in range(1, len(extra)):
        path.write_bytes(whole + extra[:cut])
        assert len(ledger.read(tmp_path)) == whole.count(b"\n")
        opened(tmp_path, clock).begin(10, head)
        *_, repaired, crash, resumed = ledger.read(tmp_path)
        events = [line.event for line in (repaired, crash, resumed)]
        assert events == ["repaired", "crash-detected", "resume"]
        assert repaired.details["torn"].encode() == extra[:cut]
        ledger.check(tmp_path)


def test_every_change_to_a_line_is_found_and_its_line_named(tmp_path):
    written(tmp_path)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    for index in range(len(lines) - 1):
        changed = lines[index].replace(b'"samples": ', b'"samples": 1')
        for wrong in ([changed], []):  # changed, taken out
            path.write_bytes(b"".join([*lines[:index], *wrong, *lines[index + 1 :]]))
            number = index + 1 + len(wrong)
            with pytest.raises(UserError, match=f"jsonl:{number}: does not follow"):
                ledger.check(tmp_path)
            opened(tmp_path, Clock())  # goes on with the lines before, and keeps what was there
            assert path.read_bytes() == b"".join(lines[: max(0, number - 2)])
            kept = sorted(tmp_path.glob("ledger-damaged-*.jsonl"))[-1]
            assert kept.read_bytes() == b"".join([*lines[:index], *wrong, *lines[index + 1 :]])
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(UserError, match="jsonl:2: not a line of a ledger"):
        ledger.read(tmp_path)


def test_a_last_line_that_does_not_add_up_is_found(tmp_path):
    written(tmp_path)
    path = tmp_path / "ledger.jsonl"
    *before, last = path.read_bytes().splitlines(keepends=True)

    def wrong(**changes):
        line = json.loads(last)
        for name, value in changes.items():
            line[name].update(value) if isinstance(value, dict) else line.update({name: value})
        path.write_bytes(b"".join(before) + json.dumps(line).encode() + b"\n")
        with pytest.raises(UserError) as caught:
            ledger.check(tmp_path)
        return str(caught.value)

    assert "jsonl:4: the parts of flops" in wrong(flops={"head": 1})
    assert "jsonl:4: the parts of device_seconds" in wrong(device_seconds={"idle": 7.0})
    assert "jsonl:4: device_seconds are not ranks x elapsed" in wrong(ranks=3)
    assert "jsonl:4: the counters are not those" in wrong(event="resume", head="")
    ancestor = json.loads(last)["previous"]  # of the same step
    assert "jsonl:4: the counters are not those" in wrong(event="resume", head=ancestor, samples=1)


def test_a_checkpoint_of_another_ledger_is_refused(tmp_path):
    clock, head = written(tmp_path)
    for step, wrong in ((10, "f" * 64), (9, head)):  # which does not say what its line stated
        with pytest.raises(UserError, match="to which the checkpoint refers"):
            opened(tmp_path, clock).begin(step, wrong)


# ---- a whole run: what holds its ledger ----------------------------------------------------------


@pytest.fixture
def ended(words, tmp_path):
    """A finished run of eight updates, whose last checkpoint is of the fifth one."""
    stopped = attempt(words("a"), strike=Strike(signal.SIGTERM, 5))
    assert stopped.codes == [75], stopped.text
    finish(words("a", "checkpoint.every_steps=null"))
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000008")
    return tmp_path / "a"


def refusal(run):
    with pytest.raises(UserError) as caught:
        program.check([str(run)])
    return str(caught.value)


def rewrite(run, change, last=1):
    """Changes one of the last lines, those after it following from it."""
    path = run / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(lines[-last])
    head = ""
    with open(path, "wb") as file:
        for line in lines:
            text = json.dumps({**line, "previous": head}).encode()
            file.write(text + b"\n")
            head = hashlib.sha256(text).hexdigest()


def test_a_run_that_ended_is_held_to_its_last_line(ended, words):
    (report,), text = program.check([str(ended)])
    assert report.held == report.lines and report.checkpoints == 1
    assert text.endswith(f"{report.lines} lines and 1 checkpoint agree; head {report.head}")
    path = ended / "ledger.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, 2, 3):
        path.write_bytes(b"".join(lines[:-cut]))
        assert "status.json: its ledger line" in refusal(ended)
    for changes in ({"device": "another"}, {"peak_bytes": 1 << 60}, {"joules": {"gpu": 3.6e6}}):
        path.write_bytes(whole)
        rewrite(ended, lambda line: line.update(changes))  # noqa: B023
        assert "status.json: its ledger line" in refusal(ended)
    more = json.dumps({**json.loads(lines[-1]), "previous": hashlib.sha256(lines[-1][:-1]).hexdigest()})
    path.write_bytes(whole + more.encode() + b"\n")
    assert "it follows the last word of its attempt" in refusal(ended)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"step": 4000}, "samples"),
        ({"samples": 65}, "samples"),
        ({"tokens_predicted": 1}, "tokens_predicted"),
        ({"flops": {"encoder": 1, "decoder": 0, "head": 1, "total": 2}}, "flops"),
        ({"hardware_flops": 3}, "hardware_flops"),
        ({"token_layers": 1.5}, "token_layers"),
    ],
)
def test_every_count_is_held_to_the_config(ended, changes, wrong):
    """Also where the one who changed it has written all hashes anew, those outside too."""
    status = json.loads((ended / "status.json").read_text())
    (ended / "status.json").write_text(json.dumps({**status, "ledger_head": ""}))
    rewrite(ended, lambda line: line.update(changes))
    assert f"its {wrong} are not those of" in refusal(ended) or "no update was made" in refusal(ended)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"lost_flops": 5}, "lost_flops are not those"),
        ({"metered_device_seconds": -1.0}, "metered_device_seconds went back"),
        ({"peak_bytes": 0}, "peak_bytes went back"),
        ({"samples": 1}, "the counters moved though no update was made"),
    ],
)
def test_what_cannot_be_in_a_line(ended, changes, wrong):
    rewrite(ended, lambda line: line.update(changes))
    assert wrong in refusal(ended)
    rewrite(ended, lambda line: line.pop("device_seconds"))
    assert "it has no device_seconds" in refusal(ended)


def test_what_nothing_holds_is_said(words, tmp_path):
    options = ("checkpoint.every_steps=3", "evaluate.every_steps=4")
    cut = attempt(words("a", *options), strike=Strike(signal.SIGKILL, 5))
    assert cut.codes == [-signal.SIGKILL], cut.text
    (report,), text = program.check([str(tmp_path / "a")])
    assert report.held < report.lines
    assert f"nothing holds the last {report.lines - report.held} lines" in text
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    _, text = program.check([str(tmp_path / "a")])
    assert f"nothing holds the last {report.lines} lines" in text


# ---- the outside ---------------------------------------------------------------------------------


def test_the_process_start_is_known():
    code = (
        "import time; first = time.time();"
        "from pretrain.account.process import process_start as p; print(p(), first)"
    )
    before = time.time()
    start, first = map(float, subprocess.check_output([sys.executable, "-c", code]).split())
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - 2 * tick <= start <= first  # the interpreter and its imports are charged


def test_the_ledger_and_its_program_do_not_import_torch():
    code = "import sys, tools.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_total_adds_runs_up(tmp_path):
    for name, now in (("a", 1000.0), ("b", 2000.0)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, now)
    one, both = ledger.total([tmp_path / "a"]), ledger.total([tmp_path / "a", tmp_path / "b"])
    assert both.steps == 20 and both.attempts == 2 and both.joules is None
    assert both.flops == {part: 2 * value for part, value in one.flops.items()}
    assert both.device_seconds["productive"] == 80.0


def run_program(*words):
    return subprocess.run(
        [sys.executable, "-m", "tools.ledger", *map(str, words)], capture_output=True, text=True
    )


def test_program_total_prints_one_json_document(tmp_path):
    written(tmp_path)
    done = run_program("total", tmp_path, "--json")
    totals = ledger.total([tmp_path])
    assert done.returncode == 0
    assert json.loads(done.stdout) == {**asdict(totals), "ettr": ledger.effective_share(totals)}


def test_program_refuses_in_one_line(tmp_path):
    written(tmp_path)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"heartbeat", b"heartbeet"))
    for words in (("check", tmp_path), ("total", tmp_path / "none")):
        done = run_program(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("again", ["{}", "{}/../a", "link"])
def test_program_counts_no_run_twice(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    written(tmp_path / "a")
    done = run_program("total", "a", again.format(tmp_path / "a"), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the same folder as a; name it once" in done.stderr


def test_program_show_keeps_the_heartbeat_that_an_attempt_ends_with(tmp_path):
    clock, head = written(tmp_path)
    account = opened(tmp_path, clock)
    account.begin(10, head)
    account.note("evaluate", held_out={"loss": 6.54321})
    clock.work(account, 12)  # two heartbeats, then killed
    opened(tmp_path, clock).begin(10, head)
    report, text = program.show([str(tmp_path)])
    assert len(report[0]["lines"]) == 11
    events = [line.split()[3] for line in text.splitlines()[2:]]
    crash = "crash-detected"
    assert events == ["start", "save", crash, "resume", "evaluate", "heartbeat", crash, "resume"]
    assert "held-out loss 6.5432\n" in text and text.endswith("lost_steps 10")


def test_program_total_shows_hours(tmp_path):
    """And the share of them that went into updates which stay."""
    clock, head = written(tmp_path)
    account = opened(tmp_path, clock)
    clock.now += 10
    account.begin(10, head)
    report, text = program.total([str(tmp_path)])
    assert "device-hours, productive           0.0111" in text.splitlines()
    spent = report["device_seconds"]
    assert report["ettr"] == spent["productive"] / spent["total"] == 40 / 62
    assert "effective training time             64.5%" in text.splitlines()
    shown, text = program.show([str(tmp_path)])
    assert shown[0]["ettr"] == 40 / 62 and f"{tmp_path}: effective training time 64.5%\n" in text


def test_failures_are_reckoned_with_as_they_come(tmp_path):
    clock = Clock()
    account = opened(tmp_path, clock)
    account.begin()
    assert account.mtbf(100.0) == 100.0
    clock.work(account, 10)
    assert account.mtbf(100.0) == 120.0
    account.note("heartbeat")
    for crashes in (1, 2):
        account = opened(tmp_path, clock)
        account.begin()
        assert account.mtbf(100.0) == 120.0 / (1 + crashes)
    account.note("stop")
    account = opened(tmp_path, clock)
    account.begin()
    assert account.crashes == 2


def test_program_reads_a_ledger_without_a_line(tmp_path):
    """So it is between a run's first look at its folder and its first line."""
    Ledger.open(tmp_path, 2, "cpu", Clock(), started=1000.0)
    runs = [str(tmp_path)]
    none = {"lines": 0, "checkpoints": 0, "held": 0, "gaps": [], "head": ""}
    assert [vars(one) for one in program.check(runs)[0]] == [{"run": runs[0], **none}]
    assert program.total(runs)[0]["steps"] == 0
    assert program.show(runs)[0] == [{"run": runs[0], "ettr": None, "lines": []}]
    assert program.total(runs)[0]["ettr"] is None
    assert program.emissions.report(runs, None, None)[0].attempts == []
