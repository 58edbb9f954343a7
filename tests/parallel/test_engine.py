"""Both engines in every layout against one plain loop of torch; state through every door.

The oracle is ten lines below: no accumulation, no ranks, torch's own clipping and optimizers as papers write
them. Each layout must follow it, save what it would save, go on from its state, and repeat its own bits.
"""

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pretrain.account.recipe import make_recipe
from pretrain.build import build_engine
from pretrain.config import Config
from pretrain.config.geometry import BUCKET
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel, init_weights
from pretrain.parallel import engine, gradients, topology
from pretrain.parallel.deepspeed_engine import deepspeed_config
from pretrain.parallel.gradients import buckets
from pretrain.parallel.pieces import TensorPiece
from tests.parallel.test_tensor_parallel import MASK, VOCAB, make_batch
from tests.support import ranks
from tests.support.methods import small
from tests.support.optimizers import Reference as ReferenceOptimizer
from tools.plan import memory
from tools.plan.layouts import configured

BATCH, LR = 12, 1e-3
MIDDLE, STEPS = 2, 3
KINDS = ("param", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]
Pieces = dict[str, list[TensorPiece]]

# Threads cost more than they bring at this size, and far more on a busy machine.
torch.set_num_threads(1)


class Case(NamedTuple):
    """An engine in a layout."""

    tensor: int = 1
    engine: str = "torch"
    zero: int = 0
    offload: str = "none"
    precision: str = "fp32"
    persist: bool = True
    """Small parameters stay whole under ZeRO-3 (DeepSpeed's default keeps all of this model)."""
    compile: str = "none"
    cross_entropy: str = "own"
    optimizer: str = "adamw"
    method: str = "3ml-cross"
    block: str = ""
    """As `small` names it; else one with all kinds of fused matrices where Muon takes them apart."""

    @property
    def oracle(self) -> "Case":
        """The plain loop that a layout must follow."""
        return Case(optimizer=self.optimizer, method=self.method, block=self.block)

    def config(self) -> Config:
        # Small buckets: several are needed, and filling them costs no time.
        zero = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
        if not self.persist:
            zero["stage3_param_persistence_threshold"] = 0
        layers = {} if self.block else {"num_layers": 1, "mask_from": 1, "decoder_layers": 1}
        return small(
            self.method,
            self.block or ("modern" if self.optimizer == "muon" else "post"),
            # Half of the head's bias is odd: on 2 x 2 ranks ZeRO has to pad.
            model={"vocab_multiple": 2, **layers},
            train={
                "engine": self.engine,
                "batch_size": BATCH,
                "precision": self.precision,
                "compile": self.compile,
                "cross_entropy": self.cross_entropy,
                # Between the norms of the first and the last update: clipping is on, then off.
                "clip": 1.12,
            },
            optimizer={"kind": self.optimizer},
            parallel={"tensor": self.tensor, "zero": self.zero, "offload": self.offload},
            deepspeed={"zero_optimization": zero} if self.engine == "deepspeed" else {},
        )


ZERO = [Case(engine="deepspeed", zero=stage) for stage in range(4)]
TENSOR = [case._replace(tensor=2, persist=False) for case in (Case(), *ZERO)]
STOCK = [Case(engine="deepspeed", zero=3, persist=False, cross_entropy="torch")]
if not hasattr(nn.functional, "linear_cross_entropy"):  # torch 2.11
    STOCK = []
OFFLOADED = Case(engine="deepspeed", zero=3, offload="all", persist=False)
KINDS_BESIDE = ("stable-adamw", "muon")
OTHERS = [Case(engine=engine, optimizer=kind) for engine in ("torch", "deepspeed") for kind in KINDS_BESIDE]
TENSOR_OTHERS = [case._replace(tensor=2) for case in OTHERS]
TODAY = [("mlm", "local"), ("3ml-query", "local"), ("one-way", "local"), ("retromae", "modern")]
FORMS = [
    Case(optimizer=kind, method=method, block=block)
    for method, block in TODAY
    for kind in ("adamw", *KINDS_BESIDE)
]
CASES = {
    1: [Case(), *ZERO, *OTHERS],
    2: [
        Case(),
        *OTHERS,
        *ZERO,
        Case(engine="deepspeed", zero=2, offload="optimizer"),
        OFFLOADED,
        *STOCK,
        *TENSOR,
        *TENSOR_OTHERS,
        *FORMS,
    ],
    4: [
        *TENSOR,
        *TENSOR_OTHERS,
        *(case._replace(precision="bf16") for case in (TENSOR[0], TENSOR[4], TENSOR_OTHERS[1])),
    ],
}


def make_model(case: Case, seed: int = 3) -> LateMaskModel:
    model = LateMaskModel(case.config().model, VOCAB, MASK)
    init_weights(model, seed)
    return model


def whole_batch(step: int) -> Batch:
    return make_batch(step, rows=BATCH)


def some_rows(batch: Batch, first: int, count: int) -> Batch:
    rows = slice(first, first + count)
    parts = {name: value[rows] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**parts)


# ---- the oracle ----------------------------------------------------------------------------------


class Expected(NamedTuple):
    losses: list[float]
    norms: list[float]
    middle: State
    """Parameters and moments after MIDDLE updates."""
    end: State


def expectation(case: Case) -> Expected:
    config, model = case.config(), make_model(case)
    optimizer = ReferenceOptimizer(model, config.optimizer)
    losses, norms, states = [], [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = model(whole_batch(step))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.train.clip).item())
        optimizer.step(LR)
        losses.append(loss.item())
        parameters = {name: p.data for name, p in model.named_parameters()}
        states.append(copy.deepcopy({"param": parameters, **optimizer.state}))
    return Expected(losses, norms, states[MIDDLE - 1], states[-1])


def same_bits(a: State, b: State) -> None:
    for kind in KINDS:
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            assert torch.equal(tensor, b[kind][name]), f"{kind} {name}"


def close(a: State, b: State) -> None:
    for kind, atol in (("param", 2e-6), ("exp_avg", 1e-7), ("exp_avg_sq", 1e-8)):
        torch.testing.assert_close(a[kind], b[kind], rtol=1e-4, atol=atol)


# ---- on ranks ------------------------------------------------------------------------------------


def state_of(built: engine.Engine) -> State:
    return {kind: {name: tensor.clone() for name, tensor in built.tensors(kind)} for kind in KINDS}


def give(built: engine.Engine, state: State, step: int) -> None:
    for kind in KINDS:
        built.load_tensors(kind, state[kind].__getitem__)
    built.optimizer_step = step


def update(built: engine.Engine, place: topology.Topology, micro: int, step: int) -> tuple[float, float]:
    """One update with the batch of `step`; its loss over all ranks and its norm."""
    batch, share = whole_batch(step), BATCH // place.data_size
    losses = [
        built.backward(some_rows(batch, place.data_rank * share + first, micro), scale=micro / share)
        for first in range(0, share, micro)
    ]
    norm = built.step(LR)
    loss = place.sum_over_data(torch.stack(losses).mean()) / place.data_size
    return loss.item(), norm.item()


def check(case: Case, place: topology.Topology, expected: Expected) -> State:
    """Everything asked of one engine in one layout; returns its state after MIDDLE updates."""
    micro = BATCH // place.data_size // 2
    exact = case.precision == "fp32"
    straight = build_engine(case.config(), make_model(case), place, micro)
    seen = [update(straight, place, micro, step) for step in range(MIDDLE)]
    middle = state_of(straight)
    pieces = {kind: list(straight.pieces(kind)) for kind in KINDS}
    joined = {kind: straight.join(pieces[kind]) for kind in KINDS}
    planned(case, place, pieces, joined, middle)
    if place.is_main:
        same_bits(joined, middle)
    assert straight.optimizer_step == MIDDLE
    seen += [update(straight, place, micro, step) for step in range(MIDDLE, STEPS)]
    end = state_of(straight)
    rtol = 1e-5 if exact else 2e-3
    torch.testing.assert_close([loss for loss, _ in seen], expected.losses, rtol=rtol, atol=0)
    torch.testing.assert_close([norm for _, norm in seen], expected.norms, rtol=10 * rtol, atol=0)
    if exact:
        close(middle, expected.middle)
        close(end, expected.end)

    resumed = build_engine(case.config(), make_model(case, seed=99), place, micro)
    give(resumed, middle, MIDDLE)
    same_bits(state_of(resumed), middle)
    score(resumed, case, middle)
    again = [update(resumed, place, micro, step) for step in range(MIDDLE, STEPS)]
    assert again == seen[MIDDLE:]
    same_bits(state_of(resumed), end)

    give(resumed, expected.middle, MIDDLE)
    same_bits(state_of(resumed), expected.middle)
    for step in range(MIDDLE, STEPS):
        update(resumed, place, micro, step)
    if exact:
        close(state_of(resumed), expected.end)
    not_a_number(resumed, place, micro)
    return middle


def planned(case: Case, place: topology.Topology, pieces: Pieces, joined: State, state: State) -> None:
    """What a save takes of each rank's memory, copies of its pieces and on rank 0 what is put together, is
    what the plan has; but for where a partition happens to end: a rank has some whole tensors more."""
    copies = [piece.flat for each in pieces.values() for piece in each]
    of_copies = {flat.untyped_storage().data_ptr() for flat in copies}
    new = {
        kind: sum(t.nbytes for t in each.values() if t.untyped_storage().data_ptr() not in of_copies)
        for kind, each in joined.items()
    }
    taken = sum(flat.nbytes for flat in copies) + max(new.values())
    layout = configured(case.config(), place.world_size, case.precision, gpu=False)
    plan = memory.copied(make_recipe(case.config(), VOCAB), layout, place.rank)
    assert abs(taken - plan) < 0.15 * sum(t.nbytes for t in state["param"].values()), (taken, plan)


def score(built: engine.Engine, case: Case, state: State) -> None:
    """Scoring, straight after loading, uses the weights that were loaded."""
    plain = make_model(case)
    plain.load_state_dict(state["param"])
    built.module.eval()
    with torch.no_grad():
        seen, expected = built.forward(whole_batch(7), True), plain(whole_batch(7), True)
    built.module.train()
    rtol = 1e-5 if case.precision == "fp32" else 5e-2
    torch.testing.assert_close(seen.float(), expected, rtol=rtol, atol=0)


def not_a_number(built: engine.Engine, place: topology.Topology, micro: int) -> None:
    """A gradient that overflows changes nothing, and the next update is an ordinary one."""
    before, count = state_of(built), built.optimizer_step
    batch = some_rows(whole_batch(0), 0, micro)
    built.backward(batch, math.inf)
    built.backward(batch, 1.0)
    assert not math.isfinite(built.step(LR).item())
    same_bits(state_of(built), before)
    assert built.optimizer_step == count
    _, norm = update(built, place, micro, 0)
    assert math.isfinite(norm) and built.optimizer_step == count + 1


def on_ranks(cases: list[Case], expected: dict[Case, Expected]) -> list[State]:
    torch.use_deterministic_algorithms(True)
    gradients.REDUCE_BUCKET = 5000
    states, place = [], topology.Topology(tensor_size=0)
    for case in cases:
        if case.tensor != place.tensor_size:
            place = topology.connect(case.tensor, needs_group=True)
        try:
            states.append(check(case, place, expected[case.oracle]))
        except Exception as error:
            raise AssertionError(f"{case} failed") from error
    return states if place.is_main else []


@pytest.mark.parametrize("world_size", CASES)
def test_engines(world_size: int) -> None:
    cases = CASES[world_size]
    expected = {case: expectation(case) for case in dict.fromkeys(case.oracle for case in cases)}
    clip = Case().config().train.clip
    for case, one in expected.items():
        assert case.block or [norm > clip for norm in one.norms] == [True, True, False], one.norms
    saved = ranks.run(world_size, on_ranks, cases, expected)[0]
    # What any layout saves, one plain process goes on from.
    for case, state in zip(cases, saved, strict=True):
        alone = case.oracle
        plain = build_engine(alone.config(), make_model(alone), topology.Topology(), BATCH)
        give(plain, state, MIDDLE)
        same_bits(state_of(plain), state)
        for step in range(MIDDLE, STEPS):
            loss, _ = update(plain, topology.Topology(), BATCH, step)
            assert math.isclose(loss, expected[case.oracle].losses[step], rel_tol=2e-3)
        if case.precision == "fp32":
            close(state_of(plain), expected[case.oracle].end)


# ---- without ranks -------------------------------------------------------------------------------


def test_accumulation_is_one_large_batch() -> None:
    place = topology.Topology()
    ends = []
    for micro in (BATCH, BATCH // 4):
        built = build_engine(Case().config(), make_model(Case()), place, micro)
        seen = [update(built, place, micro, step) for step in range(STEPS)]
        ends.append((seen, state_of(built)))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=0)
    close(ends[0][1], ends[1][1])


def test_the_tensors_are_copies() -> None:
    built = build_engine(Case().config(), make_model(Case()), topology.Topology(), BATCH)
    before = state_of(built)
    kept = copy.deepcopy(before)
    update(built, topology.Topology(), BATCH, 0)
    same_bits(before, kept)


def test_buckets_keep_the_order_and_reach_their_size() -> None:
    tensors = [torch.zeros(n) for n in (3, 1, 5, 2, 2)]
    found = [[len(t) for t in bucket] for bucket in buckets(tensors, 4)]
    assert found == [[3, 1], [5], [2, 2]]
    assert [len(b) for b in buckets(tensors, 100)] == [5]
    assert list(buckets([], 4)) == []


def deepspeed_options(**keys: Any) -> Config:
    config = Case(engine="deepspeed", zero=3, offload="all").config()
    return config.model_copy(update={"deepspeed": keys})


def test_deepspeed_config_says_what_ours_says() -> None:
    made = deepspeed_config(deepspeed_options(), data_size=2, micro=3, pin=True)
    assert made["train_batch_size"] == 12
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 1.12
    zero = made["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_deepspeed_keys_pass_through_unless_ours_decide_them() -> None:
    keys = {
        "zero_optimization": {"overlap_comm": False, "stage": 3, "reduce_bucket_size": "auto"},
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    made = deepspeed_config(deepspeed_options(**keys), 1, 12, False)
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["zero_optimization"]["reduce_bucket_size"] == BUCKET
    assert made["train_batch_size"] == 12
    assert made["wall_clock_breakdown"] is True


def test_contradictions_are_told_all_at_once() -> None:
    keys = {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam"},
        "torch_autocast": True,
        "managed_gradient_accumulation": False,
    }
    with pytest.raises(UserError) as caught:
        deepspeed_config(deepspeed_options(**keys), 1, 12, False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("deepspeed.zero_optimization.stage = 2 contradicts parallel.zero")
