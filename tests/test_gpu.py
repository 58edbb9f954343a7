"""One GPU against the CPU: the same run, the same losses. ``python -m pytest -m gpu``."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runs import losses

ROOT = Path(__file__).parent.parent
QUERY = ("model.mask_from=2", "model.decoder_layers=2", "model.decoder=query")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEEPSPEED = ("train.engine=deepspeed", "train.precision=bf16")
VARIANTS = {
    "fp32": ("train.precision=fp32",),
    "bf16": ("train.precision=bf16",),
    "recompute": ("train.precision=fp32", "train.recompute=block"),
    "compile": ("train.precision=bf16", "train.compile=default"),
    "max-autotune": ("train.precision=bf16", "train.compile=max-autotune"),
    **{f"zero-{stage}": (*DEEPSPEED, f"parallel.zero={stage}") for stage in range(4)},
    "offload": (*DEEPSPEED, "parallel.zero=2", "parallel.offload=optimizer"),
}


def train(words: list[str], gpu: bool) -> list[tuple[int, float | None, float | None, float | None]]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not gpu:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pretrain", *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir=")
    return losses(Path(run))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_losses_of_the_cpu(variant: str, words: Callable[..., list[str]]) -> None:
    expected = train(words("cpu", *QUERY, "train.precision=fp32"), gpu=False)
    found = train(words("gpu", *QUERY, *VARIANTS[variant]), gpu=True)
    tolerance = 1e-4 if "train.precision=fp32" in VARIANTS[variant] else 2e-2
    assert [line[0] for line in found] == [line[0] for line in expected]
    for (_, loss, held_out, _), (_, its_loss, its_held_out, _) in zip(found, expected, strict=True):
        for value, other in ((loss, its_loss), (held_out, its_held_out)):
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=tolerance)


def test_a_deterministic_run_repeats_to_the_bit(words: Callable[..., list[str]]) -> None:
    exact = (*QUERY, "train.deterministic=true", "train.precision=bf16")
    assert train(words("once", *exact), gpu=True) == train(words("again", *exact), gpu=True)
