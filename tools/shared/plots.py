"""Quiet line plots: one style, two themes, colours and markers that colour-blind readers tell apart.

Figures are made without pyplot, so that nothing global changes and no window system is asked for.
Matplotlib reads its settings both when a figure is made and when it is saved, so both must
happen inside `theme`.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tools.shared.outputs import PNG_MARK

# Okabe and Ito's palette without its yellow, which white swallows; lightened where the page is dark.
_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"),
    "dark": ("#4BA3E3", "#F5853F", "#2CC497", "#E59CC8", "#F2B63C", "#A5D8F7", "#BBBBBB"),
}
_INKS = {  # page, text, axes, grid
    "light": ("#ffffff", "#222222", "#767676", "#dddddd"),
    "dark": ("#16181c", "#e6e6e6", "#9a9a9a", "#34383f"),
}
_MARKERS = "osD^v"  # 5 and 7 have no common factor: 35 lines before a pair repeats
_MARKS = 10  # on a line, at most
_LABEL = 40  # characters of a legend's longest entry; of a longer one the end is shown
_LETTERS = 11  # of a legend, that fit on an inch
_MIN_SPAN = 0.01  # span of a panel, as a share of its largest value: a plateau must not look like a mountain
_NAME = 0.04  # of the span, that a level's name needs beyond matplotlib's own margin


@dataclass(frozen=True)
class Line:
    """One series; an empty one keeps its place in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[tuple[float, float]] = ()
    """Lowest and highest of each point, where it stands for several."""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    y: float


@dataclass(frozen=True)
class Ratio:
    """One measure of ours over a peer's."""

    name: str
    ratio: float
    spread: Sequence[float]
    """Smallest and largest."""
    is_cost: bool
    """Less is better."""
    expected: float | None
    """What it should be."""


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Makes and saves figures in `name`: light or dark."""
    background, ink, faint, grid = _INKS[name]
    settings: dict[str, Any] = {
        "figure.facecolor": background,
        "axes.facecolor": background,
        "savefig.facecolor": background,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "ytick.major.size": 0,  # the grid says where
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=_COLOURS[name]),
        "font.size": 11,
        "legend.frameon": False,
        "svg.hashsalt": "plots",  # the same figure is the same bytes
    }
    with matplotlib.rc_context(cast(Any, settings)):
        yield


def figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """Return a row of panels that share their vertical scale."""
    made, (row,) = grid(panels, 1)
    return made, row


def grid(columns: int, rows: int) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Return the rows of panels; those of a row share their vertical scale."""
    made = Figure(figsize=(5.4 * columns, 3.9 * rows), layout="constrained")
    return made, cast(Any, made.subplots(rows, columns, sharey="row", squeeze=False))


def draw(axes: Axes, lines: Sequence[Line], levels: Sequence[Level], x_label: str, y_label: str) -> None:
    """Draws one panel, from x = 0; without a point it says so."""
    for number, line in enumerate(lines):
        axes.plot(
            line.x,
            line.y,
            label=_literal(line.label),
            color=f"C{number}",
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=max(1, math.ceil(len(line.x) / _MARKS)),
            markersize=4.5,
            linewidth=1.6,
        )
        if line.spread:
            axes.vlines(line.x, *zip(*line.spread, strict=True), color=f"C{number}", linewidth=3, alpha=0.4)
    if any(len(line.x) for line in lines):
        right = max(x for line in lines for x in line.x)
        axes.set_xlim(0, 1.04 * right or None)  # the margin of a single point would not hold its mark
        ends = [line.y[-1] for line in lines if len(line.y)]
        below = [sum(ends) / len(ends) > level.y for level in levels]
        for level, under in zip(levels, below, strict=True):
            _draw_level(axes, level, under)
        _make_room(axes, lines, levels, below)
    else:
        axes.text(0.5, 0.5, "nothing yet", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def ratios(bars: Sequence[Ratio]) -> Figure:
    """Return the ratios as points with the extremes of their rounds, one under another, and 1 as the line to
    compare.

    What costs (time, memory) has another colour than what is had (slots a second).
    """
    drawn = Figure(figsize=(9.6, 1.25 + 0.36 * len(bars)), layout="constrained")
    axes = drawn.subplots()
    for place, bar in enumerate(bars):
        colour = "C2" if bar.is_cost else "C0"
        axes.plot(bar.spread, [place, place], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
        axes.plot(bar.ratio, place, "D" if bar.is_cost else "o", color=colour, markersize=5)
        if bar.expected is not None:
            axes.plot(bar.expected, place, "|", color="C1", markersize=11, markeredgewidth=1.6)
        at = axes.get_yaxis_transform()
        axes.text(1.02, place, f"{bar.ratio:.2f}", transform=at, ha="left", va="center")
    axes.axvline(1, color=matplotlib.rcParams["xtick.color"], linewidth=1.1)
    axes.set_yticks(range(len(bars)), [_literal(bar.name) for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("ours / peer: median, extremes of the rounds")
    _ratio_legend(drawn, bars)
    return drawn


def _ratio_legend(drawn: Figure, bars: Sequence[Ratio]) -> None:
    """What the marks mean, of those that are there."""
    marks = {
        "rate: more is better": ("o", "C0", any(not bar.is_cost for bar in bars)),
        "time or memory: less is better": ("D", "C2", any(bar.is_cost for bar in bars)),
        "what FLOPs predict": ("|", "C1", any(bar.expected is not None for bar in bars)),
    }
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=label)
        for label, (marker, colour, present) in marks.items()
        if present
    ]
    drawn.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=10)


def _literal(text: str) -> str:
    """Text as matplotlib shows it as it is: no formula, and not hidden from the legend."""
    return text.replace("$", r"\$").replace("_", " _", int(text.startswith("_")))


def _make_room(axes: Axes, lines: Sequence[Line], levels: Sequence[Level], below: Sequence[bool]) -> None:
    """For a least span and for the names of levels; plain numbers at the ticks, not what is left of them.

    By the limits of the data: those of the axes are for all panels of the row to find.
    """
    values = [
        y for line in lines for y in (*_settled(line.y), *(end for ends in line.spread for end in ends))
    ]
    values += [level.y for level in levels]
    low, high = min(values, default=0.0), max(values, default=0.0)
    more = max(0.0, _MIN_SPAN * max(abs(low), abs(high)) - (high - low)) / 2
    name = _NAME * (high - low + 2 * more)
    names = [level.y - name if under else level.y + name for level, under in zip(levels, below, strict=True)]
    edges = [low - more, high + more, *names]
    axes.dataLim.intervaly = (min(edges), max(edges))
    axes.autoscale_view(scalex=False)
    axes.ticklabel_format(axis="y", useOffset=False)


def _settled(values: Sequence[float]) -> list[float]:
    """Return the numbers that the limits of a panel come from: a first one that lies further from the others
    than they reach would press them flat, so the line comes in from outside."""
    numbers = [value for value in values if math.isfinite(value)]
    first, rest = numbers[:1], numbers[1:]
    if len(rest) < 2:
        return numbers
    span = max(rest) - min(rest)
    far = max(first[0] - max(rest), min(rest) - first[0]) > span > 0
    return rest if far else numbers


def _draw_level(axes: Axes, level: Level, below: bool) -> None:
    """A dashed line; its name stands at the right end, on the side that the lines have left."""
    axes.axhline(level.y, color=matplotlib.rcParams["xtick.color"], linestyle="--", linewidth=1.1)
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right"}
    place |= {"xytext": (0, -3), "va": "top"} if below else {"xytext": (0, 3), "va": "bottom"}
    at = axes.get_yaxis_transform()
    name = axes.annotate(_literal(level.label), (0.995, level.y), xycoords=at, fontsize=9.5, **place)
    name.set_in_layout(False)  # a long one must not squeeze the panel


def short(label: str) -> str:
    """Return the end of a long label: of a path, that is where runs differ."""
    return label if len(label) <= _LABEL else f"...{label[3 - _LABEL :]}"


def legend(drawn: Figure, axes: Axes) -> None:
    """Draw one legend over all panels, in as many columns as fit; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [short(label) for label in labels]
    longest = max(map(len, labels)) + 8  # with the sample of the line
    columns = min(len(labels), max(1, int(_LETTERS * drawn.get_figwidth() / longest)))
    drawn.set_figheight(drawn.get_figheight() + 0.24 * math.ceil(len(labels) / columns))
    drawn.legend(handles, labels, loc="outside upper left", ncols=columns)


def encode(drawn: Figure, kind: str) -> bytes:
    """Return the bytes of a png or svg file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else PNG_MARK)
    return buffer.getvalue()
