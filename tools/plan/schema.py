"""The schema of what `tools.plan` writes as JSON: the fields are its keys."""

from dataclasses import dataclass

from pretrain.account.devices import Device
from pretrain.data.corpora import Mapped
from tools.plan.memory import Layout, Memory


@dataclass(frozen=True)
class PartCosts:
    """FLOPs by part of the model; whole numbers where they can be."""

    encoder: float
    decoder: float
    head: float
    optimizer: float
    total: float


@dataclass(frozen=True)
class RelativeCosts:
    """Costs over those of `mlm` at 15 % on the same sequences."""

    token_layers: float
    flops_without_head: float
    flops_with_head: float
    device_time: float | None
    """An estimate; None without a device."""


@dataclass(frozen=True)
class PlannedLayout:
    """How the ranks are laid out, on which device."""

    gpus: int
    device: str | None
    tensor: int
    data: int
    micro_batch: int
    accumulation: int
    engine: str
    zero: int
    offload: str
    recompute: str
    precision: str
    optimizer: str
    reduce_dtype: str
    overrides: str
    """The words that turn the config's layout into this one."""


@dataclass(frozen=True)
class Work:
    """FLOPs, tokens and token-layers of a run; None for what only the run can tell."""

    phases: int
    figures_of: str
    """Of what figures of a sequence and of an update are: the mean of the `run`, or its `last phase`."""
    flops_per_sequence: PartCosts
    flops_per_step: PartCosts
    steps: int | None
    tokens_total: int | None
    flops_total: int | None
    flops_total_by_part: PartCosts | None
    token_layers: float | None


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long it takes, and what that costs; all None without a device."""

    step_seconds: float | None = None
    hours: float | None = None
    device_hours: float | None = None
    kwh: float | None = None
    cost: float | None = None
    """In dollars."""
    mfu: float | None = None
    achieved: float | None = None
    """Share of the device's peak that products reach."""
    achieved_from: str | None = None
    price: float | None = None
    """Dollars a device-hour."""
    watts: float | None = None
    """Of a device."""


@dataclass(frozen=True)
class PlannedModel:
    """What is trained."""

    config: str
    method: str
    vocab_size: int
    vocab_size_from: str
    parameters: dict[str, int]


@dataclass(frozen=True)
class RunPlan(Times, Work, PlannedModel):
    """Everything that can be said about a run before it starts."""

    relative: RelativeCosts
    epochs: float | None
    """How often the corpora are read, as far as they are there."""
    memory_bytes_per_rank: Memory
    mapped_bytes_per_node: Mapped | None
    """What of the corpora grows with their documents; None where they are not there yet."""
    copied_bytes_on_rank_0: int
    """In the host's memory, while a checkpoint is written in the background."""
    bytes_sent_per_rank: dict[str, float]
    """In an update, by group."""
    layout: PlannedLayout


@dataclass(frozen=True)
class DeviceCount:
    """A number of devices."""

    gpus: int


@dataclass(frozen=True)
class ScalingRow(Times, Work, DeviceCount):
    """What the fastest layout on so many devices gives."""

    efficiency: float
    """Device-hours of the smallest count over those of this one."""
    gain: float | None
    """How much faster than half as many; None where these have no layout."""
    layout: PlannedLayout


@dataclass(frozen=True)
class MissingCount(DeviceCount):
    """A number of devices without a layout."""

    why: str


@dataclass(frozen=True)
class Scaling:
    """What each number of devices gives, from 1 on."""

    scaling: list[ScalingRow]
    scaling_missing: list[MissingCount]


@dataclass(frozen=True)
class ScaledPlan(Scaling, RunPlan):
    """A plan with its scaling."""


@dataclass(frozen=True)
class MethodCosts:
    """What a sequence costs by one method at one rate."""

    method: str
    rate: float
    all_mask: bool
    """Whether all that is predicted is [MASK]; else 80/10/10."""
    size: str
    seq_length: int
    relative: RelativeCosts


@dataclass(frozen=True)
class CalibratedDevice:
    """A device as `tools.calibrate` measured it."""

    device: Device
    achieved: dict[str, float]
    """Precision -> share of the peak that products reach."""


@dataclass(frozen=True)
class CalibratedCase:
    """A real step beside its plan."""

    name: str
    config: str
    overrides: tuple[str, ...]
    layout: Layout
    planned_bytes: int
    seconds: float
    pace: float
    """Share of the device's peak that large products reached meanwhile; seconds are as they would be at 1."""
    bytes: int
    planned_seconds: float
    seconds_error: float
    bytes_error: float


@dataclass(frozen=True)
class MedianErrors:
    """Medians over the cases of a calibration; of seconds without the first, which sets the share."""

    seconds: float
    bytes: float


@dataclass(frozen=True)
class Calibration(CalibratedDevice):
    """The document of `tools.calibrate`."""

    median_error: MedianErrors
    rows: list[CalibratedCase]
    versions: dict[str, str]
    commit: str | None
