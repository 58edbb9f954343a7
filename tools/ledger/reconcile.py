"""A run's ledger against Slurm's own account of its jobs: where each device-second of an allocation went.

Slurm counts devices from a job's start to its end, the ledger ranks from a process's start to
its last line; so the difference is what lies before, between and after the attempts, devices that no rank
drove, and whole jobs that reached no ledger. These parts add up to Slurm's figure, and what remains is its
rounding to whole seconds.

Jobs are those that the ledger and the run's journal name: a job that ended before its first line, and the
corpus, evaluation, export and report of a pipeline, are paid for as well.

Slurm is asked in the order of what it can say: sacct (slurmdbd), `sacct --completion` (the job completion
file), scontrol (jobs of the last minutes). A requeued job keeps its number, so `--duplicates`.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.account import ledger, process
from pretrain.errors import UserError
from pretrain.terminal import wrapped
from tools.shared import journal
from tools.shared.tables import aligned

FIELDS = ("JobIDRaw", "State", "Start", "End", "AllocTRES")
SACCT = (
    "sacct",
    "--allocations",
    "--duplicates",
    "--noheader",
    "--parsable2",
    "--format=" + ",".join(FIELDS),
)
COMPLETION = ("sacct", "--completion", "--noheader", "--parsable2", "--format=JobID,State,Start,End,NNodes")
SCONTROL = ("scontrol", "--oneliner", "show", "job")


EXPLAINED = ("ledger", "before", "between", "after", "undriven", "unledgered")
PARTS = ("slurm", *EXPLAINED, "rest")


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to a job, once."""

    job: str
    state: str
    start: float
    """Unix time."""
    end: float
    gpus: int | None
    """None where Slurm does not say, or gave none."""
    nodes: int


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
    stage: str
    state: str
    devices: int
    device: str
    """What is counted: GPUs; without, ranks; where no rank ran, nodes."""
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
    unledgered: float
    """All of an allocation in which no ledger was written."""

    @property
    def rest(self) -> float:
        """What is not explained: Slurm counts whole seconds."""
        return self.slurm - sum(getattr(self, part) for part in EXPLAINED)


# ---- the ledger's side ---------------------------------------------------------------------------


def attempts(lines: Sequence[ledger.LedgerLine]) -> list[Attempt]:
    """Return the attempts of a run, in order; `job` is "" outside of Slurm."""
    by_number: dict[int, list[ledger.LedgerLine]] = {}
    for line in lines:
        by_number.setdefault(line.attempt, []).append(line)
    return [_attempt(number, own) for number, own in by_number.items()]


def _attempt(number: int, lines: Sequence[ledger.LedgerLine]) -> Attempt:
    last = lines[-1]
    jobs = [line.details["job"].get("job_id", "") for line in lines if "job" in line.details]
    return Attempt(
        number,
        jobs[0] if jobs else "",
        last.time - sum(last.seconds.values()),
        last.time,
        last.ranks,
        last.event in ledger.LAST_WORDS,
    )


# ---- Slurm's side --------------------------------------------------------------------------------


def allocations(jobs: Sequence[str]) -> tuple[str, list[Allocation]]:
    """Return (where it comes from, what Slurm says of these jobs); UserError if it has nothing to say."""
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
        done = subprocess.run(
            command, env=environ, capture_output=True, encoding="utf-8", errors="replace", timeout=60
        )
    except FileNotFoundError:
        return "", f"{command[0]}: no such command"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]}: no answer"
    return done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


_LINE = re.compile(
    r"(?P<job>[^|]+)\|(?P<state>[A-Z_]+)[^|]*\|(?P<start>[^|]*)\|(?P<end>[^|]*)(\|(?P<tres>.*))?"
)


def read_sacct(text: str, source: str = "sacct") -> list[Allocation]:
    """Return the allocations in the output of `SACCT` or `COMPLETION`; one that has not begun is left out."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = _LINE.fullmatch(line)
        if not words:
            raise UserError(f"{source}:{number}: expected {'|'.join(FIELDS)}; save what {SACCT[0]} prints")
        if (begin := _time(words["start"])) is not None:
            end, tres = _time(words["end"]) or process.now(), words["tres"] or ""
            found.append(Allocation(words["job"], words["state"], begin, end, _gpus(tres), _nodes(tres)))
    return found


def read_scontrol(text: str) -> list[Allocation]:
    """Return the allocations in the output of `SCONTROL`."""
    found = []
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        begin = _time(words.get("StartTime", ""))
        if begin is not None and words["JobState"] != "PENDING":  # whose start is a forecast
            tres, state = words.get("AllocTRES") or words.get("TRES", ""), words["JobState"]
            end = (_time(words.get("EndTime", "")) if state != "RUNNING" else None) or process.now()
            found.append(Allocation(words["JobId"], state, begin, end, _gpus(tres), _nodes(tres)))
    return found


def _gpus(tres: str) -> int | None:
    """GPUs in a list of resources; None without. Some sites count them by type, or in both ways."""
    counts = re.findall(r"(?:^|,)gres/gpu(:[^=,]+)?=(\d+)", tres)
    untyped = [int(count) for kind, count in counts if not kind]
    return sum(untyped or [int(count) for _, count in counts]) or None


def _nodes(tres: str) -> int:
    """Nodes in a list of resources, or the bare number of `COMPLETION`; 1 where Slurm does not say."""
    count = re.search(r"(?:^|,)(?:node=)?(\d+)(?:,|$)", tres)
    return int(count[1]) if count else 1


def _time(text: str) -> float | None:
    """Unix time of sacct's (seconds, as asked for) or of a local date; None for "Unknown"."""
    if text.isdecimal():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


# ---- both ----------------------------------------------------------------------------------------


def accounts(
    given: Sequence[Allocation], made: Sequence[Attempt], stages: Mapping[str, str] | None = None
) -> list[Account]:
    """Return where the device-seconds of each allocation went; `stages`: of the jobs that did not train."""
    return [
        _account(
            one,
            [a for a in made if a.job == one.job and _inside(a, one)],
            (stages or {}).get(one.job, "train"),
        )
        for one in given
    ]


def _inside(attempt: Attempt, allocation: Allocation) -> bool:
    """Its middle lies in the allocation: Slurm's seconds are whole, and clocks differ a little."""
    return allocation.start <= (attempt.begin + attempt.end) / 2 <= allocation.end + 1


def _account(given: Allocation, made: Sequence[Attempt], stage: str) -> Account:
    devices, device = _devices(given, made)
    elapsed = given.end - given.start
    explained = _explained(given, made, devices) if made else {"unledgered": devices * elapsed}
    return Account(
        job=given.job,
        stage=stage,
        state=given.state,
        devices=devices,
        device=device,
        slurm=devices * elapsed,
        **{**dict.fromkeys(EXPLAINED, 0.0), **explained},
    )


def _devices(given: Allocation, made: Sequence[Attempt]) -> tuple[int, str]:
    """How many there are, of what."""
    if given.gpus:
        return given.gpus, "GPU"
    return (max(attempt.ranks for attempt in made), "rank") if made else (given.nodes, "node")


def _explained(given: Allocation, made: Sequence[Attempt], devices: int) -> dict[str, float]:
    """Device-seconds of an allocation in which there were attempts."""
    spent = sum(attempt.ranks * (attempt.end - attempt.begin) for attempt in made)
    run = sum(attempt.end - attempt.begin for attempt in made)
    return {
        "ledger": spent,
        "before": devices * max(0.0, made[0].begin - given.start),
        "between": devices * (made[-1].end - made[0].begin - run),
        "after": devices * max(0.0, given.end - made[-1].end),
        "undriven": devices * run - spent,
    }


def _read(run: str) -> list[Attempt]:
    """The attempts of a run; none where its jobs ended before it had a ledger."""
    if journal.read(run) and not (Path(run) / "ledger.jsonl").exists():
        return []
    return attempts(ledger.read(run))


def reconcile(runs: Sequence[str], saved: str | None = None) -> tuple[Any, str]:
    """Return the accounts of the runs' jobs as a document and as text; `saved`: a file with `SACCT`'s
    output."""
    made = [attempt for run in runs for attempt in _read(run)]
    stages = {line["job"]: line["stage"] for run in runs for line in journal.read(run)}
    jobs = list(dict.fromkeys([*stages, *(attempt.job for attempt in made if attempt.job)]))
    if not jobs:
        raise UserError(f"{', '.join(runs)}: no attempt ran in a Slurm job; there is nothing to compare")
    if saved:
        text = Path(saved).read_text(encoding="utf-8", errors="replace")
        source, given = saved, [one for one in read_sacct(text, saved) if one.job in jobs]
    else:
        source, given = allocations(jobs)
    found = accounts(given, made, stages)
    outside = sum(a.ranks * (a.end - a.begin) for a in made if not a.job)
    missing = [job for job in jobs if job not in {one.job for one in given}]
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


def _text(document: dict[str, Any], found: Sequence[Account]) -> str:
    rows = [["job", "stage", "state", "devices", *PARTS]]
    for one in found:
        rows.append([one.job, one.stage, one.state, f"{one.devices} {one.device}", *_cells([one])])
    if len(found) > 1:
        rows += _sums(found)
    notes = [
        f"Device-hours; Slurm's from {document['source']}.",
        f"slurm = {' + '.join(EXPLAINED)} + rest.",
        "before: from the job's start to the run's first process; between: from one attempt to the next;",
        "after: from the ledger's last line to the job's end; undriven: allocated devices without a rank;",
        "unledgered: jobs, or starts of them, that wrote no ledger; rest: Slurm counts whole seconds.",
        "A device is a GPU; in a job without GPUs a rank; where no rank ran either, a node.",
    ]
    if outside := document["outside_of_slurm"]:
        notes.append(f"Outside of Slurm the ledger has {_hours(outside)} device-hours more.")
    if forgotten := document["forgotten_by_slurm"]:
        notes.append(
            f"The ledger has {_hours(forgotten)} device-hours more in jobs, or starts of requeued jobs, that"
            " Slurm no longer knows (without slurmdbd it forgets)."
        )
    if missing := document["missing_jobs"]:
        notes.append(f"Slurm has no record that job {', '.join(missing)} began.")
    return "\n".join([aligned(rows, names=2), *map(wrapped, notes)])


def _sums(found: Sequence[Account]) -> list[list[str]]:
    """One row, or two where GPUs and other devices were given: nobody is billed for them at one price."""
    kinds = {
        "GPUs": [one for one in found if one.device == "GPU"],
        "no GPUs": [one for one in found if one.device != "GPU"],
    }
    present = {name: some for name, some in kinds.items() if some}
    return [
        ["all", "", name if len(present) > 1 else "", "", *_cells(some)] for name, some in present.items()
    ]


def _cells(found: Sequence[Account]) -> list[str]:
    return [_hours(sum(getattr(one, part) for one in found)) for part in PARTS]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.4f}"
