"""Tokens in, a fixed-shape batch out: which tokens are predicted and what stands in their place.

Counts are exact and the same for every row, so shapes are static and the loss is a plain mean. A mask is
a function of (data seed, text, visit): every position draws a random key, the smallest keys are the
predicted rows, and among them the smallest are [MASK], then random pieces, then kept tokens. Sequence
specials get the last keys, so that they are chosen only where nothing else is left.

K disjoint masks of a text (fully-explored masking, Zheng et al. 2020, arXiv 2010.06040) are K
consecutive stretches of the same order.

Letters: B batch, L sequence, P predicted, M [MASK] rows, R random rows.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain import config, rng

Tokens = npt.NDArray[np.integer]


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


class Masker:
    """Corrupts windows of one length.

    mask_id: the [MASK] piece. random_ids: the pieces that may stand in for another. special_ids: pieces
    that are predicted only where nothing else is left.
    """

    def __init__(
        self, masking: config.Masking, length: int, mask_id: int, random_ids: Tokens, special_ids: Tokens
    ) -> None:
        self.counts = counts(masking, length)
        self.views = masking.views
        self.mask_id = mask_id
        self.random_ids = np.asarray(random_ids, np.int64)
        self.special = np.zeros(int(max(random_ids.max(), special_ids.max(), mask_id)) + 1, bool)
        self.special[special_ids] = True
        self._place_bits = np.uint32(int(length - 1).bit_length())

    def __call__(self, tokens: Tokens, keys: rng.Uint64, view: npt.NDArray[np.int64]) -> Masked:
        """tokens [B, L] natural order; keys [B] one per (seed, text, partition); view [B] in [0, views)."""
        c, L = self.counts, tokens.shape[1]
        assert c.length == L
        tokens_BL = tokens.astype(np.int64)
        words = rng.stream(keys, (L + 1) // 2).view(np.uint32)[:, :L]
        order = self._order(words, self.special[tokens_BL], view)
        ids = np.take_along_axis(tokens_BL, order, 1)
        targets = ids[:, L - c.predicted :].copy()
        self._corrupt(ids, keys)
        chosen = int(self.special[targets].sum())
        return Masked(ids, order, targets, c.masked, chosen)

    def _order(
        self, words: npt.NDArray[np.uint32], special: npt.NDArray[np.bool_], view: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Positions [B, L] in row order. A sort key holds random high bits and the position in the low."""
        c, bits = self.counts, self._place_bits
        place = np.arange(c.length, dtype=np.uint32)
        # The highest bit says "special", the next are random, the lowest are the place.
        ordered = (words >> (bits + np.uint32(1))) << bits | place
        ordered |= special.astype(np.uint32) << np.uint32(31)
        if self.views == 1:
            edges = sorted({c.masked, c.masked + c.random, c.predicted} - {0, c.length})
            ordered.partition([e - 1 for e in edges], axis=1)
        else:
            ordered.sort(axis=1)
            shift = (np.arange(c.length) + (view * c.predicted)[:, None]) % c.length
            ordered = np.take_along_axis(ordered, shift, 1)
        places = ordered & ((np.uint32(1) << bits) - np.uint32(1))
        return places[:, ::-1].astype(np.int64)

    def _corrupt(self, ids: npt.NDArray[np.int64], keys: rng.Uint64) -> None:
        c, L = self.counts, self.counts.length
        if c.random:
            with np.errstate(over="ignore"):
                words = rng.stream(rng.mix(keys + np.uint64(1)), c.random) >> np.uint64(32)
            draw = (words * np.uint64(len(self.random_ids))) >> np.uint64(32)
            ids[:, L - c.masked - c.random : L - c.masked] = self.random_ids[draw.astype(np.int64)]
        if c.masked:
            ids[:, L - c.masked :] = self.mask_id
