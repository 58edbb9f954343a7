"""What the pages tell people to type, typed: in order, on the sample corpus, at reduced width."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools import demo

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tools" / "sample"

# What makes the commands quick and feeds them the sample; nothing else of them is changed.
REPLACED = {"text/*.jsonl.gz": str(SAMPLE / "*.jsonl.gz"), "32000": "700", "0.005": "0.1"}
REPLACED |= {f"tools/sample/{name}": str(SAMPLE / name) for name in ("pairs.jsonl", "labels")}
SMALL = [
    "model.num_layers=2",
    "model.mask_from=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn_size=48",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.seq_length=32",
    "train.engine=torch",
    "parallel.zero=0",
    "budget.steps=3",
    "evaluate.samples=8",
]


PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for room in ("*", "tools/*") for page in ROOT.glob(f"{room}/README.md"))]
)


def commands(section):
    """The fenced command lines of a section of whichever page has it."""
    (text,) = [
        text
        for page in PAGES
        if re.search(rf"^##? {section}$", text := page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    body = re.split(rf"^##? {section}$", text, flags=re.MULTILINE)[1]
    body = re.split(r"^## ", body, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


BRIEF = {
    "pretrain": SMALL,
    "demo": ["model.hidden_size=32", "budget.flops=null", "budget.steps=2", "evaluate.samples=4"],
    "tools.analyze": ["--tokens", "500", "--texts", "3"],
}


def run(command, folder):
    words = [REPLACED.get(word, word) for word in shlex.split(command)]
    assert words[0] == "python"
    words += BRIEF["demo"] if words[3].startswith("configs/demo") else BRIEF.get(words[2], [])
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def test_quick_start_by_hand(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = [line for line in commands("Quick start") if line.startswith("python -m")]
    assert len(lines) >= 8
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    assert (tmp_path / "report" / "report.html").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [
        line.split()[1]
        for part in ("Quick start", "Tests")
        for line in commands(part)
        if line.startswith("make ")
    ]
    assert {"demo", "test", "lint"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_demo_in_a_short_form_twice(tmp_path):
    """All steps, from raw text to two exports and a report; the second time everything is there already.

    Then what the README does with the demo's runs.
    """
    short = (
        "budget.flops=3e9 model.hidden_size=32 model.ffn_size=48 evaluate.samples=16 evaluate.every_steps=50"
    )
    for _ in range(2):
        done = run(f"python -m tools.demo --home {tmp_path / 'runs'} {short}", ROOT)
    for name in demo.RUNS:
        assert (tmp_path / "runs" / name / "export" / "model.safetensors").exists()
        assert (tmp_path / "runs" / name / "status.json").exists()
    assert (tmp_path / "runs" / "demo-report" / "loss.png").exists()
    assert done.stdout.count("done before") == 3 and "%" in done.stdout
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in commands("Recipes: the methods and their options"):
        run(line, tmp_path)
    assert (tmp_path / "analysis" / "rank.png").exists()
    assert (tmp_path / "analysis" / "variance.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    paths = re.findall(r"\]\(((?!https?:)[^)#\s]+)[)#]", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (page.parent / path).exists()] == []


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_the_map_names_every_room_and_program():
    text = re.split(r"^## Map$", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)[1]
    rooms = [path for package in ("pretrain", "tools") for path in (ROOT / package).glob("[!_]*")]
    for path in rooms:
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert re.search(rf"\b{path.stem}\b", text), path
