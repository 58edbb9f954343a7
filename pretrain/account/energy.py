"""Joules, from what the hardware itself counts: NVML for NVIDIA GPUs, RAPL for the host.

Every sensor is read by exactly one rank. A GPU belongs to the first rank that drives it (where
Slurm confines a rank to its own GPU, no other rank could read it), a host to the first rank on it. So a sum
over ranks counts each joule once, however many ranks share a node.

RAPL counts the whole host. A job that has a part of its cores is charged that share of it, and the share is
written in the ledger. What cannot be read is absent, never invented: most clusters keep RAPL for root.

Counters wrap (RAPL's after minutes under load), and GPUs before Volta have a power reading only,
which must be integrated. So a thread looks once a second.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

PARTS = ("gpu", "cpu", "ram")
PERIOD = 1.0  # seconds between two readings
POWERCAP = Path("/sys/class/powercap")


class Sensor(Protocol):
    """One counter."""

    part: str
    method: str

    def read(self) -> float:
        """Return the joules since the sensor was opened."""


# ---- NVIDIA GPUs ---------------------------------------------------------------------------------


class GpuCounter:
    """NVML's total-energy counter of one GPU, in mJ since the driver was loaded."""

    part, method = "gpu", "NVML counter"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._first = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def read(self) -> float:
        with _os_errors(self._nvml):
            return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._first) / 1e3


class GpuPower:
    """The integral of NVML's power readings (mW), by trapezoids."""

    part, method = "gpu", "NVML power integral"

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._joules = 0.0
        self._last = clock(), self._watts()

    def _watts(self) -> float:
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3

    def read(self) -> float:
        with _os_errors(self._nvml):
            at, watts = self._clock(), self._watts()
        self._joules += (at - self._last[0]) * (watts + self._last[1]) / 2
        self._last = at, watts
        return self._joules


@contextmanager
def _os_errors(nvml: Any) -> Iterator[None]:
    """NVML's errors as those of a file."""
    try:
        yield
    except nvml.NVMLError as error:
        raise OSError(str(error)) from None


def open_gpu(uuid: str) -> list[Sensor]:
    """Return the sensor of the GPU so named; none without NVML, or where it does not tell."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            return [GpuCounter(pynvml, handle)]
        except pynvml.NVMLError_NotSupported:
            return [GpuPower(pynvml, handle)]
    except pynvml.NVMLError:
        return []


# ---- the host ------------------------------------------------------------------------------------


class RaplZone:
    """A package or its memory: microjoules in a file, which starts anew after `max_energy_range_uj`."""

    method = "RAPL"

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self.part = folder, part
        self._range = int((folder / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._joules, self._last = 0.0, self._count()

    def _count(self) -> int:
        return int((self._folder / "energy_uj").read_text(encoding="utf-8"))

    def read(self) -> float:
        count = self._count()
        self._joules += (count - self._last) % (self._range + 1) / 1e6
        self._last = count
        return self._joules


def open_host(powercap: Path) -> list[Sensor]:
    """Return the packages and their memory; none where the kernel does not let us read them."""
    found: list[Sensor] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's too
        try:
            name = (folder / "name").read_text(encoding="utf-8").strip()
            if name.startswith("package") or name == "dram":
                found.append(RaplZone(folder, "ram" if name == "dram" else "cpu"))
        except (OSError, ValueError):
            return []
    return found


def host_share(environ: Mapping[str, str] = os.environ) -> float:
    """Return this job's share of the host's cores: Slurm's word, or the cores that this process may use."""
    cores = os.cpu_count() or 1
    given = environ.get("SLURM_CPUS_ON_NODE", "")
    if given.isdecimal():
        return min(1.0, int(given) / cores)
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(1.0, mine / cores)


def host_name() -> str:
    """Return what tells this host from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return os.uname().nodename


# ---- the meter of a rank -------------------------------------------------------------------------


class Meter:
    """What one rank answers for. share: this job's share of the host."""

    def __init__(self, sensors: Sequence[Sensor], share: float = 1.0) -> None:
        self.sensors, self.share = sensors, share
        self.methods = {sensor.part: sensor.method for sensor in sensors}
        """How each part is measured."""
        self.parts = list(self.methods)
        """Those that are read on all nodes, once the ranks have compared."""
        self._joules, self._opened = dict.fromkeys(self.methods, 0.0), time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Looks once a second from now on."""
        if self.sensors:
            threading.Thread(target=self._watch, name="energy", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            self.sample()

    def sample(self) -> None:
        """Reads all sensors; a part whose sensor has failed stands still."""
        with self._lock:
            for part in self.methods:
                share = 1.0 if part == "gpu" else self.share
                try:
                    self._joules[part] = share * sum(s.read() for s in self.sensors if s.part == part)
                except (OSError, ValueError):  # a run outlives its sensors
                    continue

    def age(self) -> float:
        """Return the seconds since the meter was opened."""
        return time.monotonic() - self._opened

    def joules(self) -> dict[str, float]:
        """Return joules by part, since the meter was opened, as of the last look."""
        with self._lock:
            return dict(self._joules)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()


def open_meter(rank: int, places: list[tuple[str, str]]) -> Meter:
    """Return the meter of a rank, of the GPU and the host that nobody before it answers for.

    places: (host, GPU) of every rank, GPU "" where there is none.
    """
    host, gpu = places[rank]
    first_on_host = all(place[0] != host for place in places[:rank])
    first_on_gpu = gpu != "" and all(place[1] != gpu for place in places[:rank])
    sensors = (open_gpu(gpu) if first_on_gpu else []) + (open_host(POWERCAP) if first_on_host else [])
    return Meter(sensors, host_share())


def known_parts(places: list[tuple[str, str]], readers: Mapping[str, int]) -> list[str]:
    """Return the parts that somebody reads everywhere. readers: how many ranks read a part."""
    hosts, gpus = {host for host, _ in places}, {gpu for _, gpu in places} - {""}
    wanted = {"gpu": len(gpus), "cpu": len(hosts), "ram": len(hosts)}
    return [part for part in PARTS if 0 < wanted[part] == readers[part]]
