"""Newton-Schulz against singular values, torch's Muon and torch's FLOP counter."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.account import flops
from pretrain.config import geometry
from pretrain.model import muon
from pretrain.model.late_mask import LateMaskModel
from pretrain.parallel.optimizer import Muon
from pretrain.parallel.topology import Topology
from tests.support.methods import BLOCKS, METHODS, small
from tests.support.optimizers import polar, rows_of_each

VOCAB = 50
HEADS = 4


def built(method: str = "3ml-cross", block: str = "modern") -> LateMaskModel:
    torch.manual_seed(0)
    return LateMaskModel(small(method, block).model, VOCAB, VOCAB - 1)


def gradients(model: LateMaskModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 20), (2, 20, 6)])
def test_singular_values_go_through_the_quintic(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(muon.newton_schulz(x), torch.stack([polar(one) for one in x]))
    assert torch.equal(muon.newton_schulz(0 * x), 0 * x)


@pytest.mark.parametrize("block", BLOCKS)
def test_fused_weights_are_the_matrices_that_they_are_meant_as(block: str) -> None:
    model = built(block=block)
    found = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name}
    assert muon.matrices(model) == found
    for name, weight in found.items():
        parts = muon.take_apart(name, weight.data, weight.shape[1] // HEADS)
        expected = [weight.data[rows] for rows in rows_of_each(name, weight, HEADS)]
        assert torch.equal(parts, torch.stack(expected)), name
        assert torch.equal(muon.put_together(name, parts, weight, weight.shape[1] // HEADS), weight)


def test_many_at_once_are_as_one_by_one() -> None:
    weights = {name: torch.randn(p.shape) for name, p in muon.matrices(built()).items()}
    together = muon.orthogonalize(weights, 8, torch.float32)
    assert together.keys() == weights.keys()
    for name, weight in weights.items():
        alone = muon.orthogonalize({name: weight}, 8, torch.float32)[name]
        torch.testing.assert_close(together[name], alone)


def test_updates_are_as_large_as_adamws() -> None:
    for shape in ((768, 768), (3072, 768), (768, 3072)):
        update = muon.orthogonalize({"layers.0.ffn.up.weight": torch.randn(shape)}, 64, torch.float32)
        # Singular values of 0.7 to 1.2.
        assert update["layers.0.ffn.up.weight"].square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_torchs_muon_makes_the_same_updates() -> None:
    """Of the roberta block's matrices that are not fused, in bf16, which is all that torch's knows."""
    model, other = built("mlm", "pre"), built("mlm", "pre")
    config = small("mlm", "pre", train={"precision": "bf16"}, optimizer={"kind": "muon", "weight_decay": 0.1})
    ours = Muon(model, config, Topology())
    plain = [n for n in muon.matrices(model) if "qkv" not in n]
    parameters = [nn.Parameter(other.get_parameter(name).data.clone()) for name in plain]
    theirs = torch.optim.Muon(
        parameters, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for parameter in muon.matrices(model).values():
        ours.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
    ours.param_groups[-1]["lr"] = 0.01
    for _ in range(3):
        gradients(model)
        for name, parameter in zip(plain, parameters, strict=True):
            parameter.grad = model.get_parameter(name).grad
        ours.step()
        theirs.step()
    for name, parameter in zip(plain, parameters, strict=True):
        moved = (parameter - other.get_parameter(name)).detach()
        difference = model.get_parameter(name).detach() - parameter.detach()
        # Three updates in 16 bits; another rate, decay or momentum is off by much more.
        assert difference.norm() < 0.02 * moved.norm(), name


@pytest.mark.parametrize(("method", "block"), list(itertools.product(METHODS, BLOCKS)))
def test_flops_equal_torchs_counter(method: str, block: str) -> None:
    model = built(method, block)
    weights = {name: torch.randn(p.shape) for name, p in muon.matrices(model).items()}
    with FlopCounterMode(display=False) as counter:
        muon.orthogonalize(weights, 8, torch.float32)
    assert counter.get_total_flops() == flops.muon(model.m)
    elements = sum(rows * columns * n for (rows, columns), n in geometry.muon_matrices(model.m).items())
    assert elements == sum(weight.numel() for weight in weights.values())


def test_each_matrix_is_one_ranks_and_none_has_much_more_work() -> None:
    config = small("mlm", model={"num_layers": 12}, optimizer={"kind": "muon"})
    model = LateMaskModel(config.model, VOCAB, VOCAB - 1)
    made = Muon(model, config, Topology(data_size=5))
    assert set(made.owner) == set(muon.matrices(model).values())
    work = [0.0] * 5
    for name, parameter in made.matrices.items():
        K, rows, columns = muon.take_apart(name, parameter, made.head_size).shape
        work[made.owner[parameter]] += K * flops.newton_schulz(rows, columns)
    assert max(work) < 1.15 * sum(work) / 5
