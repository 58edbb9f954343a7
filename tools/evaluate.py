"""Held-out loss and accuracy of a checkpoint, under the mask that is the same for every method.

Scores in float32, whatever precision the run trained in, on a GPU where there is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config import UserError
from pretrain.evaluate import HeldOut, Score
from pretrain.model import Batch
from tools import console
from tools.run_model import add_checkpoint_argument, load_model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("evaluate", "Score a checkpoint on held-out text", reports=True)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--corpus", metavar="PREFIX", help="encoded corpus (the run's corpus.valid)")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--samples", type=int, metavar="N", help="windows; all if there are fewer (the run's)"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=32, metavar="N", help="windows at a time (%(default)s)"
    )
    args = parser.parse_args(arguments)
    model, options, tokenizer, state = load_model(args.run, args.checkpoint)
    prefix = args.corpus or options.corpus.valid
    if not prefix:
        raise UserError(f"{args.run}: its config has no corpus.valid; name a corpus with --corpus PREFIX")
    samples = options.evaluate.samples if args.samples is None else args.samples
    if samples < 1 or args.micro_batch < 1:
        raise UserError("--samples and --micro-batch: give 1 or more")
    heldout = HeldOut(prefix, tokenizer, options.train.seq_length, samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.counter("evaluate", heldout.samples, "windows") as done:
        score = heldout.score(counted(model.to(device), done), args.micro_batch, device)
    report(score, f"step {state.step}", state.step, prefix, args.json)
    return 0


def counted(model: Callable[..., Tensor], done: Callable[[int], None]) -> Callable[..., Tensor]:
    """The model, telling how many windows it has seen."""

    def call(batch: Batch, score: bool) -> Tensor:
        answer = model(batch, score=score)
        done(len(batch.ids))
        return answer

    return call


def report(score: Score, name: str, step: int, prefix: str, as_json: bool) -> None:
    """Prints the score."""
    document: dict[str, Any] = {
        "loss": score.loss,
        "accuracy": score.accuracy,
        "bits_per_byte": score.bits_per_byte,
        "predicted_tokens": score.predicted_tokens,
        "mask_rate": score.mask_rate,
        "checkpoint": step,
        "corpus": prefix,
    }
    if as_json:
        console.print_json(document)
        return
    bits = "" if score.bits_per_byte is None else f", {score.bits_per_byte:.4f} bits per byte"
    print(
        f"{name}: loss {score.loss:.4f} nats a token{bits}, accuracy {score.accuracy:.2%},"
        f" {score.predicted_tokens:,} tokens of {prefix} predicted ({score.mask_rate:.0%} masked)"
    )


if __name__ == "__main__":
    console.run(main)
