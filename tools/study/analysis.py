"""How much of a baseline's cost a method needs, with an interval over seeds.

A method's curve is the mean of its seeds' scores at each budget, over their mean cost. It reaches the
baseline's final score where it first does so, on a straight line between two budgets over the logarithm of
the cost. What lies below the first budget is not known, and not guessed.

The interval is a paired bootstrap over pre-training seeds (as in MultiBERTs' Multi-Bootstrap, Sellam et al.
2022, arXiv 2106.16163; the questions, which are the same for all, are not drawn): a resample has the same
seeds of method and baseline, so what a seed does to both cancels. Few seeds have few resamples, and all are
taken. The trap: percentiles of three seeds are too narrow, so their number stands beside them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BELOW, NOT_REACHED = -math.inf, math.inf
"""What an interpolated cost may be instead of a number."""
RESAMPLES = 10_000
"""At most."""
_ENDS = (0.025, 0.975)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Scores of a method, and what they cost: arrays [seeds, budgets], the smallest budget first."""

    seeds: tuple[int, ...]
    costs: Array
    scores: Array

    def of(self, seeds: Sequence[int]) -> "Curve":
        places = [self.seeds.index(seed) for seed in seeds]
        return Curve(tuple(seeds), self.costs[places], self.scores[places])


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval (95 %); None with fewer than two seeds."""

    value: float
    interval: tuple[float, float] | None
    seeds: int


def reached(costs: Sequence[float], scores: Sequence[float], goal: float) -> float:
    """Return the cost at which scores, of which less is better, first come down to a goal."""
    if scores[0] <= goal:
        return costs[0] if scores[0] == goal else BELOW
    for (low, before), (high, after) in itertools.pairwise(zip(costs, scores, strict=True)):
        if after <= goal:
            part = (before - goal) / (before - after)
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return NOT_REACHED


def share(method: Curve, baseline: Curve) -> float:
    """Return the share of the baseline's final cost at which a method reaches its final score."""
    goal, whole = float(baseline.scores.mean(0)[-1]), float(baseline.costs.mean(0)[-1])
    return reached(method.costs.mean(0).tolist(), method.scores.mean(0).tolist(), goal) / whole


def gain(method: Curve, baseline: Curve) -> float:
    """Return by how much a method's final score is less than the baseline's."""
    return float((baseline.scores[:, -1] - method.scores[:, -1]).mean())


def estimate(measure: Callable[[Curve, Curve], float], method: Curve, baseline: Curve) -> Estimate | None:
    """Return a measure of the seeds that both have, with its interval; None if there are none."""
    seeds = sorted(set(method.seeds) & set(baseline.seeds))
    if not seeds:
        return None
    value = measure(method.of(seeds), baseline.of(seeds))
    if len(seeds) == 1:
        return Estimate(value, None, 1)
    counts = Counter(tuple(sorted(each)) for each in resamples(seeds))  # a mean knows no order
    drawn = [measure(method.of(each), baseline.of(each)) for each in counts]
    # Order statistics: between "below" or "not reached" and a number there is nothing.
    low, high = np.quantile(np.repeat(drawn, list(counts.values())), _ENDS, method="inverted_cdf")
    return Estimate(value, (float(low), float(high)), len(seeds))


def resamples(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all ordered draws of as many seeds with replacement, or RESAMPLES of them."""
    count = len(seeds)
    if count**count <= RESAMPLES:
        return list(itertools.product(seeds, repeat=count))
    places = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return [tuple(seeds[place] for place in row) for row in places.tolist()]
