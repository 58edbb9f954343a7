"""What a recipe's training on a sequence costs, and what it is compared with: pure functions of configs.

Three of the four costs are closed forms; the fourth, device time, is measured (or estimated, by
`tools.plan`). A ratio of two recipes is the quotient of the same field of both.
"""

from dataclasses import dataclass

from pretrain.account import flops
from pretrain.config import Config, MaskingOptions
from pretrain.data.masking import counts

BASELINE_RATE = 0.15


@dataclass(frozen=True)
class Costs:
    """Of training on one sequence."""

    token_layers: float
    """Linear FLOPs of all layers in units of one self-attention layer on one row."""
    flops_without_head: int
    flops_with_head: int


def rows(config: Config) -> flops.Rows:
    """Rows of each kind in a sequence."""
    c = counts(config.masking, config.train.seq_length)
    return flops.Rows(c.length, c.visible, c.predicted)


def of_sequence(config: Config, vocab_size: int) -> Costs:
    """The three costs of a sequence."""
    made = rows(config)
    spent = flops.training(config.model, made, vocab_size)
    layers = flops.token_layers(config.model, made)
    return Costs(layers, spent.encoder + spent.decoder, spent.total)


def baseline(config: Config) -> Config:
    """Ordinary MLM at 15 % on an encoder of the same size and the same sequences."""
    model = config.model.model_copy(update={"mask_from": 0, "decoder_layers": 0})
    return config.model_copy(update={"model": model, "masking": MaskingOptions(rate=BASELINE_RATE)})
