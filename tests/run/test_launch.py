"""The launchers people use, for real: the same run under each, and the same exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import __version__, checkpoint
from pretrain.monitor import read_metrics
from pretrain.run_folder import RunFolder
from tests.support.ranks import PATIENCE, free_port
from tests.support.runs import ENVIRON

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
Words = Callable[..., list[str]]

LAUNCHERS: dict[str, tuple[str, ...]] = {
    "python": ("python", "-m", "pretrain"),
    "torchrun": ("torchrun", "--nproc_per_node=2", "--master_port={port}", "-m", "pretrain"),
    "deepspeed": ("deepspeed", "--num_gpus=2", "--master_port={port}", "--module", "pretrain"),
    "mpirun": ("mpirun", "-n", "2", "python", "-m", "pretrain"),
}


def start(launcher: str, words: list[str]) -> subprocess.Popen[str]:
    program, *options = (word.format(port=free_port()) for word in LAUNCHERS[launcher])
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
    environ = {**keep, **ENVIRON, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(BIN / program), *options, *words],
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


def launch(launcher: str, words: list[str]) -> tuple[int, str]:
    return finish(start(launcher, words))


def seen(launcher: str, code: int) -> int:
    """What is left of the ranks' exit code: torchrun makes 1 of every failure."""
    return 1 if launcher == "torchrun" and code else code


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Final held-out loss of one process."""
    run = tmp_path_factory.mktemp("alone")
    code, text = launch("python", [str(tiny / "tiny.yaml"), f"run.dir={run}"])
    assert code == 0, text
    return float(read_metrics(run)[-1]["held_out_loss"])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_same_run_under_each(launcher: str, expected: float, words: Words, tmp_path: Path) -> None:
    code, text = launch(launcher, words("a"))
    assert code == 0, text
    assert read_metrics(tmp_path / "a")[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    last = json.loads((tmp_path / "a" / "provenance.json").read_text())[-1]
    assert (last["launcher"], last["ranks"]) == (launcher, 1 if launcher == "python" else 2)
    assert RunFolder(tmp_path / "a").status()["exit_code"] == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_the_user_must_change_is_2(launcher: str, words: Words, tmp_path: Path) -> None:
    code, text = launch(launcher, words("a", "corpus.train=/no/where"))
    assert code == seen(launcher, 2), text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "/no/where" in line
    assert launcher == "torchrun" or "Traceback" not in text
    status = RunFolder(tmp_path / "a").status()
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "/no/where" in status["reason"]


def started(process: subprocess.Popen[str], run: Path) -> int:
    """Process id of rank 0, as soon as the run makes updates."""
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return int((run / ".lock").read_text().split()[1])


# DeepSpeed's own processes answer a SIGTERM with kill -9, or not at all: there the ranks must be told.
@pytest.mark.parametrize(
    ("launcher", "to"),
    [*((name, "rank") for name in LAUNCHERS), ("torchrun", "launcher"), ("mpirun", "launcher")],
)
def test_signal_is_75(launcher: str, to: str, words: Words, tmp_path: Path) -> None:
    process = start(launcher, words("a", "budget.steps=1000000"))
    rank = started(process, tmp_path / "a")
    os.kill(rank if to == "rank" else process.pid, signal.SIGTERM)
    code, text = finish(process)
    assert code == seen(launcher, 75), text
    status = RunFolder(tmp_path / "a").status()
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert checkpoint.steps(tmp_path / "a") == [status["step"]]


def test_a_signal_during_the_imports_is_remembered(words: Words, tmp_path: Path) -> None:
    process = start("python", words("a", "budget.steps=1000000"))
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_python" not in maps.read_text():  # the import of torch takes a second from here
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    code, text = finish(process)
    assert code == 75, text
    assert RunFolder(tmp_path / "a").status()["reason"] == "stopped by SIGUSR1"


# ---- the command line ----------------------------------------------------------------------------


def test_errors_go_to_stderr(words: Words) -> None:
    command = [sys.executable, "-m", "pretrain", *words("a", "model.num_layer=3", "train.batch_size=-1")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines), lines


def test_version() -> None:
    command = [sys.executable, "-m", "pretrain", "--version"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f"LateMask {__version__}\n"
