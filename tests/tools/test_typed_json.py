"""Documents: what is written is read again, and what is none is named."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.plan import layouts
from tools.plan.schema import Calibration
from tools.shared import typed_json


@dataclass(frozen=True)
class Inner:
    size: float


@dataclass(frozen=True)
class Outer:
    name: str
    parts: list[Inner]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = Outer("a", [Inner(1.5), Inner(2.0)])
    path.write_text(typed_json.to_json(document), encoding="utf-8")
    assert typed_json.read(Outer, path) == document


def test_a_committed_document_stays_to_the_byte() -> None:
    path = layouts.RESULTS / "plan-cpu.json"
    text = typed_json.to_json(typed_json.read(Calibration, path)) + "\n"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "a", "parts": [{"size": "large"}]}', r"a.json: parts.0.size: .*valid number"),
        ('{"name": "a"}', "a.json: parts: Field required"),
        ("{", "a.json: content: Invalid JSON"),
    ],
)
def test_what_is_no_document_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        typed_json.read(Outer, path)
