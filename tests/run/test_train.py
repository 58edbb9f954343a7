"""Budgets, rates, layouts and refusals of whole runs."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from pretrain import __main__, checkpoint, decision, run_folder, train
from pretrain import start as start_module
from pretrain.account import ledger, schedule
from pretrain.account.recipe import make_recipe
from pretrain.build import Run, build
from pretrain.config import build_config, load_config
from pretrain.errors import UserError
from pretrain.files import digest
from pretrain.inputs import open_inputs
from pretrain.monitor import read_metrics
from pretrain.parallel.topology import Topology, connect, raise_on_all_ranks
from pretrain.run_folder import RunFolder
from pretrain.start import open_start
from slurm.attempts import verdict_on_attempt
from tests.conftest import encode
from tests.support.ranks import PATIENCE
from tests.support.ranks import run as on_ranks
from tests.support.runs import NEVER, Outcome, Paced, Strike, attempt, finish, losses, result
from tools.plan import memory
from tools.shared.run_model import load_model

Words = Callable[..., list[str]]

QUERY = ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query")


def cost(words: list[str]) -> Any:
    """Of an update of tiny.yaml with these overrides."""
    config = load_config(words[0], [*words[1:], "model.vocab_size=400"])
    return make_recipe(config).phases[0].cost


def complain() -> str:
    """What each of two ranks raises where only the second has a problem."""
    place = connect()
    with pytest.raises(UserError) as caught, raise_on_all_ranks(place):
        if place.rank == 1:
            raise UserError("only here")
    place.close()
    return str(caught.value)


def test_a_problem_of_one_rank_ends_all() -> None:
    assert on_ranks(2, complain) == ["only here"] * 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_gives_no_numbers_ends(number: int, words: Words, tmp_path: Path) -> None:
    wild = ("optimizer.lr=1e30", "train.clip=0", "schedule.warmup=0", "checkpoint.every_steps=1")
    ended = attempt(words("a", *wild), number)
    assert ended.codes == [2] * number
    assert "are not finite" in ended.text and "lower optimizer.lr" in ended.text
    assert RunFolder(tmp_path / "a").status()["exit_code"] == 2


# ---- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["steps", "tokens", "flops"])
@pytest.mark.parametrize("updates", [4.0, 4.99])
def test_budget_is_spent_and_never_exceeded(unit: str, updates: float, words: Words, tmp_path: Path) -> None:
    one = cost(words("a", *QUERY))
    each = {"steps": 1, "tokens": one.tokens_seen, "flops": one.flops.total}[unit]
    amount = int(updates * each)
    finish(words("a", "budget.steps=null", f"budget.{unit}={amount}", *QUERY))
    totals = ledger.total([tmp_path / "a"])
    assert (totals.steps, totals.samples) == (4, 4 * 8)
    assert totals.tokens_seen == 4 * one.tokens_seen
    assert totals.flops["total"] == 4 * one.flops.total
    assert [line["progress"] for line in read_metrics(tmp_path / "a")] == pytest.approx(
        [n * each / amount for n in (1, 2, 3, 4)], rel=1e-15
    )


def test_budget_of_device_hours(words: Words, tmp_path: Path) -> None:
    """Every second counts on each rank, in all attempts; progress goes on where it was, to the end."""
    hours = ("budget.steps=null", f"budget.device_hours={20 / 3600}")
    stopped = attempt(words("a", *hours), 2, Paced(SIGTERM, 40))
    assert stopped.codes == [75, 75], stopped.text
    first = read_metrics(tmp_path / "a")
    again = attempt(words("a", *hours), 2, Paced(SIGTERM, NEVER))
    assert again.codes == [0, 0], again.text
    spent, budget = ledger.total([tmp_path / "a"]), 20 / 3600
    assert spent.attempts == 2 and spent.lost_flops == 0
    assert spent.device_seconds["total"] / 3600 <= budget
    lines = read_metrics(tmp_path / "a")
    shares = [round(line["progress"], 12) for line in lines]  # a restart may round the last bit
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.97
    steps = max(after - before for before, after in pairwise(shares))
    assert shares[len(first)] - shares[len(first) - 1] < 0.1 and steps < 0.1


def test_hours_warm_up_and_end_as_they_should(words: Words, tmp_path: Path) -> None:
    """Whatever the start-up took; what was held back and not needed is said."""
    options = ("budget.steps=null", f"budget.device_hours={6 / 3600}", "schedule.warmup=0.3")
    ended = attempt(words("a", *options), strike=Paced(SIGTERM, NEVER))
    assert ended.codes == [0], ended.text
    rates = [line["lr"] / 3e-3 for line in read_metrics(tmp_path / "a") if "lr" in line]
    assert 0 < rates[0] < 0.1 and max(rates) > 0.9 and 0 < rates[-1] < 0.1
    reason = RunFolder(tmp_path / "a").status()["reason"]
    assert re.fullmatch(
        r"the budget is spent; [\d.e-]+ of 0\.00166667 device_hours was held back for evaluation and save"
        " and not needed",
        reason,
    )
    assert reason in ended.text


def test_saves_come_as_often_as_loses_least(words: Words, tmp_path: Path) -> None:
    """By the clock of `Paced` a save stops training for 0.1 s; failures are taken to be 20 s apart."""
    options = ("checkpoint.every_minutes=auto", f"checkpoint.mtbf_hours={20 / 3600:.9f}", "budget.steps=150")
    ended = attempt(words("a", *options, "corpus.valid="), strike=Paced(SIGTERM, NEVER))
    assert ended.codes == [0], ended.text
    first, *saves = [line for line in ledger.read(tmp_path / "a") if line.event == "save"]
    assert first.step == 1 and len(saves) == 4
    for before, after in pairwise([first, *saves[:-1]]):  # the last is that of the end
        best = (2 * 0.1 * (20 + after.device_seconds["total"])) ** 0.5
        assert best <= after.time - before.time - 0.1 <= best + 0.06


def test_a_first_update_moves_the_weights(words: Words, tmp_path: Path) -> None:
    finish(words("a", "budget.steps=1"))
    (line,) = read_metrics(tmp_path / "a")
    assert line["lr"] > 0


def test_a_run_goes_on_by_the_rates_that_it_began_with(words: Words, tmp_path: Path) -> None:
    """Of an older program's: the rate at the start of an update; no progress in its checkpoint."""
    stopped = attempt(words("a", "budget.steps=8"), strike=Strike(SIGTERM, 4))
    assert stopped.codes == [75], stopped.text
    path = checkpoint.find_verified(tmp_path / "a")[0]
    state = json.loads((path / "state.json").read_text())
    del state["rules"], state["progress"]
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = digest(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    step = state["step"]
    finish(words("a", "budget.steps=8"))
    config = load_config(words("a")[0], words("a")[1:])
    after = [line for line in read_metrics(tmp_path / "a") if line["step"] > step and "lr" in line]
    wanted = [schedule.rate(config, (line["step"] - 1) / 8) for line in after]
    assert after and [line["lr"] for line in after] == pytest.approx(wanted)


def test_an_absurd_number_of_epochs_is_warned_of(words: Words) -> None:
    dry = attempt(words("a", "--dry-run", "budget.steps=900000"))
    assert dry.codes == [0] and "warning: the budget reads the corpus 4," in dry.text
    started = attempt(words("a", "budget.steps=900000"), strike=Strike(SIGTERM, 2))
    assert started.codes == [75] and "times (epochs); lower the budget" in started.text
    assert "(epochs)" not in attempt(words("a", "--dry-run")).text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "at least {:.1g} seconds on one device here"),
        (["budget.steps=4000000"], "at least "),
        (["train.recompute=block"], "at least {:.1g} seconds"),
        (["budget.steps=null", "budget.device_hours=0.5"], "at most {} updates on one device here"),
        (["budget.steps=null", "budget.kwh=1"], ""),
    ],
)
def test_a_dry_run_bounds_the_time(changes: list[str], expected: str, words: Words) -> None:
    """By the FLOPs of an update, recomputation included, and what products reach."""
    path, *overrides = words("a", *changes)
    recipe = make_recipe(load_config(path, [*overrides, "model.vocab_size=400"]))
    cost = recipe.phases[0].cost.hardware_flops
    if "budget.steps=4000000" in changes:
        expected = f"at least {timedelta(seconds=round(4_000_000 * cost / 1e9))} on one device here"
    most = f"{int(0.5 * 3600 * 1e9 / cost):,}"
    text = __main__.foreseen(recipe.budget, 1e9)
    assert text.startswith(expected.format(most if "most" in expected else 8 * cost / 1e9))
    assert bool(text) == bool(expected)


def test_a_dry_run_says_what_the_bound_is_of(words: Words) -> None:
    shown = finish(words("a", "--dry-run")).text
    assert re.search(
        r"^estimate    at least .* were all of it matrix products \([\d,]+ GFLOP/s\)$", shown, re.M
    )


# ---- what is refused leaves the run as it was ----------------------------------------------------

CHANGES = {
    "model.hidden_size=64": "model.hidden_size",
    "optimizer.lr=0.5": "optimizer.lr",
    "corpus.segment=7": "corpus.segment = 7",
    "train.batch_size=7": "train.batch_size",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_refused_change_is_foreseen_and_leaves_the_status(
    change: str, words: Words, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    finish(words("a"))
    before, config_before = RunFolder(run).status(), (run / "config.yaml").read_bytes()
    foreseen = attempt(words("a", "--dry-run", change))
    assert foreseen.codes == [2] and CHANGES[change] in foreseen.text
    assert RunFolder(run).status() == before
    assert attempt(words("a", change)).codes == [2]
    after = RunFolder(run).status()
    said = after.pop("attempt")
    assert after == before and (run / "config.yaml").read_bytes() == config_before
    assert said["exit_code"] == 2 and CHANGES[change] in said["reason"] and said["time"] > before["time"]
    verdict, reason = verdict_on_attempt(run, "train", 1, before["time"] + 1e-6)
    assert verdict == "stop" and CHANGES[change] in reason
    finish(words("a", "budget.steps=9"))
    assert "attempt" not in RunFolder(run).status()


def test_the_status_follows_the_run(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "FOLLOW_SECONDS", 0.0)
    run = build_here(words("a", "monitor.log_every=1", "checkpoint.every_minutes=null"), tmp_path / "a")
    assert run.heldout
    score, seen = run.heldout.score, []

    def look(*args: Any) -> Any:
        status = run.folder.status()
        seen.append((status["state"], status["step"], run.step))
        return score(*args)

    monkeypatch.setattr(run.heldout, "score", look)
    assert train.train(run) == 0
    train.close(run)
    assert seen and all(state == "running" and step == now for state, step, now in seen if now)


def build_here(command: list[str], run: Path) -> Run:
    """A run in this process, whose signals are left alone."""
    deaf: Any = SimpleNamespace(received=None)
    folder = RunFolder(run)
    folder.claim()
    inputs = open_inputs(load_config(command[0], command[1:]), torch.device("cpu"), 1)
    return build(inputs, open_start(inputs, Topology(), folder), deaf)


def test_training_goes_on_while_a_checkpoint_is_written(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 2 is written when the fourth update has begun, and is what it would have been."""
    finish(words("whole"))
    options = ("checkpoint.background=true", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    run = build_here(words("a", *options), tmp_path / "a")
    take, write, begun, written = run.feed.take, checkpoint._write, threading.Event(), []

    def watched(first: int) -> Any:
        if first == 3 * 8:
            begun.set()
        return take(first)

    def late(folder: RunFolder, state: checkpoint.State, *rest: Any) -> None:
        assert begun.wait(PATIENCE)
        written.append((state.step, run.step))
        write(folder, state, *rest)

    monkeypatch.setattr(run.feed, "take", watched)
    monkeypatch.setattr(checkpoint, "_write", late)
    assert train.train(run) == 0
    train.close(run)
    assert written[0][0] == 2 and written[0][1] >= 3
    copied = sum(copy.nbytes for copy in run.writer._copies.values())
    assert copied == memory.copied(run.recipe, memory.Layout(), 0)
    assert [step for step, _ in written] == checkpoint.steps(tmp_path / "a") == [2, 4, 6, 8]
    assert result(tmp_path / "a") == result(tmp_path / "whole")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000008")
    (tmp_path / "a" / "checkpoints" / "latest").write_text("step-00000002")
    finish(words("a"))
    assert result(tmp_path / "a") == result(tmp_path / "whole")


def test_an_update_waits_for_the_copy_of_what_it_changes(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is made when an update would wait for it, or after that update."""
    options = ("checkpoint.every_steps=2", "checkpoint.keep_last=9")
    finish(words("whole", *options, "checkpoint.background=false"))
    run = build_here(words("a", *options, "checkpoint.background=true"), tmp_path / "a")
    writer, step, reached = run.writer, run.engine.step, threading.Event()
    assert writer
    copy, wait = writer._copy_all, writer.wait_copied

    def late(*arguments: Any) -> Any:
        assert reached.wait(PATIENCE)
        return copy(*arguments)

    def waits() -> None:
        reached.set()
        wait()

    def steps(lr: float) -> Any:
        norm = step(lr)
        if run.step == 2:
            reached.set()
        return norm

    monkeypatch.setattr(writer, "_copy_all", late)
    monkeypatch.setattr(writer, "wait_copied", waits)
    monkeypatch.setattr(run.engine, "step", steps)
    assert train.train(run) == 0
    train.close(run)
    for number in (2, 4, 6, 8):
        for kind in checkpoint.FILES:
            saved = [
                checkpoint.read_tensors(checkpoint.find_verified(tmp_path / name, number)[0], kind)
                for name in ("a", "whole")
            ]
            assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


def test_what_goes_on_for_long_shows_it(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what shows nothing meanwhile may take long: a first batch or update, and what is written."""
    run = build_here(words("a", "evaluate.every_steps=4", "checkpoint.every_steps=4"), tmp_path / "a")
    at, seen = run.watchdog.at, list[tuple[str, bool]]()

    def watched(where: str, long: bool = False) -> None:
        seen.append((where, long))
        at(where, long)

    monkeypatch.setattr(run.watchdog, "at", watched)
    assert train.train(run) == 0
    train.close(run)
    batches = [long for where, long in seen if where == "evaluation"]
    assert batches.count(True) == 2 and len(batches) > 4 and batches[0]
    saves = [long for where, long in seen if where == "save"]
    tensors = len(list(run.engine.module.named_parameters()))
    assert saves == 2 * [True, *3 * [*tensors * [False], True]] + [True]  # and how it ends
    assert all(long for where, long in seen if where in ("build", "first update"))
    assert not any(long for where, long in seen if where in ("forward", "log", "agreement"))


@pytest.mark.parametrize("what", ["hours", "signal"])
def test_evaluation_is_followed_by_another_look(
    what: str, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update is made where the evaluation used the hours up, or a signal came with it."""
    run = build_here(words("a", "budget.steps=null", "budget.device_hours=1000"), tmp_path / "a")
    assert run.heldout and run.ledger
    score, clock, slept = run.heldout.score, run.ledger._clock, [0.0]

    def long_evaluation(*args: Any) -> Any:
        if what == "hours":
            slept[0] += 3600 * 2000
        else:
            run.signals.received = "SIGTERM"
        return score(*args)

    monkeypatch.setattr(run.ledger, "_clock", lambda: clock() + slept[0])
    monkeypatch.setattr(run.heldout, "score", long_evaluation)
    assert train.train(run) == {"hours": 0, "signal": 75}[what]
    train.close(run)
    assert run.step == 3


# ---- updates that are decided ahead, as for many ranks -------------------------------------------


def ahead(monkeypatch: pytest.MonkeyPatch, most: int = decision.MOST_AHEAD) -> list[int]:
    """Let updates be decided ahead here too; how many were, at each exchange."""
    monkeypatch.setattr(decision, "steps_ahead", lambda run: most if decision.step_seconds(run) else 1)
    decide, found = train.decide_steps, []

    def counted(run: Run) -> list[decision.StepDecision]:
        steps = decide(run)
        found.append(len(steps))
        return steps

    monkeypatch.setattr(train, "decide_steps", counted)
    return found


EVENTS = ("phase-change", "evaluate", "save", "milestone", "finish")
PHASES = "train.phases=[{until: 0.3, batch_size: 4}, {until: 0.6, seq_length: 24}]"


@pytest.mark.parametrize("budget", ["steps=14", "flops=2.4e8", "token_layers=9000"])
def test_updates_decided_ahead_are_those_decided_one_by_one(
    budget: str, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phases, evaluations, saves and milestones among them."""
    amounts = ["budget.steps=null", f"budget.{budget}", "checkpoint.keep=[0, 0.5, 1.0]", PHASES]
    options = [*amounts, "checkpoint.every_steps=6", "evaluate.every_steps=4", "monitor.log_every=1"]
    events: list[list[Any]] = []
    for name in ("one by one", "ahead"):
        exchanges = ahead(monkeypatch) if name == "ahead" else []
        run = build_here(words(name, *options), tmp_path / name)
        assert train.train(run) == 0
        train.close(run)
        lines = ledger.read(tmp_path / name)
        # Others come by the clock.
        events.append([(line.event, line.step) for line in lines if line.event in EVENTS])
    assert result(tmp_path / "one by one") == result(tmp_path / "ahead")
    assert events[0] == events[1]
    assert checkpoint.read_state(
        checkpoint.find_verified(tmp_path / "one by one")[0]
    ).progress == pytest.approx(
        checkpoint.read_state(checkpoint.find_verified(tmp_path / "ahead")[0]).progress, rel=1e-15
    )
    assert max(exchanges) >= 3 and len(exchanges) < run.step + 10


def test_a_signal_is_answered_at_the_next_exchange(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = ahead(monkeypatch, most=5)
    run = build_here(words("a", "budget.steps=1000", "evaluate.every_steps=null"), tmp_path / "a")
    step = run.engine.step

    def signalled(lr: float) -> Any:
        run.signals.received = "SIGTERM" if run.step == 7 else run.signals.received
        return step(lr)

    monkeypatch.setattr(run.engine, "step", signalled)
    assert train.train(run) == 75
    train.close(run)
    assert exchanges[:3] == [1, 5, 5] and checkpoint.steps(tmp_path / "a") == [11]
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a")[0])
    assert state.step == 11 and state.progress == 11 / 1000


@pytest.mark.parametrize(
    ("ranks", "seconds", "expected"),
    [(1, 0.1, 1), (8, 0.001, 64), (8, 0.1, 10), (1000, 0.1, 10), (8, 5.0, 1)],
)
def test_several_ranks_decide_ahead_for_as_long_as_a_signal_may_wait(
    ranks: int, seconds: float, expected: int
) -> None:
    made = SimpleNamespace(step_hours=ranks * seconds / 3600)
    budget, place = SimpleNamespace(measured=False), SimpleNamespace(world_size=ranks)
    run: Any = SimpleNamespace(ledger=made, recipe=SimpleNamespace(budget=budget), topology=place)
    assert decision.steps_ahead(run) == expected
    assert expected == 1 or expected * seconds <= decision.ANSWER
    budget.measured = True
    assert decision.steps_ahead(run) == 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "trapezoid"])
def test_rate_follows_the_spent_share(
    kind: str, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (f"schedule.kind={kind}", "schedule.warmup=0.3", "schedule.floor=0.1", "corpus.valid=")
    each, amount = cost(words("a")).tokens_seen, 2000
    run = build_here(words("a", "budget.steps=null", f"budget.tokens={amount}", *shape), tmp_path / "a")
    rates: list[float] = []
    step = run.engine.step
    monkeypatch.setattr(run.engine, "step", lambda lr: rates.append(lr) or step(lr))
    assert train.train(run) == 0
    train.close(run)
    middles = [(n + 0.5) * each / amount for n in range(amount // each)]
    scales = [schedule.scale(kind, progress, 0.3, 0.1) for progress in middles]
    assert rates == pytest.approx([3e-3 * scale for scale in scales], rel=1e-14)
    assert [line["lr"] for line in read_metrics(tmp_path / "a")] == rates  # what was used


@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_budget_below_one_update_is_refused(unit: str, words: Words) -> None:
    (line,) = refused(attempt(words("a", "budget.steps=null", f"budget.{unit}=100")))
    assert f"budget.{unit} = 100 is less than one update costs" in line


# ---- layouts -------------------------------------------------------------------------------------

ZERO = "train.engine=deepspeed", "parallel.zero=1"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "accumulated": (1, ("train.micro_batch_size=2",)),
    "data": (2, ()),
    "data, accumulated": (2, ("train.micro_batch_size=2",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "tensor x data": (4, ("parallel.tensor=2",)),
    "zero": (2, ZERO),
    "zero, tensor x data": (4, ("parallel.tensor=2", *ZERO)),
}
MODEL = (*QUERY, "train.batch_size=12", "masking.views=2", "evaluate.samples=23")


def check_losses(run: Path, expected: list[Any]) -> None:
    """Losses and gradient norms of every step, up to float32 rounding."""
    for found, wanted in zip(losses(run), expected, strict=True):
        assert [value is None for value in found] == [value is None for value in wanted]
        assert [value or 0 for value in found] == pytest.approx([value or 0 for value in wanted], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses of one rank that does a batch at once."""
    run = tmp_path_factory.mktemp("alone")
    finish([str(tiny / "tiny.yaml"), f"run.dir={run}", *MODEL])
    return losses(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, alone: list[Any], words: Words, tmp_path: Path) -> None:
    ranks, options = LAYOUTS[layout]
    finish(words("a", *MODEL, *options), ranks)
    check_losses(tmp_path / "a", alone)


def test_a_run_goes_through_all_layouts(alone: list[Any], words: Words, tmp_path: Path) -> None:
    for ranks, options in LAYOUTS.values():
        outcome = attempt(words("a", *MODEL, *options), ranks, Strike(SIGTERM, 1, rank=ranks - 1))
        assert outcome.codes == [75] * ranks, outcome.text
    finish(words("a", *MODEL))
    check_losses(tmp_path / "a", alone)


# ---- refusals ------------------------------------------------------------------------------------


def refused(outcome: Outcome) -> list[str]:
    """The error lines of an attempt that all ranks left with exit code 2."""
    assert set(outcome.codes) == {2}, outcome.text
    assert "Traceback" not in outcome.text
    return [line.removeprefix("error: ") for line in outcome.text.splitlines() if line.startswith("error: ")]


def test_all_problems_of_a_config_are_told_at_once(words: Words, tmp_path: Path) -> None:
    bad = ("model.num_layer=3", "train.batch_size=many", "budget.tokens=1e6", "optimzer.lr=1")
    lines = refused(attempt(words("a", *bad)))
    parts = [
        "unknown section 'optimzer'; did you mean optimizer?",
        "unknown key model.num_layer; did you mean model.num_layers?",
        "train.batch_size = 'many'",
        "budget has 2 units (steps, tokens)",
    ]
    assert len(lines) == len(parts)
    for part in parts:
        assert any(part in line for line in lines), (part, lines)
    assert not (tmp_path / "a").exists()


def test_a_dry_run_tells_of_every_token_of_an_epoch(words: Words) -> None:
    text = finish(words("a", "--dry-run")).text
    config = build_config(yaml.safe_load(text.split("method ")[0]))
    manifest = json.loads(Path(f"{config.corpus.train}.json").read_text(encoding="utf-8"))
    (windows,) = re.findall(r" epochs of ([\d,]+) windows", text)
    (tail,) = re.findall(r" ([\d,]+) tokens at the end of an epoch fill no window$", text, re.M)
    in_windows = int(windows.replace(",", "")) * (config.train.seq_length - 2)
    assert in_windows + int(tail) == manifest["tokens"] + manifest["documents"] - 1


@pytest.mark.parametrize(
    ("ranks", "options", "part"),
    [
        (1, ("corpus.train=/no/where",), "/no/where: no such corpus"),
        (2, ("corpus.train=/no/where",), "/no/where: no such corpus"),
        (2, ("corpus.valid=/no/where",), "/no/where"),
        (3, (), "train.batch_size = 8 is no multiple of data-parallel ranks"),
        (2, ("train.micro_batch_size=8",), "train.batch_size = 8 is no multiple of data-parallel ranks"),
        (2, ("parallel.tensor=4",), "parallel.tensor = 4 does not divide the 2 ranks"),
        (1, ("parallel.tensor=2",), "parallel.tensor = 2 does not divide the 1 ranks"),
        (1, ("corpus.tokenizer=/no/where",), "/no/where"),
        (2, ("budget.steps=null", "budget.device_hours=1e-9"), "is spent before the first update"),
        (2, ("run.dir=/proc/run",), "/proc/run: cannot be written"),
        (2, (*ZERO, "optimizer.kind=muon"), "take parallel.zero = 0, where data-parallel ranks share out"),
        (
            1,
            (*ZERO, "deepspeed.gradient_clipping=3"),
            "deepspeed.gradient_clipping = 3 contradicts train.clip",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ranks: int, options: tuple[str, ...], part: str, words: Words) -> None:
    (line,) = set(refused(attempt(words("a", *options), ranks)))
    assert part in line


def test_corpus_without_manifest_is_refused(words: Words, tiny: Path, tmp_path: Path) -> None:
    for end in ("bin", "idx"):
        shutil.copy(tiny / f"short.{end}", tmp_path / f"bare.{end}")
    (line,) = refused(attempt(words("a", f"corpus.train={tmp_path}/bare")))
    assert str(tmp_path / "bare.json") in line


def test_corpus_below_one_window_is_refused(words: Words, tiny: Path, tmp_path: Path) -> None:
    encode(["a few words"], tiny / "tokenizer", tmp_path / "few")
    (line,) = refused(attempt(words("a", f"corpus.train={tmp_path}/few")))
    assert "do not fill one window of seq_length = 24" in line


def test_setting_without_effect_is_told(words: Words) -> None:
    outcome = finish(words("a", "model.mask_vector=tied", "budget.steps=1"))
    assert "warning: model.mask_vector has no effect" in outcome.text


def test_dry_run_leaves_nothing(words: Words, tmp_path: Path) -> None:
    outcome = finish(words("a", "--dry-run", *QUERY))
    assert "method      3ml-query: 2 + 2 layers x 32" in outcome.text
    assert build_config(yaml.safe_load(outcome.text.split("method ")[0])).model.vocab_size == 400
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("run.dir=/dev/null/run",), "/dev/null/run: cannot be written (Not a directory)"),
        (("run.dir=/proc/run",), "/proc/run: cannot be written"),
        (("model.init_from=/no/where",), "model.init_from = /no/where"),
        ((*ZERO, "deepspeed.gradient_clipping=3"), "deepspeed.gradient_clipping = 3 contradicts train.clip"),
    ],
)
def test_dry_run_finds_what_a_start_would(options: tuple[str, ...], part: str, words: Words) -> None:
    (line,) = refused(attempt(words("a", "--dry-run", *options)))
    assert part in line


def test_a_run_without_its_corpus_can_be_used(words: Words, tmp_path: Path) -> None:
    """It keeps its tokenizer; a status that is no JSON is written anew."""
    finish(words("a", "budget.steps=1"))
    file = tmp_path / "a" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["corpus"] = {"train": "/no/where"}
    file.write_text(yaml.safe_dump(tree))
    assert load_model(tmp_path / "a").tokenizer.vocab_size == 400
    (tmp_path / "a" / "status.json").write_text("{bad")
    assert RunFolder(tmp_path / "a").status() == {}
    finish(words("a", "budget.steps=2"))
    assert RunFolder(tmp_path / "a").status()["step"] == 2


def test_an_error_after_a_signal_is_a_stop() -> None:
    """Who signals a whole group of processes ends the compilers in it too."""
    error = RuntimeError(f"a compiler died{'!' * 1000}\nand said a lot")
    code, reason = __main__._verdict(error, "SIGTERM")
    assert code == 75 and reason.startswith("stopped by SIGTERM") and "a compiler died!" in reason
    code, reason = __main__._verdict(error, None)
    assert code == 1 and reason.startswith("RuntimeError: a compiler died!")
    assert len(reason) == 500 and "\n" not in reason
    assert __main__._verdict(UserError("change this"), "SIGTERM") == (2, "change this")


def test_who_interrupts_a_run_that_is_over_gets_its_exit_code() -> None:
    code = "import os, signal as s; from pretrain.signals import Signals; Signals().leave_with(75)"
    for number in (SIGINT, SIGTERM):
        line = [sys.executable, "-c", f"{code}; os.kill(os.getpid(), {int(number)})"]
        assert subprocess.run(line).returncode == 75


def test_a_job_that_is_over_has_no_say(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shell of tmux or salloc keeps its variables."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1600000000")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = build_here(words("a", "budget.steps=2"), tmp_path / "a")
    assert "its time limit is ignored; unset them" in caplog.text
    assert train.train(run) == 0
    train.close(run)
    assert ledger.read(tmp_path / "a")[0].details["job"] == {}


@pytest.mark.parametrize("margin", [0, 5, 1000])
def test_an_attempt_without_time_for_an_update_is_not_started_again(
    margin: int, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(1000)
    clock = SimpleNamespace(**{**vars(time), "time": lambda: next(seconds)})
    for module in (start_module, decision):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1001")
    run = build_here(words("a", f"checkpoint.end_margin_minutes={margin}"), tmp_path / "a")
    with pytest.raises(UserError, match=f"no time for an update: raise it, or lower .*_minutes = {margin}$"):
        train.train(run)
    train.close(run)


def test_stops_before_its_job_ends(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the time is kept for saving; the clock moves on by a second with each look at it."""
    seconds = count(1000)
    clock = SimpleNamespace(**{**vars(time), "time": lambda: next(seconds)})
    for module in (start_module, decision):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    run = build_here(words("a", "budget.steps=1000000", "evaluate.every_steps=null"), tmp_path / "a")
    assert train.train(run) == 75 and next(seconds) in range(1080, 1083)
    train.close(run)
    status = RunFolder(tmp_path / "a").status()
    assert status["reason"] == "stopped by the job's time limit"
    assert checkpoint.steps(tmp_path / "a") == [status["step"]] and status["step"] > 0
