"""(sample number) -> token window: the order of a run in closed form.

The documents of an epoch, in a pseudo-random order, joined by </s>, are the stream; a window of length L
is <s>, the next L - 2 tokens of the stream, </s>. Windows are full; the tail that fills none is dropped
and reported. The windows of an epoch are visited in a pseudo-random order too, so that a batch does not
come from one document.

Everything is a function of (data seed, sample number): any rank can read any sample, the state of a run
is the number of samples consumed, and the order does not depend on how many ranks there are.

A run may read a blend of corpora: the n-th sample belongs to the corpus whose share of the first n samples
would otherwise fall behind, again in closed form. The blend and the length may change at the boundary of a
segment; so the state of a run is (its segments, samples consumed). After another blend each corpus goes on
with the samples that it has not given yet. After another length it goes on as far into its epoch as it was,
and as windows are visited in random order, some of their text has been seen in this epoch already.

With K views (`masking.views`) the cut into windows stays for K epochs, so that the K disjoint masks fall
on the same text; in batch mode the K masks of a text are K consecutive samples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.document_order import DocumentOrder, Documents, scratch
from pretrain.data.indexed import IndexedReader
from pretrain.errors import UserError

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


class _Stretches(NamedTuple):
    """Tokens of one document in each of some windows [n]."""

    rows: Int64
    """Which windows."""
    columns: Int64
    """Where in them it begins; <s> is at 0."""
    ranks: Int64
    """Number of the document in the stream."""
    firsts: Int64
    """Its first token here, in the file."""
    takes: Int64
    """How many tokens."""


class Sampler:
    """Reads the windows of one corpus in the order of a run.

    length: L. bos, eos: pieces that open and close a window; eos also joins documents. name: of a further
    corpus of a blend (its fingerprint), which has an order and masks of its own. rules: that the run began
    with.
    folder: of the node's orders of documents; default: `scratch`.
    """

    def __init__(
        self,
        corpus: IndexedReader,
        masking: MaskingOptions,
        length: int,
        seed: int,
        bos: int,
        eos: int,
        name: str = "",
        rules: rng.Rules = rng.RULES,
        folder: Path | None = None,
    ) -> None:
        self.corpus, self.length, self.bos, self.eos, self.rules = corpus, length, bos, eos, rules
        self.seed = rng.name_seed(seed, name) if name and rules.own_keys_by_corpus else seed
        self.per_text = masking.views if masking.views_mode == "batch" else 1
        self.per_partition = masking.views if masking.views_mode == "epoch" else 1
        self.filled = Documents(corpus)
        self.stream_tokens = corpus.num_tokens + max(0, self.filled.count - 1)
        self.windows_per_epoch = self.windows_at(length)
        if self.windows_per_epoch == 0:
            raise UserError(
                f"{corpus.prefix}: {self.stream_tokens} tokens do not fill one window of"
                f" seq_length = {length}; take a larger corpus or a shorter length"
            )
        tokens, missing = corpus.tokens, length - len(corpus.tokens)
        if missing > 0:  # the joining </s> may make up for a few
            tokens = np.pad(tokens, (0, missing))
        self._runs = sliding_window_view(tokens, length)  # [T - L + 1, L]
        self._orders: dict[int, DocumentOrder] = {}
        self._folder = folder or scratch(None)

    def windows_at(self, length: int) -> int:
        """Return the windows of an epoch if they had this length."""
        return self.stream_tokens // (length - 2)

    @property
    def samples_per_epoch(self) -> int:
        return self.windows_per_epoch * self.per_text

    @property
    def tail_tokens(self) -> int:
        """Tokens of an epoch (joining </s> included) that fill no window."""
        return self.stream_tokens - self.windows_per_epoch * (self.length - 2)

    def read(self, samples: Int64) -> Samples:
        """Return the windows, mask keys and views of the given sample numbers [B]."""
        partitions, windows, views = self._place(samples)
        tokens = np.empty((len(samples), self.length), self.corpus.tokens.dtype)
        keys = np.empty(len(samples), np.uint64)
        for partition, rows in _groups(partitions):
            tokens[rows] = self._read_windows(partition, windows[rows])
            keys[rows] = rng.key(self.seed, _MASK, partition, windows[rows])
        return Samples(tokens, keys, views)

    def _place(self, samples: Int64) -> tuple[Int64, Int64, Int64]:
        """Partition of the documents into windows, window, and view of each sample [B]."""
        texts, view = np.divmod(samples, self.per_text)
        epochs, visits = np.divmod(texts, self.windows_per_epoch)
        windows = np.empty_like(visits)
        for epoch, rows in _groups(epochs):
            keys = (self.seed, _WINDOWS, epoch)
            windows[rows] = rng.permute(visits[rows], self.windows_per_epoch, keys, self.rules)
        partitions, epoch_view = np.divmod(epochs, self.per_partition)
        return partitions, windows, view if self.per_text > 1 else epoch_view

    def documents(self, samples: Int64) -> Int64:
        """Return the document of each token of the windows [B, L], -1 where a special stands.

        With `corpus.read_sources`, the source of each.
        """
        partitions, windows, _ = self._place(samples)
        found = np.full((len(samples), self.length), -1, np.int64)
        for partition, rows in _groups(partitions):
            mine, place = found[rows], np.arange(self.length)
            for part in self._pieces(partition, windows[rows]):
                inside = (place >= part.columns[:, None]) & (place < (part.columns + part.takes)[:, None])
                documents = self.filled.numbers(self._order(partition).documents(part.ranks))
                mine[part.rows] = np.where(inside, documents[:, None], mine[part.rows])
            found[rows] = mine
        return found

    def _read_windows(self, partition: int, windows: Int64) -> npt.NDArray[np.integer]:
        """Windows [B, L].

        All that is done is done to whole windows at a time: each is first a run of the file around its
        first document's tokens; those that hold a second document take the rest from a run around that
        one's tokens, and so on.
        """
        place = np.arange(self.length, dtype=np.int32)
        out = np.empty((0, self.length), self.corpus.tokens.dtype)
        for part in self._pieces(partition, windows):
            run = self._run(part.firsts - part.columns)
            if len(out) == 0:
                out = run
            else:
                later = place >= part.columns.astype(np.int32)[:, None]
                out[part.rows] = np.where(later, run, out[part.rows])
            out[part.rows, part.columns + part.takes] = self.eos
        out[:, 0], out[:, -1] = self.bos, self.eos
        return out

    def _run(self, starts: Int64) -> npt.NDArray[np.integer]:
        """Tokens of the file from `starts` [n] on: [n, L]; anything where they would lie outside of it."""
        near = np.clip(starts, 0, len(self._runs) - 1)
        run = self._runs[near]
        for row in np.flatnonzero(near != starts).tolist():
            run[row] = np.roll(run[row], near[row] - starts[row])
        return run

    def _pieces(self, partition: int, windows: Int64) -> Iterator[_Stretches]:
        """The first document of each window, then the second of those that have one, and so on."""
        order, width = self._order(partition), self.length - 2
        starts = windows * width
        ranks = order.locate(starts)
        rows, columns = np.arange(len(windows)), np.ones_like(windows)
        while len(rows):
            begins, firsts, lengths = order.places(ranks)
            skips = np.maximum(starts - begins, 0)  # of the first document some may have gone by
            takes = np.minimum(lengths - skips, width + 1 - columns)
            yield _Stretches(rows, columns, ranks, firsts + skips, takes)
            columns = columns + takes + 1  # a </s> between two documents
            more = np.flatnonzero(columns <= width)
            rows, columns, ranks, starts = rows[more], columns[more], ranks[more] + 1, starts[more]

    def _order(self, partition: int) -> DocumentOrder:
        """Return the order of the documents in the stream of a partition."""
        if partition not in self._orders:
            # Two at most: the current one and, around an epoch's end, the next.
            self._orders = dict(list(self._orders.items())[-1:])
            keys = self.seed, _DOCUMENTS, partition
            self._orders[partition] = DocumentOrder(self.filled, keys, self.rules, self._folder)
        return self._orders[partition]


def _groups(values: Int64) -> Iterator[tuple[int, Int64 | slice]]:
    """Each of the few values and the rows that have it."""
    if len(values) and values.min() == values.max():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values).tolist():
        yield value, np.flatnonzero(values == value)


class Segment(NamedTuple):
    """A stretch of a run with one blend and one length."""

    number: int
    """`corpus.segment`."""
    first: int
    """The run's sample number at which it begins."""
    blend: tuple[tuple[float, str], ...]
    """(weight, fingerprint) of each corpus."""
    length: int
    """L of the windows."""


def continue_segments(
    past: Sequence[Segment], number: int, blend: Sequence[tuple[float, str]], samples: int, length: int
) -> list[Segment]:
    """Return the segments of a run that goes on after `samples` samples; UserError if the blend has changed
    and `number` does not say that it may. `length` is that of the first segment."""
    now = tuple((float(weight), fingerprint) for weight, fingerprint in blend)
    if not past:
        return [Segment(number, samples, now, length)]
    last = past[-1]
    if number == last.number + 1:
        return [*past, Segment(number, samples, now, last.length)]
    if number == last.number and now == last.blend:
        return list(past)
    if number != last.number:
        raise UserError(f"corpus.segment = {number}: the run is in segment {last.number}; set it to that")
    what = "train has other content" if len(now) == len(last.blend) == 1 else "train is another blend"
    raise UserError(
        f"corpus: {what} than at sample {samples}: a run cannot continue with this changed; set it back,"
        f" set corpus.segment = {number + 1} to go on with it as a new segment, or choose another run.dir"
    )


def used_samples(segments: Sequence[Segment], samplers: Mapping[str, Sampler]) -> dict[str, int]:
    """Return where each corpus (by fingerprint) goes on in the last of the segments: the samples of its
    length that lie before, rounded up to whole texts."""
    epochs = dict.fromkeys(samplers, Fraction(0))
    for segment, following in pairwise(segments):
        per_text = next(iter(samplers.values())).per_text
        texts = np.array([(following.first - segment.first) // per_text])
        weights = [weight for weight, _ in segment.blend]
        for (_, corpus), count in zip(segment.blend, shares(weights, texts), strict=True):
            if corpus in samplers:
                epochs[corpus] += Fraction(int(count[0]), samplers[corpus].windows_at(segment.length))
    return {
        corpus: math.ceil(epochs[corpus] * sampler.windows_per_epoch) * sampler.per_text
        for corpus, sampler in samplers.items()
    }


def shares(weights: Sequence[float], number: Int64) -> list[Int64]:
    """Return how many of the first `number` texts [n] belong to each corpus: one array [n] for each weight.

    The counts add up to `number`, never fall, and differ from weight x number by at most 1/2 for two
    corpora and by less than 2 for a dozen: each takes its rounded share of what the heavier ones leave.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    counts, left, rest = [number] * len(exact), number, sum(exact)
    for k in sorted(range(len(exact)), key=lambda k: -exact[k]):
        counts[k] = _rounded_share(left, exact[k] / rest)
        left, rest = left - counts[k], rest - exact[k]
    return counts


def _rounded_share(number: Int64, share: Fraction) -> Int64:
    """share x number [n], exact, then rounded to the nearest (1/2 up).

    Whole turns of the denominator are set aside, or the product would overflow. Where the rest of one could
    overflow as well (weights of ten digits), numpy counts in Python's integers, some ten times slower.
    """
    part, whole = share.numerator, share.denominator
    if whole >= 1 << 31:
        number = number.astype(object)
    turns = number // whole
    rounded = part * turns + (2 * part * (number - turns * whole) + whole) // (2 * whole)
    return rounded.astype(np.int64)


class Blend:
    """Reads the samples of a run from several corpora in exact proportions.

    first: the sample at which this segment of the run begins. used: samples of each corpus consumed
    before it.
    """

    def __init__(
        self, samplers: Sequence[Sampler], weights: Sequence[float], first: int = 0, used: Sequence[int] = ()
    ) -> None:
        self.samplers, self.weights, self.first = samplers, weights, first
        self.used = list(used) or [0] * len(samplers)
        self._per_text = samplers[0].per_text
        self._dtype = np.result_type(*(sampler.corpus.tokens.dtype for sampler in samplers))

    @property
    def samples_per_epoch(self) -> int:
        """Of all corpora together."""
        return sum(sampler.samples_per_epoch for sampler in self.samplers)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often each corpus (by prefix) has been read after `samples` samples of the run."""
        texts = np.array([(samples - self.first) // self._per_text])
        return {
            sampler.corpus.prefix: (before + int(count[0]) * self._per_text) / sampler.samples_per_epoch
            for sampler, before, count in zip(
                self.samplers, self.used, shares(self.weights, texts), strict=True
            )
        }

    def read(self, samples: Int64) -> Samples:
        """Return the windows, mask keys and views of the given sample numbers [B]."""
        texts, view = np.divmod(samples - self.first, self._per_text)
        before, after = shares(self.weights, texts), shares(self.weights, texts + 1)
        tokens = np.empty((len(samples), self.samplers[0].length), self._dtype)
        keys, views = np.empty(len(samples), np.uint64), np.empty(len(samples), np.int64)
        for sampler, used, count, next_count in zip(self.samplers, self.used, before, after, strict=True):
            mine = next_count > count
            if mine.any():
                part = sampler.read(used + count[mine] * self._per_text + view[mine])
                tokens[mine], keys[mine], views[mine] = part
        return Samples(tokens, keys, views)


def share_of_rank(first: int, batch_size: int, micro: int, data_rank: int, data_size: int) -> list[Int64]:
    """Sample numbers of one rank's micro-batches in the update that starts at sample `first`.

    Micro-batches are dealt in turn: m x (ranks x micro) + rank x micro. Over all ranks each of the
    batch_size samples occurs once.
    """
    span = micro * data_size
    assert batch_size % span == 0
    here = first + data_rank * micro + np.arange(micro, dtype=np.int64)
    return [here + start for start in range(0, batch_size, span)]
