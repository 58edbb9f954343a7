"""Whole updates: our baseline beside its peers, and our late methods beside our own baseline.

A row against a peer is a rate (input slots a second); a row of a late method is time an update, whose
ratio should be the ratio of the FLOPs, which the row carries along. Every side is a process of its own, as
its users would start it, and all of a precision take turns.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pretrain.build import keep_freed_memory
from pretrain.config import TrainOptions
from pretrain.errors import UserError
from tools.benchmark import task as benchmark_task
from tools.benchmark.peers import PEERS
from tools.benchmark.task import RATE, BenchmarkTask, Update, apart, device_name, ours, take_turns
from tools.shared import console, documents, measure, outputs
from tools.shared.measure import BenchmarkRow, Done
from tools.shared.tables import aligned

_ON_GPU = {"hugging face trainer", "megatron-core"}
"""Peers that are left out on a CPU unless asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    late = [method for method in RATE if method != "mlm"]
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
        choices=late,
        metavar="NAME",
        default=["3ml-self", "3ml-query"],
        help=f"of {', '.join(late)} (3ml-self 3ml-query)",
    )
    modes = TrainOptions.model_fields["compile"].annotation.__args__  # type: ignore[union-attr]
    parser.add_argument(
        "--compile",
        choices=modes,
        metavar="MODE",
        default="none",
        help=f"our train.compile, of {', '.join(modes)} (%(default)s)",
    )
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
    sides = 1 + len(args.methods) + len(chosen_peers(args.peers, tasks[0].device))
    return len(tasks) * sides * (1 + args.runs)


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    """Yield every row, when the sides of its precision have been measured."""
    for task in benchmark_task.tasks(args):
        peers = chosen_peers(args.peers, task.device)
        yield from table(task, measured(task, args, peers, done), args.compile)


def measured(
    task: BenchmarkTask, args: argparse.Namespace, peers: list[str], done: Done
) -> dict[str, list[float]]:
    """Return the seconds of an update of every side, round by round."""
    mode = {"compile": args.compile}
    makers = {method: partial(our_side, task, method, mode) for method in ["mlm", *args.methods]}
    if args.profile:
        names = {name: f"{name}-{task.size}-{task.length}-{task.precision}" for name in makers}
        check_profiles(args.profile, names.values())
        for name, make in makers.items():
            write_profile(make, args.profile, names[name])
    makers |= {name: partial(PEERS[name][0], task) for name in peers}
    repeat = args.repeat or (20 if task.device.type == "cuda" else 1)
    with apart(makers, repeat, task, done) as sides:
        return take_turns(sides, args.runs, done)


def our_side(task: BenchmarkTask, method: str, mode: dict[str, str]) -> Update:
    """Return our update in the process that `python -m pretrain` makes for it."""
    if task.device.type == "cpu":
        keep_freed_memory()
    return ours(task, method, train=mode)


def chosen_peers(names: list[str] | None, device: torch.device) -> list[str]:
    """Return those asked for, which must be installed, or those that are and make sense on this device."""

    def missing(name: str) -> list[str]:
        return [package for package in PEERS[name][1] if measure.version(package) == "absent"]

    if names is None:
        return [
            name for name in PEERS if not missing(name) and (device.type == "cuda" or name not in _ON_GPU)
        ]
    for name in names:
        if missing(name):
            raise UserError(f"--peers {name!r}: {', '.join(missing(name))} is not installed; pip install it")
    if device.type == "cpu" and "megatron-core" in names:
        raise UserError("--peers megatron-core: its BertModel needs a CUDA device; leave it out")
    return names


def table(task: BenchmarkTask, seconds: Mapping[str, list[float]], mode: str) -> Iterator[BenchmarkRow]:
    """Yield the rows of one task's measured rounds."""
    what = f"{task.size} {task.length}, {task.precision}"
    settings = {**task.settings(), "compile": mode}
    common: dict[str, Any] = {
        "dtype": task.precision,
        "device_name": device_name(task.device),
        "settings": settings,
    }
    for name, times in seconds.items():
        rates = [task.slots / time for time in times]
        if name in PEERS:
            base = [task.slots / time for time in seconds["mlm"]]
            packages = ["torch", *PEERS[name][1]]
            yield measure.row(f"mlm against {name}, {what}", "slots/s", base, rates, packages, **common)
        else:
            work = [task.flops(name) / time / 1e12 for time in times]
            yield measure.row(f"{name}, {what}", "model TFLOP/s", work, [], ["torch"], **common)
            if name != "mlm":
                yield measure.row(
                    f"{name} against mlm, {what}",
                    "s an update",
                    times,
                    seconds["mlm"],
                    ["torch"],
                    flop_ratio=task.flop_ratio(name),
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


def write_profile(make: Callable[[], Update], folder: Path, name: str) -> None:
    """Write NAME.json.gz, a Chrome trace of one update, and NAME-operations.json; the latter also on
    stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    operations, trace = _profile_files(folder, name)
    places = (make, str(trace), torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory is not kept
        found = pool.apply(profile, places)
    outputs.write(operations, documents.to_json(found) + "\n", FIELDS)
    table = [(name, "calls", "s", "share", "TFLOP/s")]
    for row in found:
        speed = f"{row.tflops:.3f}" if row.tflops else ""
        table.append((row.operation, f"{row.calls}", f"{row.seconds:.3f}", f"{row.share:.1%}", speed))
    print(aligned(table), file=sys.stderr, flush=True)


def profile(make: Callable[[], Update], trace: str, threads: int) -> list[OperationTime]:
    """Writes the trace of an update after a first one; its operations by the time that is their own."""
    torch.set_num_threads(threads)
    update = make()
    update()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, with_flops=True) as found:
        update()
        if on_gpu:
            torch.cuda.synchronize()
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
    return [*rows, row(f"{len(events[TOP:])} others", events[TOP:])]
