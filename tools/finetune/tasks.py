"""What can be fine-tuned on: sentences and pairs; words of a text (`words`); answers in one (`answers`)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError
from tools.finetune import answers, words
from tools.finetune.task import FinetuneTask, TaskInputs, logistic
from tools.shared.metrics import scored
from tools.text import glue

AX = "AX"
"""Rows that a model of MNLI is put to; they come with that task."""
STARTED_FROM_MNLI = ("RTE", "MRPC", "STS-B")
"""Small tasks that are also started from a model of MNLI, as in RoBERTa's paper."""


def find_task(data: Path, name: str, bad: list[str] | None) -> FinetuneTask:
    """Return the task that DATA/NAME holds: answers, words, or sentences.

    bad: rows that cannot be used are left out, and added here; otherwise they are a UserError.
    """
    folder = data / name
    if name in glue.TASKS or (folder / glue.DESCRIPTION).exists():
        return Sentences(data, name, bad)
    # A page beside the data is none of them: first come those that have a file of train.
    found = [(kind, sorted(folder.glob(f"*{suffix}"))) for suffix, kind in _KINDS.items()]
    found.sort(key=lambda each: not any("train" in path.name for path in each[1]))
    for kind, files in found:
        if files:
            train, dev = one(folder, files, ("train",)), one(folder, files, ("dev", "valid", "testa"))
            return kind(name, train, dev, bad)
    glue.find_task(data, name)  # says what there is
    raise AssertionError(name)


_KINDS: dict[str, type[words.Words] | type[answers.Answers]] = {
    **dict.fromkeys((".conllu", ".conll", ".bio", ".iob"), words.Words),
    ".json": answers.Answers,
    ".txt": words.Words,
}
"""By suffix, the surest first."""


def one(folder: Path, files: Sequence[Path], words: Sequence[str]) -> Path:
    """Return the one file whose name has one of the words; UserError if there are none or several."""
    found = [path for path in files if any(word in path.name for word in words)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: needs one file with {' or '.join(words)} in its name, has {names}")
    return found[0]


class Sentences(FinetuneTask):
    """One sentence or two, and a class or a score: GLUE, and what a description explains."""

    auto = "SequenceClassification"

    def __init__(self, data: Path, name: str, bad: list[str] | None) -> None:
        task = glue.find_task(data, name)
        file = glue.split_file(data, task, "train")
        self._task = task = glue.with_classes(file, task)
        self.metrics = task.metrics
        kinds = {
            name if len(task.splits) == 1 else f"{name} {split.removeprefix('dev_')}": (split, task)
            for split in task.splits
        }
        ax = glue.TASKS[AX]
        if name == "MNLI" and any((data / path).is_file() for path in ("AX/diagnostic-full.tsv", *ax.files)):
            kinds[AX] = ax.splits[0], ax
        files = {title: glue.split_file(data, each, split) for title, (split, each) in kinds.items()}
        self._metrics = {title: each.metrics for title, (_, each) in kinds.items()}
        splits = {title: glue.read(files[title], each, bad) for title, (_, each) in kinds.items()}
        super().__init__(name, glue.read(file, task, bad), splits, [file, *files.values()])

    @property
    def settings(self) -> dict[str, Any]:
        if self._task.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return {"num_labels": len(self._task.classes), "problem_type": "single_label_classification"}

    def key(self, row: glue.LabelledRow) -> str:
        return glue.key(row)

    def encode(self, rows: Sequence[glue.LabelledRow], tokenizer: Any, max_length: int) -> TaskInputs:
        columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
        # The letters of a special piece in a text are text, as they are in pre-training.
        cut = tokenizer(*columns, truncation=True, max_length=max_length, split_special_tokens=True)
        kind = float if self._task.is_regression else int
        features = [
            {**{name: cut[name][i] for name in cut}, "labels": kind(row.target)} for i, row in enumerate(rows)
        ]
        truncated = sum(bool(each.overflowing) for each in cut.encodings)
        return TaskInputs(features, [], truncated)

    def predictions(
        self, rows: Sequence[glue.LabelledRow], inputs: TaskInputs, outputs: Sequence[np.ndarray]
    ) -> list[float]:
        return [float(each[0] if self._task.is_regression else each.argmax()) for each in outputs]

    def scores(
        self, split: str, rows: Sequence[glue.LabelledRow], predictions: Sequence[float]
    ) -> dict[str, float]:
        targets = [row.target for row in rows]
        return {name: scored(name, targets, predictions) for name in self._metrics.get(split, self.metrics)}

    def majority_loss(self, inputs: TaskInputs) -> float:
        if self._task.is_regression:
            return float(np.var([each["labels"] for each in inputs.features]))
        return super().majority_loss(inputs)

    def majority(self, train: Sequence[glue.LabelledRow], rows: Sequence[glue.LabelledRow]) -> list[float]:
        targets = [row.target for row in train]
        answer = np.mean(targets) if self._task.is_regression else Counter(targets).most_common(1)[0][0]
        return [float(answer)] * len(rows)

    def tfidf(self, train: Sequence[glue.LabelledRow], rows: Sequence[glue.LabelledRow]) -> list[float]:
        """Return the words and pairs of words; of two sentences, what they share and in what they differ."""
        from scipy import sparse
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge

        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+")
        vectorizer.fit([text for row in train for text in row.texts])

        def features(rows: Sequence[glue.LabelledRow]) -> Any:
            columns = zip(*(row.texts for row in rows), strict=True)
            sides = [vectorizer.transform(column) for column in columns]
            if len(sides) == 1:
                return sides[0]
            return sparse.hstack([sides[0].multiply(sides[1]), abs(sides[0] - sides[1])]).tocsr()

        targets = [row.target for row in train]
        if self._task.is_regression:
            return [float(each) for each in Ridge().fit(features(train), targets).predict(features(rows))]
        return [float(each) for each in logistic(features(train), targets)(features(rows))]
