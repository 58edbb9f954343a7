"""Puts the tensors of a checkpoint together from what each rank has of them, on a thread beside training.

The trap: collectives of two threads must not meet in one group, so pieces go through `Topology.saves`, which
is of nobody else, and by way of the host's memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.parallel import tensor_parallel
from pretrain.parallel.topology import Topology


class TensorPiece(NamedTuple):
    """What a rank has of a parameter, or of a moment of it."""

    name: str
    shape: torch.Size
    """Of the tensor-parallel part that it is a piece of."""
    start: int
    """Where in that, flat, it begins."""
    flat: Tensor
    """float32; empty where others have it all."""


def join(pieces: Sequence[TensorPiece], topology: Topology, divided: bool) -> dict[str, Tensor]:
    """Return the full tensors by name on rank 0, nothing on others; collective.

    pieces: of the same names in the same order on all ranks, on the host. divided: all ranks take part, and
    not only those that share rank 0's model.
    """
    place, size = topology, topology.world_size if divided else topology.tensor_size
    if place.rank >= size:
        return {}
    bounds = torch.tensor([(piece.start, piece.flat.numel()) for piece in pieces])
    if not place.is_main:
        dist.send(bounds, 0, place.saves)
        for piece in pieces:
            if piece.flat.numel():
                dist.send(piece.flat, 0, place.saves)
        return {}
    others = {rank: torch.empty_like(bounds) for rank in range(1, size)}
    for rank, theirs in others.items():
        dist.recv(theirs, rank, place.saves)
    return {
        piece.name: _joined(piece, {rank: theirs[index].tolist() for rank, theirs in others.items()}, place)
        for index, piece in enumerate(pieces)
    }


def _joined(mine: TensorPiece, others: dict[int, list[int]], place: Topology) -> Tensor:
    """The full tensor of rank 0's piece and those of others; these: (start, elements) by rank."""
    parts = [mine.flat]
    if any(elements for _, elements in others.values()):
        shards = place.tensor_size if tensor_parallel.cut(mine.name) else 1
        parts = [mine.flat.new_empty(mine.shape.numel()) for _ in range(shards)]
        parts[0][mine.start : mine.start + mine.flat.numel()] = mine.flat
        for rank, (start, elements) in others.items():
            if elements:
                part = parts[rank % place.tensor_size]
                dist.recv(part[start : start + elements], rank, place.saves)
    return tensor_parallel.merge(mine.name, [part.view(mine.shape) for part in parts])
