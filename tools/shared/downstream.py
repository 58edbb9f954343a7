"""downstream.jsonl of a folder: what its checkpoints score on tasks.

One line a score: {"step", "task", "metric", "score", "seed", "n", "protocol", "model"}. A line
is known by all that is no result, so a command that is repeated replaces its lines and nothing counts twice.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import check_folder, locked, parse_json, write_whole

FILE = "downstream.jsonl"


@dataclass(frozen=True)
class DownstreamScore:
    """What one model scored once."""

    step: int | None
    """Of the checkpoint; None for a folder that is no run."""
    task: str
    metric: str
    score: float
    """As the metric is defined: a share in [0, 1], a correlation in [-1, 1]."""
    seed: int | None = None
    """None where nothing is drawn."""
    n: int | None = None
    """Examples that were scored."""
    protocol: str = ""
    """How it was had, such as `probe`; scores of different protocols do not compare."""
    model: str = ""
    """The path of a model that is no run, whose scores may lie beside those of others."""

    @property
    def key(self) -> tuple[int | None, str, str, int | None, str, str]:
        """What a later score replaces this one by."""
        return self.step, self.task, self.metric, self.seed, self.protocol, self.model


def read(folder: str | Path) -> list[DownstreamScore]:
    """Return the scores of a folder, oldest first; UserError names a line that is none."""
    return [score for _, score in _lines(Path(folder) / FILE)]


def check(folder: str | Path) -> None:
    """Raise UserError, before the work, where no scores could be recorded."""
    check_folder(folder)
    read(folder)


def of_mean(protocol: str, averaged: str) -> str:
    """Return the protocol of a score, which says if it is of a mean of checkpoints: at its step there is one
    that is none."""
    return f"{protocol}, mean of {averaged}" if averaged else protocol


def record(folder: str | Path, scores: Iterable[DownstreamScore]) -> None:
    """Write scores to a folder, which is made; those that are there under the same key are replaced.

    After a kill at any instant the file has all of them or none. Processes may record at the same time.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(".downstream.lock")
    with lock.open("a+", encoding="utf-8") as file, locked(file, lock):
        lines = {score.key: text for text, score in _lines(path)}
        lines |= {score.key: json.dumps(asdict(score), allow_nan=False) for score in scores}
        write_whole(path, "".join(f"{text}\n" for text in lines.values()).encode())


def _lines(path: Path) -> Iterator[tuple[str, DownstreamScore]]:
    """Yield each line with its score; keys that are not known here stay in the line."""
    if not path.exists():
        return
    for number, encoded in enumerate(path.read_bytes().split(b"\n"), 1):
        if not encoded:
            continue
        try:
            text = encoded.decode()
            line = parse_json(text)
            step, seed, n = (
                None if line.get(key) is None else int(line[key]) for key in ("step", "seed", "n")
            )
            words = (str(line["task"]), str(line.get("metric", "")), float(line["score"]))
            if not math.isfinite(words[-1]):
                raise ValueError(words[-1])
            protocol, model = str(line.get("protocol", "")), str(line.get("model", ""))
            yield text, DownstreamScore(step, *words, seed, n, protocol, model)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{path}:{number}: expected step, task and score; mend or delete it") from None
