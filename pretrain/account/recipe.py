"""What a config comes to once nothing in it is open: the phases of a run, what each costs, and the budget.

The one idea: a recipe is made once, from a config, the size of its vocabulary and what its device can do,
and never changes. Training, the plan, the report, the check of a ledger and the queue all take it, so that
none of them finishes a config in its own way.

The trap: a run in phases has no one length, batch size or cost. `Recipe.config` has what holds at its end.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from pretrain.account import flops, ledger
from pretrain.account.budget import MEASURED, Budget, spent
from pretrain.account.flops import StepCost
from pretrain.config import Config, MaskingOptions, load_config, phase_configs
from pretrain.config.geometry import Rows
from pretrain.data.masking import counts
from pretrain.errors import UserError

BASELINE_RATE = 0.15


@dataclass(frozen=True)
class SequenceCosts:
    """Of training on one sequence, its share of the update included; the fourth cost, device time, is
    measured or estimated (`tools.plan`)."""

    token_layers: float
    """Linear FLOPs of all layers in units of one self-attention layer on one row."""
    flops_without_head: float
    flops_with_head: float


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one length, one batch size and one kind of mask."""

    config: Config
    """The run's config, with `train` and `masking` as they hold here."""
    vocab_size: int
    rows: Rows
    """How many rows of each kind a sequence has."""
    cost: StepCost
    """What an update costs."""

    @property
    def precision(self) -> str:
        """Return that of the matrix products, which a recipe leaves open no more."""
        assert self.config.train.precision
        return self.config.train.precision

    @property
    def sequence_costs(self) -> SequenceCosts:
        """Return what a sequence costs; two recipes are compared by the quotients of these fields."""
        used, samples = self.cost.flops, self.cost.samples
        layers = flops.token_layers(self.config.model, self.rows)
        return SequenceCosts(layers, used.without_head / samples, used.total / samples)

    def micro_batch(self, data_size: int) -> int:
        """Return the sequences of a forward pass of one of `data_size` data-parallel ranks; UserError if the
        batch does not divide."""
        batch, micro = self.config.train.batch_size, self.config.train.micro_batch_size
        if batch % (data_size * (micro or 1)):
            raise UserError(
                f"train.batch_size = {batch} is no multiple of data-parallel ranks x micro_batch_size ="
                f" {data_size} x {micro or 1}; change one of them"
            )
        return micro or batch // data_size


@dataclass(frozen=True)
class Recipe:
    """A config of which nothing is open, and what follows from it."""

    config: Config
    phases: tuple[Phase, ...]
    budget: Budget

    @property
    def vocab_size(self) -> int:
        """Return the number of pieces of the tokenizer."""
        return self.phases[0].vocab_size

    @property
    def saves_beside_training(self) -> bool:
        """Return whether checkpoints are copied, and written while training goes on; not where every second
        is paid for."""
        return self.config.checkpoint.background and not self.budget.measured


def make_recipe(
    config: Config, vocab_size: int | None = None, bf16: bool = True, deterministic: bool = False
) -> Recipe:
    """Make the recipe of a config with the defaults that depend on the vocabulary and the device filled in.

    vocab_size: of the tokenizer; default: the config's. bf16: whether the device has it, which decides an
    open `train.precision`. deterministic: what an open `train.deterministic` is there. UserError if the
    config has another vocabulary, or if what its budget is relative to cannot be known.
    """
    known = config.model.vocab_size
    if vocab_size and known not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size = {known}, but the tokenizer has {vocab_size} pieces; leave it out"
        )
    if not (pieces := vocab_size or known):
        raise UserError("model.vocab_size is not known; set it, or name a tokenizer")
    train = config.train
    open_keys = {
        "precision": train.precision or ("bf16" if bf16 else "fp32"),
        "deterministic": deterministic if train.deterministic is None else train.deterministic,
    }
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": pieces}),
            "train": train.model_copy(update=open_keys),
        }
    )
    config = _with_amount(config, pieces)
    phases = tuple(_make_phase(one, pieces) for one in phase_configs(config))
    unit, total = config.budget.amount
    ends = tuple(phase.until for phase in train.phases)
    costs = tuple(phase.cost for phase in phases)
    return Recipe(config, phases, Budget(unit, total, costs, ends, config.run.inherited(unit)))


def baseline(phase: Phase) -> Phase:
    """Return ordinary MLM at 15 % by AdamW, on an encoder of the same size and the same sequences."""
    model = phase.config.model.model_copy(update={"mask_from": 0, "decoder_layers": 0})
    masking = MaskingOptions(rate=BASELINE_RATE)
    optimizer = phase.config.optimizer.model_copy(update={"kind": "adamw"})
    changed = {"model": model, "masking": masking, "optimizer": optimizer}
    return _make_phase(phase.config.model_copy(update=changed), phase.vocab_size)


def _make_phase(config: Config, vocab_size: int) -> Phase:
    count, train = counts(config.masking, config.train.seq_length), config.train
    rows = Rows(count.length, count.visible, count.predicted)
    kind = config.optimizer.kind
    cost = flops.step_cost(config.model, rows, vocab_size, train.batch_size, train.recompute, kind)
    return Phase(config, vocab_size, rows, cost)


# ---- a budget that is a share of another recipe's ------------------------------------------------


def _with_amount(config: Config, vocab_size: int) -> Config:
    """Return the config with `budget.relative_to` turned into an amount."""
    budget = config.budget
    unit = budget.measured_unit
    if budget.relative_to is None or getattr(budget, unit) is not None:
        return config
    amount = budget.fraction * _cost_of(budget.relative_to, unit, vocab_size)
    return config.model_copy(update={"budget": budget.model_copy(update={unit: amount})})


def _cost_of(reference: str, unit: str, vocab_size: int) -> float:
    where = f"budget.relative_to = {reference}"
    if (Path(reference) / "ledger.jsonl").exists():
        return _spent_by(reference, unit, where)
    if not Path(reference).is_file():
        raise UserError(f"{where}: no such config, and no run that has begun; name its config, or wait")
    other = load_config(reference)
    if other.budget.relative_to:
        raise UserError(f"{where}: its own budget is relative too; name what that is relative to")
    if other.budget.amount[0] == unit:
        return other.budget.amount[1]
    if unit in MEASURED or other.budget.amount[0] in MEASURED:
        raise UserError(
            f"{where}: its {unit} are not known before it has run; name the folder of a run of it, or take"
            " another budget.measure"
        )
    return make_recipe(other, other.model.vocab_size or vocab_size).budget.planned(unit)


def _spent_by(run: str, unit: str, where: str) -> float:
    """Return what a run has spent; UserError while that still grows, or if it was not measured throughout."""
    lines = ledger.read(run)
    if not lines or lines[-1].event != "finish":
        raise UserError(f"{where}: this run has not finished yet; wait for it, or name a config")
    totals = ledger.total([run])
    spans = totals.device_seconds
    worked = spans["productive"] + spans["evaluate"] + spans["checkpoint"] + spans["lost"]
    # A kill may hide a heartbeat of joules, not more.
    if unit == "kwh" and totals.metered_device_seconds < 0.99 * worked:
        raise UserError(f"{where}: this run's energy was not all measured; take another budget.measure")
    if not spent(totals, unit):
        raise UserError(f"{where}: this run has spent nothing; take another, or a config")
    return spent(totals, unit)
