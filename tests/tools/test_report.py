"""Reports against runs whose every figure is known: a real ledger and real metrics under a fake clock."""

import base64
import gzip
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from pretrain.account import flops
from pretrain.account.ledger_writer import Ledger
from pretrain.account.recipe import baseline, make_recipe
from pretrain.config import Config, geometry, method_of
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from pretrain.data.masking import counts
from pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut
from pretrain.monitor import Monitor
from pretrain.run_folder import RunFolder
from tests.support.methods import METHODS, small
from tests.support.terminal import on_terminal
from tools.encode_corpus import __main__ as encode_corpus
from tools.report import __main__ as report
from tools.report import pages as report_pages
from tools.report.schema import RunReport
from tools.shared import downstream, plots

ROOT = Path(__file__).parents[2]
VOCABULARY = 600


class Corpora:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = folder / "tokenizer"
        sample = ROOT / "tools" / "sample" / "valid.jsonl.gz"
        lines = gzip.decompress(sample.read_bytes()).splitlines(keepends=True)
        train_sentencepiece(
            [json.loads(line)["text"] for line in lines], self.tokenizer, "unigram", VOCABULARY
        )
        self.train = self._encoded(folder / "train", lines[6:30])
        self.valid = self._encoded(folder / "valid", lines[:6])
        self.other = self._encoded(folder / "other", lines[30:])

    def _encoded(self, prefix: Path, lines: list[bytes]) -> str:
        text = prefix.with_suffix(".jsonl")
        text.write_bytes(b"".join(lines))
        files = ["--input", str(text), "--tokenizer", str(self.tokenizer), "--output", str(prefix)]
        encode_corpus.main([*files, "--workers", "1"])
        return str(prefix)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return Corpora(tmp_path_factory.mktemp("corpora"))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MadeRun:
    """A run without a model: 2 ranks, 5 s of start-up, then what the test makes of it."""

    def __init__(
        self,
        path: Path,
        config: Config,
        device: str = "cpu",
        step_seconds: float = 2.0,
        peak: float | None = None,
    ) -> None:
        self.path, self.config, self.step_seconds = path, config, step_seconds
        c = counts(config.masking, config.train.seq_length)
        rows, t = geometry.Rows(c.length, c.visible, c.predicted), config.train
        self.cost = flops.step_cost(config.model, rows, VOCABULARY, t.batch_size, t.recompute)
        self.clock, folder = Clock(), RunFolder(path)
        folder.claim()
        folder.write_config(config)
        self.ledger = Ledger.open(path, 2, device, self.clock, self.clock.now)
        self.clock.now += 5
        self.ledger.begin()
        folder.write_status("running", 0)
        folder.release()
        totals = self.ledger.totals()
        self.monitor = Monitor(path, "any", totals, 2, peak, stream=io.StringIO(), clock=self.clock)

    def work(self, steps: int) -> "MadeRun":
        for _ in range(steps):
            self.clock.now += self.step_seconds
            self.ledger.step(self.cost)
        self.ledger.note("heartbeat")
        self.monitor.log(0.5, self.ledger.totals(), loss=9.0)
        return self

    def score(self, loss: float, accuracy: float = 0.25, predicted: int = 100) -> "MadeRun":
        bits = loss / math.log(2) / 4
        with self.ledger.time("evaluate"):
            self.clock.now += 3
        self.ledger.note("evaluate", held_out={"loss": loss, "predicted_tokens": predicted})
        scores = {"held_out_loss": loss, "held_out_accuracy": accuracy, "held_out_bits_per_byte": bits}
        self.monitor.log(0.5, self.ledger.totals(), **scores)
        return self


def options_of(corpora: Corpora | None, method: str = "mlm", **sections: dict[str, Any]) -> Config:
    named = (
        {"train": corpora.train, "valid": corpora.valid} if corpora else {"train": "gone", "valid": "gone"}
    )
    named |= sections.pop("corpus", {})
    masking = {"rate": 0.15 if method == "mlm" else 0.5, **sections.pop("masking", {})}
    model = {"vocab_size": VOCABULARY, **METHODS[method], **sections.pop("model", {})}
    return small(method, corpus=named, masking=masking, model=model, **sections)


@pytest.fixture
def pair(corpora: Corpora, tmp_path: Path) -> list[str]:
    """mlm: 4 steps of 2 s; 3ml: 3 steps of 1.5 s."""
    MadeRun(tmp_path / "base", options_of(corpora)).work(2).score(5.0).work(2).score(4.5, 0.375)
    late = options_of(corpora, "3ml-self", budget={"tokens": 1000})
    MadeRun(tmp_path / "late", late, step_seconds=1.5).work(2).score(4.75).work(1).score(4.25)
    return [str(tmp_path / "base"), str(tmp_path / "late")]


def cells(page: str, title: str) -> dict[str, dict[str, str]]:
    """Run -> column -> cell of a table of report.md; of equal titles the later have '+' at the end."""
    lines = page.split(f"## {title}\n\n")[1].split("\n\n")[0].split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    head: list[str] = []
    for name in rows[0]:
        head.append(name + "+" * sum(name == before.rstrip("+") for before in head))
    assert all(len(row) == len(head) for row in rows[2:])
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows[2:]}


# ---- figures -------------------------------------------------------------------------------------


def test_counts_and_account(pair: list[str]) -> None:
    page = report_pages.markdown(report.gather(pair))
    work, account = cells(page, "Work"), cells(page, "Account")
    # 8 sequences of 24: 15 % of 22 is 3 predicted; late: 11.
    assert [work["base"][name] for name in ("steps", "sequences", "tokens seen")] == ["4", "32", "768"]
    assert (work["base"]["tokens predicted"], work["late"]["tokens predicted"]) == ("96", "264")
    assert work["base"]["FLOPs decoder"] == "0"
    assert (account["base"]["budget"], account["base"]["used"]) == ("5 steps", "80.0 %")
    assert account["late"]["used"] == "57.6 %" and account["late"]["budget"] == "1,000 tokens"
    # 2 ranks x (5 s of start-up + 4 x 2 s + 2 evaluations x 3 s)
    assert account["base"]["device-hours"] == f"{2 * (5 + 8 + 6) / 3600:.3g}"
    assert account["base"]["device"] == "2 x cpu" and account["base"]["state"] == "running"
    hours = cells(page, "Where the device-hours went")["base"]
    assert (hours["lost hours"], hours["attempts"]) == ("0", "1")


def test_costs_are_relative_to_mlm_at_15_percent(pair: list[str]) -> None:
    document = report.gather(pair)
    base, late = document.runs
    assert set(vars(base.relative).values()) == {1.0}
    # D 32, F 48, L 24, V 15 (11 predicted, 9 of them [MASK]), P 11 against 3, 640 padded rows.
    layer = {n: n * (8 * 32**2 + 4 * 32 * 48) + 4 * n * n * 32 for n in (15, 24)}
    inner, plain = 2 * layer[15] + 2 * layer[24], 2 * layer[24]
    head = 2 * 32**2 + 2 * 32 * 640
    assert late.relative.token_layers == (2 * 15 + 2 * 24) / (2 * 24)
    assert late.relative.flops_without_head == inner / plain
    assert late.relative.flops_with_head == (inner + 11 * head) / (plain + 3 * head)
    assert late.relative.device_time == pytest.approx(1.5 / 2, rel=1e-12)
    assert vars(late.costs) == {
        "token_layers": 24 * (2 * 15 + 2 * 24),
        "flops_without_head": 3 * 24 * inner,
        "flops_with_head": 3 * 24 * (inner + 11 * head),
        "device_seconds": pytest.approx(2 * 3 * 1.5),
    }
    row = cells(report_pages.markdown(document), "Four costs")["late"]
    assert [row["vs mlm" + "+" * n] for n in range(4)] == [
        f"{ratio:.3f} x" for ratio in vars(late.relative).values()
    ]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mlm"])
def test_baseline_is_the_mlm_config_of_that_size(method: str) -> None:
    modern = {"block": "modern", "norm": None}
    mine, plain = options_of(None, method, model=modern), options_of(None, "mlm", model=modern)
    (one,), (other,) = (make_recipe(each, VOCABULARY).phases for each in (mine, plain))
    assert baseline(one).sequence_costs == other.sequence_costs
    assert method_of(baseline(one).config) == "mlm"


def test_device_time_only_against_the_same_size_device_and_precision(
    corpora: Corpora, tmp_path: Path
) -> None:
    late = MadeRun(tmp_path / "late", options_of(corpora, "3ml-self")).work(1)
    others = {
        "wider": options_of(corpora, model={"ffn_size": 64}),
        "longer": options_of(corpora, train={"seq_length": 32}),
        "precise": options_of(corpora, train={"precision": "bf16"}),
        "rate": options_of(corpora, masking={"rate": 0.4}),
        "elsewhere": options_of(corpora),
        "idle": options_of(corpora),
    }
    for name, options in others.items():
        made = MadeRun(tmp_path / name, options, device="gpu" if name == "elsewhere" else "cpu")
        if name != "idle":
            made.work(1)
    paths = [str(late.path), *(str(tmp_path / name) for name in others)]
    runs = report.gather(paths).runs
    assert runs[0].relative.device_time is None
    assert runs[1 + list(others).index("elsewhere")].relative.device_time == 1
    # Two baselines count together: 2 s and 4 s a step.
    for name, seconds in (("fit", 2.0), ("slow", 4.0)):
        MadeRun(tmp_path / name, options_of(corpora), step_seconds=seconds).work(1)
    runs = report.gather([*paths, str(tmp_path / "fit"), str(tmp_path / "slow")]).runs
    assert runs[0].relative.device_time == pytest.approx(2 / 3, rel=1e-12)


HALVES = {"phases": [{"until": 0.5, "seq_length": 12}]}


def phased(made: MadeRun, *parts: tuple[int, float]) -> MadeRun:
    """Works through the phases of a run: of each the updates and the seconds of one."""
    phases = make_recipe(made.config).phases
    for number, (steps, seconds) in enumerate(parts):
        made.cost = phases[number].cost
        made.step_seconds = seconds
        if number:
            made.ledger.note("phase-change", phase=number)
        made.work(steps)
    return made


def test_device_time_of_phases_only_against_the_same_lengths(corpora: Corpora, tmp_path: Path) -> None:
    late, halved = (options_of(corpora, method, train=HALVES) for method in ("3ml-self", "mlm"))
    phased(MadeRun(tmp_path / "late", late), (4, 1.0), (1, 3.0))
    MadeRun(tmp_path / "long", options_of(corpora), step_seconds=6.0).work(3)
    phased(MadeRun(tmp_path / "mlm", halved), (3, 1.5), (3, 4.0))
    phased(MadeRun(tmp_path / "begun", halved), (3, 1.5))

    def times(*names: str) -> list[float | None]:
        runs = report.gather([str(tmp_path / name) for name in names]).runs
        return [run.relative.device_time for run in runs]

    # Sequences of 24 say nothing of those of 12, and the other way round.
    assert times("late", "long") == [None, 1] and times("late", "begun") == [None, 1]
    assert times("late", "mlm") == [pytest.approx((4 * 1 + 3) / (4 * 1.5 + 4)), 1]
    assert times("late", "long", "begun") == [pytest.approx((4 * 1 + 3) / (4 * 1.5 + 6)), 1, 1]
    # The long run and the second half of the other are pooled: 5 s for a sequence of 24.
    assert times("long", "mlm") == [
        pytest.approx(6 / 5),
        pytest.approx((3 * 1.5 + 3 * 4) / (3 * 1.5 + 3 * 5)),
    ]


def test_a_phase_that_was_lost_is_not_counted(corpora: Corpora, tmp_path: Path) -> None:
    """Killed in the second phase after a save in the first: until it is there again it has begun nothing."""
    made = MadeRun(tmp_path / "run", options_of(corpora, "3ml-self", train=HALVES))
    first = made.cost = make_recipe(made.config).phases[0].cost
    head = made.work(2).ledger.save()
    phased(made, (1, 2.0), (1, 2.0))
    made.ledger = Ledger.open(made.path, 2, "cpu", made.clock, made.clock.now)
    made.ledger.begin(2, head)
    (run,) = report.read_runs([str(made.path)])
    assert [(done.samples, done.seconds) for done in run.spans] == [(16, 8.0)]
    made.cost = first
    made.work(2)
    made.ledger.note("phase-change", phase=1)
    made.cost = make_recipe(made.config).phases[1].cost
    made.work(1)
    made.ledger.note("phase-change", phase=0)  # a larger budget, of which this is the first half
    made.cost = first
    made.work(1)
    (run,) = report.read_runs([str(made.path)])
    lengths = [done.phase.config.train.seq_length for done in run.spans]
    assert (lengths, [done.samples for done in run.spans]) == ([12, 24, 12], [32, 8, 8])
    assert [done.seconds for done in run.spans] == [16.0, 4.0, 4.0]


def test_parameters_are_those_of_the_model(corpora: Corpora) -> None:
    from pretrain.model.late_mask import LateMaskModel

    config = options_of(corpora, "3ml-cross")
    module = LateMaskModel(config.model, VOCABULARY, VOCABULARY - 1)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    recipe = make_recipe(config, VOCABULARY)
    found = report._parameters(recipe)
    assert found.total == sum(sizes.values()) == found.encoder + found.discarded
    plain = LateMaskModel(baseline(recipe.phases[0]).config.model, VOCABULARY, VOCABULARY - 1)
    head = VOCABULARY // 128 * 128 + 128 + 32 * 32 + 32 + 64
    assert found.encoder == sum(parameter.numel() for parameter in plain.parameters()) - head


def test_held_out_is_the_last_evaluation_beside_the_unigram(pair: list[str], corpora: Corpora) -> None:
    document = report.gather(pair)
    row = cells(report_pages.markdown(document), "Held-out result")["base"]
    assert (row["method"], row["step"], row["loss"], row["accuracy"]) == ("mlm", "4", "4.5000", "37.5 %")
    assert row["bits per byte"] == f"{4.5 / math.log(2) / 4:.4f}"
    assert [one.loss for one in document.runs[0].evaluations] == [5.0, 4.5]
    assert document.runs[0].evaluations[1].device_hours == pytest.approx(2 * 19 / 3600)

    tokenizer = load_tokenizer(corpora.tokenizer)
    questions = HeldOut(corpora.valid, tokenizer, 24, 512)
    targets = questions.questions(0, questions.samples).targets.ravel().tolist()
    seen = Counter(np.asarray(IndexedReader(corpora.train).tokens).tolist())
    every = seen.total() + VOCABULARY
    loss = math.fsum(-math.log((seen[token] + 1) / every) for token in targets) / len(targets)
    best = max(range(VOCABULARY), key=lambda token: seen[token])
    assert float(row["unigram loss"]) == pytest.approx(loss, abs=6e-5)
    assert row["unigram accuracy"] == f"{100 * targets.count(best) / len(targets):.1f} %"


def test_lost_work_and_attempts(corpora: Corpora, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", options_of(corpora)).work(1)
    head = made.ledger.save()
    made.work(2)  # and killed
    made.clock.now += 100
    again = Ledger.open(made.path, 2, "cpu", made.clock, made.clock.now)
    made.clock.now += 1
    again.begin(1, head)
    page = report_pages.markdown(report.gather([str(made.path)]))
    row = cells(page, "Where the device-hours went")["run"]
    assert row["attempts"] == "2"
    assert row["lost hours"] == f"{2 * 2 * 2.0 / 3600:.3g}"
    assert float(row["lost FLOPs"].replace(",", "")) == pytest.approx(2 * made.cost.flops.total, rel=1e-3)


# ---- warnings ------------------------------------------------------------------------------------


def test_incomparable_losses_are_told(corpora: Corpora, tmp_path: Path) -> None:
    MadeRun(tmp_path / "a", options_of(corpora)).work(1).score(5.0)
    other = options_of(corpora, corpus={"valid": corpora.other})
    MadeRun(tmp_path / "b", options_of(corpora)).work(1).score(5.0)
    MadeRun(tmp_path / "c", other).work(1).score(5.0, predicted=90)
    MadeRun(tmp_path / "d", options_of(corpora, train={"seq_length": 32})).work(1).score(5.0)
    MadeRun(tmp_path / "e", options_of(None)).work(1).score(5.0)
    MadeRun(tmp_path / "f", other).work(1)  # has no loss to compare

    def told(*names: str) -> list[str]:
        return report.gather([str(tmp_path / name) for name in names]).warnings

    assert told("a") == told("a", "b") == told("a", "b", "f") == []
    fingerprints = [load_manifest(prefix).fingerprint[:12] for prefix in (corpora.valid, corpora.other)]
    listed = "(a: {}, c: {})".format(*fingerprints)
    predictions, corpus = sorted(told("a", "c"), key=lambda text: listed in text)
    assert "differ in held-out corpus " + listed in corpus and "(a: 100, c: 90)" in predictions
    (length,) = told("a", "d")
    assert "sequence length (a: 24, d: 32)" in length
    assert [text.partition(":")[0] for text in told("a", "e")] == [
        "Not checked that the runs have the same tokenizer",
        "Not checked that the runs have the same held-out corpus",
        "e",  # whose held-out corpus cannot be read
    ]
    document = report.gather([str(tmp_path / "a"), str(tmp_path / "d")])
    assert length in report_pages.html(document) and "> **Warning:** The" in report_pages.markdown(document)


# ---- runs that are not finished ------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.claim()
    folder.write_config(options_of(None))
    made = MadeRun(tmp_path / "begun", options_of(None))
    report.main([str(folder.path), str(made.path), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert {row["step"] for row in cells(page, "Held-out result").values()} == {"none yet"}
    assert {row["unigram loss"] for row in cells(page, "Held-out result").values()} == {"-"}
    assert [row["state"] for row in cells(page, "Account").values()] == ["not begun", "running"]
    made.work(1)
    with (made.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "held_out')  # being written
    (run,) = report.gather([str(made.path)]).runs
    assert (run.totals.steps, run.held_out) == (1, None)


def test_a_loss_that_is_no_number_is_left_out_of_the_figure(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", options_of(None)).work(1).score(5.0).work(1)
    made.monitor.log(0.9, made.ledger.totals(), held_out_loss=math.nan, held_out_accuracy=0.0)
    document = report.gather([str(made.path)])
    row = cells(report_pages.markdown(document), "Held-out result")["run"]
    assert (row["step"], row["loss"], row["accuracy"]) == ("2", "-", "0.0 %")
    assert len(report_pages.picture(document)) > 1000


@pytest.mark.parametrize("name", ["nothing", "file", "empty"])
def test_what_is_no_run_is_named(name: str, pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        report.main([*pair, str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- files ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Attributes that could fetch something, and the text of the tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "srcset", "href", "data")
        ]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data


def test_html_fetches_nothing_and_shows_every_figure(pair: list[str]) -> None:
    document = report.gather(pair)
    text = report_pages.html(document)
    assert text == report_pages.html(document)  # the same figures are the same bytes
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert len(page.addresses) == 2 * (2 * 3 + 1)  # loss and accuracy against three costs; speed; two themes
    for address in page.addresses:
        kind, data = address.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert len(set(page.addresses)) == len(page.addresses)
    shown = [cell for table in report_pages.TABLES for run in document.runs for cell in _row(table, run)]
    assert [cell for cell in page.cells if cell in set(shown)] and not Counter(shown) - Counter(page.cells)


def _row(table: report_pages.Table, run: RunReport) -> list[str]:
    return [run.name, *(column.cell(run) for column in table.columns)]


def test_every_column_says_what_it_means() -> None:
    for table in report_pages.TABLES:
        meant = {column.title for column in table.columns if column.meaning}
        assert meant == {column.title for column in table.columns}
        assert not any(column.meaning.endswith(".") for column in table.columns)


def test_names_are_escaped_and_told_apart(tmp_path: Path) -> None:
    names = ["_<b>|$x$&", "one/same", "two/same"]
    for name in names:
        MadeRun(tmp_path / name, options_of(None)).work(1).score(5.0)
    document = report.gather([*(str(tmp_path / name) for name in names), str(tmp_path / "one/../one/same")])
    assert [run.name for run in document.runs] == [
        names[0],
        str(tmp_path / "one/same"),
        str(tmp_path / "two/same"),
    ]
    page = Page(report_pages.html(document))
    assert names[0] in page.cells and page.tags["b"] == 0
    assert r"| \_\<b\>\|$x$& |" in report_pages.markdown(document)
    assert len(report_pages.picture(document)) > 1000


def test_picture_shows_the_lines(pair: list[str]) -> None:
    image = Image.open(io.BytesIO(report_pages.picture(report.gather(pair))))
    image.load()
    assert image.format == "PNG" and min(image.size) > 500
    pixels = np.asarray(image.convert("RGB")).astype(int)
    body = pixels[len(pixels) // 16 :]  # below the legend
    panels = [half for part in np.array_split(body, 3, axis=1) for half in np.array_split(part, 2)]
    for body in panels:
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            drawn = (np.abs(body - colour).max(axis=2) < 8).sum()
            assert drawn > 100
    assert (pixels == 255).all(axis=2).mean() > 0.8  # quiet


def test_legend_shows_every_name_as_it_is() -> None:
    names = ["_hidden", "$x$", "a" * 100, *(f"run-{i}" for i in range(40))]
    with plots.theme("dark"):
        figure, (axes,) = plots.figure(1)
        plots.draw(axes, [plots.Line(name, [1.0], [2.0]) for name in names], [], "x", "y")
        plots.legend(figure, axes)
        looks = [(to_rgba(line.get_color()), line.get_marker()) for line in axes.get_lines()]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(looks)) == len(set(looks[:35])) == 35
    assert shown == [" _hidden", r"\$x\$", "..." + "a" * 37, *names[3:]]


@pytest.mark.parametrize("drop", [0.0, 3.0, -3.0])
def test_a_plateau_is_flat_and_the_name_of_a_level_inside_its_panel(drop: float) -> None:
    """Early accuracies: all of one value, the unigram's; and lines that leave it downwards or upwards."""
    level, ends = 11.66666, [11.66666, 11.666661, 11.66666 - drop]
    with plots.theme("light"):
        figure, panels = plots.figure(2)
        for axes in panels:
            lines = [plots.Line(name, [1.0, 2.0, 3.0], ends) for name in "ab"]
            plots.draw(axes, lines, [plots.Level("unigram", level)], "x", "y")
        plots.encode(figure, "png")
    for axes in panels:
        assert axes.yaxis.get_offset_text().get_text() == ""
        low, high = axes.get_ylim()
        assert low < min(ends) and max(ends) < high and high - low > 0.1
        (name,) = axes.texts
        box, panel = name.get_window_extent(), axes.get_window_extent()
        assert panel.y0 < box.y0 and box.y1 < panel.y1
        assert (box.y1 < axes.transData.transform((0, level))[1]) == (drop < 0)


def test_a_first_point_far_off_does_not_press_the_others_flat() -> None:
    with plots.theme("light"):
        figure, panels = plots.figure(2)
        for axes in panels:
            plots.draw(axes, [plots.Line("a", [0, 1, 2, 3], [10.4, 5.0, 4.5, 4.25])], [], "x", "y")
        plots.encode(figure, "png")
    for axes in panels:
        low, high = axes.get_ylim()
        assert 4 < low < 4.25 and 5 < high < 5.2
        assert max(axes.get_lines()[0].get_ydata()) == 10.4  # it is drawn all the same


def test_axes_have_fitting_units() -> None:
    flops, _, hours, energy = report_pages.AXES
    assert report_pages._scaled(flops, [[2.5e19], [5e18]]) == (
        "training FLOPs, head included ($10^{19}$)",
        [[pytest.approx(2.5)], [pytest.approx(0.5)]],
    )
    assert report_pages._scaled(flops, [[500.0]])[1] == [[500.0]]
    for spent, unit, value in ((30.0, "hours", 30.0), (0.5, "minutes", 30.0), (0.01, "seconds", 36.0)):
        label, places = report_pages._scaled(hours, [[spent], []])
        assert (label, places) == (f"device-{unit}, everything included", [[pytest.approx(value)], []])
    assert report_pages._scaled(energy, [[0.02]]) == ("Wh, all that was metered", [[20.0]])


def test_energy_downstream_scores_and_mfu_are_shown_where_there_are_some(
    corpora: Corpora, tmp_path: Path
) -> None:
    made = MadeRun(tmp_path / "run", options_of(corpora), peak=1e9)
    made.ledger.meter({"gpu": 0.0})
    made.work(1).score(5.0)
    with made.ledger.time("checkpoint"):
        made.clock.now += 1
    made.ledger.meter({"gpu": 7.2e6})
    made.ledger.peak(3 * 2**29)
    made.work(2).score(4.5)
    lines = [(1, "sst2", 0.7), (3, "sst2", 0.8), (3, "mnli", 0.6), (2, "sst2", 0.9)]
    (tmp_path / "run" / "downstream.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "task": task, "score": score}) + "\n" for step, task, score in lines
        )
    )
    (run,) = (document := report.gather([str(made.path)])).runs
    assert [one.kwh for one in run.evaluations] == [0.0, 2.0]
    assert [(one.step, one.score, one.kwh) for one in run.downstream] == [
        (1, 0.7, 0.0),
        (3, pytest.approx(0.7), 2.0),
    ]  # nothing is known of what step 2 had cost
    page = report_pages.markdown(document)
    account, speed = cells(page, "Account")["run"], cells(page, "Speed")["run"]
    assert cells(page, "Held-out result")["run"]["downstream"] == "70.0 %"
    assert account["energy"] == "2 kWh" and account["left"] == "2 steps"
    # metered from 5 s on, for 2 + 3 + 1 of 5 + 2 + 3 + 1 + 4 + 3 seconds
    assert account["metered"] == f"{100 * 6 / 18:.1f} %"
    assert (speed["step time"], speed["peak memory"]) == ("2 s", "1.50 GiB")
    rate = 8 * 24 / 2
    assert (speed["slots/s"], speed["tokens/s"]) == (f"{rate:.4g}", f"{rate * 22 / 24:.4g}")
    assert speed["MFU"] == f"{100 * made.cost.flops.total / 2 / 2 / 1e9:.1f} %"
    html = Page(report_pages.html(document))
    assert len(html.addresses) == 2 * (3 * 4 + 2)  # loss, accuracy and score against four costs; two speeds
    more = [
        ("probe", 1, 0.5),
        *(("finetune", seed, score) for seed, score in enumerate((0.5, 0.6, 0.7, 0.9, 0.8))),
    ]
    downstream.record(
        tmp_path / "run",
        [
            downstream.DownstreamScore(
                3, "STS-B", metric, score + off, None if name == "probe" else seed, 9, name
            )
            for name, seed, score in more
            for metric, off in (("pearson", -0.1), ("spearman", 0.1))
        ],
    )
    (run,) = (document := report.gather([str(made.path)])).runs
    found = [(one.protocol, one.seeds, one.low, one.score, one.high) for one in run.downstream]
    assert found[2:] == [
        ("finetune", 5, pytest.approx(0.6), pytest.approx(0.7), pytest.approx(0.8)),
        ("probe", 1, pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5)),
    ]
    cell = cells(report_pages.markdown(document), "Held-out result")["run"]["downstream"]
    assert cell == "70.0 %; finetune 70.0 % (60.0 to 80.0); probe 50.0 %"
    html = Page(report_pages.html(document))
    assert len(html.addresses) == 2 * (5 * 4 + 2)  # protocols do not share a panel
    (tmp_path / "run" / "downstream.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="downstream.jsonl:1: expected step, task and score"):
        report.gather([str(made.path)])


def test_a_long_run_is_thinned_for_its_picture(corpora: Corpora, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", options_of(corpora))
    for _ in range(450):
        made.clock.now += 2
        made.ledger.step(made.cost)
        made.monitor.log(0.5, made.ledger.totals(), loss=9.0)
    (run,) = report.gather([str(made.path)]).runs
    assert len(run.speed) == 150 and run.speed[-1].step == 450
    assert {one.step_seconds for one in run.speed} == {2.0}


def test_phases_are_costed_each_by_its_own(corpora: Corpora, tmp_path: Path) -> None:
    config = options_of(
        corpora, "3ml-self", train={"phases": [{"until": 0.5, "seq_length": 12, "batch_size": 4}]}
    )
    made = MadeRun(tmp_path / "run", config)
    first, second = (phase.cost for phase in make_recipe(config).phases)
    for cost, steps in ((first, 3), (second, 2)):
        if cost is second:
            made.ledger.note("phase-change", phase=1)
        for _ in range(steps):
            made.ledger.step(cost)
    made.ledger.note("stop")
    (run,) = report.gather([str(made.path)]).runs
    assert run.costs.flops_with_head == 3 * first.flops.total + 2 * second.flops.total
    plain = [baseline(phase).cost for phase in make_recipe(config).phases]
    reference = 3 * plain[0].flops.total + 2 * plain[1].flops.total
    assert run.relative.flops_with_head == run.costs.flops_with_head / reference
    row = cells(report_pages.markdown(report.gather([str(made.path)])), "Model")["run"]
    assert (row["length"], row["batch"]) == ("12, then 24", "4, then 8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (99_999, "99,999"),
        (123_456, "1.235e5"),
        (4e13, "4.000e13"),
        (9.9999e9, "1.000e10"),
    ],
)
def test_large_numbers(value: float, text: str) -> None:
    assert report_pages._scientific(value) == text


def test_a_budget_names_the_other_run_without_its_path(pair: list[str]) -> None:
    document = report.gather(pair)
    first = document.runs[0]
    budget = replace(first.budget, relative_to=f"0.5 of {'deep/' * 30}<i>query")
    document = replace(document, runs=[replace(first, name="<b>&", budget=budget), *document.runs[1:]])
    page = report_pages.html(document)
    assert "(0.5 of &lt;i&gt;query)</td>" in page and "deep/" not in page
    assert '<td class="long">' in page and "<b>&" not in page


def test_tables_keep_to_a_narrow_terminal(pair: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.report", *pair, "--output", str(tmp_path / "out")]
    screen = on_terminal(words, 80)
    assert screen.code == 0, screen.raw
    assert max(len(line) for line in screen.lines if not line.startswith(str(tmp_path))) <= 80
    titles = " ".join(line for line in screen.lines if line.startswith("run "))
    assert all(column.title in titles for table in report_pages.TABLES for column in table.columns)


def test_a_terminal_shows_every_figure_within_its_width(pair: list[str]) -> None:
    document = report.gather(pair)
    runs = [replace(run, name=f"{'x' * 60}/{run.name}") for run in document.runs]
    document = replace(document, runs=runs)
    report_pages.show(document, stream := io.StringIO())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    rows = [re.split(" {2,}", line) for line in lines if line.endswith("-") or "  " in line]
    heads = [row for row in rows if row[0] == "run"]
    assert len(heads) > len(report_pages.TABLES)  # some are in parts
    assert not any(head[1] == "vs mlm" for head in heads)  # a ratio without its cost
    for run in document.runs:
        name = "..." + run.name[-37:]
        shown = Counter(cell for row in rows if row[0] == name for cell in row[1:])
        wanted = Counter(cell for table in report_pages.TABLES for cell in _row(table, run)[1:])
        assert shown == wanted
    assert lines.index("Account") < lines.index("Four costs")


def test_a_place_for_nothing_is_told_before_a_run_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/proc/q: cannot be written"):
        report.main([str(tmp_path), "--output", "/proc/q"])


def test_program_prints_only_json_and_replaces_whole_files(pair: list[str], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    command = [sys.executable, "-m", "tools.report", *pair, "--output", str(output)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [run["name"] for run in document["runs"]] == ["base", "late"]
    assert document["runs"][1]["held_out"]["loss"] == 4.25
    assert sorted(path.name for path in output.iterdir()) == [
        "loss.png",
        "report.html",
        "report.md",
        "speed.png",
    ]
    first = (output / "report.md").stat().st_ino
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = again.stdout.splitlines()
    names = ("report.md", "report.html", "loss.png", "speed.png")
    assert lines[-4:] == [str(output / name) for name in names]
    assert "4.2500" in again.stdout  # the tables, for a terminal
    assert (output / "report.md").stat().st_ino != first
    bad = subprocess.run([*command[:3], "nowhere", *command[-2:]], cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and "nowhere" in bad.stderr


def test_a_single_point_has_room_for_its_mark() -> None:
    drawn, (axes,) = plots.figure(1)
    plots.draw(axes, [plots.Line("run", [2e13], [0.5], [(0.4, 0.6)])], [], "FLOPs", "score")
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left == 0 and right > 2.05e13
    assert low < 0.4 and high > 0.6
