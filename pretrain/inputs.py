"""What a run reads, and the recipe that follows from it: opened and checked before anything is touched."""

from dataclasses import dataclass

import torch

from pretrain.account.recipe import Recipe, make_recipe
from pretrain.config import Config
from pretrain.data.corpora import Data, open_blend, open_data
from pretrain.evaluate import HeldOut
from pretrain.parallel.deepspeed_engine import deepspeed_config


@dataclass(frozen=True)
class Inputs:
    """All that a run is made from."""

    recipe: Recipe
    data: Data
    heldout: HeldOut | None


def open_inputs(config: Config, device: torch.device, data_size: int) -> Inputs:
    """Open what a config names and make its recipe, for `data_size` data-parallel ranks on such a device.

    UserError if anything is missing, damaged, too small, or does not fit together.
    """
    data = open_data(config.corpus)
    recipe = make_recipe(config, data.tokenizer.vocab_size, _has_bf16(device), device.type == "cpu")
    recipe.budget.check()
    for phase in recipe.phases:
        micro = phase.micro_batch(data_size)
        open_blend(phase.config, data)  # refuses a corpus that is too small for its length
        if config.train.engine == "deepspeed":
            deepspeed_config(phase.config, data_size, micro, pin=False)
    return Inputs(recipe, data, _open_heldout(config, data))


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _open_heldout(config: Config, data: Data) -> HeldOut | None:
    """Open the held-out windows, if the config names a corpus of them."""
    if not config.corpus.valid:
        return None
    return HeldOut.of(config, data.tokenizer, config.corpus.valid)
