"""A run's ledger against Slurm's own account of its jobs: where each device-second of an allocation went.

The one idea: Slurm counts devices from a job's start to its end, the ledger ranks from a process's start to
its last line; so the difference is what lies before, between and after the attempts, and devices that no rank
drove. These parts add up to Slurm's figure, and what remains is its rounding to whole seconds.

Slurm is asked in the order of what it can say: sacct (slurmdbd), `sacct --completion` (the job completion
file), scontrol (jobs of the last minutes). The trap: a requeued job keeps its number, so `--duplicates`.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain import ledger
from pretrain.config import UserError
from tools.tables import aligned

FIELDS = ("JobIDRaw", "State", "Start", "End", "AllocTRES")
SACCT = (
    "sacct",
    "--allocations",
    "--duplicates",
    "--noheader",
    "--parsable2",
    "--format=" + ",".join(FIELDS),
)
COMPLETION = ("sacct", "--completion", "--noheader", "--parsable2", "--format=JobID,State,Start,End")
SCONTROL = ("scontrol", "--oneliner", "show", "job")


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to a job, once."""

    job: str
    state: str
    start: float
    """Unix time."""
    end: float
    gpus: int | None
    """None where Slurm does not say, or gave none: then a rank is a device."""


@dataclass(frozen=True)
class Attempt:
    """What the ledger says of one start of a run."""

    number: int
    job: str
    begin: float
    """Unix time of the process's start."""
    end: float
    """Of the last line."""
    ranks: int
    told: bool
    """Whether it said that it ended."""


@dataclass(frozen=True)
class Account:
    """Device-seconds of one allocation."""

    job: str
    state: str
    devices: int
    slurm: float
    ledger: float
    before: float
    """From the job's start to the first process's: prolog, script, container, launcher."""
    between: float
    """From one attempt to the next in the same allocation."""
    after: float
    """From the last line to the job's end: leaving, or what a kill hid."""
    undriven: float
    """Devices that no rank drove, while ranks ran."""

    @property
    def rest(self) -> float:
        """What is not explained: Slurm counts whole seconds."""
        return self.slurm - self.ledger - self.before - self.between - self.after - self.undriven


# ---- the ledger's side ---------------------------------------------------------------------------


def attempts(lines: Sequence[ledger.Line]) -> list[Attempt]:
    """The attempts of a run, in order; `job` is "" outside of Slurm."""
    by_number: dict[int, list[ledger.Line]] = {}
    for line in lines:
        by_number.setdefault(line["attempt"], []).append(line)
    return [_attempt(number, own) for number, own in by_number.items()]


def _attempt(number: int, lines: Sequence[ledger.Line]) -> Attempt:
    last = lines[-1]
    jobs = [line["job"].get("job_id", "") for line in lines if "job" in line]
    return Attempt(
        number,
        jobs[0] if jobs else "",
        last["time"] - sum(last["seconds"].values()),
        last["time"],
        last["ranks"],
        last["event"] in ledger.LAST_WORDS,
    )


# ---- Slurm's side --------------------------------------------------------------------------------


def allocations(jobs: Sequence[str]) -> tuple[str, list[Allocation]]:
    """(where it comes from, what Slurm says of these jobs); UserError if it has nothing to say."""
    wanted = f"--jobs={','.join(jobs)}"
    environ = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    text, complaint = _ask((*SACCT, wanted), environ)
    if found := read_sacct(text):
        return "sacct", found
    text, _ = _ask((*COMPLETION, wanted), environ)
    if found := read_sacct(text):
        return "sacct --completion", found
    texts = [_ask((*SCONTROL, job), environ)[0] for job in jobs]
    if found := [one for text in texts for one in read_scontrol(text)]:
        return "scontrol", found
    raise UserError(
        f"Slurm knows nothing of job {', '.join(jobs)} ({complaint or 'no record'}); ask where the job ran,"
        " or save sacct's words there and give them with --sacct FILE"
    )


def _ask(command: Sequence[str], environ: dict[str, str]) -> tuple[str, str]:
    """Output and the last line of complaint."""
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "", f"{command[0]}: no such command"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]}: no answer"
    return done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


_LINE = re.compile(
    r"(?P<job>[^|]+)\|(?P<state>[A-Z_]+)[^|]*\|(?P<start>[^|]*)\|(?P<end>[^|]*)(\|(?P<tres>.*))?"
)


def read_sacct(text: str, source: str = "sacct") -> list[Allocation]:
    """The allocations in the output of `SACCT` or `COMPLETION`; one that has not begun is left out."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = _LINE.fullmatch(line)
        if not words:
            raise UserError(f"{source}:{number}: expected {'|'.join(FIELDS)}; save what {SACCT[0]} prints")
        if (begin := _time(words["start"])) is not None:
            end = _time(words["end"]) or ledger.now()
            found.append(Allocation(words["job"], words["state"], begin, end, _gpus(words["tres"] or "")))
    return found


def read_scontrol(text: str) -> list[Allocation]:
    """The allocations in the output of `SCONTROL`."""
    found = []
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        begin = _time(words.get("StartTime", ""))
        if begin is not None and words["JobState"] != "PENDING":  # whose start is a forecast
            gpus = _gpus(words.get("AllocTRES") or words.get("TRES", ""))
            end = _time(words.get("EndTime", "")) if words["JobState"] != "RUNNING" else None
            found.append(Allocation(words["JobId"], words["JobState"], begin, end or ledger.now(), gpus))
    return found


def _gpus(tres: str) -> int | None:
    """GPUs in a list of resources; None without. Some sites count them by type, or in both ways."""
    counts = re.findall(r"(?:^|,)gres/gpu(:[^=,]+)?=(\d+)", tres)
    untyped = [int(count) for kind, count in counts if not kind]
    return sum(untyped or [int(count) for _, count in counts]) or None


def _time(text: str) -> float | None:
    """Unix time of sacct's (seconds, as asked for) or of a local date; None for "Unknown"."""
    if text.isdecimal():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


# ---- both ----------------------------------------------------------------------------------------


def accounts(given: Sequence[Allocation], made: Sequence[Attempt]) -> list[Account]:
    """Where the device-seconds of each allocation went."""
    return [_account(one, [a for a in made if a.job == one.job and _inside(a, one)]) for one in given]


def _inside(attempt: Attempt, allocation: Allocation) -> bool:
    """Its middle lies in the allocation: Slurm's seconds are whole, and clocks differ a little."""
    return allocation.start <= (attempt.begin + attempt.end) / 2 <= allocation.end + 1


def _account(given: Allocation, made: Sequence[Attempt]) -> Account:
    devices = given.gpus or max((attempt.ranks for attempt in made), default=0)
    spent = sum(attempt.ranks * (attempt.end - attempt.begin) for attempt in made)
    run = sum(attempt.end - attempt.begin for attempt in made)
    elapsed = given.end - given.start
    before = max(0.0, made[0].begin - given.start) if made else elapsed
    after = max(0.0, given.end - made[-1].end) if made else 0.0
    between = made[-1].end - made[0].begin - run if made else 0.0
    return Account(
        job=given.job,
        state=given.state,
        devices=devices,
        slurm=devices * elapsed,
        ledger=spent,
        before=devices * before,
        between=devices * between,
        after=devices * after,
        undriven=devices * run - spent,
    )


def reconcile(runs: Sequence[str], saved: str | None = None) -> tuple[Any, str]:
    """The accounts of the runs' jobs as a document and as text; `saved`: a file with `SACCT`'s output."""
    made = [attempt for run in runs for attempt in attempts(ledger.read(run))]
    jobs = list(dict.fromkeys(attempt.job for attempt in made if attempt.job))
    if not jobs:
        raise UserError(f"{', '.join(runs)}: no attempt ran in a Slurm job; there is nothing to compare")
    if saved:
        text = Path(saved).read_text(encoding="utf-8", errors="replace")
        source, given = saved, read_sacct(text, saved)
        given = [one for one in given if one.job in jobs]
    else:
        source, given = allocations(jobs)
    found = accounts(given, made)
    outside = sum(a.ranks * (a.end - a.begin) for a in made if not a.job)
    missing = sorted(set(jobs) - {one.job for one in given})
    forgotten = sum(
        a.ranks * (a.end - a.begin)
        for a in made
        if a.job and not any(a.job == one.job and _inside(a, one) for one in given)
    )
    document = {
        "source": source,
        "jobs": [{**asdict(one), "rest": one.rest} for one in found],
        "outside_of_slurm": outside,
        "forgotten_by_slurm": forgotten,
        "missing_jobs": missing,
    }
    return document, _text(document, found)


PARTS = ("slurm", "ledger", "before", "between", "after", "undriven", "rest")


def _text(document: dict[str, Any], found: Sequence[Account]) -> str:
    rows = [["job", "state", "devices", *PARTS]]
    for one in found:
        rows.append([one.job, one.state, str(one.devices), *(_hours(getattr(one, part)) for part in PARTS)])
    if len(found) > 1:
        rows.append(["all", "", "", *(_hours(sum(getattr(one, part) for one in found)) for part in PARTS)])
    notes = [
        f"Device-hours; Slurm's from {document['source']}.",
        "slurm = ledger + before + between + after + undriven + rest.",
        "before: from the job's start to the run's first process; between: from one attempt to the next;",
        "after: from the ledger's last line to the job's end; undriven: allocated devices without a rank;",
        "rest: Slurm counts whole seconds.",
    ]
    if outside := document["outside_of_slurm"]:
        notes.append(f"Outside of Slurm the ledger has {_hours(outside)} device-hours more.")
    if forgotten := document["forgotten_by_slurm"]:
        notes.append(
            f"The ledger has {_hours(forgotten)} device-hours more in jobs, or starts of requeued jobs, that"
            " Slurm no longer knows (without slurmdbd it forgets)."
        )
    if missing := document["missing_jobs"]:
        notes.append(f"Slurm has no record of job {', '.join(missing)}.")
    return "\n".join([aligned(rows), *notes])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.4f}"
