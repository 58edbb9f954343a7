"""Cross-entropy of the word table without ever holding the predicted rows x vocabulary logits.

Rows are taken in chunks. For each chunk the logits, the loss and, when training, the gradients of all
three inputs are computed at once, so nothing of size N x W is kept for the backward pass and no product
is done twice (the gradient-in-forward form of Liger kernels, Hsu et al. 2024, arXiv 2410.10989).
Over a vocabulary split among ranks (Megatron, Shoeybi et al. 2019, arXiv 1909.08053) three small
reductions per chunk are all that changes; they come in as a function, so no rank is known here.

A chunk of logits is many times what a cache holds, so what counts besides the products is how often it
is walked through: torch's softmax does in one pass what exponentials, sums and quotients do in five.

The gradients are scaled in place by the backward pass, which can be run once only. In float16
that would be too late for what has vanished by then, so they are formed with the loss scale in them.

Other people's kernels for the same sum can take its place (`ExternalCrossEntropy`).

Letters: N predicted rows, n of a chunk, D width, W rows of the (local, padded) word table.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.config.geometry import CHUNK_ROWS
from pretrain.errors import UserError

Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]


def whole(tensor: Tensor, operation: str) -> Tensor:
    """Return the reduction over a vocabulary that is not split: nothing to do."""
    return tensor


class ChunkedCrossEntropy(nn.Module):
    """Cross-entropy of ``hidden @ weight.T + bias`` against targets, summed over rows.

    vocab_size: real pieces; the padded rows of the table beyond it take no part in the softmax.
    first_id, reduce: first piece of this rank's part of the table, and the reduction (in place) over
    all parts; the defaults mean the table is whole.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.first_id = 0
        self.reduce: Reduce = whole
        self.scale: Tensor | None = None
        """By what the loss's mean is multiplied before the backward pass, where float16 needs it."""
        self.fused: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
        """What forms a chunk's gradients in one kernel or two, once `fuse` was called."""

    def fuse(self) -> None:
        """Compile what is done with a chunk of 16-bit logits of a whole table: on a GPU they are then walked
        through half as often."""
        self.fused = torch.compile(fused_gradients, dynamic=False)

    def real(self, rows: int) -> int:
        """Return how many of this part's rows of the table are pieces and no padding."""
        return max(0, min(rows, self.vocab_size - self.first_id))

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return, of hidden [N, D], weight [W, D], bias [W] and target [N], (sum of losses, rows predicted
        right).

        Both are scalars, float32 (float64 for float64 inputs); only the first has a gradient. A row is
        right when its target is the argmax: of equal logits, which are common in 16 bits, the first counts.
        In training nobody asks for that: not a number.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # Inside the function the grad mode is off and inputs look alike in training and scoring.
        train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        total, right = _Function.apply(hidden, weight, bias, target, self, dtype, train)
        return total, right


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        table: ChunkedCrossEntropy,
        dtype: torch.dtype,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        h_ND, w_WD = hidden.to(dtype), weight.to(dtype)
        factor = None if table.scale is None else table.scale / len(hidden)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        right = torch.full_like(total, float("nan") if train else 0.0)
        if train:
            grad_h = torch.empty_like(h_ND)
            grad_w = torch.empty_like(w_WD, dtype=exact)
            grad_b = torch.zeros_like(bias, dtype=exact)
        size = CHUNK_ROWS[hidden.device.type]
        for start in range(0, len(h_ND), size):
            rows = slice(start, start + size)
            if not train:
                logits = _logits(h_ND[rows], w_WD, bias, table)
                right += _right(logits, target[rows], table, exact)
                total += _chunk(logits, target[rows], table, exact)[0]
                continue
            fits = table.fused is not None and table.reduce is whole and dtype != exact
            gradients = table.fused if fits else _gradients
            assert gradients
            loss, g_nW, sums_W = gradients(h_ND[rows], w_WD, bias, target[rows], table, factor)
            total += loss
            torch.mm(g_nW, w_WD, out=grad_h[rows])
            grad_b += sums_W
            _add_product(grad_w, g_nW.t(), h_ND[rows], first=start == 0)
            del g_nW  # or the next chunk's logits would lie beside these
        if train:
            # Each rank has the part of the hidden gradient that its pieces give.
            grad_h = table.reduce(grad_h, "sum")
            ctx.grads = grad_h.to(hidden.dtype), grad_w.to(weight.dtype), grad_b.to(bias.dtype)
            ctx.factor = factor
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not saved tensors: those would be kept until this returns, and so be copied by who adds them up.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the cross-entropy's gradients are gone: it can be differentiated once")
        if ctx.factor is not None:
            grad_total = grad_total / ctx.factor
        return *(grad.mul_(grad_total) for grad in grads), None, None, None, None


def _gradients(
    h_nD: Tensor,
    w_WD: Tensor,
    b_W: Tensor,
    target: Tensor,
    table: ChunkedCrossEntropy,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum of a few rows, their logits' gradient [n, W] in the rows' type, and its sum over rows."""
    logits = _logits(h_nD, w_WD, b_W, table)
    loss, residual = _chunk(logits, target, table, torch.promote_types(h_nD.dtype, torch.float32))
    del logits
    if factor is not None:
        residual *= factor
    return loss, residual.to(h_nD.dtype), residual.sum(0)


def fused_gradients(
    h_nD: Tensor,
    w_WD: Tensor,
    b_W: Tensor,
    target: Tensor,
    table: ChunkedCrossEntropy,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of a whole table in 16 bits, in a form that compilers make few kernels of: no scatter,
    and nothing in place."""
    scores = _logits(h_nD, w_WD, b_W, table).float()
    mass = scores.logsumexp(-1, keepdim=True)
    aimed = scores.gather(-1, target.unsqueeze(-1))
    pieces = torch.arange(scores.shape[1], device=scores.device)
    residual = (scores - mass).exp() - (pieces == target.unsqueeze(-1)).float()
    if factor is not None:
        residual = residual * factor
    return (mass - aimed).sum(), residual.to(h_nD.dtype), residual.sum(0)


def _add_product(sum_WD: Tensor, a_Wn: Tensor, b_nD: Tensor, first: bool) -> None:
    """Adds a product to a sum, which the first one starts."""
    if a_Wn.dtype == sum_WD.dtype:
        torch.addmm(sum_WD, a_Wn, b_nD, beta=0 if first else 1, out=sum_WD)
    elif first:
        sum_WD.copy_(a_Wn @ b_nD)
    else:
        sum_WD += a_Wn @ b_nD


def _logits(h_nD: Tensor, w_WD: Tensor, b_W: Tensor, table: ChunkedCrossEntropy) -> Tensor:
    """Logits [n, W] of a few rows, the padding's as low as can be."""
    logits = torch.addmm(b_W.to(h_nD.dtype), h_nD, w_WD.t())
    logits[:, table.real(len(w_WD)) :] = torch.finfo(logits.dtype).min
    return logits


def _right(logits: Tensor, target: Tensor, table: ChunkedCrossEntropy, exact: torch.dtype) -> Tensor:
    """How many rows have their target for argmax."""
    best = logits.argmax(-1)
    if table.reduce is not whole:
        top = logits.amax(-1).to(exact)
        mine = top == table.reduce(top.clone(), "max")
        last = torch.finfo(exact).max
        best = -table.reduce((-(best + table.first_id)).to(exact).masked_fill(~mine, -last), "max")
    return (best == target).sum().to(exact)


def _chunk(
    logits: Tensor, target: Tensor, table: ChunkedCrossEntropy, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss sum, and softmax minus one-hot [n, W], of a few rows' logits, which may be overwritten."""
    real = table.real(logits.shape[1])
    top = logits.amax(-1).to(exact)
    local = target - table.first_id
    here = (local >= 0) & (local < real)
    local = local.clamp(0, max(real - 1, 0)).unsqueeze(-1)
    aimed = logits.gather(-1, local).squeeze(-1).to(exact).masked_fill(~here, 0.0)
    aimed = table.reduce(aimed, "sum")
    if logits.dtype == exact:
        odds = torch.softmax(logits, -1, out=logits)
    else:
        odds = torch.softmax(logits, -1, dtype=exact)
    # The largest of them is exp(0) / mass.
    part = top - odds.amax(-1).log()
    top = table.reduce(top, "max")
    mass = table.reduce((part - top).exp(), "sum")
    if table.reduce is not whole:
        odds *= ((part - top).exp() / mass).unsqueeze(-1)
    residual = odds.scatter_add_(-1, local, -here.to(exact).unsqueeze(-1))
    return (mass.log() + top - aimed).sum(), residual


# ---- other people's kernels ----------------------------------------------------------------------


def by_torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Sum of losses by torch's chunked kernel, from 2.13. Autocast does not reach its products, whose type,
    and the sum's, is that of `hidden`: what comes here in bf16 is made as wide as the table."""
    return F.linear_cross_entropy(
        hidden.to(weight.dtype),
        weight,
        target,
        linear_bias=bias,
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(),
    )


def by_liger(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Sum of losses by liger-kernel's Triton kernel (Hsu et al. 2024)."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, target, bias, None, -100, 0.0, 0.0, "sum"
    )
    return found[0] if isinstance(found, tuple) else found


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "torch": by_torch,
    "liger": by_liger,
}
"""Value of `train.cross_entropy` -> hidden [N, D], weight [W, D], bias [W], target [N] -> sum of losses."""


class ExternalCrossEntropy(ChunkedCrossEntropy):
    """The same with somebody else's kernel in training; scoring, which none of them does, stays ours.

    UserError if this machine has not got the kernel.
    """

    def __init__(self, vocab_size: int, kind: str, device: torch.device) -> None:
        super().__init__(vocab_size)
        if problem := _missing(kind, device):
            raise UserError(f"train.cross_entropy = {kind}: {problem}, or take own")
        self.kernel = KERNELS[kind]

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as ours, but in training nobody counts which rows are right: not a number."""
        if not torch.is_grad_enabled():
            return super().forward(hidden, weight, bias, target)
        # They know of no padding: these pieces get no chance and their rows no gradient.
        padding = torch.arange(len(bias), device=bias.device) >= self.vocab_size
        total = self.kernel(hidden, weight, bias.masked_fill(padding, torch.finfo(bias.dtype).min), target)
        return total, torch.full_like(total, float("nan"))


def _missing(kind: str, device: torch.device) -> str | None:
    """What is to be done to have the kernel."""
    if kind == "torch" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; install 2.13"
    if kind == "liger" and device.type != "cuda":
        return "its kernel needs a GPU; run on one"
    if kind == "liger" and find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install '.[liger]'"
    return None
