"""What runs cost and what they gave, side by side: ``python -m tools.report RUN... --output DIR``.

Writes report.md, report.html (one file, nothing fetched) and loss.png, from the config, ledger and
metrics in the run folders; while a run trains, its figures are those up to now.

The one idea: one document is gathered first; the pages only show it and ``--json`` prints it.
The trap: held-out losses compare only where the questions are the same, so whatever differs in them is
said in a warning.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pretrain import __version__, config, flops, ledger
from pretrain.checkpoint import TEMPORARY, RunFolder
from pretrain.config import Config, UserError
from pretrain.corpus import load_manifest, tokenizer_folder
from pretrain.masking import counts
from pretrain.monitor import Metrics, read_metrics
from pretrain.tokenizer import load_tokenizer
from tools import console, report_pages

BASELINE_RATE = 0.15

_QUESTIONS = {
    "seq_length": "sequence length",
    "tokenizer": "tokenizer",
    "corpus": "held-out corpus",
    "predicted_tokens": "number of held-out predictions (evaluate.samples)",
}
"""What two runs must have in common for their losses to be comparable."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    document = gather(options.runs)
    written = write(document, Path(options.output))
    if options.json:
        console.print_json(document)
    else:
        report_pages.show(document, sys.stdout)
        print("\n".join([*(f"warning: {warning}" for warning in document["warnings"]), *map(str, written)]))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser("report", "Tables and plots of what runs cost and what they gave.", reports=True)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; it may still be training")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of report.md, report.html and loss.png"
    )
    return parser.parse_args(arguments)


def write(document: dict[str, Any], output: Path) -> list[Path]:
    """Writes the three files, each at once or not at all; returns their paths."""
    files = {
        "report.md": report_pages.markdown(document).encode(),
        "report.html": report_pages.html(document).encode(),
        "loss.png": report_pages.picture(document),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        temporary = output / f"{TEMPORARY}{name}"
        temporary.write_bytes(data)
        os.replace(temporary, output / name)
    return [output / name for name in files]


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    path: str
    name: str
    """Unique in the report."""
    options: Config
    status: dict[str, Any]
    """{} before the run has begun."""
    totals: dict[str, Any]
    """Of the ledger."""
    lines: list[ledger.Line]
    evaluations: list[Metrics]
    """The lines of metrics that have a held-out loss, oldest first."""

    @property
    def devices(self) -> list[str]:
        return sorted({line["device"] for line in self.lines})


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Each run once, in the order given; UserError names what is no run."""
    unique: dict[Path, str] = {}
    for path in paths:
        unique.setdefault(Path(path).resolve(), path)
    short = [folder.name for folder in unique]
    return [
        _read_run(path, folder.name if short.count(folder.name) == 1 else path)
        for folder, path in unique.items()
    ]


def _read_run(path: str, name: str) -> Run:
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{path}: not a run folder (it has no config.yaml); check the path")
    options = config.build(config.read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    begun = any((folder / file).exists() for file in ("ledger.jsonl", "metrics.jsonl"))
    logged = (folder / "metrics.jsonl").exists()  # a run that has just begun has none yet
    return Run(
        path,
        name,
        options,
        RunFolder(folder).status(),
        ledger.total([folder] if begun else []),
        ledger.read(folder) if begun else [],
        [line for line in read_metrics(folder) if "held_out_loss" in line] if logged else [],
    )


# ---- the document --------------------------------------------------------------------------------


def gather(paths: Sequence[str]) -> dict[str, Any]:
    """All figures of the report; ``runs`` has one entry a run, in the order given."""
    runs = read_runs(paths)
    described = [_describe(run, runs) for run in runs]
    return {
        "version": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": _warnings(described),
        "runs": described,
    }


def _describe(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    o, totals = run.options, run.totals
    evaluations = [_evaluation(line) for line in run.evaluations]
    return {
        "run": run.path,
        "name": run.name,
        "method": config.method(o),
        "model": {name: getattr(o.model, name) for name in ("block", "num_layers", "hidden_size")},
        "seq_length": o.train.seq_length,
        "rate": o.masking.rate,
        "parameters": _parameters(o),
        "state": run.status.get("state"),
        "devices": run.devices,
        "ranks": run.lines[-1]["ranks"] if run.lines else None,
        "totals": totals,
        "budget": _budget(o.budget, totals),
        "costs": {
            "token_layers": sequence_costs(o)["token_layers"] * totals["samples"],
            "flops_without_head": totals["flops"]["encoder"] + totals["flops"]["decoder"],
            "flops_with_head": totals["flops"]["total"],
            "device_seconds": totals["device_seconds"]["productive"],
        },
        "relative": {**_relative(o), "device_time": _relative_time(run, runs)},
        "questions": _questions(run),
        "held_out": evaluations[-1] if evaluations else None,
        "unigram": unigram(o.corpus, o.train.seq_length, o.evaluate.samples),
        "evaluations": evaluations,
    }


def _evaluation(line: Metrics) -> dict[str, Any]:
    scores = {name: line.get(f"held_out_{name}") for name in ("loss", "bits_per_byte", "accuracy")}
    return {**{name: line[name] for name in ("step", "flops", "device_hours")}, **scores}


def _parameters(o: Config) -> dict[str, int]:
    """Those that fine-tuning starts from, and those that only pre-training has."""
    parts = flops.parameters(o.model, _vocab_size(o))
    kept = parts["encoder"] + parts["embeddings"]
    return {"encoder": kept, "discarded": parts["total"] - kept, "total": parts["total"]}


def _budget(budget: config.Budget, totals: dict[str, Any]) -> dict[str, Any]:
    spent = {
        "steps": totals["steps"],
        "tokens": totals["tokens_seen"],
        "flops": totals["flops"]["total"],
        "device_hours": totals["device_seconds"]["total"] / 3600,
    }
    ((unit, total),) = ((unit, value) for unit, value in budget.model_dump().items() if value is not None)
    return {"unit": unit, "total": total, "spent": spent[unit]}


# ---- costs against the baseline ------------------------------------------------------------------


def baseline(o: Config) -> Config:
    """Ordinary MLM at 15 % on an encoder of the same size and the same sequences."""
    model = o.model.model_copy(update={"mask_from": 0, "decoder_layers": 0})
    return o.model_copy(update={"model": model, "masking": config.Masking(rate=BASELINE_RATE)})


def sequence_costs(o: Config) -> dict[str, float]:
    """What training on one sequence costs, in closed form."""
    c = counts(o.masking, o.train.seq_length)
    rows = flops.Rows(c.length, c.visible, c.predicted)
    cost = flops.training(o.model, rows, _vocab_size(o))
    return {
        "token_layers": flops.token_layers(o.model, rows),
        "flops_without_head": cost.encoder + cost.decoder,
        "flops_with_head": cost.total,
    }


def _vocab_size(o: Config) -> int:
    assert o.model.vocab_size, "the config of a run is resolved"
    return o.model.vocab_size


def _relative(o: Config) -> dict[str, float]:
    reference = sequence_costs(baseline(o))
    return {name: cost / reference[name] for name, cost in sequence_costs(o).items()}


def _relative_time(run: Run, runs: Sequence[Run]) -> float | None:
    """Device-seconds of updates per sequence over those of the baselines among `runs`; None without."""
    reference = ledger.total(other.path for other in runs if _is_baseline(other, run))
    if not (reference["samples"] and run.totals["samples"]):
        return None
    return _seconds_per_sequence(run.totals) / _seconds_per_sequence(reference)


def _seconds_per_sequence(totals: dict[str, Any]) -> float:
    return totals["device_seconds"]["productive"] / totals["samples"]


def _is_baseline(other: Run, run: Run) -> bool:
    """Whether `other` is what `run` is measured against: same size, same arithmetic, same device."""
    return (
        config.method(other.options) == "mlm"
        and bool(other.lines)
        and sequence_costs(other.options) == sequence_costs(baseline(run.options))
        and other.options.model.block == run.options.model.block
        and other.options.train.precision == run.options.train.precision
        and other.devices == run.devices
    )


# ---- the held-out questions ----------------------------------------------------------------------


@cache
def unigram(corpus: config.Corpus, length: int, samples: int) -> dict[str, Any] | None:
    """The score of guessing by frequency on a run's held-out windows; None if they cannot be opened."""
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
    return {name: asdict(score)[name] for name in ("loss", "bits_per_byte", "accuracy")}


def _questions(run: Run) -> dict[str, Any]:
    """What the held-out loss is an answer to, under the keys of `_QUESTIONS`; None where unknown."""
    scores = [line["held_out"] for line in run.lines if "held_out" in line]
    known: dict[str, Any] = {
        "seq_length": run.options.train.seq_length,
        "predicted_tokens": scores[-1]["predicted_tokens"] if scores else None,
        "tokenizer": None,
        "corpus": None,
    }
    try:
        manifest = load_manifest(run.options.corpus.valid or "")
    except UserError:
        return known
    hashed = manifest.tokenizer.hash if manifest.tokenizer else None
    return {**known, "tokenizer": hashed, "corpus": manifest.fingerprint}


def _warnings(described: Sequence[dict[str, Any]]) -> list[str]:
    """What makes the losses of the runs incomparable, or leaves it unknown."""
    scored = [run for run in described if run["held_out"]]
    if len(scored) < 2:
        return []
    found = []
    for key, what in _QUESTIONS.items():
        values = {run["name"]: run["questions"][key] for run in scored}
        if len(set(values.values()) - {None}) > 1:
            listed = ", ".join(f"{name}: {_abbreviated(value)}" for name, value in values.items())
            found.append(f"The losses cannot be compared: the runs differ in {what} ({listed}).")
        elif unknown := [name for name, value in values.items() if value is None]:
            found.append(f"Not checked that the runs have the same {what}: unknown for {', '.join(unknown)}.")
    return found


def _abbreviated(value: Any) -> str:
    return "unknown" if value is None else str(value)[:12]


if __name__ == "__main__":
    console.run(main)
