"""The one command of a GPU: its steps, rehearsed on a CPU, and what a deadline leaves."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import UserError
from pretrain.provenance import code_revision
from tools import calibrate
from tools.benchmark import __main__ as benchmark
from tools.benchmark import gpu
from tools.benchmark.gpu import GpuReport, Step
from tools.shared import typed_json


def report(folder: Path) -> GpuReport:
    return typed_json.read(GpuReport, folder / "gpu.json")


def states(folder: Path) -> dict[str, str]:
    return {step.name: step.state for step in report(folder).steps}


def test_the_rehearsal_does_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a second command finds nothing left to do."""
    words = ["gpu", "--rehearse", "--minutes", "60", "--output", str(tmp_path / "found")]
    assert benchmark.main(words) == 0, [path.read_text() for path in tmp_path.glob("found/*.txt")]
    found = report(tmp_path / "found")
    assert found.rehearsed and found.commit == code_revision() and found.versions["torch"] != "absent"
    assert set(states(tmp_path / "found").values()) == {"done"}
    names = {step.name: [row.name for row in step.rows] for step in found.steps}
    assert "mae-lm against mlm, tiny 24, bf16" in names["step-base-128-default"]
    assert "mlm against hugging face, tiny 24, bf16" in names["step-base-128-default"]
    assert "training demo-mlm: slots_per_second" in names["training"]
    assert len(names["head"]) == 2 and len(names["attention-128"]) == 3
    assert (tmp_path / "found" / "profile" / "mlm-tiny-24-bf16-operations.json").exists()
    assert (tmp_path / "found" / "plan-gpu.json").exists()
    assert "skipped" in (tmp_path / "found" / "tests.txt").read_text(encoding="utf-8")
    capsys.readouterr()
    assert benchmark.main(words) == 0
    told = capsys.readouterr()
    assert not told.err and told.out.count(" done ") == len(found.steps)


def test_the_words_of_a_real_step_are_understood() -> None:
    """Those that nobody can run here."""
    for step in gpu.STEPS:
        program, *words = shlex.split(step.words)
        if program == "tools.benchmark":
            args = benchmark.arguments_of(words)
            assert args.output == f"DIR/{step.name}" and getattr(args, "peers", []) is not None
        elif program == "tools.calibrate":
            assert calibrate.main([*words[:2], "--list"]) == 0
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)


def test_a_step_that_hangs_or_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [("hangs", "http.server 0 --bind 127.0.0.1", 0.2), ("fails", "no_such_module", 60.0)]
    steps += [("prints", "this", 60.0), ("writes", "zipfile -c DIR/archive.zip pyproject.toml", 60.0)]
    monkeypatch.setattr(gpu, "STEPS", [Step(*step, toy=step[1]) for step in steps])
    started: list[int] = []
    begin = gpu.subprocess.Popen

    def remembered(*args: Any, **keys: Any) -> Any:
        process = begin(*args, **keys)
        started.append(process.pid)
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", remembered)
    folder = tmp_path / "a folder's"
    words = ["gpu", "--rehearse", "--output", str(folder)]
    assert benchmark.main(words) == 1
    assert states(folder) == {"hangs": "cut off", "fails": "failed", "prints": "done", "writes": "done"}
    assert "beautiful" in (folder / "prints.txt").read_text(encoding="utf-8").lower()
    assert "no_such_module" in (folder / "fails.txt").read_text(encoding="utf-8")
    assert (folder / "archive.zip").exists()
    for group in started:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_what_there_is_no_time_for_is_left_to_another_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a step that the end of the minutes cuts off; one that was not asked for."""
    monkeypatch.setattr(gpu, "MIN_SECONDS", 0.1)
    hang = "http.server 0 --bind 127.0.0.1"
    monkeypatch.setattr(gpu, "STEPS", [Step("hangs", hang, 60.0, hang), Step("prints", "this", 60.0, "this")])
    words = ["gpu", "--rehearse", "--output", str(tmp_path)]
    assert benchmark.main([*words, "--minutes", "0.02"]) == 0
    assert states(tmp_path) == {"hangs": "not reached", "prints": "not reached"}
    assert benchmark.main([*words, "--only", "prints"]) == 0
    assert states(tmp_path) == {"hangs": "not reached", "prints": "done"}


def test_results_of_other_code_are_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STEPS", [Step("prints", "this", 60.0, "this")])
    words = ["gpu", "--rehearse", "--output", str(tmp_path)]
    assert benchmark.main(words) == 0
    monkeypatch.setattr(gpu, "code_revision", lambda: "0123456")
    with pytest.raises(UserError, match="gpu.json: its steps are of .*, a rehearsal; choose another folder"):
        benchmark.main(words)
    with pytest.raises(UserError, match="--only zzz: in none of the names: prints"):
        benchmark.main([*words, "--only", "zzz"])
