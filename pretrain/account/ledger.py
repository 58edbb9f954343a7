"""What a run has spent, over all its attempts.

`ledger.jsonl` is append-only; each line holds the hash of the line before, so that none can be
edited or dropped unnoticed, and each checkpoint holds the hash of the line of its own save.

The one idea: every line is a complete statement, so the last one is the account of the run. When
an attempt resumes from a checkpoint, the counters go back to that checkpoint's line and the
seconds of work since then move to `lost`: counters are of surviving work only, device-seconds are
all there ever were. A checkpoint carries the statement of its line too, so that a run goes on where
the ledger has lost lines: the gap is a line of its own, which takes that statement over.

`ledger_writer` keeps the ledger of a running attempt. Imports no torch.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pretrain.errors import UserError
from pretrain.files import parse_json

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


# ---- lines ---------------------------------------------------------------------------------------


def line_hash(text: bytes) -> str:
    """Return the hash of a line, which the next one holds."""
    return hashlib.sha256(text).hexdigest()


def ledger_path(run: str | Path) -> Path:
    """Return the file of a run's ledger."""
    return Path(run) / "ledger.jsonl"


def chain(run: str | Path) -> dict[str, LedgerLine]:
    """Hash -> line, oldest first; UserError names the first line that breaks the chain.

    A last line without an end is left out: it is being written, or was when the run was killed.
    """
    if not ledger_path(run).exists():
        raise UserError(f"{ledger_path(run)}: no such ledger; check the run's path")
    lines, wrong, _ = unbroken(ledger_path(run).read_bytes())
    if wrong:
        raise UserError(f"{ledger_path(run)}:{wrong}; restore the file")
    return lines


def unbroken(data: bytes) -> tuple[dict[str, LedgerLine], str, int]:
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
        head, size, before = line_hash(text), size + len(text) + 1, size
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
            raise UserError(f"{ledger_path(run)}:{number}: {wrong}; restore the file")
        before = line
    return len(lines)


def wrong_at_the_end(lines: dict[str, LedgerLine]) -> str:
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
            before = replace(before, **stated_values(stated))
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
        if abs(add_up(parts) - parts["total"]) > tolerance:
            return f"the parts of {name} do not add up to their total"
    elapsed = sum(line.seconds.values())
    if before.attempt == line.attempt:
        elapsed -= sum(before.seconds.values())
    if abs(spent["total"] - _reach(before) - line.ranks * elapsed) > tolerance:
        return "device_seconds are not ranks x elapsed seconds"
    if line.event == "resume":
        head = str(line.details.get("head", ""))
        branch = lines.get(head) if head else Statement()
        if not branch or counts(line) != counts(branch):
            return "the counters are not those of the line that it resumes from"
        lost = before.flops["total"] - branch.flops["total"]
    else:
        lost = 0
        if line.step == before.step and counts(line) != counts(before):
            return "the counters moved though no update was made"
    if line.lost_flops != before.lost_flops + lost:
        return "lost_flops are not those between the line before and the one that it resumes from"
    fell = [part for part, value in before.joules.items() if line.joules.get(part, 0.0) < value]
    rises = ("metered_device_seconds", "peak_bytes")
    fell += [name for name in rises if getattr(line, name) < getattr(before, name)]
    if line.event != "resume" and line.step < before.step:
        fell.append("step")
    return f"{fell[0]} went back" if fell else None


def counts(statement: Statement) -> dict[str, Any]:
    """Return the counters of surviving work, by name."""
    return {name: getattr(statement, name) for name in COUNTERS}


def add_up(parts: dict[str, Any]) -> Any:
    """Return what parts add up to, whose total stands among them."""
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
    begun, before = origin(lines)
    return [*before, (begun, statement_of(lines[next(reversed(lines))]))] if lines else []


def origin(lines: dict[str, LedgerLine]) -> tuple[str, Lineage]:
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
    return Statement(**sum_of(stated_values(left), stated_values(right), sign))


def sum_of(left: Any, right: Any, sign: int = 1) -> Any:
    """Return the sum of two values, or of each of two tables of them."""
    if isinstance(left, dict):
        return {name: sum_of(left.get(name, 0), right.get(name, 0), sign) for name in {**left, **right}}
    return _rounded(left + sign * right)


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def statement_of(line: Statement) -> Statement:
    """Return what a line states of the whole run."""
    return Statement(**stated_values(line))


def stated_values(line: Statement) -> dict[str, Any]:
    """Return the values of a statement, by name."""
    return {name: getattr(line, name) for name in _STATED}
