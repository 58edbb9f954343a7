"""float8 by torchao, emulated (rounded only): which products, how near, and that nothing else notices."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.build import build_engine
from pretrain.errors import UserError
from pretrain.model import float8
from pretrain.model.late_mask import LateMaskModel, init_weights
from pretrain.parallel import topology
from tests.parallel.test_tensor_parallel import MASK, VOCAB, make_batch
from tests.support.methods import small

torchao = pytest.mark.skipif(not float8.find_spec("torchao"), reason="needs the extra float8")
GPU = torch.device("cuda")


def make_model(method: str = "3ml-cross", block: str = "post") -> LateMaskModel:
    model = LateMaskModel(small(method, block).model, VOCAB, MASK)
    init_weights(model, seed=3)
    return model


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


@torchao
@pytest.mark.parametrize("block", ["post", "modern"])
def test_the_layers_products_are_converted_and_nothing_else(block: str) -> None:
    model = make_model(block=block)
    products = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name
    }
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    float8.swap(model, emulate=True)
    assert converted(model) == products and len(products) > 12
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@torchao
def test_widths_that_do_not_fit_are_left_alone() -> None:
    config = small("3ml-self", model={"ffn_size": 40})
    model = LateMaskModel(config.model, VOCAB, MASK)
    float8.swap(model, emulate=True)
    assert {name.rpartition(".")[2] for name in converted(model)} == {"qkv", "out"}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that can, as far as the engine is concerned."""
    monkeypatch.setattr(float8, "convert", lambda model, device: float8.swap(model, emulate=True))
    yield


@torchao
@pytest.mark.usefixtures("emulated")
def test_an_update_is_near_that_of_float32_and_saved_alike() -> None:
    """What the engine saves, one without float8 loads; losses differ by rounding, as they must."""
    losses, states = {}, {}
    for on in (False, True):
        config = small("3ml-cross", train={"float8": on, "precision": None})
        built = build_engine(config, make_model(), topology.Topology(), 3)
        seen = []
        for _ in range(3):
            seen.append(built.backward(make_batch(0), 1.0).item())
            assert built.step(1e-3).isfinite()
        losses[on], states[on] = seen, {name: tensor for name, tensor in built.tensors("param")}
    assert losses[True] == pytest.approx(losses[False], rel=2e-3) and losses[True] != losses[False]
    assert losses[True][-1] < losses[True][0]
    assert list(states[True]) == list(states[False])
    plain = make_model()
    plain.load_state_dict(states[True])


# ---- refusals ------------------------------------------------------------------------------------


def test_a_machine_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a GPU of compute capability 8.9"):
        float8.convert(make_model(), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="needs a GPU of compute capability 8.9"):
        float8.convert(make_model(), GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchao is not installed; pip install"):
        float8.convert(make_model(), GPU)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel": {"tensor": 2}}, "does not know layers that parallel.tensor = 2"),
        ({"train": {"engine": "deepspeed"}, "parallel": {"zero": 3}}, "undoes parallel.zero = 3"),
        ({"train": {"precision": "fp16"}}, "all else is bf16"),
        ({"model": {"hidden_size": 24}}, "is no multiple of 16"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], said: str) -> None:
    keys = {**keys, "train": {"precision": "bf16", "float8": True, **keys.get("train", {})}}
    with pytest.raises(UserError, match=said):
        small("3ml-self", **keys)
