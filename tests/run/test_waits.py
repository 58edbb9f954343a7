"""The host never waits for the device but where something is told: at a log line, an evaluation, a save."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import __main__ as pretrain

WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"}
"""What the host cannot go on without: float(), bool(), item(), and shapes that depend on values."""


class _Waits(TorchDispatchMode):
    """Counts them, in the thread that trains; shapes by values too where a mask is an index."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        by_mask = name == "aten.index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += name in WAITS or by_mask
        return func(*args, **(kwargs or {}))


METHODS = {
    "mlm": (),
    "3ml-query": ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query"),
    "bounded": ("model.mask_from=2", "model.decoder_layers=2", "corpus.documents=bounded"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_more_updates_wait_no_more(method: str, precision: str, words: Callable[..., list[str]]) -> None:
    """Clipped, in two micro-batches, with dropout; one log line, one evaluation and one save each."""
    same = (f"train.precision={precision}", "train.micro_batch_size=4", "model.dropout=0.1")
    same += ("monitor.log_every=100", "evaluate.every_steps=null", *METHODS[method])
    found = []
    for steps in (3, 7):
        name = f"{method}-{precision}-{steps}"
        with _Waits() as waits:
            assert pretrain.main(words(name, *same, f"budget.steps={steps}")) == 0
        found.append(waits.count)
    assert found[0] == found[1] > 0


def test_a_wait_is_seen() -> None:
    with _Waits() as waits:
        values = torch.ones(3)
        bool(values[0] > 0)
        values[values > 0]
        values.nonzero()
        float(values.sum())
    assert waits.count >= 4
