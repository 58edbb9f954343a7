"""What the lines of runs.jsonl say: a table for each protocol, and an account of what it cost."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.finetune.cells import BASELINES, BEST_ON_DEV, MNLI, RANDOM, FinetuneRun, chosen, current
from tools.shared import tables


@dataclass(frozen=True)
class Entry:
    """An encoder on a split: the runs of the setting that was chosen."""

    protocol: str
    encoder: str
    column: str
    """Split and metric."""
    median: float
    quartiles: tuple[float, float]
    seeds: int
    collapsed: int
    """Of these runs, those that ended worse than an answer that never looks at the text."""
    setting: dict[str, float]
    """Learning rate, batch and epochs; empty for baselines."""
    rows: int
    """That were scored."""


def entries(runs: Sequence[FinetuneRun], all_metrics: bool = False) -> list[Entry]:
    """Return what stands in the tables, encoders in the order of their lines and baselines last.

    all_metrics: not the first one of each split alone.
    """
    groups = defaultdict(list)
    for run in sorted(current(runs), key=lambda run: run.cell.encoder in BASELINES):
        if not run.cell.kept:
            groups[run.cell.protocol, run.cell.encoder, run.cell.start, run.cell.task].append(run)
    found = []
    for (protocol, encoder, start, _), group in groups.items():
        best = chosen(group, BEST_ON_DEV in protocol)
        name = f"{encoder}, random weights" if start == RANDOM else encoder
        for split, metrics in best[0].scores.items():
            for metric in list(metrics)[: None if all_metrics else 1]:
                column = f"{split}{' from MNLI' if start == MNLI else ''}, {metric}"
                scores = [run.scores[split][metric] for run in best]
                found.append(_entry(protocol, name, column, scores, best, split))
    return found


def _entry(
    protocol: str, encoder: str, column: str, scores: Sequence[float], best: Sequence[FinetuneRun], split: str
) -> Entry:
    cell = best[0].cell
    if len(scores) > 1:
        low, middle, high = statistics.quantiles(scores, n=4, method="inclusive")
    else:
        low = middle = high = scores[0]
    setting = {"lr": cell.lr, "batch": cell.batch, "epochs": cell.epochs} if cell.epochs else {}
    collapsed = sum(run.collapsed for run in best)
    return Entry(
        protocol, encoder, column, middle, (low, high), len(best), collapsed, setting, best[0].n[split]
    )


def account(runs: Sequence[FinetuneRun]) -> dict[str, Any]:
    """Return what all runs cost, also those that are in no table."""
    total: dict[str, Any] = {"runs": len(runs), "collapsed": sum(run.collapsed for run in runs)}
    for name in ("flops", "device_seconds"):
        parts = ("training", "evaluation")
        total[name] = {part: sum(getattr(run, name).get(part, 0) for run in runs) for part in parts}
    return total | {"devices": sorted({run.device for run in runs if run.device})}


def grids(runs: Sequence[FinetuneRun]) -> dict[str, list[list[str]]]:
    """Return a table of words for each protocol: they are never mixed."""
    found = {}
    known = entries(runs)
    for protocol in dict.fromkeys(entry.protocol for entry in known):
        here = {(entry.encoder, entry.column): entry for entry in known if entry.protocol == protocol}
        columns = list(dict.fromkeys(column for _, column in here))
        suffix = f" ({BEST_ON_DEV})" if BEST_ON_DEV in protocol else ""
        head = ["encoder", *(f"{column}{suffix}" for column in columns)]
        names = dict.fromkeys(encoder for encoder, _ in here)
        lines = [[name, *(_cell(here.get((name, column))) for column in columns)] for name in names]
        found[protocol] = [head, *lines]
    return found


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    text = f"{100 * entry.median:.1f}"
    if entry.seeds > 1:
        text += f" ({100 * entry.quartiles[0]:.1f} to {100 * entry.quartiles[1]:.1f})"
    return text + (f", {entry.collapsed} of {entry.seeds} collapsed" if entry.collapsed else "")


def text(runs: Sequence[FinetuneRun]) -> str:
    """Return the tables for a terminal."""
    parts = [f"{protocol}\n{tables.aligned(grid)}" for protocol, grid in grids(runs).items()]
    return "\n\n".join([*parts, summary(runs)])


def markdown(runs: Sequence[FinetuneRun]) -> str:
    """Return the tables for a page."""
    parts = [f"{protocol}:\n\n{tables.markdown(grid)}" for protocol, grid in grids(runs).items()]
    return "\n\n".join([*parts, summary(runs)]) + "\n"


def summary(runs: Sequence[FinetuneRun]) -> str:
    """Return the account in a sentence."""
    total = account(runs)
    flops, seconds = total["flops"], total["device_seconds"]
    return (
        f"{total['runs']:,} runs, {total['collapsed']} collapsed: {flops['training']:.3g} FLOPs of training"
        f" and {flops['evaluation']:.3g} of evaluation, {sum(seconds.values()) / 3600:.2f} device-hours"
        f" ({', '.join(total['devices']) or 'no device'})."
    )
