"""How the jobs of runs stand: ``python -m slurm.submit --status [RUN...]``.

The queue knows what is alive and what ended lately; the journal knows the rest, also after Slurm has
forgotten it. A job that neither can account for is called vanished. Slurm forgets the tasks of an
array one by one, the failed ones too, so that only what is done on disk tells how those ended.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder
from pretrain.terminal import wrapped
from slurm import scheduler
from slurm.scheduler import Seen
from tools.shared import journal
from tools.shared.tables import aligned

ENDED = ("finished", "failed", "cancelled", "preempted", "vanished")
"""The states in which a stage may be submitted again; an array is in one if all of its tasks are."""
_WORDS = {
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
    "FAILED": "failed",
    "TIMEOUT": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}
NAMED_COMMANDS = 5
"""Failed commands of an array that are named."""


@dataclass(frozen=True)
class LoggedProgress:
    """How far a run is, by what it logged; None before its first log."""

    step: int | None = None
    progress: float | None = None
    """Share of the budget."""
    slots_per_second: float | None = None
    seconds_left: int | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageStatus(LoggedProgress):
    """A stage of a run: its newest job, and how that stands."""

    run: str
    stage: str
    job: str
    jobs: list[str]
    """Of an array, also those that took a task's place."""
    state: str
    tasks: dict[str, int] | None
    """Of an array, by state."""
    attempts: int | None
    message: str


def rows(runs: Sequence[Path]) -> list[StageStatus]:
    """Return one for each stage of each run: its newest job, its state and, for training, how far it is."""
    journals = {run: journal.read(run) for run in runs}
    newest = {run: newest_jobs(lines) for run, lines in journals.items()}
    seen = scheduler.query([job for stages in newest.values() for jobs in stages.values() for job in jobs])
    return [
        _row(run, stage, jobs, journals[run], [one for job in jobs for one in seen.get(job, [])])
        for run, stages in newest.items()
        for stage, jobs in stages.items()
    ]


def newest_jobs(lines: list[journal.Line]) -> dict[str, list[str]]:
    """Stage -> the id of its last job; of an array, also the jobs that took a task's place.

    A job that somebody submitted by hand is known from when it begins.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        if line["event"] in ("submit", "begin"):
            before = found.get("array", []) if line["stage"] == "array" and "instead_of" in line else []
            found[line["stage"]] = [*before, line["job"]]
    return found


def _row(run: Path, stage: str, jobs: list[str], lines: list[journal.Line], seen: list[Seen]) -> StageStatus:
    mine = [line for line in lines if line["stage"] == stage]
    if stage == "array":
        words = tasks(run, mine, seen)
        counted, said = Counter(words), failed(run, words)
    else:
        counted = Counter(state(one) for one in seen) or Counter([forgotten(mine, jobs[0])])
        said = ""
    return StageStatus(
        run=str(run),
        stage=stage,
        job=jobs[0],
        jobs=jobs,
        state=worst(counted),
        tasks=dict(counted) if stage == "array" else None,
        attempts=sum(line["event"] == "begin" for line in mine) or None,
        message=said or message(run, stage, mine, seen),
        **vars(training(run) if stage == "train" else LoggedProgress()),
    )


def worst(counted: Counter[str]) -> str:
    """Return one state for all tasks of an array: a live one if there is any, finished only if all are."""
    return min(counted, key=lambda name: (name in ENDED, name == "finished", -counted[name]))


def state(seen: Seen) -> str:
    """Return one word for people."""
    if seen.state == "PENDING":
        if seen.reason.startswith("JobHeld"):
            return "held"
        return "requeued" if seen.restarts else "pending"
    return _WORDS.get(seen.state, seen.state.lower())


def tasks(run: Path, lines: list[journal.Line], seen: list[Seen]) -> list[str]:
    """Return how each task of an array stands, by what the queue knows of it and what is done on disk."""
    count, done = commands(run)
    words = {int(one.job.partition("_")[2]): state(one) for one in seen}  # who took a task's place comes last
    events = [line["event"] for line in lines if line["event"] in ("submit", "cancel")]
    unknown = "cancelled" if events[-1] == "cancel" else "failed"
    size = min(count, scheduler.MAX_ARRAY)
    return [
        "finished"
        if words.get(task) in (None, *ENDED) and done.issuperset(range(task, count, size))
        else words.get(task, unknown)
        for task in range(size)
    ]


def commands(run: Path) -> tuple[int, set[int]]:
    """Return how many an array has, and the numbers (from 0) of those that are done."""
    here = run / "slurm"
    count = (here / "commands.txt").read_text(encoding="utf-8").count("\n")
    return count, {int(path.name) for path in (here / "done").iterdir()}


def failed(run: Path, words: Sequence[str]) -> str:
    """Return which commands of an array its failed tasks have left undone, the first few by their lines."""
    count, done = commands(run)
    left = [str(n + 1) for n in range(count) if n not in done and words[n % len(words)] == "failed"]
    few = [*left[:NAMED_COMMANDS], "..."] if len(left) > NAMED_COMMANDS else left
    return f"failed in commands.txt: line {', '.join(few)}" if few else ""


def forgotten(lines: list[journal.Line], job: str) -> str:
    """Return the state of a job that the queue does not know any more, by what it wrote itself."""
    mine = [line for line in lines if line["job"] == job]
    codes = [line["code"] for line in mine if line["event"] == "exit"]
    if any(line["event"] == "cancel" for line in mine):  # its script may have said something after that
        return "cancelled"
    return "vanished" if not codes else "failed" if codes[-1] else "finished"


def message(run: Path, stage: str, lines: list[journal.Line], seen: list[Seen]) -> str:
    """Return the last thing worth knowing: why it waits, or what the run or its last attempt said."""
    ends = [line for line in lines if line["event"] == "end"]
    words = [one.reason for one in seen[:1] if one.reason not in ("None", "BeginTime")]
    told = RunFolder(run).status() if stage == "train" else {}
    if told.get("state") == "running" and (stalled := told.get("stalled")):
        words.append(stands(stalled))
    elif ends:
        words.append(ends[-1]["reason"])
    elif reason := told.get("reason"):
        words.append(reason)
    return "; ".join(words)


def stands(stalled: Mapping[str, Any]) -> str:
    """Return how long a run has stood still, and where."""
    minutes = (time.time() - stalled["since"]) / 60
    where = stalled["where"].partition(" (")[0]
    return f"stalled {minutes:.0f} min in {where} on {', '.join(stalled['hosts']) or 'every node'}"


def training(run: Path) -> LoggedProgress:
    """Return how far a run is."""
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    told: dict[str, Any] = {}
    for line in lines:
        told |= {name: line[name] for name in ("step", "progress", "loss") if line.get(name) is not None}
    found, timed = LoggedProgress(**told), [line for line in lines if line.get("step_seconds")]
    if not (timed and found.progress):
        return found
    last = timed[-1]
    left = (1 - found.progress) / found.progress * last["step"] * last["step_seconds"]
    return replace(found, slots_per_second=last["slots_per_second"], seconds_left=round(left))


def text(table: Sequence[StageStatus]) -> str:
    """Return the table for people."""
    head = ["run", "stage", "job", "state", "tries", "step", "budget", "slots/s", "left", "loss"]
    lines = [head]
    for row in table:
        shown = [
            row.attempts,
            row.step,
            None if row.progress is None else f"{row.progress:.1%}",
            row.slots_per_second and f"{row.slots_per_second:,.0f}",
            None if row.seconds_left is None else timedelta(seconds=row.seconds_left),
            None if row.loss is None else f"{row.loss:.4f}",
        ]
        words = ["-" if value is None else str(value) for value in shown]
        lines.append([row.run, row.stage, row.job, row.state, *words])
    messages = [
        f"{row.run} {row.stage}: {said}"
        for row in table
        if (said := "; ".join(words for words in (_tasks(row), row.message) if words))
    ]
    return "\n".join([aligned(lines, names=2), *map(wrapped, messages)])


def _tasks(row: StageStatus) -> str:
    return ", ".join(f"{count} {name}" for name, count in (row.tasks or {}).items())
