"""The planned bytes of a rank against what the allocator counted in real steps."""

import gc
import itertools
from dataclasses import replace

import pytest

from pretrain.account.recipe import make_recipe
from pretrain.parallel import topology
from tests.support import ranks
from tests.support.methods import BLOCKS, METHODS, small
from tools import calibrate
from tools.plan import layouts, memory
from tools.plan.memory import Layout

VOCAB = 4096
CLOSE = 0.06


def case(method="mlm", block="post", micro=8, accumulation=1, data=1, **sections):
    """A model whose activations, state and head are of about the same size."""
    shape = {"hidden_size": 128, "ffn_size": 512, "max_positions": 64, "vocab_size": VOCAB}
    train = {
        "seq_length": 64,
        "batch_size": micro * accumulation * data,
        "micro_batch_size": micro,
        **sections.pop("train", {}),
    }
    return small(method, block, model={**shape, **sections.pop("model", {})}, train=train, **sections)


ALONE = {
    **{
        f"{method} {block} {precision}": case(method, block, micro=24, train={"precision": precision})
        for (method, block), precision in zip(
            itertools.product(METHODS, BLOCKS), itertools.cycle(("fp32", "bf16")), strict=False
        )
    },
    "dropout": case(model={"dropout": 0.1}, micro=24),
    "recompute": case(train={"recompute": "block"}, micro=24),
    "two micro-batches": case(accumulation=2),
    "one sequence": case(micro=1),
    "several chunks of logits": case("3ml-self", micro=48),
    "muon": case("3ml-query", "modern", micro=24, optimizer={"kind": "muon"}),
    "muon, one sequence": case(
        "3ml-query", "modern", 1, optimizer={"kind": "muon"}, model={"num_layers": 8, "mask_from": 8}
    ),
}
LONG = {"max_positions": 1024}
SCORES = {
    f"{method} {block}, dropout {dropout}, recompute {recompute}": case(
        method,
        block,
        2,
        model={**LONG, "dropout": dropout},
        train={"seq_length": 1024, "precision": "bf16", "recompute": recompute},
    )
    for method, block, dropout, recompute in (
        ("mlm", "post", 0.0, "none"),
        ("mlm", "post", 0.1, "block"),
        ("3ml-cross", "pre", 0.1, "none"),
        ("3ml-query", "modern", 0.0, "none"),
    )
}
"""So long that the attention's scores are most of what is held."""
SCORES |= {
    f"{method} local, {length}, dropout {dropout}": case(
        method,
        "local",
        micro,
        model={"max_positions": 8192, "local_window": 128, "dropout": dropout, **late},
        train={"seq_length": length, "precision": precision, "recompute": recompute},
    )
    for method, precision, length, micro, dropout, recompute, late in (
        ("mlm", "fp32", 8192, 1, 0.0, "none", {}),
        ("3ml-query", "fp32", 1024, 4, 0.0, "block", {}),
        ("one-way", "fp32", 1024, 4, 0.0, "none", {"num_layers": 4, "global_every": 3}),
        ("3ml-self", "bf16", 1024, 4, 0.0, "none", {"num_layers": 4, "mask_from": 4}),
        ("mlm", "bf16", 1024, 4, 0.1, "none", {}),
    )
}
DEEPSPEED = {"engine": "deepspeed"}
DATA = {
    "data": case(data=2),
    "muon": case(data=2, micro=1, optimizer={"kind": "muon"}, model={"num_layers": 8}),
    "zero 1": case(data=2, accumulation=2, train=DEEPSPEED, parallel={"zero": 1}),
    "zero 2": case(data=2, accumulation=2, train=DEEPSPEED, parallel={"zero": 2}),
    "zero 3": case(data=2, train=DEEPSPEED, parallel={"zero": 3}),
}
TENSOR = {
    "mlm": case(micro=24, parallel={"tensor": 2}),
    "modern bf16": case("3ml-query", "modern", 24, train={"precision": "bf16"}, parallel={"tensor": 2}),
}


def held(cases):
    """{name: (bytes counted, parameters of this rank)}."""
    tensor = next(iter(cases.values())).parallel.tensor
    here = topology.connect(tensor, needs_group=True)
    found = {}
    for name, config in cases.items():
        gc.collect()
        found[name] = calibrate.held(make_recipe(config, VOCAB), config.train.micro_batch_size, here)
    return found


@pytest.mark.parametrize(
    ("world", "cases"),
    [(1, ALONE), (1, SCORES), (2, DATA), (2, TENSOR)],
    ids=["1", "scores", "data", "tensor"],
)
def test_planned_bytes_are_the_allocators(world, cases):
    counted = ranks.run(world, held, cases)[0]
    planned = {}
    for name, config in cases.items():
        layout = layouts.configured(config, world, config.train.precision, gpu=False)
        planned[name] = layouts.memory_of(make_recipe(config, VOCAB).phases[0], layout).total
    assert planned == pytest.approx(counted, rel=CLOSE)


MIXED = [("3ml-cross", "post"), ("3ml-query", "modern"), ("mae-lm", "pre")]


def shards():
    """Parameters of this rank, by method."""
    from pretrain.model import late_mask as model
    from pretrain.parallel import tensor_parallel

    here = topology.connect(2)
    sizes = []
    for method, block in MIXED:
        built = model.LateMaskModel(case(method, block).model, VOCAB, VOCAB - 1)
        tensor_parallel.shard(built, here)
        sizes.append(sum(parameter.numel() for parameter in built.parameters()))
    return sizes


def test_a_ranks_parameters_are_those_of_its_shard():
    expected = [memory.local_parameters(case(*one).model, VOCAB, 2) for one in MIXED]
    assert ranks.run(2, shards) == [expected, expected]


def test_the_fullest_moment_is_counted_from_each_steps_own_beginning():
    changes = [(1, 100), (11, 50), (12, -50), (15, 7), (21, 60), (22, -53)]
    # Step one ends 7 too high (a free that was not seen); step two gains 60 from there.
    assert calibrate.fullest(changes, [(10, 16), (20, 23)]) == 150
    assert calibrate.fullest(changes, [(20, 23)]) == 167


def test_state_by_stage():
    """Bytes a parameter: 4 + 4 and moments of 8; ZeRO's master copy and moments 12, divided. Muon's matrices
    have one moment, divided."""
    o = case("mlm")
    P = memory.local_parameters(o.model, VOCAB, 1)
    base = Layout(data=4, engine="deepspeed", precision="fp32")

    def per_parameter(**change):
        found = memory.per_rank(o.model, make_recipe(o, VOCAB).phases[0].rows, VOCAB, replace(base, **change))
        return [
            round(part / P, 2) for part in (found.parameters, found.gradients, found.optimizer, found.host)
        ]

    assert per_parameter(zero=0) == [4, 4, 8, 0]
    share = memory.orthogonalized(o.model) / P
    assert per_parameter(optimizer="muon") == [4, 4, pytest.approx(8 - 8 * share + share, abs=0.01), 0]
    assert per_parameter(zero=1) == [4, 4, 3, 0]
    assert per_parameter(zero=2) == [4, 1, 3, 0]
    assert per_parameter(zero=3) == [1, 1, 3, 0]
    assert per_parameter(zero=2, offload="optimizer") == [4, 1, 0, 4]
    assert per_parameter(zero=3, offload="all") == [0, 1, 0, 5]
