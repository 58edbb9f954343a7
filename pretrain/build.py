"""Makes the parts of a run that can step, as the checkpoint has them that it starts from."""

import ctypes
import hashlib
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.account import devices, energy, flops
from pretrain.account.budget import TOLERANCE, Course, price
from pretrain.account.ledger_writer import Ledger, timed
from pretrain.account.recipe import Recipe
from pretrain.checkpoint import State
from pretrain.config import Config, method_of
from pretrain.data import rng
from pretrain.data.corpora import Data
from pretrain.data.sampler import Blend, Segment
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.feed import Feed
from pretrain.files import check_folder, write_atomic
from pretrain.inputs import Inputs
from pretrain.model import float8, huggingface
from pretrain.model.late_mask import LateMaskModel, init_weights
from pretrain.model.loss import ExternalCrossEntropy
from pretrain.monitor import Monitor
from pretrain.parallel import tensor_parallel
from pretrain.parallel.deepspeed_engine import DeepSpeedEngine
from pretrain.parallel.engine import Engine, TorchEngine, compile_mode
from pretrain.parallel.topology import Topology, device_name, raise_on_all_ranks
from pretrain.parallel.update_statistics import UpdateStatistics
from pretrain.run_folder import RunFolder
from pretrain.signals import Signals
from pretrain.start import Start
from pretrain.tracker import Tracker
from pretrain.watchdog import Watchdog


def build_engine(config: Config, model: LateMaskModel, topology: Topology, micro: int) -> Engine:
    """Divides an initialised model over the ranks and gives it an optimizer.

    micro: sequences of a micro-batch. UserError if keys of `deepspeed` contradict others, or a kernel is
    not here.
    """
    train, known = config.train, model.cross_entropy.vocab_size
    if train.cross_entropy != "own":
        model.cross_entropy = ExternalCrossEntropy(known, train.cross_entropy, topology.device)
    tensor_parallel.shard(model, topology)
    model.to(topology.device)
    if train.float8:
        float8.convert(model, topology.device)
    if train.compile != "none":
        # Training and scoring, kinds of layers, lengths of phases: torch's eight forms of a layer are soon
        # used up, and all others would run uncompiled without a word that users see.
        torch._dynamo.config.recompile_limit = COMPILED_FORMS
        model.cross_entropy.fuse()
        for layer in model.all_layers():
            layer.compile(mode=compile_mode(config), dynamic=False)
    if train.engine == "deepspeed":
        return DeepSpeedEngine(config, model, topology, micro)
    return TorchEngine(config, model, topology, micro)


COMPILED_FORMS = 64
"""Of a layer, by the shapes and strides that it is given."""
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h


@dataclass
class Run:
    """The parts, and the numbers that move."""

    recipe: Recipe
    topology: Topology
    folder: RunFolder
    data: Data
    course: Course
    """Followed on rank 0."""
    engine: Engine
    heldout: HeldOut | None
    ledger: Ledger | None
    """On rank 0."""
    monitor: Monitor | None
    """On rank 0."""
    meter: energy.Meter
    signals: Signals
    watchdog: Watchdog
    deadline: float | None
    """Unix time at which to stop, on rank 0 of a job with a time limit."""
    segments: list[Segment]
    phase: int
    """Index of the one that `blend` and `feed` are of."""
    blend: Blend
    feed: Feed
    seen: set[int] = field(default_factory=set)
    """Phases that this attempt has made updates in."""
    step: int = 0
    samples: int = 0
    saved: int = -1
    """Step of the last checkpoint."""
    saved_at: float = field(default_factory=time.monotonic)
    stopped: float = 0.0
    """Seconds for which the last save stopped training."""
    scored: tuple[int, float | None] = (-1, None)
    """(step, loss) of the last evaluation."""
    rate: float = 0.0
    """Learning rate of the last update."""
    writer: checkpoint.Writer | None = None
    """Where checkpoints are written while training goes on."""
    milestones: set[float] = field(default_factory=set)
    """Shares of `checkpoint.keep` that are done with: kept, or passed before this attempt."""
    statistics: UpdateStatistics = field(kw_only=True)
    grad_norm: Tensor | None = None
    """Of the last update, before clipping; None where the engine does not tell."""

    @property
    def config(self) -> Config:
        """Return the config, of which nothing is open."""
        return self.recipe.config

    @property
    def cost(self) -> flops.StepCost:
        """Return the cost of an update of this phase."""
        return self.recipe.phases[self.phase].cost

    def seed_dropout(self, number: int, data_rank: int) -> None:
        """Seed dropout of a micro-batch, a function of (seed, step, number, data rank): nothing to save.

        Ranks that share a model draw alike, so that replicated activations lose the same elements. It is none
        of the sample: a GPU's fused attention draws for a whole batch, so scores would have to be in memory
        (as on a CPU, where it would cost nothing), and compiled code draws in a way of its own.
        """
        if self.config.model.dropout or self.config.model.decoder_dropout:
            name = f"dropout {self.step} {number} {data_rank}"
            torch.manual_seed(rng.name_seed(self.config.run.seed, name))


def build(inputs: Inputs, start: Start, signals: Signals, watchdog: Watchdog | None = None) -> Run:
    """Make all parts of a run, as the checkpoint that it starts from has them.

    watchdog: none where nobody is to watch.
    """
    recipe, config = inputs.recipe, inputs.recipe.config
    phase = recipe.phases[start.phase]
    topology, folder = start.topology, start.folder
    ledger, state = start.ledger, start.state
    with timed(ledger, "startup"):
        prepare_torch(bool(config.train.deterministic))
        if topology.device.type == "cpu":
            keep_freed_memory()
        with raise_on_all_ranks(topology):
            module = make_module(config, start.data.tokenizer, fresh=state is None)
        if config.model.init_from and state is None and topology.world_size > 1:
            refuse_other_weights(config.model.init_from, module, topology)
        engine = build_engine(phase.config, module, topology, phase.micro_batch(topology.data_size))
        if engine.deepspeed_json and topology.is_main:
            write_atomic(folder.path / "deepspeed.json", engine.deepspeed_json)
        run = Run(
            recipe=recipe,
            topology=topology,
            folder=folder,
            data=start.data,
            course=start.course,
            engine=engine,
            heldout=inputs.heldout,
            ledger=ledger,
            monitor=_open_monitor(config, topology, ledger),
            meter=start.meter,
            signals=signals,
            watchdog=watchdog or Watchdog(topology, folder, 0),
            statistics=UpdateStatistics(topology.device, _skipped(state), bool(engine.loss_scale)),
            deadline=start.deadline,
            segments=start.segments,
            phase=start.phase,
            blend=start.blend,
            feed=start.feed,
            writer=checkpoint.Writer() if recipe.saves_beside_training else None,
        )
        if state:
            _restore(run, state, start.path, start.stamps)
        if start.branch:  # nothing is its own yet
            run.saved, run.scored = -1, (-1, None)
    if ledger:
        run.milestones = _milestones(ledger, run)
    return run


def _skipped(state: State | None) -> float:
    """Updates that were skipped up to a checkpoint; older programs counted those in fp16 only."""
    return 0.0 if state is None else state.skipped or (state.loss_scale or {}).get("skipped", 0.0)


def _restore(run: Run, state: State, path: Path, stamps: checkpoint.Stamps | None) -> None:
    """Give a run the tensors and the numbers of a checkpoint."""
    with raise_on_all_ranks(run.topology):
        checkpoint.load(path, run.engine, stamps)
    run.engine.optimizer_step = state.optimizer_step
    if run.engine.loss_scale and state.loss_scale:
        run.engine.loss_scale.load(state.loss_scale)
    run.step, run.samples, run.saved = state.step, state.samples, state.step
    run.scored = (state.step, state.loss) if state.loss is not None else (-1, None)


def _milestones(ledger: Ledger, run: Run) -> set[float]:
    """Return the milestones that are done with, and say which were passed before anybody asked for them.

    One that the last update passed is none of these: the weights are its. Nor is one of another budget, of
    which it was another step: it is replaced when its share comes again.
    """
    checkpoint.retire_weights(run.folder, run.step)
    shares, budget = run.config.checkpoint.keep, run.recipe.budget
    there = {share for share in shares if checkpoint.has_milestone(run.folder, share, run.config)}
    progress = run.course.progress  # of hours and kWh, of which a start-up is no part
    if progress is None or not budget.measured:
        progress = budget.progress(ledger.totals()) - (price(run.cost, budget.unit) or 0.0) / budget.total
    passed = {share for share in shares if run.step and share <= progress + TOLERANCE} - there
    if passed:
        said = ", ".join(f"{share:g}" for share in sorted(passed))
        logging.warning("warning: checkpoint.keep: %s of the budget are past; nothing is kept of them", said)
    return there | passed


def make_module(config: Config, tokenizer: Tokenizer, fresh: bool) -> LateMaskModel:
    """Make the whole model; where a run is `fresh`, with the weights that `model.init_from` has."""
    recompute = config.train.recompute == "block"
    module = LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask, recompute)
    init_weights(module, config.run.seed)
    if fresh and config.model.init_from:
        new = huggingface.load_folder(module, config.model, tokenizer)
        parts = Counter(name.partition(".")[0] for name in new)
        said = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items()) or "nothing"
        logging.info("init_from   %s; new here: %s", config.model.init_from, said)
    return module


def refuse_other_weights(folder: str, module: torch.nn.Module, topology: Topology) -> None:
    """Raise UserError where ranks have read other weights in `init_from`: each reads the folder for
    itself."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy())
    first = topology.broadcast_text(digest.hexdigest())
    with raise_on_all_ranks(topology):
        if digest.hexdigest() != first:
            raise UserError(
                f"model.init_from = {folder}: rank {topology.rank} reads other weights there than rank 0; put"
                " the same model on every node"
            )


def prepare_torch(deterministic: bool) -> None:
    """Set torch's process-wide switches."""
    if deterministic:  # asked for by cuBLAS, and read when the first product on a GPU is formed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Or each new tensor would first be filled with what is no number, for code that reads what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic


def keep_freed_memory() -> None:
    """Lets the C library (glibc) keep what is freed, for the whole process.

    It would map every large tensor of every step anew, and the kernel would fill its pages with zeros:
    an eighth of a step in bf16.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def check_start(inputs: Inputs) -> None:
    """Refuse what a first start would, but for its inputs; leaves nothing."""
    config = inputs.recipe.config
    check_folder(config.run.dir)
    if config.model.init_from:
        make_module(config, inputs.data.tokenizer, fresh=True)


def _open_monitor(config: Config, topology: Topology, ledger: Ledger | None) -> Monitor | None:
    """What rank 0 shows."""
    if ledger is None:
        return None
    assert config.train.precision
    peak = devices.peak(device_name(topology.device), config.train.precision)
    totals, ranks = ledger.totals(), topology.world_size
    board, kind = config.monitor.tensorboard, config.monitor.tracker
    tracker = Tracker(kind, Path(config.run.dir), _flat(config)) if kind else None
    return Monitor(config.run.dir, method_of(config), totals, ranks, peak, board, tracker)


def _flat(config: Config) -> dict[str, Any]:
    """All options by their names on the command line."""
    sections = config.model_dump(mode="json").items()
    return {f"{section}.{key}": value for section, values in sections for key, value in values.items()}
