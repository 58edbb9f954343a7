"""Makes a run that can step from a config and the ranks: reads, checks, restores."""

import ctypes
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.account import budget, energy, flops
from pretrain.account.budget import Budget, Course, step_cost
from pretrain.account.ledger import Ledger, process_start
from pretrain.checkpoint import State
from pretrain.config import Config, build_config, method_of, phase_configs
from pretrain.continuing import carried, check_continues, rates, run_segments
from pretrain.data.corpora import Data, open_blend, open_data
from pretrain.data.masking import masker
from pretrain.data.sampler import Blend, Segment
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.feed import Feed, prepare
from pretrain.files import check_folder, write_atomic
from pretrain.model import float8, huggingface
from pretrain.model import late_mask as model
from pretrain.model.late_mask import LateMaskModel
from pretrain.model.loss import ExternalCrossEntropy
from pretrain.monitor import Monitor
from pretrain.parallel import engine, tensor_parallel
from pretrain.parallel.deepspeed_engine import DeepSpeedEngine, deepspeed_config
from pretrain.parallel.engine import Engine, TorchEngine, compile_mode
from pretrain.parallel.launchers import job_end
from pretrain.parallel.topology import Topology, device_name, device_uuid
from pretrain.run_folder import RunFolder
from pretrain.signals import Signals


def build_engine(config: Config, model: LateMaskModel, topology: Topology, micro: int) -> "Engine":
    """Divides an initialised model over the ranks and gives it an optimizer.

    micro: sequences of a micro-batch. UserError if keys of `deepspeed` contradict others, or a kernel is
    not here.
    """
    t, known = config.train, model.cross_entropy.vocab_size
    if t.cross_entropy != "own":
        model.cross_entropy = ExternalCrossEntropy(known, t.cross_entropy, topology.device)
    tensor_parallel.shard(model, topology)
    model.to(topology.device)
    if t.float8:
        float8.convert(model, topology.device)
    if t.compile != "none":
        for layer in model.all_layers():
            layer.compile(mode=compile_mode(config), dynamic=False)
    if t.engine == "deepspeed":
        return DeepSpeedEngine(config, model, topology, micro)
    return TorchEngine(config, model, topology)


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h


def resolve(config: Config, vocab_size: int, device: torch.device) -> Config:
    """The config with the defaults that depend on the vocabulary and the device filled in."""
    if config.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer has {vocab_size} pieces; leave"
            " it out"
        )
    train = config.train
    precision = train.precision or ("bf16" if _has_bf16(device) else "fp32")
    deterministic = device.type == "cpu" if train.deterministic is None else train.deterministic
    sized = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "train": train.model_copy(update={"precision": precision, "deterministic": deterministic}),
        }
    )
    return budget.resolve(sized)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def micro_batch(config: Config, data_size: int) -> int:
    """Sequences per forward pass of one data-parallel rank; UserError if the batch does not divide."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % (data_size * (micro or 1)):
        raise UserError(
            f"train.batch_size = {batch} is no multiple of data-parallel ranks x micro_batch_size ="
            f" {data_size} x {micro or 1}; change one of them"
        )
    return micro or batch // data_size


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
    course: Course
    """Followed on rank 0."""
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
    rate: float = 0.0
    """Learning rate of the last update."""
    grad_norm: Tensor | None = None
    """Of the last update, before clipping; None where the engine does not tell."""

    @property
    def cost(self) -> flops.StepCost:
        """Of an update of this phase."""
        return self.phases[self.phase].cost


def build(config: Config, topology: Topology, folder: RunFolder, signals: Signals) -> Run:
    """Reads, checks and makes everything, and restores the newest checkpoint if there is one."""
    on_main(topology, folder.claim)
    meter = open_meter(topology)
    with raise_on_all_ranks(topology):
        data = open_data(config.corpus)
        config = resolve(config, data.tokenizer.vocab_size, topology.device)
        phases = [
            Phase(phase, step_cost(phase), micro_batch(phase, topology.data_size))
            for phase in phase_configs(config)
        ]
        check_sensors(config, topology.device, meter.parts)
        budget.check(config)
        for phase in phases:
            open_blend(phase.config, data)  # refuses a corpus that is too small for its length
        if config.train.engine == "deepspeed":
            for phase in phases:
                deepspeed_config(phase.config, topology.data_size, phase.micro, pin=False)
        heldout = _open_heldout(config, data)
    # Up to here nothing is touched: what is refused leaves the run as it was.
    start = on_main(topology, lambda: _starting_point(folder, config, data))
    path, stamps = json.loads(start) if start else ("", None)
    with raise_on_all_ranks(topology):
        state = checkpoint.read_state(Path(path), stamps) if path else None
    if state:
        data = replace(data, rules=state.rules)
    ledger = _open_ledger(config, topology, folder, state, meter)
    with timed(ledger, "startup"):
        segments = run_segments(config, data, state)
        with raise_on_all_ranks(topology):
            module = _module(config, data.tokenizer, fresh=state is None)
        if config.model.init_from and state is None:
            refuse_other_weights(config.model.init_from, module, topology)
        run = _assemble(
            config,
            topology,
            folder,
            data,
            phases,
            state.phase if state else 0,
            segments,
            ledger,
            module,
            heldout,
            signals,
            meter,
        )
        if state:
            run.course = Course(run.budget, carried(state, config))
            with raise_on_all_ranks(topology):
                checkpoint.load(Path(path), run.engine, stamps)
            run.engine.optimizer_step = state.optimizer_step
            if run.engine.loss_scale and state.loss_scale:
                run.engine.loss_scale.load(state.loss_scale)
            run.step, run.samples, run.saved = state.step, state.samples, state.step
            run.scored = (state.step, state.loss) if state.loss is not None else (-1, None)
    if ledger and state:
        _note_changes(ledger, run, state, layout(config, topology))
    return run


def _open_heldout(config: Config, data: Data) -> HeldOut | None:
    """The held-out windows, if the config names a corpus of them."""
    if not config.corpus.valid:
        return None
    length = config.evaluate.seq_length or config.train.seq_length
    bounded = config.corpus.documents == "bounded"
    return HeldOut(config.corpus.valid, data.tokenizer, length, config.evaluate.samples, bounded)


def open_meter(topology: Topology) -> energy.Meter:
    """This rank's sensors, running; it knows which parts are read on all nodes."""
    texts = topology.gather_text(f"{energy.host_name()} {device_uuid(topology.device)}")
    places = [(host, gpu) for host, _, gpu in (text.partition(" ") for text in texts)]
    meter = energy.open_meter(topology.rank, places)
    meter.start()
    readers = topology.add_up([int(part in meter.methods) for part in energy.PARTS])
    meter.parts = energy.known_parts(places, dict(zip(energy.PARTS, readers, strict=True)))
    return meter


def check_sensors(config: Config, device: torch.device, parts: Sequence[str]) -> None:
    """UserError if the budget is of energy that nobody measures."""
    needed, sensor = ("gpu", "NVML") if device.type == "cuda" else ("cpu", "RAPL")
    if config.budget.amount[0] == "kwh" and needed not in parts:
        raise UserError(
            f"budget.kwh: no energy sensor can be read here on every node ({sensor}); have it made readable,"
            " or take another unit"
        )


def _assemble(
    config: Config,
    topology: Topology,
    folder: RunFolder,
    data: Data,
    phases: list[Phase],
    number: int,
    segments: list[Segment],
    ledger: Ledger | None,
    module: model.LateMaskModel,
    heldout: HeldOut | None,
    signals: Signals,
    meter: energy.Meter,
) -> Run:
    """The parts of a run that has not started."""
    prepare_torch(bool(config.train.deterministic))
    if topology.device.type == "cpu":
        keep_freed_memory()
    phase = phases[number]
    built = build_engine(phase.config, module, topology, phase.micro)
    if built.deepspeed_json and topology.is_main:
        write_atomic(folder.path / "deepspeed.json", built.deepspeed_json)
    blend, feed = read_phase(phase, topology, data, segments)
    limit = Budget(config)
    return Run(
        config=config,
        topology=topology,
        folder=folder,
        data=data,
        budget=limit,
        course=Course(limit),
        phases=phases,
        engine=built,
        heldout=heldout,
        ledger=ledger,
        monitor=_open_monitor(config, topology, ledger),
        meter=meter,
        signals=signals,
        deadline=_deadline(config) if topology.is_main else None,
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
    return blend, Feed(prepare(o, topology, blend, mask, phase.micro), o.train.batch_size)


def _deadline(config: Config) -> float | None:
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
    return end - min(60 * config.checkpoint.end_margin_minutes, 0.2 * (end - now))


def _module(config: Config, tokenizer: Tokenizer, fresh: bool) -> model.LateMaskModel:
    """The whole model; where a run is `fresh`, with the weights that `model.init_from` has."""
    t = config.train
    module = model.LateMaskModel(config.model, tokenizer.vocab_size, tokenizer.mask, t.recompute == "block")
    model.init_weights(module, config.run.seed)
    if fresh and config.model.init_from:
        new = huggingface.load_folder(module, config.model, tokenizer)
        parts = Counter(name.partition(".")[0] for name in new)
        said = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items()) or "nothing"
        logging.info("init_from   %s; new here: %s", config.model.init_from, said)
    return module


def refuse_other_weights(folder: str, module: torch.nn.Module, topology: Topology) -> None:
    """UserError where ranks have read other weights in `init_from`: each reads the folder for itself."""
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


def check_start(config: Config, data: Data) -> None:
    """What a first start would refuse but `open_data` and the budget do not know of; leaves nothing."""
    check_folder(config.run.dir)
    for phase in phase_configs(config):
        micro = micro_batch(phase, 1)
        if config.train.engine == "deepspeed":
            deepspeed_config(phase, 1, micro, pin=False)
    if config.model.init_from:
        _module(config, data.tokenizer, fresh=True)


def on_main(topology: Topology, action: Callable[[], str | None]) -> str:
    """Runs `action` on rank 0 and gives its result to all; its UserError is raised everywhere."""
    result = ""
    with raise_on_all_ranks(topology):
        if topology.is_main:
            result = action() or ""
    return topology.broadcast_text(result)


@contextmanager
def raise_on_all_ranks(topology: Topology) -> Iterator[None]:
    """A user's error of one rank is raised on all, which would wait for that rank for ever."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if problem := topology.first_text(problem):
        raise UserError(problem)


def _starting_point(folder: RunFolder, config: Config, data: Data) -> str:
    """The checkpoint to go on from and the stamps of its files, as JSON, "" for none; the config becomes that
    of the folder."""
    start = ""
    checkpoint.refuse_gone(folder.path)
    if checkpoint.steps(folder.path):
        path, stamps = checkpoint.find_verified(folder.path)
        state = checkpoint.read_state(path, stamps)
        check_continues(state, config, data)
        start = json.dumps([str(path), stamps])
    folder.write_config(config)
    folder.keep_tokenizer(data.tokenizer.path, data.tokenizer.content)
    return start


def _open_ledger(
    config: Config,
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
    about: dict[str, Any] = {"layout": layout(config, topology), "job": slurm_job(os.environ)}
    about["sensors"] = {part: meter.methods[part] for part in meter.parts}  # rank 0 has one of each
    if "cpu" in meter.parts:
        about["host_share"] = round(meter.share, 4)
    step, head = (state.step, state.ledger_head) if state else (0, "")
    ledger.begin(step, head, folder.status().get("ledger_head", ""), **about)
    ledger.meter(dict.fromkeys(meter.parts, 0.0), meter.age())
    ledger.start_heartbeat()
    folder.write_status("running", ledger.totals()["steps"])
    return ledger


def layout(config: Config, topology: Topology) -> dict[str, Any]:
    """How the model is spread and computed, which may differ between attempts."""
    t, p = config.train, config.parallel
    return {
        "engine": t.engine,
        "ranks": topology.world_size,
        "tensor": p.tensor,
        "zero": p.zero,
        "device": device_name(topology.device),
        "micro_batch": micro_batch(phase_configs(config)[0], topology.data_size),
        "recompute": t.recompute,
        "deterministic": t.deterministic,
        "compile": t.compile,
        "cross_entropy": t.cross_entropy,
    }


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Slurm's names for where this runs, {} outside of it: what `tools.ledger reconcile` asks about."""
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "STEP_ID", "CLUSTER_NAME")
    given = {name.lower(): environ.get(f"SLURM_{name}", "") for name in names}
    return {name: value for name, value in given.items() if value} if given["job_id"] else {}


def dropout_changes(config: Config, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what of a layout is other than before, in words, if dropout depends on it (`seed_dropout`)."""
    if not (config.model.dropout or config.model.decoder_dropout):
        return ""
    names = ("ranks", "tensor", "micro_batch", "compile")
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name])


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
    board = config.monitor.tensorboard
    return Monitor(config.run.dir, method_of(config), totals, ranks, peak, board)


def timed(ledger: Ledger | None, category: str) -> AbstractContextManager[None]:
    """Claims the time of a block for `category`, where there is a ledger."""
    return ledger.time(category) if ledger else nullcontext()
