"""Exact counts, a fair choice of positions, and disjoint views."""

import hashlib
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.indexed import IndexedReader
from pretrain.data.masking import Masker, counts, document_numbers
from pretrain.data.sampler import Sampler

VOCAB, MASK = 200, 199
RANDOM_IDS, SPECIALS = np.arange(4, 199), np.array([0, 1, 2, 3, 199])
WORD_STARTS = np.arange(VOCAB) < 100  # as a tokenizer's table: specials start a word
WORD_STARTS[SPECIALS] = True
UNITS = ("whole_word", "span")


def make(length=64, word_starts=WORD_STARTS, **options):
    return Masker(MaskingOptions(**options), length, MASK, RANDOM_IDS, SPECIALS, word_starts)


def windows(batch, length, seed=0):
    tokens = np.random.default_rng(seed).integers(4, 199, (batch, length))
    tokens[:, 0], tokens[:, -1] = 0, 2
    return tokens


def run(masker, batch=256, seed=0, view=0):
    tokens = windows(batch, masker.window, seed)
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
    c = counts(MaskingOptions(rate=rate, corruption=corruption), 128)
    assert (c.predicted, c.masked, c.random) == expected
    assert c.visible == 128 - c.masked


def test_documents_are_those_of_the_corpus(tiny):
    """Oracle: the sampler's own account, which knows the corpus and not the pieces."""
    corpus = IndexedReader(str(tiny / "train"))
    sampler = Sampler(corpus, MaskingOptions(), 64, seed=1, bos=0, eos=2)
    samples = np.arange(sampler.samples_per_epoch)
    known = sampler.documents(samples)
    numbers = document_numbers(sampler.read(samples).tokens, 2)
    several = 0
    for row, number in zip(known, numbers, strict=True):
        inside = row >= 0
        several += len(set(row[inside])) > 1
        pairs = row[inside, None] == row[inside]
        assert np.array_equal(pairs, number[inside, None] == number[inside])
        ends = np.flatnonzero(~inside)[1:]  # </s> goes with what it ends, <s> with what it begins
        assert (number[ends] >= number[ends - 1]).all() and number[0] == number[1] == 0
        assert (number[ends[row[ends - 1] >= 0]] == number[ends[row[ends - 1] >= 0] - 1]).all()
    assert several > 20
    masker = Masker(MaskingOptions(), 64, MASK, RANDOM_IDS, SPECIALS, document_end=2)
    tokens = np.minimum(sampler.read(samples).tokens, 198)
    m = masker(tokens, rng.key(samples), np.zeros_like(samples))
    assert np.array_equal(m.documents, np.take_along_axis(document_numbers(tokens, 2), m.positions, 1))


@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_rows_are_a_permutation_with_the_right_content(rate, scheme):
    masker = make(rate=rate, scheme=scheme)
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


@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
@pytest.mark.parametrize(("views", "partition"), [(1, "random"), (2, "random"), (2, "contiguous")])
def test_what_is_hidden_and_not_predicted_is_no_row(scheme, views, partition):
    """Context and hidden tokens are those of the mask that predicts them all, whichever are left out."""
    keys = {"rate": 0.45, "scheme": scheme, "views": views, "views_partition": partition}
    whole, part = make(**keys), make(predict=0.2, **keys)
    tokens, full = run(whole, view=views - 1)
    _, some = run(part, view=views - 1)
    hidden, c = whole.counts.predicted, part.counts
    assert (hidden, c.predicted, c.dropped, c.length) == (28, 12, 16, 48)
    assert part.counts.visible == 48 - c.masked and some.ids.shape == (256, 48)
    assert (some.positions[:, :-12] == full.positions[:, :-hidden]).all()
    for row, within in zip(some.positions[:, -12:], full.positions[:, -hidden:], strict=True):
        assert len(set(row)) == 12 and set(row) <= set(within)
    true = np.take_along_axis(tokens, some.positions, 1)
    assert (some.targets == true[:, -12:]).all() and (some.ids[:, :-12] == true[:, :-12]).all()
    assert (some.ids[:, -c.masked :] == MASK).all() and some.num_masked == c.masked


def test_all_hidden_tokens_are_predicted_where_nothing_else_is_said():
    _, one = run(make(rate=0.45))
    _, other = run(make(rate=0.45, predict=0.45))
    assert all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


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


@pytest.mark.parametrize("partition", ["random", "contiguous", "counts"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
def test_specials_only_where_nothing_else_is_left(scheme, views, partition):
    masker = make(rate=0.5, scheme=scheme, views=views, views_partition=partition)
    tokens = windows(8, 64)
    tokens[:, 1:41] = 2  # documents' ends: 42 specials in all, 22 words, P = 31
    chosen = [masker(tokens, rng.key(np.arange(8)), np.full(8, v)).specials_chosen for v in range(views)]
    assert chosen == [8 * (31 - 22), 8 * (9 if partition == "counts" else 31)][:views]


def predicted(masker, m):
    """bool [B, L] in the order of the text."""
    chosen = np.zeros(m.positions.shape, bool)
    np.put_along_axis(chosen, m.positions[:, masker.counts.length - masker.counts.predicted :], True, 1)
    return chosen


@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
@pytest.mark.parametrize("partition", ["random", "contiguous"])
@pytest.mark.parametrize(("rate", "views"), [(0.15, 7), (0.5, 2), (0.15, 4)])
def test_views_are_disjoint_and_equal(rate, views, partition, scheme):
    masker = make(rate=rate, views=views, views_partition=partition, scheme=scheme)
    assert masker.counts.predicted == min(round(rate * 62), 62 // views)
    seen = sum(predicted(masker, run(masker, view=view)[1]).astype(int) for view in range(views))
    assert seen.max() == 1 and seen.sum() == 256 * views * masker.counts.predicted
    assert seen[:, 0].sum() == seen[:, -1].sum() == 0


# ---- words and spans -----------------------------------------------------------------------------


def words_of(row):
    """The words of a window as lists of places, the slow way; a special is a word of its own."""
    words = []
    for place, piece in enumerate(row):
        after_special = place > 0 and row[place - 1] in SPECIALS
        if WORD_STARTS[piece] or after_special or not words:
            words.append([])
        words[-1].append(place)
    return words


@pytest.mark.parametrize("views", [1, 2])
def test_words_are_predicted_and_corrupted_whole(views):
    """But for the one at the border between two kinds of rows, of which one side is taken."""
    masker = make(rate=0.4, scheme="whole_word", views=views)
    cut = 0
    for view in range(views):
        tokens, m = run(masker, view=view)
        c = masker.counts
        assert m.units_cut > 0
        for row, order in zip(tokens, m.positions, strict=True):
            kinds = np.zeros(64, int)
            for rows in (c.predicted, c.masked + c.random, c.masked):
                kinds[order[64 - rows :]] += 1
            words = [kinds[word] for word in words_of(row)]
            split = [word for word in words if len(set(word)) > 1]
            assert len(split) <= 3 + (views > 1)
            cut += sum(min(word) == 0 for word in split)
            if views == 1:  # what is taken of a word is its end, or in half of the windows its beginning
                side = np.array([np.sign(word[-1] - word[0]) for word in split if min(word) == 0])
                assert len(set(side.tolist())) <= 1
        assert m.units_cut == cut
        cut = 0


def test_words_of_equal_length_are_chosen_uniformly():
    """60 tokens in words of 3, P = 31 = 10 words and either end of an 11th; 5 standard errors."""
    masker = make(length=62, rate=31 / 60, scheme="whole_word")
    tokens = np.tile(np.arange(60) % 3 * 50 + 99, (20000, 1))  # 99 starts a word, 149 and 199 do not
    tokens = np.where(tokens == MASK, 150, tokens)
    tokens = np.pad(tokens, ((0, 0), (1, 1)), constant_values=2)
    m = masker(tokens, rng.key(3, np.arange(20000)), np.zeros(20000, np.int64))
    share = predicted(masker, m)[:, 1:61].mean(0).reshape(20, 3)
    for column, expected in zip(share.T, (10.5 / 20, 10 / 20, 10.5 / 20), strict=True):
        assert abs(column - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 20000)
    assert m.units_cut == 20000


def test_span_lengths_are_geometric_and_stationary():
    """Of 1 to 10 words; P(length = n) ~ 0.8^n, mean 3.8; any place begins a span with chance 1 / mean."""
    masker = make(length=130, scheme="span", word_starts=None)
    begins = masker._span_begins(np.ones((20000, 130), bool), rng.key(1, np.arange(20000)))
    odds = 0.8 ** np.arange(10) / (0.8 ** np.arange(10)).sum()
    mean = (odds * np.arange(1, 11)).sum()
    assert mean == pytest.approx(3.8, abs=0.01)
    rates = begins[:, 1:].mean(0)  # the first place begins the rest of a span
    assert abs(rates - 1 / mean).max() < 5 * np.sqrt(1 / mean / 20000)
    rows, places = np.nonzero(begins)
    inside = (np.diff(rows) == 0) & (places[:-1] > 0) & (places[:-1] < 119)
    found = np.bincount(np.diff(places)[inside], minlength=11)[1:]
    expected = odds * found.sum()
    assert len(found) == 10
    assert ((found - expected) ** 2 / expected).sum() < 33  # chi-square, 9 degrees, 99.99 %


def test_spans_are_runs_of_whole_words_between_specials():
    masker = make(length=128, rate=0.15, scheme="span", corruption=(1, 0, 0))
    tokens = windows(512, 128)
    tokens[:, 60] = 2
    m = masker(tokens, rng.key(0, np.arange(512)), np.zeros(512, np.int64))
    chosen = predicted(masker, m)
    assert not chosen[:, 60].any()
    whole = runs = 0
    for row, places in zip(tokens, chosen, strict=True):
        parts = [places[word] for word in words_of(row)]
        assert sum(0 < part.sum() < len(part) for part in parts) <= 1
        whole += sum(part.all() for part in parts)
        runs += (np.diff([0, *(int(part.all()) for part in parts)]) == 1).sum()
    assert m.units_cut <= 512
    assert whole / runs > 2.5  # single words chosen at 15 % would give 1.2


def test_places_are_predicted_equally_often():
    """Spans, 15 % of 128 tokens, a document's end inside: no place is 6 % off the mean, where cutting off
    beginnings alone gave 20 %. The standard error of a rate is 1 %."""
    masker = make(length=128, scheme="span")
    tokens = windows(60000, 128)
    tokens[:, 80] = 2
    m = masker(tokens, rng.key(3, np.arange(60000)), np.zeros(60000, np.int64))
    rates = predicted(masker, m).mean(0)
    ordinary = np.delete(rates, [0, 80, 127])
    assert rates[80] == 0 and abs(ordinary / ordinary.mean() - 1).max() < 0.06


def test_the_unit_at_the_border_becomes_a_mask_as_often_as_others():
    masker = make(length=62, rate=31 / 60, scheme="whole_word")
    tokens = np.pad(np.tile(np.arange(60) % 3 * 50 + 99, (4000, 1)), ((0, 0), (1, 1)), constant_values=2)
    tokens = np.where(tokens == MASK, 150, tokens)
    m = masker(tokens, rng.key(3, np.arange(4000)), np.zeros(4000, np.int64))
    chosen, masked = predicted(masker, m), np.zeros((4000, 62), bool)
    np.put_along_axis(masked, m.positions[:, 62 - masker.counts.masked :], True, 1)
    cut = (chosen[:, 1:61].reshape(4000, 20, 3).sum(2) == 1).repeat(3, 1)
    share = masked[:, 1:61][cut & chosen[:, 1:61]].mean()
    expected = masker.counts.masked / masker.counts.predicted
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("partition", ["random", "contiguous"])
def test_views_of_a_text_draw_random_pieces_of_their_own(partition):
    masker = make(rate=0.15, views=6, views_partition=partition, corruption=(0, 1, 0))
    tokens, pieces = windows(200, 64), []
    for view in range(6):
        m = masker(tokens, rng.key(7, np.arange(200)), np.full(200, view))
        pieces.append(m.ids[:, 64 - masker.counts.predicted :])
    equal = np.mean([(a == b).mean() for a, b in itertools.combinations(pieces, 2)])
    assert equal < 0.02  # by chance one in some 290


def test_a_run_of_earlier_rules_keeps_its_masks():
    """The hash was written by the program before there were rules."""
    tokens = np.random.default_rng(0).integers(5, 299, (50, 64))
    tokens[:, 0], tokens[:, -1], tokens[::3, 30] = 0, 2, 2
    digest = hashlib.sha256()
    random_ids, specials, starts = np.arange(5, 299), np.array([0, 1, 2, 3, 4, 299]), np.arange(300) % 3 == 0
    for options in (
        {},
        {"scheme": "whole_word"},
        {"scheme": "span", "rate": 0.5},
        {"views": 3, "scheme": "span"},
        {"views": 3, "views_partition": "contiguous"},
    ):
        masker = Masker(MaskingOptions(**options), 64, 299, random_ids, specials, starts, rules=rng.Rules(1))
        m = masker(tokens, rng.key(7, np.arange(50)), np.arange(50) % options.get("views", 1))
        digest.update(m.ids.tobytes() + m.positions.tobytes())
    digest.update(rng.permute(np.arange(100), 100, (1, 2), rules=rng.Rules(1)).tobytes())
    assert digest.hexdigest()[:16] == "5571115316eae5b5"


# ---- segments of the text ------------------------------------------------------------------------


def test_contiguous_views_are_segments_at_uniform_places():
    masker = make(rate=0.5, views=4, views_partition="contiguous", corruption=(0.4, 0.3, 0.3))
    _, m = run(masker, batch=20000, view=2)
    c = masker.counts
    chosen = predicted(masker, m)[:, 1:63]
    changes = (chosen != np.roll(chosen, 1, 1)).sum(1)
    assert c.predicted == 15 and (changes == 2).all()
    share = chosen.mean(0)
    assert abs(share - 15 / 62).max() < 5 * np.sqrt(15 / 62 / 20000)
    # Within the segment the kinds of rows are spread evenly.
    first = np.flatnonzero(chosen[0])
    assert len(first) == 15
    starts = (chosen & ~np.roll(chosen, 1, 1)).argmax(1) + 1
    masked = np.zeros((20000, 64), bool)
    np.put_along_axis(masked, m.positions[:, 64 - c.masked :], True, 1)
    at_start = masked[np.arange(20000), starts].mean()
    assert at_start == pytest.approx(c.masked / 15, abs=5 * np.sqrt(0.25 / 20000))


# ---- a soft partition ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
def test_what_was_hidden_less_often_comes_first(scheme):
    """Beyond one cycle too, each in an order of its own; of words and spans but for those that are cut."""
    masker = make(rate=0.4, views=6, views_partition="counts", scheme=scheme)
    assert masker.counts.predicted == 25
    views = [predicted(masker, run(masker, view=view)[1])[:, 1:63] for view in range(6)]
    for number in range(1, 7):
        seen = sum(view.astype(int) for view in views[:number])
        spread = seen.max(1) - seen.min(1)
        assert spread.max() <= 1 if scheme == "uniform" else spread.mean() < 3
    assert seen.std(1).mean() < 0.9  # independent masks: 1.2
    if scheme == "uniform":
        for view in views:
            assert abs(view.mean(0) - 25 / 62).max() < 5 * np.sqrt(0.25 / 256)
        again = (views[0] & views[3]).sum(1).mean()  # of 25, 3 of them in the first cycle's rest
        assert again < 15


def test_a_view_by_counts_is_a_function_of_its_number():
    masker = make(rate=0.5, views=4, views_partition="counts")
    tokens, keys = windows(64, 64), rng.key(3, np.arange(64))
    mixed = masker(tokens, keys, np.arange(64) % 4)
    for view in range(4):
        alone = masker(tokens[view::4], keys[view::4], np.full(16, view))
        assert (alone.ids == mixed.ids[view::4]).all() and (alone.positions == mixed.positions[view::4]).all()


def test_kinds_by_counts_are_spread_evenly():
    """In the third view half of the predicted are hidden for the first time: they are [MASK] as often."""
    masker = make(rate=0.4, views=3, views_partition="counts", corruption=(0.4, 0.3, 0.3))
    c = masker.counts
    before = sum(predicted(masker, run(masker, batch=4000, view=view)[1]).astype(int) for view in (0, 1))
    _, m = run(masker, batch=4000, view=2)
    masked = np.zeros(before.shape, bool)
    np.put_along_axis(masked, m.positions[:, 64 - c.masked :], True, 1)
    chosen = predicted(masker, m)
    new, old = masked[chosen & (before == 0)], masked[chosen & (before == 1)]
    assert len(new) == 4000 * 12 and len(old) == 4000 * 13
    assert new.mean() == pytest.approx(old.mean(), abs=5 * np.sqrt(0.25 / 24000))


@pytest.mark.parametrize("views", [{}, {"views": 3, "views_partition": "contiguous"}])
@pytest.mark.parametrize("scheme", ["uniform", *UNITS])
def test_mask_is_a_function_of_the_key_alone(scheme, views):
    masker, tokens = make(rate=0.5, scheme=scheme, **views), windows(16, 64)
    keys = rng.key(7, np.arange(16))
    whole = masker(tokens, keys, np.ones(16, np.int64))
    part = masker(tokens[5:9], keys[5:9], np.ones(4, np.int64))
    assert (whole.ids[5:9] == part.ids).all() and (whole.positions[5:9] == part.positions).all()
    assert (whole.positions[0] != whole.positions[1]).any()


def test_dry_run_tells_what_is_cut(
    words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("a", "masking.scheme=whole_word", "--dry-run")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("masks"))
    found = re.fullmatch(
        r"masks       whole_word; of the 2,816 predicted rows of 256 windows (\d+) are sequence specials;"
        r" words or spans cut: (\d+)",
        line,
    )
    assert found and 0 < int(found[2]) <= 256
