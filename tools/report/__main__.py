"""What runs cost and what they gave, side by side: ``python -m tools.report RUN... --output DIR``.

Writes report.md, report.html (one file, nothing fetched), loss.png and speed.png, from the config, ledger
and metrics in the run folders; while a run trains, its figures are those up to now. Where a run has a
downstream.jsonl (see `tools.shared.downstream`), its scores are shown too.

One document is gathered first; the pages only show it and ``--json`` prints it.
Held-out losses compare only where the questions are the same, so whatever differs in them is
said in a warning.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import __version__
from pretrain.account import ledger
from pretrain.account.ledger import Totals
from pretrain.account.recipe import Phase, Recipe, baseline, make_recipe
from pretrain.config import Config, CorpusOptions, geometry, method_of
from pretrain.data.corpora import tokenizer_folder
from pretrain.data.manifest import load_manifest
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError
from pretrain.files import seen_from
from pretrain.monitor import Metrics, read_metrics
from pretrain.run_folder import RunFolder, run_config
from pretrain.terminal import wrapped
from tools.ledger.tree import branches, tree
from tools.plan.schema import RelativeCosts
from tools.report import pages as report_pages
from tools.report.schema import (
    BudgetUse,
    Evaluation,
    HeldOutQuestions,
    ModelShape,
    ParameterCounts,
    Report,
    RunCosts,
    RunReport,
    SpeedPoint,
    TaskScores,
    UnigramScore,
)
from tools.shared import console, downstream, outputs
from tools.shared.downstream import DownstreamScore

MEASURES = ("token_layers", "flops_without_head", "flops_with_head")

FILES: dict[str, Callable[[Report], str | bytes]] = {
    "report.md": report_pages.markdown,
    "report.html": report_pages.html,
    "loss.png": report_pages.picture,
    "speed.png": report_pages.speed_picture,
}
"""What is written, and what makes it of the document."""

_QUESTIONS = {
    "seq_length": "sequence length",
    "tokenizer": "tokenizer",
    "corpus": "held-out corpus",
    "predicted_tokens": "number of held-out predictions (evaluate.samples)",
}
"""What two runs must have in common for their losses to be comparable."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    outputs.check(Path(args.output) / name for name in FILES)
    document = gather(args.runs)
    written = write(document, Path(args.output))
    if args.json:
        console.print_json(document)
    else:
        report_pages.show(document, sys.stdout)
        said = [*(f"warning: {warning}" for warning in document.warnings), *map(str, written)]
        print(wrapped("\n".join(said)))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser("report", "Tables and plots of what runs cost and what they gave.", reports=True)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; it may still be training")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of report.md, report.html and the .png"
    )
    return parser.parse_args(arguments)


def write(document: Report, output: Path) -> list[Path]:
    """Writes the files, each at once or not at all; returns their paths."""
    contents = [make(document) for make in FILES.values()]
    paths = [output / name for name in FILES]
    for path, content in zip(paths, contents, strict=True):
        outputs.write(path, content)
    return paths


# ---- reading -------------------------------------------------------------------------------------


class PhaseSpan(NamedTuple):
    """What surviving updates of one phase took."""

    phase: Phase
    samples: int
    seconds: float
    """Device-seconds of updates."""


@dataclass(frozen=True)
class ReportedRun:
    """What a run folder says."""

    path: str
    name: str
    """Unique in the report."""
    recipe: Recipe
    status: dict[str, Any]
    """{} before the run has begun."""
    totals: Totals
    """Of the ledger."""
    lines: list[ledger.LedgerLine]
    ledger_head: str | None
    """Hash of the last of them."""
    metrics: list[Metrics]
    """One line a logged step, oldest first."""
    downstream: list[DownstreamScore]
    """Scores on tasks."""

    @property
    def devices(self) -> list[str]:
        return sorted({line.device for line in self.lines})

    @cached_property
    def spans(self) -> list[PhaseSpan]:
        """In order; none before the first update, and two of a phase that a larger budget came back to."""
        borders = [(0, 0, 0.0)]  # phase, and what there was before it
        for line in self.lines:
            if line.event == "branch":  # what is before is the trunk's
                borders = []
            if line.event == "resume":  # phases that the run went back from are not begun yet
                borders = [border for border in borders if border[1] <= line.samples]
            if "phase" in line.details:
                borders.append((line.details["phase"], *_surviving(line)))
        ends = [(0, *_surviving(line)) for line in self.lines[-1:]]
        phases = self.recipe.phases
        return [
            PhaseSpan(phases[phase], samples - before, seconds - since)
            for (phase, before, since), (_, samples, seconds) in pairwise([*borders, *ends])
            if samples > before
        ]


def _surviving(line: ledger.LedgerLine) -> tuple[int, float]:
    """Sequences, and device-seconds of updates, that the model is made of."""
    return line.samples, line.device_seconds["productive"]


def read_runs(paths: Sequence[str]) -> list[ReportedRun]:
    """Return each run once, in the order given; UserError names what is no run."""
    unique: dict[Path, str] = {}
    for path in paths:
        unique.setdefault(Path(path).resolve(), path)
    short = [folder.name for folder in unique]
    return [
        _read_run(path, folder.name if short.count(folder.name) == 1 else path)
        for folder, path in unique.items()
    ]


def _read_run(path: str, name: str) -> ReportedRun:
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{path}: not a run folder (it has no config.yaml); check the path")
    recipe = make_recipe(run_config(folder))
    begun = any((folder / file).exists() for file in ("ledger.jsonl", "metrics.jsonl"))
    chain = ledger.chain(folder) if begun else {}
    logged = (folder / "metrics.jsonl").exists()  # a run that has just begun has none yet
    return ReportedRun(
        path,
        name,
        recipe,
        RunFolder(folder).status(),
        ledger.total([folder] if begun else []),
        list(chain.values()),
        next(reversed(chain), None),
        read_metrics(folder) if logged else [],
        downstream.read(folder),
    )


# ---- the document --------------------------------------------------------------------------------


def gather(paths: Sequence[str]) -> Report:
    """Return all figures of the report."""
    runs = read_runs(paths)
    described = [_describe(run, runs) for run in runs]
    begun = {run.name: run.path for run in runs if run.lines}
    known = branches(begun)
    return Report(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=[*_warnings(described), *_gone(runs, described), *_gaps(runs)],
        runs=[replace(one, branch=known.get(one.name)) for one in described],
        tree=tree(begun),
        together=ledger.total(begun.values()),
    )


def _describe(run: ReportedRun, runs: Sequence[ReportedRun]) -> RunReport:
    recipe, config, totals = run.recipe, run.recipe.config, run.totals
    evaluations = [_evaluation(line) for line in run.metrics if "held_out_loss" in line]
    phases = [phase.config for phase in recipe.phases]
    return RunReport(
        run=run.path,
        name=run.name,
        method=method_of(config),
        model=ModelShape(config.model.block, config.model.num_layers, config.model.hidden_size),
        seq_length=[phase.train.seq_length for phase in phases],
        batch_size=[phase.train.batch_size for phase in phases],
        rate=config.masking.rate,
        predicted_shares=[phase.masking.predict or phase.masking.rate for phase in phases],
        parameters=_parameters(recipe),
        state=run.status.get("state"),
        ledger_head=run.ledger_head,
        devices=run.devices,
        ranks=run.lines[-1].ranks if run.lines else None,
        totals=totals,
        budget=_budget(recipe, totals),
        costs=RunCosts(
            token_layers=totals.token_layers,
            flops_without_head=totals.flops_without_head,
            flops_with_head=totals.flops["total"],
            device_seconds=totals.device_seconds["productive"],
        ),
        relative=RelativeCosts(**_relative(run), device_time=_relative_time(run, runs)),
        questions=_questions(run),
        held_out=evaluations[-1] if evaluations else None,
        unigram=unigram(config.corpus, held_out_length(config), config.evaluate.samples),
        evaluations=evaluations,
        downstream=_downstream(run),
        speed=_speed(run),
    )


def held_out_length(config: Config) -> int:
    """Return the length L of the held-out windows."""
    return config.evaluate.seq_length or config.train.seq_length


def _spent(line: Metrics) -> dict[str, Any]:
    """What a step had cost: places on the horizontal axes."""
    return {name: line.get(name) for name in ("step", "flops", "tokens_seen", "device_hours", "kwh")}


def _evaluation(line: Metrics) -> Evaluation:
    scores = {name: line.get(f"held_out_{name}") for name in ("loss", "bits_per_byte", "accuracy")}
    return Evaluation(**_spent(line), **scores)


def _downstream(run: ReportedRun) -> list[TaskScores]:
    """Return what each step that has some scores by each protocol, and what that step had cost.

    The score is the mean over the tasks, of which one with several metrics has their mean (as in GLUE); of
    several seeds it is the median, `low` and `high` the quartiles.
    """
    groups: dict[tuple[str, int], list[DownstreamScore]] = {}
    for one in run.downstream:
        if one.step is not None:
            groups.setdefault((one.protocol, one.step), []).append(one)
    lines = {line["step"]: line for line in run.metrics}
    return [
        TaskScores(**_spent(lines[step]), protocol=protocol, **_mean_scores(scores))
        for (protocol, step), scores in sorted(groups.items())
        if step in lines
    ]


def _mean_scores(scores: Sequence[DownstreamScore]) -> dict[str, Any]:
    by_seed: dict[int | None, dict[str, list[float]]] = {}
    for one in scores:
        by_seed.setdefault(one.seed, {}).setdefault(one.task, []).append(one.score)
    tasks: dict[str, list[float]] = {}
    means = []
    for of_task in by_seed.values():
        found = {task: statistics.mean(values) for task, values in of_task.items()}
        for task, value in found.items():
            tasks.setdefault(task, []).append(value)
        means.append(statistics.mean(found.values()))
    low, middle, high = statistics.quantiles(means, n=4, method="inclusive") if means[1:] else means * 3
    medians = {task: statistics.median(values) for task, values in tasks.items()}
    return {"score": middle, "low": low, "high": high, "seeds": len(means), "tasks": medians}


RATES = ("slots_per_second", "real_tokens_per_second", "predictions_per_second", "mfu", "step_seconds")
"""In the order of SpeedPoint's fields."""
SPEED_POINTS = 200


def _speed(run: ReportedRun) -> list[SpeedPoint]:
    """Rates over the run: its logs, as medians of so many neighbours that 200 points remain at most."""
    logs = [line for line in run.metrics if "slots_per_second" in line]
    size = -(-len(logs) // SPEED_POINTS) or 1
    return [
        SpeedPoint(
            *_spent(stretch[-1]).values(),
            *(_median([line[rate] for line in stretch if line.get(rate) is not None]) for rate in RATES),
        )
        for stretch in (logs[start : start + size] for start in range(0, len(logs), size))
    ]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _parameters(recipe: Recipe) -> ParameterCounts:
    """Count the parameters that fine-tuning starts from, and those that only pre-training has."""
    parts = geometry.parameters(recipe.config.model, recipe.vocab_size)
    kept = parts["encoder"] + parts["embeddings"]
    return ParameterCounts(kept, parts["total"] - kept, parts["total"])


def _budget(recipe: Recipe, totals: Totals) -> BudgetUse:
    budget, given = recipe.budget, recipe.config.budget
    relative_to = given.relative_to and f"{given.fraction:g} of {given.relative_to}"
    return BudgetUse(budget.unit, budget.total, budget.spent(totals), relative_to)


# ---- costs against the baseline ------------------------------------------------------------------


def _relative(run: ReportedRun) -> dict[str, float]:
    """Costs over those of the baseline on the same sequences, of each phase as many as the run has read."""
    ours, theirs = dict.fromkeys(MEASURES, 0.0), dict.fromkeys(MEASURES, 0.0)
    # Before the first update: of one sequence of the first phase.
    for done in run.spans or [PhaseSpan(run.recipe.phases[0], 1, 0.0)]:
        mine, reference = asdict(done.phase.sequence_costs), asdict(baseline(done.phase).sequence_costs)
        for name in MEASURES:
            ours[name] += done.samples * mine[name]
            theirs[name] += done.samples * reference[name]
    return {name: ours[name] / theirs[name] for name in MEASURES}


def _relative_time(run: ReportedRun, runs: Sequence[ReportedRun]) -> float | None:
    """Device-seconds of updates over those that the baselines among `runs` take for as many sequences.

    Phase by phase, for a sequence of half the length takes less than half as long; None if the baselines
    were not timed in each of them: a guess would be no measurement.
    """
    known = [done for other in runs if _is_baseline(other, run) for done in other.spans if done.seconds]
    theirs = 0.0
    for mine in run.spans:
        wanted = baseline(mine.phase).sequence_costs
        same = [done for done in known if done.phase.sequence_costs == wanted]
        if not same:
            return None
        each = sum(done.seconds for done in same) / sum(done.samples for done in same)
        theirs += mine.samples * each
    return sum(mine.seconds for mine in run.spans) / theirs if theirs else None


def _is_baseline(other: ReportedRun, run: ReportedRun) -> bool:
    """Whether `other` may be what `run` is measured against: same arithmetic, same device."""
    return (
        method_of(other.recipe.config) == "mlm"
        and other.recipe.config.model.block == run.recipe.config.model.block
        and other.recipe.config.train.precision == run.recipe.config.train.precision
        and other.devices == run.devices
    )


# ---- the held-out questions ----------------------------------------------------------------------


@cache
def unigram(corpus: CorpusOptions, length: int, samples: int) -> UnigramScore | None:
    """Return the score of guessing by frequency on a run's held-out windows; None if they cannot be
    opened."""
    if corpus.valid is None:
        return None
    from pretrain.evaluate import HeldOut  # imports torch, a second of start-up

    try:
        tokenizer = load_tokenizer(tokenizer_folder(corpus))
        score = HeldOut(corpus.valid, tokenizer, length, samples).unigram(
            corpus.blend[0][1], tokenizer.vocab_size
        )
    except UserError:
        return None
    return UnigramScore(score.loss, score.bits_per_byte, score.accuracy)


def _questions(run: ReportedRun) -> HeldOutQuestions:
    scores = [line.details["held_out"] for line in run.lines if "held_out" in line.details]
    last = scores[-1] if scores else {}
    known = HeldOutQuestions(
        seq_length=held_out_length(run.recipe.config),
        **{name: last.get(name) for name in ("predicted_tokens", "tokenizer", "corpus")},
    )
    try:
        manifest = load_manifest(run.recipe.config.corpus.valid or "")
    except UserError:
        return known
    hashed = manifest.tokenizer.hash if manifest.tokenizer else None
    return replace(known, tokenizer=known.tokenizer or hashed, corpus=known.corpus or manifest.fingerprint)


def _warnings(described: Sequence[RunReport]) -> list[str]:
    """What makes the losses of the runs incomparable, or leaves it unknown."""
    scored = [run for run in described if run.held_out]
    if len(scored) < 2:
        return []
    found = []
    for key, what in _QUESTIONS.items():
        values = {run.name: getattr(run.questions, key) for run in scored}
        if len(set(values.values()) - {None}) > 1:
            listed = ", ".join(f"{name}: {_abbreviated(value)}" for name, value in values.items())
            found.append(f"The losses cannot be compared: the runs differ in {what} ({listed}).")
        elif unknown := [name for name, value in values.items() if value is None]:
            found.append(f"Not checked that the runs have the same {what}: unknown for {', '.join(unknown)}.")
    return found


def _gone(runs: Sequence[ReportedRun], described: Sequence[RunReport]) -> list[str]:
    """What is not shown, as a run's held-out corpus cannot be opened."""
    return [
        f"{run.name}: its held-out corpus cannot be read at {prefix}{seen_from(prefix)}, so the score of"
        " guessing by frequency is not shown."
        for run, shown in zip(runs, described, strict=True)
        if (prefix := run.recipe.config.corpus.valid) and shown.held_out and not shown.unigram
    ]


def _gaps(runs: Sequence[ReportedRun]) -> list[str]:
    """Say what the ledgers have lost."""
    return [f"{run.name}: {gap}." for run in runs for gap in ledger.gaps(run.lines)]


def _abbreviated(value: Any) -> str:
    return "unknown" if value is None else str(value)[:12]


if __name__ == "__main__":
    console.run(main)
