"""Labelled texts from files: GLUE's own TSV, and any TSV or JSONL that a short description explains.

    DATA/CoLA/train.tsv dev.tsv, DATA/MNLI/train.tsv dev_matched.tsv dev_mismatched.tsv, ...
    DATA/NAME/task.yaml train.jsonl dev.jsonl

A `Task` says which columns hold the texts and the label; there is one reader for all.

GLUE's files have no quoting. A quotation mark is a letter, and a reader of CSV that takes it for
more swallows lines. Lines end at b"\\n" only: U+2028 and others occur inside sentences.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import config
from pretrain.errors import UserError
from pretrain.files import parse_json
from tools.text.readers import to_utf8

DESCRIPTION = "task.yaml"
CORRELATIONS = ("pearson", "spearman")
METRICS = ("accuracy", "f1", "matthews", *CORRELATIONS)
"""Of a description; f1 is that of the second of two classes."""


@dataclass(frozen=True)
class GlueTask:
    """What the columns of a task's files are, and how it is scored."""

    name: str
    """Also that of the folder."""
    texts: tuple[str, ...]
    """Columns of one sentence or two."""
    label: str
    metrics: tuple[str, ...] = ("accuracy",)
    """The first one is what settings are chosen by. Correlations make it a task of scores, not of classes."""
    classes: tuple[str, ...] = ()
    """The labels as they are spelt; none: those that train has, in order of the alphabet."""
    columns: tuple[str, ...] = ()
    """Names of the columns, of files that do not begin with a line of them."""
    splits: tuple[str, ...] = ("dev",)
    """Names of the files beside train that are scored."""
    files: tuple[str, ...] = ()
    """Other names of a split's file, relative to DATA, that are looked for as well."""

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to be met and not classes."""
        return self.metrics[0] in CORRELATIONS


class LabelledRow(NamedTuple):
    """One example."""

    texts: tuple[str, ...]
    label: str
    target: float
    """The number of the class, or the score."""


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA", ("sentence",), "label", ("matthews",), ("0", "1"), ("source", "label", "star", "sentence")
        ),
        GlueTask("SST-2", ("sentence",), "label", classes=("0", "1")),
        GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1"), ("0", "1")),
        GlueTask("STS-B", _PAIR, "score", CORRELATIONS),
        GlueTask("QQP", ("question1", "question2"), "is_duplicate", ("accuracy", "f1"), ("0", "1")),
        GlueTask("MNLI", _PAIR, "gold_label", classes=_NLI, splits=("dev_matched", "dev_mismatched")),
        GlueTask("QNLI", ("question", "sentence"), "label", classes=_ENTAILMENT),
        GlueTask("RTE", _PAIR, "label", classes=_ENTAILMENT),
        GlueTask("WNLI", _PAIR, "label", classes=("0", "1")),
        GlueTask(
            "AX",
            ("Premise", "Hypothesis"),
            "Label",
            ("matthews",),
            _NLI,
            splits=("diagnostic-full",),
            files=("diagnostic/diagnostic-full.tsv",),
        ),
    )
}
"""GLUE. AX has no rows to train on: it is put to a model of MNLI."""


def find_task(data: Path, name: str) -> GlueTask:
    """Return the task of GLUE, or of DATA/NAME/task.yaml; UserError if there is neither.

    texts: [question, answer]     # one column or two
    label: relevant
    metrics: [f1, accuracy]       # the first chooses; pearson, spearman: labels are scores

    `classes`, `columns` and `splits` may be given too; see `Task`.
    """
    path = data / name / DESCRIPTION
    if path.exists():
        return _described(path)
    if name in TASKS:
        return TASKS[name]
    raise UserError(f"{name}: no task of GLUE ({', '.join(TASKS)}), and {path} does not describe it")


def _described(path: Path) -> GlueTask:
    """Return the task of a description; UserError for what is none."""
    tree = config.read_yaml(path)
    known = ("texts", "label", "metrics", "classes", "columns", "splits")
    if wrong := [key for key in tree if key not in known]:
        raise UserError(f"{path}: {wrong[0]}: no such key; there are {', '.join(known)}")
    words = {
        key: tuple(_spelt(each) for each in (value if isinstance(value, list) else [value]))
        for key, value in tree.items()
    }
    if not 1 <= len(words.get("texts", ())) <= 2 or len(words.get("label", ())) != 1:
        raise UserError(f"{path}: write `texts: [COLUMN]`, of one column or two, and `label: COLUMN`")
    if empty := [key for key, value in words.items() if not value]:
        raise UserError(f"{path}: {empty[0]}: an empty list; leave it out")
    metrics = words.get("metrics", ())
    if wrong := [metric for metric in metrics if metric not in METRICS]:
        raise UserError(f"{path}: metrics: no {wrong[0]}; there are {', '.join(METRICS)}")
    if len({metric in CORRELATIONS for metric in metrics}) > 1:
        raise UserError(f"{path}: metrics: {', '.join(CORRELATIONS)} are of scores, the others of classes")
    task = GlueTask(path.parent.name, words.pop("texts"), words.pop("label")[0], **words)
    if "f1" in metrics and task.classes and len(task.classes) != 2:
        raise UserError(f"{path}: metrics: f1 is of two classes, not of {len(task.classes)}")
    return task


def _spelt(value: Any) -> str:
    """Return the text of a field: JSON and YAML have numbers and truth values too."""
    return value if isinstance(value, str) else json.dumps(value)


def split_file(data: Path, task: GlueTask, split: str) -> Path:
    """Return the file of a split; UserError if there is none."""
    names = [f"{task.name}/{split}{suffix}" for suffix in (".tsv", ".jsonl")] + list(task.files)
    for name in names:
        if (data / name).is_file():
            return data / name
    raise UserError(f"{data / names[0]}: no such file; {task.name} needs it in --data {data}")


def read(path: Path, task: GlueTask, bad: list[str] | None = None) -> list[LabelledRow]:
    """Return the rows of a file, in order; UserError with file and line at the first bad one.

    bad: such rows are left out, and what is wrong with them is added here. The task's classes must be known
    (`with_classes`).
    """
    rows = list[LabelledRow]()
    for line, fields in _fields(path, task):
        try:
            rows.append(_row(fields, task))
        except UserError as error:
            reject(bad, f"{path}:{line}: {error}")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def reject(bad: list[str] | None, reason: str) -> None:
    """Add to the list what is wrong with a row; a UserError if there is no list."""
    if bad is None:
        raise UserError(reason)
    bad.append(reason)


def with_classes(path: Path, task: GlueTask) -> GlueTask:
    """Return the task with the classes that its train file at `path` has, where it names none."""
    if task.classes or task.is_regression:
        return task
    found = set[str]()
    for _, fields in _fields(path, task):
        with suppress(UserError):  # which `read` tells, by its line
            found.add(_text(fields, task.label))
    if len(found) != 2 and "f1" in task.metrics:
        raise UserError(f"{path}: {len(found)} different labels in column {task.label!r}; f1 is of two")
    if not 2 <= len(found) <= 1000:
        raise UserError(
            f"{path}: {len(found)} different labels in column {task.label!r}; classes are 2 to 1,000, and"
            f" scores want `metrics: [{CORRELATIONS[0]}]`"
        )
    return replace(task, classes=tuple(sorted(found)))


def _row(fields: Mapping[str, Any] | str, task: GlueTask) -> LabelledRow:
    """Return a row; UserError that says what is wrong with it."""
    texts, label = tuple(_text(fields, name) for name in task.texts), _text(fields, task.label)
    if not task.is_regression:
        if label not in task.classes:
            raise UserError(f"{task.label} is {label!r}, none of {', '.join(task.classes)}")
        return LabelledRow(texts, label, task.classes.index(label))
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{task.label} is {label!r}, no number")
    return LabelledRow(texts, label, score)


def _text(fields: Mapping[str, Any] | str, name: str) -> str:
    if isinstance(fields, str):
        raise UserError(fields)
    value = fields.get(name)
    if isinstance(value, str) and to_utf8(value) is None:
        raise UserError(f"half of a surrogate pair in {name!r}")
    if isinstance(value, str | int | float):
        return _spelt(value)
    raise UserError(f"{name!r} is no text but {json.dumps(value)}" if name in fields else f"no {name!r}")


def _fields(path: Path, task: GlueTask) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Number and fields of each line, by column; in their place what is wrong with them."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        del lines[-1]
    columns, first = task.columns, 1
    if path.suffix == ".tsv":
        if not columns:
            if not lines:
                raise UserError(f"{path}: empty")
            columns, first = tuple(_decoded(lines[0]).split("\t")), 2
        if missing := [name for name in (*task.texts, task.label) if name not in columns]:
            raise UserError(f"{path}: no column {missing[0]!r} (it has {', '.join(columns)})")
    for number, line in enumerate(lines[first - 1 :], first):
        yield number, _parsed(line, columns if path.suffix == ".tsv" else ())


def _parsed(line: bytes, columns: Sequence[str]) -> Mapping[str, Any] | str:
    """Return the fields of a line of TSV, or of JSON where there are no columns."""
    try:
        text = line.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} of the line)"
    if columns:
        fields = text.split("\t")
        if len(fields) != len(columns):
            return f"{len(fields)} fields where {len(columns)} columns are"
        return dict(zip(columns, fields, strict=True))
    try:
        record = parse_json(text)
    except ValueError as error:
        return f"not JSON ({error})"
    return record if isinstance(record, dict) else "not a JSON object"


def _decoded(line: bytes) -> str:
    return line.decode(errors="replace").removesuffix("\r")


def drawn(keys: Sequence[str], count: int, salt: str = "") -> list[int]:
    """Return the places of `count` rows, in order: those whose keys hash lowest.

    The same rows for everybody, in whatever order a file has them; the first 100 are among the first 1,000.
    """

    def rank(place: int) -> tuple[bytes, int]:
        return hashlib.blake2b(keys[place].encode(), salt=salt.encode(), digest_size=16).digest(), place

    return sorted(sorted(range(len(keys)), key=rank)[:count])


def key(row: LabelledRow) -> str:
    """Return what a row is drawn by."""
    return "\t".join((*row.texts, row.label))
