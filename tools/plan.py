"""Before any GPU: what a run will cost, what it needs, and how long it takes: ``python -m tools.plan``.

Parameters, FLOPs and bytes sent are exact; memory is a closed form of what torch and DeepSpeed hold; time
is a model (see tools/layouts.py) that a result file of the device, or a default, brings to scale. torch
is not imported, so that a plan takes less than two seconds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain import budget, config, costs, flops, traffic
from pretrain.config import Config, UserError
from pretrain.corpus import tokenizer_folder
from pretrain.devices import Device
from pretrain.memory import Layout, Memory
from pretrain.tokenizer import load_tokenizer
from tools import console, layouts, plan_pages
from tools.layouts import Job

MOST = 4096
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


def with_vocabulary(options: Config) -> tuple[Config, str]:
    """The config with its number of pieces and what its budget is relative to, and where the number is from:
    the config, the tokenizer, or RoBERTa."""
    pieces, source = options.model.vocab_size, "config"
    prefix = options.corpus.blend[0][1]
    if pieces is None and (options.corpus.tokenizer or Path(f"{prefix}.json").exists()):
        source = str(tokenizer_folder(options.corpus))
        pieces = load_tokenizer(source).vocab_size
    if pieces is None:
        pieces, source = layouts.ROBERTA_PIECES, "assumed"
    model = options.model.model_copy(update={"vocab_size": pieces})
    return budget.resolve(options.model_copy(update={"model": model})), source


def plan(
    options: Config,
    gpus: int | None = None,
    device: Device | str | None = None,
    fastest: bool = False,
    tariff: Tariff = Tariff(),
    name: str = "",
) -> dict[str, Any]:
    """Everything that can be said about a run before it starts, JSON-serialisable.

    gpus: devices; default: as many as parallel.tensor. device: a name of the table, or a Device; without
    one there are no times. fastest: choose the fastest layout that fits, instead of the config's. name: of
    the config, to be shown. Of a run in phases, what is said of a sequence, a step and the layout is said
    of the last, and memory of the one that needs most.
    UserError if the devices do not divide, or if the layout (with `fastest`: any) does not fit.
    """
    device = layouts.named(device) if isinstance(device, str) else device
    options, source = with_vocabulary(options)
    run = Run(options, device, tariff)
    last, pieces = run.phases[-1], run.pieces
    job = run.job(last)
    try:
        chosen = run.layouts(gpus or options.parallel.tensor, fastest)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    layout = chosen[-1]
    cost, reference = (costs.of_sequence(o, pieces) for o in (last, costs.baseline(last)))
    per_sequence = flops.training(job.model, job.rows, pieces)
    return {
        "config": name,
        "method": config.method(options),
        "vocab_size": pieces,
        "vocab_size_from": source,
        "parameters": flops.parameters(job.model, pieces),
        "flops_per_sequence": {**asdict(per_sequence), "total": per_sequence.total},
        **run.totals(chosen),
        "relative": {
            **{measure: value / getattr(reference, measure) for measure, value in asdict(cost).items()},
            "device_time": _relative_time(run, last, layout),
        },
        "memory_bytes_per_rank": asdict(run.memory(chosen)),
        "bytes_sent_per_rank": _sent(job, layout),
        "layout": _described(last, layout, device),
    }


@dataclass(frozen=True)
class Run:
    """A config with its vocabulary, on a device or none."""

    options: Config
    device: Device | None
    tariff: Tariff

    @property
    def pieces(self) -> int:
        assert self.options.model.vocab_size
        return self.options.model.vocab_size

    @property
    def phases(self) -> list[Config]:
        """The config of each stretch."""
        return config.phases(self.options)

    def job(self, phase: Config) -> Job:
        return layouts.job(phase, self.pieces, self.device)

    def layouts(self, gpus: int, fastest: bool) -> list[Layout]:
        """Of each phase: the config's, or the fastest; UserError with the smallest that fits."""
        if fastest:
            if found := self.fastest(gpus):
                return found
            raise UserError(f"nothing fits {gpus} x {self._device.name}; {self._smallest()}")
        precision, gpu = self.job(self.phases[-1]).precision, self.device is None or self.device.gpu
        found = [layouts.configured(phase, gpus, precision, gpu) for phase in self.phases]
        needed = layouts.needs(self.memory(found))
        if self.device and needed > self.device.memory:
            raise UserError(
                f"needs {needed / 2**30:.1f} GiB a rank on {gpus} x {self.device.name}, which has"
                f" {self.device.memory / 2**30:.0f}; {self._smallest()}"
            )
        return found

    def fastest(self, gpus: int) -> list[Layout] | None:
        """The fastest that fits for the last phase, and in the others with micro-batches of their own."""
        *first, last = [self.job(phase) for phase in self.phases]
        chosen = layouts.fastest(last, gpus, self._device)
        if chosen is None:
            return None
        fitted = [layouts.largest_micro_batch(job, chosen, self._device) for job in first]
        found = [layout for layout in (*fitted, chosen) if layout]
        return found if len(found) == len(self.phases) else None

    def _smallest(self) -> str:
        """The fewest devices on which something fits, in words."""
        for gpus in layouts.powers(MOST):
            if found := self.fastest(gpus):
                words = layouts.changes(self.phases[-1], found[-1]) or "as it is"
                return f"the smallest layout that fits: {gpus} x {self._device.name}, {words}"
        return f"no layout on up to {MOST:,} of them fits"

    @property
    def _device(self) -> Device:
        assert self.device
        return self.device

    def memory(self, chosen: Sequence[Layout]) -> Memory:
        """Of the phase that needs most."""
        held = [
            layouts.memory_of(self.job(phase), layout)
            for phase, layout in zip(self.phases, chosen, strict=True)
        ]
        return max(held, key=lambda one: one.total)

    def step_seconds(self, phase: Config, layout: Layout) -> float:
        """Of an update of a phase."""
        job = self.job(phase)
        share, _ = layouts.achieved(self._device, job.precision)
        return layouts.step_seconds(job, layout, self._device, share)

    def totals(self, chosen: Sequence[Layout]) -> dict[str, Any]:
        """Of the whole run; None for what cannot be known."""
        seconds = [
            self.step_seconds(phase, layout) if self.device else None
            for phase, layout in zip(self.phases, chosen, strict=True)
        ]
        layout = chosen[-1]
        steps = self._steps(layout, seconds)
        spent = [budget.step_cost(phase) for phase in self.phases]
        found: dict[str, Any] = dict.fromkeys(("steps", "flops_total", "token_layers"))
        if steps is not None:
            pairs = list(zip(steps, spent, strict=True))
            found["steps"] = sum(steps)
            found["flops_total"] = sum(number * cost.flops.total for number, cost in pairs)
            found["token_layers"] = sum(number * cost.token_layers for number, cost in pairs)
        return {**found, **self._times(layout, steps, seconds)}

    def _steps(self, layout: Layout, seconds: Sequence[float | None]) -> list[int] | None:
        """Updates of each phase."""
        unit, amount = self.options.budget.amount
        if unit not in budget.MEASURED:
            return budget.Budget(self.options).updates()
        if self.device is None:
            return None
        hours = amount
        if unit == "kwh":
            each = self.tariff.kwh(self.device, 1.0)
            if each is None:
                return None
            hours = amount / each
        edges = [0.0, *(phase.until for phase in self.options.train.phases), 1.0]
        shares = [after - before for before, after in zip(edges, edges[1:], strict=False)]
        return [
            int(share * hours * 3600 // (layout.ranks * each))
            for share, each in zip(shares, seconds, strict=True)
            if each
        ]

    def _times(
        self, layout: Layout, steps: Sequence[int] | None, seconds: Sequence[float | None]
    ) -> dict[str, Any]:
        names = ("step_seconds", "hours", "device_hours", "kwh", "cost", "mfu", "achieved", "achieved_from")
        if self.device is None:
            return dict.fromkeys(names)
        job = self.job(self.phases[-1])
        share, source = layouts.achieved(self.device, job.precision)
        step = seconds[-1]
        assert step
        work = job.batch_size * flops.training(job.model, job.rows, self.pieces).total
        hours = None
        if steps is not None:
            hours = sum(number * (each or 0.0) for number, each in zip(steps, seconds, strict=True)) / 3600
        device_hours = None if hours is None else hours * layout.ranks
        return {
            "step_seconds": step,
            "hours": hours,
            "device_hours": device_hours,
            "kwh": device_hours and self.tariff.kwh(self.device, device_hours),
            "cost": device_hours and self.tariff.dollars(self.device, device_hours),
            "mfu": work / step / layout.ranks / self.device.peak[job.precision],
            "achieved": share,
            "achieved_from": source,
        }


def _described(options: Config, layout: Layout, device: Device | None) -> dict[str, Any]:
    """overrides: the words that turn the config's layout into this one."""
    return {
        "gpus": layout.ranks,
        "device": device and device.name,
        **{key: value for key, value in asdict(layout).items() if key != "gpu"},
        "overrides": layouts.changes(options, layout),
    }


def _relative_time(run: Run, options: Config, layout: Layout) -> float | None:
    """Estimated time of an update against the baseline's, in the same layout."""
    if run.device is None:
        return None
    return run.step_seconds(options, layout) / run.step_seconds(costs.baseline(options), layout)


def _sent(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes that a rank sends in an update, by group."""
    found = {"data": 0.0, "tensor": 0.0}
    for call in traffic.step(job.model, job.rows, job.vocab_size, layout):
        found[call.group] += traffic.sent(call, layout)
    return found


# ---- from 1 to 4,096 -----------------------------------------------------------------------------


def scaling(options: Config, device: Device, tariff: Tariff = Tariff()) -> list[dict[str, Any]]:
    """A row for each count from 1 to 4,096 on which something fits: the fastest layout, and what it gives.

    efficiency: device-hours of the smallest count over those of this one. gain: how much faster than
    half as many.
    """
    run = Run(with_vocabulary(options)[0], device, tariff)
    last = run.phases[-1]
    rows: list[dict[str, Any]] = []
    for gpus in layouts.powers(MOST):
        chosen = run.fastest(gpus)
        if chosen is None:
            continue
        found = run.totals(chosen)
        seconds = found["step_seconds"]
        share = rows[0]["step_seconds"] * rows[0]["gpus"] if rows else seconds * gpus
        rows.append(
            {
                "gpus": gpus,
                **found,
                "efficiency": share / (gpus * seconds),
                "gain": rows[-1]["step_seconds"] / seconds if rows else None,
                "layout": _described(last, chosen[-1], device),
            }
        )
    return rows


# ---- all methods ---------------------------------------------------------------------------------


def methods(length: int, device: Device | None) -> list[dict[str, Any]]:
    """Costs against `mlm` at 15 % of every method at every rate, for RoBERTa's two sizes."""
    rows = []
    for name, rate, all_mask in METHODS:
        masking = {"rate": rate, "corruption": (1.0, 0.0, 0.0) if all_mask else (0.8, 0.1, 0.1)}
        for size in layouts.SIZES:
            layers = layouts.SIZES[size]["num_layers"]
            options = layouts.recipe(size, length, _late(name, layers), **masking)
            rows.append(
                {
                    "method": name,
                    "rate": rate,
                    "all_mask": all_mask,
                    "size": size,
                    "seq_length": length,
                    "relative": plan(options, 1, device)["relative"],
                }
            )
    return rows


def _late(method: str, layers: int) -> dict[str, Any]:
    """What makes a method of a model with so many layers."""
    if method == "mlm":
        return {}
    if method == "shared-depth":
        return {"mask_from": layers // 2}
    if method == "mae-lm":
        return {"mask_from": layers, "decoder_layers": 4, "mask_vector": "tied"}
    return {"mask_from": layers, "decoder_layers": 2, "decoder": method.removeprefix("3ml-")}


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


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser(
        "plan", "Parameters, FLOPs, memory, time and cost of runs before they start", reports=True
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | section.key=value", help="configs, and overrides of them all"
    )
    parser.add_argument(
        "--gpus", type=console.whole(1), metavar="N", help="devices (as many as parallel.tensor)"
    )
    parser.add_argument("--device", metavar="NAME", help="such as H100; without one there are no times")
    parser.add_argument(
        "--fastest", action="store_true", help="the fastest layout that fits, not the config's"
    )
    parser.add_argument("--scaling", action="store_true", help="the fastest layouts from 1 to 4,096 devices")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw that scaling as a PNG")
    parser.add_argument(
        "--methods",
        type=console.whole(8, 512),
        metavar="LENGTH",
        help="instead: all methods x rates x sizes at this length",
    )
    parser.add_argument("--price", type=console.positive, help="of a device-hour (a round figure of rental)")
    parser.add_argument("--watts", type=console.positive, help="drawn by a device (its largest board power)")
    args = parser.parse_intermixed_args(arguments)
    tariff = Tariff(args.price, args.watts)
    device = layouts.named(args.device) if args.device else None
    if args.methods is not None:
        return show_methods(args.methods, device, args.json)
    paths = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    if not paths:
        raise UserError("no CONFIG; give one or more, such as configs/*.yaml")
    if (args.scaling or args.plot or args.fastest) and device is None:
        raise UserError("--scaling, --plot and --fastest need --device NAME")
    recipes = {path: config.load(path, changes) for path in paths}
    plans = [plan(o, args.gpus, device, args.fastest, tariff, path) for path, o in recipes.items()]
    if device and (args.scaling or args.plot):
        for one, options in zip(plans, recipes.values(), strict=True):
            one["scaling"] = scaling(options, device, tariff)
    if args.plot:
        from tools import plan_plot  # matplotlib takes a second

        plan_plot.write(args.plot, plans)
    if args.json:
        console.print_json(plans)
        return 0
    print(plan_pages.text(plans))
    for one in plans:
        if "scaling" in one:
            print(f"\n{plan_pages.scaling_text(one)}")
    return 0


def show_methods(length: int, device: Device | None, as_json: bool) -> int:
    rows = methods(length, device)
    if as_json:
        console.print_json(rows)
    else:
        print(plan_pages.methods_text(rows, device and device.name))
    return 0


if __name__ == "__main__":
    console.run(main)
