"""What all tasks are to the training loop and to the baselines.

A task turns rows into inputs of a model, outputs into predictions and predictions into
scores; the loop knows nothing else of it.

A window is not a row. Long rows of words and answers become several inputs each, and what is
scored are rows.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IGNORED = -100
"""The label of what is not predicted."""


class TaskInputs(NamedTuple):
    """Rows as a model takes them."""

    features: list[dict[str, Any]]
    """By name of the model's argument; labels with them."""
    places: list[Any]
    """Where in the rows each is from, for those that are not one a row."""
    truncated: int
    """Rows that lost their end."""


class FinetuneTask(ABC):
    """Rows to train on, rows to be scored, and what connects them with a model."""

    auto: str
    """The transformers class behind AutoModelFor."""
    metrics: tuple[str, ...]
    """The first one chooses settings."""

    def __init__(
        self, name: str, train: Sequence[Any], splits: Mapping[str, Sequence[Any]], files: Iterable[Path]
    ):
        self.name, self.train, self.splits = name, train, splits
        hashes = [hashlib.blake2b(file.read_bytes(), digest_size=16).digest() for file in files]
        self.fingerprint = hashlib.blake2b(b"".join(hashes), digest_size=6).hexdigest()
        """Of the files that it was read from."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the model's config is told: the number of labels and so on."""

    @abstractmethod
    def key(self, row: Any) -> str:
        """Return what a row is drawn by."""

    @abstractmethod
    def encode(self, rows: Sequence[Any], tokenizer: Any, max_length: int) -> TaskInputs:
        """Return the inputs of rows, each of at most `max_length` tokens."""

    @abstractmethod
    def predictions(
        self, rows: Sequence[Any], inputs: TaskInputs, outputs: Sequence[np.ndarray]
    ) -> list[Any]:
        """Return a prediction for each row. outputs: logits of each input, without those of padding."""

    @abstractmethod
    def scores(self, split: str, rows: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of a split, in [-1, 1]; the first one leads."""

    @abstractmethod
    def majority(self, train: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """Return the same prediction for each row: the most frequent label, or the mean."""

    @abstractmethod
    def tfidf(self, train: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """Return the predictions of a linear model of TF-IDF features."""

    def majority_loss(self, inputs: TaskInputs) -> float:
        """Return the least training loss of a model that does not look at its input, in nats."""
        return entropy(label for each in inputs.features for label in np.ravel(each["labels"]))


def entropy(labels: Iterable[Any]) -> float:
    """Return the entropy of labels in nats, IGNORED ones apart."""
    values = np.fromiter(labels, dtype=np.int64)
    _, counts = np.unique(values[values != IGNORED], return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def logistic(features: Any, labels: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    """Return the predictions of a logistic regression, or of the one label that there is."""
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) == 1:
        return lambda other: [labels[0]] * other.shape[0]
    return LogisticRegression(max_iter=1000).fit(features, labels).predict
