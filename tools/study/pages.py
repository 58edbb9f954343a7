"""What a study found, as a page with tables and a picture for each size, from the lines of results alone."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tools.shared import outputs, tables
from tools.study.analysis import BELOW, NOT_REACHED, Curve, Estimate, estimate, gain, share
from tools.study.plan import Study, StudyCell
from tools.study.results import StudyResult

COSTS = {
    "FLOPs": lambda result: result.flops,
    "FLOPs without head": lambda result: result.flops_without_head,
    "token-layers": lambda result: result.token_layers,
    "device time": lambda result: result.device_hours,
}
_Rows = list[list[str]]


class Found:
    """The results of a study's cells, by size and method."""

    def __init__(self, study: Study, results: Sequence[StudyResult]) -> None:
        self.study, self.results = study, results
        self.known = {result.digest: result for result in results}

    def models(self, size: str, method: str) -> dict[int, list[StudyResult]]:
        """Return by seed the models of the cells that are done, smallest budget first."""
        lr, found = self.study.chosen(size, method, self.results), {}
        for seed in range(self.study.options.methods[method].seeds if lr else 0):
            targets = self.study.targets(StudyCell(size, method, seed, lr or 0.0))
            models = [self.known[each.digest] for each in targets if each.digest in self.known]
            if len(models) == len(targets):
                found[seed] = models
        return found

    def curve(self, size: str, method: str, cost: str, score: str, sign: float = 1.0) -> Curve | None:
        """Return a method's scores over a cost, times a sign; None where no seed is done."""
        models = self.models(size, method)
        if not models or any(score not in each.scores for each in itertools.chain(*models.values())):
            return None
        of = COSTS[cost]
        costs = np.array([[of(each) for each in seed] for seed in models.values()], float)
        scores = np.array([[sign * each.scores[score] for each in seed] for seed in models.values()])
        return Curve(tuple(models), costs, scores)

    def sizes(self) -> list[str]:
        """Return the sizes that anything is known of."""
        return [
            size for size in self.study.options.sizes if any(result.size == size for result in self.results)
        ]


def page(study: Study, results: Sequence[StudyResult], picture: str) -> str:
    """Return the page. picture: name of a size's picture, `{}` for the size."""
    found = Found(study, results)
    done, cells = _progress(study, results)
    parts = [
        outputs.MARKDOWN_MARK,
        f"# Results of {study.name}",
        f"Written by `python -m tools.study {study.path.name} --report` from {len(results)} models: {done} of"
        f" {cells} cells are done, {cells - done} are missing.",
    ]
    for size in found.sizes():
        parts += [f"## {size}: {study.options.sizes[size].budget:.3g} FLOPs", *_sections(found, size)]
        parts.append(f"![Held-out bits per byte over FLOPs, {size}]({picture.format(size)})")
    return "\n\n".join([*parts, "## Account", *_account(results)]) + "\n"


def _progress(study: Study, results: Sequence[StudyResult]) -> tuple[int, int]:
    cells = list(study.cells(results))
    return len(cells) - len(study.todo(results)), len(cells)


_REACHED = (
    "Share of the cost of `{}` at which a method reaches its final score, with the 95 % interval of a paired"
    " bootstrap over seeds. *Below*: at less than the first budget, {:g} of the whole; *not reached*: not"
    " within the whole."
)
_RATES = (
    "Learning rates: held-out loss of the runs that chose them, {:g} of the budget each, one seed; the chosen"
    " one in bold. Where it is at the edge, another may be better."
)
_LIMITS = (
    "Device time is of updates alone, and depends on what else the machine did; FLOPs and token-layers do"
    " not. No figure of a paper is claimed to be reproduced; how the setups differ stands in the plan."
)


def _sections(found: Found, size: str) -> Iterator[str]:
    """Yield what stands below the heading of a size."""
    options = found.study.options
    others = dict.fromkeys(method.against for method in options.methods.values() if method.against)
    for baseline in (options.baseline, *others):
        everything = baseline == options.baseline
        methods = list(options.methods) if everything else _with_optimizer(found.study, baseline)
        if rows := list(_reached(found, size, baseline, methods)):
            yield _REACHED.format(baseline, options.shares[0])
            yield tables.markdown([_head(options.evaluate.pairs), *rows])
    if rows := list(_scores(found, size)):
        yield "Scores at the whole budget: mean over seeds ± standard deviation between them."
        yield tables.markdown(rows)
    rates = [f"{lr:g}" for lr in options.sizes[size].rates]
    if len(rates) == 1:
        own = [f", `{name}` {method.rates[0]:g}" for name, method in options.methods.items() if method.rates]
        yield f"All at a learning rate of {rates[0]}{''.join(own)}."
    else:
        yield _RATES.format(options.tuning)
        yield tables.markdown([["method", *rates], *_rates(found, size)])


def _with_optimizer(study: Study, baseline: str) -> list[str]:
    """Return a baseline and what is compared with it besides."""
    return [name for name, method in study.options.methods.items() if baseline in (name, method.against)]


def _head(pairs: Sequence[str]) -> list[str]:
    names = [_stem(name) for name in pairs]
    return ["method", "seeds", "bits per byte less", *(f"{name}: loss" for name in COSTS)] + [
        f"FLOPs: {name}" for name in names
    ]


def _stem(file: str) -> str:
    """Return the name that scores of a file of pairs have."""
    return file.rpartition("/")[2].partition(".json")[0]


def _reached(found: Found, size: str, baseline: str, methods: Sequence[str]) -> Iterator[list[str]]:
    for method in methods:

        def told(measure: Callable[[Curve, Curve], float], cost: str, score: str, sign: float = 1.0) -> str:
            curves = [found.curve(size, name, cost, score, sign) for name in (method, baseline)]  # noqa: B023
            return _estimate(estimate(measure, curves[0], curves[1]) if all(curves) else None)  # type: ignore[arg-type]

        seeds = set(found.models(size, method)) & set(found.models(size, baseline))
        if seeds:
            yield [
                f"`{method}`",
                str(len(seeds)),
                told(gain, "FLOPs", "bits per byte"),
                *(told(share, cost, "loss") for cost in COSTS),
                *(told(share, "FLOPs", _stem(name), -1.0) for name in found.study.options.evaluate.pairs),
            ]


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.interval is None:
        return _number(found.value)
    return f"{_number(found.value)} ({_number(found.interval[0])} to {_number(found.interval[1])})"


def _number(value: float) -> str:
    names = {BELOW: "below", NOT_REACHED: "not reached"}
    return names.get(value) or f"{value:.3f}"


def _scores(found: Found, size: str) -> Iterator[list[str]]:
    """A row for each method, a column for each score of the last budget's models."""
    last = {
        method: [seed[-1] for seed in models.values()]
        for method in found.study.options.methods
        if (models := found.models(size, method))
    }
    names = list(dict.fromkeys(name for finals in last.values() for each in finals for name in each.scores))
    if last:
        yield ["method", "seeds", *names]
    for method, finals in last.items():
        columns = [[each.scores[name] for each in finals if name in each.scores] for name in names]
        yield [f"`{method}`", str(len(finals)), *map(_spread, columns)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 10 else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _rates(found: Found, size: str) -> Iterator[list[str]]:
    for method in found.study.options.methods:
        chosen, row = found.study.chosen(size, method, found.results), [f"`{method}`"]
        for cell in found.study.trials(size, method):
            result = found.known.get(found.study.targets(cell)[0].digest)
            text = f"{result.scores['loss']:.3f}" if result else "-"
            if result and found.study.options.methods[method].rates:
                text += f" at {cell.lr:g}"
            row.append(f"**{text}**" if chosen == cell.lr else text)
        if set(row[1:]) != {"-"}:
            yield row


def _account(results: Sequence[StudyResult]) -> Iterator[str]:
    """What was spent and by what, cells that the plan has no more included."""
    hours = sum(result.seconds for result in results) / 3600
    facts = {
        "process-hours": f"{hours:.2f}",
        "device": _listed(result.device for result in results),
        "precision": _listed(result.precision for result in results),
        "torch": _listed(result.torch for result in results),
        "commit": _listed(
            result.commit[:12] + "-dirty" * result.commit.endswith("-dirty") for result in results
        ),
        "corpus": _listed(result.corpus for result in results),
    }
    yield tables.markdown([["", ""], *([name, text] for name, text in facts.items())])
    yield _LIMITS


def _listed(words: Iterator[str]) -> str:
    return ", ".join(sorted(set(words))) or "-"


# ---- pictures ------------------------------------------------------------------------------------


def figure(study: Study, results: Sequence[StudyResult], size: str) -> bytes:
    """Return a PNG: bits per byte over FLOPs of the methods with the most seeds, and the seeds' extremes."""
    from tools.shared import plots  # start-up time

    found = Found(study, results)
    lines = []
    for method in study.methods(headline=True):
        if curve := found.curve(size, method, "FLOPs", "bits per byte"):
            ends = zip(curve.scores.min(0).tolist(), curve.scores.max(0).tolist(), strict=True)
            means = curve.costs.mean(0).tolist(), curve.scores.mean(0).tolist()
            lines.append(plots.Line(f"{method} ({len(curve.seeds)})", *means, list(ends)))
    with plots.theme("light"):
        drawn, (axes,) = plots.figure(1)
        plots.draw(axes, lines, [], "training FLOPs", "held-out bits per byte")
        if lines:
            plots.legend(drawn, axes)
        return plots.encode(drawn, "png")
