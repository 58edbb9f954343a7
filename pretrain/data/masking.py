"""Tokens in, a fixed-shape batch out: which tokens are predicted and what stands in their place.

Counts are exact and the same for every row, so shapes are static and the loss is a plain mean. A mask is
a function of (data seed, text, visit): every unit (a token, a whole word or a span of words) draws a
random sort key, the tokens of the units with the largest are the predicted rows, and among them the
largest are [MASK], then come random pieces, then kept tokens. Where fewer tokens are predicted than hidden
(`masking.predict`), those with the next keys are no rows at all. So units are taken whole, in random
order, and only the last may be cut, from either side: else the ends of words and spans would be predicted
more often than their beginnings. Sequence specials get the smallest keys, so that they are chosen only
where nothing else is left.

K disjoint masks of a text (fully-explored masking, Zheng et al. 2020, arXiv 2010.06040) are K
consecutive stretches of the same order; in the contiguous form, of the order of the text. Divided by
counts, each view has an order of its own, in which what the views before it have hidden less often comes
first: they are drawn again to know that, so that nothing is kept from one visit to the next.

Letters: B batch, L sequence, P predicted, M [MASK] rows, R random rows.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.tokenizer import Tokenizer

Tokens = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]
Uint32 = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]

_ORDINARY = np.uint32(1 << 31)
"""The bit of a sort key that puts all other tokens before a sequence special."""
_COUNT_BITS = 4
"""Of a sort key that orders by how often a token was hidden; so many times at most are told apart."""


class Counts(NamedTuple):
    """Rows of each kind in a sequence."""

    length: int
    """L, <s> and </s> included."""
    predicted: int
    """P."""
    masked: int
    """M, rows that are [MASK]."""
    random: int
    """R, predicted rows that show a random piece; the other P - M - R show their own."""
    dropped: int = 0
    """Tokens of a window that are hidden and not predicted: they are no rows at all."""

    @property
    def visible(self) -> int:
        """V = L - M."""
        return self.length - self.masked


def counts(masking: MaskingOptions, length: int) -> Counts:
    """Return the rows of each kind for windows of `length` tokens; halves are rounded up.

    80/10/10 of P: M = round(0.8 P), of the rest the larger half is random where the shares are equal.
    """
    tokens = length - 2
    hidden = _round(masking.rate * tokens)
    if masking.views > 1 and masking.views_partition != "counts":
        hidden = min(hidden, tokens // masking.views)
    predicted = hidden if masking.predict is None else min(hidden, _round(masking.predict * tokens))
    mask_share, random_share, keep_share = masking.corruption
    masked = _round(mask_share * predicted)
    rest = predicted - masked
    visible_share = random_share + keep_share
    random = _round(rest * random_share / visible_share) if visible_share else 0
    dropped = hidden - predicted
    return Counts(length - dropped, predicted, masked, random, dropped)


def _round(x: float) -> int:
    # 0.15 * 60 is 9.000000000000000x in binary and 0.5 * 0.7 * 30 just below 10.5: forgive the last bits.
    return math.floor(x + 0.5 + 1e-9)


class Masked(NamedTuple):
    """A batch in permuted row order: context | kept | random | [MASK]."""

    ids: Int64
    """[B, L] pieces as the model sees them; L less the dropped tokens here and below."""
    positions: Int64
    """[B, L] place of each row in its sequence."""
    targets: Int64
    """[B, P] true pieces of the last P rows."""
    num_masked: int
    """M."""
    documents: npt.NDArray[np.int64] | None
    """[B, L] number of each row's document in its window; None where attention is not bounded by them."""
    specials_chosen: int
    """Predicted rows that are sequence specials, for want of other tokens."""
    units_cut: int
    """Words or spans of which only a part is predicted."""


class Masker:
    """Corrupts windows of one length.

    mask_id: the [MASK] piece. random_ids: the pieces that may stand in for another. special_ids: pieces
    that are predicted only where nothing else is left. word_starts: bool by piece, True where it begins a
    word; without the table each piece is a word. document_end: the piece that ends a document, where
    attention is bounded by documents. rules: that the run began with.
    """

    def __init__(
        self,
        masking: MaskingOptions,
        length: int,
        mask_id: int,
        random_ids: Tokens,
        special_ids: Tokens,
        word_starts: Bools | None = None,
        document_end: int | None = None,
        rules: rng.Rules = rng.RULES,
    ) -> None:
        self.rules = rules
        self.counts, self.window = counts(masking, length), length
        self.masking = masking
        self.mask_id, self.document_end = mask_id, document_end
        self.random_ids = np.asarray(random_ids, np.int64)
        self._special_runs = _runs(np.asarray(special_ids, np.int64))
        pieces = int(max(random_ids.max(), special_ids.max(), mask_id)) + 1
        self.word_starts = np.ones(pieces, bool) if word_starts is None else word_starts
        self._span_ends = _span_length_odds(masking.span_stop, masking.span_max)
        self._place = np.arange(length, dtype=np.uint32)
        self._bits = np.uint32(int(length - 1).bit_length())
        self._low = (np.uint32(1) << self._bits) - np.uint32(1)
        self._drawn = ~(self._low | _ORDINARY)

    def __call__(self, tokens: Tokens, keys: rng.Uint64, view: Int64) -> Masked:
        """Corrupt tokens [B, L] in natural order. keys [B]: of `rng`, one per (seed, text, partition);
        view [B] in [0, views)."""
        c, (B, L) = self.counts, tokens.shape
        assert self.window == L
        special = self._is_special(tokens)
        unit = self._units(tokens, special, keys)
        low = self._place if unit is None else self._sides(keys)
        sort_keys = self._sort_keys(self._random_bits(keys, unit), special, low)
        ordered = self._ordered(sort_keys, special, low, keys, view, unit)
        if unit is not None and self.rules.cut_either_side:
            self._draw_kinds(ordered, unit, special, low, keys)
        positions = self._places(ordered, low)
        specials = int(np.count_nonzero(ordered[:, L - c.predicted :] < _ORDINARY))
        cut = 0 if unit is None else _cut(np.take_along_axis(unit, positions, 1), c.predicted)
        if c.dropped:
            positions = np.delete(positions, np.s_[c.length - c.predicted : L - c.predicted], axis=1)
        # `clip`, because looking for places out of bounds would take longer than the gather.
        ids = tokens.take(positions + np.arange(0, B * L, L)[:, None], mode="clip").astype(np.int64)
        targets = ids[:, c.length - c.predicted :].copy()
        own = self.rules.own_pieces_by_view and self.masking.views > 1
        self._corrupt(ids, rng.key(keys, view) if own else keys)
        documents = None
        if self.document_end is not None:
            documents = np.take_along_axis(document_numbers(tokens, self.document_end), positions, 1)
        return Masked(ids, positions, targets, c.masked, documents, specials, cut)

    # -- units: what is drawn as one

    def _is_special(self, tokens: Tokens) -> Bools:
        """[B, L]; a few comparisons, because a table would be looked up once for each token."""
        found = np.zeros(tokens.shape, bool)
        for first, last in self._special_runs:
            found |= tokens == first if first == last else (tokens >= first) & (tokens <= last)
        return found

    def _units(self, tokens: Tokens, special: Bools, keys: rng.Uint64) -> Int64 | None:
        """[B, L] first place of the unit that each token belongs to; None where each is its own."""
        if self.masking.scheme == "uniform":
            return None
        # A special is a word, and so is what is left of a word behind one.
        alone = special | np.roll(special, 1, 1)
        begins = self.word_starts[tokens] | alone
        if self.masking.scheme == "span":
            spans = begins & self._span_begins(begins, keys)
            if self.rules.cut_either_side:
                return self._spans(spans, special)
            begins &= spans | alone
        return np.maximum.accumulate(np.where(begins, self._place.astype(np.int64), 0), axis=1)

    def _span_begins(self, word_begins: Bools, keys: rng.Uint64) -> Bools:
        """[B, L] where the span of a word begins: the text is tiled with spans of random lengths.

        The first span is what is left of one that began before the text, so that no place is closer to a
        span's beginning than another.
        """
        B, L = word_begins.shape
        with np.errstate(over="ignore"):
            draw = rng.stream(rng.mix(keys + np.uint64(2)), L) >> np.uint64(11)
        chance = draw.astype(np.float64) / 2**53
        whole, rest = self._span_ends
        lengths = 1 + np.searchsorted(whole, chance, side="right")
        lengths[:, 0] = 1 + np.searchsorted(rest, chance[:, 0], side="right")
        first_words = np.zeros((B, L + 1), bool)
        first_words[:, 0] = True
        np.put_along_axis(first_words, np.minimum(lengths.cumsum(1), L), True, 1)
        return np.take_along_axis(first_words, word_begins.cumsum(1) - 1, 1)

    def _spans(self, begins: Bools, special: Bools) -> Int64:
        """Return the unit [B, L] of each token: its span, of which the first ordinary place is the name.

        The parts of a span that a special divides are one unit, and so are the last span of a window and
        the first, the rest of one: shorter units, at the ends of documents and windows, would be predicted
        more often.
        """
        B, L = begins.shape
        span = begins.cumsum(1) - begins[:, :1]
        span[span == span[:, -1:]] = 0
        place = np.broadcast_to(np.arange(L), (B, L))
        names = np.zeros((B, L + 1), np.int64)
        last_first = np.where(special, L, span)[:, ::-1]  # of values for one index the last one stays
        np.put_along_axis(names, last_first, place[:, ::-1], 1)
        return np.where(special, place, np.take_along_axis(names, span, 1))

    # -- order: what is predicted, and of that what is [MASK]

    def _sides(self, keys: rng.Uint64) -> Uint32:
        """Return the lowest bits of the sort keys [B, L]: the place, in half of the sequences counted from
        the end. Of the unit at the border the larger are predicted."""
        with np.errstate(over="ignore"):
            backwards = (rng.mix(keys + np.uint64(4)) >> np.uint64(63)).astype(bool)
        return np.where(backwards[:, None] & self.rules.cut_either_side, self._place[::-1], self._place)

    def _places(self, rows: Uint32, low: Uint32) -> Int64:
        """Return the places of rows by their sort keys."""
        places = (rows & self._low).astype(np.int64)
        if low.ndim == 1:
            return places
        return np.where(low[:, :1] > 0, self.window - 1 - places, places)

    def _sort_keys(self, random_bits: Uint32, special: Bools, low: Uint32) -> Uint32:
        """The highest bit says "no special", the next are those of `random_bits`, the lowest are `low`."""
        sort_keys = random_bits & self._drawn
        sort_keys |= low | _ORDINARY
        return np.bitwise_xor(sort_keys, _ORDINARY, out=sort_keys, where=special)

    def _ordered(
        self,
        ordered: Uint32,
        special: Bools,
        low: Uint32,
        keys: rng.Uint64,
        view: Int64,
        unit: Int64 | None = None,
    ) -> Uint32:
        """Sort keys [B, L] in the order of rows: context, kept, random, [MASK].

        All are sorted, although a partition would do: numpy's sort is as fast as one of its partitions
        and the order of the rows is then the same on every machine.
        """
        L, masking, hidden = self.window, self.masking, self.counts.predicted + self.counts.dropped
        if masking.views == 1:
            ordered.sort(axis=1)
            return ordered
        if masking.views_partition == "counts":
            return self._ordered_by_counts(special, low, keys, view, unit)
        contiguous = masking.views_partition == "contiguous"
        by_view = self._ring(special, low, keys) if contiguous else ordered
        stretch = (np.arange(L) - (view * hidden)[:, None]) % L
        rows = np.take_along_axis(np.sort(by_view, 1), stretch, 1)
        if contiguous:  # where to look is settled; what becomes [MASK] there is still to be drawn
            drawn = rows[:, L - hidden :]
            drawn[...] = np.sort(np.take_along_axis(ordered, self._places(drawn, low), 1), 1)
        return rows

    def _ordered_by_counts(
        self, special: Bools, low: Uint32, keys: rng.Uint64, view: Int64, unit: Int64 | None
    ) -> Uint32:
        """Return the sort keys [B, L] of each sequence's view, in the order of rows; see `_ordered`."""
        L, hidden, most = self.window, self.counts.predicted + self.counts.dropped, (1 << _COUNT_BITS) - 1
        seen, rows = np.zeros(special.shape, np.uint32), np.zeros(special.shape, np.uint32)
        for number in range(int(view.max()) + 1):
            drawn, often = self._random_bits(rng.key(keys, number), unit), np.minimum(seen, most)
            if unit is not None:
                often = np.take_along_axis(often, unit, 1)
            bits = drawn >> np.uint32(_COUNT_BITS + 1) | (most - often) << np.uint32(31 - _COUNT_BITS)
            chosen = np.sort(self._sort_keys(bits, special, low), 1)
            rows = np.where((view == number)[:, None], chosen, rows)
            places = self._places(chosen[:, L - hidden :], low)
            np.put_along_axis(seen, places, np.take_along_axis(seen, places, 1) + np.uint32(1), 1)
        # What is hidden is settled; what becomes [MASK] of that must not depend on the counts.
        with np.errstate(over="ignore"):
            drawn = self._sort_keys(
                self._random_bits(rng.mix(rng.key(keys, view) + np.uint64(5)), unit), special, low
            )
        places = self._places(rows[:, L - hidden :], low)
        rows[:, L - hidden :] = np.sort(np.take_along_axis(drawn, places, 1), 1)
        return rows

    def _random_bits(self, keys: rng.Uint64, unit: Int64 | None) -> Uint32:
        """Return 32 random bits for each token [B, L], the same for those of a unit."""
        random_bits = rng.stream(keys, (self.window + 1) // 2).view(np.uint32)[:, : self.window]
        return random_bits if unit is None else np.take_along_axis(random_bits, unit, 1)

    def _draw_kinds(self, rows: Uint32, unit: Int64, special: Bools, low: Uint32, keys: rng.Uint64) -> None:
        """Sort the predicted rows by other sort keys of their units: the cut one, which has the smallest of
        all, becomes [MASK] as often as another."""
        L, P = self.window, self.counts.predicted
        with np.errstate(over="ignore"):
            drawn = self._sort_keys(self._random_bits(rng.mix(keys + np.uint64(5)), unit), special, low)
        places = self._places(rows[:, L - P :], low)
        rows[:, L - P :] = np.sort(np.take_along_axis(drawn, places, 1), 1)

    def _ring(self, special: Bools, low: Uint32, keys: rng.Uint64) -> Uint32:
        """Sort keys [B, L] for the order of the text, from a random place on and round its end."""
        inner = np.uint32(self.window - 2)  # <s> and </s> do not count: they come first anyway
        with np.errstate(over="ignore"):
            turn = (rng.mix(keys + np.uint64(3)) % np.uint64(inner)).astype(np.uint32)
        ring = (self._place - np.uint32(1) + inner + turn[:, None]) % inner
        return self._sort_keys(ring << self._bits, special, low)

    def _corrupt(self, ids: Int64, keys: rng.Uint64) -> None:
        c, L = self.counts, self.counts.length
        if c.random:
            with np.errstate(over="ignore"):
                random_bits = rng.stream(rng.mix(keys + np.uint64(1)), (c.random + 1) // 2).view(np.uint32)
            draw = random_bits[:, : c.random] * np.uint64(len(self.random_ids)) >> np.uint64(32)
            ids[:, L - c.masked - c.random : L - c.masked] = self.random_ids[draw.astype(np.int64)]
        if c.masked:
            ids[:, L - c.masked :] = self.mask_id


def _runs(ids: Int64) -> list[tuple[int, int]]:
    """(first, last) of the stretches of consecutive numbers."""
    ids = np.unique(ids)
    parts = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


def document_numbers(tokens: Tokens, document_end: int) -> npt.NDArray[np.int64]:
    """Return [B, L] which document of its window each token belongs to, from 0; an end belongs to what it
    ends."""
    ends = tokens == document_end
    return ends.cumsum(1) - ends


def _span_length_odds(stop: float, longest: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """P(length <= 1, 2, ...) of a span, and of what is left of one at a random place in it."""
    odds = (1 - stop) ** np.arange(longest)
    odds /= odds.sum()
    at_least = odds[::-1].cumsum()[::-1]
    return odds.cumsum()[:-1], (at_least / at_least.sum()).cumsum()[:-1]


def _cut(unit_rows: Int64, predicted: int) -> int:
    """Count the units [B, L] in row order that have both predicted rows and others."""
    border = unit_rows.shape[1] - predicted
    inside, outside = np.zeros(unit_rows.shape, bool), np.zeros(unit_rows.shape, bool)
    np.put_along_axis(inside, unit_rows[:, border:], True, 1)
    np.put_along_axis(outside, unit_rows[:, :border], True, 1)
    return int((inside & outside).sum())


def masker(
    masking: MaskingOptions,
    length: int,
    tokenizer: Tokenizer,
    bounded: bool = False,
    rules: rng.Rules = rng.RULES,
) -> Masker:
    """Return the masker of a tokenizer's ids; `bounded`: it numbers the documents too."""
    everything: npt.NDArray[np.integer] = np.arange(tokenizer.vocab_size)
    specials = np.setdiff1d(everything, tokenizer.random_ids)
    end = tokenizer.eos if bounded else None
    starts = tokenizer.word_starts
    if rules.unspaced_words:
        starts = starts | tokenizer.unspaced
    return Masker(masking, length, tokenizer.mask, tokenizer.random_ids, specials, starts, end, rules)
