"""Labels of words: named entities from CoNLL files, parts of speech from CoNLL-U.

Entities are scored as conlleval does (and seqeval by default): whole entities of the right kind count, and an
I that nothing begins begins one. Other labels are scored by the share of words that are right.

A word of several tokens has its label on the first; a text longer than the model takes goes on in
another window, so that every word has a prediction. Words are tokenized as a text, with blanks between them:
byte-level pieces have the blank before their word, and are others without it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.errors import UserError
from tools.finetune.task import IGNORED, FinetuneTask, TaskInputs, logistic
from tools.text.glue import reject

_OUTSIDE = "O"


class Sentence(NamedTuple):
    """Words with a label each."""

    words: tuple[str, ...]
    labels: tuple[str, ...]


def read(path: Path, bad: list[str] | None = None) -> list[Sentence]:
    """Return the sentences of a file; a sentence with a bad line is left out where there is a list of them.

    CoNLL-U: words and their UPOS. Others: the first and the last of columns that blanks or tabs part.
    """
    is_universal, found = path.suffix == ".conllu", list[Sentence]()
    for sentence in _sentences(path):
        try:
            pairs = [_universal(line) if is_universal else _columns(line) for line in sentence.values()]
        except UserError:
            for number, line in sentence.items():
                try:
                    (_universal if is_universal else _columns)(line)
                except UserError as error:
                    reject(bad, f"{path}:{number}: {error}")
            continue
        words = [pair for pair in pairs if pair]
        if words:
            found.append(Sentence(*map(tuple, zip(*words, strict=True))))
    if not found:
        raise UserError(f"{path}: no sentences")
    return found


def _sentences(path: Path) -> Iterator[dict[int, bytes]]:
    """The lines between blank ones, by number."""
    sentence = dict[int, bytes]()
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            sentence[number] = line
        elif sentence:
            yield sentence
            sentence = {}
    if sentence:
        yield sentence


def _universal(line: bytes) -> tuple[str, str] | None:
    """Return word and UPOS of a line of CoNLL-U; None of comments, of contractions and of empty nodes."""
    text = _text(line)
    if text.startswith("#"):
        return None
    fields = text.split("\t")
    if len(fields) != 10:
        raise UserError(f"{len(fields)} fields where CoNLL-U has 10")
    if not fields[0].isdecimal():
        return None
    return fields[1], fields[3]


def _columns(line: bytes) -> tuple[str, str] | None:
    text = _text(line)
    if text.startswith("-DOCSTART-"):
        return None
    # str.split alone would part at the no-break space of a word.
    fields = [field for field in text.replace("\t", " ").split(" ") if field]
    if len(fields) < 2:
        raise UserError("one column; a word and its label are expected")
    return fields[0], fields[-1]


def _text(line: bytes) -> str:
    try:
        return line.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start} of the line)") from None


class Words(FinetuneTask):
    """A label for each word of a sentence."""

    auto = "TokenClassification"

    def __init__(self, name: str, train: Path, dev: Path, bad: list[str] | None) -> None:
        rows, dev_rows = read(train, bad), read(dev, bad)
        self._labels = sorted({label for row in rows for label in row.labels})
        self._is_entities = all(label == _OUTSIDE or label[1:2] == "-" for label in self._labels)
        self.metrics = ("entity f1",) if self._is_entities else ("accuracy",)
        super().__init__(name, rows, {name: dev_rows}, [train, dev])

    @property
    def settings(self) -> dict[str, Any]:
        return {"num_labels": len(self._labels)}

    def key(self, row: Sentence) -> str:
        return "\t".join((*row.words, *row.labels))

    def encode(self, rows: Sequence[Sentence], tokenizer: Any, max_length: int) -> TaskInputs:
        number = {label: i for i, label in enumerate(self._labels)}
        found = tokenizer(
            [" ".join(row.words) for row in rows],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        rows_of, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        ends = [list(accumulate(len(word) + 1 for word in row.words)) for row in rows]
        features, places, last = [], [], (-1, -1)
        for window, row in enumerate(rows_of):
            firsts = []
            for span in offsets[window]:
                word = _word(span, rows[row].words, ends[row])
                new = word is not None and (row, word) != last
                last = (row, word) if new and word is not None else last
                firsts.append((row, word) if new else None)
            # A label that train has not, as dev may have, trains nothing and cannot be met.
            labels = [
                IGNORED if first is None else number.get(rows[first[0]].labels[first[1]], IGNORED)
                for first in firsts
            ]
            features.append({**{name: found[name][window] for name in found}, "labels": labels})
            places.append(firsts)
        return TaskInputs(features, places, 0)

    def predictions(
        self, rows: Sequence[Sentence], inputs: TaskInputs, outputs: Sequence[np.ndarray]
    ) -> list[list[str]]:
        # Words without tokens, such as a zero-width one, keep this.
        found = [[_OUTSIDE] * len(row.words) for row in rows]
        for firsts, logits in zip(inputs.places, outputs, strict=True):
            for first, best in zip(firsts, logits.argmax(-1), strict=True):
                if first is not None:
                    found[first[0]][first[1]] = self._labels[best]
        return found

    def scores(
        self, split: str, rows: Sequence[Sentence], predictions: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        if self._is_entities:
            return {"entity f1": entity_f1([row.labels for row in rows], predictions)}
        labels = [label for row in rows for label in row.labels]
        found = [label for each in predictions for label in each]
        return {"accuracy": sum(map(eq, labels, found)) / len(labels)}

    def majority(self, train: Sequence[Sentence], rows: Sequence[Sentence]) -> list[list[str]]:
        ((label, _),) = Counter(label for row in train for label in row.labels).most_common(1)
        return [[label] * len(row.words) for row in rows]

    def tfidf(self, train: Sequence[Sentence], rows: Sequence[Sentence]) -> list[list[str]]:
        """Return the letters of the word, and the words beside it."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer=lambda features: features)
        labels = [label for row in train for label in row.labels]
        fitted = logistic(vectorizer.fit_transform(_contexts(train)), labels)
        found = iter(fitted(vectorizer.transform(_contexts(rows))))
        return [[str(next(found)) for _ in row.words] for row in rows]


def _word(span: tuple[int, int], words: Sequence[str], ends: Sequence[int]) -> int | None:
    """Return the first word whose letters a token has; None of specials, and of a blank alone.

    span: first letter of the token and the one behind it; ends: of each word with its blank, in the text.
    """
    begin, end = span
    word = bisect_right(ends, begin + 1)  # a token may begin with the blank behind the word before
    return word if word < len(words) and end > ends[word] - len(words[word]) - 1 else None


def _contexts(rows: Sequence[Sentence]) -> list[list[str]]:
    """Return what the linear model sees of each word."""
    found = []
    for row in rows:
        words = ["<", *row.words, ">"]
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            ends = [f"{end}{word[:n] if end == '^' else word[-n:]}" for end in "^$" for n in (1, 2, 3, 4)]
            found.append([f"={word}", f"~{word.lower()}", f"<{before}", f">{after}", *ends])
    return found


def entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return (first word, word behind the last, kind) of the entities in labels such as B-PER, I-PER, O.

    Also in IOB1, where only an entity that touches another of its kind begins with B, and with E and S.
    """
    found, begin, before, kind_before = set(), 0, _OUTSIDE, ""
    for place, label in enumerate([*labels, _OUTSIDE]):
        mark, _, kind = label.partition("-")
        broken = mark in "BSO" or before in "ESO" or kind != kind_before
        if broken and before != _OUTSIDE:
            found.add((begin, place, kind_before))
        if broken:
            begin = place
        before, kind_before = mark, kind
    return found


def entity_f1(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    """Return the F1 of entities over all sentences (micro); 0 where there are none."""
    right = wanted = found = 0
    for each, other in zip(labels, predictions, strict=True):
        theirs, ours = entities(each), entities(other)
        right, wanted, found = right + len(theirs & ours), wanted + len(theirs), found + len(ours)
    return 2 * right / (wanted + found) if right else 0.0
