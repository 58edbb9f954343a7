"""Trackers: all attempts are one run there, and none of their faults is training's."""

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import tracker
from pretrain.errors import UserError
from pretrain.monitor import read_metrics
from pretrain.tracker import FILE, TRACKERS, Tracker
from tests.support.runs import attempt, finish


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": 1e9 + step, "loss": 1.0 / step, "kwh": None, **values}


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put a tracker of the test's own in the place of `aim`."""

    def put(opener: Callable[..., tracker.Opened]) -> str:
        monkeypatch.setattr(tracker, "find_spec", lambda name: name)
        monkeypatch.setitem(TRACKERS, "aim", opener)
        return "aim"

    return put


def test_a_run_of_two_attempts_is_one_run(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """The real trackio, in the run's folder: every logged step, under one name, with the config."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    command = words("run", "monitor.tracker=trackio")
    finish([*command, "budget.steps=3"])
    finish([*command, "budget.steps=5"])
    run = tmp_path / "run"
    with sqlite3.connect(run / "trackio" / "latemask.db") as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        (config,) = base.execute("SELECT config FROM configs").fetchone()
    assert {name for name, _, _ in found} == {json.loads((run / FILE).read_text())["trackio"]}
    lines = [(step, json.loads(values)) for _, step, values in found]
    sent = [(step, values["loss"]) for step, values in lines if "loss" in values]
    assert sent == [(each["step"], each["loss"]) for each in read_metrics(run) if "loss" in each]
    assert {step for step, _ in sent} == {1, 2, 3, 4, 5} and b"model.hidden_size" in bytes(config)


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_each_tracker_takes_two_attempts(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "AIM_REPO", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tracker, "END_TIMEOUT_S", 900.0)
    known = []
    for first in (1, 3):
        opened = Tracker(name, tmp_path, {"model.hidden_size": 32})
        for step in (first, first + 1):
            opened.add(line(step))
        opened.close()
        known.append(json.loads((tmp_path / FILE).read_text()))
    assert known[0] == known[1] and not caplog.records


def test_a_server_that_hangs_holds_nobody_up(
    kind: Callable[..., str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker, "END_TIMEOUT_S", 0.01)
    monkeypatch.setattr(tracker, "WAITING", 3)
    gone, entered = threading.Event(), threading.Event()

    def send(step: int, at: float, values: dict[str, Any]) -> None:
        entered.set()
        gone.wait()

    opened = Tracker(kind(lambda *arguments: ("id", send, gone.wait)), tmp_path, {})
    opened.add(line(1))
    entered.wait()
    for step in range(2, 9):
        opened.add(line(step))
    opened.close()
    gone.set()
    (warning,) = caplog.messages
    assert warning == "warning: aim did not take 8 lines; metrics.jsonl has them"


@pytest.mark.parametrize("where", ["open", "send", "end"])
def test_a_tracker_that_fails_is_named_once(
    where: str, kind: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise SystemExit("no\nserver")

    def opener(run: Path, known: str | None, settings: dict[str, Any]) -> tracker.Opened:
        return "id", fail if where == "send" else lambda *arguments: None, fail

    opened = Tracker(kind(fail if where == "open" else opener), tmp_path, {})
    for step in (1, 2, 3):
        opened.add(line(step))
    opened.close()
    (warning,) = caplog.messages
    assert "aim failed (SystemExit: no) and gets no more" in warning


def test_only_numbers_are_sent(kind: Callable[..., str], tmp_path: Path) -> None:
    sent: list[tuple[int, float, dict[str, Any]]] = []
    opener = lambda *arguments: ("id", lambda *values: sent.append(values), lambda: None)  # noqa: E731
    opened = Tracker(kind(opener), tmp_path, {})
    opened.add(line(4))
    opened.close()
    assert sent == [(4, 1e9 + 4, {"loss": 0.25})]


def test_a_run_keeps_its_id_at_each_tracker(kind: Callable[..., str], tmp_path: Path) -> None:
    """Another tracker in between, or a damaged file, takes nothing from it."""
    known: list[str | None] = []

    def opener(run: Path, name: str | None, settings: dict[str, Any]) -> tracker.Opened:
        known.append(name)
        return "mine", lambda *values: None, lambda: None

    name = kind(opener)
    for content in ("{", '{"wandb": "other"}', None):
        if content:
            (tmp_path / FILE).write_text(content)
        Tracker(name, tmp_path, {}).close()
    assert known == [None, None, "mine"]
    assert json.loads((tmp_path / FILE).read_text()) == {"wandb": "other", "aim": "mine"}


def test_what_is_not_installed_is_said(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlflow is not installed; pip install it, or set"):
        Tracker("mlflow", tmp_path, {})
    refused = attempt(words("run", "monitor.tracker=comet"))
    assert refused.codes == [2] and "monitor.tracker" in refused.text
