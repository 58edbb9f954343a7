"""What a calibration makes of its measurements; the measuring itself is in test_memory.py."""

import json
from dataclasses import replace

import pytest
import torch

from pretrain.account import devices
from pretrain.account.recipe import make_recipe
from pretrain.errors import UserError
from pretrain.parallel import topology
from tools import calibrate
from tools.plan import layouts, memory
from tools.plan import pages as plan_pages


def observed(size, seconds_at, factor=1.0):
    """A row of a device whose products reach `seconds_at` of the peak, `factor` slower than planned."""
    device = devices.find("H100")
    recipe = make_recipe(layouts.recipe(size, 128), layouts.ROBERTA_PIECES)
    (phase,) = recipe.phases
    layout = layouts.Layout(micro_batch=64, accumulation=32)
    return calibrate.Observation(
        case=calibrate.Case(size, size, ()),
        phase=phase,
        layout=layout,
        seconds=factor * layouts.step_seconds(phase, layout, device, seconds_at),
        pace=1.0,
        bytes=layouts.memory_of(phase, layout).total / 1.25,
    )


def test_the_first_row_gives_the_share_and_the_others_are_held_against_it():
    rows = [observed("base", 0.6), observed("large", 0.6, factor=1.25)]
    made = calibrate.compared(rows, devices.find("H100"))
    assert made.achieved == {"bf16": pytest.approx(0.6)}
    assert made.rows[0].seconds_error == pytest.approx(0)
    assert made.rows[1].seconds_error == pytest.approx(-0.2)
    assert vars(made.median_error) == {"seconds": pytest.approx(0.2), "bytes": pytest.approx(0.25)}
    assert "large" in calibrate.text(made) and "-20.0%" in calibrate.text(made)


@pytest.mark.parametrize("slowness", [1.0, 2.0])
def test_seconds_are_given_at_full_pace(monkeypatch, slowness):
    """Where a product takes twice as long as at the peak, a step of 10 s is 5 s of work."""
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds * slowness

    class Matrix:
        def __matmul__(self, other):
            work(1.0)

    monkeypatch.setattr(calibrate, "step_of", lambda *_: lambda: work(5.0))
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now)
    monkeypatch.setattr("torch.randn", lambda *_, **__: Matrix())
    peak = 2 * calibrate.SIZE["cpu"] ** 3
    assert calibrate.timed(None, 1, peak, topology.Topology()) == pytest.approx((5.0, 1 / slowness))


def test_cases_are_listed_and_unknown_ones_refused(capsys):
    assert calibrate.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(calibrate.CASES)
    assert calibrate.main(["--list", "--json", "--only", "ZeRO 1"]) == 0
    (case,) = json.loads(capsys.readouterr().out)
    assert (case["config"], case["ranks"]) == ("demo-3ml", 2)
    with pytest.raises(UserError, match="--only abacus: in none of the names: mlm-base; "):
        calibrate.main(["--only", "abacus"])


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA device"):
        calibrate.main(["--device", "cuda"])


def test_a_layout_in_a_word():
    layout = memory.Layout(tensor=2, data=4, zero=3, micro_batch=16, accumulation=8)
    assert plan_pages.layout_word(layout) == "2x4 z3 16x8"
    assert plan_pages.layout_word(replace(layout, offload="all", recompute="block")) == "2x4 z3 16x8 O r"
