"""RUN/slurm/journal.jsonl: what happened to the jobs of a run, in order.

submit  a job was put into the queue (by a person, or by its predecessor where requeueing is forbidden)
begin   an attempt started on nodes, at the newest checkpoint's step
end     how it ended, and what follows: `done`, `again` or `stop`
exit    a job's script ended with a code
cancel  somebody asked for it

Slurm forgets a job some minutes after its end, and its accounting is not everywhere; this
file is enough to say how a run stands. Lines are short appends, so that jobs and people may write at once.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.files import parse_json

Line = dict[str, Any]
_KEYS = {"event": str, "stage": str, "job": str, "time": int}
"""Of every line."""


def path(run: str | Path) -> Path:
    """Return where the journal of a run lies."""
    return Path(run) / "slurm" / "journal.jsonl"


def note(run: str | Path, event: str, stage: str, job: str, **details: Any) -> None:
    """Appends a line."""
    line = {"event": event, "stage": stage, "job": job, "time": int(time.time()), **details}
    with open(path(run), "a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def read(run: str | Path) -> list[Line]:
    """Return all lines, oldest first; one that was torn by a full disk, or is none, is left out."""
    found = []
    for text in path(run).read_bytes().splitlines() if path(run).exists() else []:
        with suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in _KEYS.items()):
                found.append(line)
    return found
