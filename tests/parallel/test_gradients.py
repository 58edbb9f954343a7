"""Gradients summed in buckets while the backward pass goes on: one process's, and the same bits as after it.

Buckets are small here, so that there are several, and some hold a parameter that has no gradient.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pretrain.build import build_engine
from pretrain.config import Config
from pretrain.model.late_mask import Batch, LateMaskModel, init_weights
from pretrain.parallel import engine, gradients, topology
from tests.parallel.test_engine import some_rows
from tests.support import ranks
from tests.support.methods import small

ROWS, LENGTH, PREDICTED = 12, 24, 11
VOCABS = {"rows": 1000, "table": 40}
"""Pieces with which the gradients of looked-up words travel as rows, or in the table's."""

torch.set_num_threads(1)


class Case(NamedTuple):
    """A model and a layout."""

    method: str = "mlm"
    block: str = "post"
    words: str = "rows"
    accumulation: int = 1
    reduce_dtype: str = "fp32"
    sections: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def config(self) -> Config:
        sections = {section: dict(keys) for section, keys in self.sections}
        sections["model"] = {"vocab_multiple": 2, **sections.get("model", {})}
        sections["train"] = {"batch_size": ROWS, "clip": 0.0, **sections.get("train", {})}
        sections["parallel"] = {"reduce_dtype": self.reduce_dtype}
        return small(self.method, self.block, **sections)

    def model(self) -> LateMaskModel:
        config, vocab = self.config(), VOCABS[self.words]
        model = LateMaskModel(config.model, vocab, vocab - 1, config.train.recompute == "block")
        init_weights(model, 3)
        return model

    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(4, VOCABS[self.words] - 1, (ROWS, LENGTH), generator=generator)
        masked = 9
        shown = ids.clone()
        shown[:, -masked:] = VOCABS[self.words] - 1
        positions = torch.rand(ROWS, LENGTH, generator=generator).argsort(1)
        return Batch(shown, positions, ids[:, -PREDICTED:].contiguous(), masked)


UNUSED = (("model", (("token_type", True),)),)  # RoBERTa's padding positions
CASES = [
    Case(sections=UNUSED),
    Case(sections=UNUSED, words="table"),
    Case("mae-lm", "modern", accumulation=2),
    Case("mae-lm", "pre", words="table", accumulation=2),
    Case("shared-depth", "modern", sections=(("train", (("recompute", "block"),)),)),
    Case("3ml-query", accumulation=2, sections=(("optimizer", (("kind", "muon"),)),)),
    Case("3ml-cross", "pre", sections=(("model", (("decoder_positions", "shared"),)),)),
    Case(reduce_dtype="bf16"),
    Case(reduce_dtype="bf16", words="table"),
]


def passes(built: engine.Engine, case: Case, place: topology.Topology) -> dict[str, Tensor]:
    """The whole gradients of an update's micro-batches."""
    batch, share = case.batch(), ROWS // place.data_size
    micro = share // case.accumulation
    for first in range(place.data_rank * share, (place.data_rank + 1) * share, micro):
        built.backward(some_rows(batch, first, micro), 1 / case.accumulation)
    if built.sum:
        built.sum.wait()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in built.module.parameters())
    return {name: p.grad.clone() for name, p in built.module.named_parameters() if p.grad is not None}


class Found(NamedTuple):
    """Of two updates that overlap, and of two that do not."""

    gradients: list[dict[str, Tensor]]
    """Of the first."""
    ends: list[dict[str, Tensor]]
    sent: list[list[int]]
    """Calls that had been made when the last parameters were about to be ready, by micro-batch."""
    buckets: int


def summed() -> list[Found]:
    gradients.REDUCE_BUCKET = 1500
    place = topology.connect()
    return [overlapped(case, place) for case in CASES]


def overlapped(case: Case, place: topology.Topology) -> Found:
    found = Found([], [], [], 0)
    for overlaps in (True, False):
        built = build_engine(case.config(), case.model(), place, ROWS // place.data_size // case.accumulation)
        assert built.sum and len(built.sum.buckets) > 4
        built.sum.overlaps, sent, calls = overlaps, built.sum._sent, []

        def count(_: Tensor, sent: list[Any] = sent, calls: list[int] = calls) -> None:
            calls.append(len(sent))

        built.module.embedding_norm.weight.register_post_accumulate_grad_hook(count)
        found.gradients.append(passes(built, case, place))
        built.step(1e-3)
        passes(built, case, place)
        built.step(1e-3)
        found.ends.append({name: tensor for name, tensor in built.tensors("param")})
        found.sent.append(calls)
    return found._replace(buckets=len(built.sum.buckets))


def same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name in some:
        assert torch.equal(some[name], others[name]), name


@pytest.fixture(scope="module")
def by_rank() -> list[list[Found]]:
    return ranks.run(3, summed)


def test_overlap_changes_no_bit(by_rank: list[list[Found]]) -> None:
    for found in by_rank:
        for case, one, first in zip(CASES, found, by_rank[0], strict=True):
            same_bits(*one.gradients)
            same_bits(*one.ends)
            same_bits(one.ends[0], first.ends[0])
            # In the last backward pass of an update only, and most of it.
            last = [number % case.accumulation == case.accumulation - 1 for number in range(len(one.sent[0]))]
            assert [calls > one.buckets // 2 for calls in one.sent[0]] == last
            assert one.sent[1] == [0] * len(last)


def test_sums_are_the_gradients_of_one_process(by_rank: list[list[Found]]) -> None:
    """Those in bf16 are rounded, and no worse."""
    for case, found in zip(CASES, by_rank[0], strict=True):
        alone = case._replace(accumulation=1, reduce_dtype="fp32")
        built = build_engine(alone.config(), alone.model(), topology.Topology(), ROWS)
        expected = passes(built, alone, topology.Topology())
        exact = case.reduce_dtype == "fp32"
        assert expected.keys() == found.gradients[0].keys()
        for name, tensor in expected.items():
            error = (found.gradients[0][name] - tensor).norm() / tensor.norm()
            assert error < (1e-5 if exact else 2**-7), f"{case} {name}"
            assert exact or error > 1e-5 or tensor.dim() < 2, f"{case} {name}"


@pytest.mark.parametrize("words", VOCABS)
def test_looked_up_words_have_the_gradient_that_autograd_gives_them(words: str) -> None:
    case = Case("mae-lm", words=words)
    model = case.model()
    model(case.batch()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    built = build_engine(case.config(), case.model(), topology.Topology(), ROWS)
    found = passes(built, case, topology.Topology())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
