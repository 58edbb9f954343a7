"""The held-out score: the same questions for everybody, and the right answers to them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import Origin, Tally, load_manifest
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.writer import CorpusWriter
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.model import late_mask as model
from pretrain.model.late_mask import Batch
from tests.support.methods import small
from tools import evaluate

LENGTH = 24


@pytest.fixture(scope="module")
def corpus(tiny):
    return SimpleNamespace(
        train=tiny / "train", valid=tiny / "valid", tokenizer=load_tokenizer(tiny / "tokenizer")
    )


@pytest.fixture(scope="module")
def heldout(corpus):
    return HeldOut(corpus.valid, corpus.tokenizer, LENGTH, 50)


def build(corpus, method="mlm"):
    built = model.LateMaskModel(
        small(method).model, corpus.tokenizer.vocab_size, corpus.tokenizer.mask
    ).eval()
    model.init_weights(built, 0)
    return built


def test_fifteen_per_cent_all_masks_of_distinct_windows(corpus, heldout):
    masked = heldout.questions(0, 50)
    assert masked.num_masked == masked.targets.shape[1] == 3  # round(0.15 x 22)
    assert (masked.ids[:, -3:] == corpus.tokenizer.mask).all()
    assert heldout.predicted_tokens == 150
    assert not np.isin(masked.targets, [0, 1, 2, 3, corpus.tokenizer.mask]).any()


def test_questions_depend_on_nothing_but_the_corpus(corpus, heldout):
    other = HeldOut(corpus.valid, corpus.tokenizer, LENGTH, 20)
    assert (other.questions(0, 20).ids == heldout.questions(0, 20).ids).all()


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("method", ["mlm", "3ml-query"])
def test_score_equals_plain_cross_entropy(corpus, method, bounded):
    heldout = HeldOut(corpus.valid, corpus.tokenizer, LENGTH, 50, bounded)
    built = build(corpus, method)
    masked = heldout.questions(0, 50)
    with torch.no_grad():
        batch = Batch.from_masked(masked, torch.device("cpu"))
        hidden = built.head(built.predicted_rows(batch))
        words = corpus.tokenizer.vocab_size
        logits = (hidden @ built.tok.weight.T + built.head.bias)[..., :words].flatten(0, 1)
    targets = batch.targets.flatten()
    score = heldout.score(built, 7, torch.device("cpu"))
    assert score.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert score.accuracy == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    manifest = load_manifest(corpus.valid)
    bits = score.loss / math.log(2) * manifest.tokens / manifest.text_bytes
    assert score.bits_per_byte == pytest.approx(bits)


@pytest.mark.parametrize(("ranks", "micro"), [(2, 7), (3, 16), (4, 50)])
def test_any_number_of_ranks_gives_the_same_score(corpus, heldout, ranks, micro):
    """Every rank makes as many calls as the others, and the sums add up to one rank's."""
    built, calls, sums = build(corpus), [], []

    def record(total):
        sums.append(total.clone())
        return total

    for rank in range(ranks):
        seen = []

        def counted(batch, score, seen=seen):
            seen.append(len(batch.ids))
            return built(batch, score)

        heldout.score(counted, micro, torch.device("cpu"), rank, ranks, record)
        calls.append(len(seen))
    assert len(set(calls)) == 1
    alone = heldout.score(built, 50, torch.device("cpu"))
    loss, right = (sum(sums) / heldout.predicted_tokens).tolist()
    assert loss == pytest.approx(alone.loss, rel=1e-6) and right == pytest.approx(alone.accuracy)


def test_unigram_is_the_frequency_of_the_training_corpus(corpus, heldout):
    words = corpus.tokenizer.vocab_size
    counts = np.bincount(IndexedReader(corpus.train).tokens, minlength=words) + 1.0
    targets = heldout.questions(0, 50).targets
    expected = -np.log(counts[targets] / counts.sum()).mean()
    score = heldout.unigram(corpus.train, words)
    assert score.loss == pytest.approx(expected)
    assert score.accuracy == pytest.approx((targets == counts.argmax()).mean())


def test_another_tokenizers_corpus_is_refused(corpus):
    class Other:
        hash = "other"

    with pytest.raises(UserError, match="another tokenizer"):
        HeldOut(corpus.valid, Other(), LENGTH, 5)


def test_each_source_has_its_own_loss(corpus, tmp_path):
    """Two sources with no token in common, so that a target tells its source."""
    draw, prefix = np.random.default_rng(0), str(tmp_path / "c")
    lengths = draw.integers(5, 90, 60)
    second = draw.random(60) < 0.4
    tokens = [
        draw.integers(100 * code + 10, 100 * code + 90, n) for code, n in zip(second, lengths, strict=True)
    ]
    with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
        codes = np.array([writer.source("low"), writer.source("high")])[second.astype(int)]
        writer.append_documents(np.concatenate(tokens), lengths, sources=codes)
        sizes = {name: int(lengths[second == code].sum()) for code, name in enumerate(("low", "high"))}
        writer.finish(
            Origin(
                text_bytes=3 * sizes["low"] + 5 * sizes["high"],
                sources={
                    name: Tally(documents=1, tokens=sizes[name], text_bytes=factor * sizes[name])
                    for name, factor in (("low", 3), ("high", 5))
                },
            )
        )
    heldout, built = HeldOut(prefix, corpus.tokenizer, LENGTH, 90), build(corpus)
    by_source = evaluate.BySource(built, heldout, prefix)
    score = heldout.score(by_source, 7, torch.device("cpu"))
    assert score.loss == pytest.approx(heldout.score(built, 90, torch.device("cpu")).loss, rel=1e-6)
    masked = heldout.questions(0, 90)
    batch = Batch.from_masked(masked, torch.device("cpu"))
    with torch.no_grad():
        hidden = built.head(built.predicted_rows(batch)).flatten(0, 1)
        logits = (hidden @ built.tok.weight.T + built.head.bias)[:, : corpus.tokenizer.vocab_size]
    targets = batch.targets.flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    found = by_source.result()
    assert list(found) == ["low", "high"]
    for name, mine, factor in (("low", targets < 100, 3), ("high", targets >= 100, 5)):
        mean = losses[mine].mean().item()
        assert found[name]["predicted_tokens"] == int(mine.sum())
        assert found[name]["loss"] == pytest.approx(mean, rel=1e-5)
        assert found[name]["bits_per_byte"] == pytest.approx(mean / math.log(2) / factor, rel=1e-5)
