"""Held-out loss and accuracy of a checkpoint, under the mask that is the same for every method.

Scores in float32, whatever precision the run trained in, on a GPU where there is one. Where the corpus
knows several sources of text, each has its own loss: a mean hides what a mixture does to its parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.data.manifest import load_manifest, read_sources
from pretrain.evaluate import HeldOut, HeldOutScore
from pretrain.model.late_mask import Batch, LateMaskModel
from pretrain.terminal import wrapped
from tools.shared import console
from tools.shared.run_model import default_device, held_out_corpus, load_model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("evaluate", "Score a checkpoint on held-out text", reports=True)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--corpus", metavar="PREFIX", help="encoded corpus (the run's corpus.valid)")
    console.add_checkpoint(parser)
    parser.add_argument(
        "--samples", type=console.whole(1), metavar="N", help="windows; all if there are fewer (the run's)"
    )
    parser.add_argument(
        "--micro-batch",
        type=console.whole(1),
        default=32,
        metavar="N",
        help="windows at a time (%(default)s)",
    )
    args = parser.parse_args(arguments)
    model, config, tokenizer, state = load_model(args.run, args.checkpoint)
    prefix = held_out_corpus(args.run, config, args.corpus)
    heldout = HeldOut.of(config, tokenizer, prefix, args.samples)
    device = default_device()
    by_source = BySource(model.to(device), heldout, prefix)
    with console.counter("evaluate", heldout.samples, "windows") as done:
        score = heldout.score(counted(by_source, done), args.micro_batch, device)
    report(score, by_source.result(), f"step {state.step}", state.step, prefix, args.json)
    return 0


class BySource:
    """Scores as `model(batch, score=True)` does, and keeps the sums of each source of text.

    To be called with the windows of `heldout` in their order.
    """

    def __init__(self, model: LateMaskModel, heldout: HeldOut, prefix: str) -> None:
        self.model, self.sampler = model, heldout.sampler
        self.names, self._codes = read_sources(prefix)
        self._tallies = load_manifest(prefix).sources
        self._sums = np.zeros((len(self.names) + 1, 3))  # the last is of no source
        self._windows = 0

    def __call__(self, batch: Batch, score: bool) -> Tensor:
        """[sum of losses, rows right] over the rows of all sources."""
        hidden_ND = self.model.head(self.model.predicted_rows(batch)).flatten(0, 1)
        targets_N, sources_N = batch.targets.flatten(), self._sources_of(batch)
        total = torch.zeros(2, dtype=torch.float64, device=hidden_ND.device)
        for source in np.unique(sources_N).tolist():
            rows = torch.from_numpy(np.flatnonzero(sources_N == source)).to(hidden_ND.device)
            sums = self.model.cross_entropy(
                hidden_ND[rows], self.model.tok.weight, self.model.head.bias, targets_N[rows]
            )
            answer = torch.stack(sums).double()
            self._sums[source] += [*answer.tolist(), len(rows)]
            total += answer
        return total

    def _sources_of(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Source of each predicted row [B * P]."""
        count, P = batch.targets.shape
        documents_BL = self.sampler.documents(np.arange(self._windows, self._windows + count))
        self._windows += count
        places_BP = batch.positions[:, -P:].cpu().numpy()
        documents_N = np.take_along_axis(documents_BL, places_BP, 1).ravel()
        codes_N = np.minimum(self._codes[documents_N].astype(np.int64), len(self.names))
        return np.where(documents_N < 0, len(self.names), codes_N)

    def result(self) -> dict[str, dict[str, Any]]:
        """Return by source loss, accuracy, predicted tokens, bits per byte; empty where only one is known."""
        if len(self.names) < 2:
            return {}
        found = {}
        for name, (loss, right, tokens) in zip([*self.names, "unknown"], self._sums.tolist(), strict=True):
            if tokens:
                tally = self._tallies.get(name)
                per_byte = (
                    tally.tokens / tally.text_bytes / math.log(2) if tally and tally.text_bytes else None
                )
                found[name] = {
                    "loss": loss / tokens,
                    "accuracy": right / tokens,
                    "bits_per_byte": None if per_byte is None else loss / tokens * per_byte,
                    "predicted_tokens": int(tokens),
                }
        return found


def counted(model: Callable[..., Tensor], done: Callable[[int], None]) -> Callable[..., Tensor]:
    """Return the model, telling how many windows it has seen."""

    def call(batch: Batch, score: bool) -> Tensor:
        answer = model(batch, score=score)
        done(len(batch.ids))
        return answer

    return call


def report(
    score: HeldOutScore, sources: dict[str, dict[str, Any]], name: str, step: int, prefix: str, as_json: bool
) -> None:
    """Prints the score, and that of each source."""
    document: dict[str, Any] = {
        "loss": score.loss,
        "accuracy": score.accuracy,
        "bits_per_byte": score.bits_per_byte,
        "predicted_tokens": score.predicted_tokens,
        "mask_rate": score.mask_rate,
        "checkpoint": step,
        "corpus": prefix,
        "sources": sources,
    }
    if as_json:
        console.print_json(document)
        return
    bits = _bits(score.bits_per_byte)
    lines = [
        f"{name}: loss {score.loss:.4f} nats a token{bits}, accuracy {score.accuracy:.2%},"
        f" {score.predicted_tokens:,} tokens of {prefix} predicted ({score.mask_rate:.0%} masked)"
    ]
    lines += [
        f"  {source}: loss {each['loss']:.4f}{_bits(each['bits_per_byte'])},"
        f" accuracy {each['accuracy']:.2%}, {each['predicted_tokens']:,} tokens"
        for source, each in sources.items()
    ]
    print(wrapped("\n".join(lines), indent=4))


def _bits(bits: float | None) -> str:
    return "" if bits is None else f", {bits:.4f} bits per byte"


if __name__ == "__main__":
    console.run(main)
