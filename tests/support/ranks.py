"""Runs a function on N gloo ranks of this machine and returns what each rank returned.

The function must be importable (top level of a test module) and gets the environment that torchrun
would give it. An exception in any rank is raised here with its traceback, silence ends in a
TimeoutError, and no process outlives the call. A rank that is done stays until all are: rank 0 holds the
store through which others may still be connecting.
"""

import faulthandler
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PATIENCE = 900.0
"""Seconds after which the tests take a silence for a hang. A machine that stands still for a while, or has
other work, passes: only a defect costs them."""


def free_port() -> int:
    """A port that the kernel gives to nobody by itself before the ranks have imported what they need."""
    while True:
        port = random.SystemRandom().randrange(30000, 32768)
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = PATIENCE) -> list[Any]:
    """``[function(*args) of rank 0, of rank 1, ...]``."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    readers, ranks = [], []
    for rank in range(world_size):
        reader, writer = context.Pipe()
        places = (rank, world_size, port, seconds, writer, function, args)
        ranks.append(context.Process(target=_rank, args=places, daemon=True))
        ranks[-1].start()
        writer.close()
        readers.append(reader)
    try:
        return _collect(readers, time.monotonic() + seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        silent = {readers[rank]: rank for rank in range(len(readers)) if rank not in results}
        ready = wait(list(silent), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no word from ranks {sorted(silent.values())}")
        for reader in ready:
            rank = silent[reader]
            try:
                good, results[rank] = reader.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert good, f"rank {rank} failed:\n{results[rank]}"
    return [results[rank] for rank in range(len(readers))]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    seconds: float,
    writer: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1")
    # OMP_NUM_THREADS would come too late: torch was imported with the function.
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(max(1.0, seconds - 5), exit=False)
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Plain bytes: torch would send shared memory, which is gone when this process is.
    writer.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(EOFError):  # until this process is killed or the one that asked is gone
        writer.recv_bytes()
    # Not sys.exit: a gloo worker that drops its last work while Python finalises aborts the process
    # (exit 134, 8-40 % of runs, torch 2.13).
    os._exit(0)
