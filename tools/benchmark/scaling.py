"""What more ranks bring: tensor parallelism by the block, data parallelism and ZeRO by the update.

Ranks are processes of this machine (gloo, one thread each; on GPUs NCCL and one device each), started
anew for each row; a row's rounds take turns with its peer inside them.

    tensor 2 / 1        seconds of one layer's forward and backward pass on a rank, against the whole layer
    zero 1 / plain      seconds of an update of the DeepSpeed engine on one rank, against the plain engine
    data 2 / 1          slots a second of two ranks, against one
    an exchange         milliseconds of a sum of a few integers by way of rank 0, as before updates, against
                        that of an all-reduce
    a save              seconds for which ranks do not train, beside training against waited for (`saves`)
    exposed             milliseconds from the end of the slowest rank's backward pass until gradients are
                        added up, of sums that begin in it, against sums that begin then; on links with a
                        rate (root only)
"""

import argparse
import os
import socket
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from pretrain.account import devices
from pretrain.account.recipe import make_recipe
from pretrain.build import build_engine
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch
from pretrain.parallel import tensor_parallel, topology
from pretrain.parallel.engine import TorchEngine
from pretrain.parallel.topology import device_name
from tools.benchmark import network, saves
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import SIZES, VOCAB, BenchmarkTask, in_turns, ours, take_turns
from tools.plan import layouts, traffic
from tools.plan.memory import Layout
from tools.shared import console, measure
from tools.shared.measure import BenchmarkRow, Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with WORD in their name")
    parser.add_argument(
        "--mbit",
        type=console.whole(1),
        default=1000,
        metavar="N",
        help="megabits a second of a rank's link, of `exposed` (%(default)s)",
    )


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
            settings = {**task.settings(), "threads": 1, "ranks": ranks}
            mbit = args.mbit if measured is exposed else None
            if mbit and (problem := network.missing()):
                print(f"{name}: skipped, {problem}", file=sys.stderr)
                continue
            ours_s, peer_s, *passes = on_ranks(ranks, measured, task, args.runs, mbit)
            done(1)
            if mbit:
                settings |= {"mbit": mbit, "load": round(os.getloadavg()[1], 1)}
                settings |= planned(task, ranks, mbit, *passes)
            packages = ["torch", "megatron-core", "deepspeed"]
            common: dict[str, Any] = {"dtype": task.precision, "device_name": device_name(task.device)}
            yield measure.row(f"{name}, {what}", unit, ours_s, peer_s, packages, settings=settings, **common)


SAID = 14
"""Integers of an exchange."""
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


def exposed(task: BenchmarkTask, runs: int) -> tuple[list[float], list[float], list[float]]:
    """Measure milliseconds of sums that nothing hides, with and without overlap, and of the backward passes
    that could hide them.

    From the end of the last rank's pass on: waiting for another rank's computation is no communication.
    """
    place = topology.connect()
    config = task.config(train={"batch_size": place.data_size * task.batch_size})
    built = build_engine(config, task.module(config), place, task.batch_size)
    assert isinstance(built, TorchEngine) and built.sum
    batch, total, passes = Batch.from_masked(task.masked(), place.device), built.sum, []
    finish, begin = total.finish, [0.0]

    def timed() -> None:
        _BARRIER.wait()
        begin.append(perf_counter())
        finish()

    total.finish = timed  # type: ignore[method-assign]

    def update(overlaps: bool) -> float:
        total.overlaps = overlaps
        start = perf_counter()
        built.backward(batch, 1.0)
        total.wait()
        end = perf_counter()
        built.step(0.0)
        passes.append(1e3 * (begin[-1] - start))
        return 1e3 * (end - begin[-1])

    for overlaps in (True, False):
        update(overlaps)
    found = take_turns({name: partial(update, name == "on") for name in ("on", "off")}, runs)
    place.close()
    return found["on"], found["off"], passes[2:]


def exchange(task: BenchmarkTask, runs: int) -> Seconds:
    """Measure milliseconds of an exchange by way of rank 0, and of an all-reduce of as much."""
    place = topology.connect()
    values, tensor = [0] * SAID, torch.zeros(SAID, dtype=torch.int64)
    sides = {"ours": lambda: place.add_up(values), "peer": lambda: dist.all_reduce(tensor)}
    found = in_turns(sides, runs, 200, place.device, wall=True)
    place.close()
    return [1e3 * s for s in found["ours"]], [1e3 * s for s in found["peer"]]


def planned(task: BenchmarkTask, ranks: int, mbit: int, passes: list[float]) -> dict[str, float]:
    """Return what the plan says of the same: milliseconds with and without overlap, given those of a forward
    and backward pass."""
    rate = mbit / 8 * 1e6 / traffic.LINK_SHARE  # the token bucket's is what arrives
    h100 = devices.find("H100")
    assert h100
    device = replace(h100, link=rate, network=rate, gpu=False)  # of which nothing but the links counts
    (phase,) = make_recipe(task.config(), VOCAB).phases
    layout = Layout(data=ranks, micro_batch=task.batch_size, precision=task.precision, gpu=False)
    computing = statistics.median(passes)
    shown, whole = (1e3 * layouts.exposed_seconds(phase, layout, device, ms / 1e3) for ms in (computing, 0.0))
    return {"planned_ms": shown, "planned_peer_ms": whole, "pass_ms": computing}


SUBJECTS: dict[str, tuple[int, str, Callable[[BenchmarkTask, int], Any]]] = {
    "a layer, tensor parallel 2 against 1": (2, "s", tensor_block),
    "an update, zero 1 against the plain engine": (1, "s", zero_update),
    "data parallel 2 against 1": (2, "slots/s", data_update),
    "an exchange of 8 ranks": (8, "ms", exchange),
    **{f"a save of 2 ranks, {layout}": (2, "s", partial(saves.stops, layout)) for layout in saves.LAYOUTS},
    "exposed sums of 2 ranks": (2, "ms", exposed),
    "exposed sums of 4 ranks": (4, "ms", exposed),
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


_BARRIER: Any = None
"""Where ranks meet without their network."""


def on_ranks(
    count: int, function: Callable[..., Any], task: BenchmarkTask, runs: int, mbit: int | None = None
) -> Any:
    """Return what rank 0 of `count` processes returns; mbit: of links with such a rate."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = processes.get_context("spawn")
    queue, barrier = context.SimpleQueue(), context.Barrier(count)
    with network.limited(count, mbit) if mbit else nullcontext() as names:
        work = (count, port, queue, barrier, names, function, task, runs)
        processes.spawn(_rank, work, nprocs=count)
    return queue.get()


def _rank(
    rank: int,
    count: int,
    port: int,
    queue: Any,
    barrier: Any,
    names: list[str] | None,
    function: Any,
    task: BenchmarkTask,
    runs: int,
) -> None:
    global _BARRIER
    _BARRIER = barrier
    host = network.address(0) if names else "127.0.0.1"
    if names:
        network.enter(names[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = network.INTERFACE
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": host, **{name: str(value) for name, value in places.items()}}
    torch.set_num_threads(1)
    found = function(task, runs)
    if rank == 0:
        queue.put(found)
