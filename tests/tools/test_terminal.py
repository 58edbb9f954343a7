"""What the programs leave on a terminal of a fixed width: whole words, whole columns, no dead bars."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from pretrain import terminal
from tests.support.runs import finish
from tests.support.terminal import ROOT, on_terminal
from tools.benchmark.__main__ import SUBJECTS
from tools.shared.tables import aligned

ROWS = [
    ["run", "stage", "cost", "vs mlm", "a wide title"],
    ["runs/a", "train", "1.234e12", "0.699 x", "1"],
    ["runs/" + "b" * 60, "corpus", "-", "1.000 x", "2"],
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_stacks_whole_columns(width: int) -> None:
    text = aligned(ROWS, bound=(3,), width=width)
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert max(map(len, text.splitlines())) <= width
    assert all(part[0].startswith("run ") and len(part) == 3 for part in parts)
    assert all("vs mlm" in part[0] for part in parts if " cost" in part[0])
    for column in list(zip(*ROWS, strict=True))[1:]:
        (part,) = [part for part in parts if f" {column[0]}" in part[0]]
        assert all(word in line for word, line in zip(column, part, strict=True))


def test_a_pipe_gets_a_table_in_one_piece() -> None:
    assert [len(line.split()) for line in aligned(ROWS[1:]).splitlines()] == [6, 6]
    assert "runs/" + "b" * 60 in aligned(ROWS)
    assert terminal.wrapped("word " * 60) == "word " * 60


@pytest.mark.parametrize("width", [60, 80])
def test_the_plan_keeps_to_the_terminal(width: int) -> None:
    configs = [str(ROOT / "configs" / name) for name in ("3ml-query-base.yaml", "mlm-large.yaml")]
    words = [sys.executable, "-m", "tools.plan", *configs, "--device", "H100", "--gpus", "8", "--scaling"]
    screen = on_terminal(words, width)
    assert screen.code == 0 and max(map(len, screen.lines)) <= width
    titles = " ".join(line for line in screen.lines if line.startswith(("config", "devices")))
    assert {"GFLOPs", "layout", "activ", "total", "MFU", "efficiency"} <= set(titles.split())


PROGRAMS = [
    "pretrain",
    "slurm.submit",
    *(f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("[a-z]*.py"))),
    *(f"tools.{path.parent.name}" for path in sorted((ROOT / "tools").glob("*/__main__.py"))),
    *(f"tools.benchmark {subject}" for subject in SUBJECTS),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_keeps_to_a_terminal_of_80_columns(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of choices runs over the edge, for one."""
    monkeypatch.setenv("COLUMNS", "80")
    module, *words = program.split()
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    package = (ROOT / module.replace(".", "/")).is_dir() and not module.startswith("slurm")
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(module + ".__main__" * package).main()
    said = capsys.readouterr().out
    assert f"python -m {module}" in said and max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 120])
def test_ledger_evaluate_and_sweep_keep_to_the_terminal(width: int, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "a-run"
    finish([str(tiny / "tiny.yaml"), f"run.dir={run}", "budget.steps=3"])
    sweep = [
        "tools.sweep",
        str(tiny / "tiny.yaml"),
        "--over",
        "model.mask_from=0,1,7",
        "masking.rate=0.15,0.5",
    ]
    for words in (
        ["tools.ledger", "show", str(run)],
        ["tools.ledger", "check", str(run)],
        ["tools.ledger", "energy", str(run), "--carbon", "354", "Ember, 2023"],
        ["tools.evaluate", str(run)],
        [*sweep, "--dry-run"],
    ):
        screen = on_terminal([sys.executable, "-m", *words], width, {"OMP_NUM_THREADS": "1"})
        assert screen.code == 0, screen.raw
        long = [line for line in screen.lines if len(line) > width]
        assert not [line for line in long if " " in line.strip()], long  # a path alone cannot be broken
    table = [line for line in screen.lines if line.startswith("variant")]
    assert [line.split() for line in table] == [["variant", "method", "state"]]


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_goes_when_its_work_is_done(width: int, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"the cat number {n} sat on a mat, and so on"}) for n in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    text = ["--input", str(tmp_path / "text.jsonl")]
    made = ["--output", str(tmp_path / "tokenizer")]
    train = [sys.executable, "-m", "tools.train_tokenizer", *text, *made, "--vocab-size", "300"]
    encode = [sys.executable, "-m", "tools.encode_corpus", *text, "--output", str(tmp_path / "corpus")]
    for words in (train, [*encode, "--tokenizer", str(tmp_path / "tokenizer")]):
        screen = on_terminal(words, width)
        assert screen.code == 0, screen.raw
        assert "━" in screen.raw and not any("━" in line for line in screen.lines)
