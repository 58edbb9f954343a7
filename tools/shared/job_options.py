"""Add the options that say what a job may have: `slurm.submit` obeys them, programs with many runs hand them
on."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tools.shared.console import whole


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of jobs to a command line."""
    jobs = parser.add_argument_group("jobs (defaults are those of cluster.env)")
    jobs.add_argument("--cluster", type=Path, metavar="FILE", help="the site's file (slurm/cluster.env)")
    jobs.add_argument("--nodes", type=whole(1), metavar="N", help="nodes of a job (the fewest that do)")
    jobs.add_argument("--gpus-per-node", type=whole(0), metavar="G", help="GPUs of a node; 0: none")
    jobs.add_argument(
        "--tasks-per-node", type=whole(1), metavar="R", help="ranks of a node (one for each GPU)"
    )
    jobs.add_argument("--time", metavar="T", help="limit of one job; a run takes as many as it needs")
    jobs.add_argument("--partition", metavar="P", help="queue of the jobs")
    jobs.add_argument(
        "--at-once", type=whole(1), metavar="N", help="tasks of an array that run at the same time"
    )


def job_words(args: argparse.Namespace) -> list[str]:
    """Return the words of a command line that give these options again."""
    names = ("cluster", "nodes", "gpus_per_node", "tasks_per_node", "time", "partition", "at_once")
    given = {name: getattr(args, name) for name in names}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


def submit_array(lines: Iterable[str], folder: Path, args: argparse.Namespace) -> int:
    """Hand lines of a shell to `slurm.submit` as an array, whose files go to a folder; its exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        command = ["slurm.submit", "--array", file.name, f"--output={folder}", *job_words(args)]
        command += ["--dry-run"] if args.dry_run else []
        return subprocess.run([sys.executable, "-m", *command], check=False).returncode
