"""What programs write takes nobody else's place: for every program that is told where to write."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from slurm import submit
from slurm.freeze import refuse_foreign
from tests.support.runs import finish
from tools.shared import outputs

ROOT = Path(__file__).parents[2]
MINE = "years of work"
Start = Callable[["Program", Path], int | None]


class Program(NamedTuple):
    """A command that writes into the folder `{out}`, and the files that it writes."""

    module: str
    words: str
    files: str
    quick: bool = True
    """Whether a test can wait for its work."""


PROGRAMS = [
    Program("tools.report", "{run} --output {out}", "report.md report.html loss.png speed.png"),
    Program("tools.analyze", "rank {run} --output {out}", "rank.csv rank.json rank.png"),
    Program(
        "tools.analyze",
        "variance {run} --texts 4 --output {out}",
        "variance.csv variance.json variance.png",
    ),
    Program("tools.inspect_corpus", "{tiny}/valid --html {out}/page.html", "page.html"),
    Program("tools.plan", "{root}/configs/mlm-base.yaml --device H100 --plot {out}/plan", "plan"),
    Program("tools.ledger", "energy {run} --csv {out}/emissions.csv", "emissions.csv"),
    Program(
        "tools.sweep",
        "{tiny}/tiny.yaml budget.steps=1 evaluate.samples=8 --over masking.rate=0.3 --output {out}",
        "rate-0.3.yaml sweep.csv sweep.json",
    ),
    Program(
        "tools.benchmark",
        "corpus --only vocabulary --runs 1 --max-megabytes 0.01 --output {out}/speed",
        "speed.json speed.png",
        quick=False,
    ),
    Program("tools.calibrate", "--output {out}/plan.json", "plan.json", quick=False),
    Program(
        "tools.train_tokenizer",
        "--input {text} --vocab-size 300 --overwrite --output {out}",
        "tokenizer.model provenance.json",
    ),
    Program(
        "tools.encode_corpus",
        "--input {text} --tokenizer {tiny}/tokenizer --overwrite --output {out}/a",
        "a.json a.idx a.bin",
    ),
    Program(
        "tools.merge_corpus", "{tiny}/train {tiny}/valid --overwrite --output {out}/a", "a.json a.idx a.bin"
    ),
    Program(
        "tools.minimal_pairs",
        "{run} --data {pairs} --output {out}",
        "minimal_pairs.csv minimal_pairs.json pairs.jsonl",
    ),
    Program(
        "tools.probe", "{run} --data {tasks} --output {out}", "probe.csv probe.json probe.png", quick=False
    ),
    Program("tools.finetune", "{run} --data {tasks} --tasks Mine --output {out}", "table.md", quick=False),
    Program("tools.export", "{run} --overwrite --output {out}/model", "model"),
]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish([str(tiny / "tiny.yaml"), f"run.dir={folder}", "budget.steps=3"])
    return folder


@pytest.fixture
def start(run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    text, pairs = tmp_path / "text.txt", tmp_path / "data.jsonl"
    pair = {"sentence_good": "It rains.", "sentence_bad": "It rain.", "UID": "number", "field": "syntax"}
    pairs.write_text(json.dumps(pair) + "\n")
    text.write_text("\n\n".join(f"Document {n} of a small corpus, of {n + 1} words." for n in range(200)))

    tasks = tmp_path / "tasks"
    (tasks / "Mine").mkdir(parents=True)
    (tasks / "Mine" / "task.yaml").write_text("texts: [text]\nlabel: good\n")
    for part in ("train", "dev"):
        rows = [json.dumps({"text": f"Sentence {n}.", "good": n % 2 == 0}) for n in range(8)]
        (tasks / "Mine" / f"{part}.jsonl").write_text("\n".join(rows) + "\n")

    def start(program: Program, out: Path) -> int | None:
        places = {
            "run": run,
            "tiny": tiny,
            "out": out,
            "text": text,
            "pairs": pairs,
            "root": ROOT,
            "tasks": tasks,
        }
        words = program.words.format(**places).split()
        monkeypatch.setattr(sys, "argv", [program.module, *words])
        package = (ROOT / program.module.replace(".", "/")).is_dir()
        found: int | None = importlib.import_module(program.module + ".__main__" * package).main()
        return found

    return start


def listed(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CASES = [(program, name) for program in PROGRAMS for name in program.files.split()]


@pytest.mark.parametrize(("program", "name"), CASES, ids=[f"{one.module}-{name}" for one, name in CASES])
def test_a_file_of_another_is_refused_by_name(
    program: Program, name: str, start: Start, tmp_path: Path
) -> None:
    """Before the work, and nothing else is written."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(MINE)
    with pytest.raises(UserError) as refused:
        start(program, out)
    assert str(refused.value).startswith(f"{out / name}: ") and "\n" not in str(refused.value)
    assert listed(out) == {str(out / name): MINE.encode()}


QUICK = [program for program in PROGRAMS if program.quick]


@pytest.mark.parametrize("program", QUICK, ids=[program.module for program in QUICK])
def test_its_own_files_are_replaced_in_a_folder_that_is_a_link(
    program: Program, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "real")
    for _ in range(2):
        assert not start(program, out)
        assert all((tmp_path / "real" / name).exists() for name in program.files.split())
    assert out.is_symlink()


def test_a_link_to_a_file_of_ours_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.md").symlink_to(tmp_path / "real.md")
    for text in ("a", "b"):
        outputs.write(tmp_path / "link.md", f"{outputs.MARKDOWN_MARK}\n{text}")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "real.md").read_text().endswith("b")


@pytest.mark.parametrize("way", ["name", "symbolic link", "hard link"])
def test_no_output_is_an_input(way: str, start: Start, tiny: Path, tmp_path: Path) -> None:
    """A config that a sweep wrote has the mark, and is not to be replaced all the same."""
    config, out = tmp_path / "out" / "rate-0.3.yaml", tmp_path / "out"
    out.mkdir()
    config.write_text(f"{outputs.YAML_MARK}\n{(tiny / 'tiny.yaml').read_text()}")
    before, given = config.read_bytes(), config
    if way != "name":
        given = tmp_path / "given.yaml"
        (given.symlink_to if way == "symbolic link" else given.hardlink_to)(config)
    for program in (
        Program("tools.sweep", f"{given} --over masking.rate=0.3 --output {{out}}", ""),
        Program("tools.plan", f"{given} --device H100 --plot {config}", ""),
    ):
        with pytest.raises(UserError, match=f"^{config}: is also an input; choose another --output$"):
            start(program, out)
        assert listed(out) == {str(config): before}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "# LateMask\n\nFrom raw text"),
        ("page.html", '<html><head><meta name="generator" content="pandoc"></head>LateMask'),
        ("table.csv", "name,ours\n1,2\n"),
        ("list.json", "[]"),
        ("broken.json", "{"),
        ("bytes", "\udcff"),
        ("empty", ""),
    ],
)
def test_what_is_not_demonstrably_ours_stays(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="exists and is not of this program"):
        outputs.write(path, "new", {"name": "", "ours": "", "peer": ""})
    assert path.read_text(encoding="utf-8", errors="surrogateescape") == content


def test_of_many_lines_the_first_tell_whose_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_LINES_BYTES", 100)
    monkeypatch.setattr(outputs, "_LARGEST", 1000)
    path = tmp_path / "lines.jsonl"
    path.write_text('{"ours": 1, "peer": 2}\n' * 99, encoding="utf-8")
    outputs.write(path, path.read_text(encoding="utf-8"), {"ours": "", "peer": ""})
    path.write_text('{"ours": 1}\n' * 99, encoding="utf-8")
    with pytest.raises(UserError, match="exists and is not of this program"):
        outputs.write(path, "new", {"ours": "", "peer": ""})


def test_the_table_of_codecarbon_stays(tmp_path: Path) -> None:
    """It has the same columns; a row of another project is another's."""
    from tools.ledger.emissions import COLUMNS, FIELDS

    rows = [f"2026,{name},7{',' * (len(COLUMNS) - 3)}" for name in ("LateMask", "codecarbon")]
    path = tmp_path / "emissions.csv"
    path.write_text("\n".join([",".join(COLUMNS), *rows]))
    with pytest.raises(UserError, match="exists and is not of this program"):
        outputs.check([path], fields=FIELDS)
    path.write_text("\n".join([",".join(COLUMNS), rows[0]]))
    outputs.check([path], fields=FIELDS)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=f"^{path}: exists and is no file"):
            outputs.check([path])


def test_a_file_appears_whole_or_is_named(tmp_path: Path) -> None:
    outputs.write(tmp_path / "new" / "a", "text")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    for path in (tmp_path / "new" / "a" / "b", Path("/proc/x.csv")):
        with pytest.raises(OSError) as caught:
            outputs.write(path, b"bytes")
        assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "status.json", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_not_claimed(name: str, tmp_path: Path) -> None:
    """A run.dir of . beside one's own config.yaml would replace it."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / name).write_text(MINE)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: exists, and {tmp_path} is no run"):
        RunFolder(tmp_path).claim()
    assert listed(tmp_path) == {str(tmp_path / name): MINE.encode()}


def test_a_folder_that_is_of_no_submission_is_not_frozen_into(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm" / "code").mkdir(parents=True)
    refuse_foreign(tmp_path / "slurm")
    (tmp_path / "slurm" / "code" / "thesis.tex").write_text(MINE)
    array = ["--array", "commands", "--output", str(tmp_path)]
    for words in ([str(tiny / "tiny.yaml"), f"run.dir={tmp_path}"], array):
        with pytest.raises(UserError, match=f"^{tmp_path / 'slurm'}: exists and is of no submission"):
            submit.main([*words, "--dry-run"])
