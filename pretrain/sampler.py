"""(sample number) -> token window: the order of a run in closed form.

The documents of an epoch, in a pseudo-random order, joined by </s>, are the stream; a window of length L
is <s>, the next L - 2 tokens of the stream, </s>. Windows are full; the tail that fills none is dropped
and reported. The windows of an epoch are visited in a pseudo-random order too, so that a batch does not
come from one document.

Everything is a function of (data seed, sample number): any rank can read any sample, the state of a run
is the number of samples consumed, and the order does not depend on how many ranks there are.

With K views (`masking.views`) the cut into windows stays for K epochs, so that the K disjoint masks fall
on the same text; in batch mode the K masks of a text are K consecutive samples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain import config, rng
from pretrain.config import UserError
from pretrain.corpus import IndexedReader

Int64 = npt.NDArray[np.int64]

# What the keys are for; any distinct numbers.
_DOCUMENTS, _WINDOWS, _MASK = 1, 2, 3


class Samples(NamedTuple):
    """Some samples of a run."""

    tokens: npt.NDArray[np.integer]
    """[B, L] windows in natural order."""
    keys: rng.Uint64
    """[B] mask keys; one per text and partition of it into views."""
    views: Int64
    """[B] which of the K disjoint masks."""


class Sampler:
    """Reads the windows of one corpus in the order of a run.

    length: L. bos, eos: pieces that open and close a window; eos also joins documents.
    """

    def __init__(
        self,
        corpus: IndexedReader,
        masking: config.Masking,
        length: int,
        seed: int,
        bos: int,
        eos: int,
    ) -> None:
        self.corpus, self.length, self.seed, self.bos, self.eos = corpus, length, seed, bos, eos
        self.per_text = masking.views if masking.views_mode == "batch" else 1
        self.per_partition = masking.views if masking.views_mode == "epoch" else 1
        filled = np.flatnonzero(corpus.document_lengths)
        self.lengths = corpus.document_lengths[filled]
        self.offsets = corpus.document_offsets[filled]
        self.stream_tokens = int(self.lengths.sum()) + max(0, len(filled) - 1)
        self.windows_per_epoch = self.stream_tokens // (length - 2)
        if self.windows_per_epoch == 0:
            raise UserError(
                f"{corpus.prefix}: {self.stream_tokens} tokens do not fill one window of"
                f" train.seq_length = {length}; take a larger corpus or a shorter length"
            )
        self._orders: dict[int, tuple[Int64, Int64]] = {}

    @property
    def samples_per_epoch(self) -> int:
        return self.windows_per_epoch * self.per_text

    @property
    def tail_tokens(self) -> int:
        """Tokens of an epoch (joining </s> included) that fill no window."""
        return self.stream_tokens - self.windows_per_epoch * (self.length - 2)

    def read(self, samples: Int64) -> Samples:
        """The windows, mask keys and views of the given sample numbers [B]."""
        texts, view = np.divmod(samples, self.per_text)
        epochs, visits = np.divmod(texts, self.windows_per_epoch)
        windows = np.empty_like(visits)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            order = (self.seed, _WINDOWS, int(epoch))
            windows[now] = rng.permute(visits[now], self.windows_per_epoch, order)
        partitions, epoch_view = np.divmod(epochs, self.per_partition)
        tokens = np.empty((len(samples), self.length), self.corpus.tokens.dtype)
        tokens[:, 0], tokens[:, -1] = self.bos, self.eos
        for row, (partition, window) in enumerate(zip(partitions, windows, strict=True)):
            self._window(tokens[row, 1:-1], int(partition), int(window))
        keys = rng.key(self.seed, _MASK, partitions, windows)
        return Samples(tokens, keys, view if self.per_text > 1 else epoch_view)

    def _window(self, out: npt.NDArray[np.integer], partition: int, window: int) -> None:
        """Copies one window of the stream into `out`, document by document."""
        order, ends = self._order(partition)
        at = window * len(out)
        rank = int(np.searchsorted(ends, at, side="right"))
        filled = 0
        while filled < len(out):
            document = order[rank]
            length = int(self.lengths[document])
            skip = at + filled - (int(ends[rank]) - length - 1)
            take = min(length - skip, len(out) - filled)
            first = int(self.offsets[document]) + skip
            out[filled : filled + take] = self.corpus.tokens[first : first + take]
            filled += take
            if filled < len(out):
                out[filled] = self.eos
                filled += 1
            rank += 1

    def _order(self, partition: int) -> tuple[Int64, Int64]:
        """Documents in stream order, and where each ends in the stream (its </s> included)."""
        if partition not in self._orders:
            count = len(self.lengths)
            order = rng.permute(np.arange(count), count, (self.seed, _DOCUMENTS, partition))
            # Two at most: the current one and, around an epoch's end, the next.
            self._orders = dict(list(self._orders.items())[-1:])
            self._orders[partition] = order, np.cumsum(self.lengths[order] + 1)
        return self._orders[partition]


def share_of_rank(first: int, batch_size: int, micro: int, data_rank: int, data_size: int) -> list[Int64]:
    """Sample numbers of one rank's micro-batches in the update that starts at sample `first`.

    Micro-batches are dealt in turn: m x (ranks x micro) + rank x micro. Over all ranks each of the
    batch_size samples occurs once.
    """
    span = micro * data_size
    assert batch_size % span == 0
    here = first + data_rank * micro + np.arange(micro, dtype=np.int64)
    return [here + start for start in range(0, batch_size, span)]
