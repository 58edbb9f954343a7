"""The closed-form order against a stream built the obvious way."""

import numpy as np
import pytest

from pretrain import config, rng
from pretrain.config import UserError
from pretrain.corpus import CorpusWriter, IndexedReader
from pretrain.sampler import Sampler, share_of_rank

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
    return Sampler(corpus, config.Masking(**masking), LENGTH, seed, BOS, EOS)


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
        Sampler(corpus, config.Masking(), 10000, 0, BOS, EOS)
