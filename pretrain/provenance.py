"""What produced a result: the code's revision, packages, host and command."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from pretrain import __version__

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "megatron-core",
    "deepspeed",
    "sentencepiece",
    "tokenizers",
)


def provenance() -> dict[str, Any]:
    return {
        "version": __version__,
        "commit": code_revision(),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "python": sys.version.split()[0],
        "os": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "time": time.time(),
    }


def code_revision() -> str | None:
    """Return the commit of this code, with -dirty if it was edited; None where neither git nor a frozen copy
    says."""
    root = Path(__file__).parent.parent
    if (root / "REVISION").exists():
        return (root / "REVISION").read_text(encoding="utf-8").strip()
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
