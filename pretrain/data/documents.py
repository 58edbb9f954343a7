"""Where the documents of a corpus lie, and their order in an epoch, in little memory.

Of a corpus of many documents nothing is kept that its index, which is mapped and so shared by all ranks of a
node, says: lengths and places are read there when they are asked for, and an epoch's order is computed where
it is asked for (`rng.permute`). What has to be added up beforehand, where in the stream a document ends, is
kept for every `STRIDE`-th: a byte a document. Of smaller corpora all of this is kept, which is quicker.
"""

import numpy as np
import numpy.typing as npt

from pretrain.data import rng
from pretrain.data.indexed import CHUNK, IndexedReader

Int64 = npt.NDArray[np.int64]

MANY = 1_000_000
"""Documents from which on their places are left in the index."""
STRIDE = 8
"""Every so many ends of documents are kept."""


class Documents:
    """The documents of a corpus that are not empty."""

    def __init__(self, corpus: IndexedReader) -> None:
        self._corpus = corpus
        self._kept: tuple[Int64, Int64] | None = None
        empty = _empty(corpus)
        self.count = corpus.num_documents - len(empty)
        # Before document number n of these there are as many empty ones as this has numbers up to n.
        self._empty = empty - np.arange(len(empty))
        if corpus.num_documents < MANY:
            self._kept = self._look_up(np.arange(self.count))

    def numbers(self, documents: Int64) -> Int64:
        """Numbers of these among all documents of the corpus."""
        if len(self._empty) == 0:
            return documents
        return documents + np.searchsorted(self._empty, documents, side="right")

    def places(self, documents: Int64) -> tuple[Int64, Int64]:
        """First token in the file, and length, of each of these."""
        if self._kept:
            return self._kept[0][documents], self._kept[1][documents]
        return self._look_up(documents)

    def _look_up(self, documents: Int64) -> tuple[Int64, Int64]:
        numbers = self.numbers(documents)
        table, offsets = self._corpus.document_table, self._corpus.token_offsets
        firsts = offsets(table[numbers])
        return firsts, offsets(table[numbers + 1]) - firsts


def _empty(corpus: IndexedReader) -> Int64:
    """Numbers of the documents without a token."""
    found = [np.empty(0, np.int64)]
    for start in range(0, corpus.num_documents, CHUNK):
        bounds = corpus.token_offsets(corpus.document_table[start : start + CHUNK + 1])
        found.append(start + np.flatnonzero(np.diff(bounds) == 0))
    return np.concatenate(found)


class Order:
    """The documents in the order of an epoch: the stream is that of their tokens, a </s> after each."""

    def __init__(self, documents: Documents, keys: tuple[int, ...], rules: int) -> None:
        self._documents, self._keys, self._rules = documents, keys, rules
        self._order: Int64 | None = None
        if documents.count < MANY:
            self._order = self._permuted(np.arange(documents.count))
        self._stride = 1 if self._order is not None else STRIDE
        self._ends = np.empty(-(-documents.count // self._stride), np.int64)
        total, size = 0, CHUNK // self._stride * self._stride
        for start in range(0, documents.count, size):
            ranks = np.arange(start, min(start + size, documents.count))
            ends = total + np.cumsum(documents.places(self.documents(ranks))[1] + 1)
            total = int(ends[-1])
            last = np.append(np.arange(self._stride - 1, len(ends) - 1, self._stride), len(ends) - 1)
            self._ends[start // self._stride :][: len(last)] = ends[last]

    def documents(self, ranks: Int64) -> Int64:
        """The documents that are number `ranks` in the stream."""
        return self._permuted(ranks) if self._order is None else self._order[ranks]

    def _permuted(self, ranks: Int64) -> Int64:
        return rng.permute(ranks, self._documents.count, self._keys, self._rules)

    def locate(self, tokens: Int64) -> tuple[Int64, Int64]:
        """Ranks of the documents at these places in the stream, and where they end (with their </s>)."""
        blocks = np.searchsorted(self._ends, tokens, side="right")
        if self._stride == 1:
            return blocks, self._ends[blocks]
        before = np.where(blocks > 0, self._ends[blocks - 1], 0)
        ranks = blocks[:, None] * self._stride + np.arange(self._stride)
        ranks = np.minimum(ranks, self._documents.count - 1)
        lengths = self._documents.places(self.documents(ranks.ravel()))[1].reshape(ranks.shape)
        ends = before[:, None] + np.cumsum(lengths + 1, axis=1)
        inside = (ends <= tokens[:, None]).sum(1)
        rows = np.arange(len(tokens))
        return ranks[rows, inside], ends[rows, inside]
