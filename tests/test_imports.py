"""Imports point downwards, and each giant is imported where its name says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"config", "schedule", "devices", "flops", "memory", "traffic", "rng", "energy", "word_cache", "signals"},
    {
        "tokenizer",
        "corpus",
        "sampler",
        "masking",
        "costs",
        "model",
        "loss",
        "loss_scale",
        "float8",
        "optimizer",
    },
    {"topology", "tensor_parallel", "engine", "checkpoint", "huggingface"},
    {"ledger", "budget", "evaluate", "monitor"},
    {"train", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Edges inside a layer: importer -> imported.
ALLOWED = {
    ("flops", "config"),
    ("flops", "devices"),
    ("memory", "config"),
    ("memory", "flops"),
    ("traffic", "config"),
    ("traffic", "flops"),
    ("traffic", "memory"),
    ("traffic", "devices"),
    ("sampler", "corpus"),
    ("costs", "masking"),
    ("model", "loss"),
    ("float8", "model"),
    ("tensor_parallel", "topology"),
    ("engine", "tensor_parallel"),
    ("engine", "topology"),
    ("checkpoint", "engine"),
    ("budget", "ledger"),
    ("__main__", "train"),
}
HOMES = {
    "torch": None,  # checked apart: the corpus path must not wait for it
    "megatron": {
        "pretrain/topology.py",
        "pretrain/tensor_parallel.py",
        "tools/benchmark_corpus.py",
        "tools/benchmark_peers.py",
    },
    "deepspeed": {"pretrain/engine.py"},
    "sentencepiece": {"pretrain/tokenizer.py", "tools/benchmark_corpus.py"},  # as a peer
    "pynvml": {"pretrain/energy.py"},
    "liger_kernel": {"pretrain/loss.py"},
    "torchao": {"pretrain/float8.py"},
    "mpi4py": {"pretrain/topology.py", "tools/encode_corpus.py"},
}
WITHOUT_TORCH = {
    *("config", "flops", "devices", "memory", "traffic", "schedule", "rng", "word_cache", "masking", "costs"),
    *("tokenizer", "corpus"),
}


def imports(path):
    """Every module that a file imports, also inside functions; blocks for type checkers are left out."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def modules():
    return sorted((ROOT / "pretrain").glob("*.py"))


def test_every_module_has_a_layer():
    assert {path.stem for path in modules()} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_point_down(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("tools", "slurm", "tests"):
            pytest.fail(f"{path.stem} imports {name}")
        if parts[0] != "pretrain" or len(parts) < 2 or parts[1] not in LEVEL or path.stem == "__init__":
            continue
        lower = LEVEL[parts[1]] < LEVEL[path.stem]
        assert lower or (path.stem, parts[1]) in ALLOWED, f"{path.stem} imports {parts[1]}"


@pytest.mark.parametrize("giant", [name for name, homes in HOMES.items() if homes])
def test_giants_stay_at_home(giant):
    programs = [*modules(), *(ROOT / "tools").glob("*.py"), *(ROOT / "slurm").glob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in programs
        if any(name.split(".")[0] == giant for name in imports(path))
    }
    assert found <= HOMES[giant]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_the_corpus_path_does_not_wait_for_torch(name):
    found = imports(ROOT / "pretrain" / f"{name}.py")
    assert not any(module.split(".")[0] == "torch" for module in found)
    below = {module.split(".")[1] for module in found if module.startswith("pretrain.")}
    assert below & set(LEVEL) <= WITHOUT_TORCH
