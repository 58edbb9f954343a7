"""The update of the parameters: Muon and StableAdamW beside AdamW, and what Muon adds to a whole update.

Engines over one model take turns with the same gradients; clipping is a part of each. Forward and backward
pass are measured on the task's batch and count by its rows, for an update of 32,768 rows a rank: an update of
the parameters takes as long however many rows there are.

With data parallelism a rank orthogonalises its share of the matrices. It is measured as the first of so many
ranks, alone: what ranks send each other is left out.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

from pretrain.account import flops
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.parallel import topology
from pretrain.parallel.engine import Engine, TorchEngine
from pretrain.parallel.topology import device_name
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import LEARNING_RATE, BenchmarkTask, clock_of, take_turns
from tools.shared import console, measure
from tools.shared.measure import BenchmarkRow, Done

ROWS = 32_768
"""Of a rank in the update that Muon's share is of."""
PASSES = "forward and backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark_task.add_arguments(parser)
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=console.whole(1),
        default=[1, 8],
        help="data-parallel ranks that share Muon's matrices (1 8)",
    )


def count(args: argparse.Namespace) -> int:
    return len(args.dtype) * args.runs * (3 + len(args.ranks))


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    for task in benchmark_task.tasks(args):
        sides = _sides(task, args.ranks)
        for side in sides.values():
            side()  # warm
        seconds = take_turns(sides, args.runs, done)
        passes = [ROWS / task.slots * one for one in seconds[PASSES]]
        model, what = task.config().model, f"{task.size}, {task.precision}"
        name = f"update of the parameters, stable-adamw against adamw, {what}"
        yield _row(task, name, seconds["stable-adamw"], seconds["adamw"])
        for ranks in args.ranks:
            ours, about = seconds[_name(ranks)], {"ranks": ranks, "rows": ROWS}
            name = f"update of the parameters, {_name(ranks)} against adamw, {what}"
            yield _row(task, name, ours, seconds["adamw"], **about)
            added = [mine - adam for mine, adam in zip(ours, seconds["adamw"], strict=True)]
            whole = [one + mine for one, mine in zip(passes, ours, strict=True)]
            own = flops.muon(model) / ranks
            row = _row(task, f"what {_name(ranks)} adds to an update, {what}", added, whole, **about)
            yield replace(row, flop_ratio=own / (own + task.flops("mlm") * ROWS / task.slots))


def _row(
    task: BenchmarkTask, name: str, ours: list[float], peer: list[float], **settings: int
) -> BenchmarkRow:
    device, about = device_name(task.device), task.settings() | settings
    return measure.row(name, "s", ours, peer, ["torch"], task.precision, device, settings=about)


def _name(ranks: int) -> str:
    return f"muon on {ranks} rank{'s' * (ranks > 1)}"


def _sides(task: BenchmarkTask, ranks: list[int]) -> dict[str, Callable[[], float]]:
    """What returns the seconds of each."""
    batch = Batch.from_masked(task.masked(), task.device)
    module = task.module(task.config())
    engines = {kind: _engine(task, module, kind) for kind in ("adamw", "stable-adamw")}
    engines |= {_name(size): _engine(task, module, "muon", size) for size in ranks}

    def passes() -> float:
        module.zero_grad()
        return _seconds(task, lambda: engines["adamw"].backward(batch, 1.0))

    passes()
    gradients = {parameter: parameter.grad for parameter in module.parameters()}

    def step(engine: Engine) -> float:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return _seconds(task, lambda: engine.step(LEARNING_RATE))

    return {PASSES: passes} | {name: lambda engine=engine: step(engine) for name, engine in engines.items()}


def _engine(task: BenchmarkTask, module: LateMaskModel, kind: str, ranks: int = 1) -> Engine:
    """An engine as the first of so many data-parallel ranks has it, without the others."""
    place = topology.Topology(device=task.device, data_size=ranks)
    return TorchEngine(task.config(optimizer={"kind": kind}), module.to(task.device), place, micro=1)


def _seconds(task: BenchmarkTask, work: Callable[[], object]) -> float:
    return benchmark_task.timed(work, 1, task.device, clock_of(task.device))
