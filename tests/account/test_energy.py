"""Sensors against simulated hardware: NVML at the border of its Python package, RAPL as a tree of files."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from signal import SIGKILL
from types import SimpleNamespace

import pytest

from pretrain.account import energy, ledger
from pretrain.account.energy import GpuPower, Meter, known_parts, open_gpu, open_host, open_meter
from pretrain.monitor import read_metrics
from tests.support.ranks import PATIENCE
from tests.support.runs import NEVER, Attempt, Paced, attempt


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


class Hardware(SimpleNamespace):
    """What the pynvml package would be with two GPUs that draw a constant power, in W."""

    NVMLError, NVMLError_NotSupported = NVMLError, NotSupported

    def __init__(self, watts, counters=True):
        super().__init__(watts=watts, now=100.0, counters=counters, broken=False)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.watts:
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.broken:
            raise NVMLError("the GPU is lost")
        if not self.counters:
            raise NotSupported
        return int(1e3 * self.now * self.watts[handle])

    def nvmlDeviceGetPowerUsage(self, handle):
        return int(1e3 * self.watts[handle])


@pytest.fixture
def hardware(monkeypatch):
    made = Hardware({"GPU-a": 500.0, "GPU-b": 300.0})
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def zone(folder, name, microjoules, largest=10**9):
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (folder / file).write_text(f"{value}\n")


# ---- GPUs ----------------------------------------------------------------------------------------


def test_a_counter_is_read_from_where_it_stood(hardware):
    (sensor,) = open_gpu("GPU-a")
    assert sensor.read() == 0.0
    hardware.now += 7
    assert sensor.read() == 3500.0


def test_power_is_integrated_where_there_is_no_counter(hardware):
    hardware.counters = False
    (sensor,) = open_gpu("GPU-a")
    assert isinstance(sensor, GpuPower)
    at = [0.0]
    sensor = GpuPower(hardware, "GPU-a", lambda: at[0])
    for watts in (500.0, 100.0, 300.0):
        hardware.watts["GPU-a"] = watts
        at[0] += 2.0
        joules = sensor.read()
    assert joules == 2 * 500 + 2 * 300 + 2 * 200  # trapezoids


def test_what_nvml_does_not_know_is_absent(hardware, monkeypatch):
    assert open_gpu("MIG-a") == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_gpu("GPU-a") == []


def test_a_lost_gpu_stands_still_and_ends_nothing(hardware):
    meter = Meter(open_gpu("GPU-a"))
    hardware.now += 1
    meter.sample()
    hardware.broken = True
    meter.sample()
    assert meter.joules() == {"gpu": 500.0}


# ---- the host ------------------------------------------------------------------------------------


def test_packages_and_their_memory_are_summed_and_wrap(tmp_path):
    zone(tmp_path / "intel-rapl:0", "package-0", 900_000_000, 999_999_999)
    zone(tmp_path / "intel-rapl:0:0", "core", 5)  # a part of the package
    zone(tmp_path / "intel-rapl:0:1", "dram", 0)
    zone(tmp_path / "intel-rapl:1", "package-1", 0)
    zone(tmp_path / "intel-rapl:2", "psys", 0)  # the packages again
    meter = Meter(open_host(tmp_path), share=0.25)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000000")  # 200 J on, past the wrap
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("8000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("40000000")
    meter.sample()
    meter.sample()
    assert meter.joules() == {"cpu": (200 + 40) / 4, "ram": 8 / 4}


def test_a_counter_for_root_only_is_absent(tmp_path, monkeypatch):
    zone(tmp_path / "intel-rapl:0", "package-0", 0)
    read = Path.read_text

    def refused(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    assert open_host(tmp_path) == []
    assert open_host(tmp_path / "none") == []


def test_the_share_of_a_shared_host(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert energy.host_share({"SLURM_CPUS_ON_NODE": "16"}) == 0.25
    assert energy.host_share({"SLURM_CPUS_ON_NODE": "128"}) == 1.0
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert energy.host_share({}) == 0.125


# ---- ranks ---------------------------------------------------------------------------------------


def test_every_joule_is_counted_by_one_rank(hardware, tmp_path, monkeypatch):
    """Two hosts, two GPUs, two ranks on each GPU: 800 W and 2 x 50 W, whoever is asked."""
    zone(tmp_path / "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "host_share", lambda: 1.0)
    places = [("h1", "GPU-a"), ("h1", "GPU-a"), ("h2", "GPU-b"), ("h2", "GPU-b")]
    meters = [open_meter(rank, places) for rank in range(4)]
    hardware.now += 10
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500000000")
    for meter in meters:
        meter.sample()
    total = {part: sum(meter.joules().get(part, 0.0) for meter in meters) for part in ("gpu", "cpu")}
    assert total == {"gpu": 8000.0, "cpu": 1000.0}
    assert [sorted(meter.methods) for meter in meters] == [["cpu", "gpu"], [], ["cpu", "gpu"], []]
    assert known_parts(places, {"gpu": 2, "cpu": 2, "ram": 0}) == ["gpu", "cpu"]
    assert known_parts(places, {"gpu": 2, "cpu": 1, "ram": 0}) == ["gpu"]  # one host tells nothing
    assert known_parts([("h1", "")], {"gpu": 0, "cpu": 1, "ram": 1}) == ["cpu", "ram"]


def test_the_thread_looks_and_ends(hardware, monkeypatch):
    monkeypatch.setattr(energy, "PERIOD", 0.001)
    meter = Meter(open_gpu("GPU-b"))
    meter.start()
    hardware.now += 1
    deadline = time.monotonic() + PATIENCE
    while meter.joules() != {"gpu": 300.0} and time.monotonic() < deadline:
        time.sleep(0.001)
    assert meter.joules() == {"gpu": 300.0}
    meter.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "energy"]
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def test_the_package_has_what_is_asked_of_it():
    """The names that the simulated one stands for, on a machine without a driver."""
    code = (
        "import pynvml as n; n.nvmlDeviceGetTotalEnergyConsumption, n.nvmlDeviceGetPowerUsage,"
        " n.nvmlDeviceGetHandleByUUID, n.NVMLError_NotSupported\n"
        "from pretrain.account.energy import open_gpu; assert open_gpu('GPU-none') == []"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- whole runs ----------------------------------------------------------------------------------

WATTS = 3600.0


class Heater:
    """A package that draws 3.6 kW whatever it does: 1 kWh every 1,000 s."""

    part, method = "cpu", "RAPL"

    def __init__(self):
        self.begin = time.monotonic()

    def read(self):
        return WATTS * (time.monotonic() - self.begin)


class Powered(Paced):
    """A rank with that sensor, read whenever it is asked; its signal comes at its update number `at`."""

    def arm(self):
        super().arm()
        joules = Meter.joules

        def latest(meter):
            meter.sample()
            return joules(meter)

        Meter.joules = latest
        energy.open_host = lambda powercap: [Heater()]
        energy.host_share = lambda: 1.0
        energy.PERIOD = 0.02  # by which a run takes its joules to be late


KWH = ("budget.steps=null", "evaluate.every_steps=null", "checkpoint.every_steps=10")


def test_a_budget_of_energy_is_spent_and_never_exceeded(words, tmp_path):
    """Also by a run that was killed twice on the way, which ends there and not later."""
    options = (*KWH, "budget.kwh=0.004")  # four seconds
    for code in (-SIGKILL, -SIGKILL, 0):
        at = NEVER if code == 0 else 15
        ended = attempt(words("a", *options), strike=Powered(SIGKILL, at))
        assert ended.codes == [code], ended.text
    lines = ledger.read(tmp_path / "a")
    assert lines[-1].event == "finish" and lines[-1].step > 20
    assert lines[0].details["sensors"] == {"cpu": "RAPL"} and lines[0].details["host_share"] == 1.0
    totals = ledger.total([tmp_path / "a"])
    assert 0.5 * 0.004 < totals.joules / 3.6e6 <= 0.004
    spent = [line.joules.get("cpu", 0.0) for line in lines]
    assert spent == sorted(spent)
    metered, elapsed = totals.metered_device_seconds, totals.device_seconds["total"]
    assert totals.joules == pytest.approx(WATTS * metered, abs=0.01)
    assert metered < elapsed  # imports are not metered
    rates = [line["progress"] for line in read_metrics(tmp_path / "a")]
    assert rates == sorted(rates) and rates[-1] <= 1


def test_killed_at_any_time_joules_lack_no_more_than_a_heartbeat(words, tmp_path):
    started = Attempt(words("a", *KWH, "budget.kwh=1"), strike=Powered(SIGKILL, NEVER))
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert started.processes[0].is_alive()
        time.sleep(0.01)
    time.sleep(0.5)
    started.processes[0].kill()
    started.wait()
    before = ledger.total([tmp_path / "a"]).joules or 0.0
    assert attempt(words("a", *KWH, "budget.kwh=1"), strike=Powered(SIGKILL, 5)).codes == [-SIGKILL]
    after = ledger.total([tmp_path / "a"])
    assert after.joules >= before and after.attempts == 2
    ledger.check(tmp_path / "a")


def test_two_ranks_on_one_host_count_it_once(words, tmp_path):
    ended = attempt(words("a", *KWH, "budget.kwh=0.003"), 2, Powered(SIGKILL, NEVER))
    assert ended.codes == [0, 0], ended.text
    totals = ledger.total([tmp_path / "a"])
    watts = 2 * totals.joules / totals.metered_device_seconds  # of two ranks
    assert 0 < totals.joules <= 0.003 * 3.6e6
    assert watts == pytest.approx(WATTS, rel=1e-4)
