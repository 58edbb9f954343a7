"""A run: `build` makes its parts once, `train` is a loop that names every effect in order.

A step is one update of the optimizer, whether of one micro-batch or of many.
Rank 0 has the ledger and the clock; what it decides (the next step fits the budget, a save is due) and
what any rank was told (a signal) travel in one small exchange, so that all ranks decide the same. Of many
ranks it is not asked for before every update: where a budget can be counted, rank 0 decides some ahead, by
the same sums. Nothing else is shared but gradients.
"""

import logging
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import checkpoint, replay
from pretrain.account import energy, schedule
from pretrain.account.budget import TOLERANCE, charged
from pretrain.account.ledger import Totals, peak_resident, timed
from pretrain.build import Run
from pretrain.checkpoint import State
from pretrain.errors import DONE, STOPPED, UserError
from pretrain.feed import read_phase
from pretrain.model.late_mask import Batch
from pretrain.model.loss_scale import MIN_SCALE, scale_exhausted
from pretrain.parallel.topology import raise_on_all_ranks
from pretrain.start import layout

_TIME_LIMIT = "the job's time limit"  # as a reason to stop
_PROGRESS_UNITS = 2**53  # progress travels as an integer, cut to sixteen digits
EXCHANGE = 10e-6
"""Seconds that an exchange holds up the ranks, for each of them: an assumption, for rank 0 takes one message
after another."""
EXCHANGE_SHARE = 0.01
"""Share of the time of the updates that it decides that an exchange may take."""
ANSWER = 1.0
"""Seconds, at most, that a signal waits for the next exchange."""
MOST_AHEAD = 64
"""Updates that an exchange decides at most."""


class StepDecision(NamedTuple):
    """What all ranks agreed on at a step's boundary."""

    stop: bool
    step_fits: bool
    save_due: bool
    progress: float
    middle: float
    """Progress that the rate of the next update belongs to."""
    phase: int
    """Index of the phase of the next update."""
    late: bool
    """It is the job's time limit that says stop."""
    milestone: int
    """Index of the share in `checkpoint.keep` at which the weights stay now; -1: none."""


# ---- the loop ------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Updates until the budget is spent or somebody asks to stop; returns the exit code."""
    config, budget = run.config, run.recipe.budget
    logged, replay_every = run.step, config.monitor.replay_every
    at = run.watchdog.at
    ahead: list[StepDecision] = []
    while True:
        at("agreement")
        decision, *ahead = ahead or decide_steps(run)
        if not (decision.step_fits or decision.stop or run.step):
            raise UserError(
                f"budget.{budget.unit} = {budget.total:g} is spent before the first update; raise it"
            )
        if decision.late and decision.step_fits and not run.seen:  # nor would it be otherwise another time
            raise UserError(
                f"{_TIME_LIMIT} leaves no time for an update: raise it, or lower"
                f" checkpoint.end_margin_minutes = {config.checkpoint.end_margin_minutes:g}"
            )
        ending = decision.stop or not decision.step_fits
        if run.step > logged and (ending or run.step % config.monitor.log_every == 0):
            at("log")
            write_log(run, decision)
            logged = run.step
        if decision.milestone >= 0:
            at("save", long=True)
            keep_milestone(run, config.checkpoint.keep[decision.milestone])
            ahead = []
            continue  # it took time too
        if evaluation_due(run, decision):
            evaluate(run, decision)
            ahead = []
            continue  # it took time, which may be what the budget is made of, or what a signal gives
        if (decision.save_due and not run.statistics.skipped_in_row) or (ending and run.saved != run.step):
            at("save", long=True)
            check_skips(run, 0)  # what makes no numbers is not worth keeping
            replay.compare_weights(run)
            save(run)
            ahead = []
            continue
        if ending:
            at("save", long=True)
            return finish(run, decision)

        if decision.phase != run.phase:
            at("build", long=True)
            start_phase(run, decision.phase)
        first = run.phase not in run.seen
        at("data", long=first)
        batches = run.feed.take(run.samples)
        if replay_every and run.step % replay_every == 0:
            at("replay", long=first)
            replay.replay(run)
        loss = torch.zeros((), device=run.topology.device)
        for number, batch in enumerate(batches):
            at("first update" if first else "forward", long=first)
            run.seed_dropout(number, run.topology.data_rank)
            loss += run.engine.backward(batch, 1 / len(batches)) / len(batches)
        at("all-reduce", long=first)
        run.rate = schedule.rate(config, decision.middle)
        wait_for_copy(run)
        run.grad_norm = run.engine.step(run.rate)
        run.statistics.add(loss, run.grad_norm)
        run.step += 1
        run.samples += run.cost.samples
        if run.ledger:
            run.ledger.step(run.cost, first)
        if first:
            run.course.pause()
        run.seen.add(run.phase)


def start_phase(run: Run, number: int) -> None:
    """Makes updates of phase `number` from here on; another length begins another segment."""
    phase = run.recipe.phases[number]
    length, batch_size = phase.config.train.seq_length, phase.config.train.batch_size
    if run.segments[-1].length != length:
        run.segments.append(run.segments[-1]._replace(first=run.samples, length=length))
    run.feed.close()
    run.blend, run.feed = read_phase(phase, run.topology, run.data, run.segments)
    run.engine.set_accumulation(
        batch_size // (phase.micro_batch(run.topology.data_size) * run.topology.data_size)
    )
    run.phase = number
    if run.ledger:
        rate = phase.config.masking.rate
        said = "phase       %d: %d sequences of %d tokens, %.3g hidden"
        logging.info(said, number, batch_size, length, rate)
        about = {"phase": number, "seq_length": length, "batch_size": batch_size, "rate": rate}
        run.ledger.note("phase-change", **about)


def decide_steps(run: Run) -> list[StepDecision]:
    """Make one exchange: rank 0's budget and clock, anybody's signal, everybody's joules.

    Returns what holds for the next update, and for those after it as far as they are decided ahead.
    """
    steps = look_ahead(run) if run.ledger else []
    last = (len(steps) - 1) * step_seconds(run)
    if run.deadline and time.time() + last >= run.deadline:
        run.signals.received = run.signals.received or _TIME_LIMIT
    late = int(run.signals.received == _TIME_LIMIT)
    joules, parts = run.meter.joules(), run.meter.parts
    mine = [
        int(run.signals.received is not None),
        late,
        *(int(1e3 * joules.get(part, 0.0)) for part in parts),
    ]
    size, each = len(mine), len(_NOTHING)

    def answer(ranks: Tensor) -> list[int]:
        padded = [*steps, *[_NOTHING] * (MOST_AHEAD - len(steps))]
        return [*ranks.sum(0).tolist(), len(steps), *(number for step in padded for number in step)]

    said = run.topology.ask_main(mine, answer, size + 1 + MOST_AHEAD * each)
    stop, late, *millijoules = said[:size]
    if run.ledger:
        run.ledger.meter(dict(zip(parts, (each / 1e3 for each in millijoules), strict=True)))
    count = 1 if stop else said[size]
    found = [said[size + 1 + number * each :][:each] for number in range(count)]
    return [
        StepDecision(
            stop=bool(stop),
            step_fits=bool(fits),
            save_due=bool(due),
            progress=progress / _PROGRESS_UNITS,
            middle=middle / _PROGRESS_UNITS,
            phase=phase,
            late=bool(late),
            milestone=milestone,
        )
        for fits, progress, middle, due, phase, milestone in found
    ]


_NOTHING = (0, 0, 0, 0, 0, -1)


def look_ahead(run: Run) -> list[tuple[int, ...]]:
    """Return what rank 0 decides about the next update and those after it: whether it fits, progress and
    middle, whether a save is due, phase, milestone."""
    assert run.ledger
    budget, course, totals = run.recipe.budget, run.course, run.ledger.totals()
    update, end = held_back(run, totals)
    found: list[tuple[int, ...]] = []
    for number in range(steps_ahead(run)):
        fits = budget.allows_step(totals, update + end)
        share = course.follow(totals, end)
        middle = course.middle(totals) if run.data.rules.rate_of_middle else share
        units = int(share * _PROGRESS_UNITS), int(middle * _PROGRESS_UNITS)
        phase, milestone = budget.phase_at(share), milestone_due(run, share if fits else 1.0)
        due = save_due(run, run.step + number)
        found.append((int(fits), *units, int(due), phase, milestone))
        if not fits or due or milestone >= 0:
            break  # what it leads to is asked for anew
        totals = charged(totals, run.recipe.phases[phase].cost)
    return found


def steps_ahead(run: Run) -> int:
    """Return how many updates are to be decided at once: more than one where an exchange costs much beside
    an update, and then no more than a signal may wait."""
    seconds = step_seconds(run)
    if run.recipe.budget.measured or not seconds:
        return 1
    needed = math.ceil(EXCHANGE * run.topology.world_size / (EXCHANGE_SHARE * seconds))
    return max(1, min(needed, int(ANSWER / seconds), MOST_AHEAD))


def step_seconds(run: Run) -> float:
    """Return what an update may take, on rank 0; 0 before the first."""
    return 3600 * run.ledger.step_hours / run.topology.world_size if run.ledger else 0.0


def held_back(run: Run, totals: Totals) -> tuple[float, float]:
    """Return what the next update, and what the end of the run will take of a budget of hours or kWh.

    The end is an evaluation and a save; an evaluation that has not been timed yet takes at most as long as
    training on its samples. Joules: at the mean power so far, and for the time by which their count is late.
    """
    assert run.ledger
    step = run.ledger.step_hours
    untimed = step * run.heldout.samples / run.cost.samples if run.heldout else 0.0
    end = (run.ledger.block_hours("evaluate") or untimed) + run.ledger.block_hours("checkpoint")
    if run.recipe.budget.unit != "kwh":
        return step, end
    late = step + run.topology.world_size * 2 * energy.PERIOD / 3600
    metered = totals.metered_device_seconds
    watts = (totals.joules or 0.0) / metered if metered else 0.0  # of one device
    return step * watts / 1e3, (end + late) * watts / 1e3


def write_log(run: Run, decision: StepDecision) -> None:
    """Log the loss of the updates since the last log, and the speeds; all ranks take part."""
    loss, norm = run.statistics.take(run.topology)
    with raise_on_all_ranks(run.topology):  # a rank of a tensor group may be alone in it
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss up to step {run.step} is {loss}; lower optimizer.lr or lengthen schedule.warmup,"
                " in a new run.dir"
            )
    check_skips(run, run.config.train.max_skipped)
    (peak,) = run.topology.agree([peak_bytes(run.topology.device)])
    scaling, slowest = check_scale(run), slowest_rank(run)
    if run.monitor and run.ledger:
        told = {"loss": loss, "lr": run.rate, "skipped_updates": int(run.statistics.skipped), **scaling}
        run.ledger.peak(peak)
        run.ledger.log(**told)
        run.monitor.log(
            decision.progress,
            run.ledger.totals(),
            grad_norm=None if run.grad_norm is None else float(run.grad_norm),
            grad_norm_max=norm,
            data_wait_seconds=run.feed.waited,
            **told,
            **slowest,
        )
        run.folder.follow(run.step)
    run.feed.waited = 0.0


def check_skips(run: Run, most: int) -> None:
    """Raise UserError where more updates in a row than that were skipped, as their gradients are not finite:
    with their samples, and how to go on from before them."""
    count, step, lr = int(run.statistics.skipped_in_row), run.step, run.config.optimizer.lr / 2
    if count <= most:
        return
    wait_for_save(run)  # which is where to go on from
    first, of = run.samples - count * run.cost.samples, run.config.run.dir
    words = ["python", "-m", "pretrain", f"{of}/config.yaml", f"run.dir={of}-lower", f"optimizer.lr={lr:g}"]
    if run.saved > 0:
        words += [f"run.branch.of={of}", f"run.branch.step={run.saved}"]
    which = f"last {count} updates (samples {first} to {run.samples - 1})"
    raise UserError(
        f"step {step}: the gradients of the {which} are not finite; look at these samples, or lower"
        f" optimizer.lr: {shlex.join(words)}"
    )


def slowest_rank(run: Run) -> dict[str, float]:
    """Return which of several ranks took longest for its own work since the last log, and by what share more
    than they did on average."""
    own, ranks = int(1e6 * run.watchdog.own_seconds()), run.topology.world_size
    if ranks == 1:
        return {}
    longest, rank = divmod(run.topology.agree([own * ranks + run.topology.rank])[0], ranks)
    (total,) = run.topology.add_up([own])
    return {"slowest_rank": rank, "slowest_excess": longest * ranks / max(1, total) - 1}


def check_scale(run: Run) -> dict[str, float]:
    """Return the loss scale of a run in fp16, for its log; UserError if no scale will do."""
    if run.engine.loss_scale is None:
        return {}
    state = run.engine.loss_scale.state()
    if scale_exhausted(state):
        raise UserError(
            f"train.precision = fp16: gradients overflow at step {run.step} although the loss scale is down"
            f" to {MIN_SCALE:g}; take bf16 or fp32, or lower optimizer.lr, in a new run.dir"
        )
    return {"loss_scale": state["value"]}


def peak_bytes(device: torch.device) -> int:
    """Return the most that this rank has held: of the GPU's memory, or on a CPU of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def evaluation_due(run: Run, decision: StepDecision) -> bool:
    """Tell that one is due every so many steps, and at the end of the budget; never twice at one step."""
    if run.heldout is None or run.scored[0] == run.step or decision.stop:
        return False
    every = run.config.evaluate.every_steps
    return not decision.step_fits or bool(every and run.step and run.step % every == 0)


def evaluate(run: Run, decision: StepDecision) -> None:
    """Measure held-out loss under the fixed mask; all ranks take part."""
    assert run.heldout
    begin = time.monotonic()
    with timed(run.ledger, "evaluate"):
        here = run.topology
        micro = run.recipe.phases[-1].micro_batch(here.data_size)
        run.engine.module.eval()

        run.watchdog.at("evaluation", long=True)  # the first batch, which may be compiled

        def forward(batch: Batch, score: bool) -> Tensor:
            answer = run.engine.forward(batch, score)
            run.watchdog.at("evaluation")
            return answer

        score = run.heldout.score(
            forward, micro, here.device, here.data_rank, here.data_size, here.sum_over_data
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
            decision.progress,
            run.ledger.totals(),
            held_out_loss=score.loss,
            held_out_accuracy=score.accuracy,
            held_out_bits_per_byte=score.bits_per_byte,
            evaluation_seconds=time.monotonic() - begin,
        )


def save_due(run: Run, step: int) -> bool:
    """Tell by steps, at `step`, or by rank 0's clock."""
    every = run.config.checkpoint
    if step == run.saved or step == 0:
        return False
    if run.writer and run.writer.failed:
        return True  # which says so
    by_cost = run.recipe.budget.measured or every.every_minutes == "auto"
    if by_cost and run.ledger and not run.ledger.block_hours("checkpoint"):
        return True  # once early, to know how long a save takes
    late = time.monotonic() - run.saved_at >= save_interval(run)
    return bool(late or (every.every_steps and step % every.every_steps == 0))


def save_interval(run: Run) -> float:
    """Return the seconds after which a save is due.

    With `auto` those that lose least to saves and failures together, sqrt(2 x stop x MTBF) (Young, CACM 1974;
    Daly, FGCS 2006), where a save stops training for `stop` seconds; no fewer than it takes to write.
    """
    every = run.config.checkpoint
    if every.every_minutes != "auto":
        return 60 * (every.every_minutes or math.inf)
    assert run.ledger
    written = run.writer.seconds if run.writer else 0.0
    return max(written, math.sqrt(2 * run.stopped * run.ledger.mtbf(3600 * every.mtbf_hours)))


def milestone_due(run: Run, share: float) -> int:
    """Return the index of the first share of the budget whose weights should have been kept by now; -1: none.

    Those that were passed before this attempt began are not made up for: its weights are not theirs.
    """
    shares = run.config.checkpoint.keep
    due = (index for index, at in enumerate(shares) if at <= share + TOLERANCE and at not in run.milestones)
    return next(due, -1)


def keep_milestone(run: Run, share: float) -> None:
    """Write the weights, which stay; all ranks take part."""
    main = run.topology.is_main
    name = checkpoint.milestone(share)
    head = run.ledger.note("milestone", share=share) if run.ledger else ""
    with timed(run.ledger, "checkpoint"), raise_on_all_ranks(run.topology):
        tensors = {name: tensor.to("cpu") for name, tensor, _ in run.engine.tensors("param") if main}
        if main:
            checkpoint.save_weights(run.folder, state_of(run, head), name, tensors)
    run.milestones.add(share)


def save(run: Run) -> None:
    """Write a checkpoint, or begin to; all ranks take part."""
    begin = time.monotonic()
    wait_for_save(run)  # before the next one takes memory
    main, state = run.topology.is_main, state_of(run, run.ledger.save() if run.ledger else "")
    with timed(run.ledger, "checkpoint"), raise_on_all_ranks(run.topology):
        keep = run.config.checkpoint.keep_last
        checkpoint.save(run.folder, Progress(run), state, keep, main, run.writer)
    run.saved, run.saved_at = run.step, time.monotonic()
    run.stopped = run.saved_at - begin
    if main:
        run.folder.write_status("running", run.step)


class Progress:
    """The tensors of a run's engine, each of which shows the watchdog that a save goes on."""

    def __init__(self, run: Run) -> None:
        self._engine, self._at = run.engine, run.watchdog.at
        self.load_tensors = run.engine.load_tensors

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield what the engine does."""
        for found in self._engine.tensors(kind):
            self._at("save")
            yield found
        self._at("save", long=True)  # now they may be written


def wait_for_copy(run: Run) -> None:
    """Return when what the last checkpoint is written of may change; no other rank needs to wait for it."""
    if run.writer and run.writer.copying:
        begin = time.monotonic()
        with timed(run.ledger, "checkpoint"):
            run.writer.wait_copied()
        run.stopped += time.monotonic() - begin


def wait_for_save(run: Run) -> None:
    """Return when the last checkpoint is on disk; UserError on all ranks if it could not be written."""
    if run.writer:
        with timed(run.ledger, "checkpoint"), raise_on_all_ranks(run.topology):
            run.writer.wait()


def state_of(run: Run, head: str) -> State:
    """Return what a checkpoint says of a run; head: of the ledger."""
    if run.ledger and not run.recipe.budget.measured:
        run.course.follow(run.ledger.totals())  # it may have looked ahead
    return State(
        step=run.step,
        samples=run.samples,
        optimizer_step=run.engine.optimizer_step,
        config=run.config.model_dump(mode="json"),
        fingerprints=run.data.fingerprints,
        segments=[list(segment) for segment in run.segments],
        ledger_head=head,
        account=run.ledger.account if run.ledger else None,
        loss=run.scored[1] if run.scored[0] == run.step else None,
        layout=layout(run.recipe, run.topology),
        phase=run.phase,
        loss_scale=run.engine.loss_scale.state() if run.engine.loss_scale else None,
        rules=run.data.rules,
        progress=run.course.progress,
        skipped=int(run.statistics.skipped),
    )


def finish(run: Run, decision: StepDecision) -> int:
    """Says how it ended, in the ledger and in status.json, when the last checkpoint is on disk."""
    wait_for_save(run)
    # A signal that comes with the last step leaves no more than the evaluation for the next start.
    complete = not decision.step_fits and (run.heldout is None or run.scored[0] == run.step)
    code = DONE if complete else STOPPED
    reason = f"stopped by {run.signals.received or 'another rank'}"
    if run.ledger:
        if code == DONE:
            reason = f"the budget is spent{unused(run, run.ledger.totals())}"
        if decision.stop:
            run.ledger.note("signal", reason=reason)
        epochs = run.blend.epochs(run.samples)
        head = run.ledger.note("finish" if code == DONE else "stop", reason=reason, epochs=epochs)
        state = "finished" if code == DONE else "stopped"
        run.folder.write_status(state, run.step, reason, code, head)
    return code


def unused(run: Run, totals: Totals) -> str:
    """Return what of a budget that only a run can tell was held back for the end and then not needed, in
    words."""
    left = run.recipe.budget.total - run.recipe.budget.spent(totals)
    if not run.recipe.budget.measured or left <= 0:
        return ""
    of = f"{left:.2g} of {run.recipe.budget.total:g} {run.recipe.budget.unit}"
    return f"; {of} was held back for evaluation and save and not needed"


def close(run: Run) -> None:
    """Leaves the run; nothing collective may follow."""
    run.meter.close()
    run.feed.close()
    if run.monitor:
        run.monitor.close()
    run.folder.release()
