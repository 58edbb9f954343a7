"""The loss over the vocabulary, forward and backward: ours beside what logits and cross-entropy cost.

Seconds take turns in this process. Peak memory on a CPU is the growth of a fresh process's resident set
over its inputs; on a GPU what torch's allocator saw. Inputs and their gradients are counted in neither
and both: the gradients are made here, so the weight's (W x D) is part of every peak.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.model.loss import ChunkedCrossEntropy, by_liger, by_torch
from pretrain.parallel.topology import device_name
from tools.benchmark import task as benchmark_task
from tools.benchmark.task import VOCAB, in_turns
from tools.shared import console, measure
from tools.shared.measure import BenchmarkRow, Done

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""hidden [N, D], weight [W, D], bias [W], targets [N] -> sum of losses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=console.whole(2), default=4096, help="predicted rows (%(default)s)")
    parser.add_argument("--width", type=console.whole(2), default=768, help="of a row (%(default)s)")
    parser.add_argument(
        "--vocab-size", type=console.whole(2), default=VOCAB, help="rows of the table (%(default)s)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="precisions (fp32)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    benchmark_task.add_threads(parser)
    parser.add_argument("--only", default="", metavar="WORD", help="only peers with WORD in their name")


def count(args: argparse.Namespace) -> int:
    heads = chosen(args, benchmark_task.chosen_device(args.device))
    return len(args.dtype) * len(heads) * (1 + args.runs + 1)


def chosen(args: argparse.Namespace, device: torch.device) -> dict[str, Head]:
    """Return ours and the peers that were asked for."""
    heads = available(device)
    ours, *peers = heads
    return {name: heads[name] for name in (ours, *console.matching(peers, [args.only]))}


def rows(args: argparse.Namespace, done: Done) -> Iterator[BenchmarkRow]:
    """Yield the time and memory of ours beside each peer, for each precision."""
    torch.set_num_threads(args.threads or console.available_cores())
    device = benchmark_task.chosen_device(args.device)
    shape = (args.rows, args.width, args.vocab_size)
    heads = chosen(args, device)
    for precision in args.dtype:
        seconds = in_turns(
            {name: prepared(head, shape, precision, device) for name, head in heads.items()},
            args.runs,
            1 if device.type == "cpu" else 20,
            device,
            done=done,
        )
        memory = {}
        for name in heads:
            memory[name] = peak(name, shape, precision, device)
            done(1)
        settings = {"rows": shape[0], "width": shape[1], "vocab_size": shape[2]}
        common = {
            "dtype": precision,
            "device_name": device_name(device),
            "settings": settings | {"threads": torch.get_num_threads()},
        }
        for name in list(heads)[1:]:
            packages = ["torch", *(["liger-kernel"] if name == "liger" else [])]
            title = f"head against {name}, {shape[0]} x {shape[1]} x {shape[2]}, {precision}"
            yield measure.row(f"{title}: time", "s", seconds["ours"], seconds[name], packages, **common)
            sizes = [memory["ours"]], [memory[name]]
            yield measure.row(f"{title}: peak memory", "MB", sizes[0], sizes[1], packages, **common)


def available(device: torch.device) -> dict[str, Head]:
    """Return ours first, then what this torch and this device have."""
    heads: dict[str, Head] = {
        "ours": lambda h, w, b, t: ChunkedCrossEntropy(len(w))(h, w, b, t)[0],
        "logits and cross-entropy": logits_and_cross_entropy,
        "checkpointed chunks": checkpointed_chunks,
    }
    if hasattr(F, "linear_cross_entropy"):
        heads["linear_cross_entropy"] = by_torch
    if device.type == "cuda" and measure.version("liger-kernel") != "absent":
        heads["liger"] = by_liger
    return heads


def logits_and_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")


def checkpointed_chunks(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Return what a user without a fused kernel writes."""
    return torch.stack(
        [
            checkpoint(logits_and_cross_entropy, h, weight, bias, t, use_reentrant=False)
            for h, t in zip(hidden.split(512), target.split(512), strict=True)
        ]
    ).sum()


def prepared(
    head: Head, shape: tuple[int, int, int], precision: str, device: torch.device
) -> Callable[[], Tensor]:
    """Return loss and gradients of random inputs, ready to be run."""
    N, D, W = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(W, D).normal_(0, 0.02, generator=generator).to(device).requires_grad_()
    bias = torch.zeros(W, device=device, requires_grad=True)
    hidden = torch.empty(N, D).normal_(generator=generator).to(device).requires_grad_()
    target = torch.randint(W, (N,), generator=generator).to(device)

    def work() -> Tensor:
        for tensor in (hidden, weight, bias):
            tensor.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = head(hidden, weight, bias, target)
        (loss / N).backward()
        return loss.detach()

    return work


# ---- memory --------------------------------------------------------------------------------------


def peak(name: str, shape: tuple[int, int, int], precision: str, device: torch.device) -> float:
    """Return MB that a head adds to its inputs at its worst."""
    if device.type == "cuda":
        work = prepared(available(device)[name], shape, precision, device)
        work()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_on_cpu, (name, shape, precision, torch.get_num_threads()))


def _peak_on_cpu(name: str, shape: tuple[int, int, int], precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    head = available(cpu)[name]
    prepared(head, (8, 8, 8), precision, cpu)()  # what the libraries themselves take
    work = prepared(head, shape, precision, cpu)
    return growth(work)


def growth(work: Callable[[], object]) -> float:
    """Return MB by which this process's resident memory grows at its worst while `work` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6
