"""A run: `build` makes its parts once, `train` is a loop that names every effect in order.

Rank 0 has the ledger and the clock; what it decides (the next step fits the budget, a save is due) and
what any rank was told (a signal) travel in one small all-reduce per step, so that all ranks take the same
turn. Nothing else is shared but gradients.
"""

import ctypes
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain import budget, checkpoint, config, energy, engine, flops, huggingface, model, rng, schedule
from pretrain.budget import Budget, step_cost
from pretrain.checkpoint import RunFolder, State
from pretrain.config import Config, UserError
from pretrain.corpus import IndexedReader, load_manifest, open_nearest, refuse_appended_end, tokenizer_folder
from pretrain.evaluate import HeldOut, masker
from pretrain.ledger import Ledger, peak_resident, process_start
from pretrain.loss_scale import LEAST, hopeless
from pretrain.masking import Masker
from pretrain.model import Batch
from pretrain.monitor import Monitor
from pretrain.sampler import (
    Blend,
    Sampler,
    Segment,
    continue_segments,
    share_of_rank,
    used_samples,
)
from pretrain.signals import Signals
from pretrain.tokenizer import Tokenizer, load_tokenizer
from pretrain.topology import Topology, device_name, device_uuid, job_end

DONE, STOPPED = 0, 75
"""Exit codes: the budget is spent; stopped early on request, start me again."""

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h
_TIME_LIMIT = "the job's time limit"  # as a reason to stop
_PROGRESS_UNITS = 2**53  # progress travels as an integer, cut to sixteen digits


# ---- what a run reads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The corpora and the tokenizer of a run, checked against each other."""

    tokenizer: Tokenizer
    corpora: list[IndexedReader]
    blend: list[tuple[float, str]]
    """(weight, fingerprint) of each of them."""
    fingerprints: dict[str, str]
    rules: int = rng.RULES
    """By which samples and masks are drawn: those that the run began with."""


def open_data(options: config.Corpus) -> Data:
    """Opens what `options` names; UserError if something is missing or does not fit together."""
    folder, blend = tokenizer_folder(options), []
    tokenizer = load_tokenizer(folder)
    for weight, prefix in options.blend:
        manifest = load_manifest(prefix)
        if manifest.tokenizer and manifest.tokenizer.hash != tokenizer.hash:
            raise UserError(
                f"corpus.tokenizer = {folder}: not the one that {prefix} was encoded with"
                f" ({manifest.tokenizer.path}); give that one, or encode the corpus again"
            )
        refuse_appended_end(prefix, manifest)
        blend.append((weight, manifest.fingerprint))
    fingerprints = {"tokenizer": tokenizer.hash}
    if len(blend) == 1:
        fingerprints["train"] = blend[0][1]
    corpora = [open_nearest(prefix, options.copies) for _, prefix in options.blend]
    return Data(tokenizer, corpora, blend, fingerprints)


def open_blend(options: Config, data: Data, segments: Sequence[Segment] = ()) -> Blend:
    """What reads the samples of a run, in the last of its segments."""
    k, length, tokenizer = options.masking, options.train.seq_length, data.tokenizer
    seed, bos, eos = options.run.data_seed, tokenizer.bos, tokenizer.eos
    samplers = [
        Sampler(corpus, k, length, seed, bos, eos, name, data.rules)
        for corpus, (_, name) in zip(data.corpora, data.blend, strict=True)
    ]
    by_name = {name: sampler for (_, name), sampler in zip(data.blend, samplers, strict=True)}
    used = used_samples(segments, by_name)
    first = segments[-1].first if segments else 0
    weights = [weight for weight, _ in data.blend]
    return Blend(samplers, weights, first, [used[name] for _, name in data.blend])


def run_segments(options: Config, data: Data, state: State | None) -> list[Segment]:
    """The segments of a run that starts, or goes on from a checkpoint; UserError if the blend changed."""
    length = config.phases(options)[0].train.seq_length
    if state is None:
        return continue_segments([], options.corpus.segment, data.blend, 0, length)
    past = [
        Segment(number, first, tuple((weight, name) for weight, name in blend), *rest)
        for number, first, blend, *rest in state.segments
    ]
    return continue_segments(past, options.corpus.segment, data.blend, state.samples, length)


def resolve(options: Config, vocab_size: int, device: torch.device) -> Config:
    """The config with the defaults that depend on the vocabulary and the device filled in."""
    if options.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size = {options.model.vocab_size}, but the tokenizer has {vocab_size} pieces; leave"
            " it out"
        )
    train = options.train
    precision = train.precision or ("bf16" if _has_bf16(device) else "fp32")
    deterministic = device.type == "cpu" if train.deterministic is None else train.deterministic
    sized = options.model_copy(
        update={
            "model": options.model.model_copy(update={"vocab_size": vocab_size}),
            "train": train.model_copy(update={"precision": precision, "deterministic": deterministic}),
        }
    )
    return budget.resolve(sized)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def micro_batch(options: Config, data_size: int) -> int:
    """Sequences per forward pass of one data-parallel rank; UserError if the batch does not divide."""
    batch, micro = options.train.batch_size, options.train.micro_batch_size
    if batch % (data_size * (micro or 1)):
        raise UserError(
            f"train.batch_size = {batch} is no multiple of data-parallel ranks x micro_batch_size ="
            f" {data_size} x {micro or 1}; change one of them"
        )
    return micro or batch // data_size


# ---- the parts of a run --------------------------------------------------------------------------


class Feed:
    """Prepares the next update's micro-batches on a thread of its own while this one is computed."""

    def __init__(self, prepare: Callable[[int], list[Batch]], samples_per_step: int) -> None:
        self._prepare, self._stride = prepare, samples_per_step
        self._pool = ThreadPoolExecutor(1, "feed")
        self._ready: tuple[int, Future[list[Batch]]] | None = None
        self.waited = 0.0
        """Seconds that `take` has waited."""

    def take(self, first: int) -> list[Batch]:
        """The micro-batches of the update that starts at sample `first`."""
        begin = time.perf_counter()
        if self._ready is None or self._ready[0] != first:
            self._ready = first, self._pool.submit(self._prepare, first)
        batches = self._ready[1].result()
        self._ready = first + self._stride, self._pool.submit(self._prepare, first + self._stride)
        self.waited += time.perf_counter() - begin
        return batches

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Turn(NamedTuple):
    """What all ranks agreed on at a step's boundary."""

    stop: bool
    step_fits: bool
    save_due: bool
    progress: float
    phase: int
    """Of the next update."""
    late: bool
    """It is the job's time limit that says stop."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one length and batch size."""

    config: Config
    """`train` has the values that hold here."""
    cost: flops.StepCost
    micro: int


@dataclass
class Run:
    """The parts, and the numbers that move."""

    config: Config
    topology: Topology
    folder: RunFolder
    data: Data
    budget: Budget
    phases: list[Phase]
    engine: engine.Engine
    heldout: HeldOut | None
    ledger: Ledger | None
    """On rank 0."""
    monitor: Monitor | None
    """On rank 0."""
    meter: energy.Meter
    signals: Signals
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
    scored: tuple[int, float | None] = (-1, None)
    """(step, loss) of the last evaluation."""
    grad_norm: Tensor | None = None
    """Of the last update, before clipping; None where the engine does not tell."""

    @property
    def cost(self) -> flops.StepCost:
        """Of an update of this phase."""
        return self.phases[self.phase].cost


def build(options: Config, topology: Topology, folder: RunFolder, signals: Signals) -> Run:
    """Reads, checks and makes everything, and restores the newest checkpoint if there is one."""
    on_main(topology, folder.claim)
    meter = open_meter(topology)
    with together(topology):
        data = open_data(options.corpus)
        options = resolve(options, data.tokenizer.vocab_size, topology.device)
        phases = [
            Phase(phase, step_cost(phase), micro_batch(phase, topology.data_size))
            for phase in config.phases(options)
        ]
        check_sensors(options, topology.device, meter.parts)
    start = on_main(topology, lambda: _starting_point(folder, options, data))
    state = checkpoint.read_state(Path(start)) if start else None
    if state:
        data = replace(data, rules=state.rules)
    ledger = _open_ledger(options, topology, folder, state, meter)
    with timed(ledger, "startup"):
        segments = run_segments(options, data, state)
        with together(topology):
            module = _module(options, data.tokenizer, fresh=state is None)
        run = _assemble(
            options,
            topology,
            folder,
            data,
            phases,
            state.phase if state else 0,
            segments,
            ledger,
            module,
            signals,
            meter,
        )
        if state:
            checkpoint.load(Path(start), run.engine)
            run.engine.optimizer_step = state.optimizer_step
            if run.engine.loss_scale and state.loss_scale:
                run.engine.loss_scale.load(state.loss_scale)
            run.step, run.samples, run.saved = state.step, state.samples, state.step
            run.scored = (state.step, state.loss) if state.loss is not None else (-1, None)
    if ledger and state:
        _note_changes(ledger, options, state, segments)
    return run


def open_meter(topology: Topology) -> energy.Meter:
    """This rank's sensors, running; it knows which parts are read on all nodes."""
    texts = topology.gather_text(f"{energy.host_name()} {device_uuid(topology.device)}")
    places = [(host, gpu) for host, _, gpu in (text.partition(" ") for text in texts)]
    meter = energy.open_meter(topology.rank, places)
    meter.start()
    readers = topology.add_up([int(part in meter.methods) for part in energy.PARTS])
    meter.parts = energy.known_parts(places, dict(zip(energy.PARTS, readers, strict=True)))
    return meter


def check_sensors(options: Config, device: torch.device, parts: Sequence[str]) -> None:
    """UserError if the budget is of energy that nobody measures."""
    needed, sensor = ("gpu", "NVML") if device.type == "cuda" else ("cpu", "RAPL")
    if options.budget.amount[0] == "kwh" and needed not in parts:
        raise UserError(
            f"budget.kwh: no energy sensor can be read here on every node ({sensor}); have it made readable,"
            " or take another unit"
        )


def _assemble(
    options: Config,
    topology: Topology,
    folder: RunFolder,
    data: Data,
    phases: list[Phase],
    number: int,
    segments: list[Segment],
    ledger: Ledger | None,
    module: model.LateMaskModel,
    signals: Signals,
    meter: energy.Meter,
) -> Run:
    """The parts of a run that has not started."""
    t, tokenizer = options.train, data.tokenizer
    prepare_torch(bool(t.deterministic))
    if topology.device.type == "cpu":
        keep_freed_memory()
    heldout = None
    with together(topology):
        for phase in phases:
            open_blend(phase.config, data)  # refuses a corpus that is too small for its length
        bounded = options.corpus.documents == "bounded"
        if options.corpus.valid:
            length = options.evaluate.seq_length or t.seq_length
            heldout = HeldOut(options.corpus.valid, tokenizer, length, options.evaluate.samples, bounded)
        budget.check(options)
    phase = phases[number]
    built = engine.build(phase.config, module, topology, phase.micro)
    if built.deepspeed_json and topology.is_main:
        checkpoint.write_atomic(folder.path / "deepspeed.json", built.deepspeed_json)
    blend, feed = read_phase(phase, topology, data, segments)
    return Run(
        config=options,
        topology=topology,
        folder=folder,
        data=data,
        budget=Budget(options),
        phases=phases,
        engine=built,
        heldout=heldout,
        ledger=ledger,
        monitor=_open_monitor(options, topology, ledger),
        meter=meter,
        signals=signals,
        deadline=_deadline(options) if topology.is_main else None,
        segments=segments,
        phase=number,
        blend=blend,
        feed=feed,
    )


def read_phase(
    phase: Phase, topology: Topology, data: Data, segments: Sequence[Segment]
) -> tuple[Blend, Feed]:
    """What reads and masks the samples of a phase."""
    o = phase.config
    blend = open_blend(o, data, segments)
    bounded = o.corpus.documents == "bounded"
    mask = masker(o.masking, o.train.seq_length, data.tokenizer, bounded, data.rules)
    return blend, Feed(_prepare(o, topology, blend, mask, phase.micro), o.train.batch_size)


def _deadline(options: Config) -> float | None:
    """So long before the job's end that there is time to save; in a short job at most a fifth of it.

    The trap: a shell (of tmux, of salloc) keeps the variables of a job that is over.
    """
    end, now = job_end(os.environ), time.time()
    if end is None:
        return None
    if end <= min(process_start(), now):  # two clocks, of which one may be set
        logging.warning(
            "warning: SLURM_JOB_ID or SLURM_JOB_END_TIME is of a job that ended before this process began:"
            " its time limit is ignored; unset them"
        )
        return None
    return end - min(60 * options.checkpoint.end_margin_minutes, 0.2 * (end - now))


def _module(options: Config, tokenizer: Tokenizer, fresh: bool) -> model.LateMaskModel:
    """The whole model; where a run is `fresh`, with the weights that `model.init_from` has."""
    t = options.train
    module = model.LateMaskModel(options.model, tokenizer.vocab_size, tokenizer.mask, t.recompute == "block")
    model.init_weights(module, options.run.seed)
    if fresh and options.model.init_from:
        new = huggingface.load_folder(module, options.model, tokenizer)
        parts = Counter(name.partition(".")[0] for name in new)
        said = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items()) or "nothing"
        logging.info("init_from   %s; new here: %s", options.model.init_from, said)
    return module


def prepare_torch(deterministic: bool) -> None:
    """Process-wide switches of torch."""
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


def check_start(options: Config, data: Data) -> None:
    """What a first start would refuse but `open_data` and the budget do not know of; leaves nothing."""
    checkpoint.check_folder(options.run.dir)
    for phase in config.phases(options):
        micro = micro_batch(phase, 1)
        if options.train.engine == "deepspeed":
            engine.deepspeed_config(phase, 1, micro, pin=False)
    if options.model.init_from:
        _module(options, data.tokenizer, fresh=True)


def on_main(topology: Topology, action: Callable[[], str | None]) -> str:
    """Runs `action` on rank 0 and gives its result to all; its UserError is raised everywhere."""
    result = ""
    with together(topology):
        if topology.is_main:
            result = action() or ""
    return topology.broadcast_text(result)


@contextmanager
def together(topology: Topology) -> Iterator[None]:
    """A user's error of one rank is raised on all, which would wait for that rank for ever."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if problem := topology.first_text(problem):
        raise UserError(problem)


def _starting_point(folder: RunFolder, options: Config, data: Data) -> str:
    """The checkpoint to go on from, "" for none; the config becomes that of the folder."""
    start = ""
    if checkpoint.steps(folder.path):
        path = checkpoint.find(folder.path)
        state = checkpoint.read_state(path)
        _check_continues(state, options, data)
        start = str(path)
    folder.write_config(options)
    folder.keep_tokenizer(data.tokenizer.path)
    return start


def _check_continues(state: State, options: Config, data: Data) -> None:
    """UserError with all reasons, one a line, why the checkpoint cannot go on."""
    reasons = []
    try:
        run_segments(options, data, state)
    except UserError as error:
        reasons.append(str(error))
    try:
        checkpoint.check_continues(state, options, {"tokenizer": data.tokenizer.hash})
    except UserError as error:
        reasons.append(str(error))
    if reasons:
        raise UserError("\n".join(reasons))


def _open_ledger(
    options: Config,
    topology: Topology,
    folder: RunFolder,
    state: State | None,
    meter: energy.Meter,
) -> Ledger | None:
    """The ledger of rank 0, as early as it is known where the run goes on: a start-up costs too."""
    if not topology.is_main:
        return None
    device, ranks = device_name(topology.device), topology.world_size
    folder.add_provenance(device=device, ranks=ranks, launcher=topology.launcher)
    ledger = Ledger.open(folder.path, ranks, device)
    about: dict[str, Any] = {"layout": layout(options, topology), "job": slurm_job(os.environ)}
    about["sensors"] = {part: meter.methods[part] for part in meter.parts}  # rank 0 has one of each
    if "cpu" in meter.parts:
        about["host_share"] = round(meter.share, 4)
    step, head = (state.step, state.ledger_head) if state else (0, "")
    ledger.begin(step, head, folder.status().get("ledger_head", ""), **about)
    ledger.meter(dict.fromkeys(meter.parts, 0.0), meter.age())
    ledger.keep_beating()
    folder.write_status("running", ledger.totals()["steps"])
    return ledger


def layout(options: Config, topology: Topology) -> dict[str, Any]:
    """How the model is spread, for people: nothing depends on it."""
    t, p = options.train, options.parallel
    return {
        "engine": t.engine,
        "ranks": topology.world_size,
        "tensor": p.tensor,
        "zero": p.zero,
        "device": device_name(topology.device),
    }


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's names for where this runs, {} outside of it: what `tools.ledger reconcile` asks about."""
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "STEP_ID", "CLUSTER_NAME")
    given = {name.lower(): environ.get(f"SLURM_{name}", "") for name in names}
    return {name: value for name, value in given.items() if value} if given["job_id"] else {}


def _note_changes(ledger: Ledger, options: Config, state: State, segments: list[Segment]) -> None:
    """Says and records what is other than in the attempt before."""
    before = config.build(state.config, "config of the checkpoint").budget.amount
    now = options.budget.amount
    if before != now:
        old, new = (f"{amount:g} {unit}" for unit, amount in (before, now))
        logging.info("budget      changed: %s -> %s", old, new)
        ledger.note("budget-change", before=old, now=new)
    if segments[-1].number > state.segments[-1][0]:
        blend = segments[-1]
        ledger.note(
            "blend-change", segment=blend.number, first_sample=blend.first, blend=options.corpus.blend
        )


def _open_monitor(options: Config, topology: Topology, ledger: Ledger | None) -> Monitor | None:
    """What rank 0 shows."""
    if ledger is None:
        return None
    assert options.train.precision
    peak = flops.peak(device_name(topology.device), options.train.precision)
    totals, ranks = ledger.totals(), topology.world_size
    board = options.monitor.tensorboard
    return Monitor(options.run.dir, config.method(options), totals, ranks, peak, board)


def timed(ledger: Ledger | None, category: str) -> AbstractContextManager[None]:
    """Claims the time of a block for `category`, where there is a ledger."""
    return ledger.time(category) if ledger else nullcontext()


def _prepare(
    options: Config, topology: Topology, blend: Blend, mask: Masker, micro: int
) -> Callable[[int], list[Batch]]:
    def prepare(first: int) -> list[Batch]:
        batch_size, rank, ranks = options.train.batch_size, topology.data_rank, topology.data_size
        s = blend.read(np.concatenate(share_of_rank(first, batch_size, micro, rank, ranks)))
        batches = []
        for start in range(0, len(s.keys), micro):
            some = slice(start, start + micro)
            masked = mask(s.tokens[some], s.keys[some], s.views[some])
            batches.append(Batch.of(*masked[:5], topology.device))
        return batches

    return prepare


# ---- the loop ------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Updates until the budget is spent or somebody asks to stop; returns the exit code."""
    o = run.config
    loss_sum, logged = torch.zeros((), device=run.topology.device), run.step
    while True:
        turn = agree(run)
        if not (turn.step_fits or turn.stop or run.step):
            unit, total = o.budget.amount
            raise UserError(f"budget.{unit} = {total:g} is spent before the first update; raise it")
        if turn.late and turn.step_fits and not run.seen:  # nor would it be otherwise another time
            raise UserError(
                f"{_TIME_LIMIT} leaves no time for an update: raise it, or lower"
                f" checkpoint.end_margin_minutes = {o.checkpoint.end_margin_minutes:g}"
            )
        ending = turn.stop or not turn.step_fits
        if run.step > logged and (ending or run.step % o.monitor.log_every == 0):
            write_log(run, turn, mean_loss(run, loss_sum / (run.step - logged)))
            loss_sum, logged = torch.zeros_like(loss_sum), run.step
        if evaluation_due(run, turn):
            evaluate(run, turn)
            continue  # it took time, which may be what the budget is made of, or what a signal gives
        if turn.save_due or (ending and run.saved != run.step):
            mean_loss(run, loss_sum)  # what is no number is not worth keeping
            save(run)
            continue
        if ending:
            return finish(run, turn)

        if turn.phase != run.phase:
            enter(run, turn.phase)
        batches = run.feed.take(run.samples)
        for number, batch in enumerate(batches):
            seed_dropout(run, number)
            loss_sum += run.engine.backward(batch, 1 / len(batches)) / len(batches)
        run.grad_norm = run.engine.step(learning_rate(o, turn.progress))
        run.step += 1
        run.samples += run.cost.samples
        if run.ledger:
            run.ledger.step(run.cost, first=run.phase not in run.seen)
        run.seen.add(run.phase)


def enter(run: Run, number: int) -> None:
    """Makes updates of phase `number` from here on; another length begins another segment."""
    phase = run.phases[number]
    length, batch_size = phase.config.train.seq_length, phase.config.train.batch_size
    if run.segments[-1].length != length:
        run.segments.append(run.segments[-1]._replace(first=run.samples, length=length))
    run.feed.close()
    run.blend, run.feed = read_phase(phase, run.topology, run.data, run.segments)
    run.engine.accumulate(batch_size // (phase.micro * run.topology.data_size))
    run.phase = number
    if run.ledger:
        logging.info("phase       %d: %d sequences of %d tokens", number, batch_size, length)
        run.ledger.note("phase-change", phase=number, seq_length=length, batch_size=batch_size)


def agree(run: Run) -> Turn:
    """One all-reduce: rank 0's budget and clock, anybody's signal, everybody's joules."""
    if run.deadline and time.time() >= run.deadline:
        run.signals.received = run.signals.received or _TIME_LIMIT
    late = int(run.signals.received == _TIME_LIMIT)
    stop = int(run.signals.received is not None)
    fits, progress, due, phase = 0, 0, 0, 0
    if run.ledger:
        totals = run.ledger.totals()
        fits = int(run.budget.allows_step(totals, held_back(run, totals)))
        progress = int(run.budget.progress(totals) * _PROGRESS_UNITS)
        due, phase = int(save_due(run)), run.budget.phase(totals)
    joules = run.meter.joules()
    mine = [int(1e3 * joules.get(part, 0.0)) for part in run.meter.parts]
    stop, late, fits, progress, due, phase, *millijoules = run.topology.add_up(
        [stop, late, fits, progress, due, phase, *mine]
    )
    if run.ledger:
        run.ledger.meter(dict(zip(run.meter.parts, (each / 1e3 for each in millijoules), strict=True)))
    return Turn(bool(stop), bool(fits), bool(due), progress / _PROGRESS_UNITS, phase, bool(late))


def held_back(run: Run, totals: dict[str, Any]) -> float:
    """What the next update and the end of the run will take of a budget of hours or kWh.

    The end is an evaluation and a save; an evaluation that has not been timed yet takes at most as long as
    training on its samples. Joules: at the mean power so far, and for the time by which their count is late.
    """
    assert run.ledger
    step = run.ledger.step_hours
    untimed = step * run.heldout.samples / run.cost.samples if run.heldout else 0.0
    hours = step + (run.ledger.block_hours("evaluate") or untimed) + run.ledger.block_hours("checkpoint")
    if run.budget.unit != "kwh":
        return hours
    late = step + run.topology.world_size * 2 * energy.PERIOD / 3600
    metered = totals["metered_device_seconds"]
    watts = (totals["joules"] or 0.0) / metered if metered else 0.0  # of one device
    return (hours + late) * watts / 1e3


def learning_rate(o: Config, progress: float) -> float:
    """Rate of the update that starts when `progress` of the budget is spent."""
    s = o.schedule
    return o.optimizer.lr * schedule.scale(s.kind, progress, s.warmup, s.floor)


def seed_dropout(run: Run, number: int) -> None:
    """Dropout is a function of (seed, step, micro-batch, data rank) too: nothing to save.

    Ranks that share a model draw alike, so that replicated activations lose the same elements.
    """
    if run.config.model.dropout or run.config.model.decoder_dropout:
        name = f"dropout {run.step} {number} {run.topology.data_rank}"
        torch.manual_seed(rng.name_seed(run.config.run.seed, name))


def mean_loss(run: Run, loss: Tensor) -> float:
    """Mean over all ranks; one that is no number ends the run.

    The engine skips an update whose gradient is not finite, which is no harm if it happens once; a loss
    like this does not heal.
    """
    mean = float(run.topology.sum_over_data(loss.clone()) / run.topology.data_size)
    if not math.isfinite(mean):
        raise UserError(
            f"the loss up to step {run.step} is {mean}; lower optimizer.lr or lengthen schedule.warmup, in"
            " a new run.dir"
        )
    return mean


def write_log(run: Run, turn: Turn, loss: float) -> None:
    """Loss of the updates since the last log, and the speeds; all ranks take part."""
    (peak,) = run.topology.agree([peak_bytes(run.topology.device)])
    scaling = check_scale(run)
    if run.monitor and run.ledger:
        lr = learning_rate(run.config, turn.progress)
        run.ledger.peak(peak)
        run.ledger.log(loss=loss, lr=lr, **scaling)
        run.monitor.log(
            turn.progress,
            run.ledger.totals(),
            loss=loss,
            lr=lr,
            grad_norm=None if run.grad_norm is None else float(run.grad_norm),
            data_wait_seconds=run.feed.waited,
            **scaling,
        )
    run.feed.waited = 0.0


def check_scale(run: Run) -> dict[str, float]:
    """Loss scale and skipped updates of a run in fp16, for its log; UserError if no scale will do."""
    if run.engine.loss_scale is None:
        return {}
    state = run.engine.loss_scale.state()
    if hopeless(state):
        raise UserError(
            f"train.precision = fp16: gradients overflow at step {run.step} although the loss scale is down"
            f" to {LEAST:g}; take bf16 or fp32, or lower optimizer.lr, in a new run.dir"
        )
    return {"loss_scale": state["value"], "skipped_updates": state["skipped"]}


def peak_bytes(device: torch.device) -> int:
    """The most that this rank has held: of the GPU's memory, or on a CPU of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def evaluation_due(run: Run, turn: Turn) -> bool:
    """Every so many steps, and at the end of the budget; never twice at one step."""
    if run.heldout is None or run.scored[0] == run.step or turn.stop:
        return False
    every = run.config.evaluate.every_steps
    return not turn.step_fits or bool(every and run.step and run.step % every == 0)


def evaluate(run: Run, turn: Turn) -> None:
    """Held-out loss under the fixed mask; all ranks take part."""
    assert run.heldout
    begin = time.monotonic()
    with timed(run.ledger, "evaluate"):
        t = run.topology
        run.engine.module.eval()
        score = run.heldout.score(
            run.engine.forward, run.phases[-1].micro, t.device, t.data_rank, t.data_size, t.sum_over_data
        )
        run.engine.module.train()
    run.scored = run.step, score.loss
    if run.ledger and run.monitor:
        run.ledger.note(
            "evaluate",
            held_out={
                **asdict(score),
                "corpus": run.heldout.fingerprint,
                "tokenizer": run.data.tokenizer.hash,
            },
        )
        run.monitor.log(
            turn.progress,
            run.ledger.totals(),
            held_out_loss=score.loss,
            held_out_accuracy=score.accuracy,
            held_out_bits_per_byte=score.bits_per_byte,
            evaluation_seconds=time.monotonic() - begin,
        )


def save_due(run: Run) -> bool:
    """By steps or by rank 0's clock."""
    c = run.config.checkpoint
    if run.step == run.saved or run.step == 0:
        return False
    if run.budget.measured and run.ledger and not run.ledger.block_hours("checkpoint"):
        return True  # once early, to know how long a save takes
    late = c.every_minutes and time.monotonic() - run.saved_at >= 60 * c.every_minutes
    return bool(late or (c.every_steps and run.step % c.every_steps == 0))


def save(run: Run) -> None:
    """Writes a checkpoint; all ranks take part."""
    t = run.topology
    state = State(
        step=run.step,
        samples=run.samples,
        optimizer_step=run.engine.optimizer_step,
        config=run.config.model_dump(mode="json"),
        fingerprints=run.data.fingerprints,
        segments=[list(segment) for segment in run.segments],
        ledger_head=run.ledger.save() if run.ledger else "",
        loss=run.scored[1] if run.scored[0] == run.step else None,
        layout=layout(run.config, t),
        phase=run.phase,
        loss_scale=run.engine.loss_scale.state() if run.engine.loss_scale else None,
        rules=run.data.rules,
    )
    with timed(run.ledger, "checkpoint"), together(t):
        checkpoint.save(run.folder, run.engine, state, run.config.checkpoint.keep_last, t.is_main)
    run.saved, run.saved_at = run.step, time.monotonic()
    if t.is_main:
        run.folder.write_status("running", run.step)


def finish(run: Run, turn: Turn) -> int:
    """Says how it ended, in the ledger and in status.json."""
    # A signal that comes with the last step leaves no more than the evaluation for the next start.
    complete = not turn.step_fits and (run.heldout is None or run.scored[0] == run.step)
    code = DONE if complete else STOPPED
    reason = "the budget is spent" if code == DONE else f"stopped by {run.signals.received or 'another rank'}"
    if run.ledger:
        if turn.stop:
            run.ledger.note("signal", reason=reason)
        epochs = run.blend.epochs(run.samples)
        head = run.ledger.note("finish" if code == DONE else "stop", reason=reason, epochs=epochs)
        state = "finished" if code == DONE else "stopped"
        run.folder.write_status(state, run.step, reason, code, head)
    return code


def close(run: Run) -> None:
    """Leaves the run; nothing collective may follow."""
    run.meter.close()
    run.feed.close()
    if run.monitor:
        run.monitor.close()
    run.folder.release()
