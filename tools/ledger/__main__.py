"""What runs have spent: ``python -m tools.ledger check|show|total|energy|reconcile RUN...``.

`check` verifies the chain of hashes, that each checkpoint's line and the run's last one are there, the sums,
and that every count is that of so many updates of the run's config; `show`
lists the events of each run; `total` adds the runs up; `energy` tells joules and, for a region, carbon;
`reconcile` compares with Slurm's accounting.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.account import ledger
from pretrain.account.flops import StepCost
from pretrain.account.ledger import LedgerLine, Statement
from pretrain.account.recipe import make_recipe
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from pretrain.terminal import wrapped
from tools.ledger import emissions, reconcile
from tools.ledger.reconcile import SACCT
from tools.ledger.tree import tree
from tools.shared import console

ACTIONS = {
    "check": "verify the chain to its end, the sums, and the counts against the config; with --head, that a"
    " report's or model card's line is in it",
    "show": "list the events of each run",
    "total": "add the runs up",
    "energy": "kWh of each attempt and, with --carbon, CO2; --csv writes CodeCarbon's columns",
    "reconcile": "compare with Slurm's account of the jobs and explain the difference",
}
SHORT = 16
"""Characters of a hash that a report shows: enough to tell lines apart."""


def main() -> None:
    arguments = _arguments()
    runs = arguments.runs
    carbon = emissions.carbon_factor(*arguments.carbon) if arguments.carbon else None
    report, text = {
        "check": lambda: check(runs, arguments.head),
        "show": lambda: show(runs),
        "total": lambda: total(runs),
        "energy": lambda: emissions.report(runs, carbon, arguments.csv),
        "reconcile": lambda: reconcile.reconcile(runs, arguments.sacct),
    }[arguments.action]()
    if arguments.json:
        console.print_json(report)
    else:
        print(text)


def _arguments() -> argparse.Namespace:
    parser = console.parser("ledger", "What runs have spent, over all their attempts.", reports=True)
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {what}" for name, what in ACTIONS.items()),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--head", metavar="HASH", help="check: of a report or a model card")
    parser.add_argument(
        "--carbon",
        nargs=2,
        metavar=("GRAMS", "SOURCE"),
        help="energy: CO2 equivalent of a kWh of the power, and who says so",
    )
    parser.add_argument("--csv", metavar="FILE", help="energy: write one line for each attempt")
    parser.add_argument(
        "--sacct",
        metavar="FILE",
        help=f"reconcile: saved output of SLURM_TIME_FORMAT=%%s {' '.join(SACCT)} -j ID",
    )
    args = parser.parse_args()
    console.refuse_twice(args.runs)
    for name, action in (("head", "check"), ("carbon", "energy"), ("csv", "energy"), ("sacct", "reconcile")):
        if getattr(args, name) is not None and args.action != action:
            raise UserError(f"--{name} belongs to `{action}`; leave it out")
    if args.head is not None and (len(args.runs) > 1 or len(args.head) < SHORT):
        raise UserError(f"--head {args.head}: takes {SHORT} letters or more of a hash, and a single RUN")
    return args


def check(runs: list[str], said: str | None = None) -> tuple[Any, str]:
    """Return the lines and checkpoints of each run; UserError at the first thing that does not hold.

    said: hash of a line, or its first characters, that must be in the ledger.
    """
    report = [_checked(Path(run)) for run in runs]
    if said and not any(head.startswith(said) for head in ledger.chain(runs[0])):
        raise UserError(f"{runs[0]}: no line {said} in its ledger, which was another when that was written")
    return report, wrapped("\n".join(map(_verdict, report)), indent=4)


@dataclass(frozen=True)
class CheckedLedger:
    """A ledger that holds."""

    run: str
    lines: int
    checkpoints: int
    held: int
    """Lines that something else of the run refers to, or that come before one."""
    gaps: list[str]
    head: str
    """Hash of the newest line; "" without one."""


def _checked(run: Path) -> CheckedLedger:
    ledger.check(run)
    lines = ledger.chain(run)
    check_counts(run, lines)
    saves = [run / "checkpoints" / f"step-{step:08d}" for step in checkpoint.steps(run)]
    kept = [run / "weights" / name for name in checkpoint.named_weights(run)]
    states = {path: checkpoint.verified_state(path) for path in [*saves, *kept]}
    heads = {path: (state.ledger_head, state.account) for path, state in states.items()}
    if last := RunFolder(run).status().get("ledger_head"):
        heads[run / "status.json"] = last, None
    for path, (head, account) in heads.items():
        if wrong := ledger.missing(lines, head, account):
            raise UserError(
                f"{path}: its ledger line {head[:12]} is missing: {run / 'ledger.jsonl'} {wrong}; restore"
                " that, or start the run again, which notes the gap"
            )
    order = list(lines)
    held = max((order.index(head) + 1 for head, _ in heads.values() if head in lines), default=0)
    return CheckedLedger(
        run=str(run),
        lines=len(lines),
        checkpoints=len(saves),
        held=held,
        gaps=ledger.gaps(lines.values()),
        head=next(reversed(order), ""),
    )


def _verdict(one: CheckedLedger) -> str:
    """In words; what follows the last line that something else refers to can be cut off unnoticed."""
    checkpoints = f"{one.checkpoints} checkpoint{'s' * (one.checkpoints != 1)}"
    text = f"{one.run}: {one.lines} lines and {checkpoints} agree"
    loose = one.lines - one.held
    if loose:
        text += f", but nothing holds the last {loose} lines: they could have been more"
    return "\n".join([f"{text}; head {one.head or 'none'}", *one.gaps])


def check_counts(run: Path, lines: dict[str, LedgerLine]) -> None:
    """Raise UserError at the first line whose counts are not those of its updates, by the closed form."""
    path = run / "config.yaml"
    if not path.exists():
        return
    config = load_config(str(path))
    costs = {way: _costs(config, way) for way in ("none", "block")}
    # A program that did not say whether it recomputed could not change that either.
    before, phase, phases, ways = Statement(), 0, {"": 0}, list(costs)
    known = {"": before, **ledger.with_absent(lines)}
    for number, (head, line) in enumerate(lines.items(), 1):
        told = line.details
        before = ledger.taken_over(before, line.stands_for)
        phases |= dict.fromkeys(line.stands_for, told.get("phase", phase))
        if line.event == "resume":
            before, phase = known[told["head"]] or before, phases[told["head"]]
        if way := told.get("layout", {}).get("recompute"):
            ways = [way]
        wrongs = [_miscounted(before, line, costs[way][phase]) for way in ways]
        if all(wrongs):
            wrong = wrongs[0]
            raise UserError(
                f"{run / 'ledger.jsonl'}:{number}: its {wrong} are not those of"
                f" {line.step - before.step:,} updates of {path}; restore the files"
            )
        before, phase = line, told.get("phase", phase)
        phases[head] = phase


def _costs(config: Config, recompute: str) -> list[StepCost]:
    """Return the cost of an update of each phase, with recomputation or without."""
    train = config.train.model_copy(update={"recompute": recompute})
    return [phase.cost for phase in make_recipe(config.model_copy(update={"train": train})).phases]


def _miscounted(before: Statement, line: Statement, cost: StepCost) -> str | None:
    """The first counter that did not grow by what the updates since `before` cost."""
    updates = line.step - before.step
    for name in ledger.COUNTERS[1:]:
        old, new, each = getattr(before, name), getattr(line, name), getattr(cost, name)
        if name == "flops":
            same = all(old[part] + updates * getattr(each, part) == new[part] for part in old)
        elif isinstance(each, float):  # added up one by one
            same = math.isclose(old + updates * each, new, rel_tol=1e-9)
        else:
            same = old + updates * each == new
        if not same:
            return name
    return None


def show(runs: list[str]) -> tuple[Any, str]:
    """Return every line of each run as JSON; as text without the heartbeats and logs that something
    follows."""
    found = {run: ledger.read(run) for run in runs}
    rows = [f"{'time (UTC)':19}  try  {'event':14} {'step':>9} {'dev. hours':>10} {'lost':>7} {'FLOPs':>9}"]
    shares = {run: _effective(lines) for run, lines in found.items()}
    for run, lines in found.items():
        share = shares[run]
        about = "" if share is None else f": effective training time {share:.1%}"
        rows.append(wrapped(run + about, indent=4))
        rows += [wrapped(_row(line), indent=26) for line in _telling(lines)]
    report = [
        {"run": run, "ettr": shares[run], "lines": [line.to_dict() for line in lines]}
        for run, lines in found.items()
    ]
    return report, "\n".join(rows)


def _effective(lines: list[LedgerLine]) -> float | None:
    return ledger.effective_share(ledger.as_totals(lines[-1])) if lines else None


def _telling(lines: list[LedgerLine]) -> list[LedgerLine]:
    """Without heartbeats and logs, but for the one that an attempt ends with: there it was killed."""
    last = {line.attempt: number for number, line in enumerate(lines)}
    return [
        line
        for number, line in enumerate(lines)
        if line.event not in ("heartbeat", "log") or last[line.attempt] == number
    ]


def _row(line: LedgerLine) -> str:
    spent = line.device_seconds
    when = datetime.fromtimestamp(line.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{when}  {line.attempt:3}  {line.event:14} {line.step:9} {spent['total'] / 3600:10.3f}"
        f" {spent['lost'] / 3600:7.3f} {line.flops['total']:9.2e}  {_details(line)}"
    ).rstrip()


_TOLD = ("reason", "found", "of", "lost_steps", "before", "now", "seq_length", "batch_size", "segment")


def _details(line: LedgerLine) -> str:
    told = line.details
    words = [f"{name} {told[name]}" for name in _TOLD if name in told]
    words += [f"{share:.2f} epochs of {prefix}" for prefix, share in told.get("epochs", {}).items()]
    if "held_out" in told:
        words.append(f"held-out loss {told['held_out']['loss']:.4f}")
    return ", ".join(words)


def total(runs: list[str]) -> tuple[Any, str]:
    """Return the sum of the runs, under the promised keys; what branches have from a trunk is counted
    once."""
    report = ledger.total(runs)
    spent, flops = report.device_seconds, report.flops
    rows = [("attempts", f"{report.attempts}")]
    counters = ("steps", "samples", "tokens_seen", "tokens_real", "tokens_predicted")
    rows += [(name, f"{getattr(report, name)}") for name in counters]
    rows += [("token-layers", f"{report.token_layers:.4e}")]
    parts = sorted(flops, key=lambda part: part == "total")  # the sum below its parts
    rows += [(f"FLOPs, {part}", f"{flops[part]:.4e}") for part in parts]
    rows += [("FLOPs, hardware", f"{report.hardware_flops:.4e}")]
    rows += [("FLOPs, lost", f"{report.lost_flops:.4e}")]
    rows += [(f"device-hours, {part}", f"{spent[part] / 3600:.4f}") for part in spent]
    share = ledger.effective_share(report)
    rows += [("effective training time", "-" if share is None else f"{share:.1%}")]
    rows += [("joules", "not measured" if report.joules is None else f"{report.joules:.4e}")]
    rows += [(f"joules, {part}", f"{joules:.4e}") for part, joules in report.joules_by_part.items()]
    if spent["total"]:
        rows += [("metered share of hours", f"{report.metered_device_seconds / spent['total']:.1%}")]
    rows += [("peak bytes of a rank", f"{report.peak_bytes}")]
    return {**asdict(report), "ettr": share}, "\n".join(
        [*tree({run: run for run in runs}), *(f"{name:24} {value:>16}" for name, value in rows)]
    )


if __name__ == "__main__":
    console.run(main)
