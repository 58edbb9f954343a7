"""What a run has spent, over all its attempts, and what it may still spend.

`ledger.jsonl` is append-only; each line holds the hash of the line before, so that none can be
edited or dropped unnoticed, and each checkpoint holds the hash of the line of its own save.

The one idea: every line is a complete statement, so the last one is the account of the run. When
an attempt resumes from a checkpoint, the counters go back to that checkpoint's line and the
seconds of work since then move to `lost`: counters are of surviving work only, device-seconds are
all there ever were.

The trap: nobody is told of a kill -9. A heartbeat every 10 s bounds what it hides.

Only rank 0 keeps the ledger. Imports no torch.
"""

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain import config
from pretrain.checkpoint import mend, sync
from pretrain.config import UserError
from pretrain.flops import StepCost

CATEGORIES = ("productive", "evaluate", "checkpoint", "startup", "idle")
COUNTERS = ("step", "samples", "tokens_seen", "tokens_predicted", "flops", "hardware_flops")
REPEATED = ("productive", "evaluate")  # what is done again after going back to a checkpoint
EVENTS = (
    "start",  # first attempt
    "resume",  # any other; `head` names the line it goes on from, `lost_steps` what it repeats
    "heartbeat",
    "segment",  # another blend of corpora from here on
    "evaluate",
    "save",  # written just before the checkpoint that carries its hash
    "signal",
    "finish",  # the budget is spent
    "stop",  # ended early; start again
    "repaired",  # a torn last line was cut off; `torn` is what it held
)
HEARTBEAT = 10.0  # seconds

Line = dict[str, Any]

_EPOCH = time.time() - time.monotonic()


def now() -> float:
    """Unix time in seconds that never steps back, whatever is done to the system's clock."""
    return _EPOCH + time.monotonic()


_IMPORTED = now()


def process_start() -> float:
    """Unix time at which this process started; without /proc, at which this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5): clock ticks after boot
        return now() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return _IMPORTED


# ---- lines ---------------------------------------------------------------------------------------


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _path(run: str | Path) -> Path:
    return Path(run) / "ledger.jsonl"


def _scan(run: str | Path) -> dict[str, Line]:
    """Hash -> line, in order, the chain verified; a last line without an end is left out."""
    if not _path(run).exists():
        raise UserError(f"{_path(run)}: no such ledger; check the run's path")
    lines: dict[str, Line] = {}
    head = ""
    for number, text in enumerate(_path(run).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            previous = line["previous"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{_path(run)}:{number}: not a line of a ledger; restore the file") from None
        if previous != head:
            raise UserError(
                f"{_path(run)}:{number}: does not follow from the line before; one of them was"
                " changed or taken out, restore the file"
            )
        head = _hash(text)
        lines[head] = line
    return lines


def read(run: str | Path) -> list[Line]:
    """The lines of a run's ledger, oldest first; UserError names the first one that breaks the chain.

    A last line without an end is left out: it is being written, or was when the run was killed.
    """
    return list(_scan(run).values())


def heads(run: str | Path) -> set[str]:
    """Hashes of all lines: what a checkpoint's `ledger_head` must be one of."""
    return set(_scan(run))


def check(run: str | Path) -> int:
    """Number of lines; UserError names the first that breaks the chain, or that does not add up."""
    lines = _scan(run)
    before = _nothing()
    for number, line in enumerate(lines.values(), 1):
        if wrong := _disagreement(before, line, lines):
            raise UserError(f"{_path(run)}:{number}: {wrong}; restore the file")
        before = line
    return len(lines)


def _disagreement(before: Line, line: Line, lines: dict[str, Line]) -> str | None:
    """What in a line contradicts itself or the lines before it."""
    spent, tolerance = line["device_seconds"], 1e-4 * line["ranks"]
    for name in ("flops", "device_seconds"):
        if abs(_sum(line[name]) - line[name]["total"]) > tolerance:
            return f"the parts of {name} do not add up to their total"
    elapsed = sum(line["seconds"].values())
    if before["attempt"] == line["attempt"]:
        elapsed -= sum(before["seconds"].values())
    if abs(spent["total"] - before["device_seconds"]["total"] - line["ranks"] * elapsed) > tolerance:
        return "device_seconds are not ranks x elapsed seconds"
    if line["event"] == "resume":
        branch = lines.get(line["head"]) if line["head"] else _nothing()
        if branch is None or any(line[name] != branch[name] for name in COUNTERS):
            return "the counters are not those of the line that it resumes from"
    return None


def _sum(parts: dict[str, Any]) -> Any:
    return sum(value for name, value in parts.items() if name != "total")


def _totals(line: Line) -> dict[str, Any]:
    return {
        "steps": line["step"],
        **{name: line[name] for name in COUNTERS if name != "step"},
        "device_seconds": line["device_seconds"],
        "lost_flops": line["lost_flops"],
        "joules": None,
        "attempts": line["attempt"],
    }


def total(runs: Iterable[str | Path]) -> dict[str, Any]:
    """What the runs spent together, under the keys of `Ledger.totals`."""
    spent = _totals(_nothing())
    for run in runs:
        lines = read(run)
        spent = _add(spent, _totals(lines[-1] if lines else _nothing()))
    return spent


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {name: _add(left[name], right[name]) for name in left}
    return None if left is None else _rounded(left + right)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _nothing() -> Line:
    """The statement before the first line."""
    return {
        "attempt": 0,
        "step": 0,
        "samples": 0,
        "tokens_seen": 0,
        "tokens_predicted": 0,
        "flops": {"encoder": 0, "decoder": 0, "head": 0, "total": 0},
        "hardware_flops": 0,
        "lost_flops": 0,
        "device_seconds": {**dict.fromkeys(CATEGORIES, 0.0), "lost": 0.0, "total": 0.0},
    }


# ---- the account of a running attempt ------------------------------------------------------------


class Ledger:
    """The account of a run, open for writing.

    Seconds are claimed in stretches: `step` claims all since the last stretch as productive,
    `time` what its block takes; what nobody claimed is idle. So the categories always add up to
    the elapsed time.
    """

    def __init__(
        self, run: str | Path, ranks: int, device: str, clock: Callable[[], float], started: float
    ) -> None:
        self._path, self._ranks, self._device = _path(run), ranks, device
        self._clock, self._started = clock, started
        self._torn = mend(self._path)
        self._lines = _scan(run)
        last = next(reversed(self._lines.values()), _nothing())
        self._account = {name: copy.copy(last[name]) for name in _nothing()}
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)  # of this attempt
        self._mark = started  # end of the last claimed stretch
        self._written = started
        self.head = next(reversed(self._lines), "")
        """Hash of the last line."""
        self.step_hours = 0.0
        """Device-hours of this attempt's last update."""

    @classmethod
    def open(
        cls,
        run: str | Path,
        ranks: int,
        device: str,
        clock: Callable[[], float] = now,
        started: float | None = None,
    ) -> "Ledger":
        """Opens or creates the ledger of a claimed run folder; UserError if its chain is broken.

        `device` is the name of what each of `ranks` ranks drives, `started` when this process did.
        """
        if not _path(run).exists():
            _path(run).touch()
            sync(Path(run))
        return cls(run, ranks, device, clock, process_start() if started is None else started)

    def begin(self, step: int = 0, head: str = "") -> None:
        """Starts the run, or resumes it at `step` from the checkpoint that carries `head`.

        All since the process started is start-up. UserError if `head` is not a line of this ledger.
        """
        branch = self._lines.get(head) if head else _nothing()
        if branch is None or branch["step"] != step:
            raise UserError(
                f"{self._path}: has no line {head[:12]} of step {step}, to which the checkpoint"
                " refers; restore the ledger, or move checkpoints/ away to start over"
            )
        event = "resume" if self._lines else "start"
        last_step = self._account["step"]
        self._lines = {}  # only the branch was needed
        self._account["attempt"] += 1
        self._claim("startup", self._started)
        if self._torn:
            self.note("repaired", torn=self._torn.decode("ascii", "replace"))
        self._go_back(branch)
        self.note(event, **({"head": head, "lost_steps": last_step - step} if event == "resume" else {}))

    def _go_back(self, branch: Line) -> None:
        """Counters return to those of `branch`; the seconds of work since then are lost, none vanish."""
        account, spent = self._account, self._account["device_seconds"]
        account["lost_flops"] += account["flops"]["total"] - branch["flops"]["total"]
        for category in REPEATED:
            spent["lost"] += spent[category] - branch["device_seconds"][category]
            spent[category] = branch["device_seconds"][category]
        account.update({name: copy.copy(branch[name]) for name in COUNTERS})

    def step(self, cost: StepCost) -> None:
        """Charges one update, and the seconds since the last claimed stretch as productive."""
        account, flops = self._account, self._account["flops"]
        account["step"] += 1
        account["samples"] += cost.samples
        account["tokens_seen"] += cost.tokens_seen
        account["tokens_predicted"] += cost.tokens_predicted
        account["hardware_flops"] += cost.hardware_flops
        for part in ("encoder", "decoder", "head", "total"):
            flops[part] += getattr(cost.flops, part)
        begin = self._mark
        self._claim("productive", begin)
        self.step_hours = self._ranks * (self._mark - begin) / 3600
        self._beat()

    @contextmanager
    def time(self, category: str) -> Iterator[None]:
        """Claims the seconds of a block for `category`; blocks do not nest."""
        begin = self._clock()
        try:
            yield
        finally:
            self._claim(category, begin)
            self._beat()

    def save(self) -> str:
        """Call before writing a checkpoint; returns the head that the checkpoint must carry."""
        return self.note("save")

    def note(self, event: str, **details: Any) -> str:
        """Appends a line, on disk when this returns; returns its hash."""
        assert event in EVENTS, event
        at = self._clock()
        account = self._statement(at)
        seconds = {name: round(value, 6) for name, value in self._seconds_at(at).items()}
        line = {
            "previous": self.head,
            "event": event,
            "time": round(at, 3),
            "device": self._device,
            "ranks": self._ranks,
            "seconds": seconds,
            **account,
            **details,
        }
        text = json.dumps(line).encode("ascii")
        with open(self._path, "ab") as file:
            file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.head, self._written = _hash(text), at
        return self.head

    def totals(self) -> dict[str, Any]:
        """What the run has spent up to now: the promised keys of ``tools.ledger total``."""
        return _totals(self._statement(self._clock()))

    def _claim(self, category: str, begin: float) -> None:
        assert begin >= self._mark, "stretches of time overlap"
        at = self._clock()
        self._seconds["idle"] += begin - self._mark
        self._seconds[category] += at - begin
        self._mark = at

    def _beat(self) -> None:
        if self._clock() - self._written >= HEARTBEAT:
            self.note("heartbeat")

    def _seconds_at(self, at: float) -> dict[str, float]:
        return {**self._seconds, "idle": self._seconds["idle"] + at - self._mark}

    def _statement(self, at: float) -> Line:
        """The account with the device-seconds of this attempt, up to `at`, added."""
        account = copy.deepcopy(self._account)
        spent = account["device_seconds"]
        for category, seconds in self._seconds_at(at).items():
            spent[category] = round(spent[category] + self._ranks * seconds, 6)
        spent["total"] = round(_sum(spent), 6)
        return account


# ---- the budget ----------------------------------------------------------------------------------


class Budget:
    """What a run may spend, in the one unit that its config gives; also the unit of its progress.

    Steps, tokens and FLOPs charge surviving work, so a killed run ends where an undisturbed one
    does; device-hours charge everything, over all attempts.
    """

    def __init__(self, budget: config.Budget, cost: StepCost) -> None:
        ((self.unit, self.total),) = (
            (unit, value) for unit, value in budget.model_dump().items() if value is not None
        )
        self._step = {"steps": 1, "tokens": cost.tokens_seen, "flops": cost.flops.total}

    def spent(self, ledger: Ledger) -> float:
        """In the budget's unit."""
        spent = ledger.totals()
        return {
            "steps": spent["steps"],
            "tokens": spent["tokens_seen"],
            "flops": spent["flops"]["total"],
            "device_hours": spent["device_seconds"]["total"] / 3600,
        }[self.unit]

    def progress(self, ledger: Ledger) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(1.0, self.spent(ledger) / self.total)

    def allows_step(self, ledger: Ledger) -> bool:
        """Whether one more update stays within the budget; its hours are taken to be those of the last."""
        next_step = self._step.get(self.unit, ledger.step_hours)
        return self.spent(ledger) + next_step <= self.total
