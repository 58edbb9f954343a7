"""What runs have spent: ``python -m tools.ledger check|show|total RUN...``.

`check` verifies the chain of hashes, the sums and that each checkpoint's line is there; `show`
lists the events of each run; `total` adds the runs up.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain import checkpoint, ledger
from pretrain.config import UserError
from tools import console

ACTIONS = {
    "check": "verify the chain, the sums and the lines that checkpoints refer to",
    "show": "list the events of each run",
    "total": "add the runs up",
}


def main() -> None:
    arguments = _arguments()
    report, text = {"check": check, "show": show, "total": total}[arguments.action](arguments.runs)
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
    return parser.parse_args()


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
    """Every line of each run as JSON; as text without the heartbeats that something follows."""
    found = {run: ledger.read(run) for run in runs}
    rows = [f"{'time (UTC)':19}  try  {'event':9} {'step':>9} {'dev. hours':>10} {'lost':>7} {'FLOPs':>9}"]
    for run, lines in found.items():
        rows += [run, *map(_row, _telling(lines))]
    return [{"run": run, "lines": lines} for run, lines in found.items()], "\n".join(rows)


def _telling(lines: list[ledger.Line]) -> list[ledger.Line]:
    """Without heartbeats, but for the one that an attempt ends with: there it was killed."""
    followers: list[ledger.Line] = [*lines[1:], {"attempt": None}]
    return [
        line
        for line, after in zip(lines, followers, strict=True)
        if line["event"] != "heartbeat" or after["attempt"] != line["attempt"]
    ]


def _row(line: ledger.Line) -> str:
    spent = line["device_seconds"]
    when = datetime.fromtimestamp(line["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{when}  {line['attempt']:3}  {line['event']:9} {line['step']:9} {spent['total'] / 3600:10.3f}"
        f" {spent['lost'] / 3600:7.3f} {line['flops']['total']:9.2e}  {_details(line)}"
    ).rstrip()


def _details(line: ledger.Line) -> str:
    words = [f"{name} {line[name]}" for name in ("reason", "lost_steps") if name in line]
    if "held_out" in line:
        words.append(f"held-out loss {line['held_out']['loss']:.4f}")
    return ", ".join(words)


def total(runs: list[str]) -> tuple[Any, str]:
    """The sum of the runs, under the promised keys."""
    report = ledger.total(runs)
    spent, flops = report["device_seconds"], report["flops"]
    rows = [("attempts", f"{report['attempts']}")]
    rows += [(name, f"{report[name]}") for name in ("steps", "samples", "tokens_seen", "tokens_predicted")]
    rows += [(f"FLOPs, {part}", f"{flops[part]:.4e}") for part in flops]
    rows += [("FLOPs, hardware", f"{report['hardware_flops']:.4e}")]
    rows += [("FLOPs, lost", f"{report['lost_flops']:.4e}")]
    rows += [(f"device-hours, {part}", f"{spent[part] / 3600:.4f}") for part in spent]
    rows += [("joules", "not measured" if report["joules"] is None else f"{report['joules']:.4e}")]
    return report, "\n".join(f"{name:24} {value:>16}" for name, value in rows)


if __name__ == "__main__":
    console.run(main)
