"""What a run will cost, need and take, from its config alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pretrain.account import epochs
from pretrain.account.devices import Device
from pretrain.account.flops import Flops
from pretrain.account.recipe import Phase, Recipe, baseline, make_recipe
from pretrain.config import Config, geometry, method_of
from pretrain.continuing import with_branch
from pretrain.data.corpora import Mapped, mapped, tokenizer_folder
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError
from tools.plan import layouts, memory, traffic
from tools.plan.memory import Layout, Memory
from tools.plan.schema import (
    MethodCosts,
    MissingCount,
    PartCosts,
    PlannedLayout,
    RelativeCosts,
    RunPlan,
    Scaling,
    ScalingRow,
    Times,
    Work,
)

MAX_DEVICES = 4096
"""Devices of the largest cluster that is tried."""


@dataclass(frozen=True)
class Tariff:
    """What a device-hour costs."""

    price: float | None = None
    """In dollars; None: the table's, where it has one."""
    watts: float | None = None
    """Drawn by a device; None: its largest board power, without its share of the host and of cooling."""

    def dollars(self, device: Device, device_hours: float) -> float | None:
        price = device.price if self.price is None else self.price
        return device_hours * price if price else None

    def kwh(self, device: Device, device_hours: float) -> float | None:
        watts = self.watts or device.watts
        return device_hours * watts / 1000 if watts else None


def planned_recipe(config: Config, device: Device | None = None) -> tuple[Recipe, str]:
    """Return the recipe of a config, and where its number of pieces is from: the config, the tokenizer, or
    RoBERTa. Without a device one that has bf16 is taken."""
    config = with_branch(config)
    pieces, source = config.model.vocab_size, "config"
    prefix = config.corpus.blend[0][1]
    if pieces is None and (config.corpus.tokenizer or Path(f"{prefix}.json").exists()):
        source = str(tokenizer_folder(config.corpus))
        pieces = load_tokenizer(source).vocab_size
    if pieces is None:
        pieces, source = layouts.ROBERTA_PIECES, "assumed"
    return make_recipe(config, pieces, bf16=device is None or "bf16" in device.peak), source


def epochs_read(recipe: Recipe, steps: int | None) -> float | None:
    """Return how often a run reads its corpora, as far as they are there; None where that is not known.

    steps: that the plan says its hours buy.
    """
    by_hours = recipe.budget.measured and len(recipe.phases) == 1
    return epochs.epochs(recipe, [steps] if steps and by_hours else None)


def plan(
    config: Config,
    gpus: int | None = None,
    device: Device | str | None = None,
    fastest: bool = False,
    tariff: Tariff = Tariff(),
    name: str = "",
    achieved: float | None = None,
) -> RunPlan:
    """Return everything that can be said about a run of a config before it starts, as `plan_recipe` does.

    device: a name of the table, or a Device.
    """
    device = layouts.named(device) if isinstance(device, str) else device
    recipe, source = planned_recipe(config, device)
    return plan_recipe(recipe, gpus, device, fastest, tariff, name, achieved, source)


def plan_recipe(
    recipe: Recipe,
    gpus: int | None = None,
    device: Device | None = None,
    fastest: bool = False,
    tariff: Tariff = Tariff(),
    name: str = "",
    achieved: float | None = None,
    source: str = "config",
) -> RunPlan:
    """Return everything that can be said about a run before it starts.

    gpus: devices; default: as many as parallel.tensor. device: without one there are no times. fastest:
    choose the fastest layout that fits, instead of the config's. name: of the config, to be shown. achieved:
    share of the peak that products reach, where one knows better. source: of the number of pieces.

    Of a run in phases, what is said of a sequence is the mean over all of its sequences, of a step that over
    all of its updates (`figures_of`: where only a run can tell how many, the last phase's); the layout is
    the last phase's, and memory that of the one that needs most.
    UserError if the devices do not divide, if the layout (with `fastest`: any) does not fit, if the device is
    not known to have the precision, or if the budget pays for no update.
    """
    config, last = recipe.config, recipe.phases[-1]
    try:
        run = PlannedRun(recipe, device, tariff, achieved)
        recipe.budget.check()
        chosen = run.layouts(gpus or config.parallel.tensor, fastest)
        work, times = run.totals(chosen)
        if work.steps == 0:
            limit = recipe.budget
            raise UserError(f"budget.{limit.unit} = {limit.total:g} pays for no update; raise it")
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    return RunPlan(
        config=name,
        method=method_of(config),
        vocab_size=recipe.vocab_size,
        vocab_size_from=source,
        parameters=geometry.parameters(config.model, recipe.vocab_size),
        **vars(work),
        **vars(times),
        relative=run.relative(chosen),
        epochs=epochs_read(recipe, work.steps),
        memory_bytes_per_rank=run.memory(chosen),
        mapped_bytes_per_node=_mapped(config),
        copied_bytes_on_rank_0=memory.copied(recipe, chosen[-1], 0),
        bytes_sent_per_rank=_sent(last, chosen[-1]),
        layout=_described(last.config, chosen[-1], device),
    )


@dataclass(frozen=True)
class PlannedRun:
    """A recipe on a device or none."""

    recipe: Recipe
    device: Device | None
    tariff: Tariff
    achieved: float | None = None
    """Share of the device's peak that products reach; None: what layouts.achieved says."""

    def __post_init__(self) -> None:
        """Raise UserError if the device is not known to have the recipe's precision."""
        if self.device:
            layouts.refuse_precision(self.recipe.phases[-1], self.device)

    @property
    def _device(self) -> Device:
        assert self.device
        return self.device

    def share(self) -> tuple[float, str]:
        """Return (share of the device's peak that products reach, where it is from)."""
        if self.achieved is not None:
            return self.achieved, "given"
        return layouts.achieved(self._device, self.recipe.phases[-1].precision)

    # ---- layouts

    def layouts(self, gpus: int, fastest: bool) -> list[Layout]:
        """Return that of each phase: the config's, or the fastest; UserError with the smallest that fits."""
        if fastest:
            if found := self.fastest(gpus):
                return found
            raise UserError(self._refusal(gpus))
        gpu = self.device is None or self.device.gpu
        found = [layouts.configured(one.config, gpus, one.precision, gpu) for one in self.recipe.phases]
        needed = layouts.needs(self.memory(found))
        if self.device and needed > self.device.memory:
            raise UserError(
                f"needs {needed / 2**30:.1f} GiB a rank on {gpus} x {self.device.name}, which has"
                f" {self.device.memory / 2**30:.0f}; {self._smallest()}"
            )
        return found

    def fastest(self, gpus: int) -> list[Layout] | None:
        """Return the fastest that fits, of each phase; None: nothing does."""
        return layouts.fastest(self.recipe.phases, gpus, self._device, self.share()[0])

    def obstacle(self, gpus: int) -> str:
        """Return why there is no layout on so many devices."""
        if layouts.divisions(self.recipe.phases, gpus, self._device):
            return "nothing fits"
        return f"{self._batches} sequences cannot be so divided"

    @property
    def _batches(self) -> str:
        return " or ".join(dict.fromkeys(str(phase.cost.samples) for phase in self.recipe.phases))

    def _refusal(self, gpus: int) -> str:
        if layouts.divisions(self.recipe.phases, gpus, self._device):
            return f"nothing fits {gpus} x {self._device.name}; {self._smallest()}"
        near = ", ".join(f"{count:,}" for count in layouts.nearest(self.recipe.phases, gpus, self._device))
        return f"{self._batches} sequences cannot be divided among {gpus:,} ranks; nearest: {near}"

    def _smallest(self) -> str:
        """The fewest devices on which something fits, in words."""
        for gpus in layouts.powers(MAX_DEVICES):
            if found := self.fastest(gpus):
                words = layouts.changes(self.recipe.phases[-1].config, found[-1]) or "as it is"
                return f"the smallest layout that fits: {gpus} x {self._device.name}, {words}"
        return f"no layout on up to {MAX_DEVICES:,} of them fits"

    def memory(self, chosen: Sequence[Layout]) -> Memory:
        """Return that of the phase that needs most."""
        phases = zip(self.recipe.phases, chosen, strict=True)
        return max((layouts.memory_of(*one) for one in phases), key=lambda held: held.total)

    # ---- what is spent

    def totals(self, chosen: Sequence[Layout]) -> tuple[Work, Times]:
        """Return those of the whole run, and means over it; None for what cannot be known."""
        steps = self._steps(chosen)
        return self._work(steps), self._times(chosen, steps)

    def relative(self, chosen: Sequence[Layout]) -> RelativeCosts:
        """Return the costs over those of the baseline on the same sequences."""
        ours = dict.fromkeys(("token_layers", "flops_without_head", "flops_with_head"), 0.0)
        theirs = dict.fromkeys(ours, 0.0)
        phases = self.recipe.phases
        baselines = [baseline(phase) for phase in phases]
        counts = _counts(self._steps(chosen), len(chosen))
        for steps, phase, reference in zip(counts, phases, baselines, strict=True):
            for sums, one in ((ours, phase), (theirs, reference)):
                for name, value in asdict(one.sequence_costs).items():
                    sums[name] += steps * phase.cost.samples * value
        time = None
        if self.device is not None:
            # In the same layouts.
            time = _mean(counts, self._seconds(phases, chosen)) / _mean(
                counts, self._seconds(baselines, chosen)
            )
        return RelativeCosts(**{name: ours[name] / theirs[name] for name in ours}, device_time=time)

    def _seconds(self, phases: Sequence[Phase], chosen: Sequence[Layout]) -> list[float]:
        """Of an update of each phase."""
        share, _ = self.share()
        return [
            layouts.step_seconds(phase, layout, self._device, share)
            for phase, layout in zip(phases, chosen, strict=True)
        ]

    def _steps(self, chosen: Sequence[Layout]) -> list[int] | None:
        """Updates of each phase."""
        budget = self.recipe.budget
        if not budget.measured:
            return budget.updates()
        if self.device is None:
            return None
        hours = budget.total - budget.inherited
        if budget.unit == "kwh":
            each = self.tariff.kwh(self.device, 1.0)
            if each is None:
                return None
            hours /= each
        edges = [0.0, *budget.phase_ends, 1.0]
        shares = [after - before for before, after in zip(edges, edges[1:], strict=False)]
        return [
            int(share * hours * 3600 // (chosen[-1].ranks * seconds))
            for share, seconds in zip(shares, self._seconds(self.recipe.phases, chosen), strict=True)
        ]

    def _work(self, steps: Sequence[int] | None) -> Work:
        """FLOPs, tokens and token-layers."""
        phases = self.recipe.phases
        counts = _counts(steps, len(phases))
        spent = [(number, phase.cost) for number, phase in zip(counts, phases, strict=True)]
        parts = [part.name for part in fields(Flops)]
        whole = Flops(*(sum(number * getattr(cost.flops, part) for number, cost in spent) for part in parts))
        known = steps is not None
        return Work(
            phases=len(counts),
            figures_of="run" if steps and any(steps) else "last phase",
            flops_per_sequence=_by_part(whole, sum(number * cost.samples for number, cost in spent)),
            flops_per_step=_by_part(whole, sum(counts)),
            steps=sum(steps) if steps is not None else None,
            tokens_total=sum(number * cost.tokens_seen for number, cost in spent) if known else None,
            flops_total=whole.total if known else None,
            flops_total_by_part=_by_part(whole) if known else None,
            token_layers=sum(number * cost.token_layers for number, cost in spent) if known else None,
        )

    def _times(self, chosen: Sequence[Layout], steps: Sequence[int] | None) -> Times:
        if self.device is None:
            return Times()
        seconds, ranks = self._seconds(self.recipe.phases, chosen), chosen[-1].ranks
        counts = _counts(steps, len(seconds))
        step = _mean(counts, seconds)
        work = _mean(counts, [phase.cost.flops.total for phase in self.recipe.phases])
        hours = None if steps is None else sum(steps) * step / 3600
        device_hours = None if hours is None else hours * ranks
        share, source = self.share()
        return Times(
            step_seconds=step,
            hours=hours,
            device_hours=device_hours,
            kwh=device_hours and self.tariff.kwh(self.device, device_hours),
            cost=device_hours and self.tariff.dollars(self.device, device_hours),
            mfu=work / step / ranks / self.device.peak[self.recipe.phases[-1].precision],
            achieved=share,
            achieved_from=source,
            price=self.tariff.dollars(self.device, 1.0),
            watts=self.tariff.watts or self.device.watts or None,
        )


def _counts(steps: Sequence[int] | None, phases: int) -> Sequence[int]:
    """Updates by which phases count in a mean: where they are not known, or none, one of the last."""
    return steps if steps and any(steps) else [0] * (phases - 1) + [1]


def _mean(counts: Sequence[int], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)


def _by_part(spent: Flops, number: int = 1) -> PartCosts:
    """One of so many equal shares; whole where it can be."""
    parts = {**vars(spent), "total": spent.total}
    shares = {name: value / number if value % number else value // number for name, value in parts.items()}
    return PartCosts(**shares)


def _described(config: Config, layout: Layout, device: Device | None) -> PlannedLayout:
    return PlannedLayout(
        gpus=layout.ranks,
        device=device.name if device else None,
        **{key: value for key, value in vars(layout).items() if key != "gpu"},
        overrides=layouts.changes(config, layout),
    )


def _mapped(config: Config) -> Mapped | None:
    """Return what of the corpora grows with their documents; None where they are not there yet."""
    try:
        return mapped(config.corpus)
    except UserError:
        return None


def _sent(phase: Phase, layout: Layout) -> dict[str, float]:
    """Bytes that a rank sends in an update, by group."""
    found = {"data": 0.0, "tensor": 0.0}
    for call in traffic.step(phase.config.model, phase.rows, phase.vocab_size, layout):
        found[call.group] += traffic.sent(call, layout)
    return found


def scaling(
    config: Config, device: Device, tariff: Tariff = Tariff(), name: str = "", achieved: float | None = None
) -> Scaling:
    """Return a row for each count from 1 to 4,096 that has a layout: the fastest, and what it gives; and the
    other counts, and why. UserError if these are all.
    """
    run = PlannedRun(planned_recipe(config, device)[0], device, tariff, achieved)
    rows: list[ScalingRow] = []
    missing: list[MissingCount] = []
    least, half = 0.0, None  # device-seconds of an update on the fewest devices, seconds on half as many
    for gpus in layouts.powers(MAX_DEVICES):
        chosen = run.fastest(gpus)
        if chosen is None:
            missing.append(MissingCount(gpus, run.obstacle(gpus)))
            half = None
            continue
        work, times = run.totals(chosen)
        seconds = times.step_seconds
        assert seconds
        least = least or gpus * seconds
        rows.append(
            ScalingRow(
                **vars(work),
                **vars(times),
                gpus=gpus,
                efficiency=least / (gpus * seconds),
                gain=half / seconds if half else None,
                layout=_described(run.recipe.phases[-1].config, chosen[-1], device),
            )
        )
        half = seconds
    if not rows:
        raise UserError(f"{name or 'plan'}: no layout on up to {MAX_DEVICES:,} x {device.name} fits")
    return Scaling(rows, missing)


def methods(length: int, device: Device | None, achieved: float | None = None) -> list[MethodCosts]:
    """Return the costs against `mlm` at 15 % of every method at every rate, for RoBERTa's two sizes."""
    rows = []
    for name, rate, all_mask in METHODS:
        masking = {"rate": rate, "corruption": (1.0, 0.0, 0.0) if all_mask else (0.8, 0.1, 0.1)}
        for size in layouts.SIZES:
            layers = layouts.SIZES[size]["num_layers"]
            config = layouts.recipe(size, length, layouts.late(name, layers), **masking)
            relative = plan(config, 1, device, achieved=achieved).relative
            rows.append(MethodCosts(name, rate, all_mask, size, length, relative))
    return rows


METHODS = [
    *(("mlm", rate, False) for rate in (0.15, 0.4, 0.5)),
    *(("3ml-self", rate, False) for rate in (0.15, 0.4, 0.5)),
    ("3ml-self", 0.5, True),
    *(("3ml-cross", rate, False) for rate in (0.15, 0.4, 0.5)),
    *(("3ml-query", rate, False) for rate in (0.15, 0.4, 0.5)),
    ("3ml-query", 0.5, True),
    *(("mae-lm", rate, True) for rate in (0.15, 0.4, 0.5)),
    *(("shared-depth", rate, False) for rate in (0.15, 0.4, 0.5)),
]
"""(method, rate, whether all that is predicted is [MASK])."""
