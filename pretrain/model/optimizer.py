"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with RoBERTa's decay groups.

Matrices and embedding tables decay; biases, norm gains and single vectors do not.
"""

import torch
from torch import nn

from pretrain.config import OptimizerOptions


def build_optimizer(model: nn.Module, optimizer: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over all parameters of `model` in two groups (decayed, not decayed), fused kernel.

    The learning rate is set anew before every step by whoever steps.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
