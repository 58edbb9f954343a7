"""``python -m pretrain CONFIG [section.key=value ...]``: one run, alone or under any launcher.

Exit codes: 0 the budget is spent; 75 stopped early on request, start me again; 2 the user must change
something; 1 a defect. Launchers change exit codes, so run.dir/status.json says the same.
"""

import argparse
import errno
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from pretrain import __version__, streams
from pretrain.account import epochs
from pretrain.account.budget import Budget
from pretrain.account.recipe import Phase, Recipe
from pretrain.config import (
    Config,
    ModelOptions,
    build_config,
    config_warnings,
    dump_config,
    geometry,
    load_config,
    method_of,
)
from pretrain.data.sampler import Blend
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DEFECT, STOPPED, USER_ERROR, UserError
from pretrain.files import check_name
from pretrain.signals import Signals
from pretrain.terminal import wrapped

_WINDOWS_SHOWN = 256
_REASON = 500  # characters
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; overrides are the words with a = in them."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Pre-train an encoder as CONFIG says. Starting a run.dir again continues its run.",
        epilog="Also: torchrun -m pretrain ..., srun python -m pretrain ..., mpirun python -m pretrain ...,"
        " deepspeed --module pretrain ...",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file (configs/ has one for each method)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values over those of CONFIG"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, train nothing"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers; checked")
    parser.add_argument("--version", action="version", version=f"LateMask {__version__}")
    return parser.parse_intermixed_args(argv)


def plan(recipe: Recipe, data_size: int, blend: Blend) -> str:
    """Return what the run will do and the arithmetic behind it, for the reader of a log."""
    config, model = recipe.config, recipe.config.model
    size = geometry.parameters(model, recipe.vocab_size)
    parts = "  ".join(f"{part} {count / 1e6:.2f} M" for part, count in size.items())
    lines = [
        f"method      {method_of(config)}: {model.num_layers} + {model.decoder_layers} layers x"
        f" {model.hidden_size}, {model.block} {model.norm}-LN{_local(model)}, {recipe.vocab_size} pieces",
        f"parameters  {parts}",
    ]
    for phase, begin in zip(recipe.phases, [0.0, *recipe.budget.phase_ends], strict=True):
        if len(recipe.phases) > 1:
            lines.append(f"phase       from {begin:.4g} of the budget on")
        lines += _phase(phase, data_size)
    lines.append(f"documents   {config.corpus.documents}; {_documents(blend)}")
    return "\n".join([*lines, f"budget      {_budget(recipe, blend)}"])


def _local(model: ModelOptions) -> str:
    layers = sum(map(model.is_local, range(model.num_layers)))
    return f", {layers} of them local ({model.local_window} tokens)" if layers else ""


def _phase(phase: Phase, data_size: int) -> list[str]:
    """Return what an update of a phase is."""
    from pretrain.data.masking import counts

    model, train, update = phase.config.model, phase.config.train, phase.cost.flops
    count, micro = counts(phase.config.masking, train.seq_length), phase.micro_batch(data_size)
    shares = "  ".join(f"{part} {count / update.total:.0%}" for part, count in update.parts.items())
    return [
        f"sequence    {count.length} rows: {count.predicted} predicted ({count.masked} [MASK],"
        f" {count.random} random, {count.predicted - count.masked - count.random} kept); the encoder sees"
        f" {count.length - (geometry.late_masks(model, count.masked) if model.mask_from else 0)}",
        f"update      {train.batch_size} sequences = {data_size} data ranks x {micro} a micro-batch"
        f" x {train.batch_size // data_size // micro} accumulated; {update.total:.3g} FLOPs ({shares})",
    ]


def _documents(blend: Blend) -> str:
    """How much of the first windows is within one document, and what of an epoch is in none."""
    from pretrain.data.masking import document_numbers

    tokens = blend.read(np.arange(min(_WINDOWS_SHOWN, blend.samples_per_epoch))).tokens
    numbers = document_numbers(tokens, blend.samplers[0].eos)
    pairs = np.mean([np.mean(row[:, None] == row) for row in numbers])
    tail = sum(sampler.tail_tokens for sampler in blend.samplers)
    return (
        f"{numbers[:, -2].mean() + 1:.2f} a window, {pairs:.0%} of the pairs of rows are within one;"
        f" {tail:,} tokens at the end of an epoch fill no window"
    )


def _budget(recipe: Recipe, blend: Blend) -> str:
    budget, given = recipe.budget, recipe.config.budget
    said = f"{budget.total:.7g} {budget.unit}"
    if given.relative_to:
        said += f" ({given.fraction:g} of {given.relative_to}'s)"
    if branch := recipe.config.run.branch:
        said += f", {budget.inherited:.7g} of them by {branch.of} at step {branch.step}"
    if budget.measured:
        return said
    steps = budget.updates()
    said += f" = {' + '.join(f'{number:,}' for number in steps)} updates"
    said += f" = {budget.planned('flops'):.3g} FLOPs = {budget.planned('tokens'):.3g} rows"
    if len(steps) > 1:
        return said
    windows = {sampler.corpus.prefix: sampler.samples_per_epoch for sampler in blend.samplers}
    epochs = [
        f"{count:.2f} epochs of {windows[prefix]:,} windows" + (f" of {prefix}" if len(windows) > 1 else "")
        for prefix, count in blend.epochs(steps[0] * budget.costs[0].samples).items()
    ]
    return f"{said} = {', '.join(epochs)}"


def main(argv: list[str] | None = None) -> int:
    """Runs; returns the exit code."""
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        for word in (args.config, *args.overrides):
            check_name(word)
        config = load_config(args.config, args.overrides)
        return _dry_run(config) if args.dry_run else _run(config, args.local_rank)
    except UserError as error:
        return _say(error)
    except OSError as error:
        code, reason = _verdict(error, None)
        if code == DEFECT:
            raise
        return _say(UserError(reason))


def _say(error: UserError) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _warn_of_epochs(recipe: Recipe) -> None:
    if text := epochs.warning(epochs.epochs(recipe)):
        logging.warning("warning: %s", text)


def _dry_run(config: Config) -> int:
    import torch

    from pretrain.build import check_start
    from pretrain.continuing import refuse_changes, with_branch
    from pretrain.data.corpora import open_blend
    from pretrain.inputs import open_inputs

    for warning in config_warnings(config):
        logging.warning("warning: %s", warning)
    config = with_branch(config)
    inputs = open_inputs(config, torch.device("cpu"), 1)
    recipe, data = inputs.recipe, inputs.data
    refuse_changes(config, recipe, data)
    _warn_of_epochs(recipe)
    check_start(inputs)
    with tempfile.TemporaryDirectory() as folder:  # for the order of many documents: nothing is to be left
        blend = open_blend(recipe.phases[-1].config, replace(data, orders=Path(folder)))
        lines = [plan(recipe, 1, blend), f"masks       {_masks(recipe.config, blend, data.tokenizer)}"]
    print(dump_config(recipe.config))
    if text := foreseen(recipe.budget, _products_rate(recipe.config.train.precision or "fp32")):
        lines.append(f"estimate    {text}")
    print(wrapped("\n".join(lines), indent=12))
    return 0


def foreseen(budget: Budget, rate: float) -> str:
    """Return the least time that a budget takes, or the most updates that its hours buy; "" for kWh, of which
    nobody knows before.

    rate: FLOP/s that matrix products reach.
    """
    costs = [cost.hardware_flops for cost in budget.costs]
    how = f"on one device here, were all of it matrix products ({rate / 1e9:,.0f} GFLOP/s)"
    if not budget.measured:
        seconds = sum(number * cost for number, cost in zip(budget.updates(), costs, strict=True)) / rate
        least = timedelta(seconds=round(seconds)) if seconds >= 10 else f"{seconds:.1g} seconds"
        return f"at least {least} {how}"
    if budget.unit != "device_hours":
        return ""
    shares = [end - begin for begin, end in pairwise([0.0, *budget.phase_ends, 1.0])]
    flops = budget.total * 3600 * rate
    updates = sum(int(share * flops / cost) for share, cost in zip(shares, costs, strict=True))
    return f"at most {updates:,} updates {how}"


def _products_rate(precision: str) -> float:
    """Return the FLOP/s of large matrix products on this machine's GPU, else its cores: the best of three."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024  # some CPUs are slow at bf16
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    matrix, seconds = torch.ones(size, size, dtype=dtype, device=device), []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds[1:])


def _masks(config: Config, blend: Blend, tokenizer: Tokenizer) -> str:
    """What exact counts ask of the first windows: specials predicted, words and spans cut."""
    from pretrain.data.masking import masker

    first = np.arange(min(_WINDOWS_SHOWN, blend.samples_per_epoch))
    sample = blend.read(first)
    mask = masker(config.masking, config.train.seq_length, tokenizer)
    masked = mask(sample.tokens, sample.keys, sample.views)
    return (
        f"{config.masking.scheme}; of the {masked.targets.size:,} predicted rows of {len(first)} windows"
        f" {masked.specials_chosen} are sequence specials; words or spans cut: {masked.units_cut}"
    )


def _run(config: Config, local_rank: int | None) -> int:
    signals = Signals()
    from pretrain.build import build
    from pretrain.continuing import with_branch
    from pretrain.inputs import open_inputs
    from pretrain.parallel.topology import Topology, connect, on_main, raise_on_all_ranks
    from pretrain.run_folder import RunFolder
    from pretrain.start import open_start
    from pretrain.train import close, train
    from pretrain.watchdog import NOTICE, Watchdog, patience

    for warning in config_warnings(config):
        logging.warning("warning: %s", warning)
    folder, topology, stall = RunFolder(config.run.dir), Topology(), config.monitor.stall_seconds
    watchdog = Watchdog(topology, folder, 0)
    try:
        needs_group = config.train.engine == "deepspeed"
        topology = connect(config.parallel.tensor, needs_group, local_rank, patience(stall))
        on_main(topology, lambda: folder.claim(_patience_with_others(stall)))
        # What NCCL leaves when it gives up by itself.
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.path.resolve() / "nccl-dump-rank-"))
        watchdog = Watchdog(topology, folder, stall)
        if config.run.branch:  # of a trunk that goes on all ranks must see one step
            text = on_main(topology, lambda: with_branch(config).model_dump_json())
            config = build_config(json.loads(text))
        with raise_on_all_ranks(topology):
            inputs = open_inputs(config, topology.device, topology.data_size)
        run = build(inputs, open_start(inputs, topology, folder), signals, watchdog)
        if topology.is_main:
            logging.info(wrapped(plan(run.recipe, topology.data_size, run.blend), sys.stderr, indent=12))
            _warn_of_epochs(run.recipe)
            if run.step:
                logging.info("continues   from step %d", run.step)
        # Whatever happens, the bar is gone before anything is said of it, and the last checkpoint is written.
        with run.monitor or nullcontext(), run.writer or nullcontext():
            code = train(run)
        signals.leave_with(code)
        watchdog.leave(0, "")
        close(run)
        if topology.is_main:
            _say_end(folder.path, folder.status()["reason"], code)
        topology.close()
        return code
    except BaseException as error:
        with suppress(KeyboardInterrupt):  # who interrupts again need not know
            watchdog.ask(error, bool(signals.received))
        code, reason = _verdict(error, signals.received)
        watchdog.leave(code, reason)
        signals.leave_with(code)
        if code == DEFECT:
            traceback.print_exc()
        elif code == STOPPED:
            _say_end(folder.path, reason, code)
        elif topology.is_main:
            _say(UserError(reason))
    if topology.is_main and folder.claimed:
        state = "stopped" if code == STOPPED else "failed"
        with suppress(OSError):  # of a disk that is full, which has been said
            folder.write_failure(state, reason, code)
    if code == USER_ERROR and not topology.main_has_said(2 * NOTICE):
        _say(UserError(f"rank {topology.rank}: {reason}"))
    if topology.world_size == 1:
        folder.release()  # the watchdog's thread has it for some seconds yet
        return code
    # The other ranks may be waiting in a collective: nothing tidy is possible any more.
    leave(code)


def _patience_with_others(stall: float) -> float:
    """Return how many seconds to wait for a process that has the run's folder.

    Slurm starts a job again while a rank of it may still be alive on a node that it has lost; that leaves
    when it hears nothing of the others.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return 2 * stall + 60 if restarted else 0


def leave(code: int) -> NoReturn:
    """Ends the process at once, without taking Python apart.

    All that a run has is closed by then; threads of the libraries (gloo's, OpenMP's, TensorBoard's) can hang
    or abort an interpreter that is being taken apart.
    """
    os._exit(streams.finish(code))


def _say_end(path: Path, reason: str, code: int) -> None:
    further = "; the same command goes on with it" if code == STOPPED else ""
    logging.info(wrapped(f"{path}: {reason}{further}", sys.stderr))


def _verdict(error: BaseException, signal: str | None) -> tuple[int, str]:
    """Exit code and reason, of one line, of a run that ended with `error`, after that signal."""
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "interrupted; what came after the last checkpoint is lost"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return USER_ERROR, f"{error.filename or 'disk'}: {error.strerror}; free space or choose another place"
    text = f"{type(error).__name__}: {error}".splitlines()[0][:_REASON]
    if signal:  # who tells a whole group of processes to stop ends the compilers in it too
        return STOPPED, f"stopped by {signal}; what came after the last checkpoint is lost ({text})"
    return DEFECT, text


if __name__ == "__main__":
    streams.prepare()
    leave(main())
