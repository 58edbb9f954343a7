"""float16: the loss scale against torch's, gradients that would vanish, updates that overflow."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import train
from pretrain.account import ledger
from pretrain.build import build, build_engine
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.inputs import open_inputs
from pretrain.model import loss_scale
from pretrain.model.loss import ChunkedCrossEntropy
from pretrain.model.loss_scale import FIRST_SCALE, MIN_SCALE, LossScale
from pretrain.monitor import read_metrics
from pretrain.parallel import engine, topology
from pretrain.run_folder import RunFolder
from pretrain.start import open_start
from tests.parallel.test_engine import (
    BATCH,
    LR,
    OFFLOADED,
    TENSOR,
    ZERO,
    Case,
    expectation,
    make_model,
    on_ranks,
    same_bits,
    some_rows,
    state_of,
    update,
    whole_batch,
)
from tests.support import ranks
from tests.support.runs import result

CPU = torch.device("cpu")
QUERY = ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query", "train.precision=fp16")


# ---- the scale -----------------------------------------------------------------------------------


def test_it_moves_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    ours, weight = LossScale(CPU), torch.zeros(2, requires_grad=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
    optimizer, value = torch.optim.SGD([weight]), ours.value
    for number in "....x..x...xx...........":
        gradient = math.nan if number == "x" else 1.0
        weight.grad = theirs.scale(torch.tensor([gradient, 1.0]))
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(gradient))
        assert ours.value.item() == theirs.get_scale()
    assert ours.skipped.item() == 4
    assert ours.value is value  # others hold it


def test_it_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    one, other = LossScale(CPU), LossScale(CPU)
    norms = [1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan]
    for norm in norms[:4]:
        one.update(torch.tensor(norm))
    other.load(one.state())
    for norm in norms[4:]:
        one.update(torch.tensor(norm))
        other.update(torch.tensor(norm))
    assert one.state() == other.state() != LossScale(CPU).state()


def test_it_has_a_bottom_and_says_so() -> None:
    """Only where the smallest factor has been tried."""
    scale = LossScale(CPU)
    while scale.value.item() > MIN_SCALE:
        scale.update(torch.tensor(math.inf))
        assert not loss_scale.scale_exhausted(scale.state())
    scale.update(torch.tensor(math.inf))
    assert loss_scale.scale_exhausted(scale.state())
    scale.update(torch.tensor(1.0))
    assert not loss_scale.scale_exhausted(scale.state())


# ---- gradients of the head -----------------------------------------------------------------------


def test_small_probabilities_keep_their_gradients() -> None:
    """Most pieces are less likely than the smallest number of float16."""
    N, D, W = 64, 16, 48
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, D, generator=generator) / 2 for size in (N, W))
    bias, target = torch.zeros(W), torch.zeros(N, dtype=torch.int64)
    bias[0] = 22.0  # the other pieces have a chance of about 1e-9
    expected = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    F.cross_entropy(expected[0] @ expected[1].T + expected[2], target).backward()

    def error(scale: Tensor | None) -> float:
        """Largest relative error of a row of the table's gradient."""
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        table = ChunkedCrossEntropy(W)
        table.scale = scale
        with torch.autocast("cpu", torch.float16):
            total, _ = table(*inputs, target)
        factor = 1.0 if scale is None else scale
        (total / N * factor).backward()
        ours, theirs = inputs[1].grad / factor, expected[1].grad
        return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())

    assert error(torch.tensor(2.0**20)) < 2e-2
    assert error(None) == 1.0  # whole rows have vanished


# ---- engines -------------------------------------------------------------------------------------

ALONE = [case._replace(precision="fp16") for case in (Case(), *ZERO)]
TOGETHER = [*ALONE, *(case._replace(precision="fp16") for case in (OFFLOADED, TENSOR[0], TENSOR[4]))]


def test_engines_follow_the_float32_oracle() -> None:
    """Alone and on two ranks; state through every door, as in test_engine."""
    expected = {Case(): expectation(Case())}
    ranks.run(1, on_ranks, ALONE, expected)
    ranks.run(2, on_ranks, TOGETHER, expected)


def one_rank_overflows(cases: list[Case]) -> list[list[float]]:
    """State of the loss scale after one rank's share of a gradient overflowed, and a good update after it."""
    seen, place = [], topology.Topology(tensor_size=0)
    for case in cases:
        if case.tensor != place.tensor_size:
            place = topology.connect(case.tensor, needs_group=True)
        micro = BATCH // place.data_size
        built = build_engine(case.config(), make_model(case), place, micro)
        update(built, place, micro, 0)
        before, count = state_of(built), built.optimizer_step
        batch = some_rows(whole_batch(1), place.data_rank * micro, micro)
        built.backward(batch, math.inf if place.rank else 1.0)
        norm = built.step(LR)
        assert not norm.isfinite() and built.optimizer_step == count, case
        same_bits(state_of(built), before)
        update(built, place, micro, 1)
        assert built.optimizer_step == count + 1
        assert built.loss_scale
        seen.append(list(built.loss_scale.state().values()))
    return seen


def test_all_ranks_skip_what_overflows_on_one() -> None:
    for seen in ranks.run(2, one_rank_overflows, TOGETHER):
        assert seen == [[FIRST_SCALE / 2, 1.0, 1.0, 0.0]] * len(TOGETHER)


# ---- runs ----------------------------------------------------------------------------------------


def run_here(command: list[str], folder: Path, stop_after: int = 0) -> int:
    """A run in this process, asked to stop after so many updates."""
    signals: Any = SimpleNamespace(received=None)
    inputs = open_inputs(load_config(command[0], command[1:]), torch.device("cpu"), 1)
    claimed = RunFolder(folder)
    claimed.claim()
    run = build(inputs, open_start(inputs, topology.Topology(), claimed), signals)
    step = run.engine.step

    def counted(lr: float) -> Tensor:
        signals.received = "the test" if run.step + 1 == stop_after else None
        return step(lr)

    run.engine.step = counted  # type: ignore[method-assign]
    try:
        return train.train(run)
    finally:
        train.close(run)


def test_a_run_finds_its_scale_and_resumes_to_the_bit(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", loss_scale.MAX_SCALE)
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    assert run_here(words("whole", *QUERY), tmp_path / "whole") == 0
    lines = [line for line in read_metrics(tmp_path / "whole") if "loss_scale" in line]
    skipped = [int(line["skipped_updates"]) for line in lines]
    assert skipped[0] == 1 and lines[0]["loss_scale"] == loss_scale.MAX_SCALE / 2
    assert lines[0]["grad_norm"] is None
    assert 1 <= skipped[-1] < 8 and lines[-1]["loss_scale"] < loss_scale.MAX_SCALE

    totals = ledger.total([tmp_path / "whole"])
    assert totals.steps == 8 and totals.flops["total"] == lines[-1]["flops"]  # skipped ones are paid for

    for stop, code in ((2, 75), (5, 75), (0, 0)):
        assert run_here(words("cut", *QUERY), tmp_path / "cut", stop) == code
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    again = [line for line in read_metrics(tmp_path / "cut") if "loss_scale" in line]
    assert [line["loss_scale"] for line in again] == [line["loss_scale"] for line in lines]


def test_a_run_that_no_scale_helps_ends(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0)
    monkeypatch.setattr(engine.Engine, "_norm", lambda built: torch.tensor(math.inf))
    with pytest.raises(UserError, match="gradients overflow at step 2 although"):
        run_here(words("a", *QUERY), tmp_path / "a")
