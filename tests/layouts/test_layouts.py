"""A few of the layouts; `python -m tests.layouts` goes through all of them."""

import json
from pathlib import Path

import pytest

from tests.layouts.__main__ import RESULTS
from tests.layouts.matrix import TOLERANCE, Layout, allowed, compare, refusal, refused

SOME = [
    Layout("torch", 0, "none", 1, 1),
    Layout("torch", 0, "none", 2, 1),
    Layout("deepspeed", 2, "optimizer", 1, 2),
    Layout("deepspeed", 3, "all", 1, 2),
]


def test_a_checkpoint_goes_on_in_every_layout(tmp_path: Path) -> None:
    """What an earlier call has compared is not compared again."""
    output = tmp_path / "pairs.jsonl"
    first = compare(SOME[:1], output)
    found = compare(SOME, output)
    assert len(found) == len(SOME) ** 2 and set(first) <= set(found)
    assert [each for each in found if max(each.first, each.second) > TOLERANCE] == []
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sum(len(line["from"]) for line in lines) == len(found)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout("torch", 1, "none", 1, 1), "parallel.zero = 1 needs train.engine = deepspeed"),
        (
            Layout("deepspeed", 0, "optimizer", 1, 1),
            "parallel.offload = optimizer needs parallel.zero of 1 or more",
        ),
        (Layout("deepspeed", 2, "all", 1, 1), "parallel.offload = all needs parallel.zero = 3"),
        (Layout("torch", 0, "none", 3, 1), "model.num_heads = 4 is no multiple of parallel.tensor = 3"),
    ],
)
def test_others_are_refused_with_the_reason(layout: Layout, reason: str) -> None:
    assert refusal(layout) == reason
    assert layout not in allowed(16)


def test_all_layouts() -> None:
    assert len(allowed(16)) == 81 and len(allowed(4)) == 54 and len(allowed(1)) == 9
    assert refused() == json.loads((RESULTS / "refused.json").read_text(encoding="utf-8"))
