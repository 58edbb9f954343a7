"""The closed-form order against a stream built the obvious way."""

import math
from fractions import Fraction

import numpy as np
import pytest

from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.indexed import IndexedReader
from pretrain.data.sampler import (
    Blend,
    Sampler,
    Segment,
    continue_segments,
    share_of_rank,
    shares,
    used_samples,
)
from pretrain.data.writer import CorpusWriter
from pretrain.errors import UserError

BOS, EOS, LENGTH = 0, 2, 18


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 documents of 0 to 120 tokens; every token is different, so each can be followed."""
    prefix = tmp_path_factory.mktemp("corpus") / "numbers"
    lengths = np.random.default_rng(0).integers(0, 120, 40)
    lengths[3] = 0
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.uint16)
    with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.append_documents(tokens, lengths)
        writer.finish()
    return IndexedReader(prefix)


def make(corpus, seed=0, **masking):
    return Sampler(corpus, MaskingOptions(**masking), LENGTH, seed, BOS, EOS)


def epoch(sampler, number):
    first = number * sampler.samples_per_epoch
    return sampler.read(np.arange(first, first + sampler.samples_per_epoch))


def test_an_epoch_uses_every_token_once_but_for_the_reported_tail(corpus):
    sampler = make(corpus)
    for number in range(3):
        windows = epoch(sampler, number).tokens
        assert (windows[:, 0] == BOS).all() and (windows[:, -1] == EOS).all()
        inside = windows[:, 1:-1].ravel()
        words = inside[inside >= 10]
        assert len(set(words)) == len(words)
        missing = corpus.num_tokens - len(words)
        joins = (inside == EOS).sum()
        documents = (corpus.document_lengths > 0).sum()
        assert missing + (documents - 1 - joins) == sampler.tail_tokens < LENGTH - 2


def test_windows_equal_the_stream_cut_by_hand(corpus):
    sampler = make(corpus, seed=5)
    filled = [corpus.document(i) for i in range(40) if len(corpus.document(i))]
    order = rng.permute(np.arange(len(filled)), len(filled), (5, 1, 2))  # documents of epoch 2
    stream = []
    for rank, i in enumerate(order):
        stream += ([EOS] if rank else []) + filled[i].tolist()
    cut = {tuple(stream[s : s + 16]) for s in range(0, len(stream) - 15, 16)}
    assert {tuple(row) for row in epoch(sampler, 2).tokens[:, 1:-1].tolist()} == cut


def test_epochs_seeds_and_masks_differ(corpus):
    a, b, c = epoch(make(corpus), 0), epoch(make(corpus), 1), epoch(make(corpus, seed=1), 0)
    assert (a.tokens != b.tokens).any() and (a.tokens != c.tokens).any()
    assert len(set(a.keys) | set(b.keys) | set(c.keys)) == 3 * len(a.keys)


@pytest.mark.parametrize("layout", [(1, 12), (1, 3), (2, 6), (2, 1), (3, 2), (4, 3)])
def test_any_layout_reads_the_same_samples_and_masks(corpus, layout):
    ranks, micro = layout
    whole = make(corpus).read(np.arange(24, 36))
    seen = {}
    for rank in range(ranks):
        sampler = make(corpus)
        for samples in share_of_rank(24, 12, micro, rank, ranks):
            part = sampler.read(samples)
            for n, row, key in zip(samples, part.tokens, part.keys, strict=True):
                assert n not in seen
                seen[n] = (row.tolist(), int(key))
    assert [seen[n] for n in range(24, 36)] == [
        (row.tolist(), int(key)) for row, key in zip(whole.tokens, whole.keys, strict=True)
    ]


def test_one_by_one_equals_at_once_across_epochs(corpus):
    sampler = make(corpus)
    around = np.arange(sampler.samples_per_epoch - 5, 2 * sampler.samples_per_epoch + 5)
    whole = sampler.read(around)
    one = [make(corpus).read(around[i : i + 1]).tokens[0] for i in (0, 4, 5, 6, len(around) - 1)]
    assert (np.stack(one) == whole.tokens[[0, 4, 5, 6, -1]]).all()


def test_epoch_views_keep_text_and_key_for_k_epochs(corpus):
    sampler = make(corpus, views=3)
    visits = [epoch(sampler, e) for e in range(4)]
    texts = [{tuple(r): int(k) for r, k in zip(v.tokens.tolist(), v.keys, strict=True)} for v in visits]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert [set(v.views) for v in visits] == [{0}, {1}, {2}, {0}]


def test_batch_views_are_consecutive_samples(corpus):
    sampler = make(corpus, views=2, views_mode="batch")
    s = sampler.read(np.arange(8))
    assert (s.tokens[0::2] == s.tokens[1::2]).all() and (s.keys[0::2] == s.keys[1::2]).all()
    assert s.views.tolist() == [0, 1] * 4
    assert sampler.samples_per_epoch == 2 * sampler.windows_per_epoch


def test_too_small_a_corpus_is_refused(corpus):
    with pytest.raises(UserError, match="do not fill one window"):
        Sampler(corpus, MaskingOptions(), 10000, 0, BOS, EOS)


# ---- blends --------------------------------------------------------------------------------------


def test_documents_name_the_text_of_each_token(corpus):
    sampler = make(corpus, views=2)
    samples = np.arange(3 * sampler.samples_per_epoch)
    tokens, documents = sampler.read(samples).tokens, sampler.documents(samples)
    assert (documents[:, 0] == -1).all() and (documents[:, -1] == -1).all()
    assert ((documents == -1) == (tokens < 10)).all()  # <s>, </s> and the joins
    bounds = corpus.document_bounds
    inside = documents >= 0
    at = tokens[inside] - 10  # the tokens count up through the corpus
    assert (bounds[documents[inside]] <= at).all() and (at < bounds[documents[inside] + 1]).all()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [5], [0.1, 30, 7, 0.01], [0.3, 0.3, 0.3, 0.1]])
def test_shares_are_exact_at_every_prefix(weights):
    number = np.arange(20_001)
    counts = np.stack(shares(weights, number))
    assert (counts.sum(0) == number).all()
    steps = np.diff(counts, axis=1)
    assert steps.min() >= 0 and (steps.sum(0) == 1).all()
    exact = np.outer(weights, number) / np.sum(weights)
    assert np.abs(counts - exact).max() <= (0.5 + 1e-9 if len(weights) <= 2 else 1.5)
    far = np.array([10**12, 10**12 + 1])
    assert np.abs(np.stack(shares(weights, far)) - np.outer(weights, far) / np.sum(weights)).max() < 2


@pytest.mark.parametrize(
    "weights", [[1e12, 3e5], [1e-30, 1, 1e-9], [0.1234567890123, 7.1, 0.9876543210987654], [2**31, 2**31 - 1]]
)
def test_shares_of_any_weights_are_those_of_whole_numbers(weights):
    number = np.concatenate([np.arange(100), 10**9 + np.arange(3), 10**15 + np.arange(3)])
    found = np.stack(shares(weights, number))
    assert found.dtype == np.int64
    for n, counts in zip(number.tolist(), found.T.tolist(), strict=True):
        exact, left = [Fraction(str(weight)) for weight in weights], n
        rest = sum(exact)
        for k in sorted(range(len(exact)), key=lambda k: -exact[k]):
            assert counts[k] == math.floor(left * exact[k] / rest + Fraction(1, 2))
            left, rest = left - counts[k], rest - exact[k]
        assert left == 0


def test_the_smallest_share_is_read():
    assert [int(count[0]) for count in shares([1e12, 3e5], np.array([10**9]))] == [10**9 - 300, 300]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.1, 30, 7, 0.01], [0.333333, 0.666667]])
def test_shares_of_simple_weights_are_those_of_older_runs(weights):
    """A run that goes on must find the order that it began with: shares with denominators below 2**20."""
    number = np.concatenate([np.arange(5000), 10**11 + np.arange(5000)])
    exact, left = [Fraction(str(weight)) for weight in weights], number
    rest, found = sum(exact), shares(weights, number)
    for k in sorted(range(len(exact)), key=lambda k: -exact[k]):
        share = (exact[k] / rest).limit_denominator(1 << 20)
        old = (2 * share.numerator * left + share.denominator) // (2 * share.denominator)
        assert (found[k] == old).all()
        left, rest = left - old, rest - exact[k]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Tokens that occur in no other corpus, in another dtype."""
    prefix = tmp_path_factory.mktemp("other") / "numbers"
    with CorpusWriter(prefix, np.dtype(np.int32)) as writer:
        writer.append_documents(np.arange(70_000, 71_000), [400, 600])
        writer.finish()
    return IndexedReader(prefix)


@pytest.mark.parametrize("masking", [{}, {"views": 2}, {"views": 2, "views_mode": "batch"}])
def test_a_blend_reads_each_corpus_in_its_own_order(corpus, other, masking):
    samplers = [make(corpus, **masking), make(other, **masking)]
    blend, samples = Blend(samplers, [0.7, 0.3]), np.arange(400)
    whole = blend.read(samples)
    second = whole.tokens[:, 1] >= 70_000
    second |= whole.tokens[:, 2] >= 70_000  # the first may be a joining </s>
    assert second.sum() == 120
    for sampler, mine in zip(samplers, (~second, second), strict=True):
        alone = sampler.read(np.arange(mine.sum()))
        assert (whole.tokens[mine] == alone.tokens).all()
        assert (whole.keys[mine] == alone.keys).all() and (whole.views[mine] == alone.views).all()
    some = blend.read(samples[17:23])
    assert (some.tokens == whole.tokens[17:23]).all() and (some.keys == whole.keys[17:23]).all()
    expected = [280 / samplers[0].samples_per_epoch, 120 / samplers[1].samples_per_epoch]
    assert list(blend.epochs(400).values()) == expected
    assert blend.samples_per_epoch == sum(s.samples_per_epoch for s in samplers)


def test_one_corpus_is_a_blend_of_itself(corpus):
    alone, blend = make(corpus).read(np.arange(50)), Blend([make(corpus)], [1.0]).read(np.arange(50))
    assert all((a == b).all() for a, b in zip(alone, blend, strict=True))
    assert blend.tokens.dtype == alone.tokens.dtype


def test_corpora_of_a_blend_have_keys_and_an_order_of_their_own(corpus):
    first, second = (Sampler(corpus, MaskingOptions(), LENGTH, 5, BOS, EOS, name) for name in ("one", "two"))
    blend = Blend([first, second], [0.5, 0.5])
    samples = blend.read(np.arange(2 * first.samples_per_epoch))
    assert len(set(samples.keys.tolist())) == len(samples.keys)
    own = [sampler.read(np.arange(first.samples_per_epoch)).tokens for sampler in (first, second)]
    assert (own[0] != own[1]).any()
    old = [
        Sampler(corpus, MaskingOptions(), LENGTH, 5, BOS, EOS, name, rules=rng.Rules(1))
        for name in ("one", "two")
    ]
    assert (old[0].read(np.arange(4)).keys == old[1].read(np.arange(4)).keys).all()


def test_a_segment_goes_on_where_each_corpus_was(corpus, other):
    """A changed blend repeats no window of an epoch and skips none."""
    segments = [Segment(0, 0, ((1.0, "a"),), 18), Segment(1, 40, ((0.5, "a"), (0.5, "b")), 18)]
    segments.append(Segment(2, 80, ((0.25, "b"), (0.75, "a")), 18))
    for masking in ({}, {"views": 2, "views_mode": "batch"}):
        both = {"a": make(corpus, **masking), "b": make(other, **masking)}
        assert used_samples(segments, both) == {"a": 60, "b": 20}
    seen = []
    for i, segment in enumerate(segments):
        names = [name for _, name in segment.blend]
        samplers = [make(corpus if name == "a" else other) for name in names]
        used = used_samples(segments[: i + 1], dict(zip(names, samplers, strict=True)))
        weights = [weight for weight, _ in segment.blend]
        blend = Blend(samplers, weights, segment.first, [used.get(name, 0) for name in names])
        seen.append(blend.read(np.arange(segment.first, segment.first + 40)).tokens)
    tokens = np.concatenate(seen)
    first = tokens[(tokens < 70_000).all(1)]
    assert (first == make(corpus).read(np.arange(90)).tokens).all()
    second = tokens[(tokens >= 70_000).any(1)]
    assert (second == make(other).read(np.arange(30)).tokens).all()


def test_a_changed_blend_needs_a_new_segment():
    old = continue_segments([], 0, [(1.0, "a")], 0, 18)
    assert old == [Segment(0, 0, ((1.0, "a"),), 18)]
    assert continue_segments(old, 0, [(1, "a")], 64, 99) == old
    with pytest.raises(UserError, match="train has other content than at sample 64: .* corpus.segment = 1"):
        continue_segments(old, 0, [(1.0, "b")], 64, 99)
    with pytest.raises(UserError, match="train is another blend than at sample 64"):
        continue_segments(old, 0, [(0.5, "a"), (0.5, "b")], 64, 99)
    with pytest.raises(UserError, match="corpus.segment = 3: the run is in segment 0"):
        continue_segments(old, 3, [(1.0, "b")], 64, 99)
    new = continue_segments(old, 1, [(0.5, "a"), (0.5, "b")], 64, 99)
    assert new == [*old, Segment(1, 64, ((0.5, "a"), (0.5, "b")), 18)]
    assert continue_segments(new, 1, [(0.5, "a"), (0.5, "b")], 128, 99) == new
    with pytest.raises(UserError, match="corpus.segment = 0: the run is in segment 1"):
        continue_segments(new, 0, [(1.0, "a")], 128, 99)
