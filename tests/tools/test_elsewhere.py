"""Programs that read a run, started in another folder than its training was, whose names are relative."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from tests.support.runs import ENVIRON
from tools import evaluate, fill_mask
from tools.analyze import __main__ as analyze
from tools.export import __main__ as export
from tools.inspect_corpus import __main__ as inspect_corpus
from tools.report import __main__ as report

ROOT = Path(__file__).parents[2]
Main = Callable[[Sequence[str]], int | None]


@pytest.fixture(scope="module")
def project(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora in data/ and a run in runs/."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    for file in (*tiny.glob("train.*"), *tiny.glob("valid.*")):
        shutil.copy(file, folder / "data" / file.name)
    shutil.copytree(tiny / "tokenizer", folder / "data" / "tokenizer")
    names = ["train=data/train", "valid=data/valid", "tokenizer=data/tokenizer"]
    words = [
        str(tiny / "tiny.yaml"),
        "run.dir=runs/a",
        "budget.steps=3",
        *(f"corpus.{name}" for name in names),
    ]
    environment = {**os.environ, **ENVIRON, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "pretrain", *words], cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture(params=[True, False], ids=["with its tokenizer", "without its tokenizer"])
def run(request: pytest.FixtureRequest, project: Path) -> str:
    """The run; before 0.2.0 none kept the vocabulary."""
    copy = project / "runs" / f"copy-{request.param}"
    shutil.copytree(project / "runs" / "a", copy, dirs_exist_ok=True)
    if not request.param:
        shutil.rmtree(copy / "tokenizer")
    return str(copy)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The JSON document of a program, started in a folder of its own."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def said(main: Main, *words: str) -> Any:
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return said


def test_evaluate(run: str, project: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = said(evaluate.main, run)
    assert elsewhere["corpus"] == str(project / "data" / "valid")
    monkeypatch.chdir(project)
    there = said(evaluate.main, run)
    assert there["corpus"] == "data/valid" and there["loss"] == elsewhere["loss"]


@pytest.mark.parametrize("what", ["rank", "variance"])
def test_analyze(what: str, run: str, project: Path, said: Any) -> None:
    rows = said(analyze.main, what, run, "--texts", "4", "--output", "out")
    assert {row["corpus"] for row in rows} == {str(project / "data" / "valid")}


def test_fill_mask(run: str, said: Any) -> None:
    assert said(fill_mask.main, run, "The <mask> of the year.")


def test_report(run: str, said: Any) -> None:
    document = said(report.main, run, "--output", "out")
    assert document["runs"][0]["unigram"] and not document["warnings"]


def test_export(run: str, project: Path, said: Any) -> None:
    said(export.main, run, "--output", "out")
    documents = load_manifest(project / "data" / "train").documents
    assert f"{documents:,} documents" in Path("out/README.md").read_text(encoding="utf-8")


def test_what_is_gone_is_said_with_where_it_was_looked_for(
    project: Path, said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "runs" / "a", "run")
    attempts = json.loads(Path("run/provenance.json").read_text(encoding="utf-8"))
    del attempts[-1]["folder"]  # as of an older program
    Path("run/provenance.json").write_text(json.dumps(attempts), encoding="utf-8")
    here = f"seen from {Path.cwd()}"
    for main, *words in ((evaluate.main, "run"), (analyze.main, "rank", "run")):
        with pytest.raises(
            UserError, match=f"^data/valid: no corpus there, {here}; start this in the folder"
        ):
            main(words)
    with pytest.raises(UserError, match=f"^data/valid.idx: no such file, {here}; give the prefix"):
        inspect_corpus.main(["data/valid"])
    (warning,) = said(report.main, "run", "--output", "out")["warnings"]
    assert f"its held-out corpus cannot be read at data/valid, {here}" in warning
    export.main(["run", "--output", "model"])
    assert f"warning: data/train: no corpus there, {here}; the model card" in capsys.readouterr().err
    shutil.copytree(project / "data", "data")
    manifest = json.loads(Path("data/valid.json").read_text(encoding="utf-8"))
    gone = manifest["tokenizer"]["path"]
    shutil.move(gone, tmp_path / "moved")
    inspect_corpus.main(["data/valid"])
    shutil.move(tmp_path / "moved", gone)
    assert f"no text is shown: its tokenizer is not at {gone}" in capsys.readouterr().err
    shutil.rmtree("data")
    shutil.rmtree("run/tokenizer")
    with pytest.raises(UserError, match=f"^data/tokenizer: no tokenizer.model .*, {here}; "):
        fill_mask.main(["run", "<mask>"])
