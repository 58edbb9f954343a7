"""How a config is read: files, overrides, one list of all that is wrong.

A config is nested, frozen and strict. Values come from three places, the later over the earlier: the
defaults of `options`, a YAML file, and ``section.key=value`` words from the command line. All problems of a
config are found and reported at once, each as one line in the user's words; an unknown key is an error
that names the nearest known one. The resolved config is what a run folder keeps.

YAML 1.1 guesses. It reads ``1e-4`` as a string, ``1:30`` as 90, ``010`` as 8 and ``yes`` as true,
and pydantic takes true for 1. Here numbers are decimal (1_000, .5 and 1e-4 too), switches are true or false,
and all else is text.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from pretrain.config.checks import contradictions
from pretrain.config.options import SECTIONS, BranchOptions, Config, PhaseOptions, Section, kinds_of
from pretrain.errors import UserError

# What may differ when a run continues: layout, cadence and budget, nothing that changes the samples, the
# masks or the mathematics.
FREE_TO_CHANGE = (
    "run.dir",
    "corpus.train",
    "corpus.alpha",
    "corpus.segment",
    "corpus.valid",
    "corpus.tokenizer",
    "corpus.copies",
    "train.micro_batch_size",
    "train.engine",
    "train.compile",
    "train.cross_entropy",
    "train.recompute",
    "train.deterministic",
    "train.max_skipped",
    "budget",
    "parallel",
    "checkpoint",
    "evaluate",
    "monitor",
    "deepspeed",
)


# ---- reading -------------------------------------------------------------------------------------


_MOST_BYTES = 1 << 20
"""Of a config, and its nodes with all aliases written out."""


class _Loader(yaml.SafeLoader):
    """SafeLoader of the plain forms below, and of no others; refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # Not later: merging (<<) puts keys into a mapping that its own keys replace.
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{key[1]!r} is given twice (line {node.start_mark.line + 1})")
        return node


_DIGITS = "[0-9]+(?:_[0-9]+)*"
_PLAIN = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": f"[-+]?{_DIGITS}",
    "float": rf"[-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
    "merge": "<<",
}
for _kind, _form in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many nodes there are with all aliases written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        parts += node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the YAML mapping in `path`, UserError if there is none."""
    try:
        if Path(path).stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES:,} bytes")
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node and _size(node, {}) > _MOST_BYTES:
            raise ValueError("its aliases stand for too much")
        value = loader.construct_document(node) if node else None
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror}); check the path") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; keep one of them") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value or {}, dict):
        raise UserError(f"{path}: expected sections (run:, corpus:, ...), found {type(value).__name__}")
    return value or {}


def parse_overrides(words: list[str]) -> dict[str, dict[str, Any]]:
    """Parse ``["train.batch_size=8"]`` into ``{"train": {"batch_size": 8}}``; deeper keys nest
    (deepspeed.a.b=1)."""
    tree: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or "." not in path:
            raise UserError(f"{word!r}: an override is written section.key=value")
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{word!r}: {parent} has a value already; keep one of the two overrides")
        try:
            node[leaf] = _given(path, text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"{word!r}: the value is not YAML; quote it") from None
    return tree


def _given(path: str, text: str) -> Any:
    """Return the value of an override: YAML if it begins as a list, a mapping or in quotes, else its text."""
    loader = _Loader(text)
    if text.lstrip()[:1] in ("[", "{", "'", '"'):
        node = loader.get_single_node()
        assert node
        if text[node.end_mark.index :].strip():  # which YAML may take for a comment
            raise ValueError(text)
        return loader.construct_document(node)
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    section, _, key = path.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    named = field is not None and str in kinds_of(field.annotation)
    if tag.endswith(":str") or (named and not tag.endswith(":null")):
        return text
    return loader.construct_document(yaml.ScalarNode(tag, text.strip()))


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads, overrides, checks and completes a config; UserError lists every problem, one a line."""
    overrides = overrides or []
    tree = merge(read_yaml(path), parse_overrides(overrides))
    return build_config(tree, str(path), [word.partition("=")[0] for word in overrides])


def build_config(tree: dict[str, Any], where: str = "config", overridden: Sequence[str] = ()) -> Config:
    """Return a checked and completed Config from nested dicts; UserError lists every problem, one a line.

    A problem that names an `overridden` key is said to be of the command line, any other of `where`.
    """
    found: list[str] = []
    tree = _with_phases(tree, found)
    sections: dict[str, Any] = {}
    for name in tree.keys() - Config.model_fields.keys():
        found.append(f"unknown section {name!r}{_nearest(name, list(Config.model_fields))}")
    for name, kind in SECTIONS.items():
        sections[name] = _section(name, kind, tree.get(name), found)
    if not isinstance(tree.get("deepspeed", {}), dict):
        found.append("deepspeed: expected a mapping of DeepSpeed's own keys")
    found += _doubtful("deepspeed", tree.get("deepspeed"))
    config = Config.model_construct(**sections, deepspeed=tree.get("deepspeed") or {})
    found += contradictions(config)
    if found:
        raise UserError("\n".join(f"{_origin(problem, where, overridden)}: {problem}" for problem in found))
    return _complete(config)


_MOST_STEPS = 1000
"""Of a masking rate that changes: phases that a config is made to hold."""


def _with_phases(tree: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """Return the tree with a `masking.rate` that falls, or rises, written out as phases."""
    masking, train = tree.get("masking"), tree.get("train") or {}
    if not (isinstance(masking, dict) and isinstance(masking.get("rate"), dict) and isinstance(train, dict)):
        return tree
    ramp = masking["rate"]
    first, last, steps = (ramp.get(name) for name in ("from", "to", "steps"))
    if train.get("phases"):
        found.append(f"masking.rate = {ramp}: train.phases are given too; keep one of them")
    elif (
        len(ramp) != 3
        or not all(type(value) in (int, float) for value in (first, last))
        or type(steps) is not int
        or not 2 <= steps <= _MOST_STEPS
    ):
        found.append(f"masking.rate = {ramp}: should be {{from: 0.5, to: 0.15, steps: 8}}")
    else:
        rates = [round(first + (last - first) * index / (steps - 1), 6) for index in range(steps - 1)]
        phases = [{"until": (index + 1) / steps, "rate": rate} for index, rate in enumerate(rates)]
        return {**tree, "masking": {**masking, "rate": last}, "train": {**train, "phases": phases}}
    return {**tree, "masking": {**masking, "rate": None}}


def _doubtful(path: str, given: Any) -> Iterator[str]:
    """What DeepSpeed would take for true, whatever it says: nobody checks the kinds of its keys."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from _doubtful(f"{path}.{key}", value)
    elif isinstance(given, str) and given.lower() in ("yes", "no", "on", "off", "y", "n"):
        yield f"{path} = {given!r}: should be true or false"


def _origin(problem: str, where: str, overridden: Sequence[str]) -> str:
    sections = [f"unknown section {key.partition('.')[0]!r}" for key in overridden]
    return "command line" if any(word in problem for word in [*overridden, *sections]) else where


def _section(name: str, kind: type[Section], given: Any, found: list[str]) -> Section:
    """Validates one section; notes problems in `found` and goes on with what is good.

    A null is as good as no value: it asks for the default.
    """
    if given is None:
        given = {}
    if not isinstance(given, dict):
        found.append(f"{name}: expected keys ({', '.join(list(kind.model_fields)[:3])}, ...)")
        given = {}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        bad = set()
        for item in error.errors():
            bad.add(item["loc"][0])
            found.append(_problem(name, kind, item))
        # Lists may hold sections of their own, which nobody has made of them yet.
        good = {k: value for k, value in given.items() if k not in bad and not isinstance(value, list)}
        return kind.model_construct(_fields_set=set(given), **good)


_INNER: dict[Any, type[Section]] = {"phases": PhaseOptions, "branch": BranchOptions}
"""Sections that are values of a key."""


def _problem(name: str, kind: type[Section], item: Any) -> str:
    key = ".".join([name, *(str(part) for part in item["loc"])])
    inner = len(item["loc"]) > 1
    if item["type"] == "extra_forbidden":
        known, prefix = (
            (list(_INNER[item["loc"][0]].model_fields), "")
            if inner
            else (list(kind.model_fields), f"{name}.")
        )
        return f"unknown key {key}{_nearest(str(item['loc'][-1]), known, prefix)}"
    if item["type"] == "missing" and not inner:
        return f"{key} is missing; set it ({kind.model_fields[str(item['loc'][0])].description})"
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):  # a list that is too short
        whole = f"{name}.{item['loc'][0]}"
        return f"{whole} = {item['input']!r}: {kind.model_fields[str(item['loc'][0])].description}"
    text = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key} = {item['input']!r}: {text}"


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(known)}"


def _complete(config: Config) -> Config:
    """Fills the defaults that depend on other keys."""
    model, modern = config.model, config.model.block == "modern"
    update = {
        "norm": model.norm or ("pre" if modern else "post"),
        "decoder_dropout": model.dropout if model.decoder_dropout is None else model.decoder_dropout,
        "token_type": model.token_type or (model.init_from is not None and not modern),
    }
    return config.model_copy(update={"model": model.model_copy(update=update)})


def dump_config(config: Config) -> str:
    """Return the config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return ``section.key: old -> new`` for each difference that a continued run must not have."""
    before, after, found = old.model_dump(mode="json"), new.model_dump(mode="json"), []
    for section in before:
        if section in FREE_TO_CHANGE:
            continue
        for key in before[section]:
            old_value, new_value = before[section][key], after[section][key]
            if old_value != new_value and f"{section}.{key}" not in FREE_TO_CHANGE:
                found.append(f"{section}.{key}: {old_value} -> {new_value}")
    return found
