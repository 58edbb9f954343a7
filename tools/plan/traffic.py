"""What ranks send each other in a training step: the collectives of the engines, their bytes, their time.

Volumes are exact: they follow the calls that engine.py, tensor_parallel.py and DeepSpeed 0.19 make, and
tests compare them with the byte counters of a network interface. Times are a model (Thakur et al. 2005):
a ring of n ranks moves a tensor of S bytes in steps of S / n,

    all-reduce                          2 (n - 1) steps, each rank sends 2 (n - 1) / n S
    all-gather, reduce-scatter            n - 1   steps, each rank sends   (n - 1) / n S

and a step takes the latency and its bytes over the slowest link of the ring. Calls that carry a few
numbers (norms, flags, losses) are left out.

What runs beside the computation is what these engines let run there: sums of gradients beside the backward
pass, of the plain engine and of stage 1 beside the last one of an update. The plain engine's last bucket, and
the rows of looked-up words, are sent after it. Stage 3 also fetches parameters ahead in the forward pass. On
a CPU DeepSpeed waits for every call.

DeepSpeed's stages 1 and 2 reduce gradients by all-reduce, also where a reduce-scatter would do
with half, and stage 2 does so for every micro-batch.

Letters: see memory.py; S bytes of a tensor.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.account.devices import Device
from pretrain.config import ModelOptions, geometry
from pretrain.config.geometry import BUCKET, REDUCE_BUCKET, Rows
from tools.plan import memory
from tools.plan.memory import FULL, Layout

LATENCY = {"node": 3e-6, "network": 8e-6}
"""Seconds of a ring's step, whatever its size: an assumption, where it has not been measured."""
NUMBER = 8
"""Bytes of a piece's number."""
FORWARD = 1 / 3
"""Of the computation, the forward pass."""
LINK_SHARE = 0.8
"""Of a link's rate that large messages reach: an assumption."""

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]


@dataclass(frozen=True)
class Collective:
    """Equal calls of a step."""

    kind: Kind
    group: Literal["data", "tensor"]
    bytes: int
    """Of the whole tensor: what an all-reduce or a reduce-scatter reads, or an all-gather leaves."""
    calls: int = 1
    beside: float = 0.0
    """Share of the computation that goes on meanwhile; else all ranks wait for it."""


def step(model: ModelOptions, rows: Rows, vocab_size: int, layout: Layout) -> list[Collective]:
    """Return the collectives that a rank takes part in during one update."""
    found: list[Collective] = []
    if layout.optimizer == "muon":
        found += _muon(model, layout)
    if layout.data > 1:
        P = memory.local_parameters(model, vocab_size, layout.tensor)
        plain = layout.engine == "torch" and not layout.zero
        found += _plain(P, model, rows, vocab_size, layout) if plain else _deepspeed(P, layout)
    if layout.tensor > 1:
        found += [
            Collective("all-reduce", "tensor", size, calls * layout.accumulation)
            for size, calls in _tensor(model, rows, layout)
        ]
    return found


def _plain(P: int, model: ModelOptions, rows: Rows, vocab_size: int, layout: Layout) -> Iterator[Collective]:
    """Gradients in buckets; those of the last micro-batch's looked-up words as rows, where that is less."""
    D, width = model.hidden_size, 2 if layout.reduce_dtype == "bf16" else FULL
    W = geometry.padded_vocab(vocab_size, model.vocab_multiple) // layout.tensor
    looked_up = sum(_looked_up(model, rows))
    every, last = layout.data * layout.micro_batch * looked_up, min(P, REDUCE_BUCKET)
    if every < 2 * W:
        yield Collective("all-gather", "data", every * (NUMBER + width * D))
    else:
        last = min(P, last + W * D)
    beside = (1 - FORWARD) / layout.accumulation
    yield Collective("all-reduce", "data", width * (P - last), beside=beside)
    yield Collective("all-reduce", "data", width * last)


def _looked_up(model: ModelOptions, rows: Rows) -> Iterator[int]:
    """Yield how many rows the word table gives at a time: the encoder's, and tied [MASK]s that join late."""
    yield geometry.encoder_rows(rows, model)[0]
    if model.mask_from and model.mask_vector == "tied":
        yield rows.predicted if model.decoder == "bottleneck" else rows.length - geometry.encoded(rows, model)


def _deepspeed(P: int, layout: Layout) -> Iterator[Collective]:
    """Gradients, and under ZeRO the parameters."""
    padded = FULL * -(-P // layout.data) * layout.data
    times = layout.accumulation
    forward, backward = (FORWARD, 1 - FORWARD) if layout.gpu else (0.0, 0.0)
    if layout.zero == 0:
        yield Collective("all-reduce", "data", FULL * P)
    elif layout.zero == 1:
        yield Collective("all-reduce", "data", FULL * P, beside=backward / times)
    elif layout.zero == 2:
        yield Collective("all-reduce", "data", FULL * P, times, beside=backward)
    if layout.zero in (1, 2):
        yield Collective("all-gather", "data", padded)
    if layout.zero == 3:
        yield Collective("all-gather", "data", padded, times, beside=forward)
        yield Collective("reduce-scatter", "data", padded, times, beside=backward)


def _muon(model: ModelOptions, layout: Layout) -> Iterator[Collective]:
    """The parts of momentum that become whole matrices, and their updates, which each rank sends of its own:
    together as much as an all-gather."""
    whole, width = memory.orthogonalized(model), 2 if layout.precision == "bf16" else FULL
    if layout.tensor > 1:
        yield Collective("all-gather", "tensor", FULL * whole // layout.data)
    if layout.data > 1:
        yield Collective("all-gather", "data", width * whole // layout.tensor)


def _tensor(model: ModelOptions, rows: Rows, layout: Layout) -> Iterator[tuple[int, int]]:
    """(bytes, calls) of the sums of a micro-batch.

    Each row layer sums its output on the way forward, each column layer the gradient of its input on the
    way back, both as wide as the products; gradients of looked-up words and the loss are float32. What is
    recomputed is summed again, but for the last sum of a layer that `geometry.recomputes_all` says no of.
    """
    D, B = model.hidden_size, layout.micro_batch
    row = layout.width * B * D

    def sums(one_way: int, dropout: float | None) -> int:
        again = one_way - (not geometry.recomputes_all(model, dropout)) if layout.recompute == "block" else 0
        return 2 * one_way + again

    for n, layers in Counter(geometry.encoder_rows(rows, model)).items():
        yield row * n, sums(2, model.dropout) * layers
    V, P = geometry.encoded(rows, model), rows.predicted
    for _ in range(model.decoder_layers):
        query_rows, keys = geometry.decoder_rows(rows, model)
        yield row * query_rows, sums(3 if model.decoder == "cross" else 2, model.decoder_dropout)
        if model.decoder != "self":
            yield row * (V if model.decoder == "cross" else keys), 1
    for looked_up in _looked_up(model, rows):
        yield FULL * B * D * looked_up, 1
    yield row * P, 1  # the head's hidden gradient
    yield FULL * B * P, 3  # largest logit, aimed logit, mass


# ---- bytes and seconds ---------------------------------------------------------------------------


def sent(collective: Collective, layout: Layout) -> float:
    """Return the bytes that a rank sends for all calls, in a ring."""
    n = layout.data if collective.group == "data" else layout.tensor
    rounds = 2 if collective.kind == "all-reduce" else 1
    return collective.calls * rounds * (n - 1) / n * collective.bytes


def seconds(collective: Collective, layout: Layout, device: Device) -> float:
    """Return how long all calls take on a cluster of such devices, tensor groups inside a node."""
    n = layout.data if collective.group == "data" else layout.tensor
    apart = collective.group == "data" and layout.ranks > device.per_node
    rate = LINK_SHARE * (network_rate(layout, device) if apart else device.link)
    rounds = 2 if collective.kind == "all-reduce" else 1
    calls = max(collective.calls, -(-collective.calls * collective.bytes // (FULL * BUCKET)))
    latency = calls * rounds * (n - 1) * (device.latency or LATENCY["network" if apart else "node"])
    # gloo, which CPUs use, reduces all where a part would do.
    whole = 2 if collective.kind == "reduce-scatter" and not device.gpu else 1
    return latency + whole * sent(collective, layout) / rate


def network_rate(layout: Layout, device: Device) -> float:
    """Return that of a data group's ring: the node's adapters serve as many rings as a tensor group has
    ranks."""
    return min(device.link, device.network * device.per_node / layout.tensor)
