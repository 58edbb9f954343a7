"""Studies: what is trained and scored, that nothing is done twice, and how results become an interval."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.account import ledger, schedule
from pretrain.errors import UserError
from pretrain.monitor import read_metrics
from tests.support.ranks import PATIENCE
from tests.support.runs import Strike, attempt
from tools import evaluate, sweep
from tools.encode_corpus import __main__ as encode_corpus
from tools.shared import job_options
from tools.study import __main__ as study
from tools.study import analysis, pages, work
from tools.study.analysis import BELOW, NOT_REACHED, Curve
from tools.study.plan import StudyCell, open_study
from tools.study.results import read_results

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tools" / "sample"
TINY: dict[str, Any] = {
    "text": ["train.jsonl"],
    "held_out": ["valid.jsonl"],
    "vocabulary": 400,
    "config": {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_positions": 64},
        "train": {"seq_length": 48, "batch_size": 4, "precision": "fp32"},
        "evaluate": {"seq_length": 32},
        "monitor": {"log_every": 1, "tensorboard": False},
    },
    "sizes": {"nano": {"budget": 1e9, "speed": 1e9, "rates": [3e-3, 1e-5]}},
    "baseline": "mlm-15",
    "methods": {
        "mlm-15": {"seeds": 2},
        "late-50": {
            "seeds": 2,
            "mask_from": 1,
            "against": "mlm-15",
            "config": {"masking": {"rate": 0.5}, "model": {"decoder_layers": 1}},
        },
    },
    "shares": [0.5, 1.0],
    "evaluate": {
        "samples": 20,
        "pairs": [str(SAMPLE / "pairs.jsonl")],
        "tasks": str(SAMPLE / "labels"),
        "probe": ["kinds"],
        "probe_rows": 40,
        "rank_tokens": 200,
    },
}


def written(folder: Path, tiny: Path, **more: Any) -> Path:
    """Write the file of a study."""
    path = folder / "nano.yaml"
    tree = {**TINY, "tokenizer": str(tiny / "tokenizer"), **more}
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def words(file: Path, tiny: Path, folder: Path) -> list[str]:
    return [str(file), f"--data={tiny}", f"--work={folder / 'place'}", f"--results={folder / 'results'}"]


class Inline:
    """A cell that is done in this process: a new one would import torch again, once for each cell."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were started: they are forked, and all other programs are called."""
    runs: list[str] = []

    def start(command: list[str], strike: Strike | None = None) -> int:
        if command[2] == "tools.encode_corpus":
            return encode_corpus.main([*command[3:], "--workers=1"])
        runs.append(str(Path(command[3]).with_suffix("").relative_to(Path(command[3]).parents[1])))
        return attempt(command[3:], strike=strike).codes[0]

    def inline(plan: Any, cell: StudyCell, args: Any) -> Inline:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            return Inline(study.main(study.cell_words(plan, cell, args)[1:]))
        except SystemExit as end:
            return Inline(int(end.code or 0))
        except UserError:
            return Inline(2)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(study, "start", inline)
    return runs


def test_a_study_from_text_to_its_page(
    tiny: Path,
    tmp_path: Path,
    started: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = written(tmp_path, tiny)
    line, lines = words(file, tiny, tmp_path), tmp_path / "results" / "nano.jsonl"
    assert study.main([*line, "--plan"]) == 0
    assert "8" in capsys.readouterr().out and not lines.exists()

    # The second decay of the first trunk is interrupted by a signal, and that of the last one killed.
    gentle = sweep.start

    def struck(command: list[str]) -> int:
        hits = {"nano.mlm-15.seed-0/decay-1": signal.SIGTERM, "nano.late-50.seed-1/decay-1": signal.SIGKILL}
        place = "/".join(Path(command[-1]).with_suffix("").parts[-2:])
        hit = hits.get(place) if started.count(place) == 0 else None
        return gentle(command, Strike(hit, 2) if hit else None)  # type: ignore[call-arg]

    monkeypatch.setattr(sweep, "start", struck)
    assert [study.main(line), study.main(line)] == [75, 0]
    results = read_results(lines)
    assert len(results) == 2 * (2 + 2 * 2) and len({each.digest for each in results}) == 12
    # Nothing was done twice but what was interrupted.
    again = {name for name in started if started.count(name) > 1}
    assert again == {"nano.mlm-15.seed-0/decay-1", "nano.late-50.seed-1/decay-1"}
    assert started.index("nano.late-50.rate-0.003/trial") < started.index("nano.mlm-15.seed-1/trunk")

    by_name = {(each.method, each.seed, each.share): each for each in results}
    last = by_name["late-50", 1, 1.0]
    assert last.lr == 3e-3 and 0.9e9 < last.flops <= 1e9 and last.device_hours > 0
    assert {"loss", "bits per byte", "pairs", "probe kinds, accuracy", "rank entropy"} <= last.scores.keys()
    assert "probe kinds, accuracy" not in by_name["late-50", 1, 0.5].scores
    plan = open_study(file, tmp_path / "place")
    kept = plan.folder(StudyCell("nano", "late-50", 1, 3e-3))
    assert sorted(path.name for path in kept.iterdir()) == ["decay-1", "decay-1.yaml"]
    assert ledger.total([kept / "decay-1"]).steps == last.step
    held_out = f"--corpus={tmp_path / 'place' / 'valid'}"
    assert evaluate.main([str(kept / "decay-1"), held_out, "--samples=20", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["loss"]
    assert loss == pytest.approx(last.scores["loss"], abs=1e-6)

    # On another machine, with the lines alone, nothing is left to do.
    before = len(started)
    elsewhere = tmp_path / "elsewhere"
    assert study.main([*line[:2], f"--work={elsewhere}", line[3]]) == 0 and len(started) == before
    page = (tmp_path / "results" / "RESULTS-nano.md").read_text(encoding="utf-8")
    assert "8 of 8 cells are done, 0 are missing" in page and page.count("| `late-50` | 2 |") == 3
    assert (tmp_path / "results" / "nano-nano.png").exists()
    # A method that the file has no more is spent all the same, and in nobody's way.
    written(tmp_path, tiny, methods={"mlm-15": TINY["methods"]["mlm-15"]})
    assert study.main([*line, "--plan"]) == 0 and "all cells are done" in capsys.readouterr().out
    written(tmp_path, tiny)
    # A line that a kill has torn is done again; a corpus of other text is refused.
    text = lines.read_text(encoding="utf-8")
    lines.write_text(text[:-20], encoding="utf-8")
    assert len(plan.todo(read_results(lines))) == 1
    lines.write_text(text.replace(last.corpus, "0" * 16), encoding="utf-8")
    with pytest.raises(UserError, match="has results on corpus 0000"):
        study.main(line)


def test_a_run_of_another_budget_is_not_taken_for_done(
    tiny: Path, tmp_path: Path, started: list[str]
) -> None:
    """A study's file may change while runs of it are there."""
    cell = StudyCell("nano", "mlm-15", 1000, 3e-3)
    for budget in (1e9, 1e9, 2e9):
        sizes = {"nano": {**TINY["sizes"]["nano"], "budget": budget}}
        plan = open_study(written(tmp_path, tiny, sizes=sizes), tmp_path / "place")
        work.prepare(plan, tiny)
        run = work._train(plan.trial(cell))
        assert ledger.total([run]).flops["total"] == pytest.approx(0.3 * budget, rel=0.2)
    assert len(started) == 2


@pytest.mark.parametrize(
    ("end", "raised"),
    [
        *((f"os.kill(os.getpid(), {number})", SystemExit(75)) for number in (15, 10)),
        ("import signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", SystemExit(75)),
        ("os.kill(os.getpid(), 9)", UserError("ended by SIGKILL")),
        ("raise UserError('told')", UserError("exit code 2")),
    ],
)
def test_a_program_that_is_stopped_stops_the_study(
    end: str, raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["import os", "from pretrain.errors import UserError", "from tools.shared import console"]
    lines += [f"def main():\n    {end}", "console.run(main)"]
    (tmp_path / "ended.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    with pytest.raises(type(raised), match=str(raised)):
        work._run(["ended"])


def test_a_fine_tuning_that_fails_is_a_line(tiny: Path, tmp_path: Path) -> None:
    asked = {"finetune": ["kinds"], "tasks": str(SAMPLE / "labels")}
    plan = open_study(written(tmp_path, tiny, evaluate=asked), tmp_path)
    with pytest.raises(UserError, match="tools.finetune encoder=.*: ended with exit code 2; see above"):
        work._fine_tuned(plan, tmp_path / "nowhere", SAMPLE / "labels")


def test_a_decay_is_the_end_of_a_trapezoid(tiny: Path, tmp_path: Path) -> None:
    """Trunk and decays of a study have the rates of one run that is constant until its last fifth."""
    plan = open_study(written(tmp_path, tiny), tmp_path)
    cell = StudyCell("nano", "mlm-15", 0, 3e-3)
    trunk, (half, whole) = plan.trunk(cell), plan.targets(cell)
    assert plan.branch_step(cell, 0.5) * 2 == plan.branch_step(cell, 1.0) == trunk.budget.steps
    assert schedule.rate(trunk, 0.06 / 0.8) == schedule.rate(trunk, 1.0) == 3e-3
    assert schedule.rate(trunk, 0.03 / 0.8) == pytest.approx(1.5e-3)
    for target, budget in ((half, 0.5e9), (whole, 1e9)):
        decay = plan.decay(target)
        assert decay.budget.flops == budget and decay.run.branch
        assert decay.run.branch.step == plan.branch_step(cell, target.share)
    late = plan.trunk(StudyCell("nano", "late-50", 0, 3e-3))
    assert late.model.mask_from == 2 and late.run.seed == trunk.run.seed
    assert plan.flops(cell) == pytest.approx(1e9 * (0.8 + 0.2 * 1.5))


def test_a_single_rate_is_taken_untried(tiny: Path, tmp_path: Path) -> None:
    sizes = {"nano": {"budget": 1e9, "speed": 1e9, "rates": [1e-3]}}
    study_ = open_study(written(tmp_path, tiny, sizes=sizes), None)
    assert [(cell.tries, cell.lr) for cell in study_.ready([])] == [(False, 1e-3)] * 4
    assert study_.chosen("nano", "mlm-15", []) == 1e-3
    assert "at a learning rate of 0.001" in "".join(pages._sections(pages.Found(study_, []), "nano"))


def test_a_method_may_try_other_rates(tiny: Path, tmp_path: Path) -> None:
    """As many as all others do."""
    methods = {**TINY["methods"], "late-50": {**TINY["methods"]["late-50"], "rates": [1e-2, 4e-3]}}
    study_ = open_study(written(tmp_path, tiny, methods=methods), None)
    rates = {name: [cell.lr for cell in study_.trials("nano", name)] for name in methods}
    assert rates == {"mlm-15": [3e-3, 1e-5], "late-50": [1e-2, 4e-3]}
    methods["late-50"]["rates"] = [1e-2]
    with pytest.raises(UserError, match="methods.late-50.rates: 1 of them; all methods try as many, 2"):
        open_study(written(tmp_path, tiny, methods=methods), None)


def test_a_real_study_stops_when_told(tiny: Path, tmp_path: Path) -> None:
    sizes = {"nano": {"budget": 1e14, "speed": 1e9, "rates": [1e-3, 2e-3]}}
    line = words(written(tmp_path, tiny, sizes=sizes), tiny, tmp_path)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen([sys.executable, "-m", "tools.study", *line], env=environ)
    log = tmp_path / "place" / "logs" / "nano.mlm-15.rate-0.001.log"
    run = tmp_path / "place" / "runs" / "nano.mlm-15.rate-0.001" / "trial"
    wait_for(lambda: (run / "metrics.jsonl").exists() and read_metrics(run) != [], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    assert json.loads((run / "status.json").read_text(encoding="utf-8"))["exit_code"] == 75
    assert "the same command goes on with it" in log.read_text(encoding="utf-8")


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    import time

    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_of_a_cluster(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All that can be done is one array; each line does a cell, from any folder."""
    dry = [*words(written(tmp_path, tiny), tiny, tmp_path), "--dry-run"]
    with pytest.raises(UserError, match="goes with --slurm"):
        study.main(dry)
    site = ROOT / "slurm" / "cluster.env.example"
    assert study.main([*dry, "--slurm", f"--cluster={site}"]) == 0
    assert "#SBATCH --array=0-3\n" in capfd.readouterr().out and not (tmp_path / "place").exists()
    seen: list[str] = []

    def run(command: Sequence[str], check: bool) -> Any:
        seen.extend(Path(command[command.index("--array") + 1]).read_text(encoding="utf-8").splitlines())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(job_options.subprocess, "run", run)
    assert study.main([*words(written(tmp_path, tiny), tiny, tmp_path), "--slurm"]) == 0
    names = [line.rpartition("--cell=")[2] for line in seen]
    assert names == [
        f"nano.{method}.rate-{lr}" for method in ("mlm-15", "late-50") for lr in ("0.003", "1e-05")
    ]
    assert all(line.startswith('"$PYTHON" -m tools.study /') for line in seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "mlm"}, "baseline = 'mlm': no such method"),
        ({"shares": [1.0, 0.5]}, "should ascend"),
        ({"config": {"optimizer": {"lr": 1e-3}}}, "config: optimizer.lr is the study's to set"),
        (
            {"sizes": {"nano": {**TINY["sizes"]["nano"], "methods": ["x"]}}},
            "sizes.nano.methods = 'x': no such method",
        ),
        ({"methods": {"mlm-15": {"seed": 3}}}, "methods.mlm-15.seed: Extra inputs"),
        ({"config": {"model": 5}}, "config.model: Input should be a valid dict"),
        ({"text": []}, "text: List should have at least 1 item"),
        ({"sizes": {}}, "sizes: Dictionary should have at least 1 item"),
        ({"methods": {"mlm-15": {"config": {"masking": {"rates": 0.4}}}}}, "unknown key masking.rates"),
        ({"sizes": {"nano": {"budget": 5e7, "speed": 1.0, "rates": [1.0]}}}, "too few for decays"),
        (
            {"methods": {"mlm-15": {"config": {"masking": {"rate": {"from": 0.4, "to": 0.2, "steps": 2}}}}}},
            "cannot change in a study's trunk",
        ),
    ],
)
def test_what_is_wrong_in_a_study(change: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_study(written(tmp_path, tiny, **change), tmp_path)


# ---- from results to an interval -----------------------------------------------------------------


@pytest.mark.parametrize("key", ["pairs", "last_pairs", "probe", "finetune"])
def test_what_is_asked_at_the_end_must_be_there_at_the_beginning(
    key: str, tiny: Path, tmp_path: Path, started: list[str]
) -> None:
    asked = {**TINY["evaluate"], key: ["elsewhere"]}
    with pytest.raises(UserError, match="elsewhere: missing, and named in .*nano.yaml: evaluate"):
        study.main(words(written(tmp_path, tiny, evaluate=asked), tiny, tmp_path))
    assert not started and not (tmp_path / "place").exists()


def test_where_a_curve_reaches_a_goal() -> None:
    costs = [1.0, 4.0, 16.0]
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 2.0) == pytest.approx(4.0)
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 1.5) == pytest.approx(
        8.0
    )  # half of the way in logarithms
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 1.0) == pytest.approx(16.0)
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 3.0) == 1.0
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 3.1) == BELOW
    assert analysis.reached(costs, [3.0, 2.0, 1.0], 0.9) == NOT_REACHED
    assert analysis.reached(costs, [3.0, 1.0, 2.0], 2.0) == pytest.approx(2.0)  # the first time counts
    assert analysis.reached(costs, [3.0, 3.0, 3.0], 2.0) == NOT_REACHED


def curve(scores: list[list[float]], seeds: Sequence[int]) -> Curve:
    return Curve(tuple(seeds), np.array([[1.0, 2.0]] * len(seeds)), np.array(scores))


def test_the_interval_is_that_of_all_resamples_by_hand() -> None:
    baseline = curve([[6.0, 5.0], [7.0, 6.0], [6.5, 5.3]], (0, 1, 2))
    method = curve([[5.5, 4.5], [6.8, 5.9], [6.0, 5.0]], (0, 1, 2))
    found = analysis.estimate(analysis.gain, method, baseline)
    gains = [0.5, 0.1, 0.3]
    drawn = sorted(sum(each) / 3 for each in itertools.product(gains, repeat=3))
    assert found and found.value == pytest.approx(0.3) and found.seeds == 3
    assert found.interval == pytest.approx(
        (drawn[math.ceil(0.025 * 27) - 1], drawn[math.ceil(0.975 * 27) - 1])
    )
    # Paired: what moves both moves nothing.
    moved = [
        Curve(each.seeds, each.costs, each.scores + np.array([[0], [9], [-3]])) for each in (method, baseline)
    ]
    assert analysis.estimate(analysis.gain, *moved).interval == pytest.approx(found.interval)  # type: ignore[union-attr]
    itself = analysis.estimate(analysis.share, baseline, baseline)
    assert itself and itself.value == 1 and itself.interval == (1, 1)
    share = analysis.estimate(analysis.share, method, baseline)
    goal = (5.0 + 6.0 + 5.3) / 3
    low, high = (5.5 + 6.8 + 6.0) / 3, (4.5 + 5.9 + 5.0) / 3
    assert share and share.value == pytest.approx(2 ** ((low - goal) / (low - high)) / 2)


def test_seeds_that_only_one_has_are_left_out() -> None:
    baseline, method = curve([[6.0, 5.0]], (1,)), curve([[5.0, 4.0], [6.0, 5.5]], (0, 1))
    found = analysis.estimate(analysis.share, method, baseline)
    assert found and found.value == NOT_REACHED and found.interval is None and found.seeds == 1
    assert analysis.estimate(analysis.share, curve([[5.0, 4.0]], (0,)), baseline) is None
    below = curve([[4.0, 3.0], [4.0, 3.0]], (0, 1))
    both = analysis.estimate(analysis.share, below, curve([[6.0, 5.0], [3.5, 2.9]], (0, 1)))
    assert both and both.value == pytest.approx(2**0.05 / 2) and both.interval == (BELOW, NOT_REACHED)
    assert len(analysis.resamples(range(5))) == 5**5
    assert len(analysis.resamples(range(6))) == analysis.RESAMPLES


def test_a_size_may_compare_some_methods(tiny: Path, tmp_path: Path) -> None:
    nano = TINY["sizes"]["nano"]
    sizes = {"nano": nano, "long": {**nano, "budget": 4e9, "methods": ["late-50"]}}
    plan = open_study(written(tmp_path, tiny, sizes=sizes), tmp_path / "place")
    seen = {(cell.size, cell.method) for cell in plan.cells([])}
    assert seen == {("nano", "mlm-15"), ("nano", "late-50"), ("long", "late-50")}


def test_the_weights_that_runs_begin_with_are_of_its_fingerprint(tiny: Path, tmp_path: Path) -> None:
    """Results from other weights are another study's, whatever the folder is called."""
    start = tmp_path / "start"
    start.mkdir()
    begun = {**TINY["config"], "model": {**TINY["config"]["model"], "init_from": str(start)}}

    def fingerprint(**more: Any) -> str:
        plan = open_study(written(tmp_path, tiny, **more), tmp_path / "place")
        work.prepare(plan, tiny)
        return plan.fingerprint

    with pytest.raises(UserError, match=r"start: no \*\.safetensors there"):
        fingerprint(config=begun)
    seen = {fingerprint()}
    for content in (b"a", b"b"):
        (start / "model.safetensors").write_bytes(content)
        seen.add(fingerprint(config=begun))
    assert len(seen) == 3


# ---- what is committed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_committed_study_can_go_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configs are built, its lines are of its cells, and its page says what they say."""
    monkeypatch.chdir(ROOT)
    plan = open_study(file.relative_to(ROOT), None)
    lines = ROOT / "tools" / "study" / "results" / f"{file.stem}.jsonl"
    results = read_results(lines)
    cells = [cell for cell in plan.cells(results)]
    digests = {target.digest for cell in cells for target in plan.targets(cell)}
    assert {result.digest for result in results} <= digests
    page = lines.with_name(f"RESULTS-{file.stem}.md")
    if results or page.exists():
        assert page.read_text(encoding="utf-8") == pages.page(plan, results, f"{file.stem}-{{}}.png")


def test_lines_are_whole_and_the_last_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"digest": "torn\n', encoding="utf-8")
    assert read_results(file) == []
    file.write_text("hello\n", encoding="utf-8")
    with pytest.raises(UserError, match="x.jsonl:1: no result"):
        read_results(file)
