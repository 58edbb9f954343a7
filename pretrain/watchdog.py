"""Names the rank that is dead, stopped or stuck, and leaves, so that a queue starts the job again.

The one idea: all ranks pass the same places in the same order (`Watchdog.at`), so whoever has passed the
fewest is who the others wait for. A thread of each rank tells all others in a datagram every few seconds how
many it has passed, and where it stands. No rank keeps what the others need: any one may fall silent.

The traps: a whole job may be suspended, so a thread that has itself stood still counts from there on; a
network may let no datagrams through, so a rank that was never heard is not said to be silent; and what takes
long is not stuck: a start, a first update, the first batch of an evaluation and what is written to disk
(`long`) are named as soon as all else, but left only after LONG times that time.
"""

import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pretrain import streams
from pretrain.errors import STOPPED
from pretrain.parallel.topology import COLLECTIVE, Topology
from pretrain.run_folder import RunFolder

LONG = 10
"""What takes long may take so many times `monitor.stall_seconds`."""
OWN = ("data", "forward")
"""Places where a rank of data parallelism waits for no other."""
_PACKAGE = os.path.dirname(__file__)
_DEAD = 1
"""Exit code where a rank is dead: it may be a defect that killed it."""
_WRITER = "checkpoint"
"""How `checkpoint.Writer` names its thread."""
NOTICE = 10.0
"""Seconds in which a rank may end by itself, or write to a disk that may hang."""


def patience(seconds: float) -> timedelta:
    """Return how long collectives wait where the watchdog does `seconds`: longer than it ever does."""
    return max(timedelta(minutes=10), timedelta(seconds=(LONG + 2) * seconds)) if seconds else COLLECTIVE


class Place(NamedTuple):
    """Where a main thread stands, and since when."""

    passed: int
    where: str
    long: bool
    since: float


class Fault(NamedTuple):
    """Who keeps the job; no ranks: all of them."""

    ranks: tuple[int, ...]
    what: str
    where: str
    seconds: float = 0.0
    long: bool = False
    absent: bool = False
    """They do nothing any more, or not yet again."""
    notice: float = 0.0
    """Seconds in which this rank may end by itself."""
    code: int = STOPPED


@dataclass
class Peer:
    """Another rank, and what it said last."""

    host: str
    address: Any
    pid: int
    started: str
    """When its process did, if that can be seen from here."""
    heard: float | None = None
    passed: int = 0
    where: str = "build"
    long: bool = True
    stood: float = 0.0
    waits: bool = False
    left: tuple[int, str] | None = None
    """Exit code and reason with which it took its leave."""
    fault: Fault | None = None
    """For which it ended."""
    gone: int = 0
    """Looks in a row that did not find its process."""


class Watchdog:
    """Watches over the ranks of a run; all of them make theirs at once, when the run's folder is claimed.

    seconds: `monitor.stall_seconds`; with 0 nobody is watched, and nothing is said.
    """

    def __init__(self, topology: Topology, folder: RunFolder, seconds: float) -> None:
        self._rank, self._device = topology.rank, topology.device
        self._folder, self._seconds, self._period = folder, seconds, min(5.0, seconds / 20)
        self._main, self._host = threading.get_ident(), _host()
        self._place = Place(0, "build", True, time.monotonic())
        self._own, self._events = 0.0, list[torch.cuda.Event]()
        self._over = threading.Event()
        self._ends = False  # the main thread: it only wants to know why
        self._named: tuple[tuple[Any, ...], float] = (), 0.0
        self._peers: dict[int, Peer] = {}
        if not seconds:
            return
        self._token = topology.broadcast_text(secrets.token_hex(8))
        self._socket, place = _open_socket()
        mine = (self._host, place, os.getpid(), _machine(), _started(os.getpid()))
        for rank, text in enumerate(topology.gather_text(json.dumps(mine))):
            host, (name, port), pid, machine, started = json.loads(text)
            if rank != topology.rank:
                address = socket.getaddrinfo(name, port, self._socket.family, socket.SOCK_DGRAM)[0][4]
                self._peers[rank] = Peer(host, address, pid, started if machine == mine[3] else "")
        self._awake = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    # ---- the main thread

    def at(self, where: str, long: bool = False) -> None:
        """Say that the main thread is at its next place: on all ranks the same, in the same order."""
        now, before = time.monotonic(), self._place
        self._place = Place(before.passed + 1, where, long, now)
        if self._device.type == "cpu":
            self._own += now - before.since if before.where in OWN else 0.0
        elif (before.where in OWN) != (where in OWN):  # the device is behind: it notes the moments itself
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def own_seconds(self) -> float:
        """Return what this rank's own work has taken since the last call, its waiting for others left out."""
        events, self._events = self._events, []
        for begin, end in zip(events[::2], events[1::2], strict=True):
            end.synchronize()
            self._own += begin.elapsed_time(end) / 1e3
        own, self._own = self._own, 0.0
        return own

    def ask(self, error: BaseException, signalled: bool) -> None:
        """Find out whose fault it is that a collective failed with `error`: where it is another rank's, that
        is said and this process ends. Returns where it is not, after `monitor.stall_seconds` at most.

        signalled: this process was told to stop, as by a launcher that has seen another rank fail, and will
        be killed before long.
        """
        if self._peers and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            self._ends = True
            self._over.wait(min(self._seconds, NOTICE) if signalled else self._seconds)

    def leave(self, code: int, reason: str) -> None:
        """Tell all ranks that this one ends, and how."""
        if self._seconds:
            self._over.set()
            self._tell({"left": (code, reason[:500])})

    # ---- a thread of its own

    def _watch(self) -> None:
        mark = time.monotonic()
        while not self._over.is_set():
            self._hear(mark + self._period)
            now = time.monotonic()
            if now - mark > 3 * self._period:
                self._awake = now
            mark = now
            self._tell(self._state())
            if fault := self._fault():
                self._act(fault)

    def _hear(self, until: float) -> None:
        """Take in what the others say up to that time, and all that waits by then."""
        while not self._over.is_set():
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            try:
                data = self._socket.recv(4096)
            except TimeoutError:
                return
            except OSError:  # a port that is closed by now
                continue
            with suppress(ValueError, KeyError, TypeError):  # a stranger's
                said = json.loads(data)
                if said.pop("token") == self._token:
                    vars(self._peers[said.pop("rank")]).update(said, heard=time.monotonic())

    def _state(self) -> dict[str, Any]:
        """What the others are told of this rank, by the names of `Peer`."""
        place, (frame, waits) = self._place, _frames(self._main)
        if frame.startswith("checkpoint.py"):  # what its thread waits for, it does
            waits = waits or any(_frames(thread)[1] for thread in _named(_WRITER))
        where = f"{place.where} ({frame})" if frame else place.where
        stood = time.monotonic() - max(place.since, self._awake)
        return {"passed": place.passed, "where": where, "long": place.long, "stood": stood, "waits": waits}

    def _tell(self, said: dict[str, Any]) -> None:
        data = json.dumps({"token": self._token, "rank": self._rank, **said}).encode()
        for peer in self._peers.values():
            with suppress(OSError):
                self._socket.sendto(data, peer.address)

    def _fault(self) -> Fault | None:
        """What keeps the job, if it has for half the time that it may; the surest first."""
        found = [fault for rank, peer in self._peers.items() if (fault := self._look_at(rank, peer))]
        return max(found, key=lambda fault: fault.seconds, default=None) or self._stuck()

    def _look_at(self, rank: int, peer: Peer) -> Fault | None:
        if peer.fault:  # it was faster
            return Fault(tuple(peer.fault[0]), *peer.fault[1:])
        if peer.left:
            code, reason = peer.left
            said = Fault((rank,), f"ended: {reason}", "", float("inf"), notice=NOTICE, code=code)
            return said if code else None
        state = _process_state(peer.pid, peer.started) if peer.started else ""
        peer.gone = peer.gone + 1 if state == "gone" else 0
        if peer.gone > 1:  # once: its last word may be on the way
            return Fault((rank,), "is dead", peer.where, float("inf"), absent=True, code=_DEAD)
        silence = 0.0 if peer.heard is None else time.monotonic() - max(peer.heard, self._awake)
        if silence < self._seconds / 2:
            return None
        what = "is stopped (SIGSTOP)" if state == "stopped" else "gives no sign of life"
        return Fault((rank,), what, peer.where, silence, absent=True)

    def _stuck(self) -> Fault | None:
        """Who is behind, if that has lasted."""
        heard = {rank: peer for rank, peer in self._peers.items() if peer.heard and not peer.left}
        standing = {rank: vars(peer) for rank, peer in heard.items()} | {self._rank: self._state()}
        behind = min(state["passed"] for state in standing.values())
        last = {rank: state for rank, state in standing.items() if state["passed"] == behind}
        last = {rank: state for rank, state in last.items() if not state["waits"]} or last
        last = {rank: state for rank, state in last.items() if state["stood"] >= self._seconds / 2}
        if not last:
            return None
        longest = max(last.values(), key=lambda state: state["stood"])
        ranks = () if len(last) > max(1, len(self._peers)) else tuple(sorted(last))
        return Fault(ranks, "stands still", longest["where"], longest["stood"], longest["long"])

    def _act(self, fault: Fault) -> None:
        """Name it, and end this process where it has lasted."""
        about, now = (fault.ranks, fault.what, fault.where.partition(" ")[0]), time.monotonic()
        first = about != self._named[0]
        if first:
            self._named = about, now
        patience = (LONG if fault.long else 1) * self._seconds - 3 * self._period
        text = self._text(fault)
        if fault.seconds < patience:
            if first:
                _say(f"warning: {text}")
            _in_time(self._write, "running", "", None, fault)
        elif self._ends or now - self._named[1] >= fault.notice:
            _say(f"error: {text}")
            state = "stopped" if fault.code == STOPPED else "failed"
            _in_time(self._write, state, text, fault.code, fault)
            _in_time(self._dump_collectives)
            self._tell({"left": (fault.code, text), "fault": fault})
            os._exit(streams.finish(fault.code))

    def _text(self, fault: Fault) -> str:
        who = ", ".join(f"rank {rank} on {host}" for rank, host in self._hosts(fault).items())
        text = f"{who or 'every rank'} {fault.what}"
        if fault.where:
            text += f", {'last seen ' if fault.absent else ''}in {fault.where}"
        if fault.seconds < float("inf"):
            text += f", for {fault.seconds:.0f} s"
        unheard = [str(rank) for rank, peer in self._peers.items() if peer.heard is None]
        return text + (f"; nothing was ever heard of rank {', '.join(unheard)}" if unheard else "")

    def _hosts(self, fault: Fault) -> dict[int, str]:
        known = {self._rank: self._host} | {rank: peer.host for rank, peer in self._peers.items()}
        return {rank: known[rank] for rank in fault.ranks}

    def _write(self, state: str, reason: str, code: int | None, fault: Fault) -> None:
        """Write status.json where no rank before this one can."""
        if self._rank > min(set(range(self._rank + 1)) - set(fault.ranks if fault.absent else ())):
            return
        stalled = {
            "since": time.time() - min(fault.seconds, time.monotonic() - self._named[1]),
            "where": fault.where,
            "ranks": list(fault.ranks),
            "hosts": sorted(set(self._hosts(fault).values())),
        }
        step = self._folder.status().get("step", 0)
        self._folder.write_status(state, step, reason, code, stalled=stalled)

    def _dump_collectives(self) -> None:
        """Keep what NCCL was doing (its flight recorder) in the run. Written by reading: untested."""
        if self._device.type == "cuda":
            from torch._C import _distributed_c10d as collectives  # has it in builds for GPUs

            dump = collectives._dump_nccl_trace_json()  # type: ignore[attr-defined]
            self._folder.path.joinpath(f"nccl-rank-{self._rank}.json").write_bytes(dump)


def _in_time(action: Callable[..., None], *arguments: Any) -> None:
    """Run what must keep nobody from the end: a disk, or a driver, may be what hangs."""

    def run() -> None:
        with suppress(Exception):
            action(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(NOTICE)


def _say(text: str) -> None:
    """Write to the log past Python's locks, one of which the main thread may hold."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def _open_socket() -> tuple[socket.socket, tuple[str, int]]:
    """A socket, and where the other ranks find it: at this host's address on the way to that of rank 0."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, *_, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        address = probe.getsockname()[0]
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:  # it is rank 0's own host
        address = master
    opened = socket.socket(family, socket.SOCK_DGRAM)
    opened.bind(("", 0))
    return opened, (address, opened.getsockname()[1])


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---- processes, as /proc shows them ---------------------------------------------------------------


def _machine() -> str:
    """What ranks have in common that see each other's processes; a name of its own without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)


def _stat(pid: int) -> list[str]:
    """Fields of proc(5) from the third on, the state; [] of a process that is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # its name may hold anything


def _started(pid: int) -> str:
    return (_stat(pid) or [""] * 20)[19]


def _process_state(pid: int, started: str) -> str:
    """gone, stopped or alive."""
    fields = _stat(pid)
    if not fields or fields[0] in "ZX" or fields[19] != started:
        return "gone"
    return "stopped" if fields[0] in "Tt" else "alive"


def _named(prefix: str) -> list[int]:
    """The threads whose name begins so."""
    return [each.ident for each in threading.enumerate() if each.ident and each.name.startswith(prefix)]


def _frames(thread: int) -> tuple[str, bool]:
    """The innermost function of this package that a thread is in, and whether it waits for other ranks."""
    found, frame = "", sys._current_frames().get(thread)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("distributed_c10d.py"):
            return found, True
        if not found and path.startswith(_PACKAGE):
            found = f"{os.path.basename(path)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return found, False
