"""How a run can be laid out over devices: what each layout needs, how long a step takes, which is best.

The time of a step is a model, and each of its parts is stated here:

    products     model FLOPs and what recomputation repeats, at the share of the device's dense peak that is
                 achieved: measured where there is a result file of the device, else a default
    traffic      everything that is saved for the backward pass goes to memory three times, a logit's
                 passes and the optimizer's reads and writes besides, at the device's bandwidth
    launches     a micro-batch takes no less than its kernels take to start
    collectives  see traffic.py; all ranks wait for them but for what hides behind a part of the pass in
                 which they run

A layout that fits by the sum of its tensors does not fit a device, whose context, kernels and
fragments take their share (`RESERVE`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.account import devices, flops
from pretrain.account.devices import Device
from pretrain.account.recipe import Phase
from pretrain.config import Config, build_config, geometry
from pretrain.errors import UserError
from tools.plan import memory, traffic
from tools.plan.memory import FULL, Layout, Memory
from tools.plan.schema import CalibratedDevice
from tools.shared import typed_json

RESULTS = Path(__file__).parent
ACHIEVED = 0.4
"""Of a GPU's peak in products, unmeasured: what ModernBERT's published hours on H100s, an MFU of 26 % (base)
and 33 % (large), come to (arXiv 2412.13663)."""
BANDWIDTH_SHARE = 0.85
"""Of a memory's bandwidth that long copies reach: an assumption."""
PASSES = 3
"""Times that a saved byte is written or read: when made, when used, in the backward pass."""
LOGIT_BYTES = 44
"""Moved for a logit in float32: written, maximum, subtracted, exponential, sum, quotient, two products."""
UPDATE_BYTES = 28
"""Moved for a parameter by AdamW: it and both moments read and written, its gradient read."""
LAUNCH, KERNELS = 5e-6, 90
"""Seconds to start a kernel on a GPU, and kernels of a layer's forward and backward pass."""
HOOKS = 1e-3
"""Seconds a layer in which ZeRO-3 gathers and releases its parameters, in Python."""
OVERLAP_SHARE = 0.5
"""Share of a pass behind which its collectives can hide, an assumption: they take kernels' multiprocessors
and bandwidth, and the word table, needed first and reduced last, has nothing to hide behind."""
HOST_BANDWIDTH = 40e9
"""Bytes/s of a host's memory that a device's share of its cores reaches: for offloaded updates."""
RESERVE = 1.5 * 2**30
"""Bytes of a device that tensors do not get: context, kernels, communicators."""
FRAGMENTS = 0.05
"""Of the tensors' bytes, lost between them."""
TOLERANCE = 0.1
"""By so much a simpler layout may be slower than the fastest: on one rank the plan's errors reach as far."""
MARGIN = {0: 0.0, 1: 0.1, 2: 0.15, 3: 0.4}
"""By so much a ZeRO stage must be faster than plain data parallelism to be preferred. It is what the plan was
too fast by, beyond what it was for plain, on two ranks (results/plan-cpu.json: plain 12 %, stages 21, 24 and
38 %); how much of that a GPU hides has not been measured."""


def refuse_precision(phase: Phase, device: Device) -> None:
    """Raise UserError if the device is not known to have the phase's precision."""
    if phase.precision not in device.peak:
        raise UserError(
            f"train.precision = {phase.precision}: how fast {device.name} is in it is not known; take one of"
            f" {', '.join(device.peak)}"
        )


def configured(config: Config, gpus: int, precision: str, gpu: bool = True) -> Layout:
    """Return the layout that a config asks for on so many devices; UserError if they do not divide."""
    parallel, train = config.parallel, config.train
    if gpus % parallel.tensor:
        raise UserError(f"{gpus} GPUs are no multiple of parallel.tensor = {parallel.tensor}; change either")
    data = gpus // parallel.tensor
    micro = train.micro_batch_size or max(1, train.batch_size // data)
    if train.batch_size % (data * micro):
        raise UserError(
            f"train.batch_size = {train.batch_size} is no multiple of data-parallel ranks x micro_batch_size"
            f" = {data} x {micro} on {gpus} GPUs; change one of them"
        )
    return Layout(
        tensor=parallel.tensor,
        data=data,
        micro_batch=micro,
        accumulation=train.batch_size // (data * micro),
        engine=train.engine,
        zero=parallel.zero,
        offload=parallel.offload,
        recompute=train.recompute,
        precision=precision,
        optimizer=config.optimizer.kind,
        reduce_dtype=parallel.reduce_dtype,
        gpu=gpu,
    )


def overrides(layout: Layout) -> dict[str, str | int]:
    """Return the keys and values of a config that make this layout."""
    return {
        "parallel.tensor": layout.tensor,
        "parallel.zero": layout.zero,
        "parallel.offload": layout.offload,
        "train.engine": layout.engine,
        "train.micro_batch_size": layout.micro_batch,
        "train.recompute": layout.recompute,
    }


def changes(config: Config, layout: Layout) -> str:
    """Return the override words that turn a config's layout into this one; empty if it is the config's."""
    sections: dict[str, Any] = config.model_dump()
    words = []
    for key, value in overrides(layout).items():
        section, name = key.split(".")
        if sections[section][name] != value:
            words.append(f"{key}={value}")
    return " ".join(words)


# ---- what a layout needs -------------------------------------------------------------------------


def memory_of(phase: Phase, layout: Layout) -> Memory:
    """Return the bytes of a rank."""
    return memory.per_rank(phase.config.model, phase.rows, phase.vocab_size, layout)


def needs(held: Memory) -> float:
    """Return the bytes that a device must have to hold this."""
    return held.total * (1 + FRAGMENTS) + RESERVE


def step_seconds(phase: Phase, layout: Layout, device: Device, achieved: float) -> float:
    """Return the seconds of an update."""
    computing = layout.accumulation * micro_seconds(phase, layout, device, achieved)
    waiting = exposed_seconds(phase, layout, device, computing)
    waiting += orthogonalizing_seconds(phase, layout, device, achieved)
    return computing + waiting + update_seconds(phase, layout, device)


def exposed_seconds(phase: Phase, layout: Layout, device: Device, computing: float) -> float:
    """Return the seconds of an update's collectives that so many seconds of computing do not hide."""
    return sum(
        max(0.0, traffic.seconds(call, layout, device) - OVERLAP_SHARE * call.beside * computing)
        for call in traffic.step(phase.config.model, phase.rows, phase.vocab_size, layout)
    )


def micro_seconds(phase: Phase, layout: Layout, device: Device, achieved: float) -> float:
    """Return the seconds of a micro-batch's forward and backward pass."""
    B, T, model, rows = layout.micro_batch, layout.tensor, phase.config.model, phase.rows
    cost = flops.step_cost(model, rows, phase.vocab_size, B, layout.recompute)
    saved = memory.activations(model, rows, replace(layout, recompute="none"))
    table = geometry.padded_vocab(phase.vocab_size, model.vocab_multiple) // T
    moved = B * (PASSES * saved + LOGIT_BYTES * rows.predicted * table)
    products = cost.hardware_flops / T / device.peak[phase.precision] / achieved
    seconds = products + moved / (device.bandwidth * BANDWIDTH_SHARE)
    layers = model.num_layers + model.decoder_layers
    hooks = layers * HOOKS if layout.zero == 3 else 0.0
    # A GPU computes while its host starts kernels; a CPU does one after the other.
    return max(seconds, layers * KERNELS * LAUNCH + hooks) if device.gpu else seconds + hooks


def orthogonalizing_seconds(phase: Phase, layout: Layout, device: Device, achieved: float) -> float:
    """Return the seconds of Muon's products: those of a data-parallel rank's share of the matrices, which all
    ranks that share the model form."""
    if phase.config.optimizer.kind != "muon":
        return 0.0
    precision = "fp32" if phase.precision == "fp16" else phase.precision
    peak = device.peak.get(precision, device.peak[phase.precision])
    return flops.muon(phase.config.model) / layout.data / peak / achieved


def update_seconds(phase: Phase, layout: Layout, device: Device) -> float:
    """Return the seconds of the optimizer, and of carrying what is offloaded to it."""
    P = memory.local_parameters(phase.config.model, phase.vocab_size, layout.tensor)
    share = -(-P // layout.data) if layout.zero else P
    if layout.offload == "none":
        return UPDATE_BYTES * share / (device.bandwidth * BANDWIDTH_SHARE)
    carried = FULL * share * (2 + (2 * layout.accumulation if layout.offload == "all" else 0))
    return carried / device.host + UPDATE_BYTES * share / HOST_BANDWIDTH


@cache
def measured() -> dict[str, CalibratedDevice]:
    """Return what `tools.calibrate` left of devices, by their names."""
    found = (typed_json.read(CalibratedDevice, path) for path in sorted(RESULTS.glob("plan-*.json")))
    return {one.device.name: one for one in found}


def achieved(device: Device, precision: str) -> tuple[float, str]:
    """Return (share of the device's peak that products reach in training, whether measured or assumed)."""
    if calibrated := measured().get(device.name):
        known = calibrated.achieved
        other = precision if precision in known else min(known)
        return known[other], "measured" if other == precision else f"measured in {other}"
    return ACHIEVED, "assumed"


def share_of(phase: Phase, layout: Layout, device: Device, seconds: float) -> float:
    """Return the share of the peak at which an update takes so long: its time is A / share + B."""
    whole, half = (step_seconds(phase, layout, device, share) for share in (1.0, 0.5))
    return (half - whole) / (seconds - (2 * whole - half))


SIZES: dict[str, dict[str, int]] = {
    "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "ffn_size": 3072},
    "large": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "ffn_size": 4096},
}
"""RoBERTa's (Liu et al. 2019)."""
ROBERTA_PIECES = 50_265


def recipe(size: str, length: int, model: dict[str, Any] = {}, **masking: Any) -> Config:  # noqa: B006
    """Return a config of RoBERTa's size; `model` and `masking` make it a method.

    The same rows in a micro-batch at every length, so that short sequences do not wait for kernels to start.
    """
    micro = 1 << (max(1, 8192 // length).bit_length() - 1)
    tree = {
        "run": {"dir": "-"},
        "corpus": {"train": "-"},
        "model": {**SIZES[size], "vocab_size": ROBERTA_PIECES, **model},
        "masking": masking,
        "train": {"seq_length": length, "batch_size": 2048, "micro_batch_size": micro},
        "budget": {"steps": 1},
    }
    return build_config(tree)


def late(method: str, layers: int) -> dict[str, Any]:
    """Return the keys of `model` that make a method of a model with so many layers."""
    if method == "mlm":
        return {}
    if method == "shared-depth":
        return {"mask_from": layers // 2}
    if method == "mae-lm":
        return {"mask_from": layers, "decoder_layers": 4, "mask_vector": "tied"}
    return {"mask_from": layers, "decoder_layers": 2, "decoder": method.removeprefix("3ml-")}


# ---- which layout --------------------------------------------------------------------------------


def divisions(phases: Sequence[Phase], gpus: int, device: Device) -> list[tuple[int, int]]:
    """Return (tensor-parallel, data-parallel ranks) into which a model and the batches of all its phases
    divide."""
    model, found = phases[-1].config.model, []
    for tensor in powers(min(gpus, device.per_node)):
        data = gpus // tensor
        widths = (model.num_heads, model.ffn_size, model.vocab_multiple, gpus)
        if not any(width % tensor for width in widths) and not any(
            phase.cost.samples % data for phase in phases
        ):
            found.append((tensor, data))
    return found


def nearest(phases: Sequence[Phase], gpus: int, device: Device) -> list[int]:
    """Return the next smaller and the next larger number of devices among which all divides, where there is
    one."""
    most = device.per_node * max(phase.cost.samples for phase in phases)
    found = []
    for counts in (range(min(gpus - 1, most), 0, -1), range(gpus + 1, most + 1)):
        found += [next((count for count in counts if divisions(phases, count, device)), 0)]
    return [count for count in found if count]


def candidates(phases: Sequence[Phase], gpus: int, device: Device) -> Iterator[list[Layout]]:
    """Yield for each way to divide the model, its state and its activations, the simpler ones first: the
    layout of each phase, with the largest micro-batch that fits."""
    divided, kind = divisions(phases, gpus, device), phases[-1].config.optimizer.kind
    for zero, offload in SAVINGS if kind == "adamw" else SAVINGS[:1]:
        for tensor, data in divided:
            for recompute in ("none", "block"):
                layout = Layout(
                    tensor=tensor,
                    data=data,
                    engine="deepspeed" if zero else "torch",
                    zero=zero,
                    offload=offload,
                    recompute=recompute,
                    precision=phases[-1].precision,
                    optimizer=kind,
                    gpu=device.gpu,
                )
                fitting = [largest_micro_batch(phase, layout, device) for phase in phases]
                found = [one for one in fitting if one]
                if len(found) == len(phases):
                    yield found


SAVINGS = [
    (0, "none"),
    *((zero, "none") for zero in (1, 2, 3)),
    *((zero, "optimizer") for zero in (1, 2, 3)),
    (3, "all"),
]
"""(ZeRO stage, offload), roughly from fast to small."""


def powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def largest_micro_batch(phase: Phase, layout: Layout, device: Device) -> Layout | None:
    """Return the layout with the largest micro-batch, of those that divide a rank's samples, that fits;
    None: not even 1."""
    samples, rest = divmod(phase.cost.samples, layout.data)
    if rest:
        return None
    for micro in sorted(divisors(samples), reverse=True):
        tried = replace(layout, micro_batch=micro, accumulation=samples // micro)
        if needs(memory_of(phase, tried)) <= device.memory:
            return tried
    return None


@cache
def divisors(number: int) -> list[int]:
    """Return those from 1 to the number."""
    return [d for d in range(1, number + 1) if number % d == 0]


def fastest(phases: Sequence[Phase], gpus: int, device: Device, achieved: float) -> list[Layout] | None:
    """Return the simplest layout that fits all phases and is, in the last of them, nearly as fast as the
    fastest, by the margins above; of each phase. None: nothing fits."""
    found = [
        (with_margin(phases[-1], one[-1], device, achieved), one) for one in candidates(phases, gpus, device)
    ]
    best = min((seconds for seconds, _ in found), default=0.0)
    return next((one for seconds, one in found if seconds <= best * (1 + TOLERANCE)), None)


def with_margin(phase: Phase, layout: Layout, device: Device, achieved: float) -> float:
    """Return the seconds of an update with the margin of its stage: by these, layouts are compared."""
    return step_seconds(phase, layout, device, achieved) * (1 + MARGIN[layout.zero])


def named(name: str, given: str = "--device ") -> Device:
    """Return the device of that name, in the table or measured; UserError lists the known ones.

    given: what a person wrote before the name.
    """
    if found := devices.find(name):
        return found
    if name in measured():
        return measured()[name].device
    known = ", ".join([*(device.name for device in devices.DEVICES), *measured()])
    raise UserError(f"{given}{name!r}: not in the table ({known}), nor measured by tools.calibrate")
