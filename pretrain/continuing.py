"""May a run go on with this config? What a start, a dry run and a submission ask, before anything is touched.

Imports no torch.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.account import ledger, schedule
from pretrain.account.budget import spent
from pretrain.account.ledger import SavedAccount, Statement, Totals
from pretrain.account.recipe import Recipe, make_recipe
from pretrain.checkpoint import State
from pretrain.config import (
    BUDGET_UNITS,
    BranchOptions,
    Config,
    build_config,
    changed_keys,
    phase_configs,
    read_yaml,
)
from pretrain.data.corpora import Data
from pretrain.data.sampler import Segment, continue_segments
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder

_WHOSE = "config of the checkpoint"


def run_segments(config: Config, data: Data, state: State | None) -> list[Segment]:
    """Return the segments of a run that starts, or goes on from a checkpoint; UserError if the blend
    changed."""
    length = phase_configs(config)[0].train.seq_length
    if state is None:
        return continue_segments([], config.corpus.segment, data.blend, 0, length)
    return continue_segments(_past(state), config.corpus.segment, data.blend, state.samples, length)


def _past(state: State) -> list[Segment]:
    try:
        return [
            Segment(number, first, tuple((weight, name) for weight, name in blend), *rest)
            for number, first, blend, *rest in state.segments
        ]
    except (TypeError, ValueError):
        raise UserError(f"segments of step {state.step}: unreadable; take another checkpoint") from None


def check_continues(state: State, config: Config, data: Data | None) -> None:
    """Raise UserError with all reasons, one a line, why the checkpoint cannot go on; data: None where it is
    not here."""
    reasons, changes = [], []
    try:
        if data:
            run_segments(config, data, state)
    except UserError as error:
        reasons.append(str(error))
    try:
        changes += changed_keys(build_config(state.config, _WHOSE), config)
    except UserError as error:
        reasons.append(str(error))
    known = state.fingerprints.get("tokenizer")
    if data and known and data.tokenizer.hash != known:
        changes.append(
            f"corpus: tokenizer has other content than at step {state.step}"
            f" ({known[:12]} -> {data.tokenizer.hash[:12]})"
        )
    advice = "a run cannot continue with this changed; set it back, or choose another run.dir"
    reasons += [f"{change}: {advice}" for change in changes]
    if reasons:
        raise UserError("\n".join(reasons))


def refuse_changes(config: Config, recipe: Recipe, data: Data | None) -> None:
    """Raise UserError where the run of a config has a checkpoint that cannot go on with it, or its folder is
    another's, as its start would say.

    recipe: of the config, for the size of its vocabulary and the step of its trunk. What only a start knows,
    such as the precision of its device, is taken to be as it was.
    """
    config = config.model_copy(update={"model": recipe.config.model, "run": recipe.config.run})
    RunFolder(config.run.dir).refuse_foreign()
    checkpoint.refuse_gone(config.run.dir)
    state = _newest(config.run.dir)
    if state is None:
        if branch := config.run.branch:
            trunk = checkpoint.verified_state(checkpoint.locate(branch.of, branch.step))
            check_branches(trunk, config, data)
        return
    with suppress(UserError):  # which is said with all other reasons
        before, train = build_config(state.config, _WHOSE).train, config.train
        kept = {
            name: getattr(before, name)
            for name in ("precision", "deterministic")
            if getattr(train, name) is None
        }
        config = config.model_copy(update={"train": train.model_copy(update=kept)})
    check_continues(state, config, data)


def _newest(run: str | Path) -> State | None:
    """The state of the checkpoint that a start would take, as far as its small files tell."""
    for path in checkpoint.candidates(run):
        with suppress(UserError):  # the start says so, and takes the next
            return checkpoint.read_state(path)
    return None


# ---- a run that begins with the checkpoint of another


def with_branch(config: Config) -> Config:
    """Return the config of a branch with the step that it begins at and what its trunk had spent by then.

    Both are kept by the run; before it has begun, the trunk says them. UserError if that has no such
    checkpoint, or the run is another's branch.
    """
    branch, run = config.run.branch, Path(config.run.dir)
    if branch is None:
        return config
    kept = _kept_branch(run)
    if kept is None:
        state = checkpoint.verified_state(checkpoint.locate(branch.of, branch.step))
        totals = ledger.as_totals(_account(branch, state))
        inherited = {unit: spent(totals, unit) for unit in BUDGET_UNITS}
        kept = branch.model_copy(update={"step": state.step, "inherited": inherited})
    elif branch.of != kept.of or branch.step not in ("latest", "best", kept.step):
        raise UserError(
            f"run.branch = {branch.of} at {branch.step}: {run} is a branch of {kept.of} at {kept.step}; set"
            " it back, or choose another run.dir"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"branch": kept})})


def _kept_branch(run: Path) -> BranchOptions | None:
    """Return what a run that has begun keeps of the checkpoint from which it began."""
    state = _newest(run)
    if state is None and not (run / "ledger.jsonl").exists():
        return None
    return build_config(state.config if state else read_yaml(run / "config.yaml"), _WHOSE).run.branch


def _account(branch: BranchOptions, state: State) -> SavedAccount:
    """Return what the trunk had spent; of a checkpoint that does not say, by the trunk's ledger."""
    account: Statement | None = state.account
    if account is None:
        with suppress(UserError):
            account = ledger.with_absent(ledger.chain(branch.of)).get(state.ledger_head)
    if not account:
        raise UserError(
            f"run.branch: neither the checkpoint of step {state.step} nor the ledger of {branch.of} says what"
            " it had spent; restore the ledger, or take another checkpoint"
        )
    return SavedAccount(**vars(ledger.statement_of(account)))


_SHAPELESS = (
    *("mask_leak", "join", "dropout", "decoder_dropout", "init_from", "init_std", "norm_eps", "rope_theta"),
    *("local_window", "global_every", "local_rope_theta"),
)
"""Keys of `model` that no weight depends on."""


def check_branches(state: State, config: Config, data: Data | None) -> None:
    """Raise UserError, a line for each reason, where a branch cannot have the weights of a checkpoint; data:
    None where it is not here."""
    assert config.run.branch
    reasons, changes = [], []
    try:
        changes += _other_weights(build_config(state.config, _WHOSE), config)
    except UserError as error:
        reasons.append(str(error))
    if data and data.tokenizer.hash != state.fingerprints.get("tokenizer", data.tokenizer.hash):
        changes.append("corpus: another tokenizer")
    advice = f"a branch has the weights of {config.run.branch.of}; set it back, or leave run.branch out"
    reasons += [f"{change}: {advice}" for change in changes]
    if reasons:
        raise UserError("\n".join(reasons))


def _other_weights(before: Config, config: Config) -> list[str]:
    """Return what of a config asks for other weights, or moments, than those of the config before."""
    old, new, kind = before.model, config.model, config.optimizer.kind
    free = {
        *_SHAPELESS,
        *(["max_positions"] if new.block == "modern" else []),
        *(["mask_from"] if old.mask_from and new.mask_from else []),
    }
    changes = [
        f"model.{name}: {value} -> {getattr(new, name)}"
        for name, value in old
        if name not in free and value != getattr(new, name)
    ]
    if before.optimizer.kind == "muon" != kind:
        changes.append(f"optimizer.kind: muon -> {kind}, but its matrices have no second moment")
    return changes


def branched(state: State, recipe: Recipe, data: Data) -> State:
    """Return the state of a trunk's checkpoint as its branch has it: with its own phase, an account, and its
    place in the data, which is the start of the order if that is another."""
    config, budget = recipe.config, recipe.budget
    assert config.run.branch
    phase = budget.phase_at(budget.inherited / budget.total)
    length = recipe.phases[phase].config.train.seq_length
    old = build_config(state.config, _WHOSE)
    past = _past(state)
    same = (
        past[-1].blend == tuple((float(weight), name) for weight, name in data.blend)
        and old.run.data_seed == config.run.data_seed
        and (old.masking.views, old.masking.views_mode) == (config.masking.views, config.masking.views_mode)
    )
    if not same:
        past = continue_segments([], config.corpus.segment, data.blend, state.samples, length)
    past[-1] = past[-1]._replace(number=config.corpus.segment)
    if past[-1].length != length:
        past.append(past[-1]._replace(first=state.samples, length=length))
    segments: list[Any] = [list(segment) for segment in past]
    return replace(state, phase=phase, segments=segments, account=_account(config.run.branch, state))


def carried(state: State, config: Config) -> float | None:
    """Return the progress with which a run of hours or kWh goes on from a checkpoint; None: what it has spent
    says.

    Of another amount it is another share: else a finished run would go on at the rate of its end.
    """
    (unit, before), (now, amount) = _budget_of(state), config.budget.amount
    if state.progress is None or unit != now:
        return None
    return min(1.0, state.progress * before / amount)


def rates(state: State, config: Config, progress: float, totals: Totals) -> tuple[float, float]:
    """Return the learning rate at the checkpoint by its own budget, and by that of `config`, now at
    `progress`."""
    before = state.progress
    if before is None:
        before = make_recipe(build_config(state.config, _WHOSE)).budget.progress(totals)
    return schedule.rate(config, before), schedule.rate(config, progress)


def _budget_of(state: State) -> tuple[str, float]:
    return build_config(state.config, _WHOSE).budget.amount
