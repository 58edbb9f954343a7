"""Encodes the pieces of a corpus in this process, or in others that are spawned.

A spawned process imports what it is to do by name, which it cannot of a package's `__main__`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from pretrain import streams
from pretrain.errors import UserError
from tools.encode_corpus.parts import EncodeJob, EncodeTask, PartEncoder, stop_file


def run_tasks(
    tasks: Sequence[EncodeTask], job: EncodeJob, workers: int, advance: Callable[[int], None]
) -> None:
    """Do the tasks in this process or in `workers` others."""
    try:
        if workers == 1:
            encoder = PartEncoder(job)
            for task in tasks:
                encoder(task, advance)
        else:
            _run_in_workers(tasks, job, workers, advance)
    except BaseException:
        with suppress(OSError):  # of a full disk, maybe, which is what is to be said
            stop_file(job).touch()  # others need not go on
        raise


def _run_in_workers(
    tasks: Sequence[EncodeTask], job: EncodeJob, workers: int, advance: Callable[[int], None]
) -> None:
    # spawn: the parent has threads (the progress bar), which fork would copy in an unknown state
    context = multiprocessing.get_context("spawn")
    done, told = context.Value("q", 0), 0
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, done))
    try:
        waiting: Any = [pool.submit(_work, task) for task in tasks]
        while waiting:
            ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            advance(done.value - told)
            told = done.value
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably for want of memory; use fewer --workers"
        ) from error
    finally:
        if waiting:
            with suppress(OSError):
                stop_file(job).touch()
        pool.shutdown(cancel_futures=True)


_encoder: PartEncoder
_done: Any


def _start_worker(job: EncodeJob, done: Any) -> None:
    global _encoder, _done
    streams.prepare()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent cleans up
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder, _done = PartEncoder(job), done


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work(task: EncodeTask) -> None:
    _encoder(task, _advance)


def _advance(disk_bytes: int) -> None:
    with _done.get_lock():
        _done.value += disk_bytes
