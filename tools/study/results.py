"""What a study has found, a line for each model: what it is, what it cost, what it scores.

The one idea: a line is all that is kept of a model, and what is there is not done again. So any number of
processes share a study, are killed and started again, and the tables are read from the lines alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pretrain.errors import UserError
from pretrain.files import append_line
from tools.shared import typed_json


@dataclass(frozen=True)
class StudyResult:
    """A model that was trained and scored."""

    digest: str
    """Of what the study's file says of its training."""
    size: str
    method: str
    seed: int
    lr: float
    share: float
    """Of the size's budget."""
    step: int
    tokens: int
    flops: float
    flops_without_head: float
    token_layers: float
    device_hours: float
    """Four costs of training; hours are of updates alone, without start-up, evaluation and saving."""
    seconds: float
    """That the process took, from the model before to this one."""
    scores: dict[str, float]
    corpus: str
    """Fingerprint of what was read."""
    commit: str
    device: str
    precision: str
    torch: str


_RESULT = TypeAdapter(StudyResult)
_BEGIN = '{"digest": '


def read_results(path: Path) -> list[StudyResult]:
    """Return the results of a file, the last of each model; a line that a kill has torn is passed over.

    UserError where a line is none, or corpora differ between lines.
    """
    found = dict[str, StudyResult]()
    for where, record in typed_json.read_lines(path, _BEGIN, "no result; restore the file"):
        try:
            result = _RESULT.validate_python(record)
        except ValidationError:
            raise UserError(f"{where}: no result of this version; restore the file") from None
        found[result.digest] = result
    corpora = sorted({result.corpus for result in found.values()})
    if len(corpora) > 1:
        raise UserError(f"{path}: results on different corpora ({', '.join(corpora)}); part them")
    return list(found.values())


def append(path: Path, result: StudyResult) -> None:
    """Add a result's line, whole, whoever else does so."""
    append_line(path, json.dumps(asdict(result), allow_nan=False))


def refuse_others(path: Path, results: Sequence[StudyResult], corpus: str) -> None:
    """Raise UserError where there are results on another corpus than is here."""
    for result in results:
        if result.corpus != corpus:
            raise UserError(
                f"{path}: has results on corpus {result.corpus}, and here it is {corpus}: take the same texts"
                " and tokenizer, or another --results"
            )
