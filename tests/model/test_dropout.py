"""Dropout as a function of (seed, step, micro-batch, data rank): ranks that share a model draw alike.

That a run with dropout resumes bit-exactly is tested with the other resumes (test_resume.py).
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.build import Run
from pretrain.model.attention import Attention, CrossAttention
from pretrain.model.late_mask import LateMaskModel
from pretrain.parallel import tensor_parallel, topology
from pretrain.start import dropout_changes
from tests.parallel.test_tensor_parallel import PADDED, make_batch, make_model
from tests.support import ranks
from tests.support.methods import BLOCKS, METHODS, small

CASES = [(method, block) for method in METHODS for block in BLOCKS]


def dropping(method: str, block: str, recompute: bool) -> LateMaskModel:
    """With dropout, half of the [MASK]s in the encoder, and RoBERTa's token type."""
    more = {"dropout": 0.2, "decoder_dropout": 0.3, "mask_leak": 0.5, "token_type": block != "modern"}
    return make_model(small(method, block, model={"vocab_multiple": PADDED, **more}), recompute)


def run(model: LateMaskModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients under one seed."""
    torch.manual_seed(11)
    loss = model(make_batch(0))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hidden_states_lose_what_they_lose_undivided(
    method: str, block: str, recompute: bool, place: topology.Topology
) -> None:
    """Without dropout of attention weights, of which a rank draws for its own heads."""
    whole, divided = dropping(method, block, recompute), dropping(method, block, recompute)
    for model in (whole, divided):
        for module in model.modules():
            if isinstance(module, Attention | CrossAttention):
                module.dropout = 0.0
    tensor_parallel.shard(divided, place)
    (expected, gradients), (loss, parts) = run(whole), run(divided)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, part in parts.items():
        full = tensor_parallel.gather(name, part, place)
        torch.testing.assert_close(full, gradients[name], rtol=1e-7, atol=1e-10)
    undropped = whole.eval()(make_batch(0))
    assert abs(undropped - expected) > 1e-3


def replicas_stay_replicas(method: str, block: str, recompute: bool, place: topology.Topology) -> None:
    """With all dropout: loss and gradients of what is replicated are the same bits on all ranks."""
    model = dropping(method, block, recompute)
    tensor_parallel.shard(model, place)
    loss, gradients = run(model)
    shared = {name: g for name, g in gradients.items() if tensor_parallel.cut(name) is None}
    for name, mine in {"loss": loss, **shared}.items():
        all_of_them = [torch.empty_like(mine) for _ in range(place.tensor_size)]
        dist.all_gather(all_of_them, mine, group=place.tensor_group)
        assert all(torch.equal(other, mine) for other in all_of_them), name


def on_ranks(size: int) -> None:
    place = topology.connect(tensor=size)
    for number, (method, block) in enumerate(CASES):
        hidden_states_lose_what_they_lose_undivided(method, block, number % 2 == 0, place)
        replicas_stay_replicas(method, block, number % 2 == 1, place)
    place.close()


def test_dropout_under_tensor_parallelism() -> None:
    ranks.run(2, on_ranks, 2)


def test_what_drops_other_elements() -> None:
    """Where a run goes on in another layout: not another engine or ZeRO stage, nor recomputation."""
    before = {"ranks": 2, "tensor": 1, "zero": 1, "engine": "deepspeed", "micro_batch": 8, "compile": "none"}
    before |= {"recompute": "none"}
    config = small(model={"dropout": 0.1})
    for name, value in {"ranks": 4, "tensor": 2, "micro_batch": 4, "compile": "default"}.items():
        said = dropout_changes(config, before, before | {name: value})
        assert said == f"{name} {before[name]} -> {value}"
        assert dropout_changes(small(), before, before | {name: value}) == ""
    for name, value in (("zero", 0), ("engine", "torch"), ("recompute", "block")):
        assert dropout_changes(config, before, before | {name: value}) == ""


def test_compiled_code_drops_other_elements() -> None:
    """Which is why `train.compile` is among them."""
    drop, x, found = torch.nn.Dropout(0.5), torch.ones(1000), []
    for function in (drop, torch.compile(drop)):
        torch.manual_seed(11)
        found.append(function(x))
    assert not torch.equal(*found)


def draw(step: int = 0, micro_batch: int = 0, data_rank: int = 0, seed: int = 0, **place: Any) -> float:
    """The first number after seeding for that micro-batch."""
    config = small(model={"dropout": 0.1}, run={"dir": "run", "seed": seed})
    here = topology.Topology(data_rank=data_rank, **place)
    Run.seed_dropout(SimpleNamespace(config=config, step=step), micro_batch, here.data_rank)  # type: ignore[arg-type]
    return torch.rand(()).item()


def test_seed_of_dropout() -> None:
    """Each step, micro-batch, data rank and seed draws anew; ranks that share a model draw the same."""
    draws = [draw(), draw(step=1), draw(micro_batch=1), draw(data_rank=1), draw(seed=1)]
    assert len(set(draws)) == 5
    assert draw() == draw(tensor_rank=1, tensor_size=2) == draws[0]
