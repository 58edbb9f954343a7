"""Effective rank of the representations of each layer (the measurement of MAE-LM, arXiv 2302.02060).

How many directions hold most of what a layer's representations are made of: the claim is that an
encoder which sees [MASK] gives some of its dimensions to it and has fewer for real tokens. The exact
formula of the paper is not known here, so all of its readings are reported:

    energy_squared   smallest k with s_1^2 + ... + s_k^2 >= 0.9 of the sum    (s: singular values)
    energy_plain     the same of s_1 + ... + s_k
    entropy          exp of the entropy of s / sum(s) (Roy and Vetterli 2007)

each for representations as they are and centred. Singular values come from the D x D Gram matrix, summed
in float64 batch by batch, so memory does not grow with the number of tokens.

A layer's representation is its output; layer 0 is the embeddings (in a decoder, its input), and the last
is taken after the stack's final norm. On masked input 15 % of the tokens are [MASK], the same tokens for
every run. Sequence specials are no tokens of the text and are left out.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.evaluate import HeldOut
from pretrain.model.late_mask import Batch, LateMaskModel
from tools.shared import console, plots
from tools.shared.run_model import RunModel, listen

MEASURES = tuple(
    f"{kind}{centred}"
    for centred in ("", "_centred")
    for kind in ("energy_squared", "energy_plain", "entropy")
)
ENERGY = 0.9
CLEAN, MASKED, MASKS, ALL = "real, clean", "real, masked", "[MASK]", "all, masked"
GROUPS = {
    CLEAN: "real tokens, clean input",
    MASKED: "real tokens, masked input",
    MASKS: "[MASK] rows, masked input",
}
"""The panels of the figure."""
_MICRO_BATCH = 32


class Spectrum:
    """Count, sum and Gram matrix of rows of width D, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows_ND: Tensor) -> None:
        """Takes in some more rows."""
        rows_ND = rows_ND.double()
        self.count += len(rows_ND)
        self.total += rows_ND.sum(0)
        self.gram.addmm_(rows_ND.T, rows_ND)

    def __add__(self, other: "Spectrum") -> "Spectrum":
        both = Spectrum(len(self.total), self.total.device)
        both.count = self.count + other.count
        both.total, both.gram = self.total + other.total, self.gram + other.gram
        return both

    def singular_values(self, centred: bool) -> npt.NDArray[np.float64]:
        """Return those of the matrix of all rows, [D], the largest first."""
        gram = self.gram
        if centred and self.count:
            gram = gram - torch.outer(self.total, self.total) / self.count
        squares: npt.NDArray[np.float64] = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu().numpy()
        return np.sqrt(squares)


def effective_ranks(spectrum: Spectrum) -> dict[str, float]:
    """Return the six MEASURES."""
    found: dict[str, float] = {}
    for end, centred in (("", False), ("_centred", True)):
        s = spectrum.singular_values(centred)
        found[f"energy_squared{end}"] = energy_rank(s**2)
        found[f"energy_plain{end}"] = energy_rank(s)
        found[f"entropy{end}"] = entropy_rank(s)
    return found


def energy_rank(weights: npt.NDArray[np.float64]) -> int:
    """Return how many of the weights, the largest first, make up ENERGY of their sum."""
    reached = np.cumsum(weights) >= ENERGY * weights.sum() * (1 - 1e-12)
    return int(reached.argmax()) + 1


def entropy_rank(weights: npt.NDArray[np.float64]) -> float:
    """Return exp of the entropy of weights / sum."""
    share = weights / weights.sum()
    share = share[share > 0]
    return math.exp(-(share * np.log(share)).sum())


# ---- collecting ----------------------------------------------------------------------------------


class Site(NamedTuple):
    """A place in the model where rows pass."""

    part: str
    """encoder or decoder."""
    layer: int


Spectra = dict[tuple[Site, str], Spectrum]


class Collector:
    """Hooks that add the rows passing each site to the spectra of their groups."""

    def __init__(self, model: LateMaskModel, special: Tensor) -> None:
        """special: bool [W], the pieces that are no text ([MASK] among them)."""
        self.model, self.special = model, special
        self.spectra: Spectra = {}
        self.ids = torch.empty(0)
        self.clean = True
        for part, stack in (("encoder", model), ("decoder", model.decoder)):
            if stack is not None:
                listen(stack, self._from(part))

    def _from(self, part: str) -> Callable[[int, Tensor], None]:
        return lambda layer, rows_BSD: self._see(Site(part, layer), rows_BSD)

    def _see(self, site: Site, rows_BSD: Tensor) -> None:
        # A layer of the encoder has the first rows of a sequence, one of the decoder the last.
        S = rows_BSD.shape[1]
        ids = self.ids[:, :S] if site.part == "encoder" else self.ids[:, self.ids.shape[1] - S :]
        self._add(site, CLEAN if self.clean else MASKED, rows_BSD[~self.special[ids]])
        if not self.clean:
            self._add(site, MASKS, rows_BSD[ids == self.model.mask_id])

    def _add(self, site: Site, group: str, rows_ND: Tensor) -> None:
        if len(rows_ND) and (site, group) not in self.spectra:
            self.spectra[site, group] = Spectrum(rows_ND.shape[1], rows_ND.device)
        if len(rows_ND):
            self.spectra[site, group].add(rows_ND)

    @torch.no_grad()
    def add(self, tokens: Tensor, masked: Batch) -> None:
        """Take in one batch of texts [B, L], without masks and with."""
        self.ids, self.clean = tokens, True
        self.model.encode(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
        self.ids, self.clean = masked.ids, False
        self.model.predicted_rows(masked)


def measure(loaded: RunModel, corpus: str, tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Return the ranks of each layer and group of rows of a model on `device`, one row of the table each."""
    model, config, tokenizer, _ = loaded
    length = config.train.seq_length
    heldout = HeldOut(corpus, tokenizer, length, math.ceil(tokens / (length - 2)))
    special = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    special[torch.from_numpy(tokenizer.random_ids).long()] = False
    collector = Collector(model, special.to(device))
    with console.counter(f"rank {config.run.dir}", heldout.samples, "windows") as done:
        for first in range(0, heldout.samples, _MICRO_BATCH):
            questions = heldout.questions(first, _MICRO_BATCH)
            natural = np.empty_like(questions.ids)
            true = questions.ids.copy()
            true[:, -questions.targets.shape[1] :] = questions.targets
            np.put_along_axis(natural, questions.positions, true, 1)
            collector.add(torch.from_numpy(natural).to(device), Batch.from_masked(questions, device))
            done(len(natural))
    return table(collector.spectra)


def table(spectra: Spectra) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table; the union of real tokens and [MASK] rows comes free, as Gram matrices
    add."""
    sites = sorted({site for site, _ in spectra}, key=lambda site: (site.part == "decoder", site.layer))
    for site in sites:
        parts = [spectra[site, group] for group in (MASKED, MASKS) if (site, group) in spectra]
        everything = {ALL: parts[0] + parts[1]} if len(parts) == 2 else {}
        groups = {group: spectra[site, group] for group in GROUPS if (site, group) in spectra}
        for group, spectrum in (groups | everything).items():
            size = {"rows": group, "count": spectrum.count, "width": len(spectrum.total)}
            yield {**site._asdict(), **size, **effective_ranks(spectrum)}


# ---- showing -------------------------------------------------------------------------------------


def figure(rows: list[dict[str, Any]], measure: str) -> bytes:
    """Return a panel for each group of rows, a line for each run; [MASK] rows are shown through the
    decoder."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    with plots.theme("light"):
        drawn, panels = plots.figure(len(GROUPS))
        for axes, (group, title) in zip(panels, GROUPS.items(), strict=True):
            lines = [_line(run, [row for row in rows if row["run"] == run], group, measure) for run in runs]
            plots.draw(axes, lines, [], "layer", f"effective rank ({measure.replace('_', ' ')})")
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="x", integer=True)
            axes.label_outer()
        plots.legend(drawn, panels[0])
        return plots.encode(drawn, "png")


def _line(run: str, rows: list[dict[str, Any]], group: str, measure: str) -> plots.Line:
    """Decoder layers are numbered on from the encoder's last."""
    top = max(row["layer"] for row in rows if row["part"] == "encoder")
    parts = ("encoder", "decoder") if group == MASKS else ("encoder",)
    here = [row for row in rows if row["rows"] == group and row["part"] in parts]
    return plots.Line(
        run,
        [row["layer"] + (top if row["part"] == "decoder" else 0) for row in here],
        [row[measure] for row in here],
    )


def text(rows: list[dict[str, Any]], measure: str) -> str:
    """Return for people the last encoder layer of each run, and where its rank is lowest."""
    lines = [f"effective rank of the encoder's output ({measure.replace('_', ' ')}):"]
    for run in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == run and row["part"] == "encoder"]
        last = max(row["layer"] for row in of_run)
        found = [f"{row['rows']} {row[measure]:.4g}" for row in of_run if row["layer"] == last]
        width, count = of_run[0]["width"], of_run[0]["count"]
        lines.append(f"  {run}: {'; '.join(found)} of {width} ({count:,} tokens)")
    return "\n".join(lines)
