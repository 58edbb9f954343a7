"""What a run may spend, when it stops, and in which phase it is.

The one idea: a budget has one unit, its spent share is the run's progress, and everything that changes on
the way (learning rate, phase, stop) is a function of that one number. Where the unit is not of time or
energy, what a recipe costs is known before it starts: `updates` takes the same decisions in closed form.

The trap: hours and kWh go on while a run ends, so an update is let in only if it and what follows it (the
last evaluation, the last save) fit.

Imports no torch.
"""

import math
from pathlib import Path
from typing import Any

from pretrain.account import costs, flops, ledger
from pretrain.account.flops import StepCost
from pretrain.config import Config, load_config, phase_configs
from pretrain.errors import UserError

JOULES_PER_KWH = 3.6e6
MEASURED = ("device_hours", "kwh")
"""Units that only a run can tell."""
TOLERANCE = 1e-9
"""Share of the budget within which amounts are equal: sums of floats depend on the order of their terms."""
UNTIMED = 1e-3
"""Share of the budget that an update is taken for until one was timed."""

Totals = dict[str, Any]  # of Ledger.totals


def step_cost(config: Config) -> StepCost:
    """What one update of a resolved config costs; of a phase, if it has some."""
    assert config.model.vocab_size
    t, rows = config.train, costs.rows(config)
    return flops.step_cost(config.model, rows, config.model.vocab_size, t.batch_size, t.recompute)


def spent(totals: Totals, unit: str) -> float:
    """What a ledger's statement amounts to in a unit of budget; no energy measured counts as none."""
    return {
        "steps": totals["steps"],
        "tokens": totals["tokens_seen"],
        "flops": totals["flops"]["total"],
        "flops_without_head": totals["flops"]["encoder"] + totals["flops"]["decoder"],
        "token_layers": totals["token_layers"],
        "device_hours": totals["device_seconds"]["total"] / 3600,
        "kwh": (totals["joules"] or 0.0) / JOULES_PER_KWH,
    }[unit]


def price(cost: StepCost, unit: str) -> float | None:
    """One update in a unit of budget; None for what only a run can tell."""
    return {
        "steps": 1,
        "tokens": cost.tokens_seen,
        "flops": cost.flops.total,
        "flops_without_head": cost.flops.encoder + cost.flops.decoder,
        "token_layers": cost.token_layers,
    }.get(unit)


def check(config: Config) -> None:
    """UserError if the budget of a resolved config does not pay for a single update."""
    unit, total = config.budget.amount
    one = price(step_cost(phase_configs(config)[0]), unit)
    if one is not None and total * (1 + TOLERANCE) < one:
        raise UserError(f"budget.{unit} = {total:g} is less than one update costs ({one:g}); raise it")


class Budget:
    """The budget of a resolved config.

    Steps, tokens, FLOPs and token-layers charge surviving work, so a killed run ends where an undisturbed
    one does; hours and kWh charge everything, over all attempts.
    """

    def __init__(self, config: Config) -> None:
        self.unit, self.total = config.budget.amount
        self.costs = [step_cost(phase) for phase in phase_configs(config)]
        self._untils = [phase.until for phase in config.train.phases]
        self.measured = self.unit in MEASURED

    def spent(self, totals: Totals) -> float:
        """In the budget's unit."""
        return spent(totals, self.unit)

    def progress(self, totals: Totals) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(1.0, self.spent(totals) / self.total)

    def phase(self, totals: Totals) -> int:
        """Number of the phase that the next update belongs to, by the spent share."""
        return self.phase_at(self.progress(totals))

    def phase_at(self, progress: float) -> int:
        """Number of the phase of an update that starts at `progress`."""
        return sum(until - TOLERANCE <= progress for until in self._untils)

    def allows_step(self, totals: Totals, held_back: float = 0.0) -> bool:
        """Whether one more update stays within the budget.

        held_back: device-hours or kWh, whatever the unit is, that it and the end of the run will take.
        """
        each = price(self.costs[self.phase(totals)], self.unit)
        return self.spent(totals) + (held_back if each is None else each) <= self.total * (1 + TOLERANCE)

    def updates(self) -> list[int]:
        """How many updates each phase has; UserError if only a run can tell."""
        prices = [price(cost, self.unit) for cost in self.costs]
        if None in prices:
            raise UserError(f"budget.{self.unit}: how many updates it pays for is known only once it has run")
        made, paid = [], 0.0
        for each, until in zip(prices, [*self._untils, None], strict=True):
            assert each
            number = math.floor((self.total * (1 + TOLERANCE) - paid) / each)
            if until is not None:
                number = min(number, math.ceil(((until - TOLERANCE) * self.total - paid) / each))
            made.append(max(0, number))
            paid += made[-1] * each
        return made


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
        if not budget.measured or (self.progress is None and totals["steps"]):
            self.progress = budget.progress(totals)
        self.progress = self.progress or 0.0
        self._begin = self._begin or (totals["steps"], self.progress)
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
        """Progress in the middle of the next update, to which the learning rate belongs."""
        assert self.progress is not None and self._begin
        if not self._budget.measured:
            each = price(self._budget.costs[self._budget.phase_at(self.progress)], self._budget.unit)
            assert each
            share = each / self._budget.total
        else:
            steps, progress = totals["steps"] - self._begin[0], self.progress - self._begin[1]
            share = progress / steps if steps and progress else UNTIMED
        return min(1.0, self.progress + share / 2)


# ---- a share of another recipe -------------------------------------------------------------------


def resolve(config: Config) -> Config:
    """The config with `budget.relative_to` turned into an amount; the vocabulary size is known."""
    b = config.budget
    if b.relative_to is None or getattr(b, b.measured_unit) is not None:
        return config
    amount = b.fraction * _cost_of(b.relative_to, b.measured_unit, config)
    return config.model_copy(update={"budget": b.model_copy(update={b.measured_unit: amount})})


def _cost_of(reference: str, unit: str, config: Config) -> float:
    where = f"budget.relative_to = {reference}"
    if (Path(reference) / "ledger.jsonl").exists():
        return _spent_by(reference, unit, where)
    if not Path(reference).is_file():
        raise UserError(f"{where}: no such config, and no run that has begun; name its config, or wait")
    other = load_config(reference)
    if other.budget.relative_to:
        raise UserError(f"{where}: its own budget is relative too; name what that is relative to")
    if other.budget.amount[0] == unit:
        return other.budget.amount[1]
    vocab_size = other.model.vocab_size or config.model.vocab_size
    other = other.model_copy(update={"model": other.model.model_copy(update={"vocab_size": vocab_size})})
    if unit in MEASURED or other.budget.amount[0] in MEASURED:
        raise UserError(
            f"{where}: its {unit} are not known before it has run; name the folder of a run of it, or take"
            " another budget.measure"
        )
    return planned(other, unit)


def _spent_by(run: str, unit: str, where: str) -> float:
    """What a run has spent; UserError while that still grows, or if it was not measured throughout."""
    lines = ledger.read(run)
    if not lines or lines[-1]["event"] != "finish":
        raise UserError(f"{where}: this run has not finished yet; wait for it, or name a config")
    totals = ledger.total([run])
    spans = totals["device_seconds"]
    worked = spans["productive"] + spans["evaluate"] + spans["checkpoint"] + spans["lost"]
    # A kill may hide a heartbeat of joules, not more.
    if unit == "kwh" and totals["metered_device_seconds"] < 0.99 * worked:
        raise UserError(f"{where}: this run's energy was not all measured; take another budget.measure")
    if not spent(totals, unit):
        raise UserError(f"{where}: this run has spent nothing; take another, or a config")
    return spent(totals, unit)


def planned(config: Config, unit: str) -> float:
    """What a config, its vocabulary size known, will spend of another unit than time or energy."""
    budget = Budget(config)
    prices = [price(cost, unit) or 0.0 for cost in budget.costs]
    return sum(number * each for number, each in zip(budget.updates(), prices, strict=True))
