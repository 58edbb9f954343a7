"""Tensor parallelism against the undivided model, on gloo ranks: losses, every gradient, weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.config import Config
from pretrain.model.late_mask import Batch, LateMaskModel, init_weights
from pretrain.parallel import tensor_parallel, topology
from pretrain.parallel.optimizer import adamw
from tests.support import ranks
from tests.support.methods import BLOCKS, METHODS, small

VOCAB, MASK = 42, 41
# The word table has 64 rows: with four ranks the last shard holds padding only.
PADDED = 64
CASES = [(method, block) for method in METHODS for block in BLOCKS]
CASES += [("3ml-query", "local"), ("one-way", "local")]


def make_model(config: Config, recompute: bool = False) -> LateMaskModel:
    """Float64, for tight tolerances, and random biases and gains, so that none can hide."""
    model = LateMaskModel(config.model, VOCAB, MASK, recompute)
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.double()


def make_batch(seed: int, rows: int = 3, length: int = 12, predicted: int = 6) -> Batch:
    """Random pieces in permuted order; M of the P predicted rows are [MASK]. Every second batch keeps its
    documents apart."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK, (rows, length), generator=generator)
    ids[:, -4:] = MASK
    positions = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
    targets = torch.randint(VOCAB, (rows, predicted), generator=generator)
    documents = (positions >= 5).long() if seed % 2 else None
    return Batch(ids, positions, targets, 4, documents, 2)


# ---- the table -----------------------------------------------------------------------------------

NAMES = ["layers.0.ffn.gate_up.weight", "tok.weight", "head.bias", "layers.1.attention.out.weight"]


@given(st.sampled_from([*NAMES, "head.dense.bias"]), st.sampled_from([1, 2, 4]))
def test_merge_is_the_inverse_of_split(name: str, size: int) -> None:
    whole = torch.arange(16.0 * 8).view(16, 8) if "weight" in name else torch.arange(16.0)
    shards = [tensor_parallel.split(name, whole, size, rank) for rank in range(size)]
    assert torch.equal(tensor_parallel.merge(name, shards), whole)
    share = 1 if name == "head.dense.bias" else size
    assert all(shard.numel() * share == whole.numel() for shard in shards)


def test_each_half_of_the_gated_projection_is_divided() -> None:
    whole = torch.arange(8.0).view(8, 1)
    part = tensor_parallel.split("ffn.gate_up.weight", whole, 2, 1)
    assert part.flatten().tolist() == [2, 3, 6, 7]


def test_every_matrix_product_of_a_layer_is_divided() -> None:
    """What is replicated is known by name: a new module must be entered in the table or here."""
    replicated = set()
    for method, block in CASES:
        model = LateMaskModel(small(method, block).model, VOCAB, MASK)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and tensor_parallel.cut(name) is None:
                replicated.add(name)
    assert replicated == {"head.dense.weight", "positions.weight", "decoder.positions.weight"}


def test_one_rank_is_left_alone() -> None:
    model = LateMaskModel(small().model, VOCAB, MASK)
    before = str(model)
    tensor_parallel.shard(model, topology.Topology())
    assert str(model) == before


# ---- on ranks ------------------------------------------------------------------------------------


def gradients(model: LateMaskModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(whole: LateMaskModel, method: str, block: str, place: topology.Topology) -> None:
    """The model divided must do what the whole one does, for five updates."""
    config = small(method, block, model={"vocab_multiple": PADDED})
    divided = make_model(config)
    tensor_parallel.shard(divided, place)
    optimizers = [adamw(m.parameters(), config.optimizer) for m in (whole, divided)]
    for step in range(5):
        batch = make_batch(step)
        losses = []
        for model, optimizer in zip((whole, divided), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model(batch))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
        parts, expected = gradients(divided), gradients(whole)
        assert parts.keys() == expected.keys()
        for name, part in parts.items():
            full = tensor_parallel.gather(name, part, place)
            torch.testing.assert_close(full, expected[name], rtol=1e-7, atol=1e-10)
        norm = tensor_parallel.square_norm(parts.items(), place).sqrt()
        reference = torch.nn.utils.get_total_norm(list(expected.values()))
        torch.testing.assert_close(norm, reference, rtol=1e-9, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    for name, part in divided.named_parameters():
        full = tensor_parallel.gather(name, part.data, place)
        torch.testing.assert_close(full, whole.get_parameter(name).data, rtol=1e-7, atol=1e-9)


def replicas_are_equal(place: topology.Topology) -> None:
    """Replicated gradients must be the same bits, or the ranks drift apart silently."""
    model = make_model(small("3ml-cross", "post", model={"vocab_multiple": PADDED}))
    tensor_parallel.shard(model, place)
    model(make_batch(0)).backward()
    for name, gradient in gradients(model).items():
        if tensor_parallel.cut(name) is None:
            others = [torch.empty_like(gradient) for _ in range(place.tensor_size)]
            torch.distributed.all_gather(others, gradient, group=place.tensor_group)
            assert all(torch.equal(other, gradient) for other in others), name


def recompute_and_autocast(place: topology.Topology) -> None:
    """What changes how a layer is run: recomputation and bf16 (more sums are rounded)."""
    config = small("3ml-self", "modern", model={"vocab_multiple": PADDED})
    exact, whole, divided = (make_model(config, recompute=True) for _ in range(3))
    exact(make_batch(0)).backward()
    tensor_parallel.shard(divided, place)
    for model in (whole.float(), divided.float()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(make_batch(0))
        loss.backward()
    for name, part in gradients(divided).items():
        seen = tensor_parallel.gather(name, part, place)
        truth, other = gradients(exact)[name], gradients(whole)[name]
        error, allowed = (((g - truth).norm() / truth.norm()).item() for g in (seen, other))
        assert error < 4 * allowed + 1e-3, f"{name}: {error}, whole {allowed}"


def like_megatron(place: topology.Topology) -> None:
    """The divided loss and its gradients against megatron-core's vocabulary-parallel one."""
    from megatron.core import tensor_parallel as megatron

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator, requires_grad=True)
    table = torch.randn(VOCAB, 16, generator=generator)
    targets = torch.randint(VOCAB, (9,), generator=generator)
    part = table.chunk(place.tensor_size)[place.tensor_rank].clone().requires_grad_()
    shared = megatron.copy_to_tensor_model_parallel_region(hidden)
    megatron.vocab_parallel_cross_entropy(shared @ part.t(), targets).sum().backward()
    expected = hidden.grad, part.grad
    hidden.grad = part.grad = None
    ours = make_model(small(model={"vocab_multiple": 8})).cross_entropy
    ours.first_id = place.tensor_rank * len(part)
    ours.reduce = tensor_parallel._reduction(place.tensor_group)
    ours(hidden, part, torch.zeros(len(part)), targets)[0].backward()
    torch.testing.assert_close((hidden.grad, part.grad), expected, rtol=1e-5, atol=1e-6)


def on_ranks(size: int, cases: list[tuple[str, str]]) -> None:
    place = topology.connect(tensor=size)
    for method, block in cases:
        config = small(method, block, model={"vocab_multiple": PADDED})
        compare(make_model(config), method, block, place)
    replicas_are_equal(place)
    recompute_and_autocast(place)
    like_megatron(place)
    place.close()


@pytest.mark.parametrize("size", [2, 4])
def test_divided_equals_whole(size: int) -> None:
    ranks.run(size, on_ranks, size, CASES if size == 2 else CASES[::4])
