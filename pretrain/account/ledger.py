"""What a run has spent, over all its attempts.

`ledger.jsonl` is append-only; each line holds the hash of the line before, so that none can be
edited or dropped unnoticed, and each checkpoint holds the hash of the line of its own save.

The one idea: every line is a complete statement, so the last one is the account of the run. When
an attempt resumes from a checkpoint, the counters go back to that checkpoint's line and the
seconds of work since then move to `lost`: counters are of surviving work only, device-seconds are
all there ever were. A checkpoint carries the statement of its line too, so that a run goes on where
the ledger has lost lines: the gap is a line of its own, which takes that statement over.

The trap: nobody is told of a kill -9. A heartbeat every 10 s, also in the middle of a long stretch
(`start_heartbeat`), bounds what it hides.

Only rank 0 keeps the ledger. Imports no torch.
"""

import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pretrain.account.flops import StepCost
from pretrain.errors import UserError
from pretrain.files import named, parse_json, sync, truncate_torn_line

log = logging.getLogger(__name__)

CATEGORIES = ("productive", "evaluate", "checkpoint", "startup", "idle")
COUNTERS = (
    "step",
    "samples",
    "tokens_seen",
    "tokens_real",
    "tokens_predicted",
    "flops",
    "hardware_flops",
    "token_layers",
)
REPEATED = ("productive", "evaluate")  # what is done again after going back to a checkpoint
EVENTS = (
    "branch",  # before `start`: the run begins with the account of a checkpoint of another, of `trunk`
    "start",  # first attempt
    "resume",  # any other; `head` names the line it goes on from, `lost_steps` what it repeats
    "crash-detected",  # the attempt before ended without a word, or in an error
    "repaired",  # a torn last line was cut off; `torn` is what it held
    "gap",  # lines are lost: `found` says how, `stands_for` which were referred to, with what they stated
    "layout-change",  # other devices, ranks, parallelism or recomputation than in the attempt before
    "budget-change",
    "blend-change",  # another blend of corpora from here on
    "phase-change",  # another length or batch size from here on
    "heartbeat",
    "log",  # a line of metrics, at most one every 10 s
    "evaluate",
    "save",  # written just before the checkpoint that carries its hash
    "milestone",  # the same, before weights that stay
    "signal",
    "finish",  # the budget is spent
    "stop",  # ended early; start again
)
LAST_WORDS = ("finish", "stop")
HEARTBEAT = 10.0  # seconds
RECENT = 10  # updates
PULSE = 1.0  # seconds between two looks at the clock


@dataclass(frozen=True)
class Usage:
    """What was spent, by the names that both a line of the ledger and its totals have."""

    samples: int = 0
    tokens_seen: int = 0
    tokens_real: int = 0
    tokens_predicted: int = 0
    flops: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("encoder", "decoder", "head", "total"), 0)
    )
    """By part of the model, and their total."""
    hardware_flops: int = 0
    token_layers: float = 0.0
    lost_flops: int = 0
    device_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*CATEGORIES, "lost", "total"), 0.0)
    )
    """By what they went into, and their total."""
    metered_device_seconds: float = 0.0
    peak_bytes: int = 0
    """The most that a rank has held."""


@dataclass(frozen=True)
class Statement(Usage):
    """What a run has spent up to a line of its ledger, over all attempts; bare, before the first line.

    The fields are keys of the file.
    """

    attempt: int = 0
    step: int = 0
    joules: dict[str, float] = field(default_factory=dict)
    """By part of the hardware; {} where nothing was metered."""


Lineage = list[tuple[str, Statement]]
"""The statements that an account has gone through, its trunk's first: the hash of the first line of that
ledger, and the statement at which the next one begins, or the last."""


@dataclass(frozen=True)
class SavedAccount(Statement):
    """What a checkpoint carries: the statement of its line, and which ledger that was."""

    begun: str = ""
    """Hash of the ledger's first line."""
    trunk: Lineage = field(default_factory=list)
    """Of the run that it is a branch of."""


@dataclass(frozen=True)
class LedgerLine(Statement):
    """A line of a ledger; without values, what stands before the first."""

    previous: str = ""
    """Hash of the line before."""
    event: str = ""
    time: float = 0.0
    """Unix time."""
    device: str = ""
    """What each rank drives."""
    ranks: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    """Of this attempt, by category."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else the event says, by key of the file."""

    @property
    def stands_for(self) -> dict[str, Statement | None]:
        """Return the lines that are lost, or of the trunk, by hash: what they stated, if that is known."""
        return _STANDS_FOR.validate_python(self.details.get("stands_for", {}))

    @property
    def trunk(self) -> Lineage:
        """Return the lineage with which a branch begins."""
        return _LINEAGE.validate_python(self.details.get("trunk", []))

    def to_dict(self) -> dict[str, Any]:
        """Return the line as it stands in the file."""
        return {name: getattr(self, name) for name in _KEYS} | self.details


_STATED = [each.name for each in fields(Statement)]
_KEYS = dict.fromkeys(
    ["previous", "event", "time", "device", "ranks", "seconds", "attempt", "step", *_STATED]
)
_PARTS = {name: getattr(LedgerLine(), name).keys() for name in ("flops", "device_seconds", "seconds")}
_LINE, _LINEAGE = TypeAdapter(LedgerLine), TypeAdapter(Lineage)
_STANDS_FOR = TypeAdapter(dict[str, Statement | None])
S = TypeVar("S", bound=Statement)


@dataclass(frozen=True, kw_only=True)
class Totals(Usage):
    """What was spent: the promised keys of ``tools.ledger total``."""

    steps: int
    attempts: int
    joules: float | None
    """None where nothing was metered."""
    joules_by_part: dict[str, float]

    @property
    def flops_without_head(self) -> int:
        """Return the FLOPs of all but the head."""
        return self.flops["total"] - self.flops["head"]

    @property
    def device_hours(self) -> float:
        """Return the hours of all devices, for whatever they were."""
        return self.device_seconds["total"] / 3600

    @property
    def kwh(self) -> float | None:
        """Return the energy; None where nothing was metered."""
        return None if self.joules is None else self.joules / JOULES_PER_KWH


JOULES_PER_KWH = 3.6e6
_EPOCH = time.time() - time.monotonic()


def now() -> float:
    """Return the Unix time in seconds that never steps back, whatever is done to the system's clock."""
    return _EPOCH + time.monotonic()


_IMPORTED = now()


def process_start() -> float:
    """Return the Unix time at which this process started; without /proc, at which this module was
    imported."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")  # the name is any bytes
        fields = text.rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5): clock ticks after boot
        return now() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return _IMPORTED


def peak_resident() -> int:
    """Return the bytes of the host's memory that this process has held at its fullest.

    Not by `getrusage`, where /proc exists: a process's own count begins there with its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # a /proc without it is no full Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- lines ---------------------------------------------------------------------------------------


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _path(run: str | Path) -> Path:
    return Path(run) / "ledger.jsonl"


def chain(run: str | Path) -> dict[str, LedgerLine]:
    """Hash -> line, oldest first; UserError names the first line that breaks the chain.

    A last line without an end is left out: it is being written, or was when the run was killed.
    """
    if not _path(run).exists():
        raise UserError(f"{_path(run)}: no such ledger; check the run's path")
    lines, wrong, _ = _unbroken(_path(run).read_bytes())
    if wrong:
        raise UserError(f"{_path(run)}:{wrong}; restore the file")
    return lines


def _unbroken(data: bytes) -> tuple[dict[str, LedgerLine], str, int]:
    """Return the lines before a break of the chain, what is wrong with the next one, and their bytes."""
    lines: dict[str, LedgerLine] = {}
    head, size, before = "", 0, 0
    for number, text in enumerate(data.split(b"\n")[:-1], 1):
        try:
            line = _parse(text)
        except ValueError as error:
            return lines, f"{number}: {error}", size
        if line.previous != head:
            if lines:  # it may be that one which was changed
                lines.popitem()
            wrong = "does not follow from the line before, one of them was changed or taken out"
            return lines, f"{number}: {wrong}", before
        head, size, before = _hash(text), size + len(text) + 1, size
        lines[head] = line
    return lines, "", size


def _parse(text: bytes) -> LedgerLine:
    """Return the line that a text is; ValueError says what is wrong with it."""
    try:
        found = parse_json(text)
        details = {name: value for name, value in found.items() if name not in _KEYS}
        line = _LINE.validate_python({**found, "details": details})
        _ = found["previous"], line.stands_for, line.trunk
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not a line of a ledger") from None
    if missing := [name for name in _KEYS if name not in found]:
        raise ValueError(f"it has no {missing[0]}")
    for name, parts in _PARTS.items():
        if gone := parts - getattr(line, name).keys():
            raise ValueError(f"its {name} have no {min(gone)}")
    return line


def read(run: str | Path) -> list[LedgerLine]:
    """Return the lines of a run's ledger, as `chain` has them."""
    return list(chain(run).values())


def head(run: str | Path) -> str:
    """Return the hash of the newest line, which stands for all before it; "" for a ledger without a line."""
    return next(reversed(chain(run)), "")


def check(run: str | Path) -> int:
    """Return the number of lines; UserError names the first that breaks the chain, or that does not add
    up."""
    lines = chain(run)
    before, known = LedgerLine(), with_absent(lines)
    for number, line in enumerate(lines.values(), 1):
        if wrong := _contradiction(before, line, known):
            raise UserError(f"{_path(run)}:{number}: {wrong}; restore the file")
        before = line
    return len(lines)


def _wrong_at_the_end(lines: dict[str, LedgerLine]) -> str:
    """Return what is wrong with the last line, which no hash holds yet; "" if nothing is."""
    *_, before, last = [LedgerLine(), LedgerLine(), *lines.values()]
    wrong = _contradiction(before, last, with_absent(lines)) if lines else None
    return f"{len(lines)}: {wrong}" if wrong else ""


# ---- lines that are elsewhere: lost, or of the run that a branch begins from


def with_absent(lines: dict[str, LedgerLine]) -> dict[str, Statement | None]:
    """Return the lines, and those for which a gap or a branch stands: what they stated, if that is known."""
    absent = [line.stands_for for line in lines.values()]
    return {**{head: stated for each in absent for head, stated in each.items()}, **lines}


def taken_over(before: S, stands_for: Mapping[str, Statement | None]) -> S:
    """Return the statement from which a line goes on: that of a line it stands for, if that is further on."""
    for stated in stands_for.values():
        if stated and _reach(stated) > _reach(before):
            before = replace(before, **_stated(stated))
    return before


def _reach(statement: Statement) -> float:
    """Device-seconds, which never fall."""
    return statement.device_seconds["total"]


def missing(lines: dict[str, LedgerLine], head: str, account: Statement | None) -> str:
    """Say why a ledger has no line `head`, which stated `account`; "" if it has, or a gap stands for it.

    A ledger that lost its end does not reach as far as that line; one that does has other lines there.
    """
    if head in with_absent(lines):
        return ""
    if account is None:
        return "was cut off, or changed"
    reach, before = _reach(account), 0.0
    for line in lines.values():
        if line.event == "gap" and before < reach <= _reach(line):
            return ""
        before = _reach(line)
    return "was cut off before it" if reach > before else "was changed: it goes on without it"


def gaps(lines: Iterable[LedgerLine]) -> list[str]:
    """Return a sentence for each gap of a ledger."""
    return [
        f"line {number} notes a gap: the ledger {line.details['found']}; the account goes on from what is"
        f" known of step {line.step}"
        for number, line in enumerate(lines, 1)
        if line.event == "gap"
    ]


# ---- what must hold


def _contradiction(before: LedgerLine, line: LedgerLine, lines: Mapping[str, Statement | None]) -> str | None:
    """Return what in a line contradicts itself or the one before it; lines: with those that are elsewhere."""
    before = taken_over(before, line.stands_for)
    if before.event in LAST_WORDS and line.attempt == before.attempt:
        return "it follows the last word of its attempt"
    spent, tolerance = line.device_seconds, 1e-4 * line.ranks
    for name, parts in (("flops", line.flops), ("device_seconds", spent)):
        if abs(_sum(parts) - parts["total"]) > tolerance:
            return f"the parts of {name} do not add up to their total"
    elapsed = sum(line.seconds.values())
    if before.attempt == line.attempt:
        elapsed -= sum(before.seconds.values())
    if abs(spent["total"] - _reach(before) - line.ranks * elapsed) > tolerance:
        return "device_seconds are not ranks x elapsed seconds"
    if line.event == "resume":
        head = str(line.details.get("head", ""))
        branch = lines.get(head) if head else Statement()
        if not branch or _counts(line) != _counts(branch):
            return "the counters are not those of the line that it resumes from"
        lost = before.flops["total"] - branch.flops["total"]
    else:
        lost = 0
        if line.step == before.step and _counts(line) != _counts(before):
            return "the counters moved though no update was made"
    if line.lost_flops != before.lost_flops + lost:
        return "lost_flops are not those between the line before and the one that it resumes from"
    fell = [part for part, value in before.joules.items() if line.joules.get(part, 0.0) < value]
    rises = ("metered_device_seconds", "peak_bytes")
    fell += [name for name in rises if getattr(line, name) < getattr(before, name)]
    if line.event != "resume" and line.step < before.step:
        fell.append("step")
    return f"{fell[0]} went back" if fell else None


def _counts(statement: Statement) -> dict[str, Any]:
    return {name: getattr(statement, name) for name in COUNTERS}


def _sum(parts: dict[str, Any]) -> Any:
    return sum(value for name, value in parts.items() if name != "total")


def as_totals(line: Statement) -> Totals:
    """Return what a statement amounts to."""
    usage = {each.name: getattr(line, each.name) for each in fields(Usage)}
    joules = _rounded(sum(line.joules.values())) if line.joules else None
    return Totals(**usage, steps=line.step, attempts=line.attempt, joules=joules, joules_by_part=line.joules)


def total(runs: Iterable[str | Path]) -> Totals:
    """Return what the runs spent together; `peak_bytes` is the largest.

    What several have in common, as a trunk and its branches, is counted once, as far as any of them went.
    """
    parts: dict[str, tuple[Statement, Statement]] = {}
    for run in runs:
        before = Statement()
        for begun, after in lineage(run):
            if begun not in parts or _reach(after) > _reach(parts[begun][1]):
                parts[begun] = before, after
            before = after
    spent = Statement()
    for before, after in parts.values():
        peak = max(spent.peak_bytes, after.peak_bytes)
        spent = replace(_add(spent, since(before, after)), peak_bytes=peak)
    return as_totals(spent)


def effective_share(totals: Totals) -> float | None:
    """Return the effective training time ratio (ETTR): the device-seconds of updates that survived over all
    that were spent; None where none were."""
    spent = totals.device_seconds
    return spent["productive"] / spent["total"] if spent["total"] else None


def lineage(run: str | Path) -> Lineage:
    """Return the lineage of a run's account, up to its last line."""
    lines = chain(run)
    begun, before = _origin(lines)
    return [*before, (begun, statement_of(lines[next(reversed(lines))]))] if lines else []


def _origin(lines: dict[str, LedgerLine]) -> tuple[str, Lineage]:
    """Return the hash of a ledger's first line, of the one that was lost if a gap is the first now, and the
    lineage of the trunk that it says."""
    head, first = next(iter(lines.items()), ("", LedgerLine()))
    return first.details.get("begun", head), first.trunk


def trunk(run: str | Path, head: str, account: Statement) -> Lineage:
    """Return the lineage with which a branch begins, at a checkpoint of `run` with that head and account; one
    whose ledger cannot be read is known by the head."""
    try:
        *before, (begun, _) = lineage(run)
    except (UserError, ValueError):
        before, begun = [], head
    return [*before, (begun, statement_of(account))]


def since(before: Statement, after: Statement) -> Statement:
    """Return what was spent between two statements; the peak is that of the later one."""
    return replace(_add(after, before, -1), peak_bytes=after.peak_bytes)


def _add(left: Statement, right: Statement, sign: int = 1) -> Statement:
    return Statement(**_sum_of(_stated(left), _stated(right), sign))


def _sum_of(left: Any, right: Any, sign: int = 1) -> Any:
    if isinstance(left, dict):
        return {name: _sum_of(left.get(name, 0), right.get(name, 0), sign) for name in {**left, **right}}
    return _rounded(left + sign * right)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def statement_of(line: Statement) -> Statement:
    """Return what a line states of the whole run."""
    return Statement(**_stated(line))


def _stated(line: Statement) -> dict[str, Any]:
    return {name: getattr(line, name) for name in _STATED}


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
        self._torn = truncate_torn_line(self._path)
        self._lines, self._wrong = self._keep_unbroken()
        self._last = next(reversed(self._lines.values()), None)
        self._begun, self._trunk = _origin(self._lines)
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
        if not _path(run).exists():
            _path(run).touch()
            sync(Path(run))
        return cls(run, ranks, device, clock, process_start() if started is None else started)

    def _keep_unbroken(self) -> tuple[dict[str, LedgerLine], str]:
        """Cut off what follows a break of the chain, with the whole file kept beside; return the lines that
        are left, and what is wrong with the one after them."""
        data = self._path.read_bytes()
        lines, wrong, size = _unbroken(data)
        if not wrong and (wrong := _wrong_at_the_end(lines)):
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
            origin = {}
            if account and account.begun and not self.head:  # all of the ledger is gone
                origin = {"begun": account.begun, "trunk": account.trunk}
            self.note("gap", stands_for=lost, found=found, phase=phase, **origin)
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
        self._account = replace(account, lost_flops=lost, device_seconds=spent, **_counts(branch))

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
                **_stated(self._stated),
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
                self._begun, self._trunk = _origin({_hash(text): line})
            self.head, self._written = _hash(text), at
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
        return SavedAccount(**_stated(self._stated), begun=self._begun, trunk=self._trunk)

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
        spent["total"] = round(_sum(spent), 6)
        joules, metered = _sum_of(self._account.joules, self._joules), self._account.metered_device_seconds
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
