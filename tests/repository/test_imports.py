"""One import law for all packages: what a room may know of the others. There are no exceptions."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a room imports from rooms below it, and from its own.
LAW = [
    ("errors", "terminal"),
    ("files",),
    ("streams",),
    ("signals",),
    ("provenance", "tracker"),
    ("config",),
    ("data",),
    ("account",),
    ("model",),
    ("parallel",),
    ("checkpoint", "run_folder", "evaluate", "monitor", "feed"),
    ("watchdog",),
    ("continuing", "inputs"),
    ("start",),
    ("build",),
    ("decision", "replay"),
    ("train",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(LAW) for room in rooms}
# The large libraries, and where they live.
HOMES = {
    "megatron": {
        "pretrain/parallel/topology.py",
        "pretrain/parallel/tensor_parallel.py",
        "tools/benchmark/corpus.py",
        "tools/benchmark/peers.py",
    },
    "deepspeed": {"pretrain/parallel/deepspeed_engine.py"},
    "sentencepiece": {"pretrain/data/tokenizer.py", "tools/benchmark/corpus.py"},  # as a peer
    "pynvml": {"pretrain/account/energy.py"},
    "liger_kernel": {"pretrain/model/loss.py"},
    "torchao": {"pretrain/model/float8.py"},
    "mpi4py": {"pretrain/parallel/launchers.py", "tools/encode_corpus/ranks.py"},
}


def name_of(path: Path) -> str:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return module.removesuffix(".__init__")


MODULES = {
    name_of(path): path
    for package in ("pretrain", "tools", "slurm")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
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
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inside}
    return found


OURS = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}


def may_import(module: str, other: str) -> bool:
    """Whether the law lets `module` import `other`."""
    package, target = module.split(".")[0], other.split(".")[0]
    if package != target:
        return (package, target) in {("tools", "pretrain"), ("slurm", "pretrain"), ("slurm", "tools")}
    room, below = (name.split(".")[1] if "." in name else "errors" for name in (module, other))
    if package == "pretrain":
        return FLOOR[below] < FLOOR[room] or room == below or FLOOR[below] == FLOOR[room]
    if package == "tools" and room in ("shared", "text"):
        return below in ("shared", "text", "errors", "terminal")
    return package != "tools" or below != "benchmark" or room == "benchmark"  # which knows all others


def test_every_room_has_a_floor():
    rooms = {name.split(".")[1] for name in MODULES if name.startswith("pretrain.")}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    wrong = [other for other in OURS[module] if not may_import(module, other)]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_no_module_imports_itself_by_way_of_others():
    left = dict(OURS)
    while leaves := [name for name, others in left.items() if not (others & left.keys()) - {name}]:
        for name in leaves:
            del left[name]
    assert not left, f"in a circle: {', '.join(sorted(left))}"


@pytest.mark.parametrize("giant", HOMES)
def test_giants_stay_at_home(giant):
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if any(name.split(".")[0] == giant for name in imports(path))
    }
    assert found <= HOMES[giant]


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_modules_are_imported_by_name_alone(path):
    """A module that is named by a string escapes this law and every reader's search."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    assert not [call for call in calls if ast.unparse(call.func) in ("importlib.import_module", "__import__")]


WITHOUT_TORCH = [
    "pretrain.config",
    "pretrain.data",
    "pretrain.account",
    "pretrain.checkpoint",
    "pretrain.run_folder",
    "pretrain.continuing",
    "tools.text",
    "tools.plan",
    "tools.report",
    "tools.ledger",
    "tools.encode_corpus",
    "tools.inspect_corpus",
    "tools.verify_corpus",
    "tools.merge_corpus",
    "tools.train_tokenizer",
    "tools.import_fairseq",
    "tools.minimal_pairs",
    "tools.probe",
    "tools.finetune.__main__",
    "slurm.submit",
    "slurm.attempts",
    "slurm.status",
]


def starts_with(path: Path) -> set[str]:
    """What is imported when the file is: not what its functions import, nor what type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = set()
    for node in lines:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inside}
    return found


def started_by(room: str) -> Iterator[str]:
    """Yield what is imported when a program starts, by its own modules and by all that they import."""
    todo = [name for name in MODULES if name == room or name.startswith(f"{room}.")]
    assert todo
    seen = set(todo)
    while todo:
        for name in starts_with(MODULES[todo.pop()]):
            yield name
            if name in MODULES and name not in seen:
                seen.add(name)
                todo.append(name)


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_need_not_compute_starts_without_torch(room):
    for name in started_by(room):
        assert name.split(".")[0] not in ("torch", "transformers", "deepspeed"), f"{room} waits for {name}"


CORPUS_PROGRAMS = [f"tools.{name}_corpus" for name in ("encode", "verify", "inspect", "merge")]


@pytest.mark.parametrize("room", [*CORPUS_PROGRAMS, "tools.train_tokenizer", "tools.import_fairseq"])
def test_a_dataset_needs_the_packages_that_the_readme_names(room):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"grep -E '\^\(([a-z|]+)\)==' requirements.txt", page)
    packages = {"yaml" if word == "pyyaml" else word for word in words.split("|")}
    names = {name.split(".")[0] for name in started_by(room)}
    assert names - packages <= {*sys.stdlib_module_names, "pretrain", "tools"}
