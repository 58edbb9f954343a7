"""Reads and masks the next update on a thread of its own while this one is computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pretrain.account.recipe import Phase
from pretrain.data.corpora import Data
from pretrain.data.masking import masker
from pretrain.data.sampler import Blend, share_of_rank
from pretrain.model.late_mask import Batch
from pretrain.parallel.topology import Topology


class Feed:
    """Prepares the next update's micro-batches on a thread of its own while this one is computed."""

    def __init__(self, prepare: Callable[[int], list[Batch]], samples_per_step: int) -> None:
        self._prepare, self._stride = prepare, samples_per_step
        self._pool = ThreadPoolExecutor(1, "feed")
        self._ready: tuple[int, Future[list[Batch]]] | None = None
        self.waited = 0.0
        """Seconds that `take` has waited."""

    def take(self, first: int) -> list[Batch]:
        """Return the micro-batches of the update that starts at sample `first`."""
        begin = time.perf_counter()
        if self._ready is None or self._ready[0] != first:
            self._ready = first, self._pool.submit(self._prepare, first)
        batches = self._ready[1].result()
        self._ready = first + self._stride, self._pool.submit(self._prepare, first + self._stride)
        self.waited += time.perf_counter() - begin
        return batches

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def open_feed(phase: Phase, topology: Topology, data: Data, blend: Blend) -> Feed:
    """Return what prepares the updates of a phase from the samples of a blend."""
    return Feed(micro_batches(phase, topology, data, blend), phase.cost.samples)


def micro_batches(phase: Phase, topology: Topology, data: Data, blend: Blend) -> Callable[[int], list[Batch]]:
    """Return what reads and masks this rank's micro-batches of the update that starts at a sample."""
    config = phase.config
    micro = phase.micro_batch(topology.data_size)
    bounded = config.corpus.documents == "bounded"
    mask = masker(config.masking, config.train.seq_length, data.tokenizer, bounded, data.rules)

    def prepare(first: int) -> list[Batch]:
        if topology.device.type == "cuda":  # a thread begins with the first GPU
            torch.cuda.set_device(topology.device)
        rank, ranks = topology.data_rank, topology.data_size
        s = blend.read(np.concatenate(share_of_rank(first, phase.cost.samples, micro, rank, ranks)))
        batches = []
        for start in range(0, len(s.keys), micro):
            some = slice(start, start + micro)
            masked = mask(s.tokens[some], s.keys[some], s.views[some])
            batches.append(Batch.from_masked(masked, topology.device))
        return batches

    return prepare
