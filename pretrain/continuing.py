"""May a run go on with this config? What a start, a dry run and a submission ask, before anything is touched.

Imports no torch.
"""

from contextlib import suppress
from pathlib import Path

from pretrain import checkpoint
from pretrain.account import schedule
from pretrain.account.budget import Totals
from pretrain.account.recipe import make_recipe
from pretrain.checkpoint import State
from pretrain.config import Config, build_config, phase_configs
from pretrain.data.corpora import Data
from pretrain.data.sampler import Segment, continue_segments
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder

_WHOSE = "config of the checkpoint"


def run_segments(config: Config, data: Data, state: State | None) -> list[Segment]:
    """The segments of a run that starts, or goes on from a checkpoint; UserError if the blend changed."""
    length = phase_configs(config)[0].train.seq_length
    if state is None:
        return continue_segments([], config.corpus.segment, data.blend, 0, length)
    past = [
        Segment(number, first, tuple((weight, name) for weight, name in blend), *rest)
        for number, first, blend, *rest in state.segments
    ]
    return continue_segments(past, config.corpus.segment, data.blend, state.samples, length)


def check_continues(state: State, config: Config, data: Data | None) -> None:
    """UserError with all reasons, one a line, why the checkpoint cannot go on; data: None where it is not
    here."""
    reasons = []
    try:
        if data:
            run_segments(config, data, state)
    except UserError as error:
        reasons.append(str(error))
    try:
        checkpoint.check_continues(state, config, {"tokenizer": data.tokenizer.hash} if data else {})
    except UserError as error:
        reasons.append(str(error))
    if reasons:
        raise UserError("\n".join(reasons))


def refuse_changes(config: Config, data: Data | None) -> None:
    """UserError where the run of a config, its vocabulary size known, has a checkpoint that cannot go on with
    it, or its folder is another's, as its start would say.

    What only a start knows, such as the precision of its device, is taken to be as it was.
    """
    RunFolder(config.run.dir).refuse_foreign()
    checkpoint.refuse_gone(config.run.dir)
    state = _newest(Path(config.run.dir))
    if state is None:
        return
    before, train = build_config(state.config, _WHOSE).train, config.train
    kept = {
        name: getattr(before, name) for name in ("precision", "deterministic") if getattr(train, name) is None
    }
    check_continues(state, config.model_copy(update={"train": train.model_copy(update=kept)}), data)


def _newest(run: Path) -> State | None:
    """The state of the checkpoint that a start would take, as far as its small files tell."""
    paths = [run / "checkpoints" / f"step-{step:08d}" for step in reversed(checkpoint.steps(run))]
    latest = checkpoint.pointed(run, "latest")
    for path in sorted(paths, key=lambda one: one != latest):
        with suppress(UserError):  # the start says so, and takes the next
            return checkpoint.read_state(path)
    return None


def carried(state: State, config: Config) -> float | None:
    """Progress with which a run of hours or kWh goes on from a checkpoint; None: what it has spent says.

    Of another amount it is another share: else a finished run would go on at the rate of its end.
    """
    (unit, before), (now, amount) = _budget_of(state), config.budget.amount
    if state.progress is None or unit != now:
        return None
    return min(1.0, state.progress * before / amount)


def rates(state: State, config: Config, progress: float, totals: Totals) -> tuple[float, float]:
    """The learning rate at the checkpoint by its own budget, and by that of `config`, now at `progress`."""
    before = state.progress
    if before is None:
        before = make_recipe(build_config(state.config, _WHOSE)).budget.progress(totals)
    return schedule.rate(config, before), schedule.rate(config, progress)


def _budget_of(state: State) -> tuple[str, float]:
    return build_config(state.config, _WHOSE).budget.amount
