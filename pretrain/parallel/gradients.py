"""Gradients of a plain engine: summed over the data-parallel ranks while the backward pass goes on.

Parameters are divided into buckets once, in the reverse of their order, about that in which the backward
pass is done with them (Li et al. 2020, arXiv 2006.15704). A bucket is sent when its gradients are there and
the one before it is sent, so the calls, and the order in which floats are added, are the same on all ranks
and in every run. What has no gradient is waited for until the pass is over.

The tied word table would spoil this: the head is done with it first, the lookup of words last, and of base it
is a third of all gradients. So words are cut off from the table as they are looked up. Its gradient is then
the head's, the first that is sent; the words' are some rows, which the ranks give each other at the end.

Letters: R looked-up rows, W rows of the (local) word table, D width.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config.geometry import REDUCE_BUCKET
from pretrain.model.late_mask import LateMaskModel
from pretrain.parallel.topology import Topology


class Lookups:
    """The words that a forward pass looks up, and the way of their gradients into the table's.

    It is shorter than autograd's, which makes a table of zeros, puts the rows into it and adds it up.
    """

    def __init__(self, model: LateMaskModel) -> None:
        self.table = model.tok.weight
        self.first_id = model.cross_entropy.first_id
        self._looks = False
        self._found: list[tuple[Tensor, Tensor]] = []
        model.tok.register_forward_hook(self._cut)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Cut off what is looked up meanwhile, of the model that this was made for."""
        self._looks, self._found = True, []
        try:
            yield
        finally:
            self._looks = False

    def _cut(self, module: nn.Module, inputs: tuple[Tensor], words: Tensor) -> Tensor:
        if self._looks:
            words = words.detach().requires_grad_()
            self._found.append((inputs[0], words))
        return words

    @property
    def count(self) -> int:
        """Return R, of the last forward pass."""
        return sum(ids.numel() for ids, _ in self._found)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the pieces [R] and the gradients [R, D] of what was looked up, after the backward pass."""
        found, self._found = self._found, []
        gradients = [words.grad.flatten(0, -2) for _, words in found if words.grad is not None]
        return torch.cat([ids.flatten() for ids, _ in found]), torch.cat(gradients)

    def add(self, ids: Tensor, gradients: Tensor) -> None:
        """Add the gradients of looked-up words to the table's, as far as they are of this rank's part."""
        assert self.table.grad is not None  # the head's
        local = ids - self.first_id
        here = (local >= 0) & (local < len(self.table))
        gradients = gradients.to(self.table.dtype).where(here[:, None], 0.0)
        self.table.grad.index_add_(0, local.where(here, 0), gradients)


class GradientSum:
    """The sum over the data-parallel ranks, which begins in the last backward pass before an update.

    dtype: in which gradients travel and are added.
    """

    def __init__(
        self, model: LateMaskModel, lookups: Lookups, topology: Topology, dtype: torch.dtype
    ) -> None:
        self.lookups, self.dtype = lookups, dtype
        self.group, self.size = topology.data_group, topology.data_size
        self.overlaps = True
        """False: everything is sent after the backward pass."""
        others = [p for p in reversed(list(model.parameters())) if p is not lookups.table]
        self.buckets = [[lookups.table], *buckets(others, REDUCE_BUCKET)]
        self._place = {p: index for index, bucket in enumerate(self.buckets) for p in bucket}
        self._queue: deque[int] = deque()
        """Buckets that have not been sent, in order."""
        self._sent: deque[tuple[list[Tensor], Tensor, Any]] = deque()
        self._words: list[tuple[list[Tensor], Any]] = []
        for parameter in self._place:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def start(self) -> None:
        """Send buckets from now on as they are ready; between the last forward and backward pass."""
        self._missing = [len(bucket) for bucket in self.buckets]
        self._queue = deque(range(len(self.buckets)))
        # An all-gather of all ranks' rows, unless the sum of the whole table sends less.
        self._apart = self.size * self.lookups.count < 2 * len(self.lookups.table)
        if not self._apart:
            self._queue.rotate(-1)
            self._missing[0] += 1  # the words' gradients

    def _ready(self, parameter: nn.Parameter) -> None:
        if not (self._queue and self.overlaps):
            return
        self._missing[self._place[parameter]] -= 1
        while self._queue and not self._missing[self._queue[0]]:
            self._send()

    def finish(self) -> None:
        """Send what is left, after the last backward pass."""
        ids, gradients = self.lookups.take()
        if not self._apart:
            self.lookups.add(ids, gradients)
        while self._queue:
            self._send()
        if self._apart:
            self._words = [self._gather(ids), self._gather(gradients.to(self.dtype))]

    def _send(self) -> None:
        parameters = [p for p in self.buckets[self._queue.popleft()] if p.grad is not None]
        parts = [p.grad.flatten().to(self.dtype) for p in parameters if p.grad is not None]
        if parts:
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            for parameter in parameters:  # what is on its way needs no second copy
                parameter.grad = None
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self._sent.append((parameters, flat, work))

    def _gather(self, tensor: Tensor) -> tuple[list[Tensor], Any]:
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        return every, dist.all_gather(every, tensor, self.group, async_op=True)

    def wait(self) -> None:
        """Return when the parameters have the sums for gradients."""
        while self._sent:
            parameters, flat, work = self._sent.popleft()
            work.wait()
            parts = flat.split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
        if self._words:
            for _, work in self._words:
                work.wait()
            self.lookups.add(*(torch.cat(every) for every, _ in self._words))
            self._words = []


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Runs of neighbours that reach `size` elements, the last one excepted."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
