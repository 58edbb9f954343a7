"""The mean of several checkpoints' weights: ``python -m tools.average RUN --last N | --checkpoints ...``.

Averages of the last weights of a run stand in for a decay of the learning rate, or add to one (Izmailov
et al. 2018, arXiv 1803.05407; Kaddour 2022, arXiv 2209.14981). What is written are weights alone, in
RUN/weights, which `--checkpoint average` of the other programs takes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from tools.shared import console

if TYPE_CHECKING:
    from torch import Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("average", "Average the weights of a run's checkpoints")
    parser.add_argument("run", metavar="RUN", help="run folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=console.whole(1), metavar="N", help="the newest N checkpoints")
    which.add_argument("--checkpoints", nargs="+", metavar="WHICH", help="steps, or names such as share-0.9")
    parser.add_argument(
        "--weights",
        type=console.share,
        metavar="DECAY",
        help="of each next older one, as a share of that of the newer (all weigh the same)",
    )
    parser.add_argument("--name", type=_name, default="average", help="of the result (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an average of that name")
    args = parser.parse_args(arguments)
    run = Path(args.run)
    if args.name in checkpoint.named_weights(run):
        _refuse(run / "weights" / args.name, args.overwrite)
    names = args.checkpoints or _newest(run, args.last)
    path, shares = average(run, names, args.weights or 1.0, args.name)
    told = ", ".join(f"{name} ({share:.1%})" for name, share in shares.items())
    print(f"{path}: mean of {told}; take it as --checkpoint {args.name}")
    return 0


def _refuse(path: Path, overwrite: bool) -> None:
    """Raise UserError where weights of the name are not to be replaced."""
    try:
        ours = bool(checkpoint.read_state(path).averaged)
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"{path}: there already, and no average; take another --name, or move it away")
    if not overwrite:
        raise UserError(f"{path}: there already; add --overwrite, or take another --name")


def _name(text: str) -> str:
    """Return a name that is no path, no step and no milestone."""
    taken = text in ("latest", "best") or text.isdecimal() or text.startswith(checkpoint.MILESTONE)
    if taken or not text.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text!r}: take letters, digits, - and _, and no checkpoint's name")
    return text


def _newest(run: Path, number: int) -> list[str]:
    """Return the steps of the newest checkpoints; UserError if there are fewer."""
    steps = checkpoint.steps(run)
    if len(steps) < number:
        have = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"{run}: has no {number} checkpoints; its checkpoints are of {have}. checkpoint.keep_last and"
            " checkpoint.keep say how many stay"
        )
    return [str(step) for step in steps[-number:]]


def average(run: Path, names: Sequence[str], decay: float, name: str) -> tuple[Path, dict[str, float]]:
    """Write the mean of checkpoints, each verified; return its folder, and the share of each, oldest first.

    decay: weight of a checkpoint over that of the next newer one. Sums are in float64, one checkpoint at a
    time. UserError where two names are one checkpoint.
    """
    found = [checkpoint.find_verified(run, which) for which in names]
    states = [checkpoint.read_state(path, stamps) for path, stamps in found]
    order = sorted(range(len(names)), key=lambda index: states[index].step)
    paths = [found[index][0] for index in order]
    if len(set(paths)) < len(paths):
        raise UserError(f"{run}: {', '.join(names)}: one checkpoint is named twice; name each once")
    weights = [decay ** (len(order) - 1 - age) for age in range(len(order))]
    sums: dict[str, Tensor] = {}
    with console.counter("average", len(order), "checkpoints") as done:
        for index, weight in zip(order, weights, strict=True):
            path, stamps = found[index]
            for key, tensor in checkpoint.read_tensors(path, stamps=stamps).items():
                part = weight / sum(weights) * tensor.double()
                sums[key] = sums[key] + part if key in sums else part
            done(1)
    shares = {path.name: weight / sum(weights) for path, weight in zip(paths, weights, strict=True)}
    state = replace(states[order[-1]], averaged=shares, loss=None)
    means = {key: value.float() for key, value in sums.items()}
    return checkpoint.save_weights(RunFolder(run), state, name, means), shares


if __name__ == "__main__":
    console.run(main)
