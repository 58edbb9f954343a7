"""What can befall a run, where, and what it is promised to do then.

Inside a rank a fault strikes at one call of a function: `Plan.arm` wraps that function in the process of the
rank, so that production code has no hooks. What happens then is real: a signal, a full file system, a thread
that raises. Faults between two starts damage files; see `damage`.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.runs import owner_of

PAUSE = 0.2  # seconds of a rank that sleeps, stands still or holds the interpreter
BALLAST = "ballast"
"""Name of the file that fills the disk."""


@dataclass(frozen=True)
class Fault:
    """One fault as it was drawn."""

    kind: str
    place: str
    """A name of `PLACES`, or a file."""
    at: int = 1
    """Which call at that place, from the start of the attempt."""
    rank: int = 0


class Place(NamedTuple):
    """Functions whose calls are counted; within: only those that are made in this one."""

    targets: tuple[str, ...]
    calls: int
    """A fault is drawn for one of the first so many."""
    within: str = ""
    main: bool = False
    """Rank 0 alone comes by."""


def _both(method: str) -> tuple[str, ...]:
    engines = ("pretrain.parallel.engine:TorchEngine", "pretrain.parallel.deepspeed_engine:DeepSpeedEngine")
    return tuple(f"{engine}.{method}" for engine in engines)


PLACES = {
    "claim": Place(("pretrain.run_folder:RunFolder.claim",), 1, main=True),
    "inputs": Place(("pretrain.inputs:open_inputs",), 1),
    "build": Place(("pretrain.build:build_engine", "pretrain.start:open_feed"), 2),
    "batch": Place(("pretrain.feed:Feed.take",), 4),
    "backward": Place(_both("backward"), 4),
    "update": Place(_both("_update"), 4),
    "evaluation": Place(("pretrain.evaluate:HeldOut.score",), 1),
    "save": Place(("os:fsync", "os:replace"), 30, "pretrain.checkpoint:_write", main=True),
    "gathering": Place(("pretrain.checkpoint:save",), 2),
    "copying": Place(("pretrain.checkpoint:Writer._copy_all",), 2),
    "joining": Place(("pretrain.parallel.engine:join",), 3),
    "ledger": Place(("os:fsync",), 8, "pretrain.account.ledger_writer:Ledger.note", main=True),
    "metrics": Place(("pretrain.monitor:Monitor.log",), 4, main=True),
    "status": Place(("pretrain.run_folder:RunFolder.write_status",), 3, main=True),
    "end": Place(("pretrain.train:finish", "pretrain.train:close"), 2),
}
BESIDE = ("copying", "joining")
"""On the thread that writes; not drawn yet."""
EVERYWHERE = tuple(place for place in PLACES if place not in BESIDE)
TRAINING = ("batch", "backward", "update", "evaluation", "save", "gathering", "ledger", "metrics")


class Kind(NamedTuple):
    """Where a fault strikes, and the promise: exit codes, and words of rank 0 (a pattern)."""

    places: tuple[str, ...]
    victim: tuple[int, ...] = ()
    """Codes that the rank may leave with; none: it goes on."""
    others: tuple[int, ...] = ()
    says: str = ""


_LEFT = (1, 75)
"""Codes of ranks that another has left in a collective: start again, as far as they know."""
_STOPPED = r"stopped by (SIG\w+|another rank);|interrupted; what came after|: the budget is spent"
_NO_SPACE = r"^error: \S+/\S+: .*free space|the budget is spent"
INSIDE = {
    "kill": Kind(EVERYWHERE, (-9,), _LEFT),
    "kill all": Kind(EVERYWHERE, (-9,), (-9,)),
    "torn line": Kind(("ledger", "metrics"), (-9,), _LEFT),
    "segfault": Kind(TRAINING, (-11,), _LEFT),
    "abort": Kind(TRAINING, (-6,), _LEFT),
    "raise": Kind(TRAINING, (1,), _LEFT),
    "raise from a thread": Kind(("batch", "backward", "update"), (1,), _LEFT),
    "SIGTERM": Kind(EVERYWHERE[1:], (75, 0), (75, 0), _STOPPED),
    "SIGINT": Kind(EVERYWHERE[1:], (75, 0), (75, 0), _STOPPED),
    "SIGUSR1": Kind(EVERYWHERE[1:], (75, 0), (75, 0), _STOPPED),
    "storm": Kind(TRAINING, (75, 0), (75, 0), _STOPPED),
    "Ctrl-C twice": Kind(TRAINING, (75, 0), (75, 0), _STOPPED),
    "disk full": Kind(
        ("build", "save", "gathering", "ledger", "metrics", "status"), (2, 0), (2, 0, *_LEFT), _NO_SPACE
    ),
    "not a number": Kind(("backward",), (2,), (2,), r"^error: step \d+: the gradients of the last"),
}
"""Faults that end an attempt."""
PASSING = {
    "sleep": Kind(TRAINING),
    "SIGSTOP, SIGCONT": Kind(TRAINING),
    "interpreter held": Kind(TRAINING),
    "thread dies": Kind(TRAINING),
    "clock jumps": Kind(TRAINING),
    "double start": Kind(("batch", "save")),
}
"""Faults that a run takes no notice of."""
DAMAGES = ("truncated", "emptied", "flipped", "removed")
OUTSIDE = {
    **{f"file {damage}": f"a file of the run {damage}" for damage in DAMAGES},
    **{f"input {damage}": f"a file of the corpus or tokenizer {damage}" for damage in DAMAGES},
    "input changed": "another corpus in its place",
    "stale lock": "the lock of a host that is dead",
    "read-only": "the file system is read-only",
}
"""Faults between two starts."""
NEEDS_DISK = ("disk full", "read-only")
"""Kinds that need a file system of their own, which takes root."""
KINDS = (*INSIDE, *PASSING, *OUTSIDE)


@dataclass(frozen=True)
class Plan:
    """The faults of one attempt inside its ranks, and where rank and campaign meet."""

    faults: dict[int, Fault]
    """By their numbers."""
    control: Path
    """Folder of marks: `struck-N` when fault N has struck, `go-N` when the rank that waits may go on."""
    disk: Path
    """The file system that can be filled."""

    def at_rank(self, rank: int) -> "Plan":
        """Return the faults of one rank."""
        return replace(self, faults={n: fault for n, fault in self.faults.items() if fault.rank == rank})

    def struck(self, number: int) -> bool:
        return (self.control / f"struck-{number}").exists()

    def arm(self) -> None:
        """Make the functions of this process strike; called in the rank before it begins."""
        for number, fault in self.faults.items():
            _wrap(fault, lambda *args, n=number, f=fault: self._strike(n, f, *args))

    def _strike(self, number: int, fault: Fault, *args: Any) -> None:
        (self.control / f"struck-{number}").touch()
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill all" | "double start":  # the campaign does it
                self._wait(number)
            case "torn line":
                name = "ledger.jsonl" if fault.place == "ledger" else "metrics.jsonl"
                with open(args[0]._path.with_name(name), "ab") as file:  # of a Ledger or a Monitor
                    file.write(b'{"previous": "12')
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "abort":
                os.abort()
            case "raise":
                raise RuntimeError("injected")
            case "raise from a thread":
                _raise_in_main_thread()
            case "SIGTERM" | "SIGINT" | "SIGUSR1":
                os.kill(os.getpid(), signal.Signals[fault.kind])
            case "SIGSTOP, SIGCONT":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "disk full":
                fill(self.disk)
            case "not a number":
                args[0].module.register_forward_hook(_not_a_number)
            case "sleep":
                time.sleep(PAUSE)
            case "interpreter held":
                ctypes.PyDLL(None).usleep(int(1e6 * PAUSE))
            case "thread dies":
                threading.Thread(target=_die).start()
            case "clock jumps":
                there, shift = time.time, (fault.at % 2 or -1) * 1e5 * fault.at
                time.time = lambda: there() + shift

    def _wait(self, number: int) -> None:
        while not (self.control / f"go-{number}").exists():
            time.sleep(0.005)


def _wrap(fault: Fault, strike: Callable[..., None]) -> None:
    """Let the call number `at` at the fault's place strike before it does what it does."""
    place, calls, inside = PLACES[fault.place], count(1), [not PLACES[fault.place].within]
    holder: list[tuple[Any, ...]] = [()]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0] and next(calls) == fault.at:
                strike(*(holder[0] or args))
            return function(*args, **kwargs)

        return call

    def entered(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside[0], holder[0] = True, args
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] = False

        return call

    for target in place.targets:
        owner, name = owner_of(target)
        setattr(owner, name, counted(getattr(owner, name)))
    if place.within:
        owner, name = owner_of(place.within)
        setattr(owner, name, entered(getattr(owner, name)))


def _raise_in_main_thread() -> None:
    main = threading.main_thread().ident
    assert main
    thrower = ctypes.pythonapi.PyThreadState_SetAsyncExc
    thread = threading.Thread(target=lambda: thrower(ctypes.c_ulong(main), ctypes.py_object(RuntimeError)))
    thread.start()
    thread.join()


def _die() -> None:
    raise RuntimeError("injected, in a thread that nobody waits for")


def _not_a_number(module: Any, args: Any, output: Any) -> Any:
    return output * float("nan")


def fill(disk: Path) -> None:
    """Fill a file system to the last byte."""
    with open(disk / BALLAST, "ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def free(disk: Path) -> None:
    """Give back what `fill` took."""
    (disk / BALLAST).unlink(missing_ok=True)


def damage(path: Path, kind: str, where: float) -> None:
    """Damage a file, in the last word of the kind's name; where: share of its bytes."""
    size = path.stat().st_size
    match kind.split()[-1]:
        case "truncated":
            os.truncate(path, int(where * size))
        case "emptied":
            os.truncate(path, 0)
        case "removed":
            path.unlink()
        case "flipped":
            data = bytearray(path.read_bytes())
            if data:
                data[min(int(where * size), size - 1)] ^= 1
            path.write_bytes(data)
