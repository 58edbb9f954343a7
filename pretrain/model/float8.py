"""The layers' matrix products in float8, by torchao: off unless asked for, and never needed.

Each input, weight and gradient is rounded as a whole with a scale of its own at every use (Micikevicius et
al. 2022, arXiv 2209.05433): e4m3 forwards, e5m2 for gradients. Parameters stay float32 under their own names,
so optimizer, checkpoints and exports know nothing of it; the embeddings and the head are left as they are.

The kernels take widths that are multiples of 16 only. Other products stay in bf16; the number of
rows, which the mask decides, is padded.
"""

from importlib.util import find_spec

import torch
from torch import nn

from pretrain.errors import UserError
from pretrain.model.late_mask import LateMaskModel

MULTIPLE = 16
CAPABILITY = (8, 9)
"""Of the first GPUs with products in float8 (Ada, Hopper)."""


def convert(model: LateMaskModel, device: torch.device) -> None:
    """Swaps the layers' products in place; UserError if this machine cannot form them."""
    if problem := _missing(device):
        raise UserError(f"train.float8 = true: {problem}, or leave it out")
    swap(model)


def swap(model: LateMaskModel, emulate: bool = False) -> None:
    """Do the same without a look at the machine; to emulate is to round only, which works anywhere."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    how = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for layer in model.all_layers():
        convert_to_float8_training(layer, config=how, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not any(size % MULTIPLE for size in module.weight.shape)


def _missing(device: torch.device) -> str | None:
    """What is to be done to have it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "needs a GPU of compute capability 8.9 or more (H100, L40S, RTX 4090); run on one"
    if find_spec("torchao") is None:
        return "torchao is not installed; pip install '.[float8]'"
    return None
