"""Answers in a text: SQuAD 1.1 and 2.0, in their JSON, scored by the rules of the official scripts.

Exact match and F1 compare answers without case, punctuation and articles; the best of the reference answers
counts. A question without an answer is met by the empty one alone.

A context longer than the model takes is read in windows that overlap (doc stride). The window with
the best answer gives it; "no answer" is as good as it is in the window where it is worst.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.errors import UserError
from pretrain.files import parse_json
from tools.finetune.task import FinetuneTask, TaskInputs, entropy
from tools.text.glue import reject
from tools.text.readers import to_utf8

STRIDE = 128
"""Tokens that windows share, or a quarter of what the model takes."""
CANDIDATES, MAX_ANSWER = 20, 30
"""Best begins and ends that are combined; most tokens of an answer."""


class Question(NamedTuple):
    """A question, its text and the answers that are right."""

    question: str
    context: str
    answers: tuple[str, ...]
    """None: the text does not say."""
    start: int
    """Letters of the context before the first answer; -1 without one."""


def read(path: Path, bad: list[str] | None = None) -> list[Question]:
    """Return the questions of a file in SQuAD's layout; UserError names file and question of a bad one."""
    try:
        articles = parse_json(path.read_bytes().decode("utf-8-sig"))["data"]
        items = [
            (paragraph, item)
            for article in articles
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not in SQuAD's layout ({type(error).__name__}: {error})") from None
    found = list[Question]()
    for number, (paragraph, item) in enumerate(items, 1):
        try:
            found.append(_question(paragraph, item))
        except (UserError, KeyError, TypeError, AttributeError) as error:
            name = item.get("id", number) if isinstance(item, dict) else number
            what = f"no {error}" if isinstance(error, KeyError) else error
            reject(bad, f"{path}: question {name}: {what}")
    if not found:
        raise UserError(f"{path}: no questions")
    return found


def _question(paragraph: dict[str, Any], item: dict[str, Any]) -> Question:
    context, question = paragraph["context"], item["question"].strip()
    if to_utf8(context + question) is None:
        raise UserError("half of a surrogate pair")
    if item.get("is_impossible"):
        return Question(question, context, (), -1)
    if not item["answers"]:
        raise UserError("no answer, and not said to be impossible")
    for answer in item["answers"]:
        text, start = answer["text"], answer["answer_start"]
        if not text or start < 0 or not context.startswith(text, start):
            raise UserError(f"{text!r} is not in its text at letter {start}")
    texts = tuple(answer["text"] for answer in item["answers"])
    return Question(question, context, texts, item["answers"][0]["answer_start"])


class Answers(FinetuneTask):
    """Begin and end of the answer in a text."""

    auto = "QuestionAnswering"
    metrics = ("f1", "exact match")

    def __init__(self, name: str, train: Path, dev: Path, bad: list[str] | None) -> None:
        super().__init__(name, read(train, bad), {name: read(dev, bad)}, [train, dev])
        self._may_be_none = any(not row.answers for row in [*self.train, *self.splits[name]])

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def key(self, row: Question) -> str:
        return f"{row.question}\t{row.context}"

    def encode(self, rows: Sequence[Question], tokenizer: Any, max_length: int) -> TaskInputs:
        questions = [row.question for row in rows]
        for ids in tokenizer(questions, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            if len(ids) > max_length // 2:  # something of the text is to be seen
                raise UserError(f"{self.name}: a question of {len(ids)} tokens; raise --max-length")
        found = tokenizer(
            questions,
            [row.context for row in rows],
            truncation="only_second",
            max_length=max_length,
            stride=min(STRIDE, max_length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        rows_of, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        features, places = [], []
        for window, number in enumerate(rows_of):
            spans = [
                span if part == 1 else None
                for span, part in zip(offsets[window], found.sequence_ids(window), strict=True)
            ]
            begin, end = _tokens_of(rows[number], spans)
            each = {name: found[name][window] for name in found}
            features.append({**each, "start_positions": begin, "end_positions": end})
            places.append((number, spans))
        return TaskInputs(features, places, 0)

    def majority_loss(self, inputs: TaskInputs) -> float:
        ends = ("start_positions", "end_positions")
        return sum(entropy(each[name] for each in inputs.features) for name in ends) / 2

    def predictions(
        self, rows: Sequence[Question], inputs: TaskInputs, outputs: Sequence[np.ndarray]
    ) -> list[str]:
        best = [(-np.inf, "")] * len(rows)
        none = [np.inf] * len(rows)
        for (number, spans), logits in zip(inputs.places, outputs, strict=True):
            none[number] = min(none[number], logits[0].sum())
            for score, begin, end in _spans(logits, spans):
                if score > best[number][0]:
                    best[number] = score, rows[number].context[begin:end]
        return [
            "" if self._may_be_none and none[number] > score else text
            for number, (score, text) in enumerate(best)
        ]

    def scores(self, split: str, rows: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
        def mean(score: Callable[[str, str], float]) -> float:
            best = [
                max(score(answer, text) for answer in _references(row))
                for row, text in zip(rows, predictions, strict=True)
            ]
            return float(np.mean(best))

        return {"f1": mean(f1), "exact match": mean(lambda answer, text: plain(answer) == plain(text))}

    def majority(self, train: Sequence[Question], rows: Sequence[Question]) -> list[str]:
        ((text, _),) = Counter(row.answers[0] if row.answers else "" for row in train).most_common(1)
        return [text] * len(rows)

    def tfidf(self, train: Sequence[Question], rows: Sequence[Question]) -> list[str]:
        """Return the sentence of the text that is nearest to the question: there is nothing to classify."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True)
        vectorizer.fit([text for row in train for text in (row.question, row.context)])
        found = []
        for row in rows:
            sentences = re.split(r"(?<=[.!?])\s+", row.context)
            near = vectorizer.transform(sentences) @ vectorizer.transform([row.question]).T
            found.append(sentences[int(near.toarray().argmax())])
        return found


_Span = tuple[int, int] | None
"""First letter of a token of the context and the one behind it; None of other tokens."""


def _tokens_of(row: Question, spans: Sequence[_Span]) -> tuple[int, int]:
    """Return the tokens where the answer begins and ends; the first (CLS) if it is elsewhere."""
    if not row.answers:
        return 0, 0
    begin, end = row.start, row.start + len(row.answers[0])
    touched = [place for place, span in enumerate(spans) if span and span[0] < end and span[1] > begin]
    if not touched:
        return 0, 0
    first, last = spans[touched[0]], spans[touched[-1]]
    assert first and last
    # A piece may begin with the blank before its word, so the answer is whole where its letters are covered.
    is_whole = first[0] <= begin and last[1] >= end
    return (touched[0], touched[-1]) if is_whole else (0, 0)


def _spans(logits: np.ndarray, spans: Sequence[_Span]) -> Iterator[tuple[float, int, int]]:
    """Score, first letter and the one behind the last of the likeliest answers. logits [L, 2]."""
    begins, ends = (np.argsort(-logits[:, side])[:CANDIDATES] for side in (0, 1))
    for begin in begins:
        for end in ends:
            first, last = spans[begin], spans[end]
            if first and last and begin <= end < begin + MAX_ANSWER:
                yield float(logits[begin, 0] + logits[end, 1]), first[0], last[1]


def _references(row: Question) -> Sequence[str]:
    """Return the answers that count: of several those that are more than articles and punctuation."""
    return [text for text in row.answers if plain(text)] or [""]


def plain(text: str) -> str:
    """Return an answer without case, punctuation and articles, its words parted by one blank."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, prediction: str) -> float:
    """Return the F1 of the words that two answers share; of an empty one, whether both are."""
    wanted, found = plain(answer).split(), plain(prediction).split()
    if not wanted or not found:
        return float(wanted == found)
    shared = (Counter(wanted) & Counter(found)).total()
    return 2 * shared / (len(wanted) + len(found))
