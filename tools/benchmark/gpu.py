"""All that a GPU must show, by one command: ``python -m tools.benchmark gpu --minutes 9 --output DIR``.

Time on a GPU is short, so the steps are ordered by value, and each is a program of its own with a deadline:
what is too slow, hangs or runs out of memory costs its own step alone. DIR/gpu.json says after each step
how it ended, with the rows that it measured; what a step printed is in DIR/NAME.txt. The same command goes
on where an earlier one stopped.

``--rehearse`` does the steps at toy size on a CPU, those that differ in nothing but size once.

A step's own processes hold the GPU's memory as well. A step leads a process group, all of which is
killed when it ends.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError
from pretrain.provenance import code_revision
from tools.shared import console, measure, outputs, typed_json
from tools.shared.measure import BenchmarkRow
from tools.shared.tables import aligned

ROOT = Path(__file__).parents[2]
MIN_SECONDS = 15.0
"""Seconds below which no step is begun: it would do no more than import torch."""
FIELDS = dict.fromkeys(("commit", "rehearsed", "steps"), "")
"""By which the document is known."""


@dataclass(frozen=True)
class Step:
    """A program, and how long it may take."""

    name: str
    words: str
    """After `python -m`; DIR stands for the folder of results."""
    seconds: float
    toy: str = ""
    """The words of a rehearsal; none where it differs in size only from a step that has some."""


@dataclass(frozen=True)
class StepResult:
    """How a step ended."""

    name: str
    command: str
    state: Literal["done", "failed", "cut off", "not reached"]
    seconds: float = 0.0
    limit: float = 0.0
    rows: tuple[BenchmarkRow, ...] = ()


@dataclass(frozen=True)
class GpuReport:
    """The document of this program."""

    commit: str | None
    rehearsed: bool
    versions: dict[str, str]
    steps: list[StepResult]


# ---- the steps -----------------------------------------------------------------------------------

_ROUNDS = "--dtype bf16 --runs 5 --repeat 8"
_LATE = "--methods 3ml-self 3ml-query mae-lm"
_TOY = "--size tiny --length 24 --batch-size 2 --runs 1 --threads 1 --dtype bf16 --device cpu"


def _updates(
    size: str, length: int, mode: str, seconds: float, peers: str = "", profile: bool = False, toy: str = ""
) -> Step:
    """Whole updates of all methods: 32,768 rows of base, 16,384 of large."""
    name = f"step-{size}-{length}-{mode}"
    batch = (16_384 if size == "large" else 32_768) // length
    words = f"step --size {size} --length {length} --batch-size {batch} --compile {mode} {_ROUNDS} {_LATE}"
    words += f" --peers {peers}" + " --profile DIR/profile" * profile
    return Step(name, _measuring(name, words), seconds, toy and _measuring(name, toy))


def _attention(length: int, batch: int, toy: str = "") -> Step:
    name = f"attention-{length}"
    words = f"attention --length {length} --batch-size {batch} --dtype bf16 --runs 5"
    return Step(name, _measuring(name, words), 40, toy and _measuring(name, toy))


def _measuring(name: str, words: str) -> str:
    return f"tools.benchmark {words} --output DIR/{name}"


_PEERS = "'hugging face' 'hugging face compiled, masked head'"
_TOY_STEP = f"step {_TOY} --methods mae-lm --peers 'hugging face' --profile DIR/profile"
_TOY_HEAD = "head --rows 16 --width 8 --vocab-size 32 --runs 1 --threads 1 --device cpu --only logits"
_FAST_HEAD = "head --rows 16384 --dtype bf16 --runs 5"
_TRAINING = "--set train.seq_length=128 train.batch_size=512 train.micro_batch_size=256 train.compile=default"
_TOY_TRAINING = (
    "--configs demo-mlm --vocab-size 600 --set model.hidden_size=32 model.ffn_size=48"
    " train.batch_size=8 budget.device_hours=null budget.steps=20 monitor.log_every=5 evaluate.samples=8"
)
_LARGE_FLOAT8 = "step --size large --length 512 --batch-size 32 --compile default --methods 3ml-query"
_MODERN = "step --size modernbert-base --length 512 --batch-size 64 --compile default --methods"
STEPS = (
    Step("device", "torch.utils.collect_env", 40, "torch.utils.collect_env"),
    Step(
        "tests",
        "pytest tests -m gpu -n 8 -v -p no:cacheprovider -k 'not benchmark'",
        120,
        "pytest tests/run/test_gpu.py -m gpu -v -p no:cacheprovider -k 'not benchmark'",
    ),
    _updates("base", 128, "default", 100, _PEERS, profile=True, toy=_TOY_STEP),
    _updates("large", 512, "default", 110, "'hugging face compiled, masked head'", profile=True),
    Step(
        "training",
        _measuring("training", f"training --seconds 80 {_TRAINING}"),
        190,
        _measuring("training", f"training {_TOY_TRAINING}"),
    ),
    Step(
        "calibrate",
        "tools.calibrate --device cuda --output DIR/plan-gpu.json",
        120,
        "tools.calibrate --device cpu --only 'demo-mlm, 2 ranks' --output DIR/plan-gpu.json",
    ),
    _updates("base", 128, "none", 60),
    _updates("large", 128, "default", 80),
    _updates("base", 512, "default", 70),
    Step("head", _measuring("head", _FAST_HEAD), 60, _measuring("head", _TOY_HEAD)),
    _attention(128, 256, f"attention {_TOY}"),
    _attention(512, 64),
    _updates("base", 128, "reduce-overhead", 80),
    _updates("large", 512, "none", 70),
    Step("step-float8", _measuring("step-float8", f"{_LARGE_FLOAT8} --peers --float8 {_ROUNDS}"), 90),
    Step("step-modernbert", _measuring("step-modernbert", f"{_MODERN} --peers {_PEERS} {_ROUNDS}"), 80),
    _updates("large", 512, "reduce-overhead", 90),
    _updates("base", 512, "none", 60),
    _updates("large", 128, "none", 70),
    Step("optimizer", _measuring("optimizer", "optimizer --batch-size 256 --dtype bf16 --runs 5"), 60),
    Step(
        "memory",
        _measuring("memory", "memory --batch-size 256 --dtype bf16 --methods mlm 3ml-self 3ml-query"),
        60,
    ),
    _updates("base", 128, "max-autotune", 180),
    _updates("large", 512, "max-autotune", 200),
)
"""The most valuable first. Times are of one H200 with 16 cores, estimated: none has been measured."""


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    parser = console.parser("benchmark gpu", "Measure all that a GPU must show, the most valuable first")
    parser.add_argument("--minutes", type=console.positive, default=9.0, help="for all steps (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on a CPU")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="steps whose name holds one of the words"
    )
    args = parser.parse_args(arguments)
    chosen = console.matching((step.name for step in STEPS), args.only)
    document = args.output / "gpu.json"
    outputs.check([document], fields=FIELDS)
    before = _before(document, args.rehearse)
    if not args.rehearse:
        from tools.benchmark.task import chosen_device

        chosen_device("cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    folder, end = args.output.absolute(), time.monotonic() + 60 * args.minutes
    found = {step.name: _unreached(step, args.rehearse) for step in STEPS if not args.rehearse or step.toy}
    found |= {step.name: step for step in before}
    for step in STEPS:
        wanted = step.name in chosen and step.name in found
        if wanted and found[step.name].state == "not reached":
            left = end - time.monotonic()
            if left < MIN_SECONDS:
                break
            found[step.name] = _run(step, folder, min(left, _limit(step, args.rehearse)), args.rehearse)
            outputs.write(document, typed_json.to_json(_report(found, args.rehearse)) + "\n", FIELDS)
            print(_line(found[step.name]), file=sys.stderr, flush=True)
    print(_table(found.values()))
    return int(any(step.state == "failed" for step in found.values()))


def _before(document: Path, rehearse: bool) -> Sequence[StepResult]:
    """The steps of an earlier command, which must be of the same code."""
    if not document.exists():
        return []
    report = typed_json.read(GpuReport, document)
    if (report.commit, report.rehearsed) != (code_revision(), rehearse):
        of = f"{report.commit}, {'a rehearsal' if report.rehearsed else 'on a GPU'}"
        raise UserError(f"{document}: its steps are of {of}; choose another folder")
    return report.steps


def _report(found: dict[str, StepResult], rehearse: bool) -> GpuReport:
    packages = ("torch", "triton", "transformers", "deepspeed", "megatron-core", "liger-kernel", "torchao")
    versions = {package: measure.version(package) for package in packages}
    return GpuReport(code_revision(), rehearse, versions, list(found.values()))


def _unreached(step: Step, rehearse: bool) -> StepResult:
    return StepResult(step.name, f"python -m {step.toy if rehearse else step.words}", "not reached")


def _limit(step: Step, rehearse: bool) -> float:
    """Seconds; a rehearsal is of no speed, on whatever machine."""
    return step.seconds * (10 if rehearse else 1)


def _run(step: Step, folder: Path, limit: float, rehearse: bool) -> StepResult:
    """Run a step for `limit` seconds at most; what it prints goes to a file."""
    result = _unreached(step, rehearse)
    words = [word.replace("DIR/", f"{folder}/") for word in shlex.split(result.command)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if rehearse:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    begin = time.monotonic()
    with (folder / f"{step.name}.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state: Literal["done", "failed", "cut off"] = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if state == "cut off" and limit < _limit(step, rehearse):
        return replace(result, state="not reached")  # another command gives it its whole time
    spent = time.monotonic() - begin
    return replace(result, state=state, seconds=spent, limit=limit, rows=_rows(folder / f"{step.name}.json"))


def _rows(path: Path) -> tuple[BenchmarkRow, ...]:
    """What a step has written, where it measures."""
    return tuple(typed_json.read(list[BenchmarkRow], path)) if path.exists() else ()


def _line(step: StepResult) -> str:
    return f"{step.name}: {step.state} after {step.seconds:.0f} of {step.limit:.0f} s, {len(step.rows)} rows"


def _table(steps: Iterable[StepResult]) -> str:
    table = [("step", "", "s", "rows")]
    for step in steps:
        table.append((step.name, step.state, f"{step.seconds:.0f}", f"{len(step.rows)}"))
    return aligned(table)
