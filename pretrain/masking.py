"""Tokens in, a fixed-shape batch out: which tokens are predicted and what stands in their place.

Counts are exact and the same for every row, so shapes are static and the loss is a plain mean. A mask is
a function of (data seed, text, visit): every unit (a token, a whole word or a span of words) draws a
random key, the tokens of the units with the smallest keys are the predicted rows, and among them the
first are [MASK], then random pieces, then kept tokens. So units are taken whole, in random order, and
only the last may be cut. Sequence specials get the last keys, so that they are chosen only where nothing
else is left.

K disjoint masks of a text (fully-explored masking, Zheng et al. 2020, arXiv 2010.06040) are K
consecutive stretches of the same order; in the contiguous form, of the order of the text.

Letters: B batch, L sequence, P predicted, M [MASK] rows, R random rows.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain import config, rng

Tokens = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint32]


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

    @property
    def visible(self) -> int:
        """V = L - M."""
        return self.length - self.masked


def counts(masking: config.Masking, length: int) -> Counts:
    """Rows of each kind for sequences of `length`; halves are rounded up.

    80/10/10 of P: M = round(0.8 P), of the rest the larger half is random where the shares are equal.
    """
    tokens = length - 2
    predicted = _round(masking.rate * tokens)
    if masking.views > 1:
        predicted = min(predicted, tokens // masking.views)
    mask_share, random_share, keep_share = masking.corruption
    masked = _round(mask_share * predicted)
    rest = predicted - masked
    visible_share = random_share + keep_share
    random = _round(rest * random_share / visible_share) if visible_share else 0
    return Counts(length, predicted, masked, random)


def _round(x: float) -> int:
    # 0.15 * 60 is 9.000000000000000x in binary and 0.5 * 0.7 * 30 just below 10.5: forgive the last bits.
    return math.floor(x + 0.5 + 1e-9)


class Masked(NamedTuple):
    """A batch in permuted row order: context | kept | random | [MASK]."""

    ids: npt.NDArray[np.int64]
    """[B, L] pieces as the model sees them."""
    positions: npt.NDArray[np.int64]
    """[B, L] place of each row in its sequence."""
    targets: npt.NDArray[np.int64]
    """[B, P] true pieces of the last P rows."""
    num_masked: int
    """M."""
    specials_chosen: int
    """Predicted rows that are sequence specials, for want of other tokens."""
    units_cut: int
    """Words or spans of which only a part is predicted."""


class Masker:
    """Corrupts windows of one length.

    mask_id: the [MASK] piece. random_ids: the pieces that may stand in for another. special_ids: pieces
    that are predicted only where nothing else is left. word_starts: bool by piece, True where it begins a
    word; without the table each piece is a word.
    """

    def __init__(
        self,
        masking: config.Masking,
        length: int,
        mask_id: int,
        random_ids: Tokens,
        special_ids: Tokens,
        word_starts: Bools | None = None,
    ) -> None:
        self.counts = counts(masking, length)
        self.masking = masking
        self.mask_id = mask_id
        self.random_ids = np.asarray(random_ids, np.int64)
        pieces = int(max(random_ids.max(), special_ids.max(), mask_id)) + 1
        self.special = np.zeros(pieces, bool)
        self.special[special_ids] = True
        self.word_starts = np.ones(pieces, bool) if word_starts is None else word_starts
        self._span_ends = _span_length_odds(masking.span_stop, masking.span_max)
        self._place = np.arange(length, dtype=np.uint32)
        self._bits = np.uint32(int(length - 1).bit_length())

    def __call__(self, tokens: Tokens, keys: rng.Uint64, view: npt.NDArray[np.int64]) -> Masked:
        """tokens [B, L] natural order; keys [B] one per (seed, text, partition); view [B] in [0, views)."""
        c, L = self.counts, tokens.shape[1]
        assert c.length == L
        tokens_BL = tokens.astype(np.int64)
        special = self.special[tokens_BL]
        words = rng.stream(keys, (L + 1) // 2).view(np.uint32)[:, :L]
        unit = self._units(tokens_BL, special, keys)
        if unit is not None:
            words = np.take_along_axis(words, unit, 1)
        places = self._ordered(self._sort_keys(words, special), special, keys, view)
        order = np.ascontiguousarray(places[:, ::-1], np.int64)
        ids = np.take_along_axis(tokens_BL, order, 1)
        targets = ids[:, L - c.predicted :].copy()
        self._corrupt(ids, keys)
        cut = 0 if unit is None else _cut(np.take_along_axis(unit, order, 1), c.predicted)
        return Masked(ids, order, targets, c.masked, int(self.special[targets].sum()), cut)

    # -- units: what is drawn as one

    def _units(
        self, tokens: npt.NDArray[np.int64], special: Bools, keys: rng.Uint64
    ) -> npt.NDArray[np.int64] | None:
        """[B, L] first place of the unit that each token belongs to; None where each is its own."""
        if self.masking.scheme == "uniform":
            return None
        # A special is a word, and so is what is left of a word behind one.
        alone = special | np.roll(special, 1, 1)
        begins = self.word_starts[tokens] | alone
        if self.masking.scheme == "span":
            begins &= self._span_begins(begins, keys) | alone
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

    # -- order: what is predicted, and of that what is [MASK]

    def _sort_keys(self, high: Keys, special: Bools) -> Keys:
        """The highest bit says "special", the next are those of `high`, the lowest are the place."""
        keys = (high >> (self._bits + np.uint32(1))) << self._bits | self._place
        return keys | special.astype(np.uint32) << np.uint32(31)

    def _ordered(self, ordered: Keys, special: Bools, keys: rng.Uint64, view: npt.NDArray[np.int64]) -> Keys:
        """Places [B, L], the [MASK]s first, then random, kept and context rows."""
        c, k = self.counts, self.masking
        low = (np.uint32(1) << self._bits) - np.uint32(1)
        if k.views == 1:
            edges = {c.masked, c.masked + c.random, c.predicted} - {0, c.length}
            ordered.partition(sorted(edge - 1 for edge in edges), axis=1)
            return ordered & low
        contiguous = k.views_partition == "contiguous"
        by_view = self._ring(special, keys) if contiguous else ordered
        stretch = (np.arange(c.length) + (view * c.predicted)[:, None]) % c.length
        places = np.take_along_axis(np.sort(by_view, 1), stretch, 1) & low
        if contiguous:  # where to look is settled; what becomes [MASK] there is still to be drawn
            chosen = np.take_along_axis(ordered, places[:, : c.predicted].astype(np.int64), 1)
            places[:, : c.predicted] = np.sort(chosen, 1) & low
        return places

    def _ring(self, special: Bools, keys: rng.Uint64) -> Keys:
        """Sort keys [B, L] for the order of the text, from a random place on and round its end."""
        inner = np.uint32(self.counts.length - 2)  # <s> and </s> do not count: they come last anyway
        with np.errstate(over="ignore"):
            turn = (rng.mix(keys + np.uint64(3)) % np.uint64(inner)).astype(np.uint32)
        ring = (self._place - np.uint32(1) + inner + turn[:, None]) % inner
        return self._sort_keys(ring << (self._bits + np.uint32(1)), special)

    def _corrupt(self, ids: npt.NDArray[np.int64], keys: rng.Uint64) -> None:
        c, L = self.counts, self.counts.length
        if c.random:
            with np.errstate(over="ignore"):
                words = rng.stream(rng.mix(keys + np.uint64(1)), c.random) >> np.uint64(32)
            draw = (words * np.uint64(len(self.random_ids))) >> np.uint64(32)
            ids[:, L - c.masked - c.random : L - c.masked] = self.random_ids[draw.astype(np.int64)]
        if c.masked:
            ids[:, L - c.masked :] = self.mask_id


def _span_length_odds(stop: float, longest: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """P(length <= 1, 2, ...) of a span, and of what is left of one at a random place in it."""
    odds = (1 - stop) ** np.arange(longest)
    odds /= odds.sum()
    at_least = odds[::-1].cumsum()[::-1]
    return odds.cumsum()[:-1], (at_least / at_least.sum()).cumsum()[:-1]


def _cut(unit_rows: npt.NDArray[np.int64], predicted: int) -> int:
    """How many of the units [B, L] in row order have both predicted and context rows."""
    border = unit_rows.shape[1] - predicted
    inside, outside = np.zeros(unit_rows.shape, bool), np.zeros(unit_rows.shape, bool)
    np.put_along_axis(inside, unit_rows[:, border:], True, 1)
    np.put_along_axis(outside, unit_rows[:, :border], True, 1)
    return int((inside & outside).sum())
