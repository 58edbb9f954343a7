"""A cell of the grid: one encoder on one task with one setting and seed, and its line in runs.jsonl.

A line holds all that determines a run and all that came of it. What is there is not done again,
so any number of processes can share the cells, be killed and be started again; a table is read from the
lines alone.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pretrain.errors import UserError
from pretrain.files import append_line
from tools.finetune.task import FinetuneTask
from tools.shared import typed_json
from tools.text.glue import drawn

RUNS = "runs.jsonl"
HELD_OUT = 0.1
"""Share of the training rows that settings are chosen on."""
MAJORITY, TFIDF = "majority class", "TF-IDF + logistic regression"
BASELINES = (MAJORITY, TFIDF)
RANDOM, MNLI = "random", "MNLI"
BEST_ON_DEV = "best on dev"
"""Of protocols that choose settings so."""
_BEGIN = '{"protocol": '
"""Of each line: what does not begin so is no file of ours."""


@dataclass(frozen=True)
class Cell:
    """What determines a run."""

    protocol: str
    encoder: str
    """Its name in tables; a baseline's where there is no model."""
    task: str
    start: str = ""
    """What is fine-tuned: the encoder ("") , random weights of its architecture, or its model of MNLI."""
    lr: float = 0.0
    batch: int = 0
    epochs: int = 0
    seed: int = 0
    train_rows: int | None = None
    max_length: int = 0
    held_out: bool = False
    """Whether a part of train is kept to choose settings by."""
    kept: bool = False
    """Whether the model stays, as a start of others; such a run is in no table."""
    weights: str = ""
    data: str = ""
    """Fingerprints of the encoder and of the task's files."""
    origin: str = ""
    """Digest of the run whose model of MNLI it starts from."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """What is chosen."""
        return self.lr, self.batch, self.epochs

    @property
    def digest(self) -> str:
        """A short name."""
        return hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()

    def owner(self, shares: int) -> int:
        """Return the share that does it, of so many; it is the same whatever other cells there are."""
        return int(self.digest, 16) % shares


@dataclass(frozen=True)
class FinetuneRun:
    """A cell and what came of it: a line of runs.jsonl."""

    cell: Cell
    scores: dict[str, dict[str, float]]
    """By split and metric."""
    held_out_scores: dict[str, float]
    """Of the part of train that was kept."""
    n: dict[str, int]
    """Rows that were trained on and that were scored, by split."""
    loss: float | None = None
    """Of the last epoch of training, in nats or squares; None of baselines, and of what is no number."""
    majority_loss: float | None = None
    collapsed: bool = False
    """Whether the training loss ended above that of an answer that never looks at the text."""
    steps: int = 0
    truncated: int = 0
    """Rows that lost their end, of all splits."""
    flops: dict[str, int] = field(default_factory=dict)
    device_seconds: dict[str, float] = field(default_factory=dict)
    """Of training and of evaluation."""
    device: str = ""
    precision: str = ""
    versions: dict[str, str] = field(default_factory=dict)


_RUN = TypeAdapter(FinetuneRun)


def read_runs(path: Path) -> list[FinetuneRun]:
    """Return the runs of a file, the last of each cell; what a kill has torn is done again."""
    found: dict[Cell, FinetuneRun] = {}
    for where, record in typed_json.read_lines(path, _BEGIN, "no run; choose another --output"):
        try:
            record.setdefault("origin", "")  # younger than the first files
            cell = Cell(**{each.name: record.pop(each.name) for each in fields(Cell)})
            found[cell] = _RUN.validate_python(vars(FinetuneRun(cell, **record)))
        except (KeyError, TypeError, AttributeError, ValidationError):
            raise UserError(f"{where}: no run of this version; choose another --output") from None
    return list(found.values())


def append(path: Path, run: FinetuneRun) -> None:
    """Add a run's line, whole, whoever else does so."""
    record = asdict(run)
    append_line(path, json.dumps(record.pop("cell") | record, allow_nan=False))


def rows_of(task: FinetuneTask, cell: Cell) -> tuple[list[Any], list[Any]]:
    """Return the rows to train on and those to choose by, drawn by their hash: for all encoders the same."""
    rows = list(task.train)
    if cell.train_rows is not None:
        keys = [task.key(row) for row in rows]
        rows = [rows[place] for place in drawn(keys, cell.train_rows)]
    if not cell.held_out:
        return rows, []
    kept = set(drawn([task.key(row) for row in rows], max(1, round(HELD_OUT * len(rows))), "held-out"))
    if len(kept) == len(rows):
        raise UserError(f"{task.name}: {len(rows)} rows to train on are too few to choose settings by")
    return [row for i, row in enumerate(rows) if i not in kept], [rows[i] for i in sorted(kept)]


def do(cell: Cell, task: FinetuneTask, folder: str, device: str, keep: Path | None) -> FinetuneRun:
    """Train and score a cell. folder: of the encoder; keep: where its model is to stay."""
    train_rows, held_rows = rows_of(task, cell)
    parts = {"": held_rows, **task.splits} if held_rows else dict(task.splits)
    n = {"train": len(train_rows), **{name or "held out": len(rows) for name, rows in parts.items()}}
    if cell.encoder in BASELINES:
        answer = task.majority if cell.encoder == MAJORITY else task.tfidf
        scores = {name: task.scores(name, rows, answer(train_rows, rows)) for name, rows in parts.items()}
        return FinetuneRun(cell, scores, scores.pop("", {}), n)
    return _fine_tuned(cell, task, folder, device, keep, train_rows, parts, n)


def _fine_tuned(
    cell: Cell,
    task: FinetuneTask,
    folder: str,
    device: str,
    keep: Path | None,
    train_rows: Sequence[Any],
    parts: Mapping[str, Sequence[Any]],
    n: dict[str, int],
) -> FinetuneRun:
    import torch
    import transformers

    from tools.finetune import train
    from tools.shared.encoders import positions

    tokenizer = train.load_tokenizer(folder)
    model = train.load_model(folder, task.auto, task.settings, cell.seed, cell.start == RANDOM)
    longest, pad = min(cell.max_length, positions(model)), tokenizer.pad_token_id
    model.to(torch.device(device))  # type: ignore[arg-type]
    inputs = task.encode(train_rows, tokenizer, longest)
    settings = train.Settings(cell.lr, cell.batch, cell.epochs, cell.seed)
    loss, steps, cost = train.train(model, inputs.features, pad, settings)
    scores, truncated, flops, seconds = {}, inputs.truncated, 0, 0.0
    for name, rows in parts.items():
        encoded = task.encode(rows, tokenizer, longest)
        logits, spent = train.outputs(model, encoded.features, pad)
        scores[name] = task.scores(name, rows, task.predictions(rows, encoded, logits))
        truncated += encoded.truncated
        flops, seconds = flops + spent.flops, seconds + spent.seconds
    if keep:
        model.base_model.save_pretrained(keep)  # type: ignore[operator]
        tokenizer.save_pretrained(keep)
    majority_loss, place = task.majority_loss(inputs), torch.device(device)
    return FinetuneRun(
        cell,
        scores,
        scores.pop("", {}),
        n,
        loss=loss if loss < float("inf") else None,
        majority_loss=majority_loss,
        collapsed=not loss <= majority_loss,
        steps=steps,
        truncated=truncated,
        flops={"training": cost.flops, "evaluation": flops},
        device_seconds={"training": round(cost.seconds, 3), "evaluation": round(seconds, 3)},
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        precision=train.precision(place),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def chosen(runs: Iterable[FinetuneRun], best_on_dev: bool) -> list[FinetuneRun]:
    """Return the runs of the best setting: by the median over seeds of what it was chosen by."""
    by_setting: dict[tuple[Any, ...], list[FinetuneRun]] = {}
    for run in runs:
        by_setting.setdefault(run.cell.setting, []).append(run)

    def median(setting: tuple[Any, ...]) -> float:
        return statistics.median(_leading(run, best_on_dev) for run in by_setting[setting])

    # Of equals the first in order, not the one that ended first.
    return by_setting[max(sorted(by_setting), key=median)] if by_setting else []


def start_of(runs: Iterable[FinetuneRun], best_on_dev: bool) -> Cell | None:
    """Return the run whose model of MNLI is kept: of an encoder's chosen setting, the first seed."""
    found = [run for run in runs if run.cell.task == MNLI and not run.cell.start and not run.cell.kept]
    cells = [run.cell for run in chosen(found, best_on_dev)]
    return replace(min(cells, key=lambda cell: cell.seed), kept=True) if cells else None


def current(runs: Sequence[FinetuneRun]) -> list[FinetuneRun]:
    """Return the runs without those that began with a model of MNLI that is chosen no more."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.cell.protocol, run.cell.encoder].append(run)
    starts = {start_of(group, BEST_ON_DEV in protocol) for (protocol, _), group in groups.items()}
    origins = {start.digest for start in starts if start}
    return [run for run in runs if run.cell.start != MNLI or run.cell.origin in origins]


def _leading(run: FinetuneRun, best_on_dev: bool) -> float:
    """Return the score that settings are chosen by: the first metric, of dev the first split's."""
    scores = (
        run.held_out_scores if run.held_out_scores and not best_on_dev else next(iter(run.scores.values()))
    )
    return next(iter(scores.values()))
