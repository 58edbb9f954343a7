"""The ledger of a running attempt, open for writing.

The trap: nobody is told of a kill -9. A heartbeat every 10 s, also in the middle of a long stretch
(`start_heartbeat`), bounds what it hides.

Only rank 0 keeps the ledger. Imports no torch.
"""

import json
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pretrain.account.flops import StepCost
from pretrain.account.ledger import (
    CATEGORIES,
    COUNTERS,
    EVENTS,
    LAST_WORDS,
    LedgerLine,
    SavedAccount,
    Statement,
    Totals,
    add_up,
    as_totals,
    counts,
    ledger_path,
    line_hash,
    missing,
    origin,
    stated_values,
    statement_of,
    sum_of,
    taken_over,
    unbroken,
    with_absent,
    wrong_at_the_end,
)
from pretrain.account.process import now, process_start
from pretrain.errors import UserError
from pretrain.files import named, sync, truncate_torn_line

log = logging.getLogger(__name__)

REPEATED = ("productive", "evaluate")  # what is done again after going back to a checkpoint
HEARTBEAT = 10.0  # seconds
RECENT = 10  # updates
PULSE = 1.0  # seconds between two looks at the clock


class Ledger:
    """The account of a run, open for writing.

    Seconds are claimed in stretches: `step` claims all since the last stretch as productive,
    `time` what its block takes; what nobody claimed is idle. So the categories always add up to
    the elapsed time.
    """

    def __init__(
        self, run: str | Path, ranks: int, device: str, clock: Callable[[], float], started: float
    ) -> None:
        self._path, self._ranks, self._device = ledger_path(run), ranks, device
        self._clock, self._started = clock, started
        self._torn = truncate_torn_line(self._path)
        self._lines, self._wrong = self._keep_unbroken()
        self._last = next(reversed(self._lines.values()), None)
        self._begun, self._trunk = origin(self._lines)
        self._stated = statement_of(self._last or LedgerLine())  # by the last line
        self._account = self._stated
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)  # of this attempt
        self._warming = 0.0  # seconds of a first update that wait for a second one to compare with
        self._joules: dict[str, float] = {}  # of this attempt
        self._metered: tuple[float, float] | None = None  # first and last reading
        self._mark = started  # end of the last claimed stretch
        self._written = self._logged = started
        self._lock = threading.RLock()  # held while an account that does not add up is on its way
        self._over = threading.Event()
        self.head = next(reversed(self._lines), "")
        """Hash of the last line."""
        self.crashes = sum(line.event == "crash-detected" for line in self._lines.values())
        """Attempts of this run that ended without a word, as far as the ledger knows."""
        self._steps: deque[float] = deque(maxlen=RECENT)  # their device-hours
        self._blocks: dict[str, list[float]] = {name: [] for name in CATEGORIES}

    @classmethod
    def open(
        cls,
        run: str | Path,
        ranks: int,
        device: str,
        clock: Callable[[], float] = now,
        started: float | None = None,
    ) -> "Ledger":
        """Opens or creates the ledger of a claimed run folder; where its chain is broken, up to there.

        `device` is the name of what each of `ranks` ranks drives, `started` when this process did.
        """
        if not ledger_path(run).exists():
            ledger_path(run).touch()
            sync(Path(run))
        return cls(run, ranks, device, clock, process_start() if started is None else started)

    def _keep_unbroken(self) -> tuple[dict[str, LedgerLine], str]:
        """Cut off what follows a break of the chain, with the whole file kept beside; return the lines that
        are left, and what is wrong with the one after them."""
        data = self._path.read_bytes()
        lines, wrong, size = unbroken(data)
        if not wrong and (wrong := wrong_at_the_end(lines)):
            lines.popitem()
            size = data[:-1].rfind(b"\n") + 1
        if wrong:
            number = len(list(self._path.parent.glob("ledger-damaged-*.jsonl"))) + 1
            kept = self._path.with_name(f"ledger-damaged-{number}.jsonl")
            shutil.copyfile(self._path, kept)
            sync(kept)
            os.truncate(self._path, size)
            wrong = f"was damaged at line {wrong}; all of it is kept in {kept.name}"
        return lines, wrong

    def begin(
        self,
        step: int = 0,
        head: str = "",
        last: str = "",
        account: SavedAccount | None = None,
        phase: int = 0,
        branch: dict[str, Any] | None = None,
        **details: Any,
    ) -> None:
        """Starts the run, or resumes it at `step` from the checkpoint that carries `head` and `account`.

        last: hash of the last word of the attempt before, if it had one. phase: of the update before. All
        since the process started is start-up. `details` go into the line. Where `head` or `last` is not a
        line of this ledger, the gap is noted, or the `branch` if the checkpoint is another run's; UserError
        if the checkpoint is of a program that did not write what its line stated.
        """
        known = with_absent(self._lines)
        referred = {last: None, head: account and statement_of(account)}
        lost = {line: stated for line, stated in referred.items() if line and line not in known}
        base = (known.get(head) or account) if head else Statement()
        if base is None or base.step != step:
            raise UserError(
                f"{self._path}: has no line {head[:12]} of step {step}, to which the checkpoint"
                " refers; restore the ledger, or move checkpoints/ away to start over"
            )
        found, begins = self._wrong, bool(branch) and head in lost
        for line, stated in {} if begins else lost.items():
            found = self._wrong or missing(self._lines, line, stated) or "has lost it already"
        layouts = [line.details["layout"] for line in self._lines.values() if "layout" in line.details]
        self._lines = {}  # all that was needed of them
        before = taken_over(self._account, lost)
        self._account = replace(before, attempt=before.attempt + 1)
        self._claim("startup", self._started)
        if branch and begins:
            self.note("branch", stands_for=lost, phase=phase, **branch)
        if found:
            log.warning("warning: %s %s; goes on with what is known of step %d", self._path, found, step)
            begin = {}
            if account and account.begun and not self.head:  # all of the ledger is gone
                begin = {"begun": account.begun, "trunk": account.trunk}
            self.note("gap", stands_for=lost, found=found, phase=phase, **begin)
        if self._torn:
            self.note("repaired", torn=self._torn.decode("ascii", "replace"))
        if self._last is None and not found:
            self.note("start", **details)
            return
        lost_steps = self._account.step - step
        if lost_steps and not head:
            log.warning(
                "%s: begins anew, as there is no checkpoint; %d updates are lost",
                self._path.parent,
                lost_steps,
            )
        if not found and self._last and self._last.event not in LAST_WORDS:
            self.crashes += 1
            self.note("crash-detected", silent_since=self._last.time, lost_steps=lost_steps)
        self._go_back(base)
        if step:
            self._steps.append(self._account.device_seconds["productive"] / step / 3600)
        self.note("resume", head=head, lost_steps=lost_steps, **details)
        old, new = layouts[-1] if layouts else {}, details.get("layout", {})
        if any(new.get(name, value) != value for name, value in old.items()):
            self.note("layout-change", before=old, now=new)

    def _go_back(self, branch: Statement) -> None:
        """Counters return to those of `branch`; the seconds of work since then are lost, none vanish."""
        account, spent = self._account, {**self._account.device_seconds}
        for category in REPEATED:
            spent["lost"] += spent[category] - branch.device_seconds[category]
            spent[category] = branch.device_seconds[category]
        lost = account.lost_flops + account.flops["total"] - branch.flops["total"]
        self._account = replace(account, lost_flops=lost, device_seconds=spent, **counts(branch))

    def step(self, cost: StepCost, first: bool = False) -> None:
        """Charges one update, and the seconds since the last claimed stretch as productive.

        first: of its shape in this attempt, so that it compiled and warmed up. What it took beyond the
        next one is start-up.
        """
        with self._lock:
            self._count(cost)
            begin = self._mark
            self._claim("startup" if first else "productive", begin)
            took = self._mark - begin
            if not first:
                usual = min(self._warming, took)
                self._seconds["startup"] -= usual
                self._seconds["productive"] += usual
                if self._warming:
                    self._steps[-1] = self._ranks * usual / 3600
            self._warming = took if first else 0.0
            self._steps.append(self._ranks * took / 3600)
        self.heartbeat()

    def _count(self, cost: StepCost) -> None:
        account, parts = self._account, {**cost.flops.parts, "total": cost.flops.total}
        flops = account.flops | {part: account.flops.get(part, 0) + n for part, n in parts.items()}
        names = [name for name in COUNTERS if name not in ("step", "flops")]
        grown = {name: getattr(account, name) + getattr(cost, name) for name in names}
        self._account = replace(account, step=account.step + 1, flops=flops, **grown)

    @contextmanager
    def time(self, category: str) -> Iterator[None]:
        """Claims the seconds of a block for `category`; blocks do not nest."""
        begin = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._claim(category, begin)
                self._blocks[category].append(self._ranks * (self._mark - begin) / 3600)
            self.heartbeat()

    @property
    def step_hours(self) -> float:
        """Device-hours that an update may take: the longest of the last few; before the first one, their
        mean over the attempts before."""
        return max(self._steps, default=0.0)

    def block_hours(self, category: str) -> float:
        """Return the device-hours that another block may take, 0 if none was timed in this attempt.

        The longest of n is exceeded by the next one with a chance of 1 / (n + 1): so much is added.
        """
        blocks = self._blocks[category]
        return max(blocks) * (1 + 1 / len(blocks)) if blocks else 0.0

    def mtbf(self, expected: float) -> float:
        """Return the mean seconds between two failures that this run should reckon with: its own, to which
        `expected` adds as many seconds and one failure."""
        elapsed = self.totals().device_seconds["total"] / self._ranks
        return (expected + elapsed) / (1 + self.crashes)

    def meter(self, joules: dict[str, float], age: float = 0.0) -> None:
        """Takes what the sensors have counted in this attempt, by part, over all ranks; nothing if {}.

        age: seconds for which they had counted when they were first read here.
        """
        if not joules:
            return
        with self._lock:
            at = self._clock()
            self._metered = (self._metered[0] if self._metered else at - age), at
            self._joules = joules

    def peak(self, count: int) -> None:
        """Takes the most bytes that a rank has held."""
        self._account = replace(self._account, peak_bytes=max(self._account.peak_bytes, count))

    def save(self) -> str:
        """Call before writing a checkpoint; returns the head that the checkpoint must carry."""
        return self.note("save")

    def log(self, **details: Any) -> None:
        """Notes a line of metrics, unless one was noted in the last 10 s."""
        if self._clock() - self._logged >= HEARTBEAT:
            self._logged = self._clock()
            self.note("log", **details)

    def note(self, event: str, **details: Any) -> str:
        """Appends a line, on disk when this returns; returns its hash."""
        assert event in EVENTS, event
        with self._lock:
            at = self._clock()
            self._stated = self._statement(at)
            line = LedgerLine(
                **stated_values(self._stated),
                previous=self.head,
                event=event,
                time=round(at, 3),
                device=self._device,
                ranks=self._ranks,
                seconds={name: round(value, 6) for name, value in self._seconds_at(at).items()},
                details=details,
            )
            text = json.dumps(line.to_dict(), default=asdict).encode("ascii")
            with named(self._path), open(self._path, "ab") as file:
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if not self.head:
                self._begun, self._trunk = origin({line_hash(text): line})
            self.head, self._written = line_hash(text), at
            if event in LAST_WORDS:
                self._over.set()
            return self.head

    def totals(self) -> Totals:
        """Return what the run has spent up to now."""
        with self._lock:
            return as_totals(self._statement(self._clock()))

    @property
    def account(self) -> SavedAccount:
        """Return what a checkpoint carries: the statement of the last line, and which ledger that was."""
        return SavedAccount(**stated_values(self._stated), begun=self._begun, trunk=self._trunk)

    def heartbeat(self) -> None:
        """Writes a heartbeat if the last line is 10 s old."""
        with self._lock:
            if not self._over.is_set() and self._clock() - self._written >= HEARTBEAT:
                self.note("heartbeat")

    def start_heartbeat(self) -> None:
        """Write heartbeats from a thread of its own, until the attempt's last word or the end of the
        process."""
        threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True).start()

    def _heartbeats(self) -> None:
        while not self._over.wait(PULSE):
            with suppress(OSError):  # a full disk is for the main thread to tell
                self.heartbeat()

    def _claim(self, category: str, begin: float) -> None:
        assert begin >= self._mark, "stretches of time overlap"
        at = self._clock()
        self._seconds["idle"] += begin - self._mark
        self._seconds[category] += at - begin
        self._mark = at

    def _seconds_at(self, at: float) -> dict[str, float]:
        return {**self._seconds, "idle": self._seconds["idle"] + at - self._mark}

    def _statement(self, at: float) -> Statement:
        """Return the account with the device-seconds of this attempt, up to `at`, added."""
        spent = {**self._account.device_seconds}
        for category, seconds in self._seconds_at(at).items():
            spent[category] = round(spent[category] + self._ranks * seconds, 6)
        spent["total"] = round(add_up(spent), 6)
        joules, metered = sum_of(self._account.joules, self._joules), self._account.metered_device_seconds
        if self._metered:
            metered = round(metered + self._ranks * (self._metered[1] - self._metered[0]), 6)
        return replace(
            self._account,
            device_seconds=spent,
            joules={part: round(value, 3) for part, value in joules.items()},
            metered_device_seconds=metered,
        )


def timed(ledger: Ledger | None, category: str) -> AbstractContextManager[None]:
    """Claims the time of a block for `category`, where there is a ledger."""
    return ledger.time(category) if ledger else nullcontext()
