"""Peak memory of an update beyond what lies there between updates, such as weights and moments.

Ours is the setting, its peer the same without recomputation. Bytes are those of torch's allocator. On a CPU
its events tell them, and each setting has a process of its own: the size of a process would tell less, as
the C library keeps what an earlier update freed.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.parallel.topology import device_name
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import RATE, BenchmarkTask, ours
from tools.shared import measure
from tools.shared.measure import BenchmarkRow, Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=RATE,
        metavar="NAME",
        default=["mlm", "3ml-self"],
        help=f"of {', '.join(RATE)} (mlm 3ml-self)",
    )


def count(args: argparse.Namespace) -> int:
    return len(benchmark_task.tasks(args)) * len(args.methods) * 2


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    for task in benchmark_task.tasks(args):
        for method in args.methods:
            found = {}
            for setting in ("none", "block"):
                found[setting] = peak(task, method, setting)
                done(1)
            yield measure.row(
                f"memory of an update, {method}, recompute block against none,"
                f" {task.size} {task.length}, {task.precision}",
                "MB",
                [found["block"]],
                [found["none"]],
                ["torch"],
                task.precision,
                device_name(task.device),
                settings=task.settings(),
            )


def peak(task: BenchmarkTask, method: str, recompute: str) -> float:
    """Return MB beyond what lies there between two updates."""
    if task.device.type == "cuda":
        return _peak_on_gpu(task, method, recompute)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_on_cpu, (task, method, recompute, torch.get_num_threads()))


def _peak_on_gpu(task: BenchmarkTask, method: str, recompute: str) -> float:
    update = ours(task, method, train={"recompute": recompute})
    update()
    torch.cuda.reset_peak_memory_stats(task.device)
    before = torch.cuda.memory_allocated(task.device)
    update()
    return (torch.cuda.max_memory_allocated(task.device) - before) / 1e6


def _peak_on_cpu(task: BenchmarkTask, method: str, recompute: str, threads: int) -> float:
    torch.set_num_threads(threads)
    update = ours(task, method, train={"recompute": recompute})
    update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        update()
    assert found.profiler and found.profiler.kineto_results
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    events.sort(key=lambda one: one.start_ns())
    return max(accumulate(one.nbytes() for one in events)) / 1e6
