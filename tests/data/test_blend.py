"""A run on a blend of corpora, and one whose blend changes on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import load_manifest
from tools.export import __main__ as export

Words = Callable[..., list[str]]


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_a_blend_runs_and_changes_only_as_a_new_segment(
    words: Words, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend = f"corpus.train=[[0.7, {tiny}/train], [0.3, {tiny}/short]]"
    other = f"corpus.train=[[0.5, {tiny}/train], [0.5, {tiny}/short]]"
    assert main(words("a", blend, "budget.steps=5")) == 0
    finish = ledger(tmp_path / "a")[-1]
    assert finish["event"] == "finish"
    epochs = finish["epochs"]
    windows = {name: IndexedReader(tiny / name).num_tokens // 22 for name in ("train", "short")}
    assert epochs[f"{tiny}/train"] == pytest.approx(28 / windows["train"], rel=0.05)
    assert epochs[f"{tiny}/short"] == pytest.approx(12 / windows["short"], rel=0.05)

    capsys.readouterr()
    assert main(words("a", other, "budget.steps=10")) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "train is another blend than at sample 40" in said
    assert main(words("a", other, "corpus.segment=1", "budget.steps=10")) == 0
    notes = [line for line in ledger(tmp_path / "a") if line["event"] == "blend-change"]
    assert [(note["segment"], note["first_sample"]) for note in notes] == [(1, 40)]
    assert notes[0]["blend"] == [[0.5, f"{tiny}/train"], [0.5, f"{tiny}/short"]]
    epochs = ledger(tmp_path / "a")[-1]["epochs"]
    assert epochs[f"{tiny}/short"] == pytest.approx((12 + 20) / windows["short"], rel=0.05)

    assert main(words("a", other, "corpus.segment=1", "budget.steps=11")) == 0  # goes on in segment 1
    assert sum(line["event"] == "blend-change" for line in ledger(tmp_path / "a")) == 1
    state = json.loads(max((tmp_path / "a" / "checkpoints").glob("step-*/state.json")).read_text())
    prints = [load_manifest(tiny / name).fingerprint for name in ("train", "short")]
    assert state["segments"] == [
        [0, 0, [[0.7, prints[0]], [0.3, prints[1]]], 24],
        [1, 40, [[0.5, prints[0]], [0.5, prints[1]]], 24],
    ]

    assert export.main([str(tmp_path / "a"), "--output", str(tmp_path / "encoder")]) == 0
    card = (tmp_path / "encoder" / "README.md").read_text(encoding="utf-8")
    assert card.count("50.0% of the samples: ") == 2 and all(each in card for each in prints)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[]", "should be a prefix, or [[weight, prefix], ...]"),
        ("[[0.5]]", "should be a prefix, or [[weight, prefix], ...]"),
        ("[[-1, a]]", "with weights above 0"),
        ("[[a, 1]]", "should be a prefix, or [[weight, prefix], ...]"),
        ("[a, b]", "should be a prefix, or [[weight, prefix], ...]"),
        ("[[1, a], [2, a]]", "names a prefix twice"),
    ],
)
def test_bad_blends_are_named(
    train: str, message: str, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("a", f"corpus.train={train}", "--dry-run")) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "corpus.train = " in said and message in said


def test_the_plan_tells_epochs_of_each_corpus(
    words: Words, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend = f"corpus.train=[[3, {tiny}/train], [1, {tiny}/short]]"
    assert main(words("a", blend, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert f"windows of {tiny}/train" in out and f"windows of {tiny}/short" in out
