"""downstream.jsonl: repeated commands, several writers, foreign lines."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.shared import downstream
from tools.shared.downstream import FILE, DownstreamScore

SCORE = DownstreamScore(step=3, task="CoLA", metric="matthews", score=0.25, seed=1, n=1043, protocol="fixed")


def test_a_repeated_score_replaces_its_line(tmp_path: Path) -> None:
    other = replace(SCORE, seed=2, score=0.5)
    downstream.record(tmp_path / "run", [SCORE, other])
    downstream.record(tmp_path / "run", [again := replace(SCORE, score=0.75)])
    assert downstream.read(tmp_path / "run") == [again, other]
    changes = {"step": 4, "task": "RTE", "metric": "f1", "seed": None, "protocol": "probe", "model": "a/b"}
    for name, value in changes.items():
        downstream.record(tmp_path / "run", [replace(SCORE, **{name: value})])
    assert len(downstream.read(tmp_path / "run")) == 2 + len(changes)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {FILE, ".downstream.lock"}


def test_lines_of_others_stay_as_they_are(tmp_path: Path) -> None:
    text = json.dumps({"step": 1, "task": "sst2", "score": 0.7, "note": "by hand"})
    (tmp_path / FILE).write_text(text + "\n", encoding="utf-8")
    downstream.record(tmp_path, [SCORE])
    assert (tmp_path / FILE).read_text(encoding="utf-8").splitlines()[0] == text
    assert downstream.read(tmp_path) == [DownstreamScore(1, "sst2", "", 0.7), SCORE]


@pytest.mark.parametrize("value", [b"\xff", b"NaN", b"1e999"])
def test_a_score_that_is_no_number_is_named(tmp_path: Path, value: bytes) -> None:
    for key in (b"score", b"step"):
        line = b'{"step": 1, "task": "a", "score": 1.0}'.replace(b'"%s": 1' % key, b'"%s": %s' % (key, value))
        (tmp_path / FILE).write_bytes(line.replace(b"%s.0" % value, value) + b"\n")
        with pytest.raises(UserError, match="downstream.jsonl:1: expected step, task and score"):
            downstream.read(tmp_path)


@pytest.mark.parametrize("line", ["{}", "[]", '{"step": 1, "task": "a", "score": "high"}', '{"step": 1, "ta'])
def test_a_bad_line_is_named_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    downstream.record(tmp_path, [SCORE])
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match="downstream.jsonl:2: expected step, task and score"):
        downstream.record(tmp_path, [SCORE])
    assert (tmp_path / FILE).read_bytes() == before


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        downstream.record(tmp_path, [replace(SCORE, score=float("nan"))])
    assert downstream.read(tmp_path) == []


def _record(folder: Path, seed: int) -> None:
    for step in range(20):
        downstream.record(folder, [replace(SCORE, step=step, seed=seed)])


def test_processes_record_at_the_same_time(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_record, args=(tmp_path, seed))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(downstream.read(tmp_path)) == 80
