"""One GPU against the CPU: the same run, the same losses. ``python -m pytest tests -m gpu -n 8``."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.runs import losses
from tools.benchmark import __main__ as benchmark
from tools.benchmark.peers import PEERS
from tools.benchmark.task import RATE, BenchmarkTask, ours
from tools.shared import measure

ROOT = Path(__file__).parents[2]
QUERY = ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEEPSPEED = ("train.engine=deepspeed", "train.precision=bf16")
VARIANTS = {
    "fp32": ("train.precision=fp32",),
    "bf16": ("train.precision=bf16",),
    "fp16": ("train.precision=fp16",),
    "fp16, zero-1": ("train.engine=deepspeed", "train.precision=fp16", "parallel.zero=1"),
    "bounded, by mask": ("train.precision=fp32",),
    "bounded, by stretches": ("train.precision=bf16",),
    "recompute": ("train.precision=fp32", "train.recompute=block"),
    "compile": ("train.precision=bf16", "train.compile=default"),
    "max-autotune": ("train.precision=bf16", "train.compile=max-autotune"),
    **(
        {"float8": ("train.precision=bf16", "train.float8=true", "train.compile=default")}
        if find_spec("torchao") and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
        else {}
    ),
    "graphs": ("train.precision=bf16", "train.compile=reduce-overhead"),
    "graphs, accumulated": (
        "train.precision=bf16",
        "train.compile=reduce-overhead",
        "train.micro_batch_size=2",
    ),
    **{
        name: ("train.precision=bf16", f"train.cross_entropy={name}")
        for name, here in (
            ("torch", hasattr(F, "linear_cross_entropy")),
            ("liger", find_spec("liger_kernel")),
        )
        if here
    },
    **{f"zero-{stage}": (*DEEPSPEED, f"parallel.zero={stage}") for stage in range(4)},
    "offload": (*DEEPSPEED, "parallel.zero=2", "parallel.offload=optimizer"),
}


Losses = list[tuple[int, float | None, float | None, float | None]]


def train(words: list[str], gpu: bool) -> Losses:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not gpu:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pretrain", *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir=")
    return losses(Path(run))


@pytest.fixture(scope="session")
def of_cpu(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Losses]:
    """``of_cpu("key=value")``: the losses of the CPU, of one run for all tests of a process."""

    @cache
    def run(*overrides: str) -> Losses:
        folder = tmp_path_factory.mktemp("cpu") / "run"
        words = [str(tiny / "tiny.yaml"), f"run.dir={folder}", *QUERY, *overrides, "train.precision=fp32"]
        return train(words, gpu=False)

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_losses_of_the_cpu(
    variant: str, words: Callable[..., list[str]], of_cpu: Callable[..., Losses]
) -> None:
    bounded = ("corpus.documents=bounded",) if "bounded" in variant else ()
    expected = of_cpu(*bounded)
    found = train(words("gpu", *QUERY, *bounded, *VARIANTS[variant]), gpu=True)
    tolerance = 1e-4 if "train.precision=fp32" in VARIANTS[variant] else 2e-2
    assert [line[0] for line in found] == [line[0] for line in expected]
    for (_, loss, held_out, _), (_, its_loss, its_held_out, _) in zip(found, expected, strict=True):
        for value, other in ((loss, its_loss), (held_out, its_held_out)):
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=tolerance)


def test_graphs_change_nothing(words: Callable[..., list[str]]) -> None:
    """A loss or a gradient that a replay overwrote would show."""
    same = (*QUERY, "train.precision=bf16", "train.micro_batch_size=2")
    expected = train(words("default", *same, "train.compile=default"), gpu=True)
    found = train(words("graphs", *same, "train.compile=reduce-overhead"), gpu=True)
    for line, its in zip(found, expected, strict=True):
        assert line[:3] == pytest.approx(its[:3], rel=1e-4)


def test_a_deterministic_run_repeats_to_the_bit(words: Callable[..., list[str]]) -> None:
    exact = (*QUERY, "train.deterministic=true", "train.precision=bf16")
    assert train(words("once", *exact), gpu=True) == train(words("again", *exact), gpu=True)


@pytest.mark.parametrize("engine", [("train.engine=torch",), (*DEEPSPEED, "parallel.zero=1")])
def test_a_run_that_goes_on_repeats_the_bits_of_an_undisturbed_one(
    engine: tuple[str, ...], words: Callable[..., list[str]]
) -> None:
    exact = (*QUERY, *engine, "train.deterministic=true", "train.precision=bf16")
    exact += ("schedule.warmup=0", "schedule.floor=1")  # the rate does not depend on the budget
    whole = train(words("whole", *exact), gpu=True)
    train(words("parts", *exact, "budget.steps=3"), gpu=True)
    assert train(words("parts", *exact), gpu=True) == whole


def test_no_micro_batch_or_update_waits_for_the_device() -> None:
    """Forward and backward pass, clipping and AdamW of every method."""
    task = BenchmarkTask("tiny", 24, 4, "bf16", torch.device("cuda"))
    for method in RATE:
        update = ours(task, method)
        update()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("subject", ["step", "head", "attention", "memory", "optimizer"])
def test_a_benchmark_has_all_its_rows(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's BertModel and Trainer among them."""
    tiny = ["--size", "tiny", "--length", "32"]
    words = ["--rows", "64", "--width", "32", "--vocab-size", "128"] if subject == "head" else tiny
    assert benchmark.main([subject, *words, "--runs", "1", "--dtype", "bf16", "--json"]) == 0
    names = " ".join(row["name"] for row in json.loads(capsys.readouterr().out))
    if subject == "step":
        installed = [name for name in PEERS if measure.version(PEERS[name][1][-1]) != "absent"]
        assert "megatron-core" in installed and all(f"against {name}," in names for name in installed)
