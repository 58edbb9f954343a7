"""The estimators on a gradient whose variance is known, and the gradients against autograd's."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.masking import Masker, masker
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch
from tests.support.runs import finish
from tools.analyze import __main__ as analyze
from tools.analyze import variance as analyze_variance
from tools.analyze.variance import (
    COVARIANCE,
    OVER_MASKS,
    Covariances,
    Gradients,
    Mean,
    Spread,
    additive_covariance,
    samplers,
    shifts_of,
)
from tools.shared.run_model import load_model

# ---- the additive toy problem --------------------------------------------------------------------

N, P, K, DRAWS = 60, 12, 4, 20_000
A = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A -= A.mean(0)
S2 = float(A.square().sum() / (N - 1))


def toy(places: np.ndarray) -> torch.Tensor:
    """[..., P] places of the masked tokens from 1 -> their gradient [..., 3]."""
    return A[torch.from_numpy(places - 1)].mean(-2)


def masks(masking: MaskingOptions, first: int, draws: int) -> np.ndarray:
    """[draws, K, P] places that a sampler of the analysis predicts."""
    draw = Masker(masking, N + 2, 9, np.arange(4, 9), np.array([0, 2]), np.ones(10, bool))
    text = np.full(N + 2, 5)
    text[[0, -1]] = 0, 2
    view = np.tile(np.arange(K), draws) * (masking.views > 1)
    part = np.tile(np.arange(K), draws) * (masking.views == 1)
    keys = rng.key(7, np.repeat(np.arange(first, first + draws), K), part)
    found = draw(np.tile(text, (draws * K, 1)), keys, view).positions[:, -P:]
    return found.reshape(draws, K, P)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("independent", S2 * (1 / P - 1 / N) / K),
        ("disjoint", S2 * (1 / (K * P) - 1 / N)),
        ("whole_word", S2 * (1 / P - 1 / N) / K),  # with words of one token
    ],
)
def test_variance_over_masks_of_the_toy(name: str, expected: float) -> None:
    masking = samplers(P, N + 2, K, (1, 0, 0))[name]
    gradients = toy(masks(masking, 0, 2 * DRAWS)).mean(1)
    spread = Spread()
    for one, other in zip(gradients[:DRAWS], gradients[DRAWS:], strict=True):
        spread.add(one, other)
    assert abs(spread.over_masks.value - expected) < 3 * spread.over_masks.standard_error
    assert spread.over_masks.standard_error < 0.02 * expected


def test_views_that_cover_the_text_have_no_variance() -> None:
    """K P = N: the mean over the K disjoint masks is the mean over the text, whatever the partition."""
    draw = Masker(MaskingOptions(rate=0.2, views=5), N + 2, 9, np.arange(4, 9), np.array([0, 2]))
    text = np.full(N + 2, 5)
    text[[0, -1]] = 0, 2
    for number in range(20):
        places = draw(np.tile(text, (5, 1)), rng.key(np.full(5, number)), np.arange(5)).positions[:, -P:]
        assert toy(places).mean(0).abs().max() < 1e-15


def test_covariance_of_the_toy_falls_with_the_distance() -> None:
    shifts = shifts_of(P, N)
    assert shifts == [0, 3, 6, 9, 12]
    orders = np.random.default_rng(1).permuted(np.tile(np.arange(1, N + 1), (2, DRAWS, 1)), axis=2)
    moved = torch.stack([toy(np.roll(orders, -shift, 2)[..., :P]) for shift in shifts], 2)
    covariances = Covariances()
    for one, other in zip(*moved, strict=True):
        covariances.add(list(one), list(other), shifts)
    for shift, mean in covariances.by_shift.items():
        expected = S2 * additive_covariance(P - shift, P, N)
        assert abs(mean.value - expected) < 3 * mean.standard_error, shift
        assert mean.standard_error < 0.02 * S2 / P


def test_variance_over_texts() -> None:
    """Texts with gradients of known spread and noise from the masks: both parts are told apart."""
    generator = torch.Generator().manual_seed(3)
    spread = Spread()
    for _ in range(DRAWS):
        text = 5 + 2 * torch.randn(4, generator=generator)
        one, other = (text + 3 * torch.randn(4, generator=generator) for _ in range(2))
        spread.add(one, other)
    assert spread.over_texts == pytest.approx(4 * 4, rel=0.03)
    assert abs(spread.over_masks.value - 4 * 9) < 4 * spread.over_masks.standard_error


def test_standard_error() -> None:
    mean, values = Mean(), np.random.default_rng(0).normal(size=50)
    for value in values:
        mean.add(float(value))
    assert mean.value == pytest.approx(values.mean())
    assert mean.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(50))


# ---- gradients of a model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variance") / "late"
    late = ("model.mask_from=2", "model.decoder_layers=1", "masking.rate=0.3")
    finish([str(tiny / "tiny.yaml"), f"run.dir={folder}", "budget.steps=3", *late])
    return folder


def test_gradient_of_k_masks_is_the_mean(run: Path, tiny: Path) -> None:
    loaded = load_model(run)
    model = loaded.model
    text = analyze_variance.texts_of(loaded, str(tiny / "valid"), 3)[1]
    gradients = Gradients(model, torch.device("cpu"))
    for name, masking in samplers(5, 24, 4, (0.8, 0.1, 0.1)).items():
        draw = masker(masking, 24, loaded.tokenizer)
        found = gradients.of_draw(draw, text, 1, 0, 4)
        parts, places = [], []
        for k in range(4):
            views = masking.views > 1
            key = rng.key(0, 1, 0, np.array([0 if views else k]))
            masked = draw(text[None], key, np.array([k if views else 0]))
            places.append(masked.positions[0, -5:])
            parts.append(gradients.of(Batch.from_masked(masked, torch.device("cpu"))))
        torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-6)
        assert (len(set(np.concatenate(places))) == 20) == (name in ("disjoint", "contiguous"))
    expected = torch.autograd.grad(model(Batch.from_masked(masked, torch.device("cpu"))), model.tok.weight)
    assert torch.equal(parts[-1][: model.tok.weight.numel()], expected[0].flatten()) == (
        next(iter(model.named_parameters()))[0] == "tok.weight"
    )


def test_chain_overlaps_by_exact_counts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(run)
    gradients, seen = Gradients(loaded.model, torch.device("cpu")), []
    monkeypatch.setattr(gradients, "of", lambda batch: seen.append(batch))
    text, order = np.arange(100, 124), 1 + rng.permute(np.arange(22), 22, 5)
    shifts = shifts_of(9, 22)
    gradients.of_chain(loaded.model.mask_id, text, order, 9, shifts)
    assert shifts == [0, 2, 4, 6, 8]
    masked = [set(batch.positions[0, -9:].tolist()) for batch in seen]
    for shift, places, batch in zip(shifts, masked, seen, strict=True):
        assert len(places & masked[0]) == 9 - shift
        assert sorted(batch.positions[0].tolist()) == list(range(24))
        assert (batch.ids[0, -9:] == loaded.model.mask_id).all() and batch.num_masked == 9
        assert (batch.ids[0, :15] == batch.positions[0, :15] + 100).all()
        assert (batch.targets[0] == batch.positions[0, -9:] + 100).all()


def test_program(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["variance", str(run), "--output", str(tmp_path), "--texts", "6"]
    assert analyze.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "variance.json").read_text())
    with open(tmp_path / "variance.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document)
    values = {row["sampler"]: row for row in document if row["quantity"] == OVER_MASKS}
    assert list(values) == ["independent", "disjoint", "contiguous", "whole_word"]
    assert all(row["value"] > 0 and row["masks"] == 3 and row["predicted"] == 7 for row in values.values())
    curve = [row["value"] for row in document if row["quantity"] == COVARIANCE]
    assert len(curve) > 4 and curve[0] > max(curve[2:])
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    assert analyze.main([*words, "--views", "2", "--rate", "0.5"]) == 0
    assert "2 masks of 11 in 22 tokens" in capsys.readouterr().out


def test_refusals(run: Path, tmp_path: Path) -> None:
    words: Callable[..., list[str]] = lambda *more: ["variance", str(run), "--output", str(tmp_path), *more]  # noqa: E731
    for more in (["--rate", "1.5"], ["--views", "1"], ["--texts", "1"], ["--corpus", str(tmp_path / "none")]):
        with pytest.raises(UserError):
            analyze.main(words(*more))
