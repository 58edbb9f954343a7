"""What runs have spent: ``python -m tools.ledger check|show|total|energy|reconcile RUN...``.

`check` verifies the chain of hashes, the sums and that each checkpoint's line is there; `show`
lists the events of each run; `total` adds the runs up; `energy` tells joules and, for a region, carbon;
`reconcile` compares with Slurm's accounting.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain import checkpoint, ledger
from pretrain.config import UserError
from tools import console, emissions, reconcile
from tools.reconcile import SACCT

ACTIONS = {
    "check": "verify the chain, the sums and the lines that checkpoints refer to",
    "show": "list the events of each run",
    "total": "add the runs up",
    "energy": "kWh of each attempt and, with --region, carbon; --csv writes CodeCarbon's columns",
    "reconcile": "compare with Slurm's account of the jobs and explain the difference",
}


def main() -> None:
    arguments = _arguments()
    runs = arguments.runs
    report, text = {
        "check": lambda: check(runs),
        "show": lambda: show(runs),
        "total": lambda: total(runs),
        "energy": lambda: emissions.report(runs, arguments.region, arguments.csv),
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
    parser.add_argument(
        "--region", metavar="ISO", help="energy: country (ISO 3166, such as DEU) of the power"
    )
    parser.add_argument("--csv", metavar="FILE", help="energy: write one line for each attempt")
    parser.add_argument(
        "--sacct",
        metavar="FILE",
        help=f"reconcile: saved output of SLURM_TIME_FORMAT=%%s {' '.join(SACCT)} -j ID",
    )
    options = parser.parse_args()
    console.refuse_twice(options.runs)
    for name, action in (("region", "energy"), ("csv", "energy"), ("sacct", "reconcile")):
        if getattr(options, name) is not None and options.action != action:
            raise UserError(f"--{name} belongs to `{action}`; leave it out")
    return options


def check(runs: list[str]) -> tuple[Any, str]:
    """Lines and checkpoints of each run; UserError at the first thing that does not hold."""
    report = []
    for run in runs:
        lines = ledger.check(run)
        heads = ledger.heads(run)
        steps = checkpoint.steps(run)
        for step in steps:
            _check_checkpoint(Path(run), step, heads)
        report.append({"run": run, "lines": lines, "checkpoints": len(steps)})
    text = "\n".join(
        f"{one['run']}: {one['lines']} lines and {one['checkpoints']} checkpoints agree" for one in report
    )
    return report, text


def _check_checkpoint(run: Path, step: int, heads: set[str]) -> None:
    path = run / "checkpoints" / f"step-{step:08d}"
    head = checkpoint.read_state(path).ledger_head
    if head not in heads:
        raise UserError(f"{path}: its ledger line {head[:12]} is missing; restore {run / 'ledger.jsonl'}")


def show(runs: list[str]) -> tuple[Any, str]:
    """Every line of each run as JSON; as text without the heartbeats and logs that something follows."""
    found = {run: ledger.read(run) for run in runs}
    rows = [f"{'time (UTC)':19}  try  {'event':14} {'step':>9} {'dev. hours':>10} {'lost':>7} {'FLOPs':>9}"]
    for run, lines in found.items():
        rows += [run, *map(_row, _telling(lines))]
    return [{"run": run, "lines": lines} for run, lines in found.items()], "\n".join(rows)


def _telling(lines: list[ledger.Line]) -> list[ledger.Line]:
    """Without heartbeats and logs, but for the one that an attempt ends with: there it was killed."""
    followers: list[ledger.Line] = [*lines[1:], {"attempt": None}]
    return [
        line
        for line, after in zip(lines, followers, strict=True)
        if line["event"] not in ("heartbeat", "log") or after["attempt"] != line["attempt"]
    ]


def _row(line: ledger.Line) -> str:
    spent = line["device_seconds"]
    when = datetime.fromtimestamp(line["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{when}  {line['attempt']:3}  {line['event']:14} {line['step']:9} {spent['total'] / 3600:10.3f}"
        f" {spent['lost'] / 3600:7.3f} {line['flops']['total']:9.2e}  {_details(line)}"
    ).rstrip()


_TOLD = ("reason", "lost_steps", "before", "now", "seq_length", "batch_size", "segment")


def _details(line: ledger.Line) -> str:
    words = [f"{name} {line[name]}" for name in _TOLD if name in line]
    if "held_out" in line:
        words.append(f"held-out loss {line['held_out']['loss']:.4f}")
    return ", ".join(words)


def total(runs: list[str]) -> tuple[Any, str]:
    """The sum of the runs, under the promised keys."""
    report = ledger.total(runs)
    spent, flops = report["device_seconds"], report["flops"]
    rows = [("attempts", f"{report['attempts']}")]
    counters = ("steps", "samples", "tokens_seen", "tokens_real", "tokens_predicted")
    rows += [(name, f"{report[name]}") for name in counters]
    rows += [("token-layers", f"{report['token_layers']:.4e}")]
    rows += [(f"FLOPs, {part}", f"{flops[part]:.4e}") for part in flops]
    rows += [("FLOPs, hardware", f"{report['hardware_flops']:.4e}")]
    rows += [("FLOPs, lost", f"{report['lost_flops']:.4e}")]
    rows += [(f"device-hours, {part}", f"{spent[part] / 3600:.4f}") for part in spent]
    rows += [("joules", "not measured" if report["joules"] is None else f"{report['joules']:.4e}")]
    rows += [(f"joules, {part}", f"{joules:.4e}") for part, joules in report["joules_by_part"].items()]
    if spent["total"]:
        rows += [("metered share of hours", f"{report['metered_device_seconds'] / spent['total']:.1%}")]
    rows += [("peak bytes of a rank", f"{report['peak_bytes']}")]
    return report, "\n".join(f"{name:24} {value:>16}" for name, value in rows)


if __name__ == "__main__":
    console.run(main)
