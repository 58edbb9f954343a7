"""Reads and masks the next update on a thread of its own while this one is computed."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pretrain.account.recipe import Phase
from pretrain.config import Config
from pretrain.data.corpora import Data, open_blend
from pretrain.data.masking import Masker, masker
from pretrain.data.sampler import Blend, Segment, share_of_rank
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


def read_phase(
    phase: Phase, topology: Topology, data: Data, segments: Sequence[Segment]
) -> tuple[Blend, Feed]:
    """Make what reads and masks the samples of a phase."""
    config, batch_size = phase.config, phase.config.train.batch_size
    blend = open_blend(config, data, segments)
    micro = phase.micro_batch(topology.data_size)
    return blend, Feed(prepare(batch_size, micro, topology, blend, open_masker(config, data)), batch_size)


def open_masker(config: Config, data: Data) -> Masker:
    """Return what masks the samples of a phase."""
    bounded = config.corpus.documents == "bounded"
    return masker(config.masking, config.train.seq_length, data.tokenizer, bounded, data.rules)


def prepare(
    batch_size: int, micro: int, topology: Topology, blend: Blend, mask: Masker
) -> Callable[[int], list[Batch]]:
    """Return what reads and masks this rank's micro-batches of the update that starts at a sample."""

    def prepare(first: int) -> list[Batch]:
        if topology.device.type == "cuda":  # a thread begins with the first GPU
            torch.cuda.set_device(topology.device)
        rank, ranks = topology.data_rank, topology.data_size
        s = blend.read(np.concatenate(share_of_rank(first, batch_size, micro, rank, ranks)))
        batches = []
        for start in range(0, len(s.keys), micro):
            some = slice(start, start + micro)
            masked = mask(s.tokens[some], s.keys[some], s.views[some])
            batches.append(Batch.from_masked(masked, topology.device))
        return batches

    return prepare
