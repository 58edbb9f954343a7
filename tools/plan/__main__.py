"""Before any GPU: what a run will cost, what it needs, and how long it takes: ``python -m tools.plan``.

Parameters, FLOPs and bytes sent are exact; memory is a closed form of what torch and DeepSpeed hold; time
is a model (see tools/plan/layouts.py) that a result file of the device, or a default, brings to scale. torch
is not imported, so that a plan takes less than two seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.account import epochs
from pretrain.account.devices import DEVICES, Device
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.terminal import wrapped
from tools.plan import layouts
from tools.plan import pages as plan_pages
from tools.plan.estimate import Tariff, methods, plan, scaling
from tools.plan.schema import RunPlan, ScaledPlan
from tools.shared import console, outputs

# ---- the program ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser(
        "plan", "Parameters, FLOPs, memory, time and cost of runs before they start", reports=True
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | section.key=value", help="configs, and overrides of them all"
    )
    parser.add_argument(
        "--gpus", type=console.whole(1), metavar="N", help="devices (as many as parallel.tensor)"
    )
    parser.add_argument("--device", metavar="NAME", help="such as H100; without one there are no times")
    parser.add_argument(
        "--fastest", action="store_true", help="the fastest layout that fits, not the config's"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="the fastest layouts from 1 to 4,096 devices, and the plan in that on --gpus (the fewest)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw that scaling as a PNG")
    parser.add_argument(
        "--methods",
        type=console.whole(8, 512),
        metavar="LENGTH",
        help="instead: all methods x rates x sizes at this length",
    )
    parser.add_argument(
        "--price",
        type=console.positive,
        metavar="DOLLARS",
        help=f"of a device-hour (a round figure of rental: {_listed('price')})",
    )
    parser.add_argument(
        "--watts",
        type=console.positive,
        help=f"drawn by a device (its largest board power: {_listed('watts')})",
    )
    parser.add_argument(
        "--achieved",
        type=console.part,
        metavar="SHARE",
        help="of the device's peak that products reach (measured, or 0.4)",
    )
    args = parser.parse_intermixed_args(arguments)
    _refuse_idle_words(args)
    device = None if args.device is None else layouts.named(args.device)
    if args.methods is not None:
        return show_methods(args.methods, device, args.achieved, args.json)
    paths = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    if not paths:
        raise UserError("no CONFIG; give one or more, such as configs/*.yaml")
    if args.plot:
        outputs.check([args.plot], paths)
    configs = [load_config(path, changes) for path in paths]
    plans = [_planned(args, path, config, device) for path, config in zip(paths, configs, strict=True)]
    for path, one in zip(paths, plans, strict=True):
        if text := epochs.warning(one.epochs):
            print(wrapped(f"warning: {path}: {text}", sys.stderr), file=sys.stderr)
    if args.plot:
        from tools.plan import plot as plan_plot  # matplotlib takes a second

        plan_plot.write(args.plot, [one for one in plans if isinstance(one, ScaledPlan)])
    if args.json:
        console.print_json(plans)
        return 0
    print(plan_pages.text(plans))
    for one in plans:
        if isinstance(one, ScaledPlan):
            print(f"\n{plan_pages.scaling_text(one)}")
    return 0


def _listed(name: str) -> str:
    """A figure of every device of the table that has it."""
    return ", ".join(f"{device.name} {figure:g}" for device in DEVICES if (figure := getattr(device, name)))


def _refuse_idle_words(args: argparse.Namespace) -> None:
    """UserError if a word would change nothing."""
    timed = [name for name in TIMED if getattr(args, name) not in (None, False)]
    if args.methods is not None:
        ours = [name for name in timed if name != "achieved"] + ["gpus"] * (args.gpus is not None)
        if others := [*(f"--{name}" for name in ours), *args.words]:
            raise UserError(f"--methods is a table of its own; leave out {', '.join(others)}")
    if args.device is None and timed:
        raise UserError(f"{', '.join(f'--{name}' for name in timed)}: need --device NAME")


TIMED = ("fastest", "scaling", "plot", "price", "watts", "achieved")
"""Options that only a device gives a sense."""


def _planned(args: argparse.Namespace, path: str, config: Config, device: Device | None) -> RunPlan:
    """With its scaling, if that is asked for: then of the fastest layout, for the config's may not fit."""
    tariff = Tariff(args.price, args.watts)
    if not device or not (args.scaling or args.plot):
        return plan(config, args.gpus, device, args.fastest, tariff, path, args.achieved)
    rows = scaling(config, device, tariff, path, args.achieved)
    gpus = args.gpus or rows.scaling[0].gpus
    return ScaledPlan(**vars(plan(config, gpus, device, True, tariff, path, args.achieved)), **vars(rows))


def show_methods(length: int, device: Device | None, achieved: float | None, as_json: bool) -> int:
    rows = methods(length, device, achieved)
    if as_json:
        console.print_json(rows)
    else:
        print(plan_pages.methods_text(rows, device.name if device else None))
    return 0


if __name__ == "__main__":
    console.run(main)
