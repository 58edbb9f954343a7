"""StableAdamW and Muon as their papers write them, one tensor at a time: what ours are held against."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.config import OptimizerOptions
from pretrain.model.late_mask import LateMaskModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def polar(matrix: Tensor) -> Tensor:
    """Five steps of the quintic, on the singular values themselves, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        a, b, c = COEFFICIENTS
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def rows_of_each(name: str, weight: Tensor, heads: int) -> Iterator[list[int]]:
    """The rows of each matrix that a weight holds: of an attention head q, k and v follow each other."""
    every, kind = list(range(len(weight))), name.split(".")[-2]
    if kind in ("qkv", "kv"):
        number = len(kind)
        size = len(every) // (heads * number)
        for part in range(number):
            yield [row for row in every if row // size % number == part]
    elif kind == "gate_up":
        yield every[: len(every) // 2]
        yield every[len(every) // 2 :]
    else:
        yield every


class Reference:
    """One of the kinds over a whole model; `state` is moment -> parameter's name -> tensor."""

    def __init__(self, model: LateMaskModel, options: OptimizerOptions) -> None:
        self.options, self.heads = options, model.m.num_heads
        self.named = dict(model.named_parameters())
        self.matrices = {
            name
            for name, p in self.named.items()
            if options.kind == "muon" and "layers." in name and p.dim() > 1
        }
        zeros = {name: torch.zeros_like(p) for name, p in self.named.items()}
        rest = {name: torch.zeros_like(p) for name, p in self.named.items() if name not in self.matrices}
        self.state = {"exp_avg": zeros, "exp_avg_sq": rest}
        self.step_number = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.step_number += 1
        for name, parameter in self.named.items():
            (self._muon if name in self.matrices else self._adam)(name, parameter, lr)

    def _muon(self, name: str, weight: Tensor, lr: float) -> None:
        lr *= self.options.muon_lr_scale
        momentum = self.state["exp_avg"][name]
        momentum.mul_(0.95).add_(0.05 * weight.grad)
        ahead = 0.95 * momentum + 0.05 * weight.grad
        weight.mul_(1 - lr * self.options.weight_decay)
        for rows in rows_of_each(name, weight, self.heads):
            scale = 0.2 * max(len(rows), weight.shape[1]) ** 0.5
            weight[rows] -= (lr * scale * polar(ahead[rows])).to(weight.dtype)

    def _adam(self, name: str, parameter: Tensor, lr: float) -> None:
        t, (beta_1, beta_2), eps = self.step_number, self.options.betas, self.options.eps
        first, second = (self.state[kind][name] for kind in ("exp_avg", "exp_avg_sq"))
        first.mul_(beta_1).add_((1 - beta_1) * parameter.grad)
        second.mul_(beta_2).add_((1 - beta_2) * parameter.grad**2)
        v, u = first / (1 - beta_1**t), second / (1 - beta_2**t)
        if self.options.kind == "stable-adamw":
            lr = lr / max(1.0, (parameter.grad**2 / u.clamp(min=eps**2)).mean().sqrt().item())
        decay = self.options.weight_decay if parameter.dim() > 1 else 0.0
        parameter.sub_(lr * decay * parameter + lr * v / (u.sqrt() + eps))
