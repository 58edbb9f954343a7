"""What the tests do with jobs: submit, wait, hurry, and look."""

import time
from collections.abc import Callable
from pathlib import Path

from pretrain.monitor import read_metrics
from slurm import scheduler, submit
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


def trains(run: Path, job: str) -> None:
    """Waits until a run has made some updates in this job."""

    def logged() -> bool:
        assert state(job) in LIVE, log(run)
        return (run / "metrics.jsonl").exists() and len(read_metrics(run)) > 3

    until(logged, f"updates of {run}")
