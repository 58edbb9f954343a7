"""Learning-rate curves: pure functions of progress, the spent share of the budget in [0, 1].

Progress may come from steps, tokens, FLOPs or hours; the curves do not know (the idea of 24hBERT's
time-based schedule, Izsak et al. 2021, arXiv 2104.07705).
"""

import math

from pretrain.config import Config

# Share of the budget over which a trapezoid comes down (Hagele et al. 2024, arXiv 2405.18392: 10-20 %).
_DESCENT = 0.2


def scale(kind: str, progress: float, warmup: float, floor: float, start: float = 0.0) -> float:
    """Return the factor on the peak rate, in [0, 1]; so are progress, warmup, floor and start.

    Rises linearly from 0 over the first `warmup` of the budget; then `linear` and `cosine` fall to
    `floor` at the end, `trapezoid` stays at 1 and falls linearly over the last fifth. `decay` and
    `decay-linear` fall from `start` on, the former as 1 - sqrt (Hagele et al. 2024).
    """
    if progress < warmup:
        return progress / warmup
    if kind.startswith("decay"):
        begin = max(start, warmup)
        gone = max(0.0, progress - begin) / (1.0 - begin)
        rest = 1.0 - (gone if kind == "decay-linear" else math.sqrt(gone))
    elif kind == "trapezoid":
        rest = min(1.0, (1.0 - progress) / min(_DESCENT, 1.0 - warmup))
    else:
        rest = 1.0 - (progress - warmup) / (1.0 - warmup)
        if kind == "cosine":
            rest = 0.5 * (1.0 - math.cos(math.pi * rest))
    return floor + (1.0 - floor) * max(0.0, rest)


def rate(config: Config, progress: float) -> float:
    """Return the learning rate at `progress`."""
    schedule, (unit, total) = config.schedule, config.budget.amount
    start = config.run.inherited(unit) / total
    return config.optimizer.lr * scale(schedule.kind, progress, schedule.warmup, schedule.floor, start)
