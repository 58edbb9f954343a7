"""Runs that are disturbed again and again, and end like the one that nobody disturbed.

A run of the campaign has a layout and a folder of its own. Each attempt is given faults that were drawn from
(seed, number of the run); how it ends is held against what the kind of fault promises. The same command is
given until the budget is spent; then weights, moments and counts must be those of the undisturbed run of this
layout, to the last bit, and `tools.ledger check` must agree. All faults of a run are written down together,
when it is over, one line of JSON each, so a campaign that is stopped goes on with its next run.

What forking leaves untested: ranks are forked from a server that has imported torch, DeepSpeed and
megatron-core, so nothing strikes while these are imported, and the C libraries of a rank were initialised in
its parent. One attempt in fifty is therefore a plain `python -m pretrain`, struck from outside.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.files import append_line
from pretrain.run_folder import RunFolder
from tests.faults import queued
from tests.faults.kinds import (
    INSIDE,
    KINDS,
    NEEDS_DISK,
    OUTSIDE,
    PASSING,
    PLACES,
    Fault,
    Kind,
    Plan,
    damage,
    free,
)
from tests.faults.workshop import (
    HANG,
    LAYOUTS,
    TOKENIZER,
    Layout,
    Record,
    Workshop,
    differs,
    last_word,
    workshop,
)
from tests.support.ranks import free_port
from tests.support.runs import ENVIRON, Attempt, Outcome, torch_variables

PLAIN = 0.02
"""Share of attempts that are plain commands."""
OF_A_THREAD = "(_die):\nTraceback"
"""What Python says of the thread that dies."""
LONGEST = {1: 12, 2: 6, 4: 3}
"""Attempts of a run that are disturbed, by its ranks; after so many it is left in peace."""
ROOT = Path(__file__).parents[2]


# ---- the campaign --------------------------------------------------------------------------------


def campaign(count: int, seed: int, output: Path, kinds: Sequence[str] = KINDS) -> list[Record]:
    """Inject faults until `output` tells of `count`, from where it stands; return those that it tells of."""
    records = read(output)
    if len(records) >= count:
        return records
    with workshop() as shop, queued.known_kinds(kinds) as left:
        known = [kind for kind in left if shop.own_disk or kind not in NEEDS_DISK]
        if not known:
            raise UserError("none of these kinds can be had here")
        run = 1 + max((record.run for record in records), default=-1)
        while len(records) < count:
            for record in disturbed(shop, run, seed, known):
                append_line(output, json.dumps(asdict(record)))
                records.append(record)
            run += 1
    return records


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return how many faults of each kind and layout there were, how many of them ended not as promised, and
    how many were of runs that did not end equal."""

    def count(name: str) -> dict[str, list[int]]:
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(getattr(record, name), []).append(record)
        return {
            group: [len(ones), sum(bool(one.broken) for one in ones), sum(not one.equal for one in ones)]
            for group, ones in sorted(groups.items())
        }

    runs, plain = {record.run for record in records}, sum(record.plain for record in records)
    return {
        "faults": len(records),
        "runs": len(runs),
        "plain": plain,
        "kind": count("kind"),
        "layout": count("layout"),
    }


def read(path: Path) -> list[Record]:
    """Return the records of a file, [] where there is none."""
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- one run -------------------------------------------------------------------------------------


class Disturbed:
    """A run under faults."""

    def __init__(self, shop: Workshop, number: int, draw: random.Random, kinds: Sequence[str]) -> None:
        self.shop, self.number, self.draw, self.kinds = shop, number, draw, kinds
        self.layout: Layout = draw.choices(LAYOUTS, [layout.weight for layout in LAYOUTS])[0]
        self.path, self.inputs = shop.disk / f"run-{number}", shop.folder / f"inputs-{number}"
        shutil.copytree(shop.folder / "inputs", self.inputs)
        self.words = shop.words(self.layout, self.path, self.inputs)
        self.records: list[Record] = []
        self.text = ""

    # What befalls it.

    def one_of(self, kinds: dict[str, Any]) -> str | None:
        """Draw a kind among those that are asked for."""
        known = [kind for kind in self.kinds if kind in kinds]
        return self.draw.choice(known) if known else None

    def fault(self, kinds: dict[str, Kind]) -> Fault | None:
        """Draw a fault inside of a rank."""
        if (kind := self.one_of(kinds)) is None:
            return None
        place = self.draw.choice(kinds[kind].places)
        rank = 0 if PLACES[place].main or kind in NEEDS_DISK else self.draw.randrange(self.layout.ranks)
        return Fault(kind, place, self.draw.randint(1, PLACES[place].calls), rank)

    def record(self, fault: Fault, plain: bool = False) -> Record:
        record = Record(self.number, self.layout.name, fault.kind, fault.place, fault.at, fault.rank, plain)
        self.records.append(record)
        return record

    # Attempts.

    def disturb(self) -> bool:
        """Make an attempt with the faults that are drawn; True once the budget is spent."""
        if self.draw.random() < 0.3:
            self.damage()
        if self.draw.random() < PLAIN * (self.layout.ranks < 4):
            return self.struck_from_outside()
        passing = self.fault(PASSING) if self.draw.random() < 0.25 else None
        drawn = {0: passing, 1: self.fault(INSIDE)}
        return self.attempt({n: fault for n, fault in drawn.items() if fault})

    def attempt(self, faults: dict[int, Fault]) -> bool:
        """Start with these faults inside, judge how it ends; True once the budget is spent."""
        with tempfile.TemporaryDirectory(dir=self.shop.folder) as control:
            plan = Plan(faults, Path(control), self.shop.disk)
            started = Attempt(self.words, self.layout.ranks, plan)
            notes = Companion(self, plan, started).stay()
            outcome = started.wait(1.0)
            free(self.shop.disk)
            struck = [n for n in faults if plan.struck(n)]
        self.text = outcome.text
        ended = [n for n in struck if faults[n].kind in INSIDE]
        for n in struck:
            record = self.record(faults[n])
            end = faults[ended[0]] if ended else None
            self.judge(record, outcome, end)
            record.broken = record.broken or notes.get(n, "")
        if not struck:
            self.judge_quiet(outcome)
        return outcome.codes == [0] * self.layout.ranks

    def judge(self, record: Record, outcome: Outcome, end: Fault | None) -> None:
        """Hold how an attempt ended, by the fault `end` or in peace, against the promise."""
        codes, ranks = outcome.codes, range(self.layout.ranks)
        record.codes, record.line = codes, last_word(outcome.text)
        promise = INSIDE[end.kind] if end else Kind((), (0,), (0,), "the budget is spent")
        late = (0,) if end and end.place == "end" else ()
        victim = end.rank if end else 0
        wrong = [
            rank
            for rank in ranks
            if codes[rank] not in ((*promise.victim,) if rank == victim else (*promise.others, *late))
        ]
        if wrong:
            record.broken = f"exit codes {codes}"
        elif promise.says and not re.search(promise.says, self.said(outcome), re.MULTILINE):
            record.broken = f"does not say {promise.says!r}"
        elif not set(codes) - {0, 2, 75} and "Traceback" in outcome.text.replace(OF_A_THREAD, ""):
            record.broken = "a traceback"
        if record.broken:
            record.broken += f"\n{outcome.text[-3000:]}"

    def judge_quiet(self, outcome: Outcome) -> None:
        """Write down an attempt that nothing struck only if it ended as if something had."""
        record = self.record(Fault("none", ""))
        self.judge(record, outcome, None)
        if not record.broken:
            self.records.pop()

    def said(self, outcome: Outcome) -> str:
        """Return what was said of an end; where a signal came while it was being said, by status.json."""
        return f"{outcome.text}\n: {RunFolder(self.path).status().get('reason')};"

    # Between attempts.

    def damage(self) -> None:
        """Damage something that is on disk, and make the attempt that is refused if one has to be."""
        kind = self.one_of(OUTSIDE)
        if kind is None:
            return
        place, where = self.draw.random(), self.draw.random()
        if kind.startswith("input"):
            self.damage_inputs(kind, place, where)
        elif kind == "read-only":
            self.read_only()
        elif kind == "stale lock" and self.path.exists():
            (self.path / ".lock").write_text("process 99 on a-dead-host", encoding="utf-8")
            self.record(Fault(kind, ".lock"))
        elif kind.startswith("file") and self.path.exists():
            self.damage_run(kind, place, where)

    def damage_inputs(self, kind: str, place: float, where: float) -> None:
        """Inputs that are not what they were are refused, until they are put back."""
        files = sorted(path for path in self.inputs.rglob("*") if wanted(kind, path))
        path = files[int(place * len(files))]
        if kind == "input changed":
            path = self.inputs / "train.bin"
            for end in ("bin", "idx", "json"):
                shutil.copy2(self.inputs / f"other.{end}", self.inputs / f"train.{end}")
            if not checkpoint.steps(self.path):
                self.put_back()
                return  # nothing says what it was
        else:
            damage(path, kind, where)
        self.refused(Fault(kind, str(path.relative_to(self.inputs))), r"error: .*")
        self.put_back()

    def put_back(self) -> None:
        shutil.copytree(self.shop.folder / "inputs", self.inputs, dirs_exist_ok=True)

    def read_only(self) -> None:
        remount = ["mount", "-o", "remount,{}", str(self.shop.disk)]
        subprocess.run([word.format("ro") for word in remount], check=True)
        self.refused(Fault("read-only", "the disk"), "error: .*(Read-only file system|cannot be written)")
        subprocess.run([word.format("rw") for word in remount], check=True)

    def refused(self, fault: Fault, says: str) -> None:
        """Start, and expect a line that says what is wrong, and 2."""
        record = self.record(fault)
        outcome = Attempt(self.words, self.layout.ranks).wait(HANG)
        record.codes, record.line = outcome.codes, last_word(outcome.text)
        said = re.search(says, outcome.text)
        if outcome.codes != [2] * self.layout.ranks or not said or "Traceback" in outcome.text:
            record.broken = f"exit codes {outcome.codes}\n{outcome.text[-3000:]}"

    def damage_run(self, kind: str, place: float, where: float) -> None:
        """A run goes on whatever happened to a file of it, as long as one checkpoint is whole."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        path = files[int(place * len(files))]
        content = path.read_bytes()
        damage(path, kind, where)
        fault = Fault(kind, re.sub(r"step-\d+", "step-N", str(path.relative_to(self.path))))
        try:
            checkpoint.refuse_gone(self.path)
            if checkpoint.steps(self.path):
                checkpoint.find_verified(self.path)[0]
            self.record(fault)
        except UserError:
            self.refused(fault, "error: .*(is whole|no other is there)")
            path.write_bytes(content)

    # From outside.

    def struck_from_outside(self) -> bool:
        """Start plain commands, and send them a signal when they have made some updates."""
        kind = self.draw.choice(["kill", "kill all", "SIGTERM", "SIGINT", "SIGUSR1"])
        fault = Fault(kind, "outside", self.draw.randint(1, 4), self.draw.randrange(self.layout.ranks))
        metrics = self.path / "metrics.jsonl"
        begin = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        number = signal.SIGKILL if kind.startswith("kill") else signal.Signals[kind]
        with plain(self.words, self.layout.ranks, self.shop.folder) as started:
            struck = False
            while started.running():
                time.sleep(0.005)
                if not struck and metrics.exists() and metrics.read_bytes().count(b"\n") >= begin + fault.at:
                    struck = True
                    for rank, process in enumerate(started.processes):
                        if kind == "kill all" or rank == fault.rank:
                            process.send_signal(number)
            outcome = started.outcome()
        late = struck and 0 in outcome.codes  # it was over before the signal came
        if struck:
            self.judge(self.record(fault, plain=True), outcome, None if late else fault)
        else:
            self.judge_quiet(outcome)
        return outcome.codes == [0] * self.layout.ranks


def wanted(kind: str, path: Path) -> bool:
    """Tell whether a file of the inputs can be damaged so, and a start must see it.

    Bytes that were flipped in a .bin, or in what a manifest says beyond its fingerprint, are for
    `tools.verify_corpus`, which reads it all, to find.
    """
    read = path.name == TOKENIZER or path.suffix in (".bin", ".idx", ".json")
    if not read or path.name in ("provenance.json", *(f"other.{end}" for end in ("bin", "idx", "json"))):
        return False
    return not (kind.endswith("flipped") and path.suffix in (".bin", ".json"))


def disturbed(shop: Workshop, number: int, seed: int, kinds: Sequence[str]) -> list[Record]:
    """Disturb a run, by a queue or without, until it is over; compare it, and return what befell it."""
    here, there = ([kind for kind in kinds if (kind in queued.KINDS) is queues] for queues in (False, True))
    draw = random.Random(f"{seed} {number}")
    if there and (not here or random.Random(f"{seed} {number} queue").random() < queued.SHARE):
        return queued.disturbed(shop, number, draw, there)
    return disturbed_here(shop, number, draw, here)


def disturbed_here(shop: Workshop, number: int, draw: random.Random, kinds: Sequence[str]) -> list[Record]:
    """Disturb a run of this machine until its budget is spent."""
    run = Disturbed(shop, number, draw, kinds)
    expected = shop.expected(run.layout)
    over = False
    for _ in range(LONGEST[run.layout.ranks]):
        if over := run.disturb():
            break
    if over and draw.random() < 0.3:
        run.damage()
        over = False
    for _ in range(2):  # a second start changes nothing
        if not over:
            over = run.attempt({})
    wrong = differs(run.path, run.inputs, expected)
    if wrong and run.records:
        run.records[-1].broken += f"\n{wrong}\n{run.text[-3000:]}"
    for record in run.records:
        record.equal = not wrong
    for path in (run.path, run.inputs):
        shutil.rmtree(path)
    return run.records


# ---- what the campaign does while ranks run ------------------------------------------------------


class Companion:
    """Does from outside what a fault asks for when it has struck."""

    def __init__(self, run: Disturbed, plan: Plan, started: Attempt) -> None:
        self.run, self.plan, self.started = run, plan, started
        self.open = {n: f for n, f in plan.faults.items() if f.kind in _FROM_OUTSIDE}
        self.notes: dict[int, str] = {}

    def stay(self) -> dict[int, str]:
        """Return when all ranks are gone: number of a fault -> what was not as promised."""
        end = time.monotonic() + HANG
        while alive := [process.sentinel for process in self.started.processes if process.exitcode is None]:
            wait(alive, 0.01 if self.open else 1.0)
            for number in [n for n in self.open if self.plan.struck(n)]:
                fault = self.open.pop(number)
                if wrong := _FROM_OUTSIDE[fault.kind](self, fault):
                    self.notes[number] = wrong
                (self.plan.control / f"go-{number}").touch()
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
        return self.notes

    def send(self, number: signal.Signals) -> None:
        for process in self.started.processes:
            self.send_to(process.pid, number)

    @staticmethod
    def send_to(pid: int | None, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid or 0, number)

    def kill_all(self, fault: Fault) -> None:
        self.send(signal.SIGKILL)

    def go_on(self, fault: Fault) -> None:
        time.sleep(0.2)
        self.send_to(self.started.processes[fault.rank].pid, signal.SIGCONT)

    def interrupt_twice(self, fault: Fault) -> None:
        self.send(signal.SIGINT)
        time.sleep(0.02 * fault.at)
        self.send(signal.SIGINT)

    def storm(self, fault: Fault) -> None:
        """SIGTERM and SIGUSR1, to one rank or another, and one Ctrl-C at most."""
        draw = random.Random(fault.at)
        signals = [draw.choice([signal.SIGTERM, signal.SIGUSR1]) for _ in range(6)]
        signals[draw.randrange(6)] = signal.SIGINT
        for number in signals:
            self.send_to(draw.choice(self.started.processes).pid, number)
            time.sleep(0.01)

    def start_again(self, fault: Fault) -> str:
        second = Attempt(self.run.words, self.run.layout.ranks).wait(HANG)
        refused = second.codes == [2] * self.run.layout.ranks and "in use by process" in second.text
        return "" if refused else f"the second start: {second.codes}\n{second.text[-1000:]}"


_FROM_OUTSIDE: dict[str, Callable[[Companion, Fault], str | None]] = {
    "kill all": Companion.kill_all,
    "SIGSTOP, SIGCONT": Companion.go_on,
    "Ctrl-C twice": Companion.interrupt_twice,
    "storm": Companion.storm,
    "double start": Companion.start_again,
}


class PlainAttempt(NamedTuple):
    """Ranks that are plain commands."""

    processes: list[subprocess.Popen[bytes]]
    log: Path

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def outcome(self) -> Outcome:
        return Outcome(
            [process.returncode for process in self.processes], self.log.read_text(encoding="utf-8")
        )


@contextmanager
def plain(words: Sequence[str], ranks: int, folder: Path) -> Iterator[PlainAttempt]:
    """Start `python -m pretrain` for each rank, as torchrun would."""
    port, log = free_port(), folder / "plain.log"
    with open(log, "wb") as file:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pretrain", *words],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env={**os.environ, **ENVIRON, **(torch_variables(rank, ranks, port) if ranks > 1 else {})},
            )
            for rank in range(ranks)
        ]
    try:
        yield PlainAttempt(processes, log)
    finally:
        for process in processes:
            process.kill()
            process.wait()
