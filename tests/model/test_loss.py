"""The chunked cross-entropy against torch's own on full logits."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.errors import UserError
from pretrain.model import loss
from pretrain.model.loss import ChunkedCrossEntropy, ExternalCrossEntropy
from tests.support.methods import small

N, D, W, REAL = 37, 12, 48, 41


@pytest.fixture(params=[8, 37, 512], autouse=True)
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several chunks with an uneven last one, exactly one, and one that is not full."""
    monkeypatch.setitem(loss.CHUNK_ROWS, "cpu", request.param)
    return request.param


def inputs(dtype: torch.dtype, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [W, D], bias [W], target [N]; the first targets are the likeliest pieces."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, D), (W, D), (W,))
    hidden, weight, bias = (torch.empty(s, dtype=dtype).normal_(generator=generator) for s in shapes)
    target = torch.randint(REAL, (rows,), generator=generator)
    best = (hidden @ weight.T + bias)[:, :REAL].argmax(-1)
    target[: rows // 3] = best[: rows // 3]
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def full(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T + bias)[:, :REAL]
    return F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(dtype)
    total, right = ChunkedCrossEntropy(REAL)(*tensors)
    expected, expected_right = full(*tensors)
    assert total.dtype == dtype
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    assert right.isnan() and not right.requires_grad  # nobody asks for it in training
    with torch.no_grad():
        scored, right = ChunkedCrossEntropy(REAL)(*tensors)
    assert torch.equal(scored, total) and right.item() == expected_right.item() >= N // 3
    # A factor on the loss (accumulation, loss scaling) must reach the gradients.
    ours = torch.autograd.grad(3.0 * total, tensors[:3])
    theirs = torch.autograd.grad(3.0 * expected, tensors[:3])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_the_slopes(which: int) -> None:
    """Central differences along random directions (gradcheck would differentiate twice)."""
    *tensors, target = inputs(torch.float64, rows=11)
    table = ChunkedCrossEntropy(REAL)
    (gradient,) = torch.autograd.grad(table(*tensors, target)[0], tensors[which])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.empty_like(gradient).normal_(generator=generator) * 1e-5
        with torch.no_grad():
            moved = [[*tensors], [*tensors]]
            moved[0][which], moved[1][which] = tensors[which] + direction, tensors[which] - direction
            above, below = (table(*some, target)[0] for some in moved)
        slope = (above - below) / 2
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-12)


def test_a_second_backward_pass_says_why_not() -> None:
    *tensors, target = inputs(torch.float64)
    total, _ = ChunkedCrossEntropy(REAL)(*tensors, target)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it can be differentiated once"):
        total.backward()


def test_padded_rows_take_no_part() -> None:
    hidden, weight, bias, target = inputs(torch.float64)
    table = ChunkedCrossEntropy(REAL)
    with torch.no_grad():
        before, right = table(hidden, weight, bias, target)
        weight[REAL:] = 50.0
        bias[REAL:] = 50.0
        right_after = table(hidden, weight, bias, target)[1]
    after, _ = table(hidden, weight, bias, target)
    assert torch.equal(before, after) and torch.equal(right, right_after)
    grads = torch.autograd.grad(after, (weight, bias))
    assert all(not gradient[REAL:].any() for gradient in grads)


def test_no_padding_at_all() -> None:
    hidden, weight, bias, target = inputs(torch.float64)
    total, _ = ChunkedCrossEntropy(W)(hidden, weight, bias, target)
    expected = F.cross_entropy(hidden @ weight.T + bias, target, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, bias, target = inputs(torch.float32)
    big = (hidden.detach() * 1e4).requires_grad_()
    total, _ = ChunkedCrossEntropy(REAL)(big, weight, bias, target)
    assert total.item() == pytest.approx(full(big, weight, bias, target)[0].item(), rel=1e-5)
    assert torch.autograd.grad(total, big)[0].isfinite().all()


def test_of_equal_logits_only_the_first_is_the_answer() -> None:
    """All logits equal: a target is right where argmax names it, not wherever nothing is larger."""
    zeros = torch.zeros(N, D), torch.zeros(W, D), torch.zeros(W)
    total, right = ChunkedCrossEntropy(REAL)(*zeros, torch.arange(N))
    assert right.item() == 1
    assert total.item() == pytest.approx(N * torch.log(torch.tensor(float(REAL))).item(), rel=1e-6)


def on_two_ranks(act: Any) -> list[Any]:
    """What ``act(me, reduce)`` returns for two ranks, their reductions played by hand in two threads."""
    barrier, posted = Barrier(2), [torch.empty(0)] * 2

    def rank(me: int) -> Any:
        def reduce(tensor: Tensor, operation: str) -> Tensor:
            posted[me] = tensor.clone()
            barrier.wait()
            both = torch.stack(posted)
            barrier.wait()
            return tensor.copy_(both.amax(0) if operation == "max" else both.sum(0))

        return act(me, reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def half(me: int, reduce: Any, pieces: int) -> tuple[ChunkedCrossEntropy, slice]:
    """Rank `me`'s half of a vocabulary of so many pieces, and its rows of the table."""
    table = ChunkedCrossEntropy(pieces)
    table.first_id, table.reduce = me * W // 2, reduce
    return table, slice(me * W // 2, (me + 1) * W // 2)


def test_parts_of_a_split_vocabulary_add_up() -> None:
    tensors = inputs(torch.float64)
    hidden, weight, bias, target = (t.detach() for t in tensors)
    total, right = full(*tensors)
    expected = torch.autograd.grad(total, tensors[:3])

    def act(me: int, reduce: Any) -> Any:
        table, rows = half(me, reduce, REAL)
        parts = [t.clone().requires_grad_() for t in (hidden, weight[rows], bias[rows])]
        loss_sum, _ = table(*parts, target)
        hits = table(*(part.detach() for part in parts), target)[1]
        return loss_sum.detach(), hits, torch.autograd.grad(loss_sum, parts)

    found = on_two_ranks(act)
    for loss_sum, hits, (grad_hidden, _, _) in found:
        assert loss_sum.item() == pytest.approx(total.item(), rel=1e-12)
        assert hits.item() == right.item()
        torch.testing.assert_close(grad_hidden, expected[0], rtol=1e-11, atol=1e-11)
    for k in (1, 2):
        joined = torch.cat([grads[k] for _, _, grads in found])
        torch.testing.assert_close(joined, expected[k], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pieces", [REAL, W // 2 - 3])
def test_ties_in_bf16_are_no_right_answers(pieces: int) -> None:
    """As many rows are right as argmax of the same logits says, on one rank and over a split vocabulary,
    of which a part may be all padding."""
    generator = torch.Generator().manual_seed(3)
    rows = 600
    hidden = torch.randint(-2, 3, (rows, D), generator=generator).bfloat16()  # whole numbers: many ties
    weight = torch.randint(-1, 2, (W, D), generator=generator).bfloat16()
    bias = torch.zeros(W, dtype=torch.bfloat16)
    logits = (hidden @ weight.T)[:, :pieces]
    target = logits.shape[1] - 1 - logits.flip(1).argmax(-1)  # the last of equal ones
    target[: rows // 3] = logits[: rows // 3].argmax(-1)
    right = int((logits.argmax(-1) == target).sum())
    assert rows // 3 < right < 0.9 * rows
    assert ChunkedCrossEntropy(pieces)(hidden, weight, bias, target)[1] == right

    def act(me: int, reduce: Any) -> Tensor:
        table, part = half(me, reduce, pieces)
        return table(hidden, weight[part], bias[part], target)[1]

    assert on_two_ranks(act) == [right, right]


def test_bf16_autocast_is_near() -> None:
    """Products in bf16, sums in float32, gradients back in the dtype of the parameters."""
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = ChunkedCrossEntropy(REAL)(*tensors)
    assert total.dtype == torch.float32
    expected, _ = full(*tensors)
    assert total.item() == pytest.approx(expected.item(), rel=1e-2)
    ours = torch.autograd.grad(total, tensors[:3])
    theirs = torch.autograd.grad(expected, tensors[:3])
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 2e-2 * other.norm()
        assert not torch.equal(one, other)


@pytest.mark.parametrize("factor", [None, 1024.0], ids=["plain", "scaled"])
def test_what_is_fused_gives_the_same(factor: float | None) -> None:
    """As torch.compile gets it, here uncompiled; the loss scale stands in the gradients' 16 bits."""
    found = []
    for fuses in (False, True):
        head, tensors = ChunkedCrossEntropy(REAL), inputs(torch.float32)
        head.scale = None if factor is None else torch.tensor(factor)
        if fuses:
            head.fuse()
        with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16):
            total, _ = head(*tensors)
        found.append((total, *torch.autograd.grad(total, tensors[:3])))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_form_is_one_graph(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = (tensor.detach() for tensor in inputs(torch.float32))
    head = ChunkedCrossEntropy(REAL)
    inputs_16 = hidden.to(dtype), weight.to(dtype), bias, target
    told = torch._dynamo.explain(loss.fused_gradients)(*inputs_16, head, torch.tensor(2.0))
    assert (told.graph_count, told.graph_break_count) == (1, 0)


class _Operations(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        self.products += "mm" in func.__name__
        return out


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, chunk = 64, 8
    monkeypatch.setitem(loss.CHUNK_ROWS, "cpu", chunk)
    hidden, weight, bias, target = inputs(torch.float32, rows)
    with _Operations() as operations:
        ChunkedCrossEntropy(REAL)(hidden, weight, bias, target)[0].backward()
    assert operations.largest == max(chunk * W, rows * D, W * D) < rows * W
    with _Operations() as operations:
        full(hidden, weight, bias, target)[0].backward()
    assert operations.largest >= rows * W  # the measure sees what it should see


def test_scoring_computes_no_gradient(chunk_rows: int) -> None:
    """One matrix product a chunk under no_grad, three in training."""
    hidden, weight, bias, target = inputs(torch.float32)
    chunks = -(-N // chunk_rows)
    with torch.no_grad(), _Operations() as scoring:
        total, _ = ChunkedCrossEntropy(REAL)(hidden, weight, bias, target)
    with _Operations() as training:
        ChunkedCrossEntropy(REAL)(hidden, weight, bias, target)
    assert scoring.products == chunks
    assert training.products == 3 * chunks
    assert total.item() == pytest.approx(full(hidden, weight, bias, target)[0].item(), rel=1e-5)


# ---- other people's kernels ----------------------------------------------------------------------

CPU = torch.device("cpu")
has_stock = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")


@has_stock
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_torchs_kernel_gives_the_same(dtype: torch.dtype, tolerance: float) -> None:
    """Loss and gradients, those of weight and bias and of padding among them; and the same scores."""
    tensors = inputs(dtype)
    ours, theirs = ChunkedCrossEntropy(REAL), ExternalCrossEntropy(REAL, "torch", CPU)
    (total, _), (their_total, nobody_counted) = ours(*tensors), theirs(*tensors)
    assert their_total.item() == pytest.approx(total.item(), rel=tolerance)
    assert nobody_counted.isnan()
    expected = torch.autograd.grad(3.0 * total, tensors[:3])
    found = torch.autograd.grad(3.0 * their_total, tensors[:3])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
    assert not found[1][REAL:].any() and not found[2][REAL:].any()
    with torch.no_grad():
        assert [x.item() for x in theirs(*tensors)] == [x.item() for x in ours(*tensors)]


@has_stock
def test_torchs_kernel_under_autocast_is_no_worse_than_ours() -> None:
    """The layers before it give bf16 there."""
    hidden, *others = inputs(torch.float32)
    tensors = [hidden.detach().bfloat16().float().requires_grad_(), *others]
    expected, _ = full(*tensors)
    slopes = torch.autograd.grad(expected, tensors[:3])
    errors = []
    for table in (ChunkedCrossEntropy(REAL), ExternalCrossEntropy(REAL, "torch", CPU)):
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = table(tensors[0].bfloat16(), *tensors[1:])
        assert total.dtype == torch.float32
        found = torch.autograd.grad(total, tensors[:3])
        errors.append(sum((a - b).norm() for a, b in zip(found, slopes, strict=True)))
    assert errors[1] <= errors[0]


def test_a_kernel_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="liger: its kernel needs a GPU; run on one, or take own"):
        ExternalCrossEntropy(REAL, "liger", CPU)
    monkeypatch.setattr(loss, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed; pip install"):
        ExternalCrossEntropy(REAL, "liger", torch.device("cuda"))
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(UserError, match="has no linear_cross_entropy; install 2.13, or take own"):
        ExternalCrossEntropy(REAL, "torch", CPU)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel": {"tensor": 2}}, "wants the whole vocabulary on a rank"),
        ({"train": {"precision": "fp16"}}, "forms gradients before the loss is scaled"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(keys: dict[str, Any], said: str) -> None:
    keys = {**keys, "train": {"cross_entropy": "torch", **keys.get("train", {})}}
    with pytest.raises(UserError, match=said):
        small("3ml-self", **keys)
