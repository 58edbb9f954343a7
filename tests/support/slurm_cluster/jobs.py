"""What the tests do with jobs: submit, wait, hurry, look, and what befalls them on a cluster."""

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pretrain.monitor import read_metrics
from slurm import scheduler, status, submit
from tests.support.ranks import PATIENCE
from tests.support.slurm_cluster import cluster
from tests.support.slurm_cluster.cluster import run as command
from tools.shared import journal

SITE = """
GPUS_PER_NODE=0
TIME=30
SIGNAL_SECONDS=60
PREFLIGHT=no
SRUN=()
WRAP=()
setup() {
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= TORCH_CPP_LOG_LEVEL=ERROR
    export PYTHONWARNINGS=ignore
}
"""
RESTLESS = "sleep() { command sleep 0.1; }\n"
"""Of a requeued job Slurm may kill the sleep before the script: nothing must follow that sleep."""
LONG = ["budget.steps=1000000", "schedule.warmup=0", "schedule.floor=1", "evaluate.every_steps=null"]
"""Of no importance to the weights but for the rate, which must not depend on where the budget ends."""
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")


def site(folder: Path, more: str = "") -> Path:
    """A cluster.env for the virtual nodes."""
    file = folder / "cluster.env"
    file.write_text(SITE + more, encoding="utf-8")
    return file


def start(words: list[str], site: Path) -> list[str]:
    """Submits; the ids of the jobs, in order."""
    assert submit.main([*words, "--cluster", str(site), "--json"]) == 0
    return [line["job"] for line in journal.read(_run(words)) if line["event"] == "submit"]


def _run(words: list[str]) -> str:
    return next(word.removeprefix("run.dir=") for word in words if word.startswith("run.dir="))


def state(job: str) -> str:
    """In Slurm's words."""
    return scheduler.query([job])[job][0].state


def restarts(job: str) -> int:
    """How often Slurm has started a job again."""
    return scheduler.query([job])[job][0].restarts


def until(happened: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Waits, and mends the cluster meanwhile; an AssertionError says for what and what Slurm says."""
    start = healed = time.monotonic()
    while not happened():
        now = time.monotonic()
        assert now < start + seconds, f"waited {seconds} s for {what}\n{cluster.report()}"
        if now > healed + 5:
            cluster.heal()
            healed = now
        time.sleep(0.1)


def wait(job: str, run: Path, seconds: float = PATIENCE) -> str:
    """Waits for the end of a job; its last state. What it wrote is shown if it does not end."""
    try:
        until(lambda: state(job) not in LIVE, f"job {job}", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; {state(job)}\n{log(run)}") from None
    return state(job)


def log(run: Path) -> str:
    """What the jobs of a run wrote."""
    return "".join(file.read_text() for file in sorted((run / "slurm").glob("*.log")))


def requeued(job: str) -> None:
    """Waits until a job is back in the queue, where it stays until `hurry`, however slow the test is."""
    until(lambda: state(job) == "PENDING" and restarts(job) > 0, f"job {job} to be requeued")
    command("scontrol", "update", f"JobId={job}", "StartTime=now+1hour")


def hurry(job: str) -> None:
    """Lets a requeued job start.

    Not in this very second: to its nodes the new start would be one that was revoked with the last.
    """
    command("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def trains(run: Path, job: str, after: int = 0) -> None:
    """Waits until a run has made some updates in this job; after: the step that it goes on from."""

    def logged() -> bool:
        assert state(job) in LIVE, log(run)
        return (run / "metrics.jsonl").exists() and any(
            line["step"] > after + 3 for line in read_metrics(run)
        )

    until(logged, f"updates of {run}")


def row(run: Path, stage: str = "train") -> dict[str, Any]:
    """What `--status` says of a stage."""
    (found,) = [line for line in status.rows([run]) if line.stage == stage]
    return asdict(found)


def shorten(run: Path, steps: int) -> None:
    """Gives a submitted run another budget."""
    file = run / "slurm" / "config.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["budget"]["steps"] = steps
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")


# ---- what befalls a job --------------------------------------------------------------------------


def tell(job: str) -> None:
    """What Slurm sends before the time limit."""
    command("scancel", "--signal=USR1", job)


def requeue(job: str) -> None:
    """As somebody who runs the cluster may."""
    command("scontrol", "requeue", job)


def node_down(job: str) -> None:
    """Of all nodes the first, on which rank 0 is."""
    command("scontrol", "update", "nodename=lm1", "state=down", "reason=test")


def preempt(job: str) -> None:
    """A job of more importance wants all nodes; this one should be of the partition that gives way."""
    urgent = command(
        "sbatch", "--parsable", "-p", "gpu", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    until(lambda: state(urgent.strip()) == "COMPLETED", "the urgent job")


def limit(job: str) -> None:
    """Slurm does it, at the earliest full minute that leaves SIGNAL_SECONDS."""
    running = re.search(r" RunTime=(\d+):(\d+):(\d+)", command("scontrol", "-o", "show", "job", job))
    assert running
    hours, minutes, seconds = map(int, running.groups())
    set_limit(job, 60 * hours + minutes + (2 if seconds < 50 else 3))


def set_limit(job: str, minutes: int) -> None:
    command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


EVENTS: dict[str, Callable[[str], None]] = {
    "signal": tell,
    "requeue": requeue,
    "node down": node_down,
    "preemption": preempt,
    "time limit": limit,
}
"""What sends a job back into the queue."""
