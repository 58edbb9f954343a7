"""Where an attempt starts: at nothing, at the run's newest checkpoint, or at one of the run it branches from.

Up to the choice of that nothing of the run is touched. From there its ledger counts, since a start-up costs
too.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.account import energy
from pretrain.account.budget import Course
from pretrain.account.ledger import trunk
from pretrain.account.ledger_writer import Ledger, timed
from pretrain.account.process import process_start
from pretrain.account.recipe import Recipe, make_recipe
from pretrain.account.schedule import rate
from pretrain.checkpoint import State
from pretrain.config import BranchOptions, Config, build_config
from pretrain.continuing import branched, carried, check_branches, check_continues, rates, run_segments
from pretrain.data.corpora import Data, open_blend
from pretrain.data.rng import Rules
from pretrain.data.sampler import Blend, Segment
from pretrain.errors import UserError
from pretrain.feed import Feed, open_feed
from pretrain.inputs import Inputs
from pretrain.parallel.launchers import job_end
from pretrain.parallel.topology import Topology, device_name, device_uuid, on_main, raise_on_all_ranks
from pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class Start:
    """The ranks and the folder of an attempt, and what it goes on from."""

    topology: Topology
    folder: RunFolder
    data: Data
    """What the samples are read from, by the rules that the run began with."""
    segments: list[Segment]
    phase: int
    """Index of the phase of the update before."""
    blend: Blend
    """What reads the samples of that phase, in the last of the segments."""
    feed: Feed
    course: Course
    meter: energy.Meter
    ledger: Ledger | None
    """The run's ledger, on rank 0."""
    deadline: float | None
    """Unix time at which to stop, on rank 0 of a job with a time limit."""
    state: State | None = None
    """What the checkpoint says of the run; None where the run begins."""
    path: Path = Path()
    """The checkpoint's folder."""
    stamps: checkpoint.Stamps | None = None
    """Stamps of the checkpoint's files, which tell whether they changed since."""
    branch: BranchOptions | None = None
    """What the config says of the branch, where the checkpoint is another run's."""


def open_start(inputs: Inputs, topology: Topology, folder: RunFolder) -> Start:
    """Choose where to start, and open the ledger; the folder is claimed.

    UserError where a checkpoint cannot go on with these inputs, or nobody measures what the budget is of.
    """
    recipe, config, data = inputs.recipe, inputs.recipe.config, inputs.data
    meter = open_meter(topology)
    with raise_on_all_ranks(topology):
        check_sensors(recipe.budget.unit, topology.device, meter.parts)
    # Up to here nothing is touched: what is refused leaves the run as it was.
    found = on_main(topology, lambda: _starting_point(folder, config, data))
    path, stamps = json.loads(found) if found else ("", None)
    with raise_on_all_ranks(topology):
        state = checkpoint.read_state(Path(path), stamps) if path else None
    branch = config.run.branch if path and Path(path).parent != folder.checkpoints else None
    if state:
        data = replace(data, rules=Rules(state.rules))
        state = branched(state, recipe, data) if branch else state
    segments = run_segments(config, data, state)
    course = Course(recipe.budget, carried(state, config) if state else None)
    deadline = _deadline(config.checkpoint.end_margin_minutes) if topology.is_main else None
    ledger = _open_ledger(recipe, topology, folder, state, branch, meter)
    if ledger and state:
        if branch:
            _say_branch(ledger, state, branch, config, course)
        else:
            _note_changes(ledger, state, recipe, course, segments, layout(recipe, topology))
    phase = state.phase if state else 0
    with timed(ledger, "startup"):
        blend = open_blend(recipe.phases[phase].config, data, segments)
    return Start(
        topology=topology,
        folder=folder,
        data=data,
        segments=segments,
        phase=phase,
        blend=blend,
        feed=open_feed(recipe.phases[phase], topology, data, blend),
        course=course,
        meter=meter,
        ledger=ledger,
        deadline=deadline,
        state=state,
        path=Path(path),
        stamps=stamps,
        branch=branch,
    )


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


def _deadline(margin: float) -> float | None:
    """Return when to stop: `margin` minutes before the job's end; in a short job at most a fifth of it.

    A shell (of tmux, of salloc) keeps the variables of a job that is over.
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
    return end - min(60 * margin, 0.2 * (end - now))


def _is_over(end: float, now: float) -> bool:
    """Return whether a job ended before this process began; by two clocks, of which one may be set."""
    return end <= min(process_start(), now)


# ---- what is other than before -------------------------------------------------------------------


def _say_branch(ledger: Ledger, state: State, branch: BranchOptions, config: Config, course: Course) -> None:
    """Says where a run begins, and with what learning rate."""
    progress = course.follow(ledger.totals())
    course.pause()
    before = build_config(state.config, "config of the checkpoint")
    logging.info(
        "branch      of %s at step %d, %.1f%% of the budget; learning rate %.3g, there %.3g",
        branch.of,
        state.step,
        100 * progress,
        rate(config, progress),
        rate(before, make_recipe(before).budget.progress(ledger.totals())),
    )


def _note_changes(
    ledger: Ledger,
    state: State,
    recipe: Recipe,
    course: Course,
    segments: Sequence[Segment],
    now_laid: dict[str, Any],
) -> None:
    """Says and records what is other than in the attempt before; the ledger has noted another layout."""
    config = recipe.config
    if changes := dropout_changes(config, {**now_laid, **(state.layout or {})}, now_laid):
        logging.info("dropout     other elements are dropped from here on than would have been: %s", changes)
    before = build_config(state.config, "config of the checkpoint").budget.amount
    now = config.budget.amount
    if before != now:
        old, new = (f"{amount:g} {unit}" for unit, amount in (before, now))
        totals = ledger.totals()
        progress = course.follow(totals)
        course.pause()
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


def dropout_changes(config: Config, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what of a layout is other than before, in words, if dropout depends on it (`seed_dropout`)."""
    if not (config.model.dropout or config.model.decoder_dropout):
        return ""
    names = ("ranks", "tensor", "micro_batch", "compile")
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name])
