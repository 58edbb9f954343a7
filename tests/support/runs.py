"""Runs of ``python -m pretrain`` as processes of their own, for the tests to kill, signal and compare.

They are forked from one server that has imported torch, DeepSpeed and megatron-core already, so a start
takes a tenth of a second and a test can afford many. The real launchers are in test_launch.py.
"""

import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

from pretrain import checkpoint
from pretrain.account import ledger, ledger_writer
from pretrain.monitor import read_metrics
from tests.support.ranks import PATIENCE, free_port

ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",  # of megatron-core's and DeepSpeed's imports
}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *(
            "pretrain.__main__",
            "pretrain.inputs",
            "pretrain.train",
            "deepspeed",
            "megatron.core.tensor_parallel",
        ),
        *("safetensors.torch", "sentencepiece"),
    ]
)

NEVER = 10**9
UPDATE = ("pretrain.feed:Feed.take",)
"""What every rank calls once an update."""
DISK = ("os:fsync", "os:replace")
"""What makes a file durable, and visible."""


class Armed(Protocol):
    """What is done to the ranks of an attempt from inside."""

    def at_rank(self, rank: int) -> "Armed | None":
        """Return what is done to one of them."""

    def arm(self) -> None:
        """Prepare it, in the process of the rank, before that begins."""


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself just before its call number `at` of any of `targets`."""

    signal: signal.Signals
    at: int
    targets: tuple[str, ...] = UPDATE
    rank: int = 0

    def at_rank(self, rank: int) -> "Strike | None":
        return self if rank == self.rank else None

    def arm(self) -> None:
        calls = iter(range(1, sys.maxsize))
        for target in self.targets:
            owner, name = owner_of(target)
            setattr(owner, name, self._counted(getattr(owner, name), calls))

    def _counted(self, function: Callable[..., Any], calls: Any) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.at:
                self.hit(*args)
            return function(*args, **kwargs)

        return counted

    def hit(self, *args: Any) -> None:
        """Do to this process what is to be done; args: those of the call."""
        os.kill(os.getpid(), self.signal)


PACE = {
    "pretrain.feed:Feed.take": 0.05,
    "pretrain.evaluate:HeldOut.score": 0.1,
    "pretrain.checkpoint:save": 0.1,
}
"""Seconds that each call takes a `Paced` rank."""
IMPORTS = 0.5


class Paced(Strike):
    """A rank by whose clock only what it does takes time, whatever the machine is busy with."""

    def arm(self) -> None:
        pace(PACE, IMPORTS)
        super().arm()


def pace(paces: dict[str, float], start: float, life: float = math.inf, writing: float = 0.0) -> None:
    """Let the clock of this process show `start` seconds and those of each call, and kill it after `life`.

    writing: seconds that a checkpoint takes to be written beside all that.
    """
    moment = time.monotonic()
    death = moment + life - start
    open_writes: list[tuple[float, threading.Event, checkpoint.Writer]] = []
    time.monotonic = lambda: moment
    ledger_writer.process_start = lambda: ledger_writer.now() - start

    def pass_until(when: float) -> None:
        nonlocal moment
        for due, go, writer in [one for one in open_writes if one[0] <= min(when, death)]:
            open_writes.clear()
            moment = max(moment, due)
            go.set()
            assert writer._last
            wait([writer._last])
        moment = max(moment, when)
        if moment > death:
            os.kill(os.getpid(), signal.SIGKILL)

    for target, seconds in paces.items():
        owner, name = owner_of(target)
        setattr(owner, name, _before(getattr(owner, name), lambda s=seconds: pass_until(moment + s)))

    def begin(self: checkpoint.Writer, gathered: Any, write: Callable[[Any], None]) -> None:
        go = threading.Event()
        open_writes.append((moment + writing, go, self))

        def late(copies: Any) -> None:
            go.wait()
            write(copies)

        start_writer(self, gathered, late)

    def timed(self: checkpoint.Writer, write: Callable[[], None]) -> None:
        write()
        self.seconds = writing

    start_writer, checkpoint.Writer.start, checkpoint.Writer._timed = checkpoint.Writer.start, begin, timed
    checkpoint.Writer.wait = _before(
        checkpoint.Writer.wait, lambda: pass_until(max((one[0] for one in open_writes), default=moment))
    )


def owner_of(target: str) -> tuple[Any, str]:
    """``module:Class.name`` -> what has the name, and the name."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _before(function: Callable[..., Any], do: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        do()
        return function(*args, **kwargs)

    return call


class Outcome(NamedTuple):
    """How an attempt ended."""

    codes: list[int]
    """Exit code of each rank; minus the signal's number if one killed it."""
    text: str
    """What the ranks wrote to stdout and stderr, rank by rank."""


class Attempt:
    """One start of a run on `ranks` ranks, with the words of its command line."""

    def __init__(self, words: list[str], ranks: int = 1, strike: Armed | None = None) -> None:
        self._logs = tempfile.TemporaryDirectory()
        self.processes = []
        port = free_port()
        for rank in range(ranks):
            environ = torch_variables(rank, ranks, port) if ranks > 1 else {}
            hit = strike.at_rank(rank) if strike else None
            job = (words, environ, f"{self._logs.name}/{rank}", hit, strike is not None)
            self.processes.append(_server.Process(target=_rank, args=job, daemon=True))
        with mock.patch.dict(os.environ, ENVIRON):  # the first start starts the server
            for process in self.processes:
                process.start()

    def wait(self, seconds: float = PATIENCE) -> Outcome:
        """How it ended; an AssertionError with its words if it does not."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        slow = [process for process in self.processes if process.exitcode is None]
        for process in slow:
            process.kill()
            process.join()
        assert not slow, f"{len(slow)} ranks did not end:\n{self.said()}"
        return Outcome([process.exitcode for process in self.processes], self.said())

    def said(self) -> str:
        """What the ranks have written so far."""
        return "".join(path.read_text() for path in sorted(Path(self._logs.name).iterdir()))


def _rank(words: list[str], environ: dict[str, str], log: str, strike: Armed | None, struck: bool) -> None:
    """Be a rank; struck: one of the ranks is."""
    from pretrain import decision
    from pretrain.__main__ import leave, main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environ)
    if struck:
        decision.ANSWER = 0.0  # they exchange before every update: a strike has its effect at a known one
    if strike:
        strike.arm()
    leave(main(words))


def torch_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}


def attempt(words: list[str], ranks: int = 1, strike: Armed | None = None) -> Outcome:
    """Starts and waits."""
    return Attempt(words, ranks, strike).wait()


def finish(words: list[str], ranks: int = 1) -> Outcome:
    """Starts and expects that the budget is spent."""
    outcome = attempt(words, ranks)
    assert outcome.codes == [0] * ranks, outcome.text
    return outcome


def result(run: Path) -> dict[str, Any]:
    """What two runs that did the same agree on, to the last bit."""
    return {**kept(run), "losses": losses(run)}


def kept(run: Path) -> dict[str, Any]:
    """The same, but for what only metrics.jsonl says."""
    files = checkpoint.find_verified(run)[0]
    totals = ledger.total([run])
    return {
        "step": files.name,
        "tensors": {
            name: sha256((files / name).read_bytes()).hexdigest() for name in checkpoint.FILES.values()
        },
        "spent": {name: getattr(totals, name) for name in ("steps", *ledger.COUNTERS[1:])},
    }


def losses(run: Path) -> list[tuple[int, float | None, float | None, float | None]]:
    """(step, training loss, gradient norm, held-out loss) of every logged step."""
    names = ("loss", "grad_norm", "held_out_loss")
    return [(line["step"], *map(line.get, names)) for line in read_metrics(run)]
