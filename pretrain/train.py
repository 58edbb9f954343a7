"""A run: `build` makes its parts once, `train` is a loop that names every effect in order.

Rank 0 has the ledger and the clock; what it decides (the next step fits the budget, a save is due) and
what any rank was told (a signal) travel in one small all-reduce per step, so that all ranks take the same
turn. Nothing else is shared but gradients.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain import checkpoint, config, engine, flops, huggingface, model, rng, schedule
from pretrain.checkpoint import RunFolder, State
from pretrain.config import Config, UserError
from pretrain.corpus import IndexedReader, load_manifest, tokenizer_folder
from pretrain.evaluate import HeldOut, masker
from pretrain.ledger import Budget, Ledger
from pretrain.masking import Masker, counts
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
from pretrain.tokenizer import Tokenizer, load_tokenizer
from pretrain.topology import Topology, device_name

DONE, STOPPED = 0, 75
"""Exit codes: the budget is spent; stopped early on request, start me again."""

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
        blend.append((weight, manifest.fingerprint))
    fingerprints = {"tokenizer": tokenizer.hash}
    if len(blend) == 1:
        fingerprints["train"] = blend[0][1]
    return Data(tokenizer, [IndexedReader(prefix) for _, prefix in options.blend], blend, fingerprints)


def open_blend(options: Config, data: Data, segments: Sequence[Segment] = ()) -> Blend:
    """What reads the samples of a run, in the last of its segments."""
    k, length, tokenizer = options.masking, options.train.seq_length, data.tokenizer
    seed, bos, eos = options.run.data_seed, tokenizer.bos, tokenizer.eos
    samplers = [Sampler(corpus, k, length, seed, bos, eos) for corpus in data.corpora]
    used = used_samples(segments, samplers[0].per_text)
    first = segments[-1].first if segments else 0
    weights = [weight for weight, _ in data.blend]
    return Blend(samplers, weights, first, [used.get(name, 0) for _, name in data.blend])


def run_segments(options: Config, data: Data, state: State | None) -> list[Segment]:
    """The segments of a run that starts, or goes on from a checkpoint; UserError if the blend changed."""
    if state is None:
        return continue_segments([], options.corpus.segment, data.blend, 0)
    past = [
        Segment(number, first, tuple((weight, name) for weight, name in blend))
        for number, first, blend in state.segments
    ]
    return continue_segments(past, options.corpus.segment, data.blend, state.samples)


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
    return options.model_copy(
        update={
            "model": options.model.model_copy(update={"vocab_size": vocab_size}),
            "train": train.model_copy(update={"precision": precision, "deterministic": deterministic}),
        }
    )


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


class Signals:
    """Remembers that somebody asked the run to stop; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


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


@dataclass
class Run:
    """The parts, and the two numbers that move."""

    config: Config
    topology: Topology
    folder: RunFolder
    data: Data
    cost: flops.StepCost
    engine: engine.Engine
    feed: Feed
    heldout: HeldOut | None
    ledger: Ledger | None
    """On rank 0."""
    monitor: Monitor | None
    """On rank 0."""
    signals: Signals
    micro: int
    blend: Blend
    segments: list[Segment]
    step: int = 0
    samples: int = 0
    saved: int = -1
    """Step of the last checkpoint."""
    saved_at: float = field(default_factory=time.monotonic)
    scored: tuple[int, float | None] = (-1, None)
    """(step, loss) of the last evaluation."""
    grad_norm: Tensor | None = None
    """Of the last update, before clipping; None where the engine does not tell."""


def build(options: Config, topology: Topology, folder: RunFolder) -> Run:
    """Reads, checks and makes everything, and restores the newest checkpoint if there is one."""
    signals = Signals()  # a stop that is asked for meanwhile waits for the first step's boundary
    on_main(topology, folder.claim)
    with together(topology):
        data = open_data(options.corpus)
        options = resolve(options, data.tokenizer.vocab_size, topology.device)
        micro = micro_batch(options, topology.data_size)
    start = on_main(topology, lambda: _starting_point(folder, options, data))
    state = checkpoint.read_state(Path(start)) if start else None
    ledger = _open_ledger(topology, folder, state)
    with timed(ledger, "startup"):
        segments = run_segments(options, data, state)
        with together(topology):
            module = _module(options, data.tokenizer, fresh=state is None)
        run = _assemble(options, topology, folder, data, segments, micro, ledger, module, signals)
        if state:
            checkpoint.load(Path(start), run.engine)
            run.engine.optimizer_step = state.optimizer_step
            run.step, run.samples, run.saved = state.step, state.samples, state.step
            run.scored = (state.step, state.loss) if state.loss is not None else (-1, None)
    if ledger and state and len(segments) > len(state.segments):
        now = segments[-1]
        ledger.note("segment", segment=now.number, first_sample=now.first, blend=options.corpus.blend)
    return run


def _assemble(
    options: Config,
    topology: Topology,
    folder: RunFolder,
    data: Data,
    segments: list[Segment],
    micro: int,
    ledger: Ledger | None,
    module: model.LateMaskModel,
    signals: Signals,
) -> Run:
    """The parts of a run that has not started."""
    t, tokenizer = options.train, data.tokenizer
    prepare_torch(bool(t.deterministic))
    cost, heldout = step_cost(options), None
    with together(topology):
        blend = open_blend(options, data, segments)
        mask = masker(options.masking, t.seq_length, tokenizer)
        if options.corpus.valid:
            heldout = HeldOut(options.corpus.valid, tokenizer, t.seq_length, options.evaluate.samples)
        check_budget(options, cost)
    built = engine.build(options, module, topology, micro)
    if built.deepspeed_json and topology.is_main:
        checkpoint.write_atomic(folder.path / "deepspeed.json", built.deepspeed_json)
    return Run(
        config=options,
        topology=topology,
        folder=folder,
        data=data,
        cost=cost,
        engine=built,
        feed=Feed(_prepare(options, topology, blend, mask, micro), t.batch_size),
        heldout=heldout,
        ledger=ledger,
        monitor=_open_monitor(options, topology, ledger),
        signals=signals,
        micro=micro,
        blend=blend,
        segments=segments,
    )


def _module(options: Config, tokenizer: Tokenizer, fresh: bool) -> model.LateMaskModel:
    """The whole model; where a run is `fresh`, with the weights that `model.init_from` has."""
    t = options.train
    module = model.LateMaskModel(options.model, tokenizer.vocab_size, tokenizer.mask, t.recompute == "block")
    model.init_weights(module, options.run.seed)
    if fresh and options.model.init_from:
        new = huggingface.load_folder(module, options.model, tokenizer)
        logging.info("init_from   %s; new here: %s", options.model.init_from, ", ".join(new) or "nothing")
    if t.compile != "none":
        for layer in module.all_layers():
            layer.compile(mode=t.compile, dynamic=False)
    return module


def prepare_torch(deterministic: bool) -> None:
    """Process-wide switches of torch."""
    if deterministic:  # asked for by cuBLAS, and read when the first product on a GPU is formed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def step_cost(options: Config) -> flops.StepCost:
    """What one update of a resolved config costs."""
    assert options.model.vocab_size
    t = options.train
    c = counts(options.masking, t.seq_length)
    rows = flops.Rows(c.length, c.visible, c.predicted)
    return flops.step_cost(options.model, rows, options.model.vocab_size, t.batch_size, t.recompute)


def check_budget(options: Config, cost: flops.StepCost) -> None:
    """UserError if the budget does not pay for a single update."""
    for unit, one in (("tokens", cost.tokens_seen), ("flops", cost.flops.total)):
        total = getattr(options.budget, unit)
        if total is not None and total < one:
            raise UserError(f"budget.{unit} = {total:g} is less than one update costs ({one:g}); raise it")


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


def _open_ledger(topology: Topology, folder: RunFolder, state: State | None) -> Ledger | None:
    """The ledger of rank 0, as early as it is known where the run goes on: a start-up costs too."""
    if not topology.is_main:
        return None
    device, ranks = device_name(topology.device), topology.world_size
    folder.add_provenance(device=device, ranks=ranks, launcher=topology.launcher)
    ledger = Ledger.open(folder.path, ranks, device)
    ledger.begin(*(state.step, state.ledger_head) if state else ())
    folder.write_status("running", ledger.totals()["steps"])
    return ledger


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
            batches.append(Batch.of(*masked[:4], topology.device))
        return batches

    return prepare


# ---- the loop ------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Updates until the budget is spent or somebody asks to stop; returns the exit code."""
    o, budget = run.config, Budget(run.config.budget, run.cost)
    loss_sum, logged = torch.zeros((), device=run.topology.device), run.step
    while True:
        turn = agree(run, budget)
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

        batches = run.feed.take(run.samples)
        for number, batch in enumerate(batches):
            seed_dropout(run, number)
            loss_sum += run.engine.backward(batch, 1 / len(batches)) / len(batches)
        run.grad_norm = run.engine.step(learning_rate(o, turn.progress))
        run.step += 1
        run.samples += o.train.batch_size
        if run.ledger:
            run.ledger.step(run.cost)


def agree(run: Run, budget: Budget) -> Turn:
    """One all-reduce: rank 0's budget and clock, anybody's signal."""
    stop = int(run.signals.received is not None)
    fits, progress, due = 0, 0, 0
    if run.ledger:
        fits = int(budget.allows_step(run.ledger))
        progress = int(budget.progress(run.ledger) * _PROGRESS_UNITS)
        due = int(save_due(run))
    stop, fits, progress, due = run.topology.agree([stop, fits, progress, due])
    return Turn(bool(stop), bool(fits), bool(due), progress / _PROGRESS_UNITS)


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
    """Loss of the updates since the last log, and the speeds."""
    if run.monitor and run.ledger:
        run.monitor.log(
            turn.progress,
            run.ledger.totals(),
            loss=loss,
            lr=learning_rate(run.config, turn.progress),
            grad_norm=None if run.grad_norm is None else float(run.grad_norm),
            data_wait_seconds=run.feed.waited,
        )
    run.feed.waited = 0.0


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
            run.engine.forward, run.micro, t.device, t.data_rank, t.data_size, t.sum_over_data
        )
        run.engine.module.train()
    run.scored = run.step, score.loss
    if run.ledger and run.monitor:
        run.ledger.note("evaluate", held_out=asdict(score))
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
    late = c.every_minutes and time.monotonic() - run.saved_at >= 60 * c.every_minutes
    return bool(late or (c.every_steps and run.step % c.every_steps == 0))


def save(run: Run) -> None:
    """Writes a checkpoint; all ranks take part."""
    t, p = run.topology, run.config.parallel
    state = State(
        step=run.step,
        samples=run.samples,
        optimizer_step=run.engine.optimizer_step,
        config=run.config.model_dump(mode="json"),
        fingerprints=run.data.fingerprints,
        segments=[list(segment) for segment in run.segments],
        ledger_head=run.ledger.save() if run.ledger else "",
        loss=run.scored[1] if run.scored[0] == run.step else None,
        layout={"engine": run.config.train.engine, "ranks": t.world_size, "tensor": p.tensor, "zero": p.zero},
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
        run.ledger.note("finish" if code == DONE else "stop", reason=reason, epochs=epochs)
        state = "finished" if code == DONE else "stopped"
        run.folder.write_status(state, run.step, reason, code)
    return code


def close(run: Run) -> None:
    """Leaves the run; nothing collective may follow."""
    run.feed.close()
    if run.monitor:
        run.monitor.close()
    run.folder.release()
