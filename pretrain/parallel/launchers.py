"""Who am I? The launcher's environment variables, read once: torchrun, deepspeed, srun, mpirun, none."""

import re
import socket
import subprocess
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime

from pretrain.errors import UserError


@dataclass(frozen=True)
class Identity:
    """This process among the processes of the run; no address = ask MPI for one."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str | None = None
    port: int | None = None


def identify(environ: Mapping[str, str]) -> Identity:
    """Reads the launcher's variables; UserError if they are half set or contradict each other."""
    found = _from_torch(environ) or _from_mpi(environ) or _from_slurm(environ) or _alone(environ)
    if not (0 <= found.rank < found.world_size and found.local_rank >= 0):
        raise UserError(
            f"{found.launcher}: rank {found.rank} (local {found.local_rank}) of {found.world_size}"
            " cannot be; check the variables that your launcher sets"
        )
    for name, value in (("WORLD_SIZE", found.world_size), ("LOCAL_RANK", found.local_rank)):
        if _whole_number(environ, name, value) != value:
            raise UserError(
                f"{name}={environ[name]}, but {found.launcher} says {value}; unset {name}, or set all"
                " of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
            )
    return found


def _from_torch(environ: Mapping[str, str]) -> Identity | None:
    if "RANK" not in environ:
        return None
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in environ]:
        raise UserError(
            f"RANK is set, but not {', '.join(missing)}; set all five, unset RANK, or start with"
            " torchrun, deepspeed, srun or mpirun"
        )
    marks = {"TORCHELASTIC_RUN_ID": "torchrun", "LOCAL_SIZE": "deepspeed"}
    launcher = next((name for mark, name in marks.items() if mark in environ), "RANK")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return _identity(launcher, environ, names, environ["MASTER_ADDR"], _port(environ))


def _from_mpi(environ: Mapping[str, str]) -> Identity | None:
    # srun's PMI-2 plugin sets PMI_RANK too; MPI_LOCALRANKID comes only from MPICH's own starter.
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    else:
        return None
    return _identity("mpirun", environ, names, *_given_address(environ))


def _from_slurm(environ: Mapping[str, str]) -> Identity | None:
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    address, port = _given_address(environ)
    if address is None:
        # Rank 0 of a step runs on its first node. Two steps of a job may run side by side.
        job, step = _whole_number(environ, "SLURM_JOB_ID"), _whole_number(environ, "SLURM_STEP_ID", 0)
        address = first_host(_variable(environ, "SLURM_STEP_NODELIST"))
        port = 10000 + (job + 997 * step) % 20000
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return _identity("srun", environ, names, address, port)


def _identity(
    launcher: str,
    environ: Mapping[str, str],
    names: tuple[str, str, str],
    address: str | None,
    port: int | None,
) -> Identity:
    rank, world_size, local_rank = (_whole_number(environ, name) for name in names)
    return Identity(launcher, rank, world_size, local_rank, address, port)


def _alone(environ: Mapping[str, str]) -> Identity:
    if "SLURM_JOB_ID" in environ and _whole_number(environ, "SLURM_NTASKS", 1) > 1:
        warnings.warn(
            f"this is one process in an allocation of {environ['SLURM_NTASKS']} tasks; start it with"
            " srun to use them all",
            stacklevel=2,
        )
    return Identity("python", 0, 1, 0)


def _given_address(environ: Mapping[str, str]) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT, which job scripts like to export; both or neither."""
    given = {name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ}
    if len(given) == 1:
        raise UserError(f"only {given.pop()} is set; set MASTER_ADDR and MASTER_PORT, or neither")
    if not given:
        return None, None
    return environ["MASTER_ADDR"], _port(environ)


def _port(environ: Mapping[str, str]) -> int:
    port = _whole_number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no port; choose one from 1024 to 65535")
    return port


def _variable(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise UserError(f"{name} is missing beside its launcher's other variables; use srun or mpirun")
    return environ[name]


def _whole_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environ:
        return default
    text = _variable(environ, name)
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number; check what set it")
    return int(text)


def first_host(nodelist: str) -> str:
    """Return the first name of a Slurm node list: ``gpu[03-05,9],n1`` -> ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\]]*)\]", lambda group: re.split("[-,]", group[1])[0], first)


def job_end(environ: Mapping[str, str]) -> float | None:
    """Return the Unix time at which this process's Slurm job reaches its limit; None outside of a job with
    one."""
    if "SLURM_JOB_END_TIME" in environ:
        return float(_whole_number(environ, "SLURM_JOB_END_TIME"))
    if "SLURM_JOB_ID" not in environ:
        return None
    command = ["squeue", "--noheader", f"--jobs={environ['SLURM_JOB_ID']}", "--format=%e"]
    environ = {**environ, "SLURM_TIME_FORMAT": "standard"}
    try:  # before 23.02 Slurm did not set the variable
        found = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, env=environ
        ).stdout
        return datetime.fromisoformat(found.strip()).timestamp()
    except (OSError, subprocess.TimeoutExpired, ValueError):  # in a container; no answer; no limit
        return None


def ask_mpi(me: Identity) -> Identity:
    """Rank 0 picks an address and a free port, MPI carries them to the others, and is done."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py does not work here ({error}); install it with the MPI that"
            " you use, or pass MASTER_ADDR and MASTER_PORT to all ranks"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != me.world_size:
        raise UserError(
            f"mpirun started {me.world_size} ranks, but mpi4py sees {world.Get_size()}: they belong"
            " to different MPI libraries; install mpi4py with the MPI that you use"
        )
    hosts = world.gather(socket.gethostname())
    address = None
    if hosts is not None:
        address = ("127.0.0.1" if len(set(hosts)) == 1 else hosts[0], free_port())
    host, port = world.bcast(address)
    # Now, since a program that leaves without this is reported by mpirun as failed.
    MPI.Finalize()
    return replace(me, address=host, port=port)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
