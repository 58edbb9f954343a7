"""Slurm's own commands: the only file here that starts them."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError

MAX_ARRAY = 1000
"""Tasks of one array: Slurm's default limit is 1,001. More commands than that share the tasks."""

PAUSES = (0.0, 0.2, 1.0)
"""Seconds before each try to ask a controller that may be busy."""


OF_THE_USER = ("CONF", "JWT", "CLUSTERS", "DEBUG", "DEBUG_FLAGS", "TIME_FORMAT", "EXIT_ERROR", "UMASK")
"""Variables SLURM_* that say how to talk to Slurm; all others are of a job. job.sh has the same list."""


@dataclass(frozen=True)
class Seen:
    """What the queue says of a job, or of one task of an array."""

    job: str
    state: str
    """In Slurm's words, such as PENDING."""
    reason: str
    restarts: int


def of_a_job(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that a job around this process has left.

    sbatch would pass them on, and srun in the new job would take them for its options: where its ranks are
    bound to, how much memory they have. What a user wishes of sbatch is named SBATCH_*.
    """
    kept = {f"SLURM_{name}" for name in OF_THE_USER}
    return [name for name in environ if name.startswith("SLURM_") and name not in kept]


def submit(script: Path, after: str | None = None) -> str:
    """Return the new job's id; `after`: only if that job succeeds. UserError with Slurm's words if it
    refuses."""
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    without = set(of_a_job(os.environ))
    environ = {name: value for name, value in os.environ.items() if name not in without}
    done = _run(["sbatch", "--parsable", *waits, str(script)], environ)
    if done.returncode:
        raise UserError(f"sbatch {script}: {_why(done)}; change cluster.env or the options of slurm.submit")
    return done.stdout.strip().partition(";")[0]  # a federation adds its cluster's name


def query(jobs: Sequence[str]) -> dict[str, list[Seen]]:
    """Return by job id the job, or the tasks of the array; what the queue has forgotten is missing."""
    found: dict[str, list[Seen]] = {}
    if not jobs:
        return found
    fields = "JobArrayID:|,State:|,Reason:|,RestartCnt:|"
    # An unknown id is an error where it stands alone, and passed over among several.
    command = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--jobs={','.join([*jobs, jobs[0]])}",
        "-O",
        fields,
    ]
    for pause in PAUSES:
        time.sleep(pause)
        done = _run(command)
        if done.returncode == 0:
            break
    else:  # nobody knows: who takes that for a forgotten job submits it twice
        raise UserError(f"squeue: {_why(done)}; try again when Slurm answers")
    for line in done.stdout.splitlines():
        job, state, reason, restarts = line.split("|")[:4]
        seen = Seen(job, state, reason, int(restarts))
        found.setdefault(job.partition("_")[0], []).append(seen)
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Ends the jobs; those that are over already are passed over."""
    _run(["scancel", *jobs])


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of what a command said of its failure."""
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return re.sub("^[a-z]+: (error|fatal): ", "", lines[-1])


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environ)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: no such command; run this where Slurm is, or use --dry-run") from None
