"""The grid of a command line: encoders, tasks, settings and seeds, and what of it can be done by now.

Cells that start from a model of MNLI wait until its setting is chosen and it is trained, so there
are other cells after some runs than before. They are shared by their digest, which is the same whatever is
known by then.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from pretrain import checkpoint
from pretrain.errors import UserError
from tools.finetune.cells import BASELINES, BEST_ON_DEV, MNLI, RANDOM, RUNS, Cell, FinetuneRun, start_of
from tools.finetune.task import FinetuneTask
from tools.finetune.tasks import AX, STARTED_FROM_MNLI, find_task
from tools.shared import outputs

PROTOCOLS = {"fixed": ([5e-5], [32], 3), "roberta": ([1e-5, 2e-5, 3e-5], [16, 32], 10)}
"""Learning rates, batches and epochs: BERT's middle values, and the grid of RoBERTa's paper."""

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Source:
    """An encoder to be fine-tuned."""

    name: str
    path: Path
    """As it was given: a run, or a Hugging Face folder."""
    folder: Path
    """The Hugging Face folder."""
    step: int | None
    """Of the run's checkpoint."""
    weights: str
    """Fingerprint of the folder's weights and config."""
    averaged: str = ""
    """The checkpoints that its weights are a mean of."""


@dataclass(frozen=True)
class Plan:
    """All that the cells are made of."""

    protocol: str
    lrs: list[float]
    batches: list[int]
    epochs: int
    sources: list[Source]
    tasks: list[FinetuneTask]
    args: argparse.Namespace

    @property
    def chooses(self) -> bool:
        """Whether a part of train is kept to choose settings by."""
        return len(self.lrs) * len(self.batches) > 1 and not self.args.best_on_dev

    def cell(self, encoder: str, task: FinetuneTask, **more: object) -> Cell:
        rows, longest = self.args.train_rows, self.args.max_length
        cell = Cell(self.protocol, encoder, task.name, train_rows=rows, max_length=longest)
        return replace(cell, held_out=self.chooses, data=task.fingerprint, **more)  # type: ignore[arg-type]

    def grid(self, source: Source, task: FinetuneTask, start: str, origin: str = "") -> Iterator[Cell]:
        """Yield every setting and seed of an encoder on a task."""
        for seed, batch, lr in product(range(self.args.seeds), self.batches, self.lrs):
            setting = {"lr": lr, "batch": batch, "epochs": self.epochs, "seed": seed}
            more = {"start": start, "origin": origin, "weights": source.weights}
            yield self.cell(source.name, task, **setting, **more)

    def cells(self, runs: Sequence[FinetuneRun]) -> list[Cell]:
        """Return all cells that can be done after these runs."""
        found = [self.cell(name, task) for task in self.tasks for name in BASELINES]
        for task, source, start in product(self.tasks, self.sources, ("", RANDOM)):
            found += self.grid(source, task, start)
        if self.args.from_mnli:
            done = {run.cell for run in runs}
            starts = [(source, self.start(source, runs)) for source in self.sources]
            found += [cell for _, cell in starts if cell]
            for (source, cell), task in product(starts, self.tasks):
                if cell in done and task.name in STARTED_FROM_MNLI and self.kept(cell).exists():
                    found += self.grid(source, task, MNLI, cell.digest)
        return found

    def start(self, source: Source, runs: Sequence[FinetuneRun]) -> Cell | None:
        """Return the run whose model of MNLI is kept: of the chosen setting, once that is known."""
        (task,) = (task for task in self.tasks if task.name == MNLI)
        if not {*self.grid(source, task, "")} <= {run.cell for run in runs}:
            return None
        same = (self.protocol, source.name)
        own = [run for run in runs if (run.cell.protocol, run.cell.encoder) == same]
        return start_of(own, self.args.best_on_dev)

    def kept(self, cell: Cell) -> Path:
        """Return the folder of a start, or of the one that a cell begins with."""
        return self.args.output / "starts" / f"{cell.encoder}-{cell.origin or cell.digest}"

    def folder(self, cell: Cell) -> Path:
        """Return the Hugging Face folder that a cell begins with."""
        folders = {source.name: source.folder for source in self.sources}
        return self.kept(cell) if cell.origin else folders.get(cell.encoder, Path())

    def todo(self, runs: Sequence[FinetuneRun], share: tuple[int, int] = (0, 1)) -> list[Cell]:
        """Return the cells that are not done; share: its number, and of how many."""
        done = {run.cell for run in runs if not run.cell.kept or self.kept(run.cell).exists()}
        number, shares = share
        own = (cell for cell in self.cells(runs) if cell.owner(shares) == number)
        return [cell for cell in own if cell not in done]


def make_plan(args: argparse.Namespace) -> Plan:
    """Return the plan of a command line; UserError where an encoder or a row of a task is not right."""
    own = [name for name in ("lrs", "batch_sizes", "epochs") if getattr(args, name) is not None]
    if args.protocol and own:
        raise UserError(
            f"--protocol {args.protocol} sets --{own[0].replace('_', '-')}; leave one of them out"
        )
    if missing := [name for name in ("scipy", "sklearn") if not find_spec(name)]:
        raise UserError(f"baselines need {missing[0]}; pip install '.[finetune]'")
    lrs, batches, epochs = PROTOCOLS[args.protocol or "fixed"]
    lrs, batches, epochs = args.lrs or lrs, args.batch_sizes or batches, args.epochs or epochs
    bad: list[str] | None = [] if args.keep_going else None
    names = dict.fromkeys(MNLI if name == AX else name for name in args.tasks)
    tasks = {name: find_task(args.data, name, bad) for name in names}
    if args.from_mnli and MNLI not in tasks:
        raise UserError("--from-mnli needs MNLI among --tasks")
    if bad and not args.share:  # whoever shares the cells out has told them
        file = args.output / REJECTED
        outputs.write(file, "".join(json.dumps({"reason": reason}) + "\n" for reason in bad), {"reason": ""})
        print(f"{len(bad)} rows were left out: {file}", file=sys.stderr)
    words = [f"lr {', '.join(f'{lr:g}' for lr in lrs)}", f"batch {', '.join(map(str, batches))}"]
    words += [f"{epochs} epochs", f"{args.max_length} tokens"]
    words += [f"{args.train_rows:,} rows"] if args.train_rows else []
    if len(lrs) * len(batches) > 1:
        words.append(BEST_ON_DEV if args.best_on_dev else "chosen on a tenth of train")
    name = args.protocol or ("own" if own else "fixed")
    protocol = f"{name}: {'; '.join(words)}"
    return Plan(protocol, lrs, batches, epochs, make_sources(args), list(tasks.values()), args)


def make_sources(args: argparse.Namespace) -> list[Source]:
    """Return the encoders by name; runs are exported to OUTPUT/encoders unless that is done."""
    found = dict[str, Source]()
    for word in args.models:
        name, equals, path = word.partition("=") if not Path(word).exists() else ("", "", word)
        path = Path(path if equals or not name else name)
        name = name if equals else path.resolve().name
        if name in found:
            raise UserError(f"{word}: a second encoder named {name}; write NAME={word}")
        found[name] = _source(name, path, args)
    if args.checkpoint != "latest" and all(source.step is None for source in found.values()):
        raise UserError(f"--checkpoint {args.checkpoint}: Hugging Face folders have none; leave it out")
    return list(found.values())


def _source(name: str, path: Path, args: argparse.Namespace) -> Source:
    folder, step, averaged = path, None, ""
    if (path / "config.yaml").is_file():
        place, stamps = checkpoint.find_verified(path, args.checkpoint)
        state = checkpoint.read_state(place, stamps)
        step, averaged = state.step, ", ".join(state.averaged)
        which = place.name if place.parent.name == "weights" else step
        # Its hashes, as another run may have had this name and step.
        hashes = hashlib.blake2b((place / checkpoint.MANIFEST).read_bytes(), digest_size=4).hexdigest()
        folder = args.output / "encoders" / f"{name}-{which}-{hashes}"
        if not folder.exists():
            words = ["tools.export", str(path), f"--output={folder}", f"--checkpoint={which}"]
            done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise UserError(f"{path}: cannot be exported; see above")
    elif not (path / "config.json").is_file():
        raise UserError(
            f"{path}: neither a run (no config.yaml) nor a Hugging Face folder (no config.json); models are"
            " folders on this disk"
        )
    files = [
        folder / "config.json",
        *sorted(folder.glob("*.safetensors")),
        *sorted(folder.glob("tokenizer*")),
    ]
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Source(name, path, folder, step, digest.hexdigest(), averaged)


def refuse_others(plan: Plan, runs: Sequence[FinetuneRun]) -> None:
    """Raise UserError where the lines are of other weights or rows by the same name: a table would mix
    them."""
    weights = {source.name: source.weights for source in plan.sources}
    data = {task.name: task.fingerprint for task in plan.tasks}
    for cell in (run.cell for run in runs):
        for name, now, then in (
            (cell.encoder, weights.get(cell.encoder), cell.weights),
            (cell.task, data.get(cell.task), cell.data),
        ):
            if now and now != then:
                raise UserError(
                    f"{plan.args.output / RUNS}: has runs of another {name}; choose another --output"
                )
