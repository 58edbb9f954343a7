"""The speedrun: what counts as a record, and that each committed recipe runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import dump_config
from pretrain.errors import UserError
from tests.support.runs import finish
from tools.speedrun import __main__ as speedrun
from tools.speedrun import records
from tools.study.plan import TUNING_SEED, Study, StudyCell, open_study
from tools.study.results import StudyResult, append, read_results

ROOT = Path(__file__).parents[2]
TASKS = sorted((ROOT / "configs" / "speedrun").glob("*.yaml"))


def results(study: Study, scores: dict[str, list[list[float]]]) -> list[StudyResult]:
    """Return results of recipes: bits per byte [seeds, budgets]; the first rate is the best."""
    (size,), found = study.options.sizes, []
    lr = study.options.sizes[size].rates[0]
    cells = [(cell, [[cell.lr]]) for name in scores for cell in study.trials(size, name)]
    for name, seeds in scores.items():
        cells += [(StudyCell(size, name, seed, lr), [each]) for seed, each in enumerate(seeds)]
    for cell, (values,) in cells:
        for target, value in zip(study.targets(cell), values, strict=False):
            about = (target.digest, size, cell.method, cell.seed, cell.lr, target.share, 1, 1)
            cost = (target.share * 1e14, target.share * 9e13, target.share * 1e6, target.share, 1.0)
            told = {"bits per byte": value, "loss": value}
            found.append(StudyResult(*about, *cost, told, "corpus", "commit", "CPU", "bf16", "2"))
    return found


@pytest.fixture
def task(tmp_path: Path) -> Path:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "speedrun" / "sample.yaml").read_text("utf-8"))
    tree["shares"] = [0.2, 0.5, 1.0]
    path = tmp_path / "sample.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def test_a_record_has_all_three_seeds_over_the_line(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_study(task, tmp_path)
    baseline = [[3.0, 2.5, 2.1], [3.0, 2.5, 2.0], [3.0, 2.5, 1.9]]  # the line is 2.0
    some = {
        "mlm-15": baseline,
        "mlm-40-muon": [
            [2.0, 1.9, 1.8],
            [1.9, 1.9, 1.8],
            [2.1, 2.0, 1.8],
        ],  # one seed misses the first budget
        "3ml-query-40-muon": [[1.9, 1.8, 1.7], [1.9, 1.8, 1.7]],  # two seeds
        "one-way-40-muon": [[2.5, 2.2, 2.1], [1.9, 1.8, 1.7], [1.9, 1.8, 1.7]],  # one never gets there
    }
    found = list(records.records(study, results(study, some)))
    assert [(each.recipe, each.share) for each in found] == [("mlm-40-muon", 0.5)]
    rest = {**some, "mlm-40-muon": [seed[:2] for seed in some["mlm-40-muon"]]}  # the last budget is not run
    assert list(records.records(study, results(study, rest))) == found
    assert {model.seed for model in found[0].models} == {0, 1, 2} and TUNING_SEED not in {0, 1, 2}
    assert not list(records.records(study, results(study, {**some, "mlm-15": baseline[:2]})))
    lines = tmp_path / "results" / "sample.jsonl"
    for each in results(study, some):
        append(lines, each)
    words = [str(task), f"--work={tmp_path}", f"--results={tmp_path / 'results'}", "--report"]
    assert speedrun.main(words) == 0
    shown = capsys.readouterr().out
    assert "finish line: `mlm-15`, 2.0000 bits per byte" in shown and "1.9333 (worst 2.0000)" in shown
    assert len(read_results(lines)) == len(results(study, some))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model": {"num_layers": 2}}, "model.num_layers"),
        ({"model": {"local_window": 64}}, "model.local_window"),
        ({"model": {"init_from": "elsewhere"}}, "model.init_from"),
        ({"evaluate": {}}, "evaluate"),
    ],
)
def test_a_recipe_leaves_encoder_and_questions_alone(
    config: dict[str, Any], key: str, task: Path, tmp_path: Path
) -> None:
    tree = yaml.safe_load(task.read_text(encoding="utf-8"))
    tree["methods"]["mlm-40-muon"]["config"] = config
    task.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    with pytest.raises(UserError, match=f"{key} is the task's"):
        records.refuse_other_encoders(open_study(task, tmp_path))


def recipes() -> dict[str, tuple[Path, StudyCell]]:
    """Return each recipe with the last task that has it."""
    found = {}
    for path in TASKS:
        study = open_study(path, Path("runs"))
        ((size, options),) = study.options.sizes.items()
        for name in study.options.methods:
            found[name] = path, StudyCell(size, name, 0, options.rates[0])
    return found


@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())
def test_each_recipe_runs(recipe: tuple[Path, StudyCell], tiny: Path, tmp_path: Path) -> None:
    path, cell = recipe
    study = open_study(path, tmp_path)
    records.refuse_other_encoders(study)
    corpora = [f"corpus.train={tiny / 'train'}", f"corpus.tokenizer={tiny / 'tokenizer'}"]
    small = ["train.batch_size=4", "budget.steps=2", "checkpoint.every_steps=null"]
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_config(study.trunk(cell)), encoding="utf-8")
    finish([str(file), *corpora, *small])
