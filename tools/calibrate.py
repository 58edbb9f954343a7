"""The plan against this machine: real steps of several configs beside what `tools.plan` says of them.

    python -m tools.calibrate --output tools/plan/plan-cpu.json
    python -m tools.calibrate --device cuda --output tools/plan/plan-h200.json

One config, the first, gives the one number that a plan cannot know: the share of the device's peak that
products reach. The others are predicted with it. What is measured: seconds of a step (median of several,
all ranks starting together), and bytes, as the allocator counts them: the fullest moment of a step by the
allocator's own events. The size of the process would count Python, its libraries and what the C library
keeps for later, and so hide what the tensors take.

A machine that others use too changes its pace from minute to minute, by more than what is asked here. So
each step stands between two products of large matrices, and its seconds are given as they would be at the
pace at which these reach the device's peak (`pace` is how much of it they reached).

The file also says what the device can do (a large matrix product, a long copy, an all-reduce), so that
`tools.plan --device NAME` knows it from then on.

Gloo's threads free tensors unseen by the profiler, so a step is counted from its own beginning,
and of several steps the smallest peak is the true one.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.account import devices
from pretrain.account.devices import Device
from pretrain.account.recipe import Phase, Recipe
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.provenance import code_revision, processor
from tools.plan import layouts
from tools.plan.estimate import planned_recipe
from tools.plan.memory import Layout
from tools.plan.schema import CalibratedCase, Calibration, MedianErrors
from tools.shared import console, measure, outputs, typed_json
from tools.shared.tables import aligned

if TYPE_CHECKING:
    import torch

    from pretrain.parallel.topology import Topology

CONFIGS = Path(__file__).parent.parent / "configs"
STEPS = 5
"""Measured, after one that warms up."""
SIZE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices whose product is the measure of the device's pace."""
PACE = {"cpu": "fp32", "cuda": "bf16"}
"""Their precision."""
FIELDS = dict.fromkeys(("device", "achieved", "median_error", "rows"), "")
"""By which the document is known."""


@dataclass(frozen=True)
class Case:
    """A config as it is run here, on so many ranks of a thread, or of a GPU, each."""

    name: str
    config: str
    overrides: tuple[str, ...]
    ranks: int = 1


PLAIN = ("train.engine=torch", "parallel.zero=0", "model.dropout=0", "train.precision=fp32")
BASE = (*PLAIN, "train.seq_length=128", "train.batch_size=4", "train.micro_batch_size=4")
LONG = (*PLAIN, "train.batch_size=2", "train.micro_batch_size=1")
DEMO = ("train.precision=fp32", "model.vocab_size=4096")
ZERO = (*DEMO, "train.engine=deepspeed", "train.micro_batch_size=4")
CASES = (
    Case("mlm-base", "mlm-base", BASE),
    Case("3ml-self-base", "3ml-self-base", BASE),
    Case("3ml-cross-base", "3ml-cross-base", BASE),
    Case("3ml-query-base", "3ml-query-base", BASE),
    Case("mae-lm-base", "mae-lm-base", BASE),
    Case("mlm-base, recompute", "mlm-base", (*BASE, "train.recompute=block")),
    Case("mlm-base, 512 tokens", "mlm-base", LONG),
    Case("demo-mlm", "demo-mlm", DEMO),
    Case("demo-3ml", "demo-3ml", DEMO),
    Case("demo-mlm, 2 ranks", "demo-mlm", DEMO, 2),
    Case("demo-3ml, ZeRO 1", "demo-3ml", (*ZERO, "parallel.zero=1"), 2),
    Case("demo-3ml, ZeRO 2", "demo-3ml", (*ZERO, "parallel.zero=2"), 2),
    Case("demo-3ml, ZeRO 3", "demo-3ml", (*ZERO, "parallel.zero=3"), 2),
    Case("demo-mlm, TP 2", "demo-mlm", (*DEMO, "parallel.tensor=2"), 2),
)

GPU = (*PLAIN[:-1], "train.precision=bf16")
SHORT = (*GPU, "train.seq_length=128", "train.batch_size=256", "train.micro_batch_size=256")
FULL_LENGTH = (*GPU, "train.seq_length=512", "train.batch_size=64", "train.micro_batch_size=64")
ON_GPU = (
    Case("mlm-base", "mlm-base", SHORT),
    Case("3ml-query-base", "3ml-query-base", SHORT),
    Case("mlm-large, 512 tokens", "mlm-large", FULL_LENGTH),
    Case("3ml-query-large, 512 tokens", "3ml-query-large", FULL_LENGTH),
    Case("mlm-base, recompute", "mlm-base", (*SHORT, "train.recompute=block")),
    Case("mlm-base, 4 micro-batches", "mlm-base", (*SHORT, "train.micro_batch_size=64")),
)
"""What a GPU is held against, few: each takes a process that starts anew."""


# ---- on the ranks --------------------------------------------------------------------------------


def step_of(recipe: Recipe, micro: int, here: "Topology") -> Callable[[], None]:
    """Return one update of a new engine in this process."""
    import torch

    from pretrain.build import build_engine
    from pretrain.model import late_mask as model

    config, pieces, rows = recipe.config, recipe.vocab_size, recipe.phases[0].rows
    built = model.LateMaskModel(config.model, pieces, pieces - 1, config.train.recompute == "block")
    model.init_weights(built, config.run.seed)
    made = build_engine(config, built, here, micro)
    accumulation = config.train.batch_size // (micro * here.data_size)

    ids = torch.randint(4, pieces - 1, (micro, rows.length), device=here.device)
    positions = torch.rand(micro, rows.length, device=here.device).argsort(1)
    targets = ids[:, -rows.predicted :].contiguous()
    batch = model.Batch(ids, positions, targets, rows.length - rows.visible)

    def step() -> None:
        for _ in range(accumulation):
            made.backward(batch, 1 / accumulation)
        made.step(config.optimizer.lr)

    return step


def measured(recipe: Recipe, micro: int, peak: float) -> tuple[float, float, int]:
    """Return (seconds of a step at full pace, pace, bytes at its fullest moment) on this rank.

    peak: FLOP/s of the products that tell the pace.
    """
    from pretrain.parallel import topology

    here = topology.connect(
        recipe.config.parallel.tensor, needs_group=recipe.config.train.engine == "deepspeed"
    )
    seconds, pace = timed(recipe, micro, peak, here)
    gc.collect()
    return seconds, pace, (held if here.device.type == "cpu" else held_on_gpu)(recipe, micro, here)


def timed(recipe: Recipe, micro: int, peak: float, here: "Topology") -> tuple[float, float]:
    """Return (median seconds of a step at full pace, median pace), from when all ranks are ready until all
    are."""
    step = step_of(recipe, micro, here)
    matrix, size = _matrix(here.device), SIZE[here.device.type]

    def lasts(action: Callable[[], Any]) -> float:
        _wait(here)
        begin = time.perf_counter()
        action()
        _wait(here)
        return time.perf_counter() - begin

    step()
    products = [lasts(lambda: matrix @ matrix)]
    seconds = []
    for _ in range(STEPS):
        seconds.append(lasts(step))
        products.append(lasts(lambda: matrix @ matrix))
    paces = [2 * 2 * size**3 / peak / sum(pair) for pair in zip(products, products[1:], strict=False)]
    full = [lasted * pace for lasted, pace in zip(seconds, paces, strict=True)]
    return statistics.median(full), statistics.median(paces)


def _matrix(device: "torch.device") -> "torch.Tensor":
    """A square one, whose product is the measure of the pace."""
    import torch

    size, dtype = SIZE[device.type], {"fp32": torch.float32, "bf16": torch.bfloat16}[PACE[device.type]]
    return torch.randn(size, size, dtype=dtype, device=device)


def _wait(here: "Topology") -> None:
    """Wait for what this device has to do, and for the other ranks."""
    import torch

    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
    here.barrier()


def held_on_gpu(recipe: Recipe, micro: int, here: "Topology") -> int:
    """Return the bytes of tensors at the fullest moment of a step, as the GPU's allocator counted them."""
    import torch

    before = torch.cuda.memory_allocated(here.device)
    step = step_of(recipe, micro, here)
    step()
    torch.cuda.reset_peak_memory_stats(here.device)
    step()
    return torch.cuda.max_memory_allocated(here.device) - before


def held(recipe: Recipe, micro: int, here: "Topology") -> int:
    """Return the bytes of tensors at the fullest moment of a step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = step_of(recipe, micro, here)
        for number in range(STEPS):
            with record_function(f"step {number}"):
                step()
    assert profiler.profiler and profiler.profiler.kineto_results
    events = profiler.profiler.kineto_results.events()
    changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    spans = sorted((one.start_ns(), one.end_ns()) for one in events if one.name().startswith("step "))
    return fullest(changes, spans)


def fullest(changes: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> int:
    """Return (time, bytes more or less) and (begin, end) of steps -> largest sum in a step.

    What is left from one step to the next is no tensor of ours: the first begins at the true level.
    """
    level, levels = 0, []
    for _, change in changes:
        level += change
        levels.append(level)
    times = [moment for moment, _ in changes]
    peaks, starts = [], []
    for begin, end in spans:
        inside = [level for moment, level in zip(times, levels, strict=True) if begin <= moment <= end]
        before = [level for moment, level in zip(times, levels, strict=True) if moment < begin]
        starts.append(before[-1])
        peaks.append(max(inside) - before[-1])
    return starts[0] + min(peaks)


def bounds() -> dict[str, float]:
    """Return FLOP/s of matrix products, bytes/s of a copy and of an all-reduce, on this rank."""
    import torch
    import torch.distributed as dist

    from pretrain.parallel import topology

    here = topology.connect(needs_group=True)
    found: dict[str, float] = {}
    size = SIZE["cpu"]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        one = torch.randn(size, size, dtype=dtype)
        found[name] = 2 * size**3 / _quickest(lambda one=one: one @ one)  # type: ignore[misc]
    source, target = torch.ones(2**26), torch.ones(2**26)
    found["copy"] = 2 * 4 * 2**26 / _quickest(lambda: target.copy_(source))
    part = target[: 2**23]
    # Of two ranks each sends as much as the tensor holds.
    found["link"] = 4 * 2**23 / _quickest(lambda: dist.all_reduce(part))
    word = target[:1]
    found["latency"] = _quickest(lambda: dist.all_reduce(word), 100) / 2
    here.barrier()
    return found


def products_on_gpu() -> tuple[str, float]:
    """Return (name of the GPU, FLOP/s of the products that tell its pace)."""
    import torch

    from pretrain.parallel import topology

    here = topology.connect()
    matrix = _matrix(here.device)

    def product() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize(here.device)

    return torch.cuda.get_device_name(here.device), 20 * 2 * SIZE["cuda"] ** 3 / _quickest(product)


def _quickest(action: Callable[[], Any], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def launch(ranks: int, function: Callable[..., Any], *args: Any, gpu: bool = False) -> Any:
    """Return what the function returns on rank 0 of so many new processes."""
    import torch.distributed.launcher.api as launcher

    if not gpu:
        os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    settings = launcher.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="calibrate",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    return launcher.elastic_launch(settings, function)(*args)[0]


# ---- here ----------------------------------------------------------------------------------------


def this_gpu() -> tuple[Device, float]:
    """Return this machine's GPU as the table has it, and the FLOP/s of its products.

    UserError without a GPU, or with one that the table lacks.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; leave it out")
    name, products = launch(1, products_on_gpu, gpu=True)
    device = devices.find(name)
    if device is None:
        raise UserError(
            f"--device cuda: {name} is not in the table of pretrain/account/devices.py; add it there"
        )
    return device, products


def this_core() -> Device:
    """Return a core of this machine as a device, by its measured bounds."""
    found = launch(2, bounds)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = console.available_cores()
    return Device(
        name=f"{processor()} core",
        peak={"bf16": found["bf16"], "fp32": found["fp32"]},
        memory=memory / cores,
        bandwidth=found["copy"],
        link=found["link"],
        network=found["link"],
        per_node=cores,
        watts=0.0,
        host=found["copy"],
        source="measured by tools.calibrate",
        gpu=False,
        latency=found["latency"],
    )


@dataclass(frozen=True)
class Observation:
    """A case as it was measured: seconds of a step, at which pace, and bytes at its fullest moment."""

    case: Case
    phase: Phase
    layout: Layout
    seconds: float
    pace: float
    bytes: int


def observed(case: Case, device: Device, products: float) -> Observation:
    """Return a case's layout, its seconds and bytes; products: FLOP/s of those that tell the pace."""
    config = load_config(CONFIGS / f"{case.config}.yaml", list(case.overrides))
    recipe, _ = planned_recipe(config, device)
    phase = recipe.phases[0]
    layout = layouts.configured(recipe.config, case.ranks, phase.precision, gpu=device.gpu)
    seconds, pace, held_bytes = launch(
        case.ranks, measured, recipe, layout.micro_batch, products, gpu=device.gpu
    )
    return Observation(case, phase, layout, seconds, pace, held_bytes)


def compared(found: Sequence[Observation], device: Device) -> Calibration:
    """Return what a calibration says: the first case gives the share, the others are held against it."""
    first = found[0]
    share = layouts.share_of(first.phase, first.layout, device, first.seconds)
    rows = [_beside_its_plan(one, device, share) for one in found]
    return Calibration(
        device=device,
        achieved={first.layout.precision: share},
        median_error=MedianErrors(
            seconds=statistics.median(abs(row.seconds_error) for row in rows[1:] or rows),
            bytes=statistics.median(abs(row.bytes_error) for row in rows),
        ),
        rows=rows,
        versions={name: measure.version(name) for name in ("torch", "deepspeed", "megatron-core")},
        commit=code_revision(),
    )


def _beside_its_plan(one: Observation, device: Device, share: float) -> CalibratedCase:
    seconds = layouts.step_seconds(one.phase, one.layout, device, share)
    held = layouts.memory_of(one.phase, one.layout).total
    return CalibratedCase(
        name=one.case.name,
        config=one.case.config,
        overrides=one.case.overrides,
        layout=one.layout,
        planned_bytes=held,
        seconds=one.seconds,
        pace=one.pace,
        bytes=one.bytes,
        planned_seconds=seconds,
        seconds_error=seconds / one.seconds - 1,
        bytes_error=held / one.bytes - 1,
    )


def text(document: Calibration) -> str:
    """Return the rows as a table."""
    table = [["case", "s planned", "measured", "error", "MB planned", "measured", "error"]]
    for row in document.rows:
        table.append(
            [
                row.name,
                f"{row.planned_seconds:.3f}",
                f"{row.seconds:.3f}",
                f"{row.seconds_error:+.1%}",
                f"{row.planned_bytes / 1e6:,.0f}",
                f"{row.bytes / 1e6:,.0f}",
                f"{row.bytes_error:+.1%}",
            ]
        )
    (share,) = document.achieved.values()
    errors = document.median_error
    return (
        f"{document.device.name}, {share:.2f} of its peak in products by the first row.\n\n"
        f"{aligned(table)}\n\n"
        f"Median error of seconds {errors.seconds:.1%} (the first row apart), of bytes {errors.bytes:.1%}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("calibrate", "Hold the plan against real steps on this machine", reports=True)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="cases whose name holds one of the words"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="whose steps: cores', or a GPU's (%(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the document, for tools.plan too")
    parser.add_argument("--list", action="store_true", help="name the cases and measure nothing")
    args = parser.parse_args(arguments)
    known = ON_GPU if args.device == "cuda" else CASES
    chosen = console.matching((case.name for case in known), args.only)
    cases = [case for case in known if case.name in chosen]
    if args.list and args.json:
        console.print_json(cases)
        return 0
    if args.list:
        print("\n".join(f"{case.name}: {' '.join(case.overrides)}" for case in cases))
        return 0
    if args.output:
        outputs.check([args.output], fields=FIELDS)
    if args.device == "cuda":
        device, products = this_gpu()
    else:
        device = this_core()
        products = device.peak[PACE["cpu"]]
    rows = []
    with console.counter("cases", len(cases), "cases") as done:
        for case in cases:
            rows.append(observed(case, device, products))
            done(1)
    document = compared(rows, device)
    if args.output:
        outputs.write(args.output, typed_json.to_json(document) + "\n", FIELDS)
    if args.json:
        console.print_json(document)
    else:
        print(text(document))
    return 0


if __name__ == "__main__":
    console.run(main)
