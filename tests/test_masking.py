"""Exact counts, a fair choice of positions, and disjoint views."""

import numpy as np
import pytest

from pretrain import config, rng
from pretrain.masking import Masker, counts

VOCAB, MASK = 200, 199
RANDOM_IDS, SPECIALS = np.arange(4, 199), np.array([0, 1, 2, 3, 199])


def make(length=64, **options):
    return Masker(config.Masking(**options), length, MASK, RANDOM_IDS, SPECIALS)


def windows(batch, length, seed=0):
    tokens = np.random.default_rng(seed).integers(4, 199, (batch, length))
    tokens[:, 0], tokens[:, -1] = 0, 2
    return tokens


def run(masker, batch=256, seed=0, view=0):
    tokens = windows(batch, masker.counts.length, seed)
    keys = rng.key(seed, np.arange(batch))
    return tokens, masker(tokens, keys, np.full(batch, view))


@pytest.mark.parametrize(
    ("rate", "corruption", "expected"),
    [  # L = 128: P = round(rate * 126), M = round(share * P) with halves up, R = larger half of the rest
        (0.15, (0.8, 0.1, 0.1), (19, 15, 2)),
        (0.40, (0.8, 0.1, 0.1), (50, 40, 5)),
        (0.50, (0.8, 0.1, 0.1), (63, 50, 7)),
        (0.50, (1.0, 0.0, 0.0), (63, 63, 0)),
        (0.30, (0.5, 0.5, 0.0), (38, 19, 19)),
        (0.30, (0.5, 0.0, 0.5), (38, 19, 0)),
    ],
)
def test_counts(rate, corruption, expected):
    c = counts(config.Masking(rate=rate, corruption=corruption), 128)
    assert (c.predicted, c.masked, c.random) == expected
    assert c.visible == 128 - c.masked


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_rows_are_a_permutation_with_the_right_content(rate):
    masker = make(rate=rate)
    tokens, m = run(masker)
    c, L = masker.counts, 64
    assert (np.sort(m.positions, 1) == np.arange(L)).all()
    true = np.take_along_axis(tokens, m.positions, 1)
    assert (m.targets == true[:, L - c.predicted :]).all()
    assert (m.ids[:, L - c.masked :] == MASK).all()
    shown = slice(0, L - c.masked - c.random)
    assert (m.ids[:, shown] == true[:, shown]).all()
    replaced = m.ids[:, L - c.masked - c.random : L - c.masked]
    assert np.isin(replaced, RANDOM_IDS).all()
    assert m.specials_chosen == 0 and m.num_masked == c.masked


def test_positions_are_chosen_uniformly():
    """Each of the 62 free places is predicted, and is [MASK], equally often: 5 standard errors."""
    masker = make(rate=0.5)
    _, m = run(masker, batch=20000)
    for rows in (masker.counts.predicted, masker.counts.masked):
        hits = np.bincount(m.positions[:, 64 - rows :].ravel(), minlength=64)
        assert hits[0] == hits[63] == 0
        share = rows / 62
        assert abs(hits[1:63] / 20000 - share).max() < 5 * np.sqrt(share * (1 - share) / 20000)


def test_pairs_of_neighbours_are_chosen_independently():
    """P(i and i+1 both predicted) = P(P-1) / n(n-1) for draws without replacement."""
    masker = make(rate=0.5)
    _, m = run(masker, batch=20000)
    chosen = np.zeros((20000, 64))
    np.put_along_axis(chosen, m.positions[:, 64 - 31 :], 1, 1)
    both = (chosen[:, 1:62] * chosen[:, 2:63]).mean(0)
    share = 31 * 30 / (62 * 61)
    assert abs(both - share).max() < 5 * np.sqrt(share * (1 - share) / 20000)


def test_random_pieces_are_uniform():
    """Chi-square over 195 pieces; 99.99 % of uniform draws stay below 275."""
    masker = make(rate=0.5, corruption=(0.0, 1.0, 0.0))
    _, m = run(masker, batch=5000)
    pieces = np.bincount(m.ids[:, 64 - 31 :].ravel(), minlength=199)[4:]
    mean = pieces.mean()
    assert ((pieces - mean) ** 2 / mean).sum() < 275


def test_specials_only_where_nothing_else_is_left():
    masker = make(rate=0.5)
    tokens = windows(8, 64)
    tokens[:, 1:41] = 2  # documents' ends: 42 specials in all, 22 words, P = 31
    m = masker(tokens, rng.key(np.arange(8)), np.zeros(8, np.int64))
    assert m.specials_chosen == 8 * (31 - 22)


@pytest.mark.parametrize(("rate", "views"), [(0.15, 7), (0.5, 2), (0.15, 4)])
def test_views_are_disjoint_and_equal(rate, views):
    masker = make(rate=rate, views=views)
    assert masker.counts.predicted == min(round(rate * 62), 62 // views)
    seen = np.zeros((256, 64), int)
    for view in range(views):
        _, m = run(masker, view=view)
        np.put_along_axis(
            seen,
            m.positions[:, 64 - masker.counts.predicted :],
            np.take_along_axis(seen, m.positions[:, 64 - masker.counts.predicted :], 1) + 1,
            1,
        )
    assert seen.max() == 1 and seen.sum() == 256 * views * masker.counts.predicted


def test_mask_is_a_function_of_the_key_alone():
    masker, tokens = make(rate=0.5), windows(16, 64)
    keys = rng.key(7, np.arange(16))
    whole = masker(tokens, keys, np.zeros(16, np.int64))
    part = masker(tokens[5:9], keys[5:9], np.zeros(4, np.int64))
    assert (whole.ids[5:9] == part.ids).all() and (whole.positions[5:9] == part.positions).all()
    assert (whole.positions[0] != whole.positions[1]).any()
