"""The folder of one run: claimed by one process, with a status that a queue reads."""

import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

from pretrain.config import Config, build_config, dump_config, read_yaml
from pretrain.data.indexed import corpus_file
from pretrain.errors import USER_ERROR, UserError
from pretrain.files import TEMPORARY, json_text, parse_json, remove, try_lock, write_atomic, write_whole
from pretrain.provenance import provenance

log = logging.getLogger(__name__)


TOKENIZER = "tokenizer"
"""Folder of a run with the file that defines its vocabulary."""
_REPLACED = ("config.yaml", "deepspeed.json", "metrics.jsonl", "provenance.json", "status.json")
FOLLOW_SECONDS = 5.0
"""Between two rewritings of status.json while a run goes on."""


def run_config(run: str | Path) -> Config:
    """Return the resolved config that a run keeps; its tokenizer is the copy in the run's folder.

    Relative names of corpora count from where the run was started, if they are there still.
    """
    path, kept = Path(run) / "config.yaml", Path(run) / TOKENIZER
    config, start = build_config(read_yaml(path), str(path)), _started_in(Path(run))
    corpus = config.corpus

    def found(prefix: str) -> str:
        return str(start / prefix) if corpus_file(start / prefix, "bin").exists() else prefix

    if start != Path.cwd():
        corpus = corpus.model_copy(
            update={
                "train": found(corpus.train)
                if isinstance(corpus.train, str)
                else [(weight, found(prefix)) for weight, prefix in corpus.train],
                "valid": corpus.valid and found(corpus.valid),
                "tokenizer": corpus.tokenizer and str(start / corpus.tokenizer),
            }
        )
    if kept.is_dir():
        corpus = corpus.model_copy(update={"tokenizer": str(kept)})
    return config.model_copy(update={"corpus": corpus})


def _started_in(run: Path) -> Path:
    """Return the folder in which the newest attempt of a run was started; the present one if unknown."""
    try:
        return Path(read_provenance(run)[-1]["folder"])
    except (LookupError, TypeError):
        return Path.cwd()


def read_provenance(run: Path) -> list[dict[str, Any]]:
    """Return what each attempt said of its code, packages, host and command, oldest first; [] where that is
    gone or cannot be read."""
    try:
        attempts = parse_json((run / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return attempts if isinstance(attempts, list) else []


class RunFolder:
    """One run. Rank 0 claims it before it writes; reading needs no claim."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"
        self._lock: IO[str] | None = None
        self._told: float | None = None  # when this process wrote status.json
        self._before: dict[str, Any] = {}  # what it said before that
        self._writing = threading.Lock()

    def claim(self, patience: float = 0.0) -> None:
        """Creates and locks the folder and clears the remains of killed writes; UserError if it is in use,
        and still is after so many seconds.

        The lock belongs to the process: however that ends, the folder is free again.
        """
        self.refuse_foreign()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until exit)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another run.dir"
            ) from None
        _lock_or_refuse(lock, self.path, patience)
        self._lock = lock
        for place in (self.path, self.checkpoints, self.weights):
            for remains in place.glob(TEMPORARY + "*"):
                remove(remains)

    def refuse_foreign(self) -> None:
        """Raise UserError where a file that a run would replace is there, but no run."""
        if any((self.path / name).exists() for name in (".lock", "ledger.jsonl")):
            return
        for name in _REPLACED:
            if (self.path / name).exists() and not any(self.checkpoints.glob("step-*/manifest.json")):
                raise UserError(
                    f"{self.path / name}: exists, and {self.path} is no run; move it away, or choose another"
                    " run.dir"
                )

    @property
    def claimed(self) -> bool:
        """True while this process holds the folder."""
        return self._lock is not None

    def release(self) -> None:
        """Lets another process claim the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def write_config(self, resolved: Config) -> None:
        """Keeps the config of this attempt as config.yaml."""
        write_atomic(self.path / "config.yaml", dump_config(resolved))

    def add_provenance(self, **details: Any) -> None:
        """Appends what produces this attempt (code, packages, host, command) to provenance.json; one that
        cannot be read is kept beside it."""
        path, attempts = self.path / "provenance.json", read_provenance(self.path)
        if path.exists() and not attempts:
            number = len(list(self.path.glob("provenance-damaged-*.json"))) + 1
            kept = path.rename(path.with_name(f"provenance-damaged-{number}.json"))
            log.warning("warning: %s: cannot be read; kept as %s, begun anew", path, kept.name)
        write_atomic(path, json_text([*attempts, {**provenance(), **details}]))

    def write_status(
        self,
        state: str,
        step: int,
        reason: str = "",
        exit_code: int | None = None,
        ledger_head: str = "",
        stalled: dict[str, Any] | None = None,
    ) -> None:
        """Tells a queue how the run stands: `state` is running, finished, stopped or failed.

        ledger_head: hash of the ledger's line with an attempt's last word; it stays until the next one.
        stalled: since when, where, on which hosts which ranks keep the others.
        """
        assert state in ("running", "finished", "stopped", "failed"), state
        if self._told is None:
            self._before = self.status()
        status = {
            "state": state,
            "exit_code": exit_code,
            "step": step,
            "reason": reason,
            "time": time.time(),
            "ledger_head": ledger_head or self.status().get("ledger_head", ""),
        }
        if stalled:
            status["stalled"] = stalled
        with self._writing:  # the watchdog's thread writes too
            write_atomic(self.path / "status.json", json_text(status))
        self._told = time.monotonic()

    def follow(self, step: int) -> None:
        """Tells a queue the step of a run that goes on, every few seconds at most."""
        if self._told is None or time.monotonic() - self._told >= FOLLOW_SECONDS:
            self.write_status("running", step)

    def write_failure(self, state: str, reason: str, exit_code: int) -> None:
        """Tells a queue how this attempt ended early. One that was refused before it went on with a run that
        had ended leaves all as it was, but for a word of itself (`attempt`)."""
        status = self.status()
        ended = self._before.get("state") in ("finished", "stopped") and exit_code == USER_ERROR
        if self._told is not None and ended and self._before.get("step") == status.get("step"):
            status = {**self._before, "ledger_head": status.get("ledger_head", "")}
        elif self._told is not None or not status:
            self.write_status(state, status.get("step", 0), reason, exit_code)
            return
        attempt = {"time": time.time(), "exit_code": exit_code, "reason": reason}
        write_atomic(self.path / "status.json", json_text({**status, "attempt": attempt}))

    def last_attempt(self) -> dict[str, Any]:
        """Return `time`, `exit_code` and `reason` of the newest attempt, of one that never began too; {} if
        none has said anything."""
        status = self.status()
        known: dict[str, Any] = status.get("attempt") or status
        return known

    def status(self) -> dict[str, Any]:
        """Return what `write_status` wrote last; {} if nothing yet, or nothing that can be read."""
        try:
            status = parse_json((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def keep_tokenizer(self, file: Path, content: bytes) -> None:
        """Keeps what the file of the vocabulary held: a run can be used where its corpus is gone.

        By the name that is looked for in a folder, whatever it was called.
        """
        kept = self.path / TOKENIZER / f"tokenizer{file.suffix}"
        if not kept.exists() or kept.read_bytes() != content:
            write_whole(kept, content)


def _lock_or_refuse(file: IO[str], path: Path, patience: float) -> None:
    end, waits = time.monotonic() + patience, False
    while not try_lock(file, path):
        file.seek(0)
        owner = file.read().strip() or "another process"
        if time.monotonic() >= end:
            file.close()
            raise UserError(f"{path}: in use by {owner}; wait for it, stop it, or choose another run.dir")
        if not waits:
            log.warning("warning: %s: in use by %s; waiting for it, %.0f s at most", path, owner, patience)
        waits = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
