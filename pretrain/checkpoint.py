"""The checkpoints of a run: written whole or not at all, verified before they are used.

A checkpoint is three safetensors files: parameters, first moments (Muon's momentum among them) and second
ones (which Muon's matrices have not), full fp32 tensors under the model's own names, whatever layout wrote
them. With them go `state.json` and a manifest of sizes and hashes. Nothing is ever unpickled. What is kept
of milestones, or averaged, is weights alone: the same without moments, by name, in `weights/`; no run goes
on from it.

The one idea: a checkpoint becomes visible by one rename, after every byte of it is on disk, and
becomes the one to resume from by a second rename, that of the pointer `latest`. A kill at any
instant therefore leaves the old state or the new one. The trap: a rename survives a power cut
only once its folder is synced too.

Importing this does not import torch, so that programs that only read a run start at once.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from pretrain.account.ledger import SavedAccount
from pretrain.config import Config, build_config
from pretrain.data.rng import RULES
from pretrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.parallel.pieces import TensorPiece
from pretrain.files import TEMPORARY, digest, json_text, parse_json, remove, sync, write_atomic
from pretrain.run_folder import RunFolder

FORMAT = 1
FILES = {
    "param": "model.safetensors",
    "exp_avg": "exp_avg.safetensors",
    "exp_avg_sq": "exp_avg_sq.safetensors",
}
WEIGHTS = ("param",)
"""Kinds of tensors of a checkpoint without moments."""
STATE, MANIFEST = "state.json", "manifest.json"

MILESTONE = "share-"
"""What the names of milestones begin with: `share-0.1` is what a tenth of the budget gave."""

log = logging.getLogger(__name__)


class TensorSource(Protocol):
    """What a checkpoint needs from an engine. `tensors` is collective: every rank iterates to the end."""

    def tensors(self, kind: str) -> Iterator[tuple[str, "Tensor"]]:
        """Yields (name, full fp32 tensor) for kind param, exp_avg or exp_avg_sq, on all ranks."""

    def pieces(self, kind: str) -> Iterator["TensorPiece"]:
        """Yields what this rank gives to these; not collective."""

    def join(self, pieces: Sequence["TensorPiece"]) -> dict[str, "Tensor"]:
        """Returns the full tensors of copies of the pieces of all ranks, on rank 0; collective."""

    def load_tensors(self, kind: str, get: Callable[[str], "Tensor"]) -> None:
        """Takes what this rank needs of ``get(name)``."""


@dataclass(frozen=True)
class State:
    """All of a checkpoint that is no tensor."""

    step: int
    samples: int
    """Sequences consumed by the surviving updates: the whole state of the data order."""
    optimizer_step: int
    config: dict[str, Any]
    """``Config.model_dump(mode="json")`` of the attempt that wrote it."""
    fingerprints: dict[str, str]
    """Name -> hash of what was read: the corpora and the tokenizer."""
    ledger_head: str
    """Hash of the ledger's line of this save (`Ledger.save`)."""
    loss: float | None = None
    """Held-out loss at this step, if it was evaluated; the lowest decides `best`."""
    layout: dict[str, Any] | None = None
    """Engine, ranks, TP, ZeRO stage of the writer: for people, loading does not depend on it."""
    format: int = FORMAT
    segments: list[Any] = field(default_factory=list)
    """The run's `sampler.Segment`s so far, as lists."""
    phase: int = 0
    """Index of the phase (`train.phases`) of the update before."""
    loss_scale: dict[str, float] | None = None
    """`LossScale.state` of a run in fp16."""
    rules: int = 1
    """`rng.Rules` by which the run began; a checkpoint that does not say is of an older program."""
    progress: float | None = None
    """`Course.progress`: how far the schedule was; None in checkpoints of older programs."""
    account: SavedAccount | None = None
    """What that line stated, with which the run goes on where the ledger has lost it; None in checkpoints of
    older programs."""
    skipped: int = 0
    """Updates so far that were skipped."""
    averaged: dict[str, float] = field(default_factory=dict)
    """Of weights that are a mean: the checkpoints that they are the mean of, and the share of each."""


_STATE = TypeAdapter(State)


# ---- saving --------------------------------------------------------------------------------------


class Writer:
    """Writes checkpoints on a thread of its own while training goes on, one after the other.

    The one idea: only an update changes what is saved. So the thread of each rank copies the rank's pieces
    while the next forward and backward pass go on, and no more than the update waits for that
    (`wait_copied`); then they are put together on rank 0.

    As a context manager it leaves with the last one on disk, or as far as it came: only who interrupts at
    once does not wait for it, and finds the one before.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._copied: Future[Pieces] | None = None
        self._last: Future[None] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}
        """Kept from one to the next: memory that is new to the process is slow."""
        self.seconds = 0.0
        """What the last one took to write."""

    def start(self, pieces: "Pieces", write: Callable[["Pieces"], None]) -> None:
        """Copy and write; the one before is written (`wait`). UserError where memory is lacking."""
        import torch  # which the readers of a run do without

        self._take_memory(pieces)
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        copied = self._copied = self._pool.submit(self._copy_all, pieces, ready)
        self._last = self._pool.submit(self._timed, lambda: write(copied.result()))

    def _copy_all(self, pieces: "Pieces", ready: Any) -> "Pieces":
        """Copies of what is there once the GPU, if there is one, has passed `ready`."""
        import torch

        stream = torch.cuda.Stream(ready.device) if ready else None
        if stream:  # not that of the next pass, for which a copy would wait
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            return {
                kind: [piece._replace(flat=self._copy(kind, piece)) for piece in each]
                for kind, each in pieces.items()
            }

    def _take_memory(self, pieces: "Pieces") -> None:
        """Take the host's memory for a copy of each; here, where all ranks hear of an error of one."""
        try:
            for kind, each in pieces.items():
                for piece in each:
                    if (kind, piece.name) not in self._copies:
                        copy = piece.flat.new_empty(piece.flat.shape, device="cpu")
                        self._copies[kind, piece.name] = copy
        except RuntimeError as error:
            raise UserError(
                f"{os.uname().nodename}: no memory for the copies of a checkpoint; set"
                f" checkpoint.background=false, or start fewer ranks a node ({str(error).splitlines()[0]})"
            ) from None

    def _copy(self, kind: str, piece: "TensorPiece") -> "Tensor":
        """Return a copy in the host's memory, which the next one of the same name takes the place of."""
        return self._copies[kind, piece.name].copy_(piece.flat)

    @property
    def copying(self) -> bool:
        """True while the tensors of the last one may not change."""
        return bool(self._copied and not self._copied.done())

    def wait_copied(self) -> None:
        """Return when they may."""
        if self._copied:
            wait([self._copied])  # an error is told by who waits for the whole

    def _timed(self, write: Callable[[], None]) -> None:
        begin = time.monotonic()
        write()
        self.seconds = time.monotonic() - begin

    @property
    def failed(self) -> bool:
        """True once a checkpoint could not be written, which the next `wait` says."""
        return bool(self._last and self._last.done() and self._last.exception())

    def wait(self) -> None:
        """Return when all is on disk; UserError if it could not be written."""
        last, self._last, self._copied = self._last, None, None
        if last:
            last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            with suppress(UserError, RuntimeError):  # what ends the run is told; and of a rank that is gone
                self.wait()


def save(
    folder: RunFolder,
    engine: TensorSource,
    state: State,
    keep_last: int,
    is_main: bool = True,
    writer: Writer | None = None,
) -> Path:
    """Writes a checkpoint, moves the pointers to it and retires old ones; collective over all ranks.

    Only the main rank writes, one kind of tensor at a time in memory; with a `writer` later, of copies of
    what each rank has, for which the next update has to wait (`Writer.wait_copied`). A step whose good
    checkpoint is `latest` already is not written again. If writing fails (disk full), the main rank still
    takes part in all collectives and raises UserError after them.
    """
    final = folder.checkpoints / _name(state.step)
    writes = is_main and not (pointed(folder.path, "latest") == final and is_whole(final))

    def write(gathered: Gathered) -> None:
        try:
            if writes:
                _write(folder, state, keep_last, gathered)
        finally:
            for _ in gathered:
                pass

    if writer:
        pieces = {kind: list(engine.pieces(kind)) for kind in FILES}
        writer.start(pieces, lambda copies: write((kind, engine.join(copies[kind])) for kind in FILES))
    else:
        write((kind, _gather(engine, kind, is_main)) for kind in FILES)
    return final


Pieces = dict[str, list["TensorPiece"]]
"""By kind."""
Gathered = Iterator[tuple[str, dict[str, "Tensor"]]]
"""Kinds of tensors, and these by name."""


def _gather(engine: TensorSource, kind: str, is_main: bool) -> dict[str, "Tensor"]:
    """All tensors on the main rank."""
    return {name: tensor.to("cpu") for name, tensor in engine.tensors(kind) if is_main}


def _write(folder: RunFolder, state: State, keep_last: int, gathered: Gathered) -> None:
    final = folder.checkpoints / _name(state.step)
    temporary = folder.checkpoints / (TEMPORARY + final.name)
    try:
        for kind, tensors in gathered:
            _write_tensors(temporary, state, kind, tensors)
            del tensors  # before the next kind is put together
        _publish(folder, temporary, state, keep_last)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be saved ({error}); free space or fix the disk, then start again"
        ) from None


def save_weights(folder: RunFolder, state: State, name: str, tensors: dict[str, "Tensor"]) -> Path:
    """Write weights alone under a name, in place of those that had it; for one rank."""
    final = folder.weights / name
    temporary = final.with_name(f".{name}.partial")  # another process's, which a run's start leaves alone
    try:
        folder.weights.mkdir(exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _write_tensors(temporary, state, "param", tensors)
        _seal(temporary, WEIGHTS)
        if final.exists():
            _retire(final)
        os.replace(temporary, final)
        sync(folder.weights)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: cannot be saved ({error}); free space or fix the disk") from None
    return final


def _write_tensors(temporary: Path, state: State, kind: str, tensors: dict[str, "Tensor"]) -> None:
    from safetensors.torch import save_file  # imports torch, which the readers of a run do without

    if kind == "param":
        temporary.mkdir()
        (temporary / STATE).write_text(json_text(asdict(state)), encoding="utf-8")
    path = temporary / FILES[kind]
    on_host = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_host, path, {"format": "pt"})
    shutil.copymode(temporary / STATE, path)  # safetensors creates 0600, whatever the umask


def _publish(folder: RunFolder, temporary: Path, state: State, keep_last: int) -> None:
    """The order here is the promise: bytes, manifest, rename, pointers; only then is anything deleted."""
    final = folder.checkpoints / _name(state.step)
    _seal(temporary)
    if final.exists():  # a bad one, or one of a future that the run went back from
        _retire(final)
    os.replace(temporary, final)
    sync(folder.checkpoints)
    if _is_best(folder, state):
        write_atomic(folder.checkpoints / "best", final.name + "\n")
    point_at(final)
    _retain(folder, state.step, keep_last)


def _seal(temporary: Path, kinds: Iterable[str] = FILES) -> None:
    """Bring every file to disk and write the manifest, last."""
    paths = [temporary / name for name in (*(FILES[kind] for kind in kinds), STATE)]
    with ThreadPoolExecutor(len(paths)) as pool:
        digests = list(pool.map(digest, paths))
        list(pool.map(sync, paths))
    files = {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    (temporary / MANIFEST).write_text(json_text({"format": FORMAT, "files": files}), encoding="utf-8")
    sync(temporary / MANIFEST)
    sync(temporary)


def _is_best(folder: RunFolder, state: State) -> bool:
    if state.loss is None:
        return False
    try:
        best = pointed(folder.path, "best")
        loss = read_state(best).loss if best else None
    except UserError:  # unreadable: no rival
        loss = None
    return state.loss < (math.inf if loss is None else loss)


def _retain(folder: RunFolder, step: int, keep_last: int) -> None:
    """Keeps the newest up to `step` and what is pointed at; beyond `step` is what the run went back from."""
    keep = {folder.checkpoints / _name(s) for s in [s for s in steps(folder.path) if s <= step][-keep_last:]}
    keep |= {path for name in ("latest", "best") if (path := pointed(folder.path, name))}
    for old in steps(folder.path):
        if (path := folder.checkpoints / _name(old)) not in keep:
            _retire(path)


def _retire(path: Path) -> None:
    """Deletes a checkpoint; the rename first, so that half of one is never taken for a whole."""
    doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.replace(path, doomed)
    sync(path.parent)
    remove(doomed)


# ---- finding and reading -------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"step-{step:08d}"


def steps(run: str | Path) -> list[int]:
    """Return the steps of which the run has a checkpoint, good or bad, ascending."""
    names = (path.name for path in (Path(run) / "checkpoints").glob("step-*"))
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def named_weights(run: str | Path) -> list[str]:
    """Return the names of the weights that are kept apart from checkpoints, good or bad, in order."""
    paths = (path for path in (Path(run) / "weights").glob("*") if not path.name.startswith("."))
    return sorted(path.name for path in paths)


def milestone(share: float) -> str:
    """Return the name of the weights that are kept at a share of the budget."""
    return f"{MILESTONE}{share:g}"


def has_milestone(folder: RunFolder, share: float, config: Config) -> bool:
    """Tell whether weights are kept of that share of this config's budget."""
    try:
        kept = read_state(folder.weights / milestone(share)).config
    except UserError:
        return False
    return build_config(kept, "config of the milestone").budget.amount == config.budget.amount


def retire_weights(folder: RunFolder, step: int) -> None:
    """Delete milestones of a later step: those that a run went back from make others."""
    for name in named_weights(folder.path):
        path = folder.weights / name
        with suppress(UserError):  # an unreadable one is for who asks for it to hear of
            if name.startswith(MILESTONE) and read_state(path).step > step:
                _retire(path)


def refuse_gone(run: str | Path) -> None:
    """Raise UserError where a pointer says that a run has saved, but no checkpoint is left."""
    if not steps(run) and (latest := pointed(run, "latest")):
        raise UserError(
            f"{latest}: is gone, and no other is there; restore one, or move checkpoints/ away to start over"
        )


def pointed(run: str | Path, pointer: str) -> Path | None:
    """Return the checkpoint that `latest` or `best` names; None without a readable pointer."""
    path = Path(run) / "checkpoints" / pointer
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return path.with_name(name) if re.fullmatch(r"step-\d{8,}", name) else None


def point_at(path: Path) -> None:
    """Make a checkpoint the `latest` of its run, unless it is."""
    if pointed(path.parents[1], "latest") != path:
        write_atomic(path.with_name("latest"), path.name + "\n")


Stamps = dict[str, list[int]]
"""Name of a checkpoint's file -> what tells the file that was verified from one that took its place or was
written to since: inode, size, time of the last change. No device number: another node has another one."""


def find_verified(run: str | Path, which: str | int = "latest") -> tuple[Path, Stamps]:
    """Return the folder of a checkpoint, every byte of it verified, and the stamps of its files, by which
    those who read them know that they read what was verified; `which` is latest, best, a step or the name of
    weights.

    For `latest` a bad checkpoint is named in a warning and the newest good other one is taken; a
    bad `best` or step is a UserError, as is a run without any good one. Reads whole files: call
    it on one rank.
    """
    if which in named_weights(run):
        path = Path(run) / "weights" / str(which)
        return path, verify(path, WEIGHTS)
    path = locate(run, which)
    return _newest_good(Path(run)) if which == "latest" else (path, verify(path))


def locate(run: str | Path, which: str | int) -> Path:
    """Return the folder of a checkpoint, not verified; `which` is latest, best or a step. UserError without
    one."""
    refuse_gone(run)
    known = steps(run)
    if not known:
        what = "has no checkpoint yet" if Path(run).is_dir() else "no such folder"
        raise UserError(f"{run}: {what}; give the run.dir of a run that has saved")
    path = pointed(run, str(which)) if which in ("latest", "best") else _explicit(Path(run), which)
    if which == "latest":
        path = path or _explicit(Path(run), known[-1])
    elif path is None or not path.is_dir():
        have = ", ".join(map(str, [*known, *named_weights(run)]))
        raise UserError(f"{run}: has no checkpoint {which!r}; take latest, or one of {have}")
    assert path
    return path


def _explicit(run: Path, which: str | int) -> Path | None:
    return run / "checkpoints" / _name(int(which)) if str(which).isdecimal() else None


def candidates(run: str | Path) -> list[Path]:
    """Return the checkpoints of a run, good or bad, in the order in which a start tries them: the one that
    `latest` names, then from the newest on."""
    paths = [Path(run) / "checkpoints" / _name(step) for step in reversed(steps(run))]
    latest = pointed(run, "latest")
    return sorted(paths, key=lambda path: path != latest)  # stable


def _newest_good(run: Path) -> tuple[Path, Stamps]:
    paths, latest = candidates(run), pointed(run, "latest")
    if latest and latest not in paths:
        log.warning("%s: is gone, though it is the latest; looking for another", latest)
    for path in paths:
        try:
            return path, verify(path, advice="refused, looking for an older one")
        except UserError as error:
            log.warning("%s", error)
    raise UserError(
        f"{run}: none of its {len(paths)} checkpoints is whole; restore one,"
        " or move checkpoints/ away to start over"
    )


def is_whole(path: Path) -> bool:
    """Tell whether every file of a checkpoint is as its manifest says."""
    try:
        return bool(verify(path))
    except UserError:
        return False


def verify(
    path: Path, kinds: Iterable[str] = FILES, advice: str = "take another (--checkpoint latest, or a step)"
) -> Stamps:
    """Return the stamps of a checkpoint's files, every byte of which was read; UserError, with the advice,
    names one that is not as the manifest says."""
    try:
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: manifest["files"][name] for name in (STATE, *(FILES[kind] for kind in kinds))}
        with ThreadPoolExecutor(len(expected)) as pool:
            stamps = pool.map(lambda name: _verify_file(path / name, expected[name]), expected)
            return dict(zip(expected, stamps, strict=True))
    except UserError as error:
        wrong = str(error)
    except (OSError, ValueError, KeyError, TypeError):
        wrong = f"{MANIFEST} is missing or unreadable"
    raise UserError(f"{path}: {wrong}; {advice}")


def _verify_file(path: Path, expected: dict[str, Any]) -> list[int]:
    """Return the stamp of a file; UserError where it is not as `expected`."""
    try:
        with open(path, "rb") as file:
            stamp = _stamp(file)
            if stamp[1] != expected["size"]:  # cheap, and says more than a wrong hash
                raise UserError(f"{path.name} has {stamp[1]} bytes instead of {expected['size']}")
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise UserError(f"{path.name} is corrupt (wrong sha256)")
            return stamp
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror})") from None


def _stamp(file: IO[bytes]) -> list[int]:
    about = os.fstat(file.fileno())
    return [about.st_ino, about.st_size, about.st_mtime_ns]


@contextmanager
def _opened(path: Path, stamps: Stamps | None) -> Iterator[IO[bytes]]:
    """The file, open; with `stamps` UserError if it is not the one verified, before it is read or after."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        if stamps is None:
            raise
        raise UserError(f"{path}: is gone since it was verified; start again") from None
    with file:
        for moment in range(2):
            if stamps is not None and _stamp(file) != stamps[path.name]:
                raise UserError(f"{path}: changed since it was verified; start again")
            if moment == 0:
                yield file


@contextmanager
def _tensors(path: Path, stamps: Stamps | None) -> Iterator[Any]:
    """The tensors of a file, opened again under the name of its descriptor, whatever is at `path` now."""
    try:
        with (
            _opened(path, stamps) as file,
            safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as tensors,
        ):
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error}); take another checkpoint") from None


def read_state(path: Path, stamps: Stamps | None = None) -> State:
    """Return the state of a checkpoint; UserError if another version of this program wrote it, or it is not
    the file that was verified."""
    try:
        with _opened(path / STATE, stamps) as file:
            values = parse_json(file.read())
        if values["format"] != FORMAT:
            raise UserError(f"{path}: format {values['format']}, this program reads {FORMAT}; update it")
        if values.get("rules", 1) > RULES:
            raise UserError(f"{path}: rules {values['rules']}, this program knows {RULES}; update it")
        return _STATE.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path / STATE}: {where}: {first['msg']}; take another checkpoint") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / STATE}: unreadable ({error}); take another checkpoint") from None


def verified_state(path: Path) -> State:
    """Return the state of a checkpoint, its file compared with the manifest; UserError where they differ."""
    return read_state(path, verify(path, (), "restore it, or move it away"))


def load(path: Path, engine: TensorSource, stamps: Stamps | None = None) -> None:
    """Gives the engine its tensors, on every rank; both come from `find_verified`, on one of them."""
    for kind, name in FILES.items():
        with _tensors(path / name, stamps) as file:
            engine.load_tensors(kind, file.get_tensor)


def read_tensors(path: Path, kind: str = "param", stamps: Stamps | None = None) -> dict[str, "Tensor"]:
    """Name -> full fp32 CPU tensor, for programs that want the weights without an engine."""
    with _tensors(path / FILES[kind], stamps) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
