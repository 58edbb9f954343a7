"""How often a run reads its corpora, by their manifests alone.

Imports no torch.
"""

from collections.abc import Sequence

from pretrain.account.recipe import Recipe
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError

ABSURD = 100
"""Epochs from which a plan is more likely a slip than a wish."""


def epochs(recipe: Recipe, updates: Sequence[int] | None = None) -> float | None:
    """Return how often a recipe reads its corpora, on average; None where that is not known.

    updates: of each phase, where the budget does not tell.
    """
    if updates is None and recipe.budget.measured:
        return None
    try:
        tokens = sum(load_manifest(prefix).tokens for _, prefix in recipe.config.corpus.blend)
    except UserError:  # what is not there yet, or not good, is for others to say
        return None
    masking = recipe.config.masking
    once = masking.views if masking.views_mode == "batch" else 1  # samples of one text
    read = sum(
        number * phase.cost.samples // once * (phase.config.train.seq_length - 2)
        for number, phase in zip(updates or recipe.budget.updates(), recipe.phases, strict=True)
    )
    return read / tokens if tokens else None


def warning(read: float | None) -> str:
    """Return a line about a plan that reads its text absurdly often; "" for any other."""
    if read is None or read <= ABSURD:
        return ""
    return f"the budget reads the corpus {read:,.0f} times (epochs); lower the budget, or take more text"
