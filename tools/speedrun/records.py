"""What a record is: a recipe that reaches the finish line with every one of three seeds, and what it cost.

The one idea: a task is a study whose methods are recipes, so a record is read from its lines of results. The
finish line is what the baseline ends at, the mean of its seeds; a record is the smallest budget at which no
seed is above it.

Imports no torch.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pretrain.errors import UserError
from tools.study.pages import Found
from tools.study.plan import Study, StudyCell
from tools.study.results import StudyResult

SEEDS = 3
"""That a record needs."""
SCORE = "bits per byte"
_OPEN = {
    *("join", "decoder", "decoder_layers", "decoder_positions", "decoder_dropout"),
    *("mask_vector", "mask_leak", "dropout", "init_std"),
}
"""Keys of `model` that a recipe may set: others say what the exported encoder is, or start from another."""


class SpeedrunRecord(NamedTuple):
    """The smallest budget of a recipe with which all seeds are over the line."""

    recipe: str
    share: float
    """Of the baseline's FLOPs."""
    models: list[StudyResult]
    """One of each seed."""


def refuse_other_encoders(study: Study) -> None:
    """Raise UserError where a recipe changes what is exported, or what all are asked."""
    for name, method in study.options.methods.items():
        changed = [f"model.{key}" for key in method.config.get("model") or {} if key not in _OPEN]
        changed += [section for section in ("corpus", "evaluate") if section in method.config]
        if changed:
            raise UserError(
                f"{study.path}: methods.{name}: {changed[0]} is the task's; a recipe leaves it alone"
            )


def finish_line(study: Study, found: Found) -> float | None:
    """Return the bits per byte to be reached; None before the baseline has run with three seeds."""
    models = _models(study, found, study.options.baseline, -1)
    return statistics.mean(each.scores[SCORE] for each in models) if models else None


def records(study: Study, results: Sequence[StudyResult]) -> Iterator[SpeedrunRecord]:
    """Yield the record of each recipe that has one, cheapest first; larger budgets need not have been run."""
    found, recipes = Found(study, results), list(study.options.methods)
    if (goal := finish_line(study, found)) is None:
        return
    for place, share in enumerate(study.options.shares):
        for recipe in list(recipes):
            models = _models(study, found, recipe, place)
            if models and all(model.scores[SCORE] <= goal for model in models):
                yield SpeedrunRecord(recipe, share, models)
                recipes.remove(recipe)


def _models(study: Study, found: Found, recipe: str, place: int) -> list[StudyResult]:
    """Return a recipe's models at one of the budgets, one of each seed; none where a seed is missing."""
    (size,) = study.options.sizes
    if (lr := study.chosen(size, recipe, found.results)) is None:
        return []
    targets = [study.targets(StudyCell(size, recipe, seed, lr))[place] for seed in range(SEEDS)]
    models = [found.known[target.digest] for target in targets if target.digest in found.known]
    return models if len(models) == SEEDS else []


def rows(study: Study, results: Sequence[StudyResult]) -> list[list[str]]:
    """Return the table of records: a row for each recipe, then how the others stand."""
    goal = finish_line(study, Found(study, results))
    line = "not known yet" if goal is None else f"{goal:.4f} bits per byte"
    table = [["recipe", "FLOPs", "share", "device-hours", "seeds", SCORE, "commit"]]
    table.append([f"*finish line: `{study.options.baseline}`, {line}*", *[""] * (len(table[0]) - 1)])
    for record in records(study, results):
        scores = [model.scores[SCORE] for model in record.models]
        table.append(
            [
                f"`{record.recipe}`",
                f"{statistics.mean(model.flops for model in record.models):.3g}",
                f"{record.share:g}",
                f"{statistics.mean(model.device_hours for model in record.models):.2f}",
                str(len(record.models)),
                f"{statistics.mean(scores):.4f} (worst {max(scores):.4f})",
                ", ".join(sorted({model.commit[:12] for model in record.models})),
            ]
        )
    return table
