"""What a run may spend, when it stops, and in which phase it is.

The one idea: a budget has one unit, its spent share is the run's progress, and everything that changes on
the way (learning rate, phase, stop) is a function of that one number. Where the unit is not of time or
energy, what a run costs is known before it starts: `updates` takes the same decisions in closed form.

The trap: hours and kWh go on while a run ends, so an update is let in only if it and what follows it (the
last evaluation, the last save) fit.

Imports no torch.
"""

import math
from dataclasses import dataclass, replace

from pretrain.account.flops import StepCost
from pretrain.account.ledger import Totals
from pretrain.errors import UserError

MEASURED = ("device_hours", "kwh")
"""Units that only a run can tell."""
TOLERANCE = 1e-9
"""Share of the budget within which amounts are equal: sums of floats depend on the order of their terms."""
UNTIMED = 1e-3
"""Share of the budget that an update is taken for until one was timed."""


def spent(totals: Totals, unit: str) -> float:
    """Return what a ledger's statement amounts to in a unit of budget; no energy measured counts as none."""
    return {
        "steps": totals.steps,
        "tokens": totals.tokens_seen,
        "flops": totals.flops["total"],
        "flops_without_head": totals.flops_without_head,
        "token_layers": totals.token_layers,
        "device_hours": totals.device_hours,
        "kwh": totals.kwh or 0.0,
    }[unit]


def price(cost: StepCost, unit: str) -> float | None:
    """Return one update in a unit of budget; None for what only a run can tell."""
    return {
        "steps": 1,
        "tokens": cost.tokens_seen,
        "flops": cost.flops.total,
        "flops_without_head": cost.flops.without_head,
        "token_layers": cost.token_layers,
    }.get(unit)


def charged(totals: Totals, cost: StepCost) -> Totals:
    """Return what a statement will be after one more update, as far as budgets count it before it is made."""
    parts = {**cost.flops.parts, "total": cost.flops.total}
    return replace(
        totals,
        steps=totals.steps + 1,
        tokens_seen=totals.tokens_seen + cost.tokens_seen,
        token_layers=totals.token_layers + cost.token_layers,
        flops=totals.flops | {part: totals.flops.get(part, 0) + n for part, n in parts.items()},
    )


@dataclass(frozen=True)
class Budget:
    """What a recipe may spend, and what its updates cost.

    Steps, tokens, FLOPs and token-layers charge surviving work, so a killed run ends where an undisturbed
    one does; hours and kWh charge everything, over all attempts.
    """

    unit: str
    total: float
    costs: tuple[StepCost, ...]
    """What an update of each phase costs."""
    phase_ends: tuple[float, ...]
    """Share of the budget at which each phase but the last ends."""
    inherited: float = 0.0
    """What a branch has from its trunk, which `total` includes."""

    @property
    def measured(self) -> bool:
        """Whether only a run can tell what an update costs."""
        return self.unit in MEASURED

    def check(self) -> None:
        """Raise UserError if the budget does not pay for a single update."""
        one = price(self.costs[self.phase_at(self.inherited / self.total)], self.unit) or 0.0
        if self.total * (1 + TOLERANCE) < self.inherited + one:
            spent = f" and the branch begins with ({self.inherited:g})" if self.inherited else ""
            raise UserError(
                f"budget.{self.unit} = {self.total:g} is less than one update costs ({one:g}){spent};"
                " raise it"
            )

    def spent(self, totals: Totals) -> float:
        """Return what a statement amounts to in the budget's unit."""
        return spent(totals, self.unit)

    def progress(self, totals: Totals) -> float:
        """Return the share of the budget that is spent, in [0, 1]."""
        return min(1.0, self.spent(totals) / self.total)

    def phase(self, totals: Totals) -> int:
        """Return the index of the phase that the next update belongs to, by the spent share."""
        return self.phase_at(self.progress(totals))

    def phase_at(self, progress: float) -> int:
        """Return the index of the phase of an update that starts at `progress`."""
        return sum(end - TOLERANCE <= progress for end in self.phase_ends)

    def allows_step(self, totals: Totals, held_back: float = 0.0) -> bool:
        """Tell whether one more update stays within the budget.

        held_back: device-hours or kWh, whatever the unit is, that it and the end of the run will take.
        """
        each = price(self.costs[self.phase(totals)], self.unit)
        return self.spent(totals) + (held_back if each is None else each) <= self.total * (1 + TOLERANCE)

    def updates(self) -> list[int]:
        """Return how many updates of its own each phase has; UserError if only a run can tell."""
        prices = [price(cost, self.unit) for cost in self.costs]
        if None in prices:
            raise UserError(f"budget.{self.unit}: how many updates it pays for is known only once it has run")
        made, paid = [], self.inherited
        for each, end in zip(prices, [*self.phase_ends, None], strict=True):
            assert each
            number = math.floor((self.total * (1 + TOLERANCE) - paid) / each)
            if end is not None:
                number = min(number, math.ceil(((end - TOLERANCE) * self.total - paid) / each))
            made.append(max(0, number))
            paid += made[-1] * each
        return made

    def planned(self, unit: str) -> float:
        """Return what will be spent of another unit than time or energy; UserError as in `updates`."""
        prices = [price(cost, unit) or 0.0 for cost in self.costs]
        return sum(number * each for number, each in zip(self.updates(), prices, strict=True))


class Course:
    """How far a run is, in [0, 1]: what drives its learning rate and its phases.

    Where the unit can be counted that is the spent share of the budget. Hours and kWh are spent by start-ups
    too, and some are held back for the end: there it grows, from where the checkpoint left it, as what is
    left for updates goes down. So an attempt begins where the one before ended, and the last update ends at
    1.
    """

    def __init__(self, budget: Budget, progress: float | None = None) -> None:
        """progress: that of the checkpoint; None where it does not say, or there is none."""
        self.progress = progress
        self._budget = budget
        self._mark: float | None = None  # spent at the statement before, if what came since counts
        self._begin: tuple[int, float] | None = None  # (step, progress) of this attempt's first statement

    def follow(self, totals: Totals, end: float = 0.0) -> float:
        """Takes a statement of the ledger; returns the progress now.

        end: device-hours or kWh, whatever the unit is, that are held back for the end of the run.
        """
        budget, spent = self._budget, self._budget.spent(totals)
        if not budget.measured or (self.progress is None and totals.steps):
            self.progress = budget.progress(totals)
        self.progress = self.progress or 0.0
        self._begin = self._begin or (totals.steps, self.progress)
        if budget.measured and self._mark is not None:
            left = budget.total - end - self._mark
            share = (spent - self._mark) / left if spent < budget.total - end else 1.0
            self.progress += (1.0 - self.progress) * share
        self._mark = spent
        return self.progress

    def pause(self) -> None:
        """Leaves out what is spent up to the next statement: an update that compiled is a start-up."""
        self._mark = None

    def middle(self, totals: Totals) -> float:
        """Return the progress in the middle of the next update, to which the learning rate belongs."""
        assert self.progress is not None and self._begin
        if not self._budget.measured:
            each = price(self._budget.costs[self._budget.phase_at(self.progress)], self._budget.unit)
            assert each
            share = each / self._budget.total
        else:
            steps, progress = totals.steps - self._begin[0], self.progress - self._begin[1]
            share = progress / steps if steps and progress else UNTIMED
        return min(1.0, self.progress + share / 2)
