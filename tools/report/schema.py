"""The schema of what `tools.report` writes as JSON: the fields are its keys."""

from dataclasses import dataclass, field

from pretrain.account.ledger import Totals
from tools.ledger.tree import Branch
from tools.plan.schema import RelativeCosts


@dataclass(frozen=True)
class RunPoint:
    """What a run had cost at a step: places on the horizontal axes; None for what was not metered."""

    step: int | None
    flops: float | None
    tokens_seen: int | None
    device_hours: float | None
    kwh: float | None


@dataclass(frozen=True)
class Evaluation(RunPoint):
    """A held-out evaluation; None for what its log line has not."""

    loss: float | None
    bits_per_byte: float | None
    accuracy: float | None


@dataclass(frozen=True)
class TaskScores(RunPoint):
    """What a step scores by a protocol: the mean over the tasks; of several seeds median and quartiles."""

    protocol: str
    score: float
    low: float
    high: float
    seeds: int
    tasks: dict[str, float]


@dataclass(frozen=True)
class SpeedPoint(RunPoint):
    """Rates of a stretch of a run, medians of its logs; None where none says it."""

    slots_per_second: float | None
    real_tokens_per_second: float | None
    predictions_per_second: float | None
    mfu: float | None
    step_seconds: float | None


@dataclass(frozen=True)
class UnigramScore:
    """The score of guessing by frequency."""

    loss: float
    bits_per_byte: float | None
    accuracy: float


@dataclass(frozen=True)
class ModelShape:
    """Kind and size of an encoder."""

    block: str
    num_layers: int
    hidden_size: int


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters that fine-tuning starts from, and those that only pre-training has."""

    encoder: int
    discarded: int
    total: int


@dataclass(frozen=True)
class BudgetUse:
    """What a run may spend, and what it has spent of that."""

    unit: str
    total: float
    spent: float
    relative_to: str | None
    """Share and path of the recipe that the budget is a share of."""


@dataclass(frozen=True)
class RunCosts:
    """Four costs of a run's surviving updates."""

    token_layers: float
    flops_without_head: float
    flops_with_head: float
    device_seconds: float


@dataclass(frozen=True)
class HeldOutQuestions:
    """What a held-out loss is an answer to; None where unknown."""

    seq_length: int
    predicted_tokens: int | None
    tokenizer: str | None
    corpus: str | None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One run of a report."""

    run: str
    name: str
    """Unique in the report."""
    method: str
    model: ModelShape
    seq_length: list[int]
    """Of each phase."""
    batch_size: list[int]
    rate: float
    predicted_shares: list[float] | None = None
    """Of each phase; None in a document of before 0.2.0."""
    parameters: ParameterCounts
    state: str | None
    ledger_head: str | None = None
    devices: list[str]
    ranks: int | None
    totals: Totals
    """Of the ledger."""
    budget: BudgetUse
    costs: RunCosts
    relative: RelativeCosts
    questions: HeldOutQuestions
    held_out: Evaluation | None
    """The last evaluation."""
    unigram: UnigramScore | None
    """None where the corpora cannot be opened."""
    evaluations: list[Evaluation]
    downstream: list[TaskScores]
    speed: list[SpeedPoint]
    branch: Branch | None = None
    """What it is a branch of."""


@dataclass(frozen=True)
class Report:
    """All figures of a report."""

    version: str
    time: str
    warnings: list[str]
    runs: list[RunReport]
    """In the order given."""
    tree: list[str] = field(default_factory=list)
    """Where some are branches, a line for each run with its own part."""
    together: Totals | None = None
    """Of all runs, of which what branches share is counted once; None in a document of before 0.2.0."""
