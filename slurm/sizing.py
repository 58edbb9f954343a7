"""How many nodes and ranks a job needs, and whether what it reads is there."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain import checkpoint
from pretrain.account import epochs
from pretrain.account.devices import Device
from pretrain.account.recipe import Recipe
from pretrain.config import Config
from pretrain.data.corpora import Data, open_data
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.terminal import wrapped
from slurm import cluster, scheduler
from slurm.cluster import Cluster
from tools.plan.estimate import plan_recipe
from tools.plan.schema import RunPlan
from tools.text.files import find_files

NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of nodes that are tried where none is given."""


@dataclass(frozen=True)
class Shape:
    """Nodes of a job and ranks on each."""

    nodes: int
    tasks: int
    gpus: int
    """On each node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks


def read_site(args: argparse.Namespace) -> Cluster:
    """Return the site's file; the example where a dry run finds none. Warns of what jobs are not going to
    find."""
    path = args.cluster or cluster.DEFAULT
    if args.dry_run and not args.cluster and not path.is_file():
        warn(f"{path}: no such file; what follows is of {cluster.EXAMPLE}")
        return cluster.read(cluster.EXAMPLE)
    site = cluster.read(path)
    if site.container and not site.python:
        warn(
            f"{path}: SRUN or WRAP starts a container, in which jobs would call {sys.executable} of this"
            " machine; set PYTHON to the image's own, such as python3"
        )
    lost = scheduler.of_a_job(os.environ)
    if lost and not args.dry_run and "SLURM_JOB_ID" not in os.environ:  # then they may be wishes
        warn(f"{', '.join(lost)}: not passed on to jobs; export what they need in setup() of {path}")
    return site


def warn(message: str) -> None:
    print(wrapped(f"warning: {message}", sys.stderr), file=sys.stderr)


def device_of(site: Cluster, args: argparse.Namespace) -> Device | None:
    """Return what the ranks of a job drive; None where nothing is known of it."""
    return None if args.gpus_per_node == 0 and site.gpus_per_node else site.device  # that of the site's GPUs


def shape(
    runs: Mapping[str, Recipe], device: Device | None, site: Cluster, args: argparse.Namespace
) -> tuple[Shape, list[RunPlan]]:
    """Return the job that does for each of the runs, by name, and their plans; UserError if it cannot fit,
    with what does.

    Without --nodes: the fewest on which the parallel settings fit the site's device.
    """
    gpus = site.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node
    tasks = args.tasks_per_node or site.tasks_per_node or gpus or 1
    refusal = None
    for nodes in [args.nodes] if args.nodes else NODE_COUNTS:
        try:
            form = Shape(nodes, tasks, gpus)
            return form, [plan_recipe(each, form.ranks, device, name=name) for name, each in runs.items()]
        except UserError as error:
            refusal = refusal or error
    assert refusal
    raise refusal


def with_tokenizer(config: Config, args: argparse.Namespace) -> Config:
    """Return the config with the tokenizer that the corpus job finds, or the pieces of the one it makes."""
    tokenizer = tokenizer_of(config)
    if tokenizer is None:
        return config
    if any((tokenizer / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        corpus = config.corpus.model_copy(update={"tokenizer": str(tokenizer)})
        return config.model_copy(update={"corpus": corpus})
    model = config.model.model_copy(update={"vocab_size": vocabulary(config, args)})
    return config.model_copy(update={"model": model})


def vocabulary(config: Config, args: argparse.Namespace) -> int:
    """Return the pieces of a tokenizer that the corpus job makes."""
    own: int | None = config.model.vocab_size
    if args.vocab_size and own not in (None, args.vocab_size):
        raise UserError(f"--vocab-size {args.vocab_size}: model.vocab_size is {own}; leave one of them out")
    return own or args.vocab_size or 32_000


def settled(config: Config, recipe: Recipe) -> Config:
    """Return the config with an amount for a budget that is relative to another recipe, and the step of a
    trunk, which may be edited or go on before a job reads it."""
    return config.model_copy(update={"budget": recipe.config.budget, "run": recipe.config.run})


def check_files(config: Config, stages: Sequence[str], args: argparse.Namespace) -> Data | None:
    """Return what training is going to read; None where an earlier job makes it, or nothing is trained.

    UserError where a job would not find what it reads; a dry run, which may look at a cluster's jobs from
    anywhere, warns.
    """
    try:
        return _found(config, stages, args)
    except UserError as error:
        if not args.dry_run:
            raise
        warn(str(error))
        return None


def _found(config: Config, stages: Sequence[str], args: argparse.Namespace) -> Data | None:
    first, read = stages[0], config.corpus
    made = [Path(f"{read.train}{side}").absolute() for side in ("", "-valid")] if first == "corpus" else []
    if made and not Path(f"{read.train}.json").exists():  # else the job has nothing left to do
        find_files(args.input)
    if first not in ("corpus", "train") and not checkpoint.steps(Path(config.run.dir)):
        raise UserError(f"{config.run.dir}: has no checkpoint for {first}; begin the --pipeline with train")
    if "train" not in stages:
        return None
    if "evaluate" in stages and not read.valid:
        raise UserError("--pipeline evaluate: the config has no corpus.valid; name a held-out corpus")
    if read.valid and Path(read.valid).absolute() not in made:
        load_manifest(read.valid)
        IndexedReader(read.valid)
    if made:
        with suppress(UserError):  # as an earlier submission made it
            return open_data(read)
        return None
    return open_data(read)


def tokenizer_of(config: Config) -> Path | None:
    """Return the folder of the tokenizer that the corpus job uses, or makes; None for a blend."""
    if not isinstance(config.corpus.train, str):
        return None
    return Path(config.corpus.tokenizer or Path(config.corpus.train).parent / "tokenizer").absolute()


def shape_of_array(site: Cluster, args: argparse.Namespace) -> Shape:
    """Return that of each command: nodes as cluster.env has them with --nodes; else one GPU, or one
    process without."""
    gpus = site.gpus_per_node if args.nodes else min(1, site.gpus_per_node)
    if args.gpus_per_node is not None:
        gpus = args.gpus_per_node
    tasks = args.tasks_per_node or (site.tasks_per_node if args.nodes else None)
    return Shape(args.nodes or 1, tasks or gpus or 1, gpus)


def size_line(form: Shape, estimates: Sequence[RunPlan]) -> str:
    """Return what the plan says of a job, or of the largest of several, for people."""
    words = f"nodes x ranks: {form.nodes} x {form.tasks}"
    gigabytes = max(each.memory_bytes_per_rank.total for each in estimates) / 1e9
    hours = [each.hours for each in estimates if each.hours]
    if gigabytes >= 0.05:
        words += f"; {gigabytes:,.1f} GB a rank"
    shared = [each.mapped_bytes_per_node for each in estimates]
    if mapped := max(one.total if one else 0 for one in shared) // 10**8:
        words += f", {mapped / 10:,.1f} GB of documents' places a node"
    if hours:
        words += f", about {max(hours):,.1f} hours of training"
    if len(hours) > 1:
        words += f", {sum(hours):,.1f} in all {len(hours)}"
    return words


def epochs_of(recipe: Recipe, estimate: RunPlan) -> str:
    """Return the updates that hours buy by the plan, and how often the corpora are read, as far as they are
    there; warns if that is absurd."""
    words, read = "", estimate.epochs
    if recipe.budget.measured and estimate.steps:
        words = f", about {estimate.steps:,} updates"
    if text := epochs.warning(read):
        warn(text)
    return words if read is None else f"{words}, {read:,.2f} epochs"
