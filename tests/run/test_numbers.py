"""Numbers that are none, or other ones: skipped, counted, named, and never saved."""

import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.monitor import SPIKE_WINDOW, Spikes, read_metrics
from pretrain.parallel.engine import checksum
from pretrain.replay import faulty, odd_ones
from tests.support.runs import Strike, attempt, finish, result

Words = Callable[..., list[str]]
FORWARD = ("pretrain.model.late_mask:LateMaskModel.forward",)
BACKWARD = ("pretrain.parallel.engine:TorchEngine._backward",)
PLAIN = ("evaluate.every_steps=null", "corpus.valid=")


@dataclass(frozen=True)
class Poison(Strike):
    """The calls from number `at` to number `last` give what is no number."""

    last: int = 0

    def _counted(self, function: Callable[..., Any], calls: Any) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            return self.spoilt(found, *args) if self.at <= next(calls) <= self.last else found

        return counted

    def spoilt(self, found: Any, *args: Any) -> Any:
        return found * float("nan")


class Flip(Poison):
    """One bit of what is in the engine is another."""

    def spoilt(self, found: Any, *args: Any) -> Any:
        flip(next(args[0].module.parameters()).grad)
        return found


class FlipWeights(Strike):
    """One bit of the weights is another, before they are compared."""

    def hit(self, *args: Any) -> None:
        flip(next(args[0].engine.module.parameters()).data)


def flip(tensor: Any) -> None:
    tensor.view(torch.int32).view(-1)[7] ^= 1


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ("train.precision=fp32",)),
        (2, ("train.precision=bf16",)),
        (2, ("train.engine=deepspeed", "parallel.zero=0")),
        (2, ("train.engine=deepspeed", "parallel.zero=2", "train.precision=bf16")),
        (2, ("train.engine=deepspeed", "parallel.zero=3")),
    ],
)
def test_an_update_is_skipped_and_counted(
    ranks: int, options: tuple[str, ...], words: Words, tmp_path: Path
) -> None:
    """Though the number is bad on one rank alone; the count goes on after a restart."""
    all_options = (*PLAIN, *options, "checkpoint.every_steps=1")
    ended = attempt(words("a", *all_options), ranks, Poison(SIGKILL, 4, FORWARD, ranks - 1, 4))
    assert ended.codes == [0] * ranks, ended.text
    counts = [line["skipped_updates"] for line in read_metrics(tmp_path / "a")]
    assert counts == [0, 0, 0, 1, 1, 1, 1, 1] and "skipped 1" in ended.text
    assert [line["loss"] is None for line in read_metrics(tmp_path / "a")].index(True) == 3
    state = checkpoint.read_state(checkpoint.find_verified(tmp_path / "a")[0])
    assert (state.step, state.optimizer_step, state.skipped) == (8, 7, 1)
    finish(words("a", *all_options, "budget.steps=9"), ranks)
    assert read_metrics(tmp_path / "a")[-1]["skipped_updates"] == 1


def test_a_log_of_several_updates_has_the_loss_of_the_good_ones(words: Words, tmp_path: Path) -> None:
    options = (*PLAIN, "monitor.log_every=4", "optimizer.lr=1e-12")
    attempt(words("a", *options), 1, Poison(SIGKILL, 2, FORWARD, 0, 2))
    finish(words("b", *options, "monitor.log_every=1"))
    spoilt, whole = read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b")
    good = [whole[at]["loss"] for at in (0, 2, 3)]
    assert spoilt[0]["loss"] == pytest.approx(sum(good) / 3, rel=1e-5)
    assert spoilt[0]["grad_norm_max"] == pytest.approx(
        max(line["grad_norm"] for line in (*whole[2:4], whole[0])), rel=1e-4
    )
    assert [line["skipped_updates"] for line in spoilt] == [1, 1]


def test_too_many_in_a_row_end_the_run_and_say_how_to_go_on(words: Words, tmp_path: Path) -> None:
    """The command is run as it stands; nothing was saved of what gave no numbers."""
    options = (*PLAIN, "train.max_skipped=2", "checkpoint.every_steps=2", "budget.steps=12")
    ended = attempt(words("a", *options), 2, Poison(SIGKILL, 6, FORWARD, 1, 99))
    assert ended.codes == [2, 2], ended.text
    (line,) = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert "step 8: the gradients of the last 3 updates (samples 40 to 63) are not finite" in line
    assert checkpoint.steps(tmp_path / "a") == [2, 4]
    command = shlex.split(line.partition("lower optimizer.lr: ")[2])
    assert command[:3] == ["python", "-m", "pretrain"]
    finish(command[3:], 2)
    (first, *_) = ledger.read(tmp_path / "a-lower")
    assert (first.event, first.step) == ("branch", 4)
    assert read_metrics(tmp_path / "a-lower")[0]["step"] == 5


def test_spikes() -> None:
    spikes, dice = Spikes(), random.Random(0)
    counts = [spikes.count(dice.gauss(5.0, 0.1)) for _ in range(SPIKE_WINDOW)]
    assert set(counts) == {0} and spikes.count(None) == 0
    assert [spikes.count(value) for value in (6.5, 5.0, 6.5, 5.1)] == [1, 1, 2, 2]
    few = Spikes()
    assert [few.count(value) for value in (1.0, 1.0, 99.0)] == [0, 0, 0]


# ---- bits ----------------------------------------------------------------------------------------


def test_a_checksum_sees_every_bit() -> None:
    tensors = [torch.randn(50), torch.randn(3, 7)]
    before = checksum(tensors)
    assert checksum(reversed(tensors)) == before
    flip(tensors[0])
    assert checksum(tensors) != before and checksum([]) == 0


@pytest.mark.parametrize(
    ("sums", "odd"), [([1, 1, 1], []), ([1, 2, 1], [1]), ([1, 2], [0, 1]), ([3, 1, 1, 2], [0, 1, 2, 3])]
)
def test_who_is_odd(sums: list[int], odd: list[int]) -> None:
    assert odd_ones(sums) == odd


def test_who_is_faulty() -> None:
    good = [[0, 0, 10, 10, 11], [0, 1, 11, 11, 12], [0, 2, 12, 12, 10]]
    assert faulty(good, 3) == []
    flaky = [good[0], [0, 1, 11, 99, 12], good[2]]
    assert faulty(flaky, 3) == [1]
    wrong = [good[0], [0, 1, 98, 98, 99], good[2]]
    assert faulty(wrong, 3) == [1]
    assert faulty([[0, 0, 10, 10, 11], [0, 1, 98, 98, 99]], 2) == [0, 1]


def test_a_faulty_rank_is_named(words: Words, tmp_path: Path) -> None:
    options = (*PLAIN, "monitor.replay_every=2", "train.batch_size=12", "model.dropout=0.1")
    ended = attempt(words("a", *options), 3, Flip(SIGKILL, 1, BACKWARD, 1, 10**6))
    assert ended.codes == [2, 2, 2], ended.text
    assert "error: step 0: rank 1 forms other bits of a micro-batch" in ended.text


def test_replaying_changes_nothing(words: Words, tmp_path: Path) -> None:
    options = ("model.dropout=0.1", "train.micro_batch_size=2", "parallel.tensor=2")
    finish(words("a", *options, "monitor.replay_every=3"), 4)
    finish(words("b", *options), 4)
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_weights_that_differ_are_not_saved(words: Words, tmp_path: Path) -> None:
    strike = FlipWeights(SIGKILL, 2, ("pretrain.replay:compare_weights",), 1)
    options = (*PLAIN, "train.batch_size=6", "checkpoint.every_steps=2")
    ended = attempt(words("a", *options), 3, strike)
    assert ended.codes == [2, 2, 2], ended.text
    assert "error: step 4: the weights of rank 1 are not those of the others" in ended.text
    assert checkpoint.steps(tmp_path / "a") == [2]
