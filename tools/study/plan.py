"""What a study trains, as its file says and as far as its results tell.

The one idea: a cell is what one process does alone: a learning rate that is tried, or a trunk at a constant
rate with the decays that branch off it. All about it follows from the file and from the lines of results, so
a study goes on from these two on any machine.

The trap: a model is known by what the file says of its training, not by all options of a run: one that is
new in the program must not make a study begin anew.

Imports no torch.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.account.recipe import make_recipe
from pretrain.config import Config, build_config, merge
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from tools.study.options import StudyOptions, read_options
from tools.study.results import StudyResult

TUNING_SEED = 1000
"""Of the runs that rates are tried with: none that a method is compared by."""


@dataclass(frozen=True)
class StudyCell:
    """What one process does: a rate that is tried, or a trunk and its decays."""

    size: str
    method: str
    seed: int
    lr: float

    @property
    def tries(self) -> bool:
        return self.seed == TUNING_SEED

    @property
    def name(self) -> str:
        return f"{self.size}.{self.method}.{f'rate-{self.lr:g}' if self.tries else f'seed-{self.seed}'}"


@dataclass(frozen=True)
class StudyModel:
    """A model that a cell ends with."""

    cell: StudyCell
    share: float
    """Of the size's budget."""
    digest: str
    """Of all that the study's file says of its training."""


@dataclass(frozen=True)
class Study:
    """A study's file, and the folder in which it is worked on."""

    path: Path
    options: StudyOptions
    work: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def tokenizer(self) -> Path:
        given = self.options.tokenizer
        return self.path.parent / given if given else self.work / "tokenizer"

    def corpus(self, part: str) -> Path:
        """Return the prefix of a corpus: `train` or `valid`."""
        return self.work / part

    @cached_property
    def fingerprint(self) -> str:
        """Of what is read, corpora and weights to begin with; UserError where that is not there yet."""
        manifests = [load_manifest(self.corpus(part)) for part in ("train", "valid")]
        parts = [f"{each.fingerprint} {each.tokenizer and each.tokenizer.hash}" for each in manifests]
        trees = [self._tree(cell) for cell in self.cells([])]
        starts = {str(start) for tree in trees if (start := (tree.get("model") or {}).get("init_from"))}
        parts += [_weights(folder) for folder in sorted(starts)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()

    # ---- cells

    def methods(self, headline: bool = False) -> list[str]:
        """Return the methods; headline: those with the most seeds."""
        methods = self.options.methods
        most = max(method.seeds for method in methods.values())
        return [name for name, method in methods.items() if not headline or method.seeds == most]

    def rates(self, size: str, method: str) -> list[float]:
        """Return the learning rates among which a method's is chosen."""
        return self.options.methods[method].rates or self.options.sizes[size].rates

    def trials(self, size: str, method: str) -> list[StudyCell]:
        """Return the cells that choose a method's rate; a single one is not tried."""
        rates = self.rates(size, method)
        return [StudyCell(size, method, TUNING_SEED, lr) for lr in rates if len(rates) > 1]

    def chosen(self, size: str, method: str, results: Sequence[StudyResult]) -> float | None:
        """Return the rate with the least held-out loss; None before all were tried."""
        if not (trials := self.trials(size, method)):
            return self.rates(size, method)[0]
        losses = dict[float, float]()
        known = {result.digest: result for result in results}
        for cell in trials:
            if (result := known.get(self.targets(cell)[0].digest)) is None:
                return None
            losses[cell.lr] = result.scores["loss"]
        return min(losses, key=lambda lr: losses[lr])

    def cells(self, results: Sequence[StudyResult]) -> Iterator[StudyCell]:
        """Yield all cells in the order in which they are done, methods with most seeds first, seed by seed; a
        rate that is not chosen yet is the first one."""
        for size, options in self.options.sizes.items():
            methods = {
                name: method
                for name, method in self.options.methods.items()
                if name in (options.methods or self.options.methods)
            }
            for number in sorted({method.seeds for method in methods.values()}, reverse=True):
                group = [name for name, method in methods.items() if method.seeds == number]
                for seed in range(number):
                    for name in group:
                        if seed == 0:
                            yield from self.trials(size, name)
                        lr = self.chosen(size, name, results)
                        yield StudyCell(size, name, seed, lr or self.rates(size, name)[0])

    def todo(self, results: Sequence[StudyResult]) -> list[StudyCell]:
        """Return the cells that are not done."""
        done = {result.digest for result in results}
        return [
            cell
            for cell in self.cells(results)
            if not (cell.tries or self.chosen(cell.size, cell.method, results))
            or any(target.digest not in done for target in self.targets(cell))
        ]

    def ready(self, results: Sequence[StudyResult]) -> list[StudyCell]:
        """Return those that need not wait for a rate to be chosen."""
        todo = self.todo(results)
        return [cell for cell in todo if cell.tries or self.chosen(cell.size, cell.method, results)]

    def targets(self, cell: StudyCell) -> list[StudyModel]:
        """Return the models that a cell ends with, smallest first."""
        shares = [self.options.tuning] if cell.tries else self.options.shares
        budget, descent = self.options.sizes[cell.size].budget, self.options.descent
        about = [self._tree(cell), self.options.vocabulary, budget, None if cell.tries else descent]
        text = json.dumps(about, sort_keys=True)
        return [StudyModel(cell, share, _digest(f"{text} {share:g}")) for share in shares]

    def flops(self, cell: StudyCell) -> float:
        """Return what training a cell costs."""
        options = self.options
        if cell.tries:
            share = options.tuning
        else:
            share = options.shares[-1] * (1 - options.descent) + sum(options.shares) * options.descent
        return share * options.sizes[cell.size].budget

    def left(self, size: str, results: Sequence[StudyResult]) -> tuple[int, float, float]:
        """Return of a size the cells to do, their FLOPs, and the hours that one process takes for them: at
        the speed of the models that are done, if there are any."""
        done, cells = {result.digest for result in results}, [c for c in self.todo(results) if c.size == size]
        flops = sum(
            self._per_model(cell) * sum(t.digest not in done for t in self.targets(cell)) for cell in cells
        )
        known = [result for result in results if result.size == size]
        work = sum(self._per_model(StudyCell(size, each.method, each.seed, each.lr)) for each in known)
        speed = work / sum(each.seconds for each in known) if known else self.options.sizes[size].speed
        return len(cells), flops, flops / speed / 3600

    def _per_model(self, cell: StudyCell) -> float:
        return self.flops(cell) / (1 if cell.tries else len(self.options.shares))

    # ---- configs

    def _tree(self, cell: StudyCell) -> dict[str, Any]:
        """Return what a run's config says, but for where it lives and what it may spend."""
        method, size = self.options.methods[cell.method], self.options.sizes[cell.size]
        tree = merge(merge(self.options.config, size.config), method.config)
        model = tree.get("model") or {}
        if method.mask_from and (layers := model.get("num_layers")):
            tree = merge(tree, {"model": {"mask_from": max(1, round(method.mask_from * layers))}})
        seeds = {"seed": cell.seed, "data_seed": cell.seed}
        return merge(tree, {"run": seeds, "optimizer": {"lr": cell.lr}})

    def _config(self, cell: StudyCell, name: str, more: dict[str, Any]) -> Config:
        where = {
            "run": {"dir": str(self.folder(cell) / name)},
            "corpus": {"train": str(self.corpus("train")), "tokenizer": str(self.tokenizer)},
            "checkpoint": {"keep_last": 1, "every_minutes": 10},
        }
        tree = merge(merge(self._tree(cell), where), more)
        config = build_config(tree, f"{self.path}: {cell.size}, {cell.method}")
        if config.train.phases:
            raise UserError(f"{self.path}: {cell.method}: masking.rate cannot change in a study's trunk")
        return config

    def folder(self, cell: StudyCell) -> Path:
        """Return where a cell is worked on."""
        return self.work / "runs" / cell.name

    def trial(self, cell: StudyCell) -> Config:
        """Return the run that tries a rate; its warm-up is that of a trunk."""
        tuning = self.options.tuning
        schedule = {"kind": "trapezoid", "warmup": min(0.5, self._warmup(cell) / tuning)}
        budget = {"flops": tuning * self.options.sizes[cell.size].budget}
        return self._config(cell, "trial", {"schedule": schedule, "budget": budget})

    def trunk(self, cell: StudyCell) -> Config:
        """Return the run at a constant rate that all decays branch off; UserError if its budget has too few
        updates for that."""
        every, last = self._steps(cell), self.branch_step(cell, self.options.shares[-1])
        constant = self.options.shares[-1] * (1 - self.options.descent)
        more = {
            "schedule": {"floor": 1.0, "warmup": min(0.5, self._warmup(cell) / constant)},
            "budget": {"steps": last},
            "checkpoint": {"every_steps": every, "keep_last": 1000},
        }
        return self._config(cell, "trunk", more)

    def decay(self, target: StudyModel) -> Config:
        """Return the run that ends with a model, by a decay from a checkpoint of the trunk."""
        cell, share = target.cell, target.share
        branch = {"of": str(self.folder(cell) / "trunk"), "step": self.branch_step(cell, share)}
        more = {
            "run": {"branch": branch},
            "schedule": {"kind": "decay", "warmup": 0.0},
            "budget": {"flops": share * self.options.sizes[cell.size].budget},
        }
        return self._config(cell, decay_name(share), more)

    def _warmup(self, cell: StudyCell) -> float:
        """Return the share of the whole budget over which the rate rises."""
        return self._config(cell, "trunk", {"budget": {"steps": 1}}).schedule.warmup

    def branch_step(self, cell: StudyCell, share: float) -> int:
        """Return the update of the trunk at which the decay of a budget begins."""
        return int(self._begin(share) / self._grain) * self._steps(cell)

    def _begin(self, share: float) -> Fraction:
        return Fraction(f"{share:g}") * (1 - Fraction(f"{self.options.descent:g}"))

    @property
    def _grain(self) -> Fraction:
        """The largest share of the budget of which all decays begin at a multiple."""
        begins = [self._begin(share) for share in self.options.shares]
        lcm = math.lcm(*(each.denominator for each in begins))
        return Fraction(math.gcd(*(int(each * lcm) for each in begins)), lcm)

    def _steps(self, cell: StudyCell) -> int:
        """Return the updates of that share, between two checkpoints of the trunk."""
        budget = {"flops": self.options.sizes[cell.size].budget}
        config = self._config(cell, "trunk", {"budget": budget})
        (updates,) = make_recipe(config, self.options.vocabulary).budget.updates()
        if not (steps := round(self._grain * updates)):
            raise UserError(
                f"{self.path}: sizes.{cell.size}.budget = {budget['flops']:g} pays for {updates} updates of"
                f" {cell.method}, too few for decays from multiples of {float(self._grain):g} of it; raise it"
            )
        return steps


def decay_name(share: float) -> str:
    """Return the name of the run that a budget's model ends."""
    return f"decay-{share:g}"


def _weights(folder: str) -> str:
    """Return a digest of the weights in a folder of Hugging Face's; UserError where it has none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"model.init_from = {folder}: no *.safetensors there; export or download the model")
    return _digest(" ".join(hashlib.blake2b(file.read_bytes()).hexdigest() for file in files))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_study(path: Path, work: Path | None) -> Study:
    """Return a study, its file read and the configs of all its cells built; UserError says what is wrong."""
    study = Study(path, read_options(path), (work or Path("runs") / f"study-{path.stem}").absolute())
    for cell in study.cells([]):
        study.trial(cell) if cell.tries else study.trunk(cell)
    return study
