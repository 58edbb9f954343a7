"""Runs whose length and batch size change on the way: counted exactly, killed anywhere, in any layout."""

import json
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM

import numpy as np
import pytest

from pretrain import checkpoint
from pretrain.account import budget, epochs, ledger
from pretrain.account.recipe import make_recipe
from pretrain.config import MaskingOptions, load_config
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.data.sampler import Sampler, Segment, used_samples
from pretrain.monitor import read_metrics
from tests.support.runs import NEVER, Paced, Strike, attempt, finish, losses, result
from tools.ledger import __main__ as program

Words = Callable[..., list[str]]

PHASES = "train.phases=[{until: 0.25, batch_size: 4, seq_length: 16}, {until: 0.6, seq_length: 16}]"
STEPS = (PHASES, "budget.steps=12", "evaluate.every_steps=4")
"""Three, five and four updates."""


def test_everything_is_counted_and_noted(words: Words, tmp_path: Path) -> None:
    outcome = finish(words("a", *STEPS))
    assert "budget      12 steps = 3 + 5 + 4 updates" in outcome.text
    assert "phase       1: 8 sequences of 16 tokens" in outcome.text
    totals, lines = ledger.total([tmp_path / "a"]), ledger.read(tmp_path / "a")
    config = load_config(tmp_path / "a" / "config.yaml")
    costs = [phase.cost for phase in make_recipe(config).phases]
    assert totals.samples == 3 * 4 + 5 * 8 + 4 * 8
    assert totals.tokens_seen == 3 * 4 * 16 + 5 * 8 * 16 + 4 * 8 * 24
    assert totals.tokens_real == 3 * 4 * 14 + 5 * 8 * 14 + 4 * 8 * 22
    assert totals.flops["total"] == sum(
        n * cost.flops.total for n, cost in zip((3, 5, 4), costs, strict=True)
    )
    notes = [line for line in lines if line.event == "phase-change"]
    assert [(note.step, *map(note.details.get, ("phase", "batch_size", "seq_length"))) for note in notes] == [
        (3, 1, 8, 16),
        (8, 2, 8, 24),
    ]
    scores = [line.details["held_out"] for line in lines if line.event == "evaluate"]
    assert len(scores) == 3  # the same questions in all phases: 20 windows of 24, 15 % of 22
    assert {score["predicted_tokens"] for score in scores} == {20 * 3}
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a")[0])
    assert [segment[1:2] + segment[3:] for segment in state.segments] == [[0, 16], [52, 24]]


def test_killed_in_every_phase(words: Words, tmp_path: Path) -> None:
    """A checkpoint lies on each border and on each side of it."""
    finish(words("whole", *STEPS))
    for code in (-SIGKILL, -SIGKILL, -SIGKILL, 0):
        cut = attempt(words("cut", "checkpoint.every_steps=1", *STEPS), strike=Strike(SIGKILL, 4))
        assert cut.codes == [code], cut.text
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    first, second = (
        checkpoint.read_state(checkpoint.find_verified(tmp_path / name)[0]) for name in ("whole", "cut")
    )
    assert first.segments == second.segments
    events = [line.event for line in ledger.read(tmp_path / "cut")]
    assert events.count("crash-detected") == 3
    program.check([str(tmp_path / "cut")])  # the counts of every line, by the phases it was in


def test_a_falling_rate_is_phases_and_killed_in_each_of_them(words: Words, tmp_path: Path) -> None:
    ramp = ("masking.rate={from: 0.5, to: 0.2, steps: 3}", "masking.predict=0.2", "budget.steps=6")
    outcome = finish(words("whole", *ramp, "model.mask_from=2", "model.decoder_layers=1"))
    for hidden in (11, 8, 4):
        assert f"sequence    {24 - hidden + 4} rows: 4 predicted" in outcome.text
    recipe = make_recipe(load_config(tmp_path / "whole" / "config.yaml"))
    assert [phase.config.masking.rate for phase in recipe.phases] == [0.5, 0.35, 0.2]
    totals = ledger.total([tmp_path / "whole"])
    assert totals.tokens_seen == 2 * 8 * (17 + 20 + 24) and totals.tokens_predicted == 6 * 8 * 4
    assert totals.flops["total"] == recipe.budget.planned("flops")
    program.check([str(tmp_path / "whole")])
    windows = 6 * 8 * 22  # what is dropped was read too
    tokens = load_manifest(str(recipe.config.corpus.train)).tokens
    assert epochs.epochs(recipe) == windows / tokens
    late = ("model.mask_from=2", "model.decoder_layers=1")
    for code in (-SIGKILL, -SIGKILL, 0):
        cut = attempt(words("cut", "checkpoint.every_steps=1", *ramp, *late), strike=Strike(SIGKILL, 3))
        assert cut.codes == [code], cut.text
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_any_unit_gives_the_phases(unit: str, words: Words, tmp_path: Path) -> None:
    config = load_config(words("a")[0], [PHASES, "model.vocab_size=400"])
    cost = budget.price(make_recipe(config).phases[-1].cost, unit) or 0
    finish(words("a", PHASES, "budget.steps=null", f"budget.{unit}={5.5 * cost}"))
    resolved = load_config(tmp_path / "a" / "config.yaml")
    totals = ledger.total([tmp_path / "a"])
    assert totals.steps == sum(make_recipe(resolved).budget.updates())
    assert budget.spent(totals, unit) == make_recipe(resolved).budget.planned(unit)
    assert 0 <= 5.5 * cost - budget.spent(totals, unit) < cost


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("train.micro_batch_size=2",)),
        (1, ("train.engine=deepspeed", "parallel.zero=1", "train.micro_batch_size=4")),
        (2, ("train.engine=deepspeed", "parallel.zero=2", "train.micro_batch_size=2")),
    ],
)
def test_layouts_agree(ranks: int, options: tuple[str, ...], words: Words, tmp_path: Path) -> None:
    finish(words("whole", *STEPS))
    stopped = attempt(words("a", *STEPS, *options), ranks, Strike(SIGTERM, 5))
    assert stopped.codes == [75] * ranks, stopped.text
    finish(words("a", *STEPS, *options), ranks)
    for found, wanted in zip(losses(tmp_path / "a"), losses(tmp_path / "whole"), strict=True):
        assert [value or 0 for value in found] == pytest.approx([value or 0 for value in wanted], rel=2e-5)


def test_a_changed_budget_is_said_and_recorded(words: Words, tmp_path: Path) -> None:
    finish(words("a"))
    outcome = finish(words("a", "budget.steps=null", "budget.tokens=2000"))
    assert "budget      changed: 8 steps -> 2000 tokens" in outcome.text
    (note,) = [line for line in ledger.read(tmp_path / "a") if line.event == "budget-change"]
    assert (note.details["before"], note.details["now"]) == ("8 steps", "2000 tokens")
    assert 0 <= note.details["lr_before"] < note.details["lr_now"]
    rates = f"changes, from {note.details['lr_before']:.3g} to {note.details['lr_now']:.3g};"
    assert f"warning: with the budget the learning rate {rates}" in outcome.text
    assert "budget      changed" not in finish(words("a", "budget.steps=null", "budget.tokens=2000")).text


def test_changed_phases_are_refused(words: Words) -> None:
    finish(words("a", *STEPS))
    (code,), text = attempt(words("a", "budget.steps=12"))
    assert code == 2 and "error: train.phases: " in text


def test_a_corpus_too_small_for_a_later_phase_is_refused_at_once(words: Words, tiny: Path) -> None:
    long = (
        "train.seq_length=5000",
        "model.max_positions=5000",
        "train.phases=[{until: 0.5, seq_length: 16}]",
    )
    (code,), text = attempt(words("a", f"corpus.train={tiny}/short", "corpus.valid=", *long))
    assert code == 2 and "do not fill one window of seq_length = 5000" in text


def test_hours_end_before_the_budget_does(words: Words, tmp_path: Path) -> None:
    """The last evaluation and the last save are inside the budget too."""
    seconds = 6.0
    options = (PHASES, "budget.steps=null", f"budget.device_hours={seconds / 3600}")
    ended = attempt(words("a", *options), strike=Paced(SIGKILL, NEVER))
    assert ended.codes == [0], ended.text
    lines = ledger.read(tmp_path / "a")
    assert lines[-1].event == "finish" and lines[-1].step > 20
    assert [line.event for line in lines if line.event == "phase-change"] == ["phase-change"] * 2
    spent = lines[-1].device_seconds["total"]
    assert spent <= seconds
    saves = [line.step for line in lines if line.event == "save"]
    assert saves[0] <= 2 and saves[-1] == lines[-1].step


def test_energy_without_a_sensor_is_refused(words: Words) -> None:
    for ranks in (1, 2):
        codes, text = attempt(words("a", "budget.steps=null", "budget.kwh=1"), ranks)
        assert codes == [2] * ranks
        assert "error: budget.kwh: no energy sensor can be read here on every node (RAPL)" in text


def test_a_corpus_goes_on_as_far_into_its_epoch_as_it_was(tiny: Path) -> None:
    corpus = IndexedReader(tiny / "short")
    short, long = (Sampler(corpus, MaskingOptions(), length, 0, 0, 2) for length in (12, 24))
    segments = [Segment(0, 0, ((1.0, "a"),), 12), Segment(0, 70, ((1.0, "a"),), 24)]
    used = used_samples(segments, {"a": long})["a"]
    share = 70 / short.samples_per_epoch
    assert share <= used / long.samples_per_epoch < share + 1 / long.samples_per_epoch
    assert long.read(np.arange(used, used + 2)).tokens.shape == (2, 24)
    segments.append(Segment(0, 90, ((1.0, "a"),), 12))
    back = used_samples(segments, {"a": short})["a"]
    share += 20 / long.samples_per_epoch
    assert share <= back / short.samples_per_epoch < share + 1 / short.samples_per_epoch


def test_progress_of_a_log_is_the_spent_share(words: Words, tmp_path: Path) -> None:
    finish(words("a", *STEPS))
    shares = [line["progress"] for line in read_metrics(tmp_path / "a")]
    assert shares == pytest.approx([n / 12 for n in range(1, 13)])
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "finished"
