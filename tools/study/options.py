"""Every option of a study, with its default and its meaning: the one page of reference."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pretrain.config import read_yaml
from pretrain.config.options import Section
from pretrain.errors import UserError

RunSections = dict[str, dict[str, Any] | None]
"""Of a run's config, by name."""


class SizeOptions(Section):
    """An encoder, and what a run of it may spend."""

    budget: float = Field(gt=0)
    """FLOPs of a run, those of head and optimizer included."""
    speed: float = Field(gt=0)
    """FLOP/s of a process, evaluations included: what `--plan` reckons with until there are results."""
    rates: list[float]
    """Peak learning rates that are tried for each method; a single one is taken untried."""
    methods: list[str] = []
    """Methods that are compared at it; none are named: all."""
    config: RunSections = {}
    """Sections of a run's config."""


class MethodOptions(Section):
    """What is compared."""

    config: RunSections = {}
    """Sections of a run's config, over those of the size and of the study."""
    mask_from: float = Field(0, ge=0, le=1)
    """Share of the encoder's layers before which the [MASK] rows join; 0: ordinary MLM, 1: in the decoder."""
    seeds: int = Field(3, ge=1)
    """Runs. Methods with more seeds than others come first, seed by seed."""
    rates: list[float] = []
    """Peak learning rates that are tried instead of a size's, as many as those; none: the size's."""
    against: str = ""
    """A second method that it is compared with, such as ordinary MLM with the same optimizer."""


class ScoreOptions(Section):
    """What every model is asked. Names are of files and folders in the study's data."""

    samples: int = Field(2048, ge=1)
    """Held-out windows, as long as `evaluate.seq_length` of the run's config, else as in training."""
    pairs: list[str] = []
    """Minimal pairs, of every model."""
    last_pairs: list[str] = []
    """Minimal pairs of the last budget's models alone."""
    tasks: str = ""
    """Folder of labelled tasks, for the next two."""
    probe: list[str] = []
    """Tasks on which the last budget's encoders are probed."""
    probe_rows: int = Field(2000, ge=5)
    """Rows of train, at most."""
    finetune: list[str] = []
    """Tasks on which they are fine-tuned, of methods with the most seeds."""
    finetune_rows: int = Field(2000, ge=2)
    """Rows of train, at most."""
    finetune_seeds: int = Field(3, ge=1)
    """Fine-tunings of an encoder."""
    rank_tokens: int = Field(0, ge=0)
    """Tokens from which the effective rank of the last budget's encoders is taken; 0: not taken."""


class StudyOptions(Section):
    """A study."""

    text: list[str] = Field(min_length=1)
    """Files of training text in the data folder, or patterns."""
    held_out: list[str] = Field(min_length=1)
    """Files of held-out text."""
    vocabulary: int = Field(4096, ge=8)
    """Pieces of the tokenizer, which is trained on `text`."""
    tokenizer: str = ""
    """Folder of a tokenizer beside the study's file; taken instead of training one."""
    config: RunSections = {}
    """Sections of the config of every run."""
    sizes: dict[str, SizeOptions] = Field(min_length=1)
    methods: dict[str, MethodOptions]
    baseline: str
    """The method whose final loss and accuracy are to be reached."""
    tuning: float = Field(0.3, gt=0, le=1)
    """Share of the budget that each learning rate that is tried may spend."""
    shares: list[float] = [0.5, 0.6, 0.7, 0.8, 1.0]
    """Shares of the budget at which a model is finished: a decay ends there."""
    descent: float = Field(0.2, gt=0, lt=1)
    """Share of a model's own budget that its decay takes."""
    evaluate: ScoreOptions = ScoreOptions()


_SET = {
    *("run", "budget", "checkpoint", "corpus.train", "corpus.valid", "corpus.tokenizer", "model.mask_from"),
    *("optimizer.lr", "schedule.kind", "schedule.floor", "train.phases"),
}
"""Sections and keys of a config that the study sets."""


def read_options(path: Path) -> StudyOptions:
    """Return the options of a file; UserError lists every problem, one a line."""
    try:
        options = StudyOptions.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError("\n".join(lines)) from None
    if problems := list(_problems(options)):
        raise UserError("\n".join(f"{path}: {each}" for each in problems))
    return options


def _problems(options: StudyOptions) -> Iterator[str]:
    trees = {"config": options.config}
    trees |= {f"sizes.{name}.config": size.config for name, size in options.sizes.items()}
    trees |= {f"methods.{name}.config": method.config for name, method in options.methods.items()}
    for where, tree in trees.items():
        keys = [*tree, *(f"{name}.{key}" for name, keys in tree.items() for key in keys or ())]
        for key in _SET.intersection(keys):
            yield f"{where}: {key} is the study's to set; leave it out"
    names = {"baseline": options.baseline}
    names |= {f"methods.{name}.against": method.against for name, method in options.methods.items()}
    named = [(f"sizes.{size}.methods", name) for size, one in options.sizes.items() for name in one.methods]
    for where, name in [*names.items(), *named]:
        if name and name not in options.methods:
            yield f"{where} = {name!r}: no such method; there are {', '.join(options.methods)}"
    for name in [*options.sizes, *options.methods]:
        if not name.replace("-", "").isalnum():
            yield f"{name!r}: a size or method is named by letters, digits and dashes; rename it"
    shares = options.shares
    if sorted(set(shares)) != shares or not shares or not 0 < shares[0] <= shares[-1] <= 1:
        yield f"shares = {shares}: should ascend, above 0 and up to 1"
    rates = {f"sizes.{name}": size.rates for name, size in options.sizes.items()}
    own = {f"methods.{name}": method.rates for name, method in options.methods.items() if method.rates}
    for name, tried in (rates | own).items():
        if not tried or min(tried) <= 0 or len(set(tried)) < len(tried):
            yield f"{name}.rates = {tried}: should be different learning rates above 0"
    for (name, tried), size in itertools.product(own.items(), options.sizes.values()):
        if len(tried) != len(size.rates):
            yield f"{name}.rates: {len(tried)} of them; all methods try as many, {len(size.rates)}"
