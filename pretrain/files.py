"""Durable files: what is written here is on disk, whole, after a kill at any instant."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pretrain.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"  # whatever starts with this is the remains of an interrupted write


def sync(path: Path) -> None:
    """Returns when the file's bytes, or the folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replaces a text file; after a kill at any instant it holds the old text or the new one."""
    temporary = path.with_name(TEMPORARY + path.name)
    with named(path):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Give an OSError that knows no file, such as that of a full disk, this one's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Make the file appear whole, its folder with it; an OSError names it, and leaves no other file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def truncate_torn_line(path: Path) -> bytes:
    """Cuts a line without an end (killed while writing) off an append-only file and returns it."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return data[whole:]


def append_line(path: Path, line: str) -> None:
    """Add a line, whole and on disk, whoever else does so; one that a kill has torn stays one of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # On network file systems appends of several machines would run into each other without a lock.
    with named(path), path.open("a+b") as file, locked(file, path):
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(f"{chr(10) * torn}{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def check_name(name: str) -> None:
    """Raise UserError for a name whose bytes are no characters here: no manifest or config could hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{ascii(name)}: not {sys.getfilesystemencoding()}; rename it, or set LC_ALL to the locale it"
            " was named in"
        ) from error


def seen_from(name: str | Path) -> str:
    """Return where a relative name is looked for, as words of an error; nothing for an absolute one."""
    return "" if os.path.isabs(name) else f", seen from {os.getcwd()}"


def check_folder(folder: str | Path) -> None:
    """Raise UserError where no file could be made in `folder`, to be found out before the work and not after
    it.

    It is tried, as permissions do not tell everything; nothing stays, nor is the folder made.
    """
    place = Path(folder).absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another place") from error


def digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says; ValueError for any that is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def own_folder(folder: Path) -> Path:
    """Return the folder, made with mode 0700 if it is not there; UserError where others may write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError(f"{folder}: others may write there; take a folder of your own, of mode 0700")
    return folder


@contextmanager
def locked(file: IO[Any], path: Path) -> Iterator[None]:
    """Wait for the lock of an open file, and give it back: closing does not while a map has the file open."""
    if not try_lock(file, path):
        log.info("%s: another process has it; waits for that", path)
        try_lock(file, path, wait=True)
    try:
        yield
    finally:
        with suppress(OSError):  # there are no locks
            fcntl.flock(file, fcntl.LOCK_UN)


def try_lock(file: IO[Any], path: Path, wait: bool = False) -> bool:
    """Lock an open file for this process; False where another has it, which with `wait` is waited for.
    Without locks: a warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.warning(
            "%s: cannot be locked (%s); make sure that no second process uses it",
            path,
            error.strerror,
        )
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, if another process has not."""
    with suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
