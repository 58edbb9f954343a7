"""Variance of the gradient over masks and over texts, at a fixed checkpoint.

Fully-explored masking (arXiv 2010.06040) rests on this: the gradients of two masks of one text covary
the less, the farther the masks are apart (Hamming distance), so K disjoint masks of a text give a mean
of lower variance than K independent ones. Both are measured here, on whole gradients (all parameters).

With g(x, m) the gradient of text x under mask(s) m, all figures are unbiased and need two draws m, m' a
text, since E <g(x, m), g(x, m')> = |E_m g(x)|^2 for independent draws:

    over masks  E_x [ |g(x, m) - g(x, m')|^2 / 2 ]              what a better sampler can take away
    over texts  E_x |E_m g(x)|^2 - |E_x E_m g(x)|^2              what no sampler of masks can

Covariance against distance takes masks that are stretches of one random order of a text's tokens, as
views are, and so overlap by exact counts; all their predicted tokens are [MASK]. Texts with a document's
border inside are left out, so that every text has the same number N of tokens.

Letters: N tokens of a text, P predicted, K masks of a text in an update.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.config import MaskingOptions
from pretrain.data import rng
from pretrain.data.indexed import IndexedReader
from pretrain.data.masking import Masker, Tokens, masker
from pretrain.data.sampler import Sampler
from pretrain.errors import UserError
from pretrain.model.late_mask import Batch, LateMaskModel
from tools.shared import console, plots
from tools.shared.run_model import RunModel

OVER_MASKS, OVER_TEXTS, COVARIANCE = "variance over masks", "variance over texts", "covariance"
STEPS = 4
"""Distances at which the covariance is measured, beside 0."""
_SEED = 0
_STRETCH = 1 << 20


def samplers(
    predicted: int, length: int, views: int, corruption: tuple[float, ...]
) -> dict[str, MaskingOptions]:
    """Return the ways to draw K masks of P tokens for one text."""
    same = {"rate": predicted / (length - 2), "corruption": corruption}
    return {
        "independent": MaskingOptions(**same),
        "disjoint": MaskingOptions(**same, views=views),
        "contiguous": MaskingOptions(**same, views=views, views_partition="contiguous"),
        "whole_word": MaskingOptions(**same, scheme="whole_word"),
    }


class Mean:
    """Mean and standard error of numbers that come one by one."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def value(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float:
        n, mean = len(self.values), self.value
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / (n - 1) / n)


@dataclass
class Spread:
    """Variance over masks and over texts from two independent draws a text."""

    over_masks: Mean = field(default_factory=Mean)
    shared: Mean = field(default_factory=Mean)
    """<g, g'> of the two draws: |E_m g|^2."""
    total: Tensor | float = 0.0
    own: float = 0.0
    """Sum of |(g + g') / 2|^2."""

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take in the gradients [G] of one text under two draws."""
        (own, shared), (_, others) = products([one, other]).tolist()
        self.over_masks.add((own + others) / 2 - shared)
        self.shared.add(shared)
        self.total = self.total + (one.double() + other.double()) / 2
        self.own += (own + others + 2 * shared) / 4

    @property
    def over_texts(self) -> float:
        assert isinstance(self.total, Tensor)
        n = len(self.shared.values)
        of_mean = (float(self.total @ self.total) - self.own) / (n * (n - 1))  # |E_x E_m g|^2
        return self.shared.value - of_mean


@dataclass
class Covariances:
    """Covariance of the gradients of two masks by the number of tokens that only one of them has."""

    by_shift: dict[int, Mean] = field(default_factory=dict)
    """Keyed by tokens moved; the Hamming distance is twice that."""

    def add(self, one: list[Tensor], other: list[Tensor], shifts: list[int]) -> None:
        """Take in the gradients of two independent chains of masks of one text; mask j is moved by shifts[j],
        j equal steps."""
        J = len(shifts)
        all_products = products([*one, *other])
        centre = all_products[:J, J:].mean()  # |E_m g|^2
        within = (all_products[:J, :J] + all_products[J:, J:]) / 2
        for step, shift in enumerate(shifts):
            self.by_shift.setdefault(shift, Mean()).add(float(within.diagonal(step).mean() - centre))


def products(vectors: list[Tensor]) -> Tensor:
    """Return the inner products [n, n] of n vectors [G] in float64, in stretches so that no copy is large."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for parts in zip(*(vector.split(_STRETCH) for vector in vectors), strict=True):
        block = torch.stack(parts).double()
        found += block @ block.T
    return found


def shifts_of(predicted: int, tokens: int) -> list[int]:
    """Return STEPS + 1 shifts of a stretch of P among N tokens, as far as it can go without overlap, or at
    all."""
    farthest = min(predicted, tokens - predicted)
    step = max(1, farthest // STEPS)
    return list(range(0, min(STEPS * step, farthest) + 1, step))


def additive_covariance(overlap: float, predicted: int, tokens: int) -> float:
    """Return the covariance of g(m) = (1 / P) sum of a_i over the masked i, in units of S^2 = sum a_i^2 / (N
    - 1).

    The a_i sum to zero. It falls linearly with the Hamming distance 2 (P - overlap).
    """
    return overlap / predicted**2 - 1 / tokens


# ---- gradients of a model ------------------------------------------------------------------------


class Gradients:
    """Gradients of a model's loss on masked texts, as one vector [G]."""

    def __init__(self, model: LateMaskModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def of(self, batch: Batch) -> Tensor:
        loss = self.model(batch)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def of_draw(self, masker: Masker, text: Tokens, number: int, draw: int, views: int) -> Tensor:
        """Return the mean gradient of K masks of a text: K views of one partition, or K independent masks."""
        view = np.arange(views) if masker.masking.views > 1 else np.zeros(views, np.int64)
        part = np.zeros_like(view) if masker.masking.views > 1 else np.arange(views)
        masked = masker(np.tile(text, (views, 1)), rng.key(_SEED, number, draw, part), view)
        return self.of(Batch.from_masked(masked, self.device))

    def of_chain(
        self, mask_id: int, text: Tokens, order: npt.NDArray[np.int64], predicted: int, shifts: list[int]
    ) -> list[Tensor]:
        """Return the gradients under masks that are the stretches of `order` (places of the N tokens) at
        `shifts`."""
        return [self.of(self._stretch(mask_id, text, np.roll(order, -shift), predicted)) for shift in shifts]

    def _stretch(self, mask_id: int, text: Tokens, order: npt.NDArray[np.int64], predicted: int) -> Batch:
        rest = np.setdiff1d(np.arange(len(text)), order[:predicted])
        places = np.concatenate((rest, order[:predicted]))[None]
        ids = text.astype(np.int64)[places]
        targets = ids[:, -predicted:].copy()
        ids[:, -predicted:] = mask_id
        return Batch.of(ids, places, targets, predicted, None, self.device)


def texts_of(loaded: RunModel, corpus: str, count: int) -> Tokens:
    """Return at most `count` windows [T, L] of a corpus in a fixed order, without a special inside."""
    tokenizer, length = loaded.tokenizer, loaded.config.train.seq_length
    sampler = Sampler(IndexedReader(corpus), MaskingOptions(), length, _SEED, tokenizer.bos, tokenizer.eos)
    windows = sampler.read(np.arange(min(sampler.samples_per_epoch, 20 * count))).tokens
    plain = np.isin(windows[:, 1:-1], tokenizer.random_ids).all(1)
    if plain.sum() < 2:
        raise UserError(f"{corpus}: fewer than two windows of {length} within one document; take another")
    return windows[plain][:count]


def measure(
    loaded: RunModel,
    corpus: str,
    count: int,
    rate: float | None,
    views: int | None,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Return the variances of each sampler and covariances by distance, one row of the table each."""
    model, config, tokenizer, _ = loaded
    length, tokens = config.train.seq_length, config.train.seq_length - 2
    views, predicted = _sizes(rate or config.masking.rate, views, tokens)
    texts = texts_of(loaded, corpus, count)
    maskers = {
        name: masker(masking, length, tokenizer)
        for name, masking in samplers(predicted, length, views, config.masking.corruption).items()
    }
    gradients, shifts = Gradients(model, device), shifts_of(predicted, tokens)
    spreads, covariances = {name: Spread() for name in maskers}, Covariances()
    with console.counter(f"variance {config.run.dir}", len(texts), "texts") as done:
        for number, text in enumerate(texts):
            for name, draw in maskers.items():
                pair = (gradients.of_draw(draw, text, number, i, views) for i in range(2))
                spreads[name].add(*pair)
            chains = []
            for i in range(2):
                order = 1 + rng.permute(np.arange(tokens), tokens, (_SEED, number, i))
                chains.append(gradients.of_chain(model.mask_id, text, order, predicted, shifts))
            covariances.add(chains[0], chains[1], shifts)
            done(1)
    return table(spreads, covariances, predicted, views, tokens)


def _sizes(rate: float, views: int | None, tokens: int) -> tuple[int, int]:
    """(K, P): as many masks as the rate leaves room for, and tokens of each."""
    if views is not None and views > tokens:
        raise UserError(f"--views {views}: more than the {tokens} tokens of a text")
    views = views or max(2, round(1 / rate))
    return views, min(max(1, round(rate * tokens)), tokens // views)


def table(
    spreads: dict[str, Spread], covariances: Covariances, predicted: int, views: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield one row for each figure."""
    shape = {"predicted": predicted, "tokens": tokens}
    for name, spread in spreads.items():
        about = {"sampler": name, "masks": views, "distance": None, **shape}
        masks = spread.over_masks
        errors = (masks.standard_error, spread.shared.standard_error)
        for quantity, value, error in zip(
            (OVER_MASKS, OVER_TEXTS), (masks.value, spread.over_texts), errors, strict=True
        ):
            yield {"quantity": quantity, **about, "value": value, "standard_error": error}
    for shift, mean in covariances.by_shift.items():
        about = {"sampler": None, "masks": 1, "distance": 2 * shift, **shape}
        yield {"quantity": COVARIANCE, **about, "value": mean.value, "standard_error": mean.standard_error}


# ---- showing -------------------------------------------------------------------------------------


def figure(rows: list[dict[str, Any]]) -> bytes:
    """Draw, on the left, variance over masks of each sampler, independent masks = 1; on the right covariance
    by distance, in units of that at distance 0, beside what an additive gradient would have."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    with plots.theme("light"):
        drawn, (left, right) = plots.figure(2)
        for i, run in enumerate(runs):
            bars = relative_variances([row for row in rows if row["run"] == run])
            places = [x + 0.8 * (i + 0.5) / len(runs) - 0.4 for x in range(len(bars))]
            heights, errors = zip(*bars.values(), strict=True)
            left.bar(places, heights, 0.8 / len(runs), yerr=errors, color=f"C{i}", label=run)
        left.set_xticks(range(len(bars)), [name.replace("_", " ") for name in bars])
        left.set_ylabel("independent masks = 1; distance 0 = 1")
        left.set_title("variance over the masks of a text")
        lines = [_curve(run, [row for row in rows if row["run"] == run]) for run in runs]
        lines += _additive(rows)
        plots.draw(right, lines, [], "Hamming distance of two masks (share of the largest)", "")
        right.set_title("covariance of their gradients")
        plots.legend(drawn, right)
        return plots.encode(drawn, "png")


def relative_variances(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return by sampler the variance over masks and its standard error, independent masks = 1."""
    over_masks = {row["sampler"]: row for row in rows if row["quantity"] == OVER_MASKS}
    unit = over_masks["independent"]["value"]
    return {name: (row["value"] / unit, row["standard_error"] / unit) for name, row in over_masks.items()}


def _curve(run: str, rows: list[dict[str, Any]]) -> plots.Line:
    found = [row for row in rows if row["quantity"] == COVARIANCE]
    farthest, unit = found[-1]["distance"], found[0]["value"]
    return plots.Line(
        run, [row["distance"] / farthest for row in found], [row["value"] / unit for row in found]
    )


def _additive(rows: list[dict[str, Any]]) -> list[plots.Line]:
    """The straight lines of the additive gradient, one for each P and N that runs were measured with."""
    found = {(row["predicted"], row["tokens"]): row["run"] for row in rows if row["quantity"] == COVARIANCE}
    return [_additive_line(P, N, rows, run, len(found) > 1) for (P, N), run in found.items()]


def _additive_line(P: int, N: int, rows: list[dict[str, Any]], run: str, several: bool) -> plots.Line:
    here = [row for row in rows if row["run"] == run and row["quantity"] == COVARIANCE]
    distances = [row["distance"] for row in here]
    values = [additive_covariance(P - distance / 2, P, N) for distance in distances]
    return plots.Line(
        f"additive, {P} of {N}" if several else "an additive gradient",
        [distance / distances[-1] for distance in distances],
        [value / values[0] for value in values],
    )


def text(rows: list[dict[str, Any]]) -> str:
    """Return for people each sampler's variances over masks and over texts, that of independent masks being
    1."""
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        here = [row for row in rows if row["run"] == run]
        first = here[0]
        lines.append(f"{run}: {first['masks']} masks of {first['predicted']} in {first['tokens']} tokens")
        texts = {row["sampler"]: row["value"] for row in here if row["quantity"] == OVER_TEXTS}
        (unit,) = [
            row["value"] for row in here if row["quantity"] == OVER_MASKS and row["sampler"] == "independent"
        ]
        for name, (value, error) in relative_variances(here).items():
            lines.append(
                f"  {name:12} variance over masks {value:.3g} +- {error:.2g}, over texts"
                f" {texts[name] / unit:.3g}, of that of independent masks over masks"
            )
    return "\n".join(lines)
