"""Muon's arithmetic: momentum whose singular values are all about 1.

Five steps of a quintic Newton-Schulz iteration bring the singular values of a matrix of norm 1 to between
0.7 and 1.2 (Jordan 2024, kellerjordan.github.io/posts/muon). The result times 0.2 sqrt(larger side) has the
root mean square of AdamW's updates (Liu et al. 2025, arXiv 2502.16982), so that learning rates and decay mean
the same for both.

A fused projection is several matrices: queries, keys and values, and the two halves of a GeGLU, are
orthogonalised each for itself.

Letters: K matrices of one shape, M rows, N columns.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.account.flops import NEWTON_SCHULZ_STEPS
from pretrain.model.late_mask import LateMaskModel

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: the author's, whose slope at 0 is as steep as it can be."""
RMS = 0.2
"""Root mean square of AdamW's updates in training."""
FUSED = {"qkv": 3, "kv": 2, "gate_up": 2}
"""Last part of a module's name -> how many matrices its weight is."""


def matrices(model: LateMaskModel) -> dict[str, nn.Parameter]:
    """Return the weights of the layers' products by name; table, positions and head are none of them."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and name.startswith(("layers.", "decoder.layers."))
    }


def take_apart(name: str, weight: Tensor, head_size: int) -> Tensor:
    """Return the matrices [K, M, N] of a whole weight [K * M, N]."""
    K, rows = _fusion(name, weight, head_size)
    return weight.unflatten(0, (-1, K, rows)).transpose(0, 1).flatten(1, 2)


def put_together(name: str, parts_KMN: Tensor, weight: Tensor, head_size: int) -> Tensor:
    """Return the parts as one matrix of the weight's shape: the inverse of `take_apart`."""
    _, rows = _fusion(name, weight, head_size)
    return parts_KMN.unflatten(1, (-1, rows)).transpose(0, 1).flatten(0, 2)


def _fusion(name: str, weight: Tensor, head_size: int) -> tuple[int, int]:
    """(K, rows of each before those of the next): attention is laid out head by head, GeGLU in two halves."""
    module = name.split(".")[-2]
    K = FUSED.get(module, 1)
    return K, head_size if module in ("qkv", "kv") else len(weight) // K


def newton_schulz(x_KMN: Tensor) -> Tensor:
    """Return the matrices with singular values of about 1, in their own precision; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    if x_KMN.shape[1] > x_KMN.shape[2]:  # the smaller of the two products with its transpose
        return newton_schulz(x_KMN.mT).mT
    x = x_KMN / x_KMN.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize(weights: Mapping[str, Tensor], head_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return updates, of root mean square 0.2 and of type `dtype`, for whole matrices by name.

    Those of one shape go through the iteration together: a single one is too small for a GPU.
    """
    alike: dict[torch.Size, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        alike[take_apart(name, weight, head_size).shape[1:]].append(name)
    found = {}
    for shape, names in alike.items():
        parts = [take_apart(name, weights[name], head_size).to(dtype) for name in names]
        done = newton_schulz(torch.cat(parts)) * (RMS * max(shape) ** 0.5)
        for name, part in zip(names, done.split([len(part) for part in parts]), strict=True):
            found[name] = put_together(name, part, weights[name], head_size)
    return found
