"""Makes a run that can step from its inputs and the ranks, and restores its newest checkpoint."""

import ctypes
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.account import energy, flops
from pretrain.account.budget import TOLERANCE, Course, price
from pretrain.account.ledger import Ledger, process_start, trunk
from pretrain.account.recipe import Phase, Recipe, make_recipe
from pretrain.account.schedule import rate
from pretrain.checkpoint import State
from pretrain.config import BranchOptions, Config, build_config, method_of
from pretrain.continuing import branched, carried, check_branches, check_continues, rates, run_segments
from pretrain.data.corpora import Data, open_blend
from pretrain.data.masking import masker
from pretrain.data.sampler import Blend, Segment
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.feed import Feed, prepare
from pretrain.files import check_folder, write_atomic
from pretrain.inputs import Inputs
from pretrain.model import float8, huggingface
from pretrain.model.late_mask import LateMaskModel, init_weights
from pretrain.model.loss import ExternalCrossEntropy
from pretrain.monitor import Monitor
from pretrain.parallel import tensor_parallel
from pretrain.parallel.deepspeed_engine import DeepSpeedEngine
from pretrain.parallel.engine import Engine, TorchEngine, compile_mode
from pretrain.parallel.launchers import job_end
from pretrain.parallel.topology import Topology, device_name, device_uuid, on_main, raise_on_all_ranks
from pretrain.parallel.updates import Updates
from pretrain.run_folder import RunFolder
from pretrain.signals import Signals
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
    """Number of the one that `blend` and `feed` are of."""
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
    updates: Updates = field(kw_only=True)
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


def build(
    inputs: Inputs,
    topology: Topology,
    folder: RunFolder,
    signals: Signals,
    watchdog: Watchdog | None = None,
) -> Run:
    """Make all parts of a run, and restore the newest checkpoint if there is one; the folder is claimed.

    watchdog: none where nobody is to watch.
    """
    recipe, config, data = inputs.recipe, inputs.recipe.config, inputs.data
    meter = open_meter(topology)
    with raise_on_all_ranks(topology):
        check_sensors(recipe.budget.unit, topology.device, meter.parts)
    # Up to here nothing is touched: what is refused leaves the run as it was.
    start = on_main(topology, lambda: _starting_point(folder, config, data))
    path, stamps = json.loads(start) if start else ("", None)
    with raise_on_all_ranks(topology):
        state = checkpoint.read_state(Path(path), stamps) if path else None
    branch = config.run.branch if path and Path(path).parent != folder.checkpoints else None
    if state:
        data = replace(data, rules=state.rules)
        state = branched(state, recipe, data) if branch else state
    number = state.phase if state else 0
    phase = recipe.phases[number]
    ledger = _open_ledger(recipe, topology, folder, state, branch, meter)
    with timed(ledger, "startup"):
        prepare_torch(bool(config.train.deterministic))
        if topology.device.type == "cpu":
            keep_freed_memory()
        segments = run_segments(config, data, state)
        with raise_on_all_ranks(topology):
            module = make_module(config, data.tokenizer, fresh=state is None)
        if config.model.init_from and state is None and topology.world_size > 1:
            refuse_other_weights(config.model.init_from, module, topology)
        engine = build_engine(phase.config, module, topology, phase.micro_batch(topology.data_size))
        if engine.deepspeed_json and topology.is_main:
            write_atomic(folder.path / "deepspeed.json", engine.deepspeed_json)
        blend, feed = read_phase(phase, topology, data, segments)
        run = Run(
            recipe=recipe,
            topology=topology,
            folder=folder,
            data=data,
            course=Course(recipe.budget, carried(state, config) if state else None),
            engine=engine,
            heldout=inputs.heldout,
            ledger=ledger,
            monitor=_open_monitor(config, topology, ledger),
            meter=meter,
            signals=signals,
            watchdog=watchdog or Watchdog(topology, folder, 0),
            updates=Updates(topology.device, _skipped(state), bool(engine.loss_scale)),
            deadline=_deadline(config) if topology.is_main else None,
            segments=segments,
            phase=number,
            blend=blend,
            feed=feed,
            writer=checkpoint.Writer() if recipe.copied_bytes else None,
        )
        if state:
            _restore(run, state, Path(path), stamps)
        if branch:  # nothing is its own yet
            run.saved, run.scored = -1, (-1, None)
    if ledger:
        run.milestones = _milestones(ledger, run)
    if ledger and state and branch:
        _say_branch(run, state, branch)
    elif ledger and state:
        _note_changes(ledger, run, state, layout(recipe, topology))
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


def open_meter(topology: Topology) -> energy.Meter:
    """Return this rank's sensors, running; the meter knows which parts are read on all nodes."""
    texts = topology.gather_text(f"{energy.host_name()} {device_uuid(topology.device)}")
    places = [(host, gpu) for host, _, gpu in (text.partition(" ") for text in texts)]
    meter = energy.open_meter(topology.rank, places)
    meter.start()
    readers = topology.add_up([int(part in meter.methods) for part in energy.PARTS])
    meter.parts = energy.known_parts(places, dict(zip(energy.PARTS, readers, strict=True)))
    return meter


def check_sensors(unit: str, device: torch.device, parts: Sequence[str]) -> None:
    """Raise UserError if the budget is of energy that nobody measures."""
    needed, sensor = ("gpu", "NVML") if device.type == "cuda" else ("cpu", "RAPL")
    if unit == "kwh" and needed not in parts:
        raise UserError(
            f"budget.kwh: no energy sensor can be read here on every node ({sensor}); have it made readable,"
            " or take another unit"
        )


def read_phase(
    phase: Phase, topology: Topology, data: Data, segments: Sequence[Segment]
) -> tuple[Blend, Feed]:
    """Make what reads and masks the samples of a phase."""
    config, batch_size = phase.config, phase.config.train.batch_size
    blend = open_blend(config, data, segments)
    bounded = config.corpus.documents == "bounded"
    mask = masker(config.masking, config.train.seq_length, data.tokenizer, bounded, data.rules)
    micro = phase.micro_batch(topology.data_size)
    return blend, Feed(prepare(batch_size, micro, topology, blend, mask), batch_size)


def _deadline(config: Config) -> float | None:
    """So long before the job's end that there is time to save; in a short job at most a fifth of it.

    The trap: a shell (of tmux, of salloc) keeps the variables of a job that is over.
    """
    end, now = job_end(os.environ), time.time()
    if end is None:
        return None
    if _is_over(end, now):
        logging.warning(
            "warning: SLURM_JOB_ID or SLURM_JOB_END_TIME is of a job that ended before this process began:"
            " its time limit is ignored; unset them"
        )
        return None
    return end - min(60 * config.checkpoint.end_margin_minutes, 0.2 * (end - now))


def _is_over(end: float, now: float) -> bool:
    """Return whether a job ended before this process began; by two clocks, of which one may be set."""
    return end <= min(process_start(), now)


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


def _starting_point(folder: RunFolder, config: Config, data: Data) -> str:
    """The checkpoint to go on from and the stamps of its files, as JSON, "" for none; the config becomes that
    of the folder."""
    start = ""
    checkpoint.refuse_gone(folder.path)
    if checkpoint.steps(folder.path):
        path, stamps = checkpoint.find_verified(folder.path)
        state = checkpoint.read_state(path, stamps)
        check_continues(state, config, data)
        checkpoint.point_at(path)
        start = json.dumps([str(path), stamps])
    elif branch := config.run.branch:
        path, stamps = checkpoint.find_verified(branch.of, branch.step)
        check_branches(checkpoint.read_state(path, stamps), config, data)
        start = json.dumps([str(path), stamps])
    folder.write_config(config)
    folder.keep_tokenizer(data.tokenizer.path, data.tokenizer.content)
    return start


def _open_ledger(
    recipe: Recipe,
    topology: Topology,
    folder: RunFolder,
    state: State | None,
    branch: BranchOptions | None,
    meter: energy.Meter,
) -> Ledger | None:
    """The ledger of rank 0, as early as it is known where the run goes on: a start-up costs too."""
    if not topology.is_main:
        return None
    device, ranks = device_name(topology.device), topology.world_size
    folder.add_provenance(device=device, ranks=ranks, launcher=topology.launcher)
    ledger = Ledger.open(folder.path, ranks, device)
    about: dict[str, Any] = {"layout": layout(recipe, topology), "job": slurm_job(os.environ)}
    about["sensors"] = {part: meter.methods[part] for part in meter.parts}  # rank 0 has one of each
    if "cpu" in meter.parts:
        about["host_share"] = round(meter.share, 4)
    step, head, account = (state.step, state.ledger_head, state.account) if state else (0, "", None)
    phase = state.phase if state else 0
    begun = {"of": branch.of, "trunk": trunk(branch.of, head, account)} if branch and account else None
    ledger.begin(step, head, folder.status().get("ledger_head", ""), account, phase, begun, **about)
    ledger.meter(dict.fromkeys(meter.parts, 0.0), meter.age())
    ledger.start_heartbeat()
    folder.write_status("running", ledger.totals().steps)
    return ledger


def layout(recipe: Recipe, topology: Topology) -> dict[str, Any]:
    """Return how the model is spread and computed, which may differ between attempts."""
    train, parallel = recipe.config.train, recipe.config.parallel
    return {
        "engine": train.engine,
        "ranks": topology.world_size,
        "tensor": parallel.tensor,
        "zero": parallel.zero,
        "device": device_name(topology.device),
        "micro_batch": recipe.phases[0].micro_batch(topology.data_size),
        "recompute": train.recompute,
        "deterministic": train.deterministic,
        "compile": train.compile,
        "cross_entropy": train.cross_entropy,
    }


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Return Slurm's names for where this runs, {} outside of it: what `tools.ledger reconcile` asks about.

    {} too where a shell has kept the names of a job that is over.
    """
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "STEP_ID", "CLUSTER_NAME")
    given = {name.lower(): environ.get(f"SLURM_{name}", "") for name in names}
    if not given["job_id"] or ((end := job_end(environ)) is not None and _is_over(end, time.time())):
        return {}
    return {name: value for name, value in given.items() if value}


def dropout_changes(config: Config, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what of a layout is other than before, in words, if dropout depends on it (`seed_dropout`)."""
    if not (config.model.dropout or config.model.decoder_dropout):
        return ""
    names = ("ranks", "tensor", "micro_batch", "compile")
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name])


def _say_branch(run: Run, state: State, branch: BranchOptions) -> None:
    """Says where a run begins, and with what learning rate."""
    assert run.ledger
    progress = run.course.follow(run.ledger.totals())
    run.course.pause()
    before = build_config(state.config, "config of the checkpoint")
    logging.info(
        "branch      of %s at step %d, %.1f%% of the budget; learning rate %.3g, there %.3g",
        branch.of,
        state.step,
        100 * progress,
        rate(run.config, progress),
        rate(before, make_recipe(before).budget.progress(run.ledger.totals())),
    )


def _note_changes(ledger: Ledger, run: Run, state: State, now_laid: dict[str, Any]) -> None:
    """Says and records what is other than in the attempt before; the ledger has noted another layout."""
    config, segments = run.config, run.segments
    if changes := dropout_changes(config, {**now_laid, **(state.layout or {})}, now_laid):
        logging.info("dropout     other elements are dropped from here on than would have been: %s", changes)
    before = build_config(state.config, "config of the checkpoint").budget.amount
    now = config.budget.amount
    if before != now:
        old, new = (f"{amount:g} {unit}" for unit, amount in (before, now))
        totals = ledger.totals()
        progress = run.course.follow(totals)
        run.course.pause()
        rate, next_rate = rates(state, config, progress, totals)
        logging.info("budget      changed: %s -> %s, of which %.1f%% is spent", old, new, 100 * progress)
        if rate != next_rate:
            logging.warning(
                "warning: with the budget the learning rate changes, from %.3g to %.3g; schedule.kind and"
                " schedule.floor of a new run.dir would not let it",
                rate,
                next_rate,
            )
        ledger.note("budget-change", before=old, now=new, lr_before=rate, lr_now=next_rate)
    if segments[-1].number > state.segments[-1][0]:
        blend = segments[-1]
        ledger.note("blend-change", segment=blend.number, first_sample=blend.first, blend=config.corpus.blend)


def _open_monitor(config: Config, topology: Topology, ledger: Ledger | None) -> Monitor | None:
    """What rank 0 shows."""
    if ledger is None:
        return None
    assert config.train.precision
    peak = flops.peak(device_name(topology.device), config.train.precision)
    totals, ranks = ledger.totals(), topology.world_size
    board, kind = config.monitor.tensorboard, config.monitor.tracker
    tracker = Tracker(kind, Path(config.run.dir), _flat(config)) if kind else None
    return Monitor(config.run.dir, method_of(config), totals, ranks, peak, board, tracker)


def _flat(config: Config) -> dict[str, Any]:
    """All options by their names on the command line."""
    sections = config.model_dump(mode="json").items()
    return {f"{section}.{key}": value for section, values in sections for key, value in values.items()}


def timed(ledger: Ledger | None, category: str) -> AbstractContextManager[None]:
    """Claims the time of a block for `category`, where there is a ledger."""
    return ledger.time(category) if ledger else nullcontext()
