"""Repeats the proof that nothing of the inputs of a corpus was lost, as far as they are still there.

The manifest says how far each input was read, and how many documents and rejected lines it gave
(`tools.encode_corpus`). Of an input that has not changed since, the end is looked for again.
"""

from pathlib import Path
from typing import Any

from pretrain.data.indexed import corpus_file
from pretrain.data.manifest import InputFile, Manifest
from pretrain.errors import UserError
from tools.text.compression import decompressed
from tools.text.files import STDIN, file_unit, is_compressed
from tools.text.readers import cut

_CHUNK = 4 << 20


def check_coverage(prefix: str, manifest: Manifest) -> dict[str, Any] | None:
    """Return how many inputs were covered, and which are gone or changed since; None if nobody noted it.

    UserError where the manifest contradicts itself or an input.
    """
    noted = manifest.history.get("coverage")
    if noted is None:
        return None
    path = corpus_file(prefix, "json")
    if len(noted) != len(manifest.inputs):
        raise UserError(f"{path}: {len(manifest.inputs)} inputs, but {len(noted)} were read; encode again")
    _check_totals(path, manifest)
    found: dict[str, Any] = {"covered": 0, "changed": [], "gone": []}
    for entry, file in zip(noted, manifest.inputs, strict=True):
        state = _state(entry, file)
        if state != "covered":
            found[state].append(file.path)
            continue
        if (end := end_of(Path(file.path))) != entry["end"]:
            raise UserError(
                f"{path}: {entry['end']} of {file.path} was read, which ends at {end}; encode again"
            )
        found["covered"] += 1
    return found


def _check_totals(path: Path, manifest: Manifest) -> None:
    history = manifest.history
    kept = history.get("kept")
    if kept is None:  # of the first corpora that had their coverage
        return
    if kept["here"] != manifest.documents:
        raise UserError(f"{path}: {manifest.documents} documents, not the {kept['here']} kept; encode again")
    for name in ("read", "rejected"):
        total = sum(entry[name] for entry in history["coverage"])
        said = history["rejected"]
        if name == "read":
            said += kept["here"] + kept["elsewhere"] + history.get("duplicates", 0)
        if total != said:
            raise UserError(f"{path}: {total} {name} of the inputs, {said} in all; encode again")


def _state(entry: dict[str, int], file: InputFile) -> str:
    path = Path(file.path)
    if file.path == STDIN or not path.is_file():
        return "gone"
    about = path.stat()
    same = (about.st_size, about.st_mtime_ns) == (file.bytes, entry["modified_ns"])
    return "covered" if same else "changed"


def end_of(path: Path) -> int:
    """Return the offset where an input ends: bytes of text, decompressed, or groups of rows."""
    if file_unit(path, "line") == "row":
        return cut(path, "line", 1).pieces or 0
    if not is_compressed(path):
        return path.stat().st_size
    total = 0
    with path.open("rb") as raw, decompressed(path, raw) as file:
        while data := file.read(_CHUNK):
            total += len(data)
    return total


def describe_coverage(found: dict[str, Any] | None) -> list[str]:
    """Return lines that say how many inputs were read to their end, and which cannot be looked at."""
    if found is None:
        return []
    lines = [f"inputs read from the first byte to the last: {found['covered']:,}"]
    for name, why in (("changed", "changed since"), ("gone", "no longer there")):
        if files := found[name]:
            lines.append(f"inputs {why}: {', '.join(files[:5])}{' ...' if files[5:] else ''}")
    return lines
