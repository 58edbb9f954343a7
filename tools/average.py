"""The mean of several checkpoints' weights: ``python -m tools.average RUN --last N | --checkpoints ...``.

Averages of the last weights of a run stand in for a decay of the learning rate, or add to one (Izmailov
et al. 2018, arXiv 1803.05407; Kaddour 2022, arXiv 2209.14981). What is written are weights alone, in
RUN/weights, which `--checkpoint average` of the other programs takes.
"""

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
        state = checkpoint.read_state(run / "weights" / args.name)
        if not (args.overwrite and state.averaged):
            advice = "add --overwrite, or take another --name" if state.averaged else "take another --name"
            raise UserError(f"{run / 'weights' / args.name}: there already; {advice}")
    names = args.checkpoints or _newest(run, args.last)
    path = average(run, names, args.weights or 1.0, args.name)
    print(f"{path}: mean of {', '.join(names)}; take it as --checkpoint {args.name}")
    return 0


def _name(text: str) -> str:
    """Return a name that is no path, no step and no milestone."""
    taken = text in ("latest", "best") or text.isdecimal() or text.startswith(checkpoint.MILESTONE)
    if taken or not text.replace("-", "").replace("_", "").isalnum():
        raise ValueError(text)
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


def average(run: Path, names: Sequence[str], decay: float, name: str) -> Path:
    """Write the mean of checkpoints, oldest first, each verified, and return its folder.

    decay: weight of a checkpoint over that of the next. Sums are in float64, one checkpoint at a time.
    """
    folder, found = RunFolder(run), []
    sums: dict[str, Tensor] = {}
    total = 0.0
    with console.counter("average", len(names), "checkpoints") as done:
        for index, which in enumerate(names):
            path, stamps = checkpoint.find_verified(run, which)
            found.append(checkpoint.read_state(path, stamps))
            weight = decay ** (len(names) - 1 - index)
            total += weight
            for key, tensor in checkpoint.read_tensors(path, stamps=stamps).items():
                if key in sums:
                    sums[key] += weight * tensor.double()
                else:
                    sums[key] = weight * tensor.double()
            done(1)
    newest = max(found, key=lambda state: state.step)
    state = replace(newest, averaged=list(names), loss=None)
    means = {key: (value / total).float() for key, value in sums.items()}
    return checkpoint.save_weights(folder, state, name, means)


if __name__ == "__main__":
    console.run(main)
