"""A network of this machine whose links have a rate: a namespace for each rank, on one bridge.

What a rank sends passes a token bucket (`tc qdisc tbf`); the addresses are 10.77.0.1 and on. It needs root,
and leaves nothing: namespaces take their interfaces with them.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError

NAMES = Path("/var/run/netns")
INTERFACE = "eth0"


def missing() -> str | None:
    """Return what this machine lacks for such networks; None: nothing."""
    if os.geteuid() != 0:
        return "it needs root (network namespaces with a rate limit)"
    absent = [name for name in ("ip", "tc") if not shutil.which(name)]
    return f"it needs {' and '.join(absent)} (iproute2)" if absent else None


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


@contextmanager
def limited(ranks: int, mbit: int) -> Iterator[list[str]]:
    """Yield the names of the ranks' namespaces, between which each can send so many megabits a second."""
    hub, names = f"latemask-{os.getpid()}", [f"latemask-{os.getpid()}-{rank}" for rank in range(ranks)]
    try:
        _ip(f"netns add {hub}")
        _ip(f"-n {hub} link add bridge type bridge")
        _ip(f"-n {hub} link set bridge up")
        for rank, name in enumerate(names):
            _ip(f"netns add {name}")
            _ip(f"link add {INTERFACE} netns {name} type veth peer name port{rank} netns {hub}")
            _ip(f"-n {hub} link set port{rank} master bridge up")
            _ip(f"-n {name} addr add {address(rank)}/24 dev {INTERFACE}")
            for device in (INTERFACE, "lo"):
                _ip(f"-n {name} link set {device} up")
            limit = f"rate {mbit}mbit burst 1mb latency 20ms"
            _ip(f"netns exec {name} tc qdisc add dev {INTERFACE} root tbf {limit}")
        yield names
    finally:
        for name in (hub, *names):
            if (NAMES / name).exists():
                _ip(f"netns del {name}")


def enter(name: str) -> None:
    """Move this process into a namespace; before it has threads."""
    with (NAMES / name).open(encoding="utf-8") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], check=False, capture_output=True, encoding="utf-8")
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(f"ip {words}: {said}; leave `exposed` out, or run where networks may be made")
