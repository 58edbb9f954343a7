"""Held-out loss under one fixed mask, the same for every method and every training rate.

15 % of the tokens of fixed windows of the held-out corpus, chosen uniformly, all of them [MASK] (no
random or kept tokens). A late method is scored as it is trained: the masks join in its decoder. The mask
does not depend on the seeds of the run, so two runs on one corpus answer the same questions. A run trained
with attention within documents is scored with it too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.config import Config, MaskingOptions
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest, refuse_appended_end
from pretrain.data.masking import Masked, masker
from pretrain.data.rng import Rules
from pretrain.data.sampler import Sampler
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch

MASK_RATE = 0.15
_FIXED = MaskingOptions(rate=MASK_RATE, corruption=(1.0, 0.0, 0.0))
_SEED = 0
_RULES = Rules(1)
"""The first: the questions stay those that earlier runs answered."""


@dataclass(frozen=True)
class HeldOutScore:
    """How well masked tokens are predicted."""

    loss: float
    """Mean negative log-likelihood in nats per predicted token."""
    accuracy: float
    """Share of predicted tokens whose piece has the largest logit."""
    predicted_tokens: int
    bits_per_byte: float | None
    """Loss in bits per UTF-8 byte of the corpus, comparable across tokenizers."""
    mask_rate: float = MASK_RATE


class HeldOut:
    """The fixed questions of one held-out corpus.

    length: L of the windows; samples: how many (fewer if the corpus has fewer, once each). bounded: attention
    stays within documents, as in a run that is trained so.
    """

    def __init__(
        self, prefix: str, tokenizer: Tokenizer, length: int, samples: int, bounded: bool = False
    ) -> None:
        corpus = IndexedReader(prefix)
        manifest = load_manifest(prefix)
        if manifest.tokenizer and manifest.tokenizer.hash != tokenizer.hash:
            raise UserError(
                f"{prefix}: encoded with another tokenizer than the run's; encode it again with the run's"
            )
        refuse_appended_end(prefix, manifest)
        self.sampler = Sampler(corpus, _FIXED, length, _SEED, tokenizer.bos, tokenizer.eos, rules=_RULES)
        self.masker = masker(_FIXED, length, tokenizer, bounded, _RULES)
        self.samples = min(samples, self.sampler.samples_per_epoch)
        self.predicted_tokens = self.samples * self.masker.counts.predicted
        self.fingerprint = manifest.fingerprint
        """Of the corpus."""
        self.tokens_per_byte = manifest.tokens / manifest.text_bytes if manifest.text_bytes else None

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer, prefix: str, samples: int | None = None) -> "HeldOut":
        """Return the questions that a run of this config is asked of a corpus. samples: else the config's."""
        length = config.evaluate.seq_length or config.train.seq_length
        bounded = config.corpus.documents == "bounded"
        return cls(prefix, tokenizer, length, samples or config.evaluate.samples, bounded)

    def questions(self, first: int, count: int) -> Masked:
        """Return the masked windows `first` to `first + count - 1`."""
        s = self.sampler.read(np.arange(first, min(first + count, self.samples)))
        return self.masker(s.tokens, s.keys, s.views)

    def score(
        self,
        model: Callable[..., Tensor],
        micro_batch: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        add_up: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> HeldOutScore:
        """Score `model(batch, score=True)`, data-parallel rank `rank` of `ranks` doing its share.

        add_up sums a float64 tensor over those ranks. Every rank calls the model equally often, as
        partitioned parameters need it.
        """
        total = torch.zeros(2, dtype=torch.float64, device=device)
        starts = range(0, self.samples, micro_batch)
        with torch.no_grad():
            for turn in range(math.ceil(len(starts) / ranks)):
                mine = turn * ranks + rank
                masked = self.questions(starts[min(mine, len(starts) - 1)], micro_batch)
                answer = model(Batch.from_masked(masked, device), score=True)
                if mine < len(starts):
                    total += answer
        loss, right = (add_up(total) / self.predicted_tokens).tolist()
        return self._result(loss, right)

    def unigram(self, train_prefix: str, vocab_size: int) -> HeldOutScore:
        """Return the score of guessing by frequency in the training corpus (add-one smoothing): no
        context."""
        frequency = np.ones(vocab_size)
        tokens = IndexedReader(train_prefix).tokens
        for start in range(0, len(tokens), 1 << 22):
            frequency += np.bincount(tokens[start : start + (1 << 22)], minlength=vocab_size)[:vocab_size]
        targets = self.questions(0, self.samples).targets
        loss = -np.log(frequency / frequency.sum())[targets].mean()
        return self._result(float(loss), float((targets == frequency.argmax()).mean()))

    def _result(self, loss: float, accuracy: float) -> HeldOutScore:
        bits = loss / math.log(2) * self.tokens_per_byte if self.tokens_per_byte else None
        return HeldOutScore(loss, accuracy, self.predicted_tokens, bits)
