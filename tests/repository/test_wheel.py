"""What is installed from a wheel runs from anywhere, and knows what the checkout knows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tools" / "sample" / "valid.jsonl.gz"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel's packages were installed into; their requirements are this environment's."""
    home = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = home / "source"
    for package in ("pretrain", "tools", "slurm"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(home / "site"), str(wheel)], check=True)
    return home


def program(home: Path, *words: str) -> str:
    """Runs ``python -m WORDS`` in another folder, with the installed packages alone."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(home / "site"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=home,
        env=environ,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_makes_a_corpus_and_trains_on_it(installed: Path) -> None:
    program(
        installed, "tools.train_tokenizer", "--input", str(SAMPLE), "--output", "tok", "--vocab-size", "700"
    )
    program(
        installed, "tools.encode_corpus", "--input", str(SAMPLE), "--tokenizer", "tok", "--output", "data"
    )
    small = ["model.num_layers=1", "model.mask_from=1", "model.hidden_size=32", "model.num_heads=2"]
    small += ["model.ffn_size=48", "train.batch_size=4", "train.seq_length=32", "budget.flops=null"]
    config = str(ROOT / "configs" / "demo-3ml.yaml")
    corpus = ["corpus.train=data", "corpus.valid=data", "corpus.tokenizer=tok", "evaluate.samples=8"]
    program(installed, "pretrain", config, *small, *corpus, "budget.steps=2", "run.dir=run")
    assert json.loads((installed / "run" / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


def test_a_wheel_has_what_the_planner_was_told_of_devices(installed: Path) -> None:
    name = json.loads((ROOT / "tools" / "plan" / "plan-cpu.json").read_text(encoding="utf-8"))["device"][
        "name"
    ]
    words = ["tools.plan", str(ROOT / "configs" / "mlm-base.yaml"), "--device", name, "--json"]
    words += ["train.precision=fp32", "train.micro_batch_size=1", "parallel.zero=0"]
    (plan,) = json.loads(program(installed, *words))
    assert plan["achieved_from"] == "measured"
