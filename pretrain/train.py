"""A run: `build` makes its parts once, `train` is a loop that names every effect in order.

A step is one update of the optimizer, whether of one micro-batch or of many.
Before it the ranks agree on what comes next (`decision`). Nothing else is shared but gradients.
"""

import logging
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from pretrain import checkpoint, replay
from pretrain.account import schedule
from pretrain.account.ledger import Totals
from pretrain.account.ledger_writer import timed
from pretrain.account.process import peak_resident
from pretrain.build import Run
from pretrain.checkpoint import State
from pretrain.data.corpora import open_blend
from pretrain.decision import TIME_LIMIT, StepDecision, decide_steps
from pretrain.errors import DONE, STOPPED, UserError
from pretrain.feed import open_feed
from pretrain.model.late_mask import Batch
from pretrain.model.loss_scale import MIN_SCALE, scale_exhausted
from pretrain.parallel.topology import raise_on_all_ranks
from pretrain.start import layout

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
                f"{TIME_LIMIT} leaves no time for an update: raise it, or lower"
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
    run.blend = open_blend(phase.config, run.data, run.segments)
    run.feed = open_feed(phase, run.topology, run.data, run.blend)
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
    scaling = check_scale(run)
    peak, slowest = peak_and_slowest(run)
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


def peak_and_slowest(run: Run) -> tuple[int, dict[str, float]]:
    """Return the most bytes that a rank has held, and which of several ranks took longest for its own work
    since the last log, and by what share more than they did on average; in one exchange."""

    def answer(ranks: Tensor) -> list[int]:
        peaks, own = ranks.unbind(1)
        return [int(peaks.max()), int(own.argmax()), int(own.max()), int(own.sum())]

    mine = [peak_bytes(run.topology.device), int(1e6 * run.watchdog.own_seconds())]
    peak, rank, longest, total = run.topology.ask_main(mine, answer, 4)
    if run.topology.world_size == 1:
        return peak, {}
    excess = longest * run.topology.world_size / max(1, total) - 1
    return peak, {"slowest_rank": rank, "slowest_excess": excess}


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


def keep_milestone(run: Run, share: float) -> None:
    """Write the weights, which stay; all ranks take part."""
    main = run.topology.is_main
    name = checkpoint.milestone(share)
    head = run.ledger.note("milestone", share=share) if run.ledger else ""
    with timed(run.ledger, "checkpoint"), raise_on_all_ranks(run.topology):
        tensors = {name: tensor.to("cpu") for name, tensor in run.engine.tensors("param") if main}
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
        self.load_tensors, self.pieces, self.join = (
            self._engine.load_tensors,
            self._engine.pieces,
            self._engine.join,
        )

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
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
