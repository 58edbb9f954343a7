"""Effective training time under failures: real attempts, killed at random times, by a scaled clock.

The clock of a rank stands still but for what `Costs` says: so long to start, so long for an update and for
what a save stops. Failures come at random, on average every `mtbf` seconds of it, also during a start. What
is measured is the share of all these seconds that went into updates which survived.
"""

import json
import math
import random
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from pretrain.account import ledger
from tests.faults.workshop import LAYOUTS, workshop
from tests.support.runs import Attempt, Strike, pace

FAILURES = 8
"""A run is as long as so many failures are apart on average,"""
UPDATES = 1440
"""and so many updates."""


@dataclass(frozen=True)
class Costs:
    """Seconds, as `configs/mlm-base.yaml` in fp32 has them on a busy core of an Intel Xeon."""

    start: float = 24.5
    """From the start of the process to the end of the first update."""
    stop: float = 0.007
    """For which a save stops training; without `checkpoint.background` it was 11.8."""
    write: float = 4.5
    """From then until it is on disk: a failure in between loses it."""

    def best_interval(self, mtbf: float) -> float:
        """Return Young's and Daly's interval between saves, no shorter than it takes to write one."""
        return max(self.write, math.sqrt(2 * self.stop * mtbf))


@dataclass(frozen=True)
class Mortal(Strike):
    """A rank with a clock of its own, that dies when it has lived so long."""

    update: float = 1.0
    costs: Costs = Costs()
    life: float = math.inf

    def arm(self) -> None:
        paces = {"pretrain.feed:Feed.take": self.update, "pretrain.checkpoint:save": self.costs.stop}
        pace(paces, self.costs.start, self.life, self.costs.write)


@dataclass
class Measured:
    """One run under failures; times are seconds of its clock."""

    mtbf: float
    every_minutes: str
    """`checkpoint.every_minutes`."""
    interval: float
    """Mean time between two saves."""
    failures: int
    ettr: float
    """Time of updates that survived over all time."""
    ettr_by_ledger: float
    """As the ledger has it: a failure hides up to ten seconds from it, and a start that it ended."""
    foreseen: float
    """By Daly's formula, for this interval."""
    best_interval: float
    """Young's and Daly's."""
    best_foreseen: float


def foreseen(interval: float, mtbf: float, costs: Costs) -> float:
    """Return the effective share with a save after every `interval` of work (Daly, FGCS 2006).

    An attempt of length t has kept what (t - start - write) / (interval + stop) saves hold, rounded down: to
    write beside training costs what a longer start would.
    """
    took = mtbf * math.exp((costs.start + costs.write) / mtbf) * math.expm1((interval + costs.stop) / mtbf)
    return interval / took


def lifetimes(mtbf: float, seed: int) -> list[float]:
    """Return times between failures in random order, as an exponential distribution has them: its quantiles,
    so that a short run meets no more and no fewer than a long one."""
    count = 2 * FAILURES
    quantiles = [-mtbf * math.log(1 - (i + 0.5) / count) for i in range(count)]
    random.Random(seed).shuffle(quantiles)
    return quantiles


def measure(
    mtbf: float,
    every_minutes: str,
    seed: int,
    costs: Costs,
    length: float = FAILURES,
    updates: int = UPDATES,
) -> Measured:
    """Train until the budget is spent, whatever fails meanwhile; length: in units of `mtbf`."""
    lives, spent, failures = cycle(lifetimes(mtbf, seed)), 0.0, 0
    update = length * mtbf / updates
    with workshop() as shop:
        run = shop.disk / "run"
        words = [
            *shop.words(LAYOUTS[0], run, shop.folder / "inputs"),
            *(
                f"budget.steps={updates}",
                "corpus.valid=",
                "evaluate.every_steps=null",
                "monitor.log_every=50",
            ),
            *("checkpoint.every_steps=null", f"checkpoint.every_minutes={every_minutes}"),
            f"checkpoint.mtbf_hours={mtbf / 3600}",
        ]
        codes = [-signal.SIGKILL]
        while codes != [0]:
            life = next(lives)
            if life > costs.start:  # else it fails in its start
                mortal = Mortal(signal.SIGKILL, 0, update=update, costs=costs, life=life)
                codes, text = Attempt(words, 1, mortal).wait()
                assert codes in ([0], [-signal.SIGKILL]), text
            if codes != [0]:
                spent, failures = spent + life, failures + 1
        lines, totals = ledger.read(run), ledger.total([run])
    spent += sum(lines[-1].seconds.values())
    saves = sum(line.event == "save" for line in lines)
    interval = (updates * update + totals.device_seconds["lost"]) / saves
    best = costs.best_interval(mtbf)
    return Measured(
        mtbf=mtbf,
        every_minutes=every_minutes,
        interval=interval,
        failures=failures,
        ettr=updates * update / spent,
        ettr_by_ledger=ledger.effective_share(totals) or 0.0,
        foreseen=foreseen(interval, mtbf, costs),
        best_interval=best,
        best_foreseen=foreseen(best, mtbf, costs),
    )


def compare(mtbfs: Sequence[float], seed: int, output: Path) -> None:
    """Measure `auto`, and four times the best interval, at each mean time between failures; write
    them to a JSON file."""
    costs, found = Costs(), []
    for mtbf in mtbfs:
        for every in ("auto", f"{4 * costs.best_interval(mtbf) / 60}"):
            found.append(measure(mtbf, every, seed, costs))
            print(found[-1], flush=True)
    document = {"costs": asdict(costs), "runs": [asdict(one) for one in found]}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
