"""Cross-entropy of the word table without ever holding the predicted rows x vocabulary logits.

Rows are taken in chunks. For each chunk the logits, the loss and, when training, the gradients of all
three inputs are computed at once, so nothing of size N x W is kept for the backward pass and no product
is done twice (the gradient-in-forward form of Liger kernels, Hsu et al. 2024, arXiv 2410.10989).
Over a vocabulary split among ranks (Megatron, Shoeybi et al. 2019, arXiv 1909.08053) three small
reductions per chunk are all that changes; they come in as a function, so no rank is known here.

Letters: N predicted rows, D width, W rows of the (local, padded) word table.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]

# Large enough for full-speed matrix products, small enough that a chunk of logits is little memory.
CHUNK_ROWS = 512


def whole(tensor: Tensor, operation: str) -> Tensor:
    """The reduction over a vocabulary that is not split: nothing to do."""
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

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, D], weight [W, D], bias [W], target [N] -> (sum of losses, rows predicted right).

        Both are scalars, float32 (float64 for float64 inputs); only the first has a gradient. A row is
        right when no piece has a larger logit than its target.
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
        total = torch.zeros((), dtype=exact, device=hidden.device)
        right = torch.zeros((), dtype=exact, device=hidden.device)
        if train:
            grad_h = torch.empty_like(h_ND)
            grad_w = torch.zeros_like(w_WD, dtype=exact)
            grad_b = torch.zeros_like(bias, dtype=exact)
        for start in range(0, len(h_ND), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            loss, hit, residual = _chunk(h_ND[rows], w_WD, bias, target[rows], table, exact)
            total += loss
            right += hit
            if train:
                g_nW = residual.to(dtype)
                grad_h[rows] = g_nW @ w_WD
                grad_b += residual.sum(0)
                if dtype == exact:
                    torch.addmm(grad_w, g_nW.t(), h_ND[rows], out=grad_w)
                else:
                    grad_w += g_nW.t() @ h_ND[rows]
        if train:
            # Each rank has the part of the hidden gradient that its pieces give.
            grad_h = table.reduce(grad_h, "sum")
            ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w.to(weight.dtype), grad_b.to(bias.dtype))
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad * grad_total for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _chunk(
    h_nD: Tensor,
    w_WD: Tensor,
    b_W: Tensor,
    target: Tensor,
    table: ChunkedCrossEntropy,
    exact: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, number right, and softmax minus one-hot [n, W] of a few rows."""
    logits = torch.addmm(b_W.to(h_nD.dtype), h_nD, w_WD.t()).to(exact)
    real = max(0, min(len(w_WD), table.vocab_size - table.first_id))
    logits[:, real:] = float("-inf")
    top = table.reduce(logits.amax(-1), "max")
    local = target - table.first_id
    here = (local >= 0) & (local < real)
    local = local.clamp(0, max(real - 1, 0)).unsqueeze(-1)
    aimed = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0.0)
    aimed = table.reduce(aimed, "sum")
    odds = logits.sub_(top.unsqueeze(-1)).exp_()
    mass = table.reduce(odds.sum(-1), "sum")
    loss = (mass.log() + top - aimed).sum()
    residual = odds.div_(mass.unsqueeze(-1))
    residual.scatter_add_(-1, local, -here.to(exact).unsqueeze(-1))
    return loss, (aimed >= top).sum().to(exact), residual
