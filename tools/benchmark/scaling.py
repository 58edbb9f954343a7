"""What more ranks bring: tensor parallelism by the block, data parallelism and ZeRO by the update.

Ranks are processes of this machine (gloo, one thread each; on GPUs NCCL and one device each), started
anew for each row; a row's rounds take turns with its peer inside them.

    tensor 2 / 1        seconds of one layer's forward and backward pass on a rank, against the whole layer
    zero 1 / plain      seconds of an update of the DeepSpeed engine on one rank, against the plain engine
    data 2 / 1          slots a second of two ranks, against one
"""

import argparse
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.parallel import tensor_parallel, topology
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import SIZES, BenchmarkTask, device_name, in_turns, ours
from tools.shared import console, measure
from tools.shared.measure import BenchmarkRow, Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with WORD in their name")


def count(args: argparse.Namespace) -> int:
    return len(benchmark_task.tasks(args)) * len(chosen(args))


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the rows that were asked for."""
    return console.matching(SUBJECTS, [args.only])


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    for task in benchmark_task.tasks(args):
        if task.device.type == "cuda" and torch.cuda.device_count() < 2:
            raise UserError("scaling: needs two GPUs; add --device cpu")
        what = f"{task.size} {task.length}, {task.precision}"
        for name in chosen(args):
            ranks, unit, measured = SUBJECTS[name]
            seconds = on_ranks(ranks, measured, task, args.runs)
            done(1)
            packages = ["torch", "megatron-core", "deepspeed"]
            settings = {**task.settings(), "threads": 1, "ranks": ranks}
            common: dict[str, Any] = {"dtype": task.precision, "device_name": device_name(task.device)}
            yield measure.row(f"{name}, {what}", unit, *seconds, packages, settings=settings, **common)


Seconds = tuple[list[float], list[float]]
"""Ours and the peer's, in the same rounds."""


def tensor_block(task: BenchmarkTask, runs: int) -> Seconds:
    """Time a layer divided between the ranks, and whole; every rank times both."""
    place = topology.connect(tensor=2)
    whole, divided = (task.module(task.config()).to(place.device) for _ in range(2))
    tensor_parallel.shard(divided, place)
    sides = {name: passes(task, model.layers[1]) for name, model in (("two", divided), ("one", whole))}
    found = in_turns(sides, runs, 4, place.device, wall=True)
    place.close()
    return found["two"], found["one"]


def zero_update(task: BenchmarkTask, runs: int) -> Seconds:
    place = topology.connect(needs_group=True)
    zero = ours(task, "mlm", place, train={"engine": "deepspeed"}, parallel={"zero": 1})
    plain = ours(task, "mlm", place)
    found = in_turns({"zero": zero, "plain": plain}, runs, 1, place.device)
    return found["zero"], found["plain"]


def data_update(task: BenchmarkTask, runs: int) -> Seconds:
    """Measure slots a second: two ranks with half of the batch each, and one with half of the batch alone."""
    place = topology.connect()
    half = BenchmarkTask(task.size, task.length, max(1, task.batch_size // 2), task.precision, place.device)
    two = ours(task, "mlm", place)
    one = ours(half, "mlm", topology.Topology(device=place.device))
    found = in_turns({"two": two, "one": one}, runs, 1, place.device, wall=True)
    place.close()
    return [task.slots / s for s in found["two"]], [half.slots / s for s in found["one"]]


SUBJECTS: dict[str, tuple[int, str, Callable[[BenchmarkTask, int], Seconds]]] = {
    "a layer, tensor parallel 2 against 1": (2, "s", tensor_block),
    "an update, zero 1 against the plain engine": (1, "s", zero_update),
    "data parallel 2 against 1": (2, "slots/s", data_update),
}
"""Name -> ranks, unit and what each rank does."""


def passes(task: BenchmarkTask, layer: nn.Module) -> Callable[[], Tensor]:
    """Return one forward and backward pass of a layer over random rows, equal on all ranks."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (task.batch_size, task.length, SIZES[task.size]["hidden_size"])
    x = torch.empty(shape).normal_(generator=generator).to(device).requires_grad_()

    def work() -> Tensor:
        x.grad = None
        layer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            out = layer(x, None)
        out.backward(torch.ones_like(out))
        return out.detach()

    return work


# ---- ranks ---------------------------------------------------------------------------------------


def on_ranks(count: int, function: Callable[..., Seconds], task: BenchmarkTask, runs: int) -> Seconds:
    """Return what rank 0 of `count` processes returns."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_rank, (count, port, queue, function, task, runs), nprocs=count)
    return queue.get()


def _rank(
    rank: int, count: int, port: int, queue: Any, function: Any, task: BenchmarkTask, runs: int
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    torch.set_num_threads(1)
    seconds = function(task, runs)
    if rank == 0:
        queue.put(seconds)
