"""Names that say one thing: each class once, a config is config, no section is a letter, and the words are
the field's own."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from pretrain.config import SECTIONS
from tests.repository.test_imports import MODULES

ROOT = Path(__file__).parents[2]
FILES = [path for room in ("pretrain", "tools", "slurm") for path in sorted((ROOT / room).rglob("*.py"))]
ALONE = (
    ROOT / "tools" / "export" / "modeling_latemask.py"
)  # travels with an export: it imports nothing of ours


def test_each_class_has_a_name_of_its_own() -> None:
    homes = defaultdict(list)
    for path in FILES:
        if path != ALONE:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


TYPED = {"Config": "config", "Namespace": "args", "argparse.Namespace": "args", "Recipe": "recipe"}
OTHERS = {
    "argparse.Namespace": {"encoding"},
    "Config": {"old", "new", "other", "encoding", "planned", "one", "phase", "resolved", "before", "after"},
}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_what_is_a_config_is_called_so(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.arg) and node.annotation:
            kind = ast.unparse(node.annotation)
            if kind in TYPED and node.arg not in {TYPED[kind], *OTHERS.get(kind, ())}:
                found.append(f"{node.arg}: {kind}, line {node.lineno}")
    assert not found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_section_of_a_config_is_called_by_its_name(path: Path) -> None:
    """Only the model's own code has `m` for its options, all over."""
    if path.is_relative_to(ROOT / "pretrain" / "model"):
        return
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            for name, one in zip(names, values, strict=False):
                of_a_section = isinstance(one, ast.Attribute) and one.attr in SECTIONS
                if of_a_section and len(ast.unparse(name)) == 1:
                    found.append(f"{ast.unparse(name)} = {ast.unparse(one)}, line {node.lineno}")
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_module_that_is_named_exists(path: Path) -> None:
    """In comments and docstrings too, where what was moved or renamed is easily forgotten."""
    found = []
    for name in re.findall(
        r"(?<![\w./@-])(?:pretrain|tools|slurm)(?:\.\w+)+", path.read_text(encoding="utf-8")
    ):
        parts = name.split(".")
        known = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES)
        home = MODULES[".".join(parts[:known])].read_text(encoding="utf-8")
        if known < len(parts) and not re.search(rf"\b{parts[known]}\b", home):
            found.append(name)
    assert found == []


TRANSLATED = {
    "asking": "query_starts",
    "asked": "key_starts",
    "same_B1ST": "mask_B1ST",
    "stretches": "phases, or varlen",
    "hopeless": "scale_exhausted",
    "untold": "no_progress",
    "untils": "phase_ends",
    "doubted": "with_margin",
    "sent_back": "was_requeued",
    "mend": "truncate_torn_line",
    "beat": "heartbeat",
    "keep_beating": "start_heartbeat",
    "meet": "check_together",
    "look": "check_alone",
    "fruitless": "failed_attempts",
    "obey": "apply_verdict",
    "judge": "verdict",
    "blame": "bad_nodes",
    "MOST": "what there is most of: MAX_DEVICES",
    "LEAST": "what there is least of: MIN_SCALE",
    "FEW": "what there are few of: NODE_COUNTS",
    "PATIENCE": "how long for what: NOTE_TIMEOUT_S",
}
"""Names that a reader who knows PyTorch, Megatron and Slurm would have to translate, and the field's own."""


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_names_are_the_fields_own(path: Path) -> None:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "name", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
        name = node.id if isinstance(node, ast.Name) else name
        if isinstance(name, str) and name.strip("_") in TRANSLATED:
            found.add(f"{name}: say {TRANSLATED[name.strip('_')]}")
    assert not found


NOUNS = {
    "the",
    "a",
    "an",
    "what",
    "how",
    "whether",
    "which",
    "where",
    "why",
    "usererror",
    "every",
    "each",
    "all",
}
NOUNS |= {
    "one",
    "those",
    "our",
    "ours",
    "their",
    "of",
    "for",
    "by",
    "from",
    "as",
    "with",
    "in",
    "at",
    "until",
}
"""Words by which a docstring begins with a thing and not with what the function does."""


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_docstring_says_what_the_function_does(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            words = (ast.get_docstring(node) or "").lower().split()
            a_property = any("property" in ast.unparse(one) for one in node.decorator_list)
            if not a_property and words and words[0].rstrip(",;:") in NOUNS:
                found.append(f"{node.name}, line {node.lineno}")
    assert found == []
