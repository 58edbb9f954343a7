"""The pages of a report: its document as Markdown, as one HTML file and as a picture.

A column is a title, a cell and the sentence that says what the number means, so that no
figure is shown without its meaning. Names come from folders, so both kinds of page escape them.
"""

import base64
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import PurePath
from typing import IO, NamedTuple

from pretrain import terminal
from tools.report.schema import Report, RunPoint, RunReport, TaskScores
from tools.shared import outputs, plots, tables


class Column(NamedTuple):
    """One figure of every run."""

    title: str
    cell: Callable[[RunReport], str]
    meaning: str


class Table(NamedTuple):
    """A row a run; the first column, its name, is understood."""

    title: str
    columns: tuple[Column, ...]


# ---- numbers as text -----------------------------------------------------------------------------

NONE = "-"
VERSUS = "vs mlm"
"""Title of the columns with the ratio of the cost before."""
LONG = 16
"""Letters from which on a cell of a page is broken between words."""
TERMINAL = 100
"""Letters of a line that a table for a terminal keeps to."""


def _scientific(value: float) -> str:
    """Four digits: 2.050e10; what is small is written out."""
    if value < 1e5:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _count(value: int) -> str:
    return f"{value:,}" if value < 1e9 else _scientific(value)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 100 else f"{hours:.3g}"


def _flops_of(part: str) -> Callable[[RunReport], str]:
    """Return the cell of the FLOPs of a part of the model."""
    return lambda run: _scientific(run.totals.flops.get(part, 0))


def _hours_of(part: str) -> Callable[[RunReport], str]:
    """Return the cell of the device-hours that something took."""
    return lambda run: _hours(run.totals.device_seconds[part])


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tasks(scores: Sequence[TaskScores]) -> str:
    """The latest scores, each after the first word of its protocol."""
    latest = {one.protocol: one for one in scores}
    found = []
    for protocol, one in latest.items():
        spread = f" ({100 * one.low:.1f} to {100 * one.high:.1f})" if one.seeds > 1 else ""
        found.append(f"{protocol.partition(':')[0]} {_share(one.score)}{spread}".strip())
    return "; ".join(found) or NONE


def _score(run: RunReport, part: str, name: str) -> str:
    """A figure of the last evaluation (held_out) or of the unigram baseline, where there is one."""
    value = getattr(getattr(run, part), name, None)
    if value is None:
        return NONE
    return _share(value) if name == "accuracy" else f"{value:.4f}"


def _evaluated(run: RunReport) -> str:
    return f"{run.held_out.step:,}" if run.held_out else "none yet"


def _relative(run: RunReport, name: str) -> str:
    value = getattr(run.relative, name)
    return NONE if value is None else f"{value:.3f} x"


def _size(run: RunReport) -> str:
    return f"{run.model.num_layers} x {run.model.hidden_size} {run.model.block}"


def _devices(run: RunReport) -> str:
    return f"{run.ranks} x {' / '.join(run.devices)}" if run.ranks else NONE


def _budget(run: RunReport) -> str:
    budget = run.budget
    words = f"{_scientific(budget.total)} {_UNITS[budget.unit]}"
    share, _, other = (budget.relative_to or "").partition(" of ")
    # The name alone: a whole path would push other columns off the page.
    return f"{words} ({share} of {plots.short(PurePath(other).name)})" if other else words


def _left(run: RunReport) -> str:
    budget = run.budget
    return f"{_scientific(max(0.0, budget.total - budget.spent))} {_UNITS[budget.unit]}"


def _energy(run: RunReport) -> str:
    kwh = run.totals.kwh
    return NONE if kwh is None else f"{kwh:.4g} kWh"


def _rate(run: RunReport, name: str, unit: str = "") -> str:
    """The median over the run."""
    values = [value for one in run.speed if (value := getattr(one, name)) is not None]
    if not values:
        return NONE
    value = statistics.median(values)
    if name == "mfu":
        return _share(value)
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + unit


def _ramp(shares: Sequence[float] | None) -> str:
    """Return the first share and the last, where they differ."""
    if not shares:
        return NONE
    ends = dict.fromkeys(_share(share) for share in (shares[0], shares[-1]))
    return " to ".join(ends)


def _in_turn(values: Sequence[int]) -> str:
    """Of the phases: 128, then 512."""
    return ", then ".join(dict.fromkeys(map(str, values)))


_UNITS = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "flops_without_head": "FLOPs without head",
    "token_layers": "token-layers",
    "device_hours": "device-hours",
    "kwh": "kWh",
}


# ---- the tables ----------------------------------------------------------------------------------

RESULT = Table(
    "Held-out result",
    (
        Column("method", lambda r: r.method, "the combination of settings under its published name"),
        Column("step", _evaluated, "update after which this row was measured, the last one so far"),
        Column(
            "loss",
            lambda r: _score(r, "held_out", "loss"),
            "mean negative log-likelihood, in nats, of a hidden token of held-out text; the same 15 % of it"
            " are hidden for every method, all of them as [MASK], whatever the run trained with",
        ),
        Column(
            "bits per byte",
            lambda r: _score(r, "held_out", "bits_per_byte"),
            "that loss in bits, spread over the UTF-8 bytes of the text: comparable across tokenizers",
        ),
        Column(
            "accuracy",
            lambda r: _score(r, "held_out", "accuracy"),
            "share of the hidden tokens whose piece the model ranks first",
        ),
        Column(
            "unigram loss",
            lambda r: _score(r, "unigram", "loss"),
            "loss of guessing by the frequencies of the training corpus, blind to the context: a model above"
            " it has not even learned those (a dash: the corpora cannot be opened from here)",
        ),
        Column(
            "unigram accuracy",
            lambda r: _score(r, "unigram", "accuracy"),
            "accuracy of always naming the most frequent piece",
        ),
        Column(
            "downstream",
            lambda r: _tasks(r.downstream),
            "mean score over the tasks at the latest step that has some, by each protocol, with the quartiles"
            " of several seeds (a dash: there are none)",
        ),
    ),
)

COSTS = Table(
    "Four costs",
    (
        Column(
            "token-layers",
            lambda r: _scientific(r.costs.token_layers),
            "products with weights in all layers, in units of one self-attention layer on one token; blind to"
            " attention scores and to the head",
        ),
        Column(VERSUS, lambda r: _relative(r, "token_layers"), ""),
        Column(
            "FLOPs without head",
            lambda r: _scientific(r.costs.flops_without_head),
            "model FLOPs of encoder and decoder, forward and backward, attention included",
        ),
        Column(VERSUS, lambda r: _relative(r, "flops_without_head"), ""),
        Column(
            "FLOPs with head",
            lambda r: _scientific(r.costs.flops_with_head),
            "those and the prediction head, which grows with the share of tokens predicted",
        ),
        Column(VERSUS, lambda r: _relative(r, "flops_with_head"), ""),
        Column(
            "update time",
            lambda r: f"{_hours(r.costs.device_seconds)} h",
            "measured device-hours of the updates that the model is made of, and of nothing else",
        ),
        Column(
            VERSUS,
            lambda r: _relative(r, "device_time"),
            "the same cost for ordinary MLM at 15 % with an encoder of this size, trained on as many"
            " sequences of the same lengths, is 1; the first three by formula, time by what the mlm runs of"
            " this report took at these lengths on the same device in the same precision (a dash: at one of"
            " them there is none)",
        ),
    ),
)

WORK = Table(
    "Work",
    (
        Column("steps", lambda r: _count(r.totals.steps), "updates that the model is made of"),
        Column("sequences", lambda r: _count(r.totals.samples), "windows of text in these updates"),
        Column(
            "tokens seen",
            lambda r: _count(r.totals.tokens_seen),
            "places in these windows, those that hold a [MASK] included",
        ),
        Column(
            "tokens predicted",
            lambda r: _count(r.totals.tokens_predicted),
            "places that the training loss asks about",
        ),
        *(
            Column(f"FLOPs {part}", _flops_of(part), meaning)
            for part, meaning in (
                ("encoder", "matrix products of the layers that are kept, 2 a multiply-add, 3 x forward"),
                ("decoder", "the same of the layers that are thrown away"),
                ("head", "the same of the prediction head: predicted tokens x padded vocabulary"),
                ("optimizer", "those by which Muon orthogonalises matrices; AdamW forms no products"),
                ("total", "their sum; recomputed activations are not counted"),
            )
        ),
    ),
)

SPEED = Table(
    "Speed",
    (
        Column(
            "step time",
            lambda r: _rate(r, "step_seconds", " s"),
            "median seconds of an update over the logs; evaluation, saving and start-up are apart",
        ),
        Column(
            "slots/s",
            lambda r: _rate(r, "slots_per_second"),
            "rows of input a second, over all devices: places in windows, those of [MASK] included",
        ),
        Column(
            "tokens/s",
            lambda r: _rate(r, "real_tokens_per_second"),
            "those of them that are text: the ends of windows are not",
        ),
        Column(
            "predicted/s",
            lambda r: _rate(r, "predictions_per_second"),
            "places a second that the training loss asks about",
        ),
        Column(
            "MFU",
            lambda r: _rate(r, "mfu"),
            "model FLOPs of the updates over the dense peak of the devices in this precision (a dash: the"
            " device's peak is not known)",
        ),
        Column(
            "peak memory",
            lambda r: f"{r.totals.peak_bytes / 2**30:.2f} GiB" if r.totals.peak_bytes else NONE,
            "most that a rank has held: of a GPU's memory, or on a CPU of the host's",
        ),
    ),
)

ACCOUNT = Table(
    "Account",
    (
        Column(
            "state",
            lambda r: r.state or "not begun",
            "what the run last said of itself; one that was killed still says running",
        ),
        Column("budget", _budget, "what the run may spend"),
        Column(
            "used",
            lambda r: _share(r.budget.spent / r.budget.total),
            "share of it that is spent; an update that would exceed it is not begun",
        ),
        Column("left", _left, "what is left of it"),
        Column("device", _devices, "ranks of the last attempt, and what each of them drives"),
        Column(
            "device-hours",
            lambda r: _hours(r.totals.device_seconds["total"]),
            "ranks x hours from start to exit, over all attempts, whatever the time went into",
        ),
        Column(
            "ledger",
            lambda r: (r.ledger_head or "-")[:16],
            "hash of the newest line of its ledger, which stands for all before it: `tools.ledger check RUN"
            " --head HASH` says whether a ledger is still that one",
        ),
        Column(
            "energy",
            _energy,
            "what GPUs (NVML) and hosts (RAPL) have counted, in kWh (a dash: no sensor could be read)",
        ),
        Column(
            "metered",
            lambda r: (
                _share(r.totals.metered_device_seconds / r.totals.device_seconds["total"])
                if r.totals.joules is not None
                else NONE
            ),
            "share of the device-hours in which a sensor was read; imports before the first reading are not",
        ),
    ),
)

HOURS = Table(
    "Where the device-hours went",
    (
        Column("attempts", lambda r: f"{r.totals.attempts}", "how often the run was started"),
        *(
            Column(name, _hours_of(part), meaning)
            for part, name, meaning in (
                ("productive", "updates", "device-hours of updates that the model is made of"),
                ("evaluate", "evaluation", "of held-out evaluation"),
                ("checkpoint", "saving", "of writing checkpoints"),
                ("startup", "start-up", "from a process's start to its first update, compilation included"),
                ("idle", "idle", "of what nobody claims"),
            )
        ),
        Column(
            "lost hours",
            lambda r: _hours(r.totals.device_seconds["lost"]),
            "of work that was gone after a crash and done again",
        ),
        Column(
            "lost FLOPs",
            lambda r: _scientific(r.totals.lost_flops),
            "FLOPs of that work, in no other column",
        ),
    ),
)

MODEL = Table(
    "Model",
    (
        Column("encoder", _size, "layers x width, and the kind of block"),
        Column("length", lambda r: _in_turn(r.seq_length), "tokens of a training sequence"),
        Column("batch", lambda r: _in_turn(r.batch_size), "sequences of an update"),
        Column(
            "predicted",
            lambda r: _ramp(r.predicted_shares),
            "share of them that the training loss asks about",
        ),
        Column(
            "encoder parameters",
            lambda r: _count(r.parameters.encoder),
            "embeddings and encoder layers: what fine-tuning starts from",
        ),
        Column(
            "discarded parameters",
            lambda r: _count(r.parameters.discarded),
            "decoder, mask vector and prediction head: what fine-tuning does not use",
        ),
    ),
)

TABLES = (RESULT, ACCOUNT, HOURS, COSTS, WORK, SPEED, MODEL)


def _meanings(table: Table) -> list[tuple[str, str]]:
    return [(column.title, column.meaning) for column in table.columns if column.meaning]


def _subtitle(document: Report) -> str:
    runs = document.runs
    when = document.time.replace("T", " ").replace("+00:00", " UTC")
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, as of {when}, LateMask {document.version}"


def _tree(document: Report) -> list[str]:
    """A line for each run with its own part, and the sum."""
    spent = document.together
    if spent is None:
        return document.tree
    hours = _hours(spent.device_seconds["total"])
    sums = f"{_count(spent.steps)} updates, {spent.flops['total']:.3e} FLOPs, {hours} device-hours"
    return [*document.tree, f"together, what they share counted once: {sums}"]


# ---- figures -------------------------------------------------------------------------------------

Points = Sequence[RunPoint]
"""What was measured of a run, and what it had cost then."""


class Axis(NamedTuple):
    """What a point had cost."""

    key: str
    name: str
    label: str
    scales: tuple[tuple[str, float], ...] = ()
    """(unit, how many of it a unit of the document is), the largest first; none: a power of ten."""


AXES = (
    Axis("flops", "FLOPs", "training FLOPs, head included"),
    Axis("tokens_seen", "tokens", "tokens seen"),
    Axis(
        "device_hours",
        "device-hours",
        "device-{}, everything included",
        (("hours", 1.0), ("minutes", 60.0), ("seconds", 3600.0)),
    ),
    Axis("kwh", "energy", "{}, all that was metered", (("kWh", 1.0), ("Wh", 1e3), ("mWh", 1e6))),
)


class ReportMeasure(NamedTuple):
    """What is drawn upwards."""

    key: str
    name: str
    label: str
    points: Callable[[RunReport], Points]
    factor: float = 1.0


QUALITIES = (
    ReportMeasure("loss", "Held-out loss", "held-out loss (nats)", lambda r: r.evaluations),
    ReportMeasure("accuracy", "Held-out accuracy", "held-out accuracy (%)", lambda r: r.evaluations, 100.0),
)
RATES = (
    ReportMeasure("slots_per_second", "Throughput", "slots a second", lambda r: r.speed),
    ReportMeasure("mfu", "MFU", "MFU (%)", lambda r: r.speed, 100.0),
)


def _qualities(runs: Sequence[RunReport]) -> list[ReportMeasure]:
    """Held-out loss and accuracy, and what was scored on tasks, each protocol apart: they do not compare."""
    protocols = sorted({one.protocol for run in runs for one in run.downstream})
    return [*QUALITIES, *map(_of_protocol, protocols)]


def _of_protocol(protocol: str) -> ReportMeasure:
    name = protocol.partition(":")[0] or "downstream"
    return ReportMeasure(
        "score",
        f"{protocol or 'downstream'} score",
        f"{name} (%)",
        lambda run: [one for one in run.downstream if one.protocol == protocol],
        100.0,
    )


def _points(run: RunReport, measure: ReportMeasure, axis: Axis) -> Points:
    """Those that have both figures."""
    return [
        one
        for one in measure.points(run)
        if getattr(one, measure.key) is not None and getattr(one, axis.key) is not None
    ]


def _scaled(axis: Axis, values: Sequence[Sequence[float]]) -> tuple[str, list[list[float]]]:
    """Label and places, in the largest unit of which there is one at least."""
    largest = max([0.0, *(value for row in values for value in row)])
    if axis.scales:
        unit, scale = next((pair for pair in axis.scales if largest * pair[1] >= 1), axis.scales[-1])
        label = axis.label.format(unit)
    else:
        exponent = math.floor(math.log10(max(1.0, largest)))
        scale = 10.0**-exponent if exponent > 3 else 1.0
        label = f"{axis.label} ($10^{{{exponent}}}$)" if exponent > 3 else axis.label
    return label, [[value * scale for value in row] for row in values]


def _measured(runs: Sequence[RunReport], measures: Sequence[ReportMeasure]) -> list[ReportMeasure]:
    """Those that some run has; the first of them always."""
    found = [measure for measure in measures if any(_points(run, measure, AXES[2]) for run in runs)]
    return found or [measures[0]]


def _axes(runs: Sequence[RunReport]) -> list[Axis]:
    """Without energy, where nobody measured it."""
    return [
        axis for axis in AXES if axis.key != "kwh" or any(_points(run, QUALITIES[0], axis) for run in runs)
    ]


def _levels(runs: Sequence[RunReport], measure: ReportMeasure) -> list[plots.Level]:
    """Unigram baselines: one where the runs share it."""
    by_value: dict[float, list[str]] = {}
    for run in runs:
        value = getattr(run.unigram, measure.key, None)
        if value is not None:
            by_value.setdefault(round(measure.factor * value, 4), []).append(run.name)
    if len(by_value) == 1:
        return [plots.Level("unigram", value) for value in by_value]
    return [
        plots.Level(f"unigram, {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}", value)
        for value, names in by_value.items()
    ]


def _drawn(
    runs: Sequence[RunReport], rows: Sequence[ReportMeasure], columns: Sequence[Axis], kind: str
) -> bytes:
    """A grid of panels; those of a row share their vertical scale."""
    figure, panels = plots.grid(len(columns), len(rows))
    for row, measure in zip(panels, rows, strict=True):
        for number, (panel, axis) in enumerate(zip(row, columns, strict=True)):
            found = [_points(run, measure, axis) for run in runs]
            label, places = _scaled(axis, [[getattr(one, axis.key) for one in points] for points in found])
            lines = [
                plots.Line(
                    run.name,
                    x,
                    [measure.factor * getattr(one, measure.key) for one in points],
                    [
                        (measure.factor * one.low, measure.factor * one.high)
                        for one in points
                        if isinstance(one, TaskScores)
                    ],
                )
                for run, x, points in zip(runs, places, found, strict=True)
            ]
            levels = _levels(runs, measure)
            plots.draw(panel, lines, levels, label, "" if number else measure.label)
            if measure in RATES:
                panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    plots.legend(figure, panels[0][0])
    return plots.encode(figure, kind)


def picture(document: Report) -> bytes:
    """Return loss.png: held-out loss, accuracy and downstream score against what they cost."""
    runs = document.runs
    with plots.theme("light"):
        return _drawn(runs, _measured(runs, _qualities(runs)), _axes(runs), "png")


def speed_picture(document: Report) -> bytes:
    """Return speed.png: throughput and MFU over the run."""
    runs = document.runs
    with plots.theme("light"):
        return _drawn(runs, _measured(runs, RATES), [AXES[2]], "png")


# ---- the terminal ------------------------------------------------------------------------------


def show(document: Report, stream: IO[str]) -> None:
    """Print the tables, without the meanings of their columns, for a terminal."""
    if document.tree:
        print("\n".join(_tree(document)) + "\n", file=stream)
    for table in TABLES:
        print(f"{table.title}\n\n{_text_table(table, document.runs)}\n", file=stream)


def _text_table(table: Table, runs: Sequence[RunReport]) -> str:
    """In as many parts, one below the other, as it takes to keep within a terminal; a cost and its ratio
    are not torn apart."""
    columns = [["run", *(plots.short(run.name) for run in runs)]]
    columns += [[column.title, *(column.cell(run) for run in runs)] for column in table.columns]
    bound = [number for number, (title, *_) in enumerate(columns) if title == VERSUS]
    width = min(TERMINAL, terminal.columns() or TERMINAL)
    return tables.aligned(list(zip(*columns, strict=True)), bound=bound, width=width)


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(document: Report) -> str:
    """Return report.md; it shows the pictures beside it."""
    parts = [f"{outputs.MARKDOWN_MARK}\n# Pre-training report\n\n{_subtitle(document)}"]
    parts += [f"> **Warning:** {_plain(warning)}" for warning in document.warnings]
    if document.tree:
        parts.append("\n".join(["```", *_tree(document), "```"]))
    for table in TABLES:
        parts += [f"## {table.title}", tables.markdown(_rows(table.columns, document.runs))]
        parts.append("\n".join(f"* **{title}**: {meaning}." for title, meaning in _meanings(table)))
        if table is RESULT:
            parts.append("![Held-out loss and accuracy against what they cost](loss.png)")
        if table is SPEED:
            parts.append("![Throughput over the run](speed.png)")
    return "\n\n".join(parts) + "\n"


def columns(document: Report, titles: Sequence[str]) -> list[list[str]]:
    """Return some columns of the tables, of whichever table has them, as rows for a page."""
    known = {column.title: column for table in TABLES for column in table.columns}
    return _rows([known[title] for title in titles], document.runs)


def _rows(chosen: Sequence[Column], runs: Sequence[RunReport]) -> list[list[str]]:
    rows = [["run", *(column.title for column in chosen)]]
    rows += [[run.name, *(column.cell(run) for column in chosen)] for run in runs]
    return [[_plain(word) for word in row] for row in rows]


def _plain(text: str) -> str:
    """Text that Markdown leaves alone."""
    return "".join(f"\\{letter}" if letter in r"\|`*_<>[]" else letter for letter in text)


# ---- HTML ----------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #222222; --faint: #5f6368; --line: #dddddd;
  --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e6e6e6; --faint: #a3a8b0;
  --line: #34383f; --warn: #3a2d14; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.subtitle, dl { color: var(--faint); }
.warning { background: var(--warn); border-left: 4px solid #d98200; padding: .5rem .75rem; margin: 1rem 0;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: linear-gradient(to left, var(--page) 1rem, transparent)
  right / 3rem 100% no-repeat local, linear-gradient(to left, var(--line), transparent)
  right / 1rem 100% no-repeat; } /* a shade where a table goes on, which its own end covers */
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; }
td.long { white-space: normal; min-width: 8rem; }
thead th { font-size: .875rem; color: var(--faint); vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: var(--page); padding-left: 0; text-align: left; }
th span { display: inline-block; width: max-content; max-width: 9rem; white-space: normal;
  overflow-wrap: anywhere; }
dl { font-size: .875rem; margin: .75rem 0; }
dt { float: left; clear: left; font-weight: 600; padding-right: .4em; }
dt::after { content: ":"; }
dd { margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.figures picture { flex: 1 1 20rem; min-width: 0; }
img { display: block; width: 100%; max-width: 40rem; height: auto; }
"""


def html(document: Report) -> str:
    """Return report.html: style and figures inside, nothing fetched, no script."""
    runs = document.runs
    body = [f'<h1>Pre-training report</h1>\n<p class="subtitle">{escape(_subtitle(document))}</p>']
    body += [f'<p class="warning">{escape(warning)}</p>' for warning in document.warnings]
    if document.tree:
        body.append(f"<pre>{escape(chr(10).join(_tree(document)))}</pre>")
    for table in TABLES:
        body += [f"<h2>{table.title}</h2>", _html_table(table, document.runs)]
        if table is RESULT:
            body.append(_html_figures(runs, _measured(runs, _qualities(runs)), _axes(runs)))
        if table is SPEED:
            body.append(_html_figures(runs, _measured(runs, RATES), [AXES[2]]))
        terms = "\n".join(
            f"<dt>{escape(title)}</dt><dd>{escape(meaning)}.</dd>" for title, meaning in _meanings(table)
        )
        body.append(f"<dl>\n{terms}\n</dl>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            outputs.HTML_MARK,
            f"<title>Pre-training report</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _html_table(table: Table, runs: Sequence[RunReport]) -> str:
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row"><span>{escape(run.name)}</span></th>'
        + "".join(map(_html_cell, (column.cell(run) for column in table.columns)))
        + "</tr>"
        for run in runs
    ]
    return "\n".join(
        [
            f'<div class="scroll">\n<table>\n<thead><tr><th scope="col">run</th>{head}</tr></thead>\n<tbody>',
            *rows,
            "</tbody>\n</table>\n</div>",
        ]
    )


def _html_cell(text: str) -> str:
    """A cell; a long one may go on in a second line."""
    kind = ' class="long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def _html_figures(runs: Sequence[RunReport], measures: Sequence[ReportMeasure], axes: Sequence[Axis]) -> str:
    """A figure a panel, so that they stack on a phone, each in both themes."""
    figures = []
    for measure in measures:
        for axis in axes:
            sources = {}
            for name in ("light", "dark"):
                with plots.theme(name):
                    data = base64.b64encode(_drawn(runs, [measure], [axis], "svg")).decode("ascii")
                sources[name] = f"data:image/svg+xml;base64,{data}"
            figures.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
                f'<img alt="{measure.name} against {axis.name}" src="{sources["light"]}"></picture>'
            )
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>"
