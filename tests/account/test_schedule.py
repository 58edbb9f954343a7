"""Learning-rate curves against their written form and torch's own schedulers."""

import pytest
import torch

from pretrain.account.schedule import scale


@pytest.mark.parametrize("kind", ["linear", "cosine", "trapezoid"])
def test_ends_and_peak(kind):
    assert scale(kind, 0.0, 0.1, 0.0) == 0.0
    assert scale(kind, 0.05, 0.1, 0.0) == pytest.approx(0.5)
    assert scale(kind, 0.1, 0.1, 0.0) == pytest.approx(1.0)
    assert scale(kind, 1.0, 0.1, 0.0) == pytest.approx(0.0)
    assert scale(kind, 1.0, 0.1, 0.25) == pytest.approx(0.25)
    assert scale(kind, 0.0, 0.0, 0.0) == 1.0


def test_cosine_equals_torch():
    steps, optimizer = 50, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.1)
    for step in range(steps + 1):
        assert scale("cosine", step / steps, 0.0, 0.1) == pytest.approx(curve.get_last_lr()[0])
        optimizer.step()
        curve.step()


def test_linear_equals_torch():
    steps, warm, optimizer = 40, 10, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    curve = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / warm if s < warm else (steps - s) / (steps - warm)
    )
    for step in range(steps + 1):
        assert scale("linear", step / steps, warm / steps, 0.0) == pytest.approx(curve.get_last_lr()[0])
        optimizer.step()
        curve.step()


def test_trapezoid_is_flat_until_the_last_fifth():
    assert scale("trapezoid", 0.79, 0.06, 0.0) == 1.0
    assert scale("trapezoid", 0.9, 0.06, 0.0) == pytest.approx(0.5)
