"""Whole updates: our baseline beside its peers, and our late methods beside our own baseline.

A row against a peer is a rate (input slots a second); a row of a late method is time an update, whose
ratio should be the ratio of the FLOPs, which the row carries along. Every side is a process of its own, as
its users would start it, and all of a precision take turns.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from pretrain.build import keep_freed_memory
from pretrain.config import TrainOptions
from pretrain.errors import UserError
from pretrain.parallel.topology import device_name
from tools.benchmark import task as benchmark_task
from tools.benchmark.peers import MODERN, PEERS
from tools.benchmark.task import (
    LATE,
    BenchmarkTask,
    Job,
    Update,
    apart,
    clock_of,
    finish,
    held_bytes,
    ours,
    take_turns,
    timed,
)
from tools.shared import console, measure, outputs, typed_json
from tools.shared.measure import BenchmarkRow, Done
from tools.shared.tables import aligned

_ON_GPU = {"hugging face trainer", "megatron-core"}
"""Peers that are left out on a CPU unless asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        metavar="NAME",
        help=f"of {', '.join(map(repr, PEERS))} (all that this device can run)",
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=LATE,
        metavar="NAME",
        default=["3ml-self", "3ml-query"],
        help=f"of {', '.join(LATE)} (3ml-self 3ml-query)",
    )
    modes = TrainOptions.model_fields["compile"].annotation.__args__  # type: ignore[union-attr]
    parser.add_argument(
        "--compile",
        choices=modes,
        metavar="MODE",
        default="none",
        help=f"our train.compile, of {', '.join(modes)} (%(default)s)",
    )
    parser.add_argument("--float8", action="store_true", help="our train.float8")
    parser.add_argument(
        "--repeat", type=console.whole(1), help="updates of a side in a round (CPU 1, GPU 20)"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="also a Chrome trace and a table of the operations of each of our sides",
    )


def count(args: argparse.Namespace) -> int:
    tasks = benchmark_task.tasks(args)
    sides = 1 + len(args.methods) + len(chosen_peers(args.peers, tasks[0]))
    return len(tasks) * sides * (1 + args.runs)


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    """Yield every row, when the sides of its precision have been measured."""
    for task in benchmark_task.tasks(args):
        yield from table(task, *measured(task, args, done), args.compile, args.float8)


def measured(
    task: BenchmarkTask, args: argparse.Namespace, done: Done
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of an update of every side, round by round, and the most bytes that it has held."""
    settings = {"compile": args.compile, "float8": args.float8}
    makers = {method: partial(our_side, task, method, settings) for method in ["mlm", *args.methods]}
    names = {name: f"{name}-{task.size}-{task.length}-{task.precision}" for name in makers}
    if args.profile:
        check_profiles(args.profile, names.values())
    makers |= {name: partial(PEERS[name][0], task) for name in chosen_peers(args.peers, task)}
    repeat = args.repeat or (20 if task.device.type == "cuda" else 1)
    job = partial(timed, repeat=repeat, device=task.device, clock=clock_of(task.device))
    with apart(makers, task, done) as sides:
        seconds = take_turns({name: partial(side, job) for name, side in sides.items()}, args.runs, done)
        held = {name: side(partial(held_bytes, device=task.device)) for name, side in sides.items()}
        if args.profile:
            for name, stem in names.items():
                write_profile(sides[name], args.profile, stem, task.device)
        return seconds, held


def our_side(task: BenchmarkTask, method: str, settings: dict[str, str | bool]) -> Update:
    """Return our update in the process that `python -m pretrain` makes for it."""
    if task.device.type == "cpu":
        keep_freed_memory()
    return ours(task, method, train=settings)


def chosen_peers(names: list[str] | None, task: BenchmarkTask) -> list[str]:
    """Return those asked for, which must be installed, or those that are and make sense for this task."""
    on_gpu = task.device.type == "cuda"

    def missing(name: str) -> list[str]:
        return [package for package in PEERS[name][1] if measure.version(package) == "absent"]

    if names is None:
        return [
            name
            for name in PEERS
            if not missing(name) and (on_gpu or name not in _ON_GPU) and (name in MODERN or not task.modern)
        ]
    for name in names:
        if missing(name):
            raise UserError(f"--peers {name!r}: {', '.join(missing(name))} is not installed; pip install it")
    if task.modern and (others := [name for name in names if name not in MODERN]):
        raise UserError(f"--peers {others[0]!r}: has no model like {task.size}; take {', '.join(MODERN)}")
    if not on_gpu and "megatron-core" in names:
        raise UserError("--peers megatron-core: its BertModel needs a CUDA device; leave it out")
    return names


def table(
    task: BenchmarkTask, seconds: Mapping[str, list[float]], held: Mapping[str, int], mode: str, float8: bool
) -> Iterator[BenchmarkRow]:
    """Yield the rows of one task's measured rounds."""
    what = f"{task.size} {task.length}, {task.precision}"
    what += f", compile {mode}" * (mode != "none") + ", float8" * float8
    settings = {**task.settings(), "compile": mode, "float8": float8}
    common: dict[str, Any] = {"dtype": task.precision, "device_name": device_name(task.device)}
    for name, times in seconds.items():
        about = settings | {"seconds": statistics.median(times), "peak_bytes": held[name]}
        rates = [task.slots / time for time in times]
        if name in PEERS:
            base = [task.slots / time for time in seconds["mlm"]]
            packages = ["torch", *PEERS[name][1]]
            title = f"mlm against {name}, {what}"
            yield measure.row(title, "slots/s", base, rates, packages, settings=about, **common)
        else:
            work = [task.flops(name) / time / 1e12 for time in times]
            title = f"{name}, {what}"
            yield measure.row(title, "model TFLOP/s", work, [], ["torch"], settings=about, **common)
            if name != "mlm":
                yield measure.row(
                    f"{name} against mlm, {what}",
                    "s an update",
                    times,
                    seconds["mlm"],
                    ["torch"],
                    flop_ratio=task.flop_ratio(name),
                    settings=settings,
                    **common,
                )


# ---- profiles ------------------------------------------------------------------------------------

TOP = 15
"""Operations that a profile names; the others are added up."""


@dataclass(frozen=True)
class OperationTime:
    """What an operation took of an update, by itself."""

    operation: str
    calls: int
    seconds: float
    share: float
    tflops: float | None
    """TFLOP/s of a matrix product, by the shapes that it was called with; None of other operations."""


FIELDS = dict.fromkeys(("operation", "calls", "seconds", "share", "tflops"), "")
"""By which a profile's operations are known, and the trace beside them with them."""


def _profile_files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}-operations.json", folder / f"{name}.json.gz"


def check_profiles(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError where another's file is in the place of a profile."""
    for name in names:
        operations, trace = _profile_files(folder, name)
        outputs.check([operations] if operations.exists() else [operations, trace], fields=FIELDS)


def write_profile(side: Callable[[Job], Any], folder: Path, name: str, device: torch.device) -> None:
    """Write NAME.json.gz, a Chrome trace of one update, and NAME-operations.json; the latter also on
    stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    operations, trace = _profile_files(folder, name)
    found: list[OperationTime] = side(partial(profile, trace=str(trace), device=device))
    outputs.write(operations, typed_json.to_json(found) + "\n", FIELDS)
    table = [(name, "calls", "s", "share", "TFLOP/s")]
    for row in found:
        speed = f"{row.tflops:.3f}" if row.tflops else ""
        table.append((row.operation, f"{row.calls}", f"{row.seconds:.3g}", f"{row.share:.1%}", speed))
    print(aligned(table), file=sys.stderr, flush=True)


def profile(update: Update, trace: str, device: torch.device) -> list[OperationTime]:
    """Write the trace of an update; return its operations by the time that is their own, and on a GPU how
    long no kernel ran, by the kernel that was waited for."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, with_flops=True) as found:
        update()
        finish(device)
    found.export_chrome_trace(trace)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)

    def row(name: str, some: list[Any]) -> OperationTime:
        spent, flops = (sum(getattr(event, what) for event in some) for what in (own, "flops"))
        calls = sum(event.count for event in some)
        speed = flops / spent / 1e6 if flops and "mm" in name else None
        return OperationTime(name, calls, spent / 1e6, spent / total, speed)

    rows = [row(event.key, [event]) for event in events[:TOP]]
    kernels = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events() or ()
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    return [*rows, row(f"{len(events[TOP:])} others", events[TOP:]), *gaps(kernels)]


def gaps(kernels: Iterable[tuple[float, float, str]]) -> list[OperationTime]:
    """Return how long none of the kernels, given as (begin, end, name) in microseconds, ran, by the name of
    the one that ended it, the longest sums first; shares are of the whole span."""
    waited: dict[str, list[float]] = {}
    ran_until, first = None, 0.0
    for begin, end, name in sorted(kernels):
        if ran_until is None:
            ran_until = first = begin
        if begin > ran_until:
            waited.setdefault(name, []).append(begin - ran_until)
        ran_until = max(ran_until, end)
    every = [gap for some in waited.values() for gap in some]
    longest = sorted(waited.items(), key=lambda item: -sum(item[1]))[:TOP]
    sums = [("no kernel", every), *((f"no kernel, before {name}", some) for name, some in longest)]
    return [
        OperationTime(name, len(some), sum(some) / 1e6, sum(some) / (ran_until - first), None)
        for name, some in sums
        if some and ran_until is not None
    ]
