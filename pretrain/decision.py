"""What all ranks decide together before an update: whether it fits the budget, and what is due.

Rank 0 has the ledger and the clock; what it decides (the next step fits the budget, a save is due) and
what only one rank may know (a signal, a checkpoint that could not be written) travel in one small exchange,
so that all ranks decide the same. Where a budget can be counted, rank 0 decides the updates of about a second
at once, by the same sums: an exchange wakes every rank, so it costs what the machine's scheduler makes of it
and not what its bytes take.
"""

import math
import time
from typing import NamedTuple

from torch import Tensor

from pretrain.account import energy
from pretrain.account.budget import TOLERANCE, charged
from pretrain.account.ledger import Totals
from pretrain.build import Run

TIME_LIMIT = "the job's time limit"  # as a reason to stop
_PROGRESS_UNITS = 2**53  # progress travels as an integer, cut to sixteen digits
ANSWER = 1.0
"""Seconds, at most, that a signal to one of several ranks waits for their next exchange, or an update."""
MOST_AHEAD = 64
"""Updates that an exchange decides at most."""


class StepDecision(NamedTuple):
    """What all ranks agreed on at a step's boundary."""

    step_fits: bool
    save_due: bool
    progress: float
    middle: float
    """Progress that the rate of the next update belongs to."""
    phase: int
    """Index of the phase of the next update."""
    milestone: int
    """Index of the share in `checkpoint.keep` at which the weights stay now; -1: none."""
    stop: bool = False
    late: bool = False
    """It is the job's time limit that says stop."""


_NUMBERS = 6
"""Integers as which what rank 0 decides of an update travels."""


def _packed(step: StepDecision) -> list[int]:
    progress, middle = int(step.progress * _PROGRESS_UNITS), int(step.middle * _PROGRESS_UNITS)
    return [int(step.step_fits), int(step.save_due), progress, middle, step.phase, step.milestone]


def _unpacked(numbers: list[int], stop: bool, late: bool, failed: bool) -> StepDecision:
    fits, save, progress, middle, phase, milestone = numbers
    shares = progress / _PROGRESS_UNITS, middle / _PROGRESS_UNITS
    return StepDecision(bool(fits), bool(save) or failed, *shares, phase, milestone, stop, late)


def decide_steps(run: Run) -> list[StepDecision]:
    """Make one exchange: rank 0's budget and clock, anybody's signal, everybody's joules.

    Returns what holds for the next update, and for those after it as far as they are decided ahead. Where
    the last checkpoint could not be written, by whatever rank, a save is due, which says so.
    """
    steps = look_ahead(run) if run.ledger else []
    last = (len(steps) - 1) * step_seconds(run)
    if run.deadline and time.time() + last >= run.deadline:
        run.signals.received = run.signals.received or TIME_LIMIT
    received, joules, parts = run.signals.received, run.meter.joules(), run.meter.parts
    told = [
        int(received is not None),
        int(received == TIME_LIMIT),
        int(bool(run.writer and run.writer.failed)),
    ]
    mine = told + [int(1e3 * joules.get(part, 0.0)) for part in parts]

    def answer(ranks: Tensor) -> list[int]:
        padding = [0] * (_NUMBERS * (MOST_AHEAD - len(steps)))
        decided = [number for step in steps for number in _packed(step)]
        return [*ranks.sum(0).tolist(), len(steps), *decided, *padding]

    said = run.topology.ask_main(mine, answer, len(mine) + 1 + MOST_AHEAD * _NUMBERS)
    (stop, late, failed, *millijoules), (count, *decided) = said[: len(mine)], said[len(mine) :]
    if run.ledger:
        run.ledger.meter(dict(zip(parts, (each / 1e3 for each in millijoules), strict=True)))
    return [
        _unpacked(decided[number * _NUMBERS :][:_NUMBERS], bool(stop), bool(late), bool(failed))
        for number in range(1 if stop or failed else count)
    ]


def look_ahead(run: Run) -> list[StepDecision]:
    """Return what rank 0 decides about the next update and those after it."""
    assert run.ledger
    budget, course, totals = run.recipe.budget, run.course, run.ledger.totals()
    update, end = held_back(run, totals)
    found: list[StepDecision] = []
    for number in range(steps_ahead(run)):
        fits = budget.allows_step(totals, update + end)
        share = course.follow(totals, end)
        middle = course.middle(totals) if run.data.rules.rate_of_middle else share
        phase, milestone = budget.phase_at(share), milestone_due(run, share if fits else 1.0)
        due = save_due(run, run.step + number)
        found.append(StepDecision(fits, due, share, middle, phase, milestone))
        if not fits or due or milestone >= 0:
            break  # what it leads to is asked for anew
        totals = charged(totals, run.recipe.phases[phase].cost)
    return found


def steps_ahead(run: Run) -> int:
    """Return how many updates are to be decided at once: as many as a signal may wait for; one where there is
    no exchange to save, or where only the clock tells what an update spends."""
    seconds = step_seconds(run)
    if run.topology.world_size == 1 or run.recipe.budget.measured or not seconds:
        return 1
    return max(1, min(int(ANSWER / seconds), MOST_AHEAD))


def step_seconds(run: Run) -> float:
    """Return what an update may take, on rank 0; 0 before the first."""
    return 3600 * run.ledger.step_hours / run.topology.world_size if run.ledger else 0.0


def held_back(run: Run, totals: Totals) -> tuple[float, float]:
    """Return what the next update, and what the end of the run will take of a budget of hours or kWh.

    The end is an evaluation and a save; an evaluation that has not been timed yet takes at most as long as
    training on its samples. Joules: at the mean power so far, and for the time by which their count is late.
    """
    assert run.ledger
    step = run.ledger.step_hours
    untimed = step * run.heldout.samples / run.cost.samples if run.heldout else 0.0
    end = (run.ledger.block_hours("evaluate") or untimed) + run.ledger.block_hours("checkpoint")
    if run.recipe.budget.unit != "kwh":
        return step, end
    late = step + run.topology.world_size * 2 * energy.PERIOD / 3600
    metered = totals.metered_device_seconds
    watts = (totals.joules or 0.0) / metered if metered else 0.0  # of one device
    return step * watts / 1e3, (end + late) * watts / 1e3


def save_due(run: Run, step: int) -> bool:
    """Tell by steps, at `step`, or by rank 0's clock."""
    every = run.config.checkpoint
    if step == run.saved or step == 0:
        return False
    by_cost = run.recipe.budget.measured or every.every_minutes == "auto"
    if by_cost and run.ledger and not run.ledger.block_hours("checkpoint"):
        return True  # once early, to know how long a save takes
    late = time.monotonic() - run.saved_at >= save_interval(run)
    return bool(late or (every.every_steps and step % every.every_steps == 0))


def save_interval(run: Run) -> float:
    """Return the seconds after which a save is due.

    With `auto` those that lose least to saves and failures together, sqrt(2 x stop x MTBF) (Young, CACM 1974;
    Daly, FGCS 2006), where a save stops training for `stop` seconds; no fewer than it takes to write.
    """
    every = run.config.checkpoint
    if every.every_minutes != "auto":
        return 60 * (every.every_minutes or math.inf)
    assert run.ledger
    written = run.writer.seconds if run.writer else 0.0
    return max(written, math.sqrt(2 * run.stopped * run.ledger.mtbf(3600 * every.mtbf_hours)))


def milestone_due(run: Run, share: float) -> int:
    """Return the index of the first share of the budget whose weights should have been kept by now; -1: none.

    Those that were passed before this attempt began are not made up for: its weights are not theirs.
    """
    shares = run.config.checkpoint.keep
    due = (index for index, at in enumerate(shares) if at <= share + TOLERANCE and at not in run.milestones)
    return next(due, -1)
