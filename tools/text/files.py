"""Finds the text files that are named: files, folders, patterns, lists, standard input."""

import glob
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pretrain.errors import UserError
from pretrain.files import check_name, named, parse_json
from tools.shared import console

Unit: TypeAlias = Literal["json", "line", "blank-line", "file", "row"]
"""What ends a document: in .jsonl files a line, in tables a row, in .txt files one of the others."""

STDIN = "-"
"""The name of the standard input among the inputs."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_DATASET_STATE = "state.json"
_DATASET_SPLITS = "dataset_dict.json"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files named by `patterns`: files, folders (all they hold), Hugging Face datasets, globs.

    In the order given; what one of them names is sorted. A name that exists is that file or folder, also
    where it could be a pattern. Files of other kinds in a folder are left out, named directly they are an
    error. Left out too: hidden files, .json, and what a job writes.
    """
    files: list[Path] = []
    for pattern in patterns:
        if not pattern.strip():
            raise UserError("--input: an empty name; it takes files, folders, patterns and @lists")
        for match in _matches(pattern):
            path = Path(match)
            files += _folder_files(path) if path.is_dir() else [path]
    for file in files:
        if not file.exists() or file.is_dir():
            raise UserError(f"{file}: no such file; --input takes files, folders, patterns and @lists")
        file_unit(file, "line")
        check_name(str(file.resolve()))
    console.refuse_twice(map(str, files), "file")
    return files


_PART = re.compile("(.*?)([0-9]+)(-of-)([0-9]+)(.*)", re.DOTALL)


def missing_parts(files: Sequence[Path]) -> list[str]:
    """Return a line for each set of files NUMBER-of-COUNT that lacks some, as when a copy was cut short.

    A single file of a set was meant.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for file in files:
        if found := _PART.fullmatch(str(file)):
            before, number, *rest = found.groups()
            sets.setdefault((before, *rest), []).append(int(number))
    lines = []
    for (before, of, count, after), numbers in sets.items():
        first, held = int(0 not in numbers), {*numbers}  # some count from 1
        gone = (str(i) for i in range(first, int(count) + first) if i not in held)
        if len(held) > 1 and (listed := ", ".join(itertools.islice(gone, 5))):
            more = ", ..." if next(gone, None) else ""
            lines.append(
                f"{before}*{of}{count}{after}: {len(held)} of {int(count)} parts; missing: {listed}{more}"
            )
    return lines


def _matches(pattern: str) -> list[str]:
    """Return what a pattern finds, sorted, or itself; as much of it as exists is a name and no pattern."""
    path = Path(pattern)
    exists = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    rest = str(path.relative_to(exists))
    if exists == path:
        return [pattern]
    return sorted(glob.glob(os.path.join(glob.escape(str(exists)), rest), recursive=True)) or [pattern]


def spool_stdin(patterns: Sequence[str], kind: str, folder: Path) -> list[str]:
    """Return `patterns` with STDIN replaced by a file in `folder` that holds the standard input.

    So it can be cut into pieces like any other.
    """
    if STDIN not in patterns:
        return list(patterns)
    spool = folder / f"stdin.{kind}"
    with named(spool), spool.open("wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target, 1 << 20)
    return [str(spool) if pattern == STDIN else pattern for pattern in patterns]


def _folder_files(folder: Path) -> list[Path]:
    if (folder / _DATASET_STATE).is_file():
        return _dataset_files(folder)
    if splits := next(folder.rglob(_DATASET_SPLITS), None):
        raise UserError(f"{splits.parent}: a dataset of several splits; name one: {_splits(splits)}")
    files = sorted(path for path in folder.rglob("*") if _is_searched(path.relative_to(folder)))
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(
            f"{folder}: no .jsonl, .txt, .parquet or .arrow files in this folder (.json: by name or pattern)"
        )
    return files


def _splits(listed: Path) -> str:
    """The folders that Hugging Face's `DatasetDict.save_to_disk` names in a file beside them."""
    _, names = _of_datasets(listed, lambda told: told["splits"])
    return ", ".join(str(listed.with_name(name)) for name in names)


def _is_searched(path: Path) -> bool:
    """Whether a path within a folder is of text.

    A .json beside text is rarely that: corpora and tokenizers have one, and so have datasets. Compressed
    it is text, for nobody packs those.
    """
    *folders, name = path.parts
    hidden = any(part.startswith(".") for part in path.parts)
    ours = name.endswith(".rejected.jsonl") or any(
        part.endswith((".parts", ".parts.done")) for part in folders
    )
    return bool(kind_of(path)) and path.suffix != ".json" and not hidden and not ours


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset written by Hugging Face's `save_to_disk`, in its order."""
    state = folder / _DATASET_STATE
    told, names = _of_datasets(state, lambda told: [file["filename"] for file in told["_data_files"]])
    if told.get("_indices_data_files"):
        raise UserError(f"{folder}: rows are selected by an index; call flatten_indices() and save it again")
    return [folder / name for name in names]


def _of_datasets(path: Path, find: Callable[[Any], Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a JSON file of `datasets` (Hugging Face) says, and the names that `find` has there, of what
    lies beside it; UserError where it says no such names."""
    try:
        told = parse_json(path.read_bytes())
        names = find(told)
        plain = isinstance(names, list) and all(name == os.path.basename(name) != "" for name in names)
    except (ValueError, KeyError, TypeError):
        plain = False
    if not plain:
        raise UserError(f"{path}: not as `datasets` writes it; save the dataset again, or name the files")
    return told, names


def kind_of(path: Path) -> str:
    """Return "json", "txt", "table" or "" for others, from the name."""
    compressed = path.suffix in _COMPRESSED
    suffix = path.with_suffix("").suffix if compressed else path.suffix
    if suffix in JSON_SUFFIXES:
        return "json"
    if suffix in TABLE_SUFFIXES and not compressed:
        return "table"
    return "txt" if suffix == ".txt" else ""


def file_unit(path: Path, txt_unit: Unit) -> Unit:
    """Return how the file is cut into documents, from its name."""
    units: dict[str, Unit] = {"json": "json", "table": "row", "txt": txt_unit}
    if not (kind := kind_of(path)):
        raise UserError(
            f"{path}: unknown kind of file; name it .jsonl or .txt (then .gz, .zst, .bz2 or .xz), .parquet"
            " or .arrow"
        )
    return units[kind]


def is_compressed(path: Path) -> bool:
    """Return whether the file can only be read from its beginning."""
    return path.suffix in _COMPRESSED
