"""cluster.env, read: what is special about a site, for the program that writes its jobs.

The file is sourced by a shell here as in the jobs, so both see the same values.
"""

import difflib
import re
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.account.devices import Device
from pretrain.errors import UserError
from slurm.time_limit import time_limit, yes_or_no
from tools.plan import layouts
from tools.shared.console import whole

HERE = Path(__file__).parent
DEFAULT = HERE / "cluster.env"
EXAMPLE = HERE / "cluster.env.example"


@dataclass(frozen=True)
class Cluster:
    """The variables of cluster.env; cluster.env.example says what they mean."""

    text: str
    """The file itself, which every run keeps."""
    partition: str = ""
    cpu_partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpus_per_node: int = 0
    gpu_option: str = "--gpus-per-node"
    tasks_per_node: int | None = None
    cpus_per_task: int = 1
    memory: str = ""
    time: str = "24:00:00"
    cpu_time: str = ""
    options: str = ""
    device: Device | None = None
    signal_seconds: int = 300
    requeue: str = "yes"
    max_attempts: int = 3
    preflight: str = "yes"
    python: str = ""
    launch: str = ""
    """The words of SRUN and WRAP."""

    @property
    def container(self) -> bool:
        """Return whether SRUN or WRAP start a container."""
        programs = "container|apptainer|singularity|enroot|podman|docker|shifter|ch-run|charliecloud|sarus"
        return re.search(programs, self.launch) is not None


OF_THE_JOBS = {"SRUN", "WRAP", "MPI", "LOCAL_SCRATCH"}
KNOWN = {field.name.upper() for field in fields(Cluster)} - {"TEXT", "LAUNCH"} | OF_THE_JOBS
FORMS: dict[str, Callable[[str], Any]] = {
    "GPUS_PER_NODE": whole(0),
    "TASKS_PER_NODE": whole(1),
    "CPUS_PER_TASK": whole(1),
    "DEVICE": partial(layouts.named, given=""),
    "TIME": time_limit,
    "CPU_TIME": time_limit,
    "SIGNAL_SECONDS": whole(1, 65535),
    "REQUEUE": yes_or_no,
    "MAX_ATTEMPTS": whole(1),
    "PREFLIGHT": yes_or_no,
}
"""Types of those that are not any text."""


def read(path: Path | None = None) -> Cluster:
    """Return the site file `path`; UserError if it is missing, does not run or sets what nobody reads."""
    path = path or DEFAULT
    if not path.is_file():
        raise UserError(f"{path}: no such file; copy {EXAMPLE} there and edit it")
    text = _text(path)
    for name in re.findall(r"^([A-Z_]+)=", text, re.MULTILINE):
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1)
            hint = f"; did you mean {near[0]}?" if near else "; write export before it if a program reads it"
            raise UserError(f"{path}: {name} means nothing here{hint}")
    found = {}
    for name, value in _source(path, text).items():
        try:
            if value:
                found[name.lower()] = FORMS.get(name, str)(value)
        except (ArgumentTypeError, UserError) as error:
            raise UserError(f"{path}: {name}: {error}") from None
    return Cluster(text, **found)


def _text(path: Path) -> str:
    """Return what is in the file, without the marks that an editor of another system leaves in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as that") from None
    return re.sub(r"\r+$", "", text, flags=re.MULTILINE)


def _source(path: Path, text: str) -> dict[str, str]:
    names = sorted(KNOWN - OF_THE_JOBS)
    script = (
        'set -e; . /dev/stdin; LAUNCH="${SRUN[*]} ${WRAP[*]}"; for name; do printf "%s\\0" "${!name}"; done'
    )
    command = ["bash", "-c", script, str(path.absolute()), *names, "LAUNCH"]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"{path}: bash cannot read it: {done.stderr.strip()}")
    return dict(zip([*names, "LAUNCH"], done.stdout.split("\0"), strict=False))
