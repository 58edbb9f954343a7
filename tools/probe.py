"""What each layer of a frozen encoder knows of a task: ``python -m tools.probe RUN|DIR... --data FOLDER``.

Logistic regression (of scores: ridge regression) on the states of each layer, those of all tokens averaged,
or that of the first token. Two sentences are read apart and compared as InferSent does: u, v, |u - v|, u * v
(Conneau et al. 2017, arXiv 1705.02364). Where pairs have scores, the cosines of the averaged and of the
first states are rows too, which are not trained at all.

Nothing is chosen on dev. A fifth of train is held out; by it each probe's regularisation is
chosen, and the layer and states that speak for the encoder. Then the probe is fitted to all of train and
scored on dev once. What a probe finds may be the probe's own merit, so the same is done with random weights
of the same architecture, and with the most frequent class.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import UserError
from tools.shared import console, downstream, outputs
from tools.shared.downstream import DownstreamScore
from tools.shared.metrics import scored
from tools.shared.tables import aligned, table_files, write_table
from tools.shared.unfinished import Unfinished, key_of
from tools.text import glue

if TYPE_CHECKING:
    from tools.shared.encoders import Encoder

Array = npt.NDArray[np.float32]
Predict = Callable[[Array], Sequence[float]]

NAME = "probe"
"""Of the table and the picture."""
FIELDS = dict.fromkeys(("model", "weights", "task", "metric", "states", "layer", "score", "strength"), "")
"""By which a table of this program is known."""
MEAN, FIRST, COSINE = "mean", "first", "cosine"
FIRST_COSINE = "cosine of firsts"
COSINES = {COSINE: MEAN, FIRST_COSINE: FIRST}
STATES = (MEAN, FIRST)
TRAINED, RANDOM, MAJORITY = "trained", "random", "majority"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the loss, summed over the rows, against half the squared weights of the scaled features."""
HELD_OUT = 5
"""One row of so many."""
_TRAIN_ROWS = 5000


@dataclass(frozen=True)
class ProbeData:
    """A task's rows."""

    task: glue.GlueTask
    train: list[glue.LabelledRow]
    splits: dict[str, list[glue.LabelledRow]]
    """By the name under which they are scored."""

    @cached_property
    def held_out(self) -> list[int]:
        """Places in train of the rows that settings are chosen by, the same whatever the file's order is."""
        keys = [glue.key(row) for row in self.train]
        return glue.drawn(keys, max(1, len(keys) // HELD_OUT), "held out")

    def texts(self) -> Iterator[str]:
        """Yield all texts."""
        for rows in (self.train, *self.splits.values()):
            for row in rows:
                yield from row.texts


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    model: str
    step: int | None
    weights: str
    """trained, random, or majority, which is no encoder."""
    task: str
    metric: str
    score: float
    """On dev."""
    rows: int
    """Of dev."""
    train_rows: int
    states: str = ""
    """mean (of all tokens), first, cosine (of the means of two sentences), or cosine of firsts."""
    layer: int | None = None
    """0: the embeddings."""
    held_out: float | None = None
    """Of a probe that was fitted to the rest of train."""
    strength: float | None = None
    """The chosen one of STRENGTHS."""
    cut: int = 0
    """Texts whose end the model did not take."""


# ---- data ----------------------------------------------------------------------------------------


def read_task(folder: Path, name: str, train_rows: int) -> ProbeData:
    """Return a task's rows, at most `train_rows` of train; UserError for a bad row or a missing file."""
    task = glue.find_task(folder, name)
    file = glue.split_file(folder, task, "train")
    task = glue.with_classes(file, task)
    train = glue.read(file, task)
    kept = glue.drawn([glue.key(row) for row in train], train_rows)
    if len(kept) < HELD_OUT:
        raise UserError(f"{file}: {len(kept)} rows; a probe needs {HELD_OUT} at least")
    splits = {
        name if len(task.splits) == 1 else f"{name} {split.removeprefix('dev_')}": glue.read(
            glue.split_file(folder, task, split), task
        )
        for split in task.splits
    }
    return ProbeData(task, [train[place] for place in kept], splits)


def tasks_of(folder: Path) -> list[str]:
    """Return the tasks that a folder has files of; UserError if there are none."""
    names = sorted(path.parent.name for path in folder.glob("*/train.*") if path.suffix in (".tsv", ".jsonl"))
    found = [name for name in names if name in glue.TASKS or (folder / name / glue.DESCRIPTION).exists()]
    if not found:
        raise UserError(
            f"{folder}: no tasks; it should hold NAME/train.tsv and NAME/dev.tsv of GLUE, or others'"
        )
    return found


# ---- features ------------------------------------------------------------------------------------


class Features:
    """The states of texts, of all layers."""

    def __init__(self, encoder: "Encoder", data: ProbeData, title: str) -> None:
        import torch  # start-up time

        from tools.shared.encoders import by_shape

        texts = list(dict.fromkeys(data.texts()))
        self._places = {text: place for place, text in enumerate(texts)}
        whole = [encoder.tokens(text) for text in texts]
        tokens = [encoder.cut(each) for each in whole]
        self.cut = sum(len(each.ids) > encoder.max_length for each in whole)
        found = dict[int, Array]()
        with console.counter(title, len(texts), "texts") as done:
            for batch in by_shape([(len(each.ids),) for each in tokens]):
                states = encoder.states(torch.tensor([tokens[place].ids for place in batch]))
                pooled = torch.stack([torch.stack((each.mean(1), each[:, 0])) for each in states])
                for place, each in zip(batch, pooled.cpu().numpy().transpose(2, 1, 0, 3), strict=True):
                    found[place] = each
                done(len(batch))
        # [means and firsts, layers, texts, D]
        self._states = np.stack([found[place] for place in range(len(texts))], 2)
        if not np.isfinite(self._states).all():
            raise UserError(f"{encoder.name}: some of its states are no numbers; its weights are broken")
        self.layers = self._states.shape[1]

    def of(self, rows: Sequence[glue.LabelledRow], states: str, layer: int) -> Array:
        """Return the features [rows, F] of a layer: F is D, or of two sentences 4 D."""
        known = self._states[STATES.index(states), layer]
        sides = [
            known[[self._places[text] for text in column]]
            for column in zip(*(row.texts for row in rows), strict=True)
        ]
        if len(sides) == 1:
            return sides[0]
        u, v = sides
        return np.concatenate((u, v, abs(u - v), u * v), 1)

    def cosines(self, rows: Sequence[glue.LabelledRow], states: str, layer: int) -> Array:
        """Return the cosine of the two states of each pair of sentences."""
        known = self._states[STATES.index(states), layer]
        known = known / np.linalg.norm(known, axis=1, keepdims=True)
        u, v = ([self._places[row.texts[side]] for row in rows] for side in (0, 1))
        return np.sum(known[u] * known[v], 1)


# ---- probes --------------------------------------------------------------------------------------


def fit(features: Array, targets: Sequence[float], strength: float, is_regression: bool) -> Predict:
    """Return the predictions of a linear model of features, which are scaled to unit variance."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if len(set(targets)) == 1:
        return lambda other: [targets[0]] * len(other)
    middle, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1.0

    def scaled(other: Array) -> Array:
        return (other - middle) / scale

    if is_regression:
        model = Ridge(alpha=1 / strength, solver="lsqr")
    else:
        model = LogisticRegression(C=strength, max_iter=500)
    model.fit(scaled(features), targets)
    return lambda other: [float(each) for each in model.predict(scaled(other))]


@dataclass(frozen=True)
class Probe:
    """A linear model of a layer, its strength chosen on the held-out rows and fitted to all of train."""

    predict: Predict
    strength: float
    guesses: Sequence[float]
    """For the held-out rows, before it was fitted to them."""


def choose(features: Array, targets: Sequence[float], held_out: Sequence[int], task: glue.GlueTask) -> Probe:
    """Return the probe of the strength that is best on the held-out rows, by the first metric; of equals, the
    least."""
    out = np.zeros(len(targets), dtype=bool)
    out[list(held_out)] = True
    rest, truth = ([targets[place] for place in np.flatnonzero(part).tolist()] for part in (~out, out))
    best: tuple[float, float, Sequence[float]] | None = None
    for strength in STRENGTHS:
        guesses = fit(features[~out], rest, strength, task.is_regression)(features[out])
        score = scored(task.metrics[0], truth, guesses)
        if best is None or score > best[0]:
            best = score, strength, guesses
    assert best is not None
    _, strength, guesses = best
    return Probe(fit(features, targets, strength, task.is_regression), strength, guesses)


def probe(
    encoder: "Encoder", label: str, weights: str, data: ProbeData, known: Unfinished | None = None
) -> list[Result]:
    """Return the scores of all layers of an encoder on a task.

    known: the results that are had already, to which the others are added.
    """
    known = Unfinished(None, NAME) if known is None else known
    import torch  # start-up time

    text = encoder.cut(encoder.tokens(next(data.texts())))
    layers = range(len(encoder.states(torch.tensor([text.ids]))))
    places = [(MEAN, layer) for layer in layers]
    places += [(FIRST, layer) for layer in layers[1:]]  # 0: the same whatever the text is
    if data.task.is_regression and len(data.task.texts) == 2:
        places += [(COSINE, layer) for layer in layers]
        places += [(FIRST_COSINE, layer) for layer in layers[1:]]
    begin = key_of(encoder.fingerprint, label, encoder.step, weights, data)
    keys = {key_of(begin, *place): place for place in places}
    if todo := {name: place for name, place in keys.items() if name not in known}:
        title = f"{data.task.name}, {label}{' (random)' if weights == RANDOM else ''}"
        found = Features(encoder, data, f"encode {title}")
        with console.counter(f"fit {title}", len(todo), "probes") as done:
            for name, (states, layer) in todo.items():
                about = _About(label, encoder.step, weights, states, layer, found.cut)
                results = (_cosines if states in COSINES else _probed)(found, data, about)
                known[name] = [asdict(each) for each in results]
                done(1)
    return [Result(**each) for name in keys for each in known[name]]


@dataclass(frozen=True)
class _About:
    """What is probed."""

    model: str
    step: int | None
    weights: str
    states: str
    layer: int
    cut: int


def _probed(found: Features, data: ProbeData, about: _About) -> Iterator[Result]:
    targets = [row.target for row in data.train]
    chosen = choose(found.of(data.train, about.states, about.layer), targets, data.held_out, data.task)
    truth = [targets[place] for place in data.held_out]
    for title, rows in data.splits.items():
        guesses = chosen.predict(found.of(rows, about.states, about.layer))
        for metric in data.task.metrics:
            held_out = scored(metric, truth, chosen.guesses)
            yield _result(data, about, title, metric, guesses, held_out, chosen.strength)


def _cosines(found: Features, data: ProbeData, about: _About) -> Iterator[Result]:
    kept, states = [data.train[place] for place in data.held_out], COSINES[about.states]
    truth, known = [row.target for row in kept], found.cosines(kept, states, about.layer).tolist()
    for title, rows in data.splits.items():
        guesses = found.cosines(rows, states, about.layer).tolist()
        for metric in data.task.metrics:
            yield _result(data, about, title, metric, guesses, scored(metric, truth, known), None)


def _result(
    data: ProbeData,
    about: _About,
    title: str,
    metric: str,
    guesses: Sequence[float],
    held_out: float,
    strength: float | None,
) -> Result:
    rows = data.splits[title]
    return Result(
        task=title,
        metric=metric,
        score=scored(metric, [row.target for row in rows], guesses),
        held_out=held_out,
        strength=strength,
        rows=len(rows),
        train_rows=len(data.train) if strength else 0,
        **asdict(about),
    )


def majority(data: ProbeData) -> Iterator[Result]:
    """Yield the scores of the most frequent class of train, or of its mean score."""
    targets = [row.target for row in data.train]
    answer = np.mean(targets) if data.task.is_regression else Counter(targets).most_common(1)[0][0]
    for title, rows in data.splits.items():
        for metric in data.task.metrics:
            score = scored(metric, [row.target for row in rows], [float(answer)] * len(rows))
            yield Result(MAJORITY, None, MAJORITY, title, metric, score, len(rows), len(targets))


def best(results: Sequence[Result]) -> list[Result]:
    """Return what speaks for each encoder on each task: the probe that is best on the held-out rows.

    By the task's first metric; all metrics of that probe. Cosines, which are no probes, are left out.
    """
    groups = dict[tuple[str, str, str], list[Result]]()
    for result in results:
        if result.states in STATES:
            groups.setdefault((result.model, result.weights, result.task), []).append(result)
    found = list[Result]()
    for group in groups.values():
        first = [result for result in group if result.metric == group[0].metric]
        top = max(first, key=lambda result: result.held_out or 0.0)
        found += [each for each in group if (each.states, each.layer) == (top.states, top.layer)]
    return found


# ---- showing -------------------------------------------------------------------------------------


def text(results: Sequence[Result]) -> str:
    """Return for people what speaks for each encoder, then the layers, a column for each task."""
    parts = ["best layer, chosen on held-out rows of train", "", aligned(summary(results), names=1)]
    for states in (*STATES, COSINE):
        if rows := [result for result in results if result.states == states]:
            title = {MEAN: "tokens averaged", FIRST: "first token", COSINE: "cosine of the averages"}[states]
            parts += ["", title, "", aligned(_matrix(rows), names=2)]
    for (name, task), cut in {(_name(each), each.task): each.cut for each in results if each.cut}.items():
        parts += ["", f"{name}, {task}: {cut:,} texts were cut to the length that it takes"]
    return "\n".join(parts)


def _columns(results: Sequence[Result]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((result.task, result.metric) for result in results))


def _name(result: Result) -> str:
    return f"{result.model}, random weights" if result.weights == RANDOM else result.model


def summary(results: Sequence[Result]) -> list[list[str]]:
    """Return a row for each encoder: the score, layer and states that speak for it on each task."""
    columns = _columns(results)
    rows = dict[str, dict[tuple[str, str], str]]()
    for result in [*(each for each in results if each.weights == MAJORITY), *best(results)]:
        place = "" if result.layer is None else f" (layer {result.layer}, {result.states})"
        rows.setdefault(_name(result), {})[result.task, result.metric] = f"{100 * result.score:.1f}{place}"
    head = ["", *(f"{task} {metric}" for task, metric in columns)]
    return [head, *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]


def _matrix(results: Sequence[Result]) -> list[list[str]]:
    columns = _columns(results)
    rows = dict[tuple[str, int | None], dict[tuple[str, str], float]]()
    for result in results:
        row = rows.setdefault((_name(result), result.layer), {})
        row[result.task, result.metric] = result.score
    head = ["", "layer", *(f"{task} {metric}" for task, metric in columns)]
    lines = [
        [name, str(layer), *(f"{100 * row[column]:.1f}" if column in row else "" for column in columns)]
        for (name, layer), row in rows.items()
    ]
    return [head, *lines]


def figure(results: Sequence[Result]) -> bytes:
    """Return a PNG: a row for each task, a panel for each kind of states, a line for each encoder."""
    from tools.shared import plots  # start-up time

    titles = list(dict.fromkeys(result.task for result in results))
    with plots.theme("light"):
        drawn, grid = plots.grid(len(STATES), len(titles))
        for row, task in zip(grid, titles, strict=True):
            shown = [result for result in results if result.task == task]
            for axes, states in zip(row, STATES, strict=True):
                _draw(axes, [result for result in shown if result.metric == shown[0].metric], states)
        plots.legend(drawn, grid[0][0])
        return plots.encode(drawn, "png")


def _draw(axes: Any, results: Sequence[Result], states: str) -> None:
    from tools.shared import plots  # start-up time

    lines = []
    for name in dict.fromkeys(_name(result) for result in results if result.states == states):
        mine = [result for result in results if _name(result) == name and result.states == states]
        layers, scores = zip(*((each.layer, 100 * each.score) for each in mine), strict=True)
        lines.append(plots.Line(name, layers, scores))
    levels = [plots.Level("majority", 100 * each.score) for each in results if each.weights == MAJORITY]
    plots.draw(axes, lines, levels, "layer", f"{results[0].metric} (%)")
    axes.set_title(f"{results[0].task}, {'tokens averaged' if states == MEAN else 'first token'}")
    axes.locator_params(axis="x", integer=True)


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    scored("accuracy", [0], [0])  # says what is not installed before anything is computed
    tasks = list(dict.fromkeys(args.tasks or tasks_of(args.data)))
    data = [read_task(args.data, name, args.train_rows) for name in tasks]
    console.refuse_twice(args.models)
    picture = args.output / f"{NAME}.png"
    outputs.check([*table_files(args.output, NAME), picture], fields=FIELDS)
    from tools.shared.encoders import is_run, open_encoder  # start-up time

    for model in args.models:
        downstream.check(model if is_run(model, args.checkpoint) else args.output)
    results, known = [result for each in data for result in majority(each)], Unfinished(args.output, NAME)
    for model, label in console.labels(args.models).items():
        encoder = open_encoder(model, args.checkpoint)
        folder = args.output if encoder.step is None else model
        found = [result for each in data for result in probe(encoder, label, TRAINED, each, known)]
        downstream.record(folder, _downstream(found, model, args.train_rows, encoder.averaged))
        untrained = encoder.untrained(args.seed)
        results += found
        results += [result for each in data for result in probe(untrained, label, RANDOM, each, known)]
    write_table(args.output, NAME, [asdict(result) for result in results], FIELDS)
    outputs.write(picture, figure(results))
    known.finish()
    if args.json:
        console.print_json(results)
    else:
        print(f"{text(results)}\n\n{args.output}: probe.csv, probe.json, probe.png")
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser("probe", "What each layer of a frozen encoder knows of a task", reports=True)
    parser.add_argument("models", nargs="+", metavar="RUN|DIR", help="runs, or Hugging Face encoders")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FOLDER", help="GLUE's folders, or NAME/task.yaml"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="such as CoLA SST-2; all that are there")
    console.add_checkpoint(parser)
    parser.add_argument(
        "--train-rows",
        type=console.whole(HELD_OUT),
        default=_TRAIN_ROWS,
        metavar="N",
        help="rows of train, at most, drawn by their hash: the same for every encoder (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=console.whole(0), default=0, help="of the random weights (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("probe"),
        metavar="DIR",
        help="folder for table and picture, and downstream.jsonl of folders that are no runs (%(default)s);"
        " a command that was interrupted goes on",
    )
    return parser.parse_args(arguments)


def _downstream(
    results: Sequence[Result], path: str, train_rows: int, averaged: str
) -> list[DownstreamScore]:
    """Return what speaks for an encoder."""
    return [
        DownstreamScore(
            step=result.step,
            task=result.task,
            metric=result.metric,
            score=result.score,
            n=result.rows,
            protocol=downstream.of_mean(f"probe: {train_rows:,} rows at most", averaged),
            model=path if result.step is None else "",
        )
        for result in best(results)
    ]


if __name__ == "__main__":
    console.run(main)
