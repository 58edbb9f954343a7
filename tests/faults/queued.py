"""Runs in the queue of a real Slurm, and what a cluster does to jobs; see `tests.support.slurm_cluster`.

A job trains without end until something befalls it. It must be back in the queue then, or cancelled, as the
kind promises, and goes on when the queue starts it again, or the same command is given again. After some
faults its budget is shortened to what it has nearly reached, and the run is compared with one that nobody
disturbed.
"""

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

from pretrain import checkpoint
from pretrain.run_folder import RunFolder
from slurm import submit
from tests.faults.workshop import Layout, Record, Workshop, differs
from tests.support.runs import finish, kept
from tests.support.slurm_cluster import cluster, jobs

SHARE = 0.1
"""Of the runs of a campaign that has other kinds too: a fault of theirs takes half a minute."""
MOST = 3
"""Faults of a run."""


class Promise(NamedTuple):
    """How a job stands when something has befallen it."""

    state: str
    """In `--status`."""
    reason: str = ""
    """What status.json gives for the end; empty: there may have been no time to write it."""


KINDS = {
    "requeue": Promise("requeued"),
    "preemption": Promise("requeued"),
    "node down": Promise("requeued"),
    "cancel": Promise("cancelled", "stopped by SIGTERM"),
    "time limit": Promise("requeued", "stopped by SIGUSR1"),
    "signal before the limit": Promise("requeued", "stopped by SIGUSR1"),
}
_EVENTS = {**jobs.EVENTS, "signal before the limit": jobs.tell}
LAYOUTS = (
    Layout(1, (), 4),
    Layout(2, (), 1),
    Layout(2, ("parallel.tensor=2",), 1),
    Layout(2, ("train.engine=deepspeed", "parallel.zero=1"), 1),
)
"""A rank of each is alone on its node."""


@contextmanager
def known_kinds(kinds: Sequence[str]) -> Iterator[list[str]]:
    """Start the cluster that the kinds want; gives those kinds that can be had."""
    with ExitStack() as stack:
        left = list(kinds)
        if wanted := [kind for kind in kinds if kind in KINDS]:
            try:
                stack.enter_context(cluster.used())
                stack.enter_context(mock.patch.dict(os.environ, cluster.ENVIRON))
            except cluster.Unavailable as reason:
                print(f"left out, as there is no Slurm ({reason}): {', '.join(wanted)}", file=sys.stderr)
                left = [kind for kind in kinds if kind not in KINDS]
        yield left


def disturbed(shop: Workshop, number: int, draw: random.Random, kinds: Sequence[str]) -> list[Record]:
    """Disturb a run a few times, let it finish, compare it, and return what befell it."""
    with cluster.turn():
        return _Queued(shop, number, draw, kinds).disturb()


class _Queued:
    """A run in the queue."""

    def __init__(self, shop: Workshop, number: int, draw: random.Random, kinds: Sequence[str]) -> None:
        self.number, self.draw = number, draw
        self.layout: Layout = draw.choices(LAYOUTS, [layout.weight for layout in LAYOUTS])[0]
        # Nodes see none of the file systems that are mounted after their start.
        self.folder = shop.folder / f"queued-{number}"
        self.path, self.alone = self.folder / "run", self.folder / "undisturbed"
        self.folder.mkdir()
        self.inputs = shop.folder / "inputs"
        self.words = [*shop.words(self.layout, self.path, self.inputs), *jobs.LONG]
        self.kinds = [draw.choice(kinds) for _ in range(draw.randint(1, MOST))]
        self.site = jobs.site(self.folder, jobs.RESTLESS)

    def disturb(self) -> list[Record]:
        job, records = self.submit(), []
        for index, kind in enumerate(self.kinds):
            record = Record(self.number, self.layout.name, kind, "job", self.draw.randint(1, 20), 0, True)
            records.append(record)
            self.befall(record, job)
            reached = max(checkpoint.steps(self.path))
            last = index == len(self.kinds) - 1
            job = self.go_on(job, reached + 3 if last else None)
        state = jobs.wait(job, self.path)
        wrong = self.differs(reached + 3) if state == "COMPLETED" else f"{state}\n{jobs.log(self.path)}"
        if wrong:
            records[-1].broken += f"\n{wrong}"
        for record in records:
            record.equal = not wrong
        return records

    def submit(self, *more: str) -> str:
        nodes = ["--nodes", str(self.layout.ranks), "--partition", "spare"]
        return jobs.start([*self.words, "checkpoint.every_steps=1", *more, *nodes], self.site)[-1]

    def befall(self, record: Record, job: str) -> None:
        """Let a fault come when the job has made some updates, and judge how it stands then."""
        begun = max(checkpoint.steps(self.path), default=0)
        jobs.trains(self.path, job, begun + record.at)
        promise = KINDS[record.kind]
        if promise.state == "cancelled":
            assert submit.main(["--cancel", str(self.path)]) == 0
            jobs.wait(job, self.path)
        else:
            _EVENTS[record.kind](job)
            jobs.requeued(job)
        state, status = jobs.row(self.path)["state"], RunFolder(self.path).status()
        record.codes, record.line = [status.get("exit_code")], status.get("reason") or ""
        if state != promise.state:
            record.broken = f"its state is {state}"
        elif promise.reason and (status["exit_code"], status["reason"]) != (75, promise.reason):
            record.broken = f"its status says {status}"
        elif "Traceback" in (text := jobs.log(self.path)):
            record.broken = text[-3000:]

    def go_on(self, job: str, steps: int | None) -> str:
        """Start the run again, with the budget that it is to end with; its job."""
        if jobs.state(job) == "CANCELLED":
            return self.submit(*([f"budget.steps={steps}"] if steps else []))
        if steps:
            jobs.shorten(self.path, steps)
        jobs.set_limit(job, 30)
        jobs.hurry(job)
        return job

    def differs(self, steps: int) -> str:
        """Return how it is not like the undisturbed run of so many steps; "" if it is."""
        words = [word.replace(str(self.path), str(self.alone)) for word in self.words]
        finish([*words, f"budget.steps={steps}"], self.layout.ranks)
        return differs(self.path, self.inputs, kept(self.alone))
