"""Labelled files: GLUE's own layout, descriptions, and every bad row by file and line."""

from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.shared.metrics import scored
from tools.text import glue

FILES = {
    "CoLA": ("train.tsv", "gj04\t1\t\tHe \"said so.\ngj04\t0\t*\tSo said' he.\n"),
    "SST-2": ("train.tsv", 'sentence\tlabel\n"a fine film \t1\nno \u2028 film\t0\n'),
    "MRPC": (
        "train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t2\t3\tOne "day.\tA day.\r\n0\t4\t5\tA\tB\r\n',
    ),
    "STS-B": (
        "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\t0\tn\tn\tA man.\tA boy.\t3.800\n1\tg\tf\ty\t0\tn\tn\tA.\tB.\t0\n",
    ),
    "QQP": ("train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n"),
    "MNLI": (
        "dev_mismatched.tsv",
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\tg\tIt is.\tIt was.\tneutral\tentailment\n",
    ),
    "QNLI": ("train.tsv", "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n"),
    "RTE": ("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n"),
    "WNLI": ("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n"),
    "AX": (
        "diagnostic-full.tsv",
        "Lexical Semantics\tDomain\tPremise\tHypothesis\tLabel\n\tNews\tA.\tB.\tcontradiction\n",
    ),
}
FIRST = {
    "CoLA": (('He "said so.',), 1),
    "SST-2": (('"a fine film ',), 1),
    "MRPC": (('One "day.', "A day."), 1),
    "STS-B": (("A man.", "A boy."), 3.8),
    "QQP": (("Why?", "How?"), 0),
    "MNLI": (("It is.", "It was."), 0),
    "QNLI": (("Who?", "He."), 1),
    "RTE": (("A.", "B."), 0),
    "WNLI": (("A.", "B."), 1),
    "AX": (("A.", "B."), 2),
}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue_as_it_is_distributed(name: str, tmp_path: Path):
    file, text = FILES[name]
    path = written(tmp_path, f"{name}/{file}", text)
    task = glue.find_task(tmp_path, name)
    assert glue.split_file(tmp_path, task, path.stem) == path
    rows = glue.read(path, task)
    assert (rows[0].texts, rows[0].target) == FIRST[name]
    assert len(rows) == len(text.strip().split("\n")) - (not task.columns)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a film", "1 fields where 2 columns are"),
        ("a film\t1\t1", "3 fields where 2 columns are"),
        ("a film\t2", "label is '2', none of 0, 1"),
        ("", "1 fields where 2 columns are"),
        ("a\udcff film\t1", "not UTF-8 (byte 1 of the line)"),
    ],
)
def test_a_bad_row_is_named(line: str, reason: str, tmp_path: Path):
    path = tmp_path / "train.tsv"
    path.write_bytes(f"sentence\tlabel\ngood\t1\n{line}\nbad\t0\n".encode(errors="surrogateescape"))
    task = glue.TASKS["SST-2"]
    with pytest.raises(UserError) as error:
        glue.read(path, task)
    assert str(error.value) == f"{path}:3: {reason}"
    bad: list[str] = []
    assert [row.texts[0] for row in glue.read(path, task, bad)] == ["good", "bad"]
    assert bad == [str(error.value)]


def test_a_score_is_a_finite_number(tmp_path: Path):
    for word in ("", "nan", "inf", "high"):
        path = written(tmp_path, "dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t{word}\n")
        with pytest.raises(UserError, match=r"dev.tsv:2: score is .*, no number"):
            glue.read(path, glue.TASKS["STS-B"])


def test_a_missing_column_or_file_is_named(tmp_path: Path):
    path = written(tmp_path, "RTE/train.tsv", "index\tsentence1\tlabel\n")
    with pytest.raises(UserError, match=r"no column 'sentence2' \(it has index, sentence1, label\)"):
        glue.read(path, glue.TASKS["RTE"])
    with pytest.raises(UserError, match=r"RTE/dev.tsv: no such file"):
        glue.split_file(tmp_path, glue.TASKS["RTE"], "dev")
    with pytest.raises(UserError, match="Nothing: no task of GLUE"):
        glue.find_task(tmp_path, "Nothing")


def test_any_jsonl_by_three_lines(tmp_path: Path):
    written(
        tmp_path, "Answers/task.yaml", "texts: [question, answer]\nlabel: good\nmetrics: [f1, accuracy]\n"
    )
    path = written(
        tmp_path,
        "Answers/train.jsonl",
        '{"question": "Why?", "answer": "So.", "good": true}\n'
        '{"question": "Who?", "answer": 3, "good": false}\n',
    )
    task = glue.with_classes(path, glue.find_task(tmp_path, "Answers"))
    assert task.classes == ("false", "true") and not task.is_regression
    assert glue.read(glue.split_file(tmp_path, task, "train"), task) == [
        (("Why?", "So."), "true", 1),
        (("Who?", "3"), "false", 0),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "c"}', "no 'good'"),
        ('{"text": "c", "good": null}', "'good' is no text but null"),
        ('{"text": "\\ud800", "good": true}', "half of a surrogate pair in 'text'"),
        ('{"text": "c", "good": "\\udc00"}', "half of a surrogate pair in 'good'"),
        ("no JSON", "not JSON"),
    ],
)
def test_a_bad_row_is_named_where_classes_are_those_of_train(row: str, reason: str, tmp_path: Path):
    written(tmp_path, "Mine/task.yaml", "texts: text\nlabel: good\n")
    good = ['{"text": "a", "good": true}', '{"text": "b", "good": false}']
    path = written(tmp_path, "Mine/train.jsonl", "\n".join([good[0], row, good[1]]))
    task = glue.with_classes(path, glue.find_task(tmp_path, "Mine"))
    assert task.classes == ("false", "true")
    with pytest.raises(UserError, match=f"train.jsonl:2: {reason}"):
        glue.read(path, task)
    bad: list[str] = []
    assert [row.target for row in glue.read(path, task, bad)] == [1, 0] and len(bad) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("texts: [a, b, c]\nlabel: d\n", "one column or two"),
        ("texts: a\n", "`label: COLUMN`"),
        ("texts: a\nlabel: b\nmetric: f1\n", "metric: no such key"),
        ("texts: a\nlabel: b\nmetrics: [bleu]\n", "no bleu"),
        ("texts: a\nlabel: b\nmetrics: [pearson, f1]\n", "are of scores"),
        ("texts: a\nlabel: b\nmetrics: [f1]\nclasses: [x, y, z]\n", "f1 is of two classes, not of 3"),
        ("texts: a\nlabel: b\nmetrics: []\n", "metrics: an empty list; leave it out"),
        ("texts: a\nlabel: b\nsplits: []\n", "splits: an empty list; leave it out"),
    ],
)
def test_a_description_that_is_none(text: str, reason: str, tmp_path: Path):
    written(tmp_path, "Mine/task.yaml", text)
    with pytest.raises(UserError, match=r"task.yaml: .*" + reason):
        glue.find_task(tmp_path, "Mine")


def test_rows_are_drawn_by_what_they_say():
    keys = [f"row {i}" for i in range(1000)]
    few, more = glue.drawn(keys, 50), glue.drawn(keys, 200)
    assert len(set(few)) == 50 and set(few) < set(more) and few == sorted(few)
    assert {keys[i] for i in few} == {keys[::-1][i] for i in glue.drawn(keys[::-1], 50)}
    assert glue.drawn(keys, 50, "other") != few and glue.drawn(keys, 2000) == list(range(1000))


def test_scores():
    assert scored("accuracy", [0, 1, 1, 0], [0, 1, 0, 0]) == 0.75
    assert scored("f1", [0, 1, 1, 0], [0, 1, 0, 0]) == pytest.approx(2 / 3)
    assert scored("matthews", [0, 1, 1, 0], [0, 1, 0, 0]) == pytest.approx(1 / 3**0.5)
    assert scored("pearson", [1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert scored("spearman", [1, 2, 3], [1, 8, 9]) == pytest.approx(1)
    assert [scored(name, [1, 0], [1, 1]) for name in ("matthews", "pearson", "spearman")] == [0, 0, 0]
