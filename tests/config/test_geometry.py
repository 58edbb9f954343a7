"""The closed forms of a model's shapes against the modules that have them."""

import itertools

import pytest
import torch

from pretrain.config import geometry
from tests.account.test_flops import VOCAB, build
from tests.support.methods import FORMS, METHODS


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize(("method", "block"), list(itertools.product(METHODS, FORMS)))
def test_parameters_equal_the_models(method, block, imported):
    config, built, _, _ = build(
        method, block, model={"token_type": imported and block not in ("modern", "local")}
    )
    parts = geometry.parameters(config.model, VOCAB)
    assert parts["total"] == sum(p.numel() for p in built.parameters())
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert parts["encoder"] == count(built.layers) + count(built.final_norm)
    assert parts["head"] == count(built.head)
    decoder = (count(built.decoder) if built.decoder else 0) + getattr(
        built, "mask_vector", torch.empty(0)
    ).numel()
    assert parts["decoder"] == decoder
