"""The picture of how runs scale: hours, and the share of the devices that is not wasted."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plan.pages import PAYS, pays_up_to
from tools.plan.schema import ScaledPlan
from tools.shared import outputs, plots


def write(path: Path, plans: Sequence[ScaledPlan]) -> None:
    """Write a PNG of plans that have their `scaling`."""
    with plots.theme("light"):
        drawn = Figure(figsize=(10.8, 4.2), layout="constrained")
        hours, efficiency = drawn.subplots(1, 2)
        for number, plan in enumerate(plans):
            _draw(hours, plan, number, "hours")
            _draw(efficiency, plan, number, "efficiency")
        ideal = plans[0].scaling
        counts = [row.gpus for row in ideal]
        line = [(ideal[0].hours or 0.0) * counts[0] / gpus for gpus in counts]
        hours.plot(counts, line, color="#999999", linestyle=":", linewidth=1.2)
        hours.set_yscale("log")
        hours.set_ylabel("hours (dotted: no loss)")
        efficiency.set_ylim(0, 1.05)
        efficiency.set_ylabel(f"efficiency (circle: the last gain of {PAYS})")
        for axes in (hours, efficiency):
            _count_axis(axes, counts, plans[0].layout.device or "device")
        plots.legend(drawn, hours)
        png = plots.encode(drawn, "png")
    outputs.write(path, png)


def _draw(axes: Axes, plan: ScaledPlan, number: int, what: str) -> None:
    rows = plan.scaling
    colour = f"C{number}"
    name = Path(plan.config).stem
    axes.plot(
        [row.gpus for row in rows],
        [getattr(row, what) for row in rows],
        label=name,
        color=colour,
        linewidth=1.6,
    )
    last = next(row for row in rows if row.gpus == pays_up_to(rows))
    axes.plot(last.gpus, getattr(last, what), "o", color=colour, markersize=8, fillstyle="none")


def _count_axis(axes: Axes, counts: Sequence[int], device: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel(f"{device}s")
